r"""The two headline comparisons: when hints help (`phase_*`), and when Reg-GRPO differs from GRPO (`robust`)."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .plotting import STYLE
from .stats import seed_summary
from .tables import CELL_SUCCESS, EXPERIMENTS, ROBUST, VARIANTS

NEAR = 0.03  # accuracy: cells within three points of the best one count as good
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
    predicted = json.loads((Path(results) / "predictions.json").read_text(encoding="utf-8"))
    lines = []
    for (cell, variant), runs in read_cells(results).groupby(["cell", "variant"], sort=False):
        found = seed_summary(list(runs["sampled"]))
        lines.append({"cell": cell, "variant": variant, "predicted": predicted[cell][variant], **found,
                      "learned": f"{(runs['sampled'] > 0.5).sum()} of {len(runs)}", "greedy": runs["greedy"].mean(),
                      "area": runs["area"].mean()})
    return pd.DataFrame(lines)


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


def robust_table(results: Path) -> pd.DataFrame:
    r"""Summarise `robust`: for each method, over its settings (inner updates x learning rate), the worst and the median
    accuracy at temperature 1 and the share of settings within three points of its best; mean and interval over seeds.

    Only seeds with all settings of a method count.
    """
    runs, lines = _runs(results, "robust"), []
    settings = len(EXPERIMENTS["robust"].rows) // len(ROBUST)
    for method in ROBUST:
        mine = {row: found for row, found in runs.items() if row.split(";")[0] == method}
        seeds = set.intersection(*(set(found) for found in mine.values())) if len(mine) == settings else set()
        grids = [[np.mean([cell["accuracy"] for cell in found[seed]["sampled"].values()]) for found in mine.values()]
                 for seed in sorted(seeds)]
        if grids:
            figures = {"worst": [min(grid) for grid in grids], "median": [float(np.median(grid)) for grid in grids],
                       "near the best": [float(np.mean([max(grid) - x <= NEAR for x in grid])) for grid in grids]}
            lines += [{"method": method, "figure": name, **seed_summary(values)} for name, values in figures.items()]
    return pd.DataFrame(lines)


def robust_figure(results: Path) -> Figure:
    r"""Draw accuracy at temperature 1 against the learning rate, a panel for each number of inner updates."""
    runs = _runs(results, "robust")
    looks = dict(zip(ROBUST, (("#332288", "-"), ("#88CCEE", "-"), ("#44AA99", "-"), ("#117733", "-"), ("#CC6677", "-"),
                              ("#CC6677", "--"), ("#AA4499", "-"))))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 3, figsize=(9.6, 3.2), sharey=True)
        for name, (colour, dash) in looks.items():
            for axes, inner in zip(panels, (1, 4, 16)):
                found = {float(row.split("rate ")[1]): [np.mean([cell["accuracy"] for cell in run["sampled"].values()])
                                                        for run in seeds.values()]
                         for row, seeds in runs.items() if row.startswith(f"{name}; {inner} updates")}
                axes.plot(list(found), [100 * np.mean(values) for values in found.values()], dash, marker="o",
                          markersize=4, color=colour, label=name)
                axes.set(xscale="log", title=f"inner updates: {inner}", xlabel="learning rate")
                axes.set_xticks(list(found), [f"{rate:g}" for rate in found])
                axes.minorticks_off()
        panels[0].set_ylabel("accuracy in %, temperature 1")
        panels[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, handlelength=2.5)
        figure.suptitle("When Reg-GRPO differs from GRPO: how much the setting matters", fontsize=10)
    return figure
