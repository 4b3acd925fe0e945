r"""Measure what the base model can and cannot do: the figures that make ToyVideoQA usable for the method.

Difficulty-aware augmentation needs groups that vanish at both ends, a model that reads hints, and one whose accuracy
falls gradually under noise. `examine` measures all of this for each question type. The keys of its result are those of
the recorded file `acceptance.json`.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..augmentation import add_noise, cut_hint
from ..data import Record, prompt_text
from ..files import write_atomically
from ..policy import Features, Policy
from ..rewards import Score, score
from ..rollout import sample_groups
from ..video import Clip, read_clip

NOISE_LEVELS = (0.0, 0.1, 0.2, 0.4, 0.8)  # standard deviation, pixel values in [0, 1]
HINT_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # share of the words of the true trace
FIGURES = ("format", "sampled", "greedy", "zero_spread", "all_right", "all_wrong", "swapped_clip")


@dataclass(frozen=True)
class Examiner:
    r"""Sample answers to records whose prompt or clip may be changed; `batch` prompts at a time, at temperature 1."""

    policy: Policy
    num_frames: int
    max_new_tokens: int
    generator: torch.Generator
    batch: int = 50

    def ask(self, records: Sequence[Record], samples: int, *, noise: float = 0.0, hint: float = 0.0,
            show_answer: bool = False, swap: bool = False, greedy: bool = False) -> list[list[Score]]:
        r"""Return `samples` scores for each record.

        noise: standard deviation on the frames. hint: share of the true trace that is shown. show_answer: the prompt
        contains the answer. swap: the next record's clip takes the place of the record's own.
        """
        scores = []
        for start in range(0, len(records), self.batch):
            asked = records[start:start + self.batch]
            clips = [records[(start + index + swap) % len(records)] for index in range(len(asked))]
            texts = [prompt_text(record, hint=cut_hint(record.trace, hint) if hint else "", show_answer=show_answer)
                     for record in asked]
            prompts = [self.policy.prompt(text, self._encode(record, noise)) for text, record in zip(texts, clips)]
            rollout = sample_groups(self.policy, prompts, samples, self.max_new_tokens, generator=self.generator,
                                    greedy=greedy)
            scores += [[score(record, text) for text in group] for record, group in zip(asked, rollout.texts)]
        return scores

    def _encode(self, record: Record, noise: float) -> Features:
        def noisy_clip() -> Clip:
            clip = read_clip(record.clip, self.num_frames)
            return replace(clip, frames=add_noise(clip.frames, noise, seed=0)) if noise else clip

        return self.policy.encode(noisy_clip, key=(str(record.clip), self.num_frames, noise))


def accuracy(scores: Sequence[Sequence[Score]]) -> float:
    r"""Return the mean accuracy over all scores."""
    return float(np.mean([[one.accuracy for one in group] for group in scores]))


def group_facts(scores: Sequence[Sequence[Score]]) -> dict[str, float]:
    r"""Return the share of groups without reward spread; of these, the all-correct and the all-incorrect ones."""
    normalised = np.array([[one.normalised for one in group] for group in scores])
    incorrect = np.array([[one.accuracy for one in group] for group in scores]).max(axis=1) == 0
    flat = np.ptp(normalised, axis=1) < 1e-6
    correct = normalised.min(axis=1) > 1 - 1e-6
    return {"zero_spread": float(flat.mean()), "all_right": float((flat & correct).mean()),
            "all_wrong": float((flat & incorrect).mean())}


def examine_type(examiner: Examiner, records: Sequence[Record], group_size: int = 8) -> dict:
    r"""Measure all figures on the records of one question type."""
    groups = examiner.ask(records, group_size)
    facts = {"prompts": len(records), "format": float(np.mean([[one.format for one in group] for group in groups])),
             "sampled": accuracy(groups), "greedy": accuracy(examiner.ask(records, 1, greedy=True)),
             **group_facts(groups)}
    facts["hint"] = {str(share): accuracy(examiner.ask(records, 2, hint=share)) for share in HINT_SHARES}
    facts["noise"] = {str(sigma): accuracy(examiner.ask(records, 2, noise=sigma)) for sigma in NOISE_LEVELS}
    facts["swapped_clip"] = accuracy(examiner.ask(records, 2, swap=True))
    failed = [record for record, group in zip(records, groups) if max(one.accuracy for one in group) == 0]
    facts["all_wrong_prompts"] = len(failed)
    if failed:
        traces = examiner.ask(failed, 4, show_answer=True)
        facts["trace_found"] = float(np.mean([any(one.correct for one in group) for group in traces]))
    return facts


def examine(policy: Policy, records: Sequence[Record], *, num_frames: int, max_new_tokens: int,
            prompts_per_type: int = 200, seed: int = 0, progress: bool = True) -> dict:
    r"""Examine the model on the first `prompts_per_type` records of each question type.

    Returns the figures for each type under "types" and their means over types under "overall", where `trace_found` is
    the mean over all prompts that no completion answered correctly, None if there are none.
    """
    by_type = defaultdict(list)
    for record in records:
        by_type[record.question_type].append(record)
    examiner = Examiner(policy, num_frames, max_new_tokens, torch.Generator().manual_seed(seed))
    types = {name: examine_type(examiner, rows[:prompts_per_type])
             for name, rows in tqdm(by_type.items(), desc="examining", disable=not progress)}
    found = list(types.values())
    overall = {key: float(np.mean([facts[key] for facts in found])) for key in FIGURES}
    for key in ("hint", "noise"):
        overall[key] = {level: float(np.mean([facts[key][level] for facts in found])) for level in found[0][key]}
    failed = [facts["all_wrong_prompts"] for facts in found]
    traces = [facts.get("trace_found", 0.0) for facts in found]
    overall["trace_found"] = float(np.average(traces, weights=failed)) if any(failed) else None
    return {"seed": seed, "prompts_per_type": prompts_per_type, "overall": overall, "types": types}


def as_table(facts: dict) -> str:
    r"""Return Markdown tables in per cent: the figures of each type, then accuracy against hint and against noise."""
    rows = {**facts["types"], "**mean**": facts["overall"]}
    keys = [*FIGURES, "trace_found"]
    text = _markdown([key.replace("_", " ") for key in keys],
                     {name: [row.get(key) for key in keys] for name, row in rows.items()})
    for key, title in (("hint", "share of the true trace given as a hint"), ("noise", "sigma of the frame noise")):
        levels = list(facts["overall"][key])
        text += f"\nAccuracy against the {title}:\n\n"
        text += _markdown(levels, {name: [row[key][level] for level in levels] for name, row in rows.items()})
    return text


def _markdown(columns: Sequence[str], rows: dict[str, list[float | None]]) -> str:
    lines = [["type", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *("-" if value is None else f"{100 * value:.0f}" for value in row)] for name, row in rows.items()]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


REPORT = """\
# What the base model can do

Measured in the training environment, in per cent, by `python -m dvr1_lite pretrain`; {prompts_per_type} questions a \
type, groups of 8 at temperature 1.

- *format*: completions of the form `<think>...</think><answer>...</answer>`; *sampled*: correct answers at temperature
  1; *greedy*: correct answers with the most probable token each time;
- *zero spread*: groups whose eight total rewards are equal, so that their advantages vanish; of these, *all right* have
  the largest reward throughout and *all wrong* contain no correct answer (the others agree on something between);
- *swapped clip*: correct answers when another question's clip is shown;
- *trace found*: of the questions that no completion of the group answers correctly, those for which at least one of
  four completions written with the answer shown is correct.

{tables}"""


def write(facts: dict, folder: str | Path) -> None:
    r"""Write `acceptance.json` and `ACCEPTANCE.md` into the model's folder. Raises `UserError`."""
    rounded = json.loads(json.dumps(facts), parse_float=lambda digits: round(float(digits), 4))
    write_atomically(Path(folder) / "acceptance.json", json.dumps(rounded, indent=1) + "\n")
    write_atomically(Path(folder) / "ACCEPTANCE.md", REPORT.format(tables=as_table(facts), **facts))
