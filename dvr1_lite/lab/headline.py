r"""The two headline comparisons: when hints help (`phase_*`), and when Reg-GRPO differs from GRPO (`robust`)."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..files import data_folder
from .plotting import STYLE
from .stats import paired_summary, seed_summary
from .tables import CELL_SUCCESS, EXPERIMENTS, LEARNING_RATES, ROBUST, VARIANTS

NEAR = 0.03  # accuracy: cells within three points of the best one count as good
ROBUST_LOOKS = {"GRPO": {"color": "#332288"}, "GRPO, clip 0.2": {"color": "#88CCEE"},
                "GSPO": {"color": "#117733", "linestyle": "--"}, "Reg-GRPO, eps 0.1": {"color": "#CC6677"}}
VARIANT_COLOURS = dict(zip(VARIANTS, ("#555555", "#BBBBBB", "#CC6677", "#DDCC77", "#88CCEE", "#117733")))


def read_cells(results: Path) -> pd.DataFrame:
    r"""Read the recorded runs of the phase diagram: one line a run with cell, variant, seed, its success at temperature
    1 and greedily, the area under the curve of own groups' accuracy against rollouts (all in [0, 1]), and rollouts."""
    lines = []
    for cell in CELL_SUCCESS:
        for row, runs in _runs(results, f"phase_{cell}").items():
            for seed, run in runs.items():
                along, accuracy = run["curve"]["rollouts"], run["curve"]["accuracy"]
                lines.append({"cell": cell, "variant": row, "seed": seed, "rollouts": run["rollouts"],
                              "sampled": run["sampled"]["cell"]["accuracy"],
                              "greedy": run["accuracy"]["cell"]["accuracy"],
                              "area": float(np.average(accuracy, weights=np.diff([0, *along])))})
    return pd.DataFrame(lines)


def _runs(results: Path, name: str) -> dict[str, dict[int, dict]]:
    path = Path(results) / name / "aggregate.json"
    used = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else {}
    return {row: {int(seed): json.loads((Path(results) / file).read_text(encoding="utf-8"))
                  for seed, file in files.items()} for row, files in used.items()}


def cell_table(results: Path) -> pd.DataFrame:
    r"""Summarise the phase diagram: for each cell and variant the predicted and the measured success (mean and 95 %
    interval over seeds at temperature 1), n, the runs that learned it (success above one half), and the area."""
    path = data_folder() / "results" / "predictions.json"  # written before the first run, for every results folder
    predicted = json.loads(path.read_text(encoding="utf-8"))
    lines = []
    for (cell, variant), runs in read_cells(results).groupby(["cell", "variant"], sort=False):
        found = seed_summary(list(runs["sampled"]))
        lines.append({"cell": cell, "variant": variant, "predicted": predicted[cell][variant], **found,
                      "learned": f"{(runs['sampled'] > 0.5).sum()} of {len(runs)}", "greedy": runs["greedy"].mean(),
                      "area": runs["area"].mean()})
    return pd.DataFrame(lines)


def area_table(results: Path) -> pd.DataFrame:
    r"""Return the second figure of the phase diagram as text, a row for each cell: each variant minus plain in the area
    under the curve of own groups' accuracy, in points, paired by seed, with the interval corrected for the claims of
    its cell (`stats.py`), or with n where there is none."""
    lines = {}
    for cell, runs in read_cells(results).groupby("cell", sort=False):
        areas = 100 * runs.pivot(index="seed", columns="variant", values="area")
        for name in [name for name in list(VARIANTS)[1:] if {name, "plain"} <= set(areas)]:
            found = paired_summary(list((areas[name] - areas["plain"]).dropna()), len(VARIANTS) - 1)
            ends = found["ci_corrected"]
            bounds = " [{:.1f}, {:.1f}]".format(*ends) if ends else f", n = {found['n']}"
            lines.setdefault(cell, {})[name] = f"{found['mean']:+.1f}{bounds}"
    return pd.DataFrame(lines).T


def cell_figure(results: Path) -> Figure:
    r"""Draw the success of every run (dots) beside the predicted one (open diamonds) in each cell, and how many of the
    runs learned it. No means: a run learns a cell or it does not, and a mean lies where no run is."""
    table, runs = cell_table(results), read_cells(results)
    cells = list(dict.fromkeys(table["cell"]))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(cells), figsize=(2.2 * len(cells) + 1.4, 3.0), sharey=True, squeeze=False)
        for axes, cell in zip(panels[0], cells):
            for place, variant in enumerate(VARIANTS):
                line = table[(table["cell"] == cell) & (table["variant"] == variant)]
                if line.empty:
                    continue
                dots = runs[(runs["cell"] == cell) & (runs["variant"] == variant)]["sampled"]
                axes.axhline(place, color="#DDDDDD", linewidth=0.8, zorder=0)
                axes.plot(line["predicted"], place, "D", markerfacecolor="white", color="#222222", markersize=8)
                axes.plot(dots, [place] * len(dots), "o", color=VARIANT_COLOURS[variant], markersize=5.5,
                          markeredgecolor="white", markeredgewidth=0.5)
                axes.text(1.12, place, line["learned"].item().replace(" of ", "/"), va="center", fontsize=8.5)
            deficit = "along the chain" if cell[0] == "F" else "in the opening"
            axes.set(title=f"{cell}: {CELL_SUCCESS[cell]},\ndeficit {deficit}", xlim=(-0.06, 1.42))
            axes.set_xticks([0, 0.5, 1])
            axes.grid(axis="y", visible=False)
        panels[0, 0].set_yticks(range(len(VARIANTS)), VARIANTS)
        panels[0, 0].set_ylim(len(VARIANTS) - 0.5, -0.5)
        figure.suptitle("When hints help: success after training, by variant of the augmentation", fontsize=10)
        figure.supxlabel("success without a hint, temperature 1 (dots: runs; diamond: predicted; right: runs above "
                         "0.5, which learned)", fontsize=8.5)
    return figure


def robust_grids(results: Path) -> dict[str, dict[int, dict[tuple[int, float], float]]]:
    r"""Return method -> seed -> (inner updates, learning rate) -> accuracy at temperature 1, the mean of the splits."""
    grids = {method: {} for method in ROBUST}
    for row, runs in _runs(results, "robust").items():
        method, inner, rate = row.split("; ")
        setting = int(inner.split()[0]), float(rate.split()[-1])
        for seed, run in runs.items():
            found = np.mean([cell["accuracy"] for cell in run["sampled"].values()])
            grids[method].setdefault(seed, {})[setting] = float(found)
    return grids


def robust_table(results: Path) -> pd.DataFrame:
    r"""Summarise `robust`: for each method, over its settings, the worst and the median accuracy at temperature 1 and
    the share of settings within three points of its best: mean and 95 % interval over seeds, and the same of the paired
    difference from GRPO (`over GRPO`, `over GRPO ci`). Only seeds with all settings of a method count."""
    settings = len(EXPERIMENTS["robust"].rows) // len(ROBUST)
    values, lines = {}, []
    for method, seeds in robust_grids(results).items():
        for seed, grid in seeds.items():
            if len(grid) == settings:
                found = np.array(list(grid.values()))
                values[method, seed] = {"worst": found.min(), "median": np.median(found),
                                        "near the best": np.mean(found.max() - found <= NEAR)}
    for method in dict.fromkeys(method for method, _ in values):
        seeds = [seed for other, seed in values if other == method]
        for name in ("worst", "median", "near the best"):
            gaps = [values[method, s][name] - values["GRPO", s][name] for s in seeds if ("GRPO", s) in values]
            gap = seed_summary(gaps) if gaps else {"mean": None, "ci": None}
            lines.append({"method": method, "figure": name, **seed_summary([values[method, s][name] for s in seeds]),
                          "over GRPO": gap["mean"], "over GRPO ci": gap["ci"]})
    return pd.DataFrame(lines, columns=["method", "figure", "mean", "sd", "ci", "n", "over GRPO", "over GRPO ci"])


def robust_figure(results: Path) -> Figure:
    r"""Draw accuracy at temperature 1 against the learning rate for four methods, a panel for each number of inner
    updates; at the right the worst setting of all seven methods. Bars: 95 % intervals over seeds."""
    grids, table = robust_grids(results), robust_table(results)
    worst = table[table["figure"] == "worst"].to_dict("records")
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 4, figsize=(12, 3.2), width_ratios=(1, 1, 1, 1.3))
        for axes, inner in zip(panels, (1, 4, 16)):
            for place, (name, look) in enumerate(ROBUST_LOOKS.items()):
                seeds = list(grids[name].values())
                found = [(rate, seed_summary([100 * grid[inner, rate] for grid in seeds]))
                         for rate in LEARNING_RATES if seeds and all((inner, rate) in grid for grid in seeds)]
                axes.errorbar([rate * 1.06 ** (place - 1.5) for rate, _ in found],  # shifted, so that all bars are seen
                              [one["mean"] for _, one in found], [_half(one["ci"]) for _, one in found],
                              marker="o", markersize=4, linewidth=1.5, label=name, **look)
            axes.set(xscale="log", title=f"inner updates: {inner}", xlabel="learning rate", ylim=(0, 100))
            axes.set_xticks(LEARNING_RATES, [f"{rate:g}" for rate in LEARNING_RATES])
            axes.minorticks_off()
        for place, line in enumerate(worst):
            colour = ROBUST_LOOKS.get(line["method"], {"color": "#777777"})["color"]
            panels[3].errorbar(100 * line["mean"], place, xerr=100 * _half(line["ci"]), fmt="o", color=colour)
        panels[0].set_ylabel("accuracy in %, temperature 1")
        panels[0].legend(loc="lower left", fontsize=8, handlelength=2.5)
        panels[3].set_yticks(range(len(worst)), [line["method"] for line in worst], fontsize=8.5)
        panels[3].set(title="worst of nine settings", xlabel="accuracy in %, temperature 1", xlim=(0, 100),
                      ylim=(len(ROBUST) - 0.5, -0.5))
        panels[3].grid(axis="y", visible=False)
        figure.suptitle("When Reg-GRPO differs from GRPO: how much the setting matters", fontsize=10)
    return figure


def _half(interval: list[float] | None) -> float:
    return (interval[1] - interval[0]) / 2 if interval else 0.0
