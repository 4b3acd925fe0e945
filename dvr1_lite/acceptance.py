r"""What the base model can and cannot do, measured: the figures that make ToyVideoQA usable for the method.

A benchmark for difficulty-aware augmentation needs groups that vanish at both ends, a model that reads hints, and one
that loses its sight step by step under noise. `examine` measures all of it on one data set, per question type.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .augmentation import add_noise, cut_hint
from .data import Record, prompt_text
from .policy import Policy
from .rewards import Score, score
from .rollout import sample_groups
from .video import read_clip

NOISE_LEVELS = (0.0, 0.1, 0.2, 0.4, 0.8)   # sigma, pixel values in [0, 1]
HINT_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # share of the true trace's words


@dataclass(frozen=True)
class Examiner:
    """Samples answers to `records` under a change of the prompt; `batch` prompts at a time."""
    policy: Policy
    num_frames: int
    max_new_tokens: int
    generator: torch.Generator
    batch: int = 50

    def ask(self, records: list[Record], samples: int, *, noise=0.0, hint=0.0, show_answer=False, swap=False,
            greedy=False) -> list[list[Score]]:
        """-> scores, one list of `samples` a record. swap: the next record's clip is shown instead of its own."""
        scores = []
        for start in range(0, len(records), self.batch):
            asked = records[start:start + self.batch]
            shown = [records[(start + i + 1) % len(records)] if swap else r for i, r in enumerate(asked)]
            prompts = [self.policy.prompt(self._text(r, hint, show_answer), self._features(s, noise))
                       for r, s in zip(asked, shown)]
            rollout = sample_groups(self.policy, prompts, samples, self.max_new_tokens, generator=self.generator,
                                    greedy=greedy)
            scores += [[score(r, text) for text in texts] for r, texts in zip(asked, rollout.texts)]
        return scores

    def _text(self, record: Record, hint: float, show_answer: bool) -> str:
        return prompt_text(record, hint=cut_hint(record.trace, hint) if hint else "", show_answer=show_answer)

    def _features(self, record: Record, noise: float):
        def noisy_clip():
            clip = read_clip(record.clip, self.num_frames)
            return replace(clip, frames=add_noise(clip.frames, noise, seed=0)) if noise else clip
        return self.policy.encode(noisy_clip, key=(str(record.clip), noise))


def accuracy(scores: list[list[Score]]) -> float:
    return float(np.mean([[s.accuracy for s in group] for group in scores]))


def group_facts(scores: list[list[Score]]) -> dict:
    """Shares of the groups: no spread of the total reward, and of these all right, all wrong, level in between."""
    totals = np.array([[s.total for s in group] for group in scores])
    right = np.array([[s.normalised for s in group] for group in scores]).min(axis=1) > 1 - 1e-6
    wrong = np.array([[s.accuracy for s in group] for group in scores]).max(axis=1) == 0
    flat = totals.std(axis=1) < 1e-6
    return {"zero_spread": float(flat.mean()), "all_right": float((flat & right).mean()),
            "all_wrong": float((flat & wrong).mean())}


def examine_type(examiner: Examiner, records: list[Record], group_size: int = 8) -> dict:
    """All figures of one question type."""
    groups = examiner.ask(records, group_size)
    facts = {"prompts": len(records), "format": float(np.mean([[s.format for s in g] for g in groups])),
             "sampled": accuracy(groups), "greedy": accuracy(examiner.ask(records, 1, greedy=True)),
             **group_facts(groups)}
    facts["hint"] = {str(h): accuracy(examiner.ask(records, 2, hint=h)) for h in HINT_SHARES}
    facts["noise"] = {str(s): accuracy(examiner.ask(records, 2, noise=s)) for s in NOISE_LEVELS}
    facts["swapped_clip"] = accuracy(examiner.ask(records, 2, swap=True))
    failed = [r for r, group in zip(records, groups) if max(s.accuracy for s in group) == 0]
    facts["all_wrong_prompts"] = len(failed)
    if failed:
        traces = examiner.ask(failed, 4, show_answer=True)
        facts["trace_found"] = float(np.mean([any(s.right for s in group) for group in traces]))
    return facts


def examine(policy: Policy, records: list[Record], *, num_frames: int, max_new_tokens: int, prompts_per_type: int = 200,
            seed: int = 0, progress: bool = True) -> dict:
    """Examines the model on the first `prompts_per_type` records of each type. Returns figures per type and overall,
    the latter means over types (and over all-wrong prompts for `trace_found`); all samples at temperature 1."""
    by_type = defaultdict(list)
    for record in records:
        if len(by_type[record.question_type]) < prompts_per_type:
            by_type[record.question_type].append(record)
    examiner = Examiner(policy, num_frames, max_new_tokens, torch.Generator().manual_seed(seed))
    types = {name: examine_type(examiner, chosen)
             for name, chosen in tqdm(by_type.items(), desc="examining", disable=not progress)}
    mean = lambda pick: float(np.mean([pick(f) for f in types.values()]))
    overall = {key: mean(lambda f: f[key]) for key in ("format", "sampled", "greedy", "zero_spread", "all_right",
                                                       "all_wrong", "swapped_clip")}
    for table in ("hint", "noise"):
        overall[table] = {level: mean(lambda f: f[table][level]) for level in next(iter(types.values()))[table]}
    failed = sum(f["all_wrong_prompts"] for f in types.values())
    found = sum(f.get("trace_found", 0.0) * f["all_wrong_prompts"] for f in types.values())
    overall["trace_found"] = found / failed if failed else None
    return {"seed": seed, "prompts_per_type": prompts_per_type, "overall": overall, "types": types}


def as_table(facts: dict) -> str:
    """Markdown: per type the groups, then accuracy against hint and against noise, in per cent."""
    rows = {**facts["types"], "**mean**": facts["overall"]}
    share = lambda x: "-" if x is None else f"{100 * x:.0f}"
    keys = ["format", "sampled", "greedy", "zero_spread", "all_right", "all_wrong", "swapped_clip", "trace_found"]
    head = ["type", *(key.replace("_", " ") for key in keys)]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    lines += ["| " + " | ".join([name, *(share(f.get(k)) for k in keys)]) + " |" for name, f in rows.items()]
    for table, title in (("hint", "share of the true trace given as a hint"), ("noise", "sigma of the frame noise")):
        levels = list(facts["overall"][table])
        lines += ["", f"Accuracy against the {title}:", "", "| type | " + " | ".join(levels) + " |",
                  "| --- " * (len(levels) + 1) + "|"]
        lines += [f"| {name} | " + " | ".join(share(f[table][level]) for level in levels) + " |"
                  for name, f in rows.items()]
    return "\n".join(lines) + "\n"


COLUMNS = """\
- *format*: completions of the form `<think>...</think><answer>...</answer>`; *sampled*: right answers at temperature 1;
  *greedy*: right answers with the most probable token each time;
- *zero spread*: groups whose eight total rewards are equal, so that they teach nothing; of these *all right* have the
  largest reward throughout and *all wrong* no right answer (the rest agree on something between);
- *swapped clip*: right answers when another question's clip is shown;
- *trace found*: of the questions that no completion of the group answers, those for which one of four traces written
  with the answer shown is right.

"""


def write(facts: dict, folder: str | Path) -> None:
    """Writes `acceptance.json` and `ACCEPTANCE.md` into the model's folder."""
    folder = Path(folder)
    (folder / "acceptance.json").write_text(json.dumps(_rounded(facts), indent=1) + "\n", encoding="utf-8")
    (folder / "ACCEPTANCE.md").write_text(
        "# What the base model can do\n\nMeasured in the training environment, in per cent, by "
        "`python -m dvr1_lite pretrain`; 200 questions a type, groups of 8 at temperature 1.\n\n"
        + COLUMNS + as_table(facts), encoding="utf-8")


def _rounded(value):
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return round(value, 4) if isinstance(value, float) else value
