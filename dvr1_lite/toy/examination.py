r"""Measure what the base model can and cannot do: the figures that make ToyVideoQA usable for the method.

Difficulty-aware augmentation needs groups that vanish at both ends, a model that reads hints, and one whose accuracy
falls gradually under noise. `examine` measures all of this for each question type by sampling, and `examine_cells` for
each cell of the chain types from the *exact* probability of the correct completion, which needs no sampling and
measures one success in 10,000 as well as one in 20. The keys of the results are those of `acceptance.json`.
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
from ..config import TrainConfig
from ..data import Record, prompt_text, read_records
from ..files import resolve, write_atomically
from ..policy import Completions, Features, Policy
from ..rewards import Score, score
from ..rollout import sample_groups
from ..video import Clip, read_clip
from .recipe import CHAIN_SUCCESS, completion_text
from .world import CELLS, MOMENTS

NOISE_LEVELS = (0.0, 0.1, 0.2, 0.3, 0.6)  # standard deviation, pixel values in [0, 1]
HINT_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # share of the words of the true trace
CELL_FILES = [f"data/toyvideoqa/test_{cell}.jsonl" for cell in CELLS]
EASY_TYPES = ("colour", "shape", "direction")
CELL_HINTS = (0, 1, 4, 8, 12, 16)  # words of the true trace (16) that a hint shows
CONTROLS = {"blind": lambda frames: torch.full_like(frames, 0.5),  # what a control makes of the frames (T, 3, H, W)
            "one frame": lambda frames: frames[3:4].expand_as(frames),
            "shuffled": lambda frames: frames[[4, 2, 7, 0, 5, 3, 6, 1]]}
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
            show_answer: bool = False, swap: bool = False, control: str = "",
            greedy: bool = False) -> list[list[Score]]:
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
            prompts = [self.policy.prompt(text, self.encode(record, noise, control))
                       for text, record in zip(texts, clips)]
            rollout = sample_groups(self.policy, prompts, samples, self.max_new_tokens, generator=self.generator,
                                    greedy=greedy)
            scores += [[score(record, text) for text in group] for record, group in zip(asked, rollout.texts)]
        return scores

    @torch.no_grad()
    def success(self, records: Sequence[Record], *, hint: int | None = None, noise: float = 0.0,
                control: str = "") -> np.ndarray:
        r"""Return the exact log-probs (records, 8 + 1) of the correct completions: of the chain's eight values in the
        trace, then of all other words together. hint: words of the true trace that are shown; None: no hint."""
        rows = []
        for start in range(0, len(records), self.batch):
            asked = records[start:start + self.batch]
            hints = ["" if hint is None else cut_hint(one.trace, hint / len(one.trace.split())) for one in asked]
            prompts = [self.policy.prompt(prompt_text(one, hint=text), self.encode(one, noise, control))
                       for one, text in zip(asked, hints)]
            tokens = [[self.policy.tokenizer(completion_text(one.trace, one.answer))["input_ids"]
                       + [self.policy.end_id]] for one in asked]
            logp = self.policy.logprobs(prompts, Completions.from_lists(tokens, self.policy.pad_id))[:, 0]
            values = logp[:, 2:2 + 2 * MOMENTS:2]
            rows.append(torch.cat([values, (logp.sum(1) - values.sum(1))[:, None]], dim=1))
        return torch.cat(rows).double().numpy()

    def encode(self, record: Record, noise: float = 0.0, control: str = "") -> Features:
        r"""Encode a record's clip, with noise of this standard deviation or as a control of `CONTROLS` changes it."""
        def changed_clip() -> Clip:
            clip = read_clip(record.clip, self.num_frames)
            frames = CONTROLS[control](clip.frames) if control else clip.frames
            return replace(clip, frames=add_noise(frames, noise, seed=0)) if noise else replace(clip, frames=frames)

        return self.policy.encode(changed_clip, key=(str(record.clip), self.num_frames, noise, control))


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
    facts["controls"] = {name: accuracy(examiner.ask(records, 2, control=name)) for name in CONTROLS}
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


def examine_cell(examiner: Examiner, records: Sequence[Record], cell: str) -> dict:
    r"""Measure one cell of one chain type; every success is the mean exact probability of the correct completion.

    step: the geometric mean of the probabilities of the eight steps. log10: the mean of log10 of the success. hint:
    success against the words shown; F's should be geometric in the share h of the eight values that they show, and
    hint_error is the largest distance from success ** (1 - h) * full ** h, full with the whole trace shown.
    empty_hint, noise (sigma 0.3) and controls: success with these as a factor of the plain success.
    """
    rate = lambda logp: float(np.exp(logp.sum(1)).mean())
    logp, target = examiner.success(records), CHAIN_SUCCESS[cell]
    plain, hint = rate(logp), {words: rate(examiner.success(records, hint=words)) for words in CELL_HINTS}
    shares = {words: words // 2 / MOMENTS for words in CELL_HINTS}
    curve = {words: plain ** (1 - share) * hint[CELL_HINTS[-1]] ** share for words, share in shares.items()}
    return {"prompts": len(records), "target": target, "success": plain, "factor": plain / target,
            "log10": float(logp.sum(1).mean() / np.log(10)), "step": float(np.exp(logp[:, :MOMENTS].mean())),
            "hint": {str(words): value for words, value in hint.items()},
            "hint_error": max(abs(hint[words] - curve[words]) for words in CELL_HINTS), "empty_hint": hint[0] / plain,
            "noise": rate(examiner.success(records, noise=0.3)) / plain,
            "controls": {name: rate(examiner.success(records, control=name)) / plain for name in CONTROLS}}


def examine_cells(policy: Policy, records: Sequence[Record], *, num_frames: int, prompts_per_cell: int = 200,
                  progress: bool = True) -> dict[str, dict]:
    r"""Examine each cell of the chain types on its first `prompts_per_cell` records; the keys are like "tally-F3"."""
    by_cell = defaultdict(list)
    for record in records:
        by_cell[record.question_type, record.record_id.rpartition("-")[2]].append(record)
    examiner = Examiner(policy, num_frames, 0, torch.Generator(), batch=100)
    return {f"{kind}-{cell}": examine_cell(examiner, rows[:prompts_per_cell], cell)
            for (kind, cell), rows in tqdm(by_cell.items(), desc="examining cells", disable=not progress)}


def examine_base(folder: str | Path, config: TrainConfig) -> dict:
    r"""Examine a model folder that `pretrain` made, and write its acceptance: 200 prompts a type and a cell."""
    policy, records = Policy.load(folder), read_records(resolve(config.train_file))
    facts = examine(policy, records, num_frames=config.num_frames, max_new_tokens=config.max_new_tokens)
    asked = [record for path in CELL_FILES for record in read_records(resolve(path))]
    facts["cells"] = examine_cells(policy, asked, num_frames=config.num_frames)
    facts["encoder"] = json.loads((Path(folder) / "recipe.json").read_text(encoding="utf-8"))["encoder_accuracy"]
    write(facts, folder)
    return facts


def judge(facts: dict) -> dict[str, bool]:
    r"""Say which of the world's requirements hold, for `facts` with "types", "cells" and "encoder"."""
    cells, types = facts["cells"], facts["types"]
    easy = [types[name]["noise"] for name in EASY_TYPES if name in types]
    fair = {name: cell for name, cell in cells.items() if "-F" in name}
    main = {name: cell for name, cell in cells.items() if "-S" not in name}
    drops = [noise["0.0"] - noise["0.3"] for noise in easy]
    return {"plain success of every cell within a factor 2 of its target": all(
                0.5 <= cell["factor"] <= 2 for cell in cells.values()),
            "hint curve of F geometric within 10 points (lenient where success is below 10 %)": all(
                cell["hint_error"] <= 0.1 for cell in fair.values()),
            "an empty hint changes success by less than a fifth (F and A; in S it is meant to)": all(
                0.8 <= cell["empty_hint"] <= 1.2 for cell in main.values()),
            "noise of 0.3 costs the easy types 20 to 50 points": all(0.2 <= drop <= 0.5 for drop in drops),
            "encoder at least 95 % correct in every environment": all(
                value >= 0.95 for values in facts["encoder"].values() for value in values.values()),
            "blind, one frame or shuffled: at most a fifth of the success (F1 and A1)": all(
                value <= 0.2 for name, cell in cells.items() if name.endswith(("F1", "A1"))
                for value in cell["controls"].values())}


def as_table(facts: dict) -> str:
    r"""Return Markdown tables: figures of each type in per cent, accuracy against hint and noise, then the cells."""
    rows = {**facts["types"], "**mean**": facts["overall"]}
    keys = [*FIGURES, "trace_found"]
    text = _markdown([key.replace("_", " ") for key in keys],
                     {name: [row.get(key) for key in keys] for name, row in rows.items()})
    for key, title in (("hint", "share of the true trace given as a hint"), ("noise", "sigma of the frame noise")):
        levels = list(facts["overall"][key])
        text += f"\nAccuracy against the {title}:\n\n"
        text += _markdown(levels, {name: [row[key][level] for level in levels] for name, row in rows.items()})
    return text + (_cell_tables(facts) if "cells" in facts else "")


def _cell_tables(facts: dict) -> str:
    keys, cells = ("target", "success", "factor", "step", "empty_hint", "hint_error", "noise"), facts["cells"]
    lines = [["cell", *(key.replace("_", " ") for key in keys), *(f"hint {words}" for words in CELL_HINTS), *CONTROLS]]
    lines.append(["---"] * len(lines[0]))
    for name, cell in cells.items():
        values = [*(cell[key] for key in keys), *cell["hint"].values(), *cell["controls"].values()]
        lines.append([name, *(f"{value:.3g}" for value in values)])
    table = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    verdicts = "".join(f"- {'yes' if holds else '**no**'}: {text}\n" for text, holds in judge(facts).items())
    return ("\nExact success of cells. *target*, *success*, *hint N* (N of 16 words of the trace shown): probability "
            "of the correct completion; *step*: the geometric mean over its eight steps; *factor*: success over "
            "target; *empty hint*, *noise* (sigma 0.3), *blind*, *one frame*, *shuffled*: success with these over the "
            f"plain success; *hint error*: largest distance from a geometric curve:\n\n{table}\n{verdicts}")


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
    rounded = json.loads(json.dumps(facts), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    write_atomically(Path(folder) / "acceptance.json", json.dumps(rounded, indent=1) + "\n")
    write_atomically(Path(folder) / "ACCEPTANCE.md", REPORT.format(tables=as_table(facts), **facts))
