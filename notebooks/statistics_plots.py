r"""Figures of notebook 05 that are longer than the lesson they serve."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student

from dvr1_lite.lab.plotting import label_ends

INK, MISSES = "#555555", "#CC6677"


def draw_pairs(a: Sequence[float], b: Sequence[float], intervals: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Draw two rows with a line for each seed, and beside them intervals (low, high) of the mean difference."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 2.7), width_ratios=(1, 1.7))
    for one, other in zip(a, b):
        left.plot([0, 1], [other, one], "o-", color=INK, alpha=0.7)
    left.set(title="one line for each seed", ylabel="accuracy (%)", xlim=(-0.3, 1.3))
    left.set_xticks([0, 1], ["B", "A"])
    for place, (low, high) in enumerate(intervals.values()):
        right.errorbar((low + high) / 2, place, xerr=(high - low) / 2, fmt="o", capsize=4,
                       color=INK if low > 0 else MISSES)
    right.axvline(0, color="black", linewidth=0.8)
    right.set_yticks(range(len(intervals)), intervals)
    right.set(title="95 % interval of the difference", xlabel="A minus B (points)",
              ylim=(len(intervals) - 0.5, -0.5))
    figure.suptitle(title, fontsize=10)
    return figure


def draw_many(means: np.ndarray, reaches: Mapping[str, np.ndarray], title: str) -> Figure:
    """Draw intervals mean +- reach of many claims whose true difference is 0; those that miss 0 are coloured.

    means: (K,). reaches: name of a panel -> (K,).
    """
    figure, panels = plt.subplots(1, len(reaches), figsize=(8.4, 2.7), sharey=True)
    for axes, (name, reach) in zip(panels, reaches.items()):
        misses = np.abs(means) > reach
        for place in range(len(means)):
            axes.plot([place] * 2, means[place] + np.array([-1, 1]) * reach[place], linewidth=1.6,
                      color=MISSES if misses[place] else "#BBBBBB")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(title=f"{name}: {misses.sum()} of {len(means)} miss 0", xlabel="number of the claim")
    panels[0].set_ylabel("difference (sd)")
    figure.suptitle(title, fontsize=10)
    return figure


def detectable(n: int | np.ndarray, family: int) -> float | np.ndarray:
    """Return the smallest detectable effect in standard deviations over seeds (Eq. 05.3)."""
    return (student.ppf(1 - 0.025 / family, n - 1) + student.ppf(0.8, n - 1)) / np.sqrt(n)


def draw_detectable(families: Sequence[int], title: str) -> Figure:
    """Draw the smallest detectable effect against the number of seeds, one line for each number of claims."""
    figure, axes = plt.subplots(figsize=(6.4, 2.9))
    seeds, ends = np.arange(3, 21), []
    for family, colour in zip(families, ("#332288", "#117733", "#CC6677")):
        axes.plot(seeds, detectable(seeds, family), color=colour, marker="o", markersize=3)
        ends.append((f"m = {family}", detectable(20, family), colour))
    axes.set(title=title, xlabel="seeds n", ylabel="smallest detectable effect\n(sd over seeds)", ylim=(0, 5))
    axes.set_xticks(range(4, 21, 4))
    label_ends(axes, ends)
    return figure
