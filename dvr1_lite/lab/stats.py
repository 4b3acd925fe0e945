r"""Intervals for comparisons over seeds: of one row, of paired differences with Bonferroni's correction, and by clip.

Two intervals stand beside each mean and answer different questions. *Over seeds*: Student's t over the runs' accuracies
on the same questions; what would other seeds give? *By clip*: each question's mean over the seeds, the standard error
clustered by clip; what would other questions give? All are at 95 %, in the unit of the input, usually per cent.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import t as student

from ..evaluation import cluster_standard_error
from .tables import unpack

FEWEST = 3  # seeds with an interval: the spread of two runs says nothing where a skill is learned or not
SAME, OPPOSITE, UNDECIDED, NOT_TESTED = "same sign here", "opposite sign here", "undecided here", "not tested"


def seed_summary(values: Sequence[float]) -> dict:
    r"""Return `mean`, `sd` (Bessel), `ci` = mean +- t(n - 1) sd / sqrt(n) and `n`; `sd` and `ci` None below 3 seeds."""
    mean, n = math.fsum(values) / len(values), len(values)
    if n < FEWEST:
        return {"mean": mean, "sd": None, "ci": None, "n": n}
    sd = float(np.std(values, ddof=1))
    reach = float(student.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    return {"mean": mean, "sd": sd, "ci": [mean - reach, mean + reach], "n": n}


def paired_summary(differences: Sequence[float], family: int) -> dict:
    r"""Summarise paired differences over n seeds: `seed_summary`, and

    ci_corrected: the interval at level 1 - 0.05 / family (Bonferroni over a family of claims). detectable: the
    difference that a two-sided test at that level finds in 80 % of repetitions, with the standard deviation seen:
    (t(1 - 0.025 / family) + t(0.8)) sd / sqrt(n), None if sd is 0. Both None for fewer than three seeds.
    """
    found = seed_summary(differences)
    if found["sd"] is None:
        return found | {"ci_corrected": None, "detectable": None}
    n, error = found["n"], found["sd"] / math.sqrt(found["n"])
    critical, power = (float(student.ppf(p, n - 1)) for p in (1 - 0.025 / family, 0.8))
    return found | {"ci_corrected": [found["mean"] - critical * error, found["mean"] + critical * error],
                    "detectable": (critical + power) * error if error else None}


def mean_answers(runs: Sequence[Mapping], split: str) -> np.ndarray:
    r"""Return each question's mean accuracy over runs, in per cent (Q,); NaN where one could not read the clip."""
    return 100 * np.mean([np.array(unpack(run["answers"][split]), dtype=float) for run in runs], axis=0)


def clip_interval(per_split: Sequence[tuple[Sequence[float], Sequence[int]]]) -> list[float]:
    r"""Return the interval by clip of the equally weighted mean over splits.

    per_split: for each split the values of its questions (NaN: no value) and the number of each question's clip. The
    splits share no clip, so their squared standard errors add; degrees of freedom: clips less splits.
    """
    means, variance, degrees = [], 0.0, 0
    for values, clips in per_split:
        known = [(float(value), str(clip)) for value, clip in zip(values, clips, strict=True) if not math.isnan(value)]
        numbers, groups = zip(*known)
        means.append(math.fsum(numbers) / len(numbers))
        variance += cluster_standard_error(numbers, groups) ** 2
        degrees += len(set(groups)) - 1
    if math.isnan(variance):  # a single clip
        return [-math.inf, math.inf]
    mean = math.fsum(means) / len(means)
    reach = float(student.ppf(0.975, degrees)) * math.sqrt(variance) / len(means)
    return [mean - reach, mean + reach]


def verdict(corrected: Sequence[float] | None, by_clip: Sequence[float] | None = None) -> str:
    r"""Judge a claim "row is better than rival" from the intervals of the difference.

    SAME if the corrected interval over seeds and, where there is one, the interval by clip lie above 0; OPPOSITE if
    they lie below; else, and for fewer than three seeds, UNDECIDED.
    """
    if corrected is None:
        return UNDECIDED
    lows, highs = zip(*([corrected] if by_clip is None else [corrected, by_clip]))
    return SAME if min(lows) > 0 else OPPOSITE if max(highs) < 0 else UNDECIDED
