r"""Plots of notebooks 06 and 07: what a run's memory is made of, and sick runs beside a healthy one."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from dvr1_lite.lab.plotting import label_ends, smooth
from dvr1_lite.scale.memory import GB, Prediction

WEIGHTS = ("language layers", "embeddings", "output head", "vision encoder")
PARTS = {"weights": "#332288", "adapter, optimizer, cache": "#88CCEE", "largest phase": "#DDCC77", "CUDA": "#BBBBBB"}
HEALTHY, SICK = "#999999", ("#882255", "#117733")


def parts_of(found: Prediction) -> dict[str, float]:
    r"""Return a prediction's parts in units of 2**30 bytes, which add up to what is needed."""
    weights, static = sum(found.static[name] for name in WEIGHTS), sum(found.static.values())
    sizes = (weights, static - weights, found.peak - static, found.needed - found.peak)
    return {name: size / GB for name, size in zip(PARTS, sizes)}


def memory_bars(cards: Mapping[str, tuple[float, Mapping[str, Prediction]]], title: str) -> Figure:
    r"""Draw predicted memory, a panel for each card: its memory as a line, and a stacked bar for each model."""
    figure, panels = plt.subplots(1, len(cards), figsize=(9.5, 3.4), sharey=True)
    figure.suptitle(title, fontsize=11)
    for axes, (card, (available, models)) in zip(panels, cards.items()):
        for place, found in enumerate(models.values()):
            base = 0.0
            for name, size in parts_of(found).items():
                axes.bar(place, size, bottom=base, color=PARTS[name], label=None if place else name)
                base += size
        axes.axhline(available, color="#882255", linestyle="--")
        axes.set_xticks(range(len(models)), models)
        axes.set(title=card, ylim=(0, 82))
        axes.grid(axis="x", visible=False)
    panels[0].set_ylabel("memory in GB")
    panels[0].legend(fontsize=9, loc="upper left")
    return figure


def sick_panels(runs: Mapping[str, Sequence[Mapping]], panels: Mapping[str, tuple[str, Mapping[str, str]]],
                title: str) -> Figure:
    r"""Draw metrics of sick runs, a panel each, with the healthy run's first metric dashed.

    Drawn are means over a step and the seven before it, about one pass over the records; of the KL, each step.
    runs: lines of metrics by name, "healthy" among them. panels: for each run its heading, and the label of each of at
    most two metrics.
    """
    def values(run: str, metric: str) -> Sequence[float]:
        return smooth([line[metric] for line in runs[run]], 1 if metric == "kl" else 8)

    figure, grid = plt.subplots(2, -(-len(panels) // 2), figsize=(10, 5.6), sharex=True)
    figure.suptitle(title, fontsize=11)
    for axes, (name, (heading, metrics)) in zip(grid.flat, panels.items()):
        healthy, lines = values("healthy", next(iter(metrics))), []
        axes.plot(range(1, len(healthy) + 1), healthy, "--", color=HEALTHY)
        for (metric, label), colour in zip(metrics.items(), SICK):
            line = values(name, metric)
            axes.plot(range(1, len(line) + 1), line, color=colour)
            lines.append((label, line[-1], colour))
        if "kl" in metrics:
            axes.set_yscale("symlog", linthresh=0.1)
            axes.set_ylabel("nats")
        else:
            axes.set(ylim=(-0.05, 1.12), ylabel="share")
        label_ends(axes, lines)
        axes.set_title(heading, fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    return figure
