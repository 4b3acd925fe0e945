r"""Figures of runs, evaluations and clips: one style, and one colour-blind-safe colour per method everywhere.

Every function returns the figure and shows nothing; in a notebook end the cell with `plt.show()`. Lines also differ in
dash and bars in hatch, so that all figures are readable in grey.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from .files import writing
from .video import Clip, frame_indices

# Paul Tol's "muted" palette, safe for the common kinds of colour blindness.
METHOD_COLOURS = {
    "base": "#7F7F7F", "grpo": "#332288", "reg-grpo": "#CC6677", "reinforce": "#999933", "rloo": "#88CCEE",
    "rebel": "#117733", "reward-regression": "#44AA99", "dpo": "#DDCC77", "online-dpo": "#882255",
    "centred-regression": "#AA4499",
}
BEFORE, AFTER = "#BBBBBB", "#332288"
STYLE = {
    "figure.dpi": 100, "savefig.dpi": 150, "figure.constrained_layout.use": True, "font.size": 10,
    "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.3, "lines.linewidth": 1.8, "legend.frameon": False, "hatch.linewidth": 0.6,
}


def use_style() -> None:
    r"""Makes this project's style the default of every later figure; the functions here use it by themselves."""
    plt.rcParams.update(STYLE)


def method_look(name: str) -> dict:
    r"""Colour and dash of a method's line. "reg-grpo + DA" (any "+ ..." suffix) keeps the colour and is dashed.

    Raises KeyError for a method without a colour.
    """
    method, _, suffix = (part.strip() for part in name.lower().partition("+"))
    return {"color": METHOD_COLOURS[method], "linestyle": "--" if suffix else "-"}


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    r"""Mean of each value and the `window` - 1 before it (fewer at the beginning); the same length."""
    sums = np.cumsum(np.concatenate([[0.0], np.asarray(values, dtype=float)]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def reward_curve(metrics: Sequence[Mapping], method: str = "reg-grpo", window: int = 10) -> Figure:
    r"""Reward at each step divided by its maximum, on the prompts as they are (not augmented), with its two main parts.

    metrics: the lines of metrics.jsonl. Faint: each step; strong: the mean of the last `window` steps.
    """
    steps = [line["step"] for line in metrics]
    lines = [("reward_normalised", "reward / its maximum", METHOD_COLOURS[method], "-"),
             ("accuracy", "accuracy", "#555555", "--"), ("format_rate", "format", "#999999", ":")]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 3.6))
        for key, label, colour, dash in lines:
            values = [line[key] for line in metrics]
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth(values, window), color=colour, linestyle=dash, label=label)
        axes.set(title=f"Training with {method}, on prompts without hint or noise", ylim=(-0.02, 1.02),
                 xlabel=f"step (strong: mean of the last {window}; faint: each step)",
                 ylabel="mean over the step's completions")
        axes.legend(loc="lower right")
    return figure


def vanishing_curve(metrics: Sequence[Mapping], window: int = 10) -> Figure:
    r"""Share of groups whose rewards all agree (figure 3): on the prompts as sampled, and after augmentation.

    Left, the sampled groups, split into all right and all wrong (mean of the last `window` steps). Right, the same
    share before and after some of the groups were replaced by augmented ones.
    """
    steps = [line["step"] for line in metrics]
    column = lambda key: smooth([line[key] for line in metrics], window)
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
        left.stackplot(steps, column("vanishing_all_right"), column("vanishing_all_wrong"), alpha=0.8,
                       labels=["all right", "all wrong"], colors=["#44AA99", "#882255"])
        left.set(title="Groups as sampled", xlabel=f"step (mean of the last {window})",
                 ylabel="share of groups that vanish", ylim=(0, 1))
        right.plot(steps, column("vanishing"), color="#555555", linestyle="--", label="as sampled")
        right.plot(steps, column("vanishing_after"), color=METHOD_COLOURS["reg-grpo"], label="as trained on")
        right.set(title="Before and after augmentation",
                  xlabel=f"step (mean of the last {window})\nsolid above dashed: more groups lost than rescued")
        for axes in (left, right):
            axes.legend(loc="upper left")
    return figure


def accuracy_by_type(before: Mapping[str, Mapping], after: Mapping[str, Mapping]) -> Figure:
    r"""Accuracy of every question type before and after training, a row of bars for each split, with 95 % intervals.

    before, after: as in summary.json, {split: {"accuracy", "ci95", "n", "by_type"}}. The first pair of bars is the
    whole split.
    """
    splits = list(after)
    widest = max(1 + len(after[split]["by_type"]) for split in splits)
    with plt.rc_context(STYLE):
        size = (1.5 + 0.75 * widest, 0.5 + 2.5 * len(splits))
        figure, panels = plt.subplots(len(splits), 1, figsize=size, squeeze=False)
        for axes, split in zip(panels[:, 0], splits):
            _bars(axes, before[split], after[split])
            axes.set(title=f"{split} (n = {after[split]['n']})", ylim=(0, 100), xlim=(-0.5, widest - 0.5),
                     ylabel="accuracy in %")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2,
                      title="95 % intervals, clustered by clip")
    return figure


def _bars(axes, before: Mapping, after: Mapping) -> None:
    names = ["all", *after["by_type"]]
    places = np.arange(len(names))
    sides = ((-0.2, before, "before training", BEFORE, "//"), (0.2, after, "after training", AFTER, ""))
    for shift, figures, label, colour, hatch in sides:
        missing = {"accuracy": 0.0, "ci95": [0.0, 0.0]}
        cells = [figures, *(figures["by_type"].get(name, missing) for name in names[1:])]
        heights = np.array([100 * cell["accuracy"] for cell in cells])
        reach = np.array([[100 * (cell["accuracy"] - cell["ci95"][0]), 100 * (cell["ci95"][1] - cell["accuracy"])]
                          for cell in cells]).T.clip(min=0)
        axes.bar(places + shift, heights, 0.38, yerr=reach, label=label, color=colour, hatch=hatch, edgecolor="white",
                 error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#222222"})
    axes.set_xticks(places, names, fontsize=9)
    axes.grid(axis="x", visible=False)


def frame_strip(clip: Clip | np.ndarray, title: str = "", caption: str = "", max_frames: int = 8) -> Figure:
    r"""The frames of a clip side by side, with the time of each in seconds.

    clip: a `Clip`, or frames as (T, 3, H, W) in [0, 1] or (T, H, W, 3) (a tensor or array). More than `max_frames` are
    thinned out evenly.
    """
    frames, seconds = _pictures(clip, max_frames)
    with plt.rc_context(STYLE):
        lines = caption.count("\n") + 1 if caption else 0
        figure = plt.figure(figsize=(1.1 * len(frames) + 0.3, 1.8 + 0.2 * lines))
        _strip(figure, frames, seconds, title, caption)
    return figure


def sample_strips(samples: Sequence[Mapping]) -> Figure:
    r"""Clips as frame strips, each under its question and above the completions before and after training.

    samples: mappings with `clip` (as in `frame_strip`), `question`, `answer`, `before` and `after`.
    """
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(9.5, 2.3 * len(samples)))
        for part, sample in zip(figure.subfigures(len(samples), 1, squeeze=False)[:, 0], samples):
            frames, seconds = _pictures(sample["clip"], 8)
            question = textwrap.shorten(" ".join(sample["question"].split()), 150)
            told = [f"{when}: {textwrap.shorten(sample[when], 220) or '(nothing)'}" for when in ("before", "after")]
            caption = "\n".join(textwrap.fill(line, 125) for line in [f"right answer: {sample['answer']}", *told])
            _strip(part, frames, seconds, question, caption)
    return figure


def _pictures(clip: Clip | np.ndarray, max_frames: int) -> tuple[np.ndarray, list[float] | None]:
    r"""Frames (T, H, W, 3) in [0, 1] and their times, if known."""
    frames = np.asarray(clip.frames if isinstance(clip, Clip) else clip)
    if frames.ndim == 4 and frames.shape[1] == 3 and frames.shape[-1] != 3:
        frames = frames.transpose(0, 2, 3, 1)
    frames = frames / 255 if frames.dtype == np.uint8 else frames
    keep = frame_indices(len(frames), min(max_frames, len(frames)))
    seconds = [clip.seconds[i] for i in keep] if isinstance(clip, Clip) else None
    return frames[keep].clip(0, 1), seconds


def _strip(figure, frames: np.ndarray, seconds: list[float] | None, title: str, caption: str) -> None:
    panels = figure.subplots(1, len(frames), squeeze=False)[0]
    for number, (axes, frame) in enumerate(zip(panels, frames)):
        axes.imshow(frame, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.set_xlabel(f"{seconds[number]:.2f} s" if seconds else f"{number + 1}", fontsize=8)
    figure.suptitle(title, fontsize=10, parse_math=False)
    if caption:
        figure.supxlabel(caption, fontsize=8, x=0.01, ha="left", parse_math=False)


def save(figure: Figure, path: str | Path) -> None:
    r"""Writes a figure as PNG and closes it. Raises `UserError` if the disk does not take it."""
    with writing(path):
        figure.savefig(path, dpi=STYLE["savefig.dpi"])
    plt.close(figure)
