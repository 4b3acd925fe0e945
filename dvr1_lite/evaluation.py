r"""Answers to questions, and what they amount to: accuracy, mIoU and R@m with intervals (Eq. 22-24).

Questions about one clip are not independent, so every interval here is clustered by clip: the standard error comes
from the clips' sums of residuals, and the quantile from Student's t with (clips - 1) degrees of freedom.

Predictions are rows of a JSONL file, written as they are made, so that an interrupted evaluation continues where it
stopped; figures are always computed over all rows of the file, never over the part that was made last.
"""

import functools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from .data import Record, prompt_text
from .errors import ClipError, ConfigError, within_memory
from .files import append_lines, make_folder, read_lines, write_atomically
from .policy import Features, Policy
from .rewards import asks_span, parse_completion, score, temporal_iop
from .rollout import sample_groups
from .video import DECODE_TIMEOUT, read_clip, read_image

RECALL_AT = (0.3, 0.5, 0.7)
IOP_AT = (0.3, 0.5)
GROUNDED = 0.5  # the least IoP with which NExT-GQA counts an answer as grounded
WINDOW = 64  # batches whose questions are sorted by length together; the clips of more would not fit a small cache

# --- what the policy sees --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    r"""How records are shown: frames sampled a clip, their height and width in pixels, a last line of the prompt, and
    the seconds that decoding a clip may take."""

    num_frames: int
    frame_size: int
    instruction: str = ""
    decode_timeout: float = DECODE_TIMEOUT


def see(policy: Policy, record: Record, view: View,
        change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Features:
    r"""The encoded clip and image of a record, as they are: kept in the policy's feature cache.

    change: what an augmentation does to the clip's frames (T, 3, H, W), or to the image (1, 3, H, W) if there is no
    clip; such features serve one step only and are not kept. Raises `ClipError`, naming a file that cannot be read.
    """
    size = (view.frame_size, view.frame_size)

    def encode() -> Features:
        clip = read_clip(record.clip, view.num_frames, size, timeout=view.decode_timeout) if record.clip else None
        image = read_image(record.image, size) if record.image else None
        if change is not None and clip is not None:
            clip = replace(clip, frames=change(clip.frames))
        elif change is not None and image is not None:
            image = change(image)
        return policy.encode(clip, image)

    if change is not None:
        return encode()
    return policy.features.get((record.clip, record.image, view.num_frames, size), encode)


# --- making predictions ----------------------------------------------------------------------------------------------


def evaluate(policy: Policy, records: Sequence[Record], *, view: View, max_new_tokens: int, batch: int,
             temperature: float, seed: int, samples: int = 1, out: str | Path | None = None,
             label: str = "evaluate", progress: bool = False) -> list[dict]:
    r"""Answers every record and scores the answers; returns one row a completion, in the order they were made.

    batch: questions answered together, each prefilled once. temperature: 0 takes the most probable token (Eq. 22's
    single answer), above 0 samples, from a seed of its own a batch. samples: answers to each question. out: JSONL file
    that rows are appended to; one that exists is continued, and a batch cut short is made again, so that the result
    does not depend on where it stopped. A row holds `index` and `record_id`, `clip`, `question_type`, `sample`,
    `completion` and the parts of its score; one with `error` stands for a record whose clip cannot be read.
    Raises `ClipError` if no clip can be read, `ConfigError` if `out` holds answers to other records, `UserError` if
    the memory or the disk is full; the rows in `out` stay.
    """
    if samples > 1 and temperature == 0:
        raise ConfigError(f"{samples} answers to each question at temperature 0 are all the same: give one, or a "
                          f"temperature above 0")
    batches = _batches(policy, records, view, batch)
    path = None if out is None else Path(out)
    rows = [] if path is None else _read_done(path, records, batches, samples)
    finished = {row["index"] for row in rows}
    with tqdm(total=len(records), initial=len(finished), desc=label, **({} if progress else {"disable": True})) as bar:
        for number, indices in enumerate(batches):
            if indices and indices[0] in finished:
                continue
            with within_memory(f"answering {len(indices)} questions together", "give a smaller eval_batch"):
                made = _answer(policy, records, indices, view, max_new_tokens, temperature, f"{seed}/{number}", samples)
            rows += made
            if path is not None:
                append_lines(path, made)
            bar.update(len(indices))
    if records and all("error" in row for row in rows):
        raise ClipError(f"no clip of the {len(records)} records can be read. The first error: {rows[0]['error']}")
    return rows


def _batches(policy: Policy, records: Sequence[Record], view: View, batch: int) -> list[list[int]]:
    r"""Indices of the records in batches of similar prompt length, near each other in the file."""
    texts = [prompt_text(record, instruction=view.instruction) for record in records]
    lengths = [len(ids) for ids in policy.tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []
    batches = []
    for start in range(0, len(records), WINDOW * batch):
        window = sorted(range(start, min(start + WINDOW * batch, len(records))), key=lambda i: lengths[i])
        batches += [window[i:i + batch] for i in range(0, len(window), batch)]
    return batches


def _answer(policy, records, indices, view, max_new_tokens, temperature, seed, samples) -> list[dict]:
    shown, rows = [], []
    for index in indices:
        record = records[index]
        try:
            features = see(policy, record, view)
            shown.append((index, policy.prompt(prompt_text(record, instruction=view.instruction), features)))
        except ClipError as error:
            rows += [_about(index, record, sample) | {"error": str(error)} for sample in range(samples)]
    if not shown:
        return rows
    generator = torch.Generator().manual_seed(int.from_bytes(seed.encode(), "big") % 2**63)
    rollout = sample_groups(policy, [prompt for _, prompt in shown], samples, max_new_tokens, generator=generator,
                            temperature=temperature or 1.0, greedy=temperature == 0)
    for (index, _), texts in zip(shown, rollout.texts):
        rows += [prediction(index, records[index], text, sample) for sample, text in enumerate(texts)]
    return rows


def prediction(index: int, record: Record, completion: str, sample: int = 0) -> dict:
    r"""One row: which record, what was answered, and the parts of its score."""
    scored = score(record, completion)
    return _about(index, record, sample) | {
        "completion": completion, "format": scored.format, "accuracy": scored.accuracy, "iou": scored.iou,
        "total": scored.total, "maximum": scored.maximum} | _best_iop(record, completion)


def _best_iop(record: Record, completion: str) -> dict[str, float]:
    r"""`iop` of the first predicted span, the best over the true ones; nothing where no span is asked."""
    if not asks_span(record):
        return {}
    spans = parse_completion(completion).spans
    return {"iop": max(temporal_iop(spans[0], truth) for truth in record.spans) if spans else 0.0}


def _about(index: int, record: Record, sample: int) -> dict:
    return {"index": index, "record_id": record.record_id, "clip": Path(record.clip_id).as_posix(),
            "question_type": record.question_type, "sample": sample}


def _read_done(path: Path, records: Sequence[Record], batches: list[list[int]], samples: int) -> list[dict]:
    r"""The rows of whole batches; whatever follows them in the file is cut off."""
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


# --- what they amount to ---------------------------------------------------------------------------------------------


def summarise(predictions: Iterable[dict]) -> dict:
    r"""Figures of a set of predictions, shares in [0, 1].

    `accuracy` (Eq. 22) with `ci95` [low, high] clustered by clip and `n` questions, `clips`, `answers`; the same three
    for each entry of `by_type`; `format_rate`; `broken` questions, which count nowhere else; and, where time spans
    were asked, `mean_iou` (Eq. 23) and `recall` at 0.3, 0.5 and 0.7 (Eq. 24) over those questions alone, and what
    `grounded_answers` adds.
    """
    rows = list(predictions)
    good = [row for row in rows if "error" not in row]
    by_type = defaultdict(list)
    for row in good:
        by_type[row["question_type"]].append(row)
    summary = _accuracy(good) | {
        "clips": len({row["clip"] for row in good}),
        "answers": len(good),
        "broken": len({row["index"] for row in rows}) - len({row["index"] for row in good}),
        "format_rate": _mean([row["format"] for row in good]),
        "by_type": {name: _accuracy(by_type[name]) for name in sorted(by_type)},
    }
    ious = [row["iou"] for row in good if row["iou"] is not None]
    return summary | (grounding(ious) if ious else {}) | grounded_answers(good)


def grounding(ious: Sequence[float]) -> dict:
    r"""Mean IoU (Eq. 23) and the share of answers whose span has IoU >= m (Eq. 24), which IoU exactly m reaches."""
    return {"mean_iou": _mean(ious), "recall": {f"{m}": _mean([float(iou >= m - 1e-9) for iou in ious])
                                                for m in RECALL_AT}}


def grounded_answers(rows: Sequence[dict]) -> dict:
    r"""NExT-GQA's other official figures, over the questions that ask a span; {} if there are none.

    `mean_iop` and `iop_at` 0.3 and 0.5, intersection over prediction, the best true segment of each question;
    `acc_gqa`, the share whose answer is right *and* whose IoP is at least 0.5, with `acc_gqa_ci95`;
    `mean_iou_ci95`. Intervals are clustered by clip. A malformed answer counts 0 everywhere.
    """
    asked = [row for row in rows if "iop" in row]
    if not asked:
        return {}
    clips, iops = [row["clip"] for row in asked], [row["iop"] for row in asked]
    grounded = [float(row["accuracy"] == 1.0 and row["iop"] >= GROUNDED - 1e-9) for row in asked]
    return {"mean_iou_ci95": list(mean_interval([row["iou"] for row in asked], clips, 0.0, 1.0)),
            "mean_iop": _mean(iops),
            "iop_at": {f"{m}": _mean([float(iop >= m - 1e-9) for iop in iops]) for m in IOP_AT},
            "acc_gqa": _mean(grounded), "acc_gqa_ci95": list(share_interval(grounded, clips))}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _accuracy(rows: list[dict]) -> dict:
    values, clusters = [row["accuracy"] for row in rows], [row["clip"] for row in rows]
    low, high = share_interval(values, clusters)
    return {"accuracy": _mean(values), "ci95": [low, high], "n": len({row["index"] for row in rows})}


def paired_change(before: Iterable[dict], after: Iterable[dict]) -> dict:
    r"""Change of accuracy from one set of predictions to another on the same questions, in shares.

    Each question's mean accuracy before is taken from its mean after, and the differences are clustered by clip:
    `change`, `ci95` [low, high], `n` questions and `clips`; the same by question type. Questions that only one of the
    two could answer (a broken clip) are left out and counted in `unpaired`.
    """
    old, new = _per_question(before), _per_question(after)
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


def _per_question(rows: Iterable[dict]) -> dict[int, tuple[float, str, str]]:
    grouped = defaultdict(list)
    for row in rows:
        if "error" not in row:
            grouped[row["index"]].append(row)
    return {index: (_mean([row["accuracy"] for row in group]), group[0]["clip"], group[0]["question_type"])
            for index, group in grouped.items()}


# --- intervals -------------------------------------------------------------------------------------------------------


def cluster_standard_error(values: Sequence[float], clusters: Sequence[str]) -> float:
    r"""Cluster-robust standard error of a mean.

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


def mean_interval(values: Sequence[float], clusters: Sequence[str], lowest: float, highest: float,
                  level: float = 0.95) -> tuple[float, float]:
    r"""Mean +- t quantile x `cluster_standard_error`, cut to [lowest, highest]; that whole range for one cluster."""
    error = cluster_standard_error(values, clusters)
    if math.isnan(error):
        return lowest, highest
    mean, reach = _mean(values), t_quantile(0.5 + level / 2, len(set(clusters)) - 1) * error
    return max(lowest, mean - reach), min(highest, mean + reach)


def share_interval(values: Sequence[float], clusters: Sequence[str], level: float = 0.95) -> tuple[float, float]:
    r"""`mean_interval` within [0, 1]; where all values are 0 or all are 1, Wilson's interval for as many independent
    values as there are clusters, because a standard error of 0 would claim certainty."""
    count = len(set(clusters))
    if count and len(set(values)) == 1 and values[0] in (0.0, 1.0):
        square = t_quantile(0.5 + level / 2, max(count - 1, 1)) ** 2
        reach = square / (count + square)
        return (0.0, reach) if values[0] == 0.0 else (1.0 - reach, 1.0)
    return mean_interval(values, clusters, 0.0, 1.0, level)


@functools.cache
def t_quantile(probability: float, degrees: int) -> float:
    r"""Quantile of Student's t with `degrees` >= 1 degrees of freedom, for 0.5 <= probability < 1; 1e-12 exact.

    t_quantile(0.975, 4) = 2.776, (0.975, 9) = 2.262, and 1.960 in the limit.
    """
    if not 0.5 <= probability < 1 or degrees < 1:
        raise ValueError(f"t_quantile({probability}, {degrees}): give 0.5 <= probability < 1 and degrees >= 1")
    low, high = 0.0, math.pi / 2  # in the angle whose tangent is t / sqrt(degrees)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_central(middle, degrees) < 2 * probability - 1 else (low, middle)
    return math.tan((low + high) / 2) * math.sqrt(degrees)


def _t_central(angle: float, degrees: int) -> float:
    r"""P(|t| <= sqrt(degrees) tan(angle)), by the finite series for whole degrees (Abramowitz and Stegun 26.7.3-4)."""
    odd, sine, cosine = degrees % 2, math.sin(angle), math.cos(angle)
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1, degrees // 2 + 1):
        total += term
        term *= cosine**2 * (2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k))
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
