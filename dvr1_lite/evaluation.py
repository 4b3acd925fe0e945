r"""Answer questions and summarise the answers: accuracy, mIoU and R@m with intervals (Eq. 22-24).

Questions about one clip are not independent, so every interval is clustered by clip: the standard error comes from the
clips' sums of residuals, and the quantile from Student's t with (clips - 1) degrees of freedom.

Predictions are rows of a JSONL file, written as they are made, so that an interrupted evaluation resumes where it
stopped; figures are always computed over all rows of the file.
"""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from scipy.stats import t as student_t
from tqdm import tqdm

from .data import Record, prompt_text
from .errors import ClipError, ConfigError, within_memory
from .files import append_lines, make_folder, read_lines, write_atomically
from .own_reward import OwnScore
from .policy import Policy, encode_record
from .rewards import asks_span, parse_completion, score, temporal_iop
from .rollout import sample_groups

if TYPE_CHECKING:
    from .config import TrainConfig

RECALL_AT = (0.3, 0.5, 0.7)
IOP_AT = (0.3, 0.5)
GROUNDED = 0.5  # the least IoP with which NExT-GQA counts an answer as grounded
ASKED_WITH = ("num_frames", "frame_size", "instruction", "max_new_tokens", "after_video", "judge")  # config fields
WINDOW = 64  # batches whose questions are sorted by length together; the clips of more would not fit a small cache

# --- predictions -----------------------------------------------------------------------------------------------------


def limited(records: Sequence[Record], limit: int) -> list[Record]:
    r"""Draw `limit` records, the same ones in every run, in the file's order; all of them for 0."""
    if not 0 < limit < len(records):
        return list(records)
    return [records[i] for i in sorted(random.Random("evaluation").sample(range(len(records)), limit))]


def evaluate(policy: Policy, records: Sequence[Record], config: TrainConfig, *, temperature: float | None = None,
             samples: int | None = None, out: str | Path | None = None, label: str = "evaluate",
             progress: bool = False, scoring: Callable | None = None, shown: Sequence[Record] | None = None,
             change: Callable | None = None) -> list[dict]:
    r"""Answer every record and score the answers; return one row a completion, in the order they were made.

    config: its `eval_batch` questions are answered together, each prefilled once; temperature and samples stand for
    `eval_temperature` (0: the most probable token, Eq. 22's single answer; above 0: sampled, with a seed of its own
    for each batch) and `eval_samples` if not given. out: JSONL file that rows are appended to; an existing one is
    resumed, and a batch that was cut short is made again, so that the result does not depend on where it stopped. A
    row holds `index` and `record_id`, `clip`, `question_type`, `sample`, `completion` and the parts of its score; one
    with `error` stands for a record whose clip cannot be read. scoring: a reward of your own (own_reward.py), which
    adds `task_reward` and `reward_error`; None is `rewards.score`. shown and change: one of `controls`: the records
    whose clips are shown instead, and what is done to their frames.
    Raises `ClipError` if no clip can be read, `ConfigError` if `out` holds answers to other records, `UserError` if
    the memory or the disk is full; the rows in `out` stay.
    """
    temperature = config.eval_temperature if temperature is None else temperature
    samples = config.eval_samples if samples is None else samples
    if samples > 1 and temperature == 0:
        raise ConfigError(f"{samples} answers to each question at temperature 0 are all the same: give one, or a "
                          f"temperature above 0")
    batches = _batches(policy, records, config)
    path = None if out is None else Path(out)
    rows = [] if path is None else _read_done(path, records, batches, samples)
    finished = {row["index"] for row in rows}
    with tqdm(total=len(records), initial=len(finished), desc=label, **({} if progress else {"disable": True})) as bar:
        for number, indices in enumerate(batches):
            if indices and indices[0] in finished:
                continue
            with within_memory(f"answering {len(indices)} questions together", "give a smaller eval_batch"):
                made = _answer(policy, records, indices, config, temperature, f"{config.seed}/{number}", samples,
                               scoring or score, shown or records, change)
            rows += made
            if path is not None:
                append_lines(path, made)
            bar.update(len(indices))
    if records and all("error" in row for row in rows):
        raise ClipError(f"no clip of the {len(records)} records can be read. The first error: {rows[0]['error']}")
    return rows


def controls(records: Sequence[Record], seed: int) -> dict[str, tuple[list[Record], Callable | None]]:
    r"""Return, by name, what takes the place of the video: the records whose clips are shown, and what is done to their
    frames (T, 3, H, W). A success that stays with "blind" needs no video, one that stays with "one frame" no motion."""
    clips = list(dict.fromkeys(record.clip for record in records if record.clip is not None))
    following = dict(zip(clips, clips[1:] + clips[:1]))
    order = lambda frames: torch.randperm(len(frames), generator=torch.Generator().manual_seed(seed))
    changes = {"one frame": (list(records), lambda frames: frames[len(frames) // 2:][:1].expand_as(frames)),
               "shuffled frames": (list(records), lambda frames: frames[order(frames)]),
               "blind": (list(records), lambda frames: torch.full_like(frames, 0.5))}
    if len(clips) < 2:
        return changes
    return {"another clip": ([replace(record, clip=following.get(record.clip)) for record in records], None)} | changes


def _batches(policy: Policy, records: Sequence[Record], config: TrainConfig) -> list[list[int]]:
    r"""Group the records' indices into batches of similar prompt length, near each other in the file."""
    texts = [prompt_text(record, instruction=config.instruction) for record in records]
    lengths = [len(ids) for ids in policy.tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []
    batches, batch = [], config.eval_batch
    for start in range(0, len(records), WINDOW * batch):
        window = sorted(range(start, min(start + WINDOW * batch, len(records))), key=lambda i: lengths[i])
        batches += [window[i:i + batch] for i in range(0, len(window), batch)]
    return batches


def _answer(policy: Policy, records: Sequence[Record], indices: list[int], config: TrainConfig, temperature: float,
            seed: str, samples: int, scoring: Callable, shown: Sequence[Record],
            change: Callable | None) -> list[dict]:
    prompts, rows = {}, []
    for index in indices:
        try:
            features = encode_record(policy, shown[index], config, change)
            prompts[index] = policy.prompt(prompt_text(records[index], instruction=config.instruction), features)
        except ClipError as error:
            rows += [_about(index, records[index], sample) | {"error": str(error)} for sample in range(samples)]
    if not prompts:
        return rows
    generator = torch.Generator().manual_seed(int.from_bytes(seed.encode(), "big") % 2**63)
    rollout = sample_groups(policy, list(prompts.values()), samples, config.max_new_tokens, generator=generator,
                            temperature=temperature or 1.0, greedy=temperature == 0)
    for index, texts in zip(prompts, rollout.texts):
        rows += [prediction(index, records[index], text, sample, config.judge, scoring)
                 for sample, text in enumerate(texts)]
    return rows


def prediction(index: int, record: Record, completion: str, sample: int = 0, judge: str = "strict",
               scoring: Callable = score) -> dict:
    r"""Build one row: which record, what was answered, the parts of its score, and the IoP of a predicted span."""
    scored = scoring(record, completion, judge)
    row = _about(index, record, sample) | {
        "completion": completion, "format": scored.format, "accuracy": scored.accuracy, "iou": scored.iou,
        "total": scored.total, "maximum": scored.maximum}
    if isinstance(scored, OwnScore):
        row |= {"task_reward": scored.task, "reward_error": scored.error}
    if asks_span(record):  # the first predicted span, the best over the true ones
        spans = parse_completion(completion).spans
        row["iop"] = max(temporal_iop(spans[0], truth) for truth in record.spans) if spans else 0.0
    return row


def _about(index: int, record: Record, sample: int) -> dict:
    return {"index": index, "record_id": record.record_id, "clip": Path(record.clip_id).as_posix(),
            "question_type": record.question_type, "sample": sample}


def _read_done(path: Path, records: Sequence[Record], batches: list[list[int]], samples: int) -> list[dict]:
    r"""Read the rows of complete batches; whatever follows them in the file is cut off."""
    make_folder(path.parent)
    by_index = defaultdict(list)
    for row in read_lines(path):
        index = row.get("index", -1)
        if not 0 <= index < len(records) or records[index].record_id != row["record_id"]:
            raise ConfigError(f"{path} holds answers to other records ({row.get('record_id')!r}): give another folder")
        by_index[index].append(row)
    done = [index for indices in batches if all(len(by_index[i]) == samples for i in indices) for index in indices]
    rows = [row for index in done for row in by_index[index]]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


# --- summaries -------------------------------------------------------------------------------------------------------


def summarise(predictions: Iterable[dict]) -> dict:
    r"""Summarise a set of predictions; shares are in [0, 1].

    `accuracy` (Eq. 22) with `ci95` [low, high] clustered by clip, `n` questions and `clips`; the same four for each
    entry of `by_type`; `answers`; `format_rate`; `broken` questions, which count nowhere else; and, where time spans
    were asked, `mean_iou` (Eq. 23) and `recall` at 0.3, 0.5 and 0.7 (Eq. 24) over those questions alone, and what
    `grounded_answers` adds. With a reward of your own, `task_reward` is its mean, `task_reward_ci95` the interval, and
    `reward_errors` counts the answers that it failed for.
    """
    rows = list(predictions)
    good = [row for row in rows if "error" not in row]
    by_type = defaultdict(list)
    for row in good:
        by_type[row["question_type"]].append(row)
    summary = _accuracy(good) | {
        "answers": len(good),
        "broken": len({row["index"] for row in rows}) - len({row["index"] for row in good}),
        "format_rate": _mean([row["format"] for row in good]),
        "by_type": {name: _accuracy(by_type[name]) for name in sorted(by_type)},
    }
    if own := [row["task_reward"] for row in good if "task_reward" in row]:
        summary |= {"task_reward": _mean(own), "reward_errors": sum(bool(row["reward_error"]) for row in good),
                    "task_reward_ci95": list(mean_interval(own, [row["clip"] for row in good]))}
    ious = [row["iou"] for row in good if row["iou"] is not None]
    return summary | (grounding(ious) if ious else {}) | grounded_answers(good)


def grounding(ious: Sequence[float]) -> dict:
    r"""Compute mean IoU (Eq. 23) and R@m, the share of answers whose span has IoU >= m (Eq. 24)."""
    return {"mean_iou": _mean(ious), "recall": {f"{m}": _mean([float(iou >= m) for iou in ious])
                                                for m in RECALL_AT}}


def grounded_answers(rows: Sequence[dict]) -> dict:
    r"""Compute NExT-GQA's other official figures, over the questions that ask a span; {} if there are none.

    `mean_iop` and `iop_at` 0.3 and 0.5, intersection over prediction, the best true segment of each question;
    `acc_gqa`, the share whose answer is correct *and* whose IoP is at least 0.5, with `acc_gqa_ci95`;
    `mean_iou_ci95`. Intervals are clustered by clip. A malformed answer counts 0 everywhere.
    """
    asked = [row for row in rows if "iop" in row]
    if not asked:
        return {}
    clips, iops = [row["clip"] for row in asked], [row["iop"] for row in asked]
    grounded = [float(row["accuracy"] == 1.0 and row["iop"] >= GROUNDED) for row in asked]
    return {"mean_iou_ci95": list(mean_interval([row["iou"] for row in asked], clips, 0.0, 1.0)),
            "mean_iop": _mean(iops),
            "iop_at": {f"{m}": _mean([float(iop >= m) for iop in iops]) for m in IOP_AT},
            "acc_gqa": _mean(grounded), "acc_gqa_ci95": list(mean_interval(grounded, clips))}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _accuracy(rows: list[dict]) -> dict:
    values, clusters = [row["accuracy"] for row in rows], [row["clip"] for row in rows]
    low, high = mean_interval(values, clusters)
    return {"accuracy": _mean(values), "ci95": [low, high], "n": len({row["index"] for row in rows}),
            "clips": len(set(clusters))}


def paired_change(before: Iterable[dict], after: Iterable[dict], key: str = "accuracy") -> dict:
    r"""Compute the change of accuracy from one set of predictions to another on the same questions, in shares.

    key: "accuracy" or "task_reward". Each question's mean before is taken from its mean after, and the differences are
    clustered by clip:
    `change`, `ci95` [low, high], `n` questions and `clips`; the same by question type. Questions that only one of the
    two could answer (a broken clip) are left out and counted in `unpaired`.
    """
    old, new = _per_question(before, key), _per_question(after, key)
    shared = sorted(old.keys() & new.keys())
    by_type = defaultdict(list)
    for index in shared:
        by_type[new[index][2]].append(index)

    def change(indices: list[int]) -> dict:
        differences = [new[i][0] - old[i][0] for i in indices]
        low, high = mean_interval(differences, [new[i][1] for i in indices], -1.0, 1.0)
        return {"change": _mean(differences), "ci95": [low, high], "n": len(indices)}

    return change(shared) | {
        "clips": len({new[index][1] for index in shared}), "unpaired": len(old.keys() ^ new.keys()),
        "by_type": {name: change(indices) for name, indices in sorted(by_type.items())}}


def _per_question(rows: Iterable[dict], key: str) -> dict[int, tuple[float, str, str]]:
    grouped = defaultdict(list)
    for row in rows:
        if "error" not in row:
            grouped[row["index"]].append(row)
    return {index: (_mean([row[key] for row in group]), group[0]["clip"], group[0]["question_type"])
            for index, group in grouped.items()}


def compare_saved(before: str | Path, after: str | Path) -> tuple[dict, dict, dict, list[str]]:
    r"""Return both summaries, the paired change of two evaluations saved by `evaluate`, with that of a reward of your
    own as `task_reward` and the number of answers that are not the same as `differing`, and in which of `ASKED_WITH`,
    temperature, samples and reward they differ.

    Raises `ConfigError` if a folder holds no finished evaluation, or the two asked different questions.
    """
    rows, summaries = [], []
    for folder in map(Path, (before, after)):
        needed = ("predictions.jsonl", "summary.json", "evaluation.json")
        if not all((folder / name).is_file() for name in needed):
            raise ConfigError(f"{folder} holds no finished evaluation ({', '.join(needed)}): give the --out folder of "
                              f"an evaluate command")
        rows.append(list(read_lines(folder / "predictions.jsonl")))
        summaries.append(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    old, new = ({row["index"]: row["record_id"] for row in part} for part in rows)
    if old != new:
        raise ConfigError(f"{before} and {after} hold answers to different questions ({len(old)} and {len(new)}): "
                          f"evaluate both with the same --data and --limit")
    old, new = (json.loads((Path(folder) / "evaluation.json").read_text(encoding="utf-8"))
                for folder in (before, after))
    differing = [name for name in (*ASKED_WITH, "temperature", "samples", "reward") if old.get(name) != new.get(name)]
    own = {"task_reward": paired_change(*rows, "task_reward")} if all("task_reward" in one for one in summaries) else {}
    said = [{(row["index"], row["sample"], row.get("accuracy"), row.get("task_reward"),
              replace(parse_completion(row.get("completion")), think="")) for row in part} for part in rows]
    return *summaries, paired_change(*rows) | own | {"differing": len(said[1] - said[0])}, differing


def claim_folder(out: Path, settings: dict) -> None:
    r"""Mark a folder as that of one evaluation; refuse one that holds another. Raises `ConfigError`."""
    path = out / "evaluation.json"
    if path.exists() and (out / "predictions.jsonl").exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in settings if saved.get(name) != settings[name]]
        if changed:
            raise ConfigError(f"{out} holds an evaluation with another {', '.join(changed)}: give another --out")
    elif out.exists() and any(entry != path and entry.suffix != ".part" for entry in out.iterdir()):  # left by a kill
        raise ConfigError(f"{out} is not empty and holds no evaluation: give another --out")
    make_folder(out)
    write_atomically(path, json.dumps(settings, indent=2) + "\n")


# --- intervals -------------------------------------------------------------------------------------------------------


def cluster_standard_error(values: Sequence[float], clusters: Sequence[str]) -> float:
    r"""Compute the cluster-robust standard error of a mean.

    $$\sqrt{\frac{C}{C-1} \sum_c \Big(\sum_{i \in c} (x_i - \bar x)\Big)^2} \Big/ n$$

    for C clusters and n values. With clusters of one it is the usual $s / \sqrt n$. NaN for fewer than two clusters.
    """
    mean, sums = _mean(values), defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - mean
    count = len(sums)
    if count < 2:
        return math.nan
    return math.sqrt(count / (count - 1) * math.fsum(total**2 for total in sums.values())) / len(values)


def mean_interval(values: Sequence[float], clusters: Sequence[str], lowest: float = 0.0, highest: float = 1.0
                  ) -> tuple[float, float]:
    r"""Compute the 95 % interval: mean +- t quantile x `cluster_standard_error`, cut to [lowest, highest].

    For fewer than two clusters it is that whole range. Where all clusters agree, a standard error of 0 would claim
    certainty: each side then reaches the share $t^2 / (C + t^2)$ of the way to its bound, for C clusters, which is
    Wilson's interval where the values are all 0 or all 1.
    """
    count = len(set(clusters))
    if count < 2:
        return lowest, highest
    mean, quantile = _mean(values), float(student_t.ppf(0.975, count - 1))
    error = cluster_standard_error(values, clusters)
    if error < 1e-12:
        reach = quantile**2 / (count + quantile**2)
        return mean - reach * (mean - lowest), mean + reach * (highest - mean)
    reach = quantile * error
    return max(lowest, mean - reach), min(highest, mean + reach)
