r"""Figures of runs, evaluations and clips: one style, and one colour-blind-safe colour for each method everywhere.

Every function returns the figure and shows nothing; in a notebook end the cell with `plt.show()`. Lines differ in dash
and bars in hatch too, so that figures are readable in grey.
"""

import contextlib
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from ..config import TrainConfig
from ..data import Record, prompt_text
from ..errors import ClipError
from ..evaluation import limited
from ..files import make_folder, read_lines, writing
from ..video import Clip, read_clip
from ..words import completion_in_words

# Paul Tol's "muted" palette, safe for the common kinds of colour blindness.
METHOD_COLOURS = {
    "base": "#7F7F7F", "grpo": "#332288", "reg-grpo": "#CC6677", "reinforce": "#999933", "rloo": "#88CCEE",
    "rebel": "#117733", "reward-regression": "#44AA99", "dpo": "#DDCC77", "online-dpo": "#882255",
    "centred-regression": "#AA4499"}
BEFORE, AFTER = "#BBBBBB", "#332288"
STYLE = {
    "figure.dpi": 100, "savefig.dpi": 150, "figure.constrained_layout.use": True, "font.size": 10,
    "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.3, "lines.linewidth": 1.8, "legend.frameon": False, "hatch.linewidth": 0.6}
MOST_FRAMES = 8  # of a clip in a figure


def use_style() -> None:
    r"""Make this project's style the default of later figures; the functions here use it without being asked."""
    plt.rcParams.update(STYLE)


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    r"""Return the mean of each value and the `window` - 1 before it (fewer at the start); the same length."""
    counts = np.minimum(np.arange(1, len(values) + 1), window)
    return np.convolve(values, np.ones(window))[:len(values)] / counts


def label_ends(axes, labels: Sequence[tuple[str, float, str]]) -> None:
    r"""Write (text, height, colour) labels at the right edge of the axes, moved up where they would overlap."""
    low, high = axes.get_ylim()
    place = -np.inf
    for text, height, colour in sorted(labels, key=lambda label: label[1]):
        place = max(height, place + 0.07 * (high - low))
        axes.annotate(text, (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, color=colour,
                      annotation_clip=False)


def reward_curve(metrics: Sequence[Mapping], method: str = "reg-grpo", window: int = 10) -> Figure:
    r"""Draw each step's reward as a share of its maximum, with its two main parts, on prompts without hint or noise.

    metrics: the lines of metrics.jsonl. Faint: each step; strong: the mean of the last `window` steps.
    """
    lines = [("reward_normalised", "reward / maximum", METHOD_COLOURS[method], "-"),
             ("accuracy", "accuracy", "#555555", "--"), ("format_rate", "format", "#888888", ":")]
    steps, ends = [line["step"] for line in metrics], []
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 3.6))
        for key, label, colour, dash in lines:
            values = [line[key] for line in metrics]
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth(values, window), color=colour, linestyle=dash)
            ends.append((label, smooth(values, window)[-1], colour))
        axes.set(title=f"Training with {method}, on prompts without hint or noise", ylim=(-0.02, 1.02),
                 xlabel=f"step (strong: mean of the last {window}; faint: each step)",
                 ylabel="mean over the step's completions")
        label_ends(axes, ends)
    return figure


def vanishing_curve(metrics: Sequence[Mapping], window: int = 10) -> Figure:
    r"""Draw the share of groups whose rewards are all equal (figure 3), as the mean of the last `window` steps.

    Left, groups as sampled, split into all correct and all incorrect. Right, the share before and after some of the
    groups were replaced by augmented ones.
    """
    steps = [line["step"] for line in metrics]
    correct, incorrect, sampled, trained = (smooth([line[f"vanishing{key}"] for line in metrics], window)
                                            for key in ("_all_right", "_all_wrong", "", "_after"))
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.4), sharey=True)
        left.stackplot(steps, correct, incorrect, alpha=0.8, colors=["#44AA99", "#882255"])
        left.set(title="Groups as sampled", xlabel=f"step (mean of the last {window})",
                 ylabel="share of groups that vanish", ylim=(0, 1))
        label_ends(left, [("all correct", correct[-1] / 2, "#2A7A6E"),
                          ("all incorrect", correct[-1] + incorrect[-1] / 2, "#882255")])
        right.plot(steps, sampled, color="#555555", linestyle="--")
        right.plot(steps, trained, color=METHOD_COLOURS["reg-grpo"])
        right.set(title="Before and after augmentation",
                  xlabel=f"step (mean of the last {window})\nsolid below dashed: augmentation restores reward spread")
        label_ends(right, [("as sampled", sampled[-1], "#555555"),
                           ("as trained on", trained[-1], METHOD_COLOURS["reg-grpo"])])
    return figure


def accuracy_by_type(before: Mapping[str, Mapping], after: Mapping[str, Mapping]) -> Figure:
    r"""Draw the accuracy of every question type before and after training, a row of bars a split, with 95 % intervals.

    before, after: as in summary.json, {split: {"accuracy", "ci95", "n", "by_type"}}. The first pair is the whole split.
    """
    widest = max(1 + len(summary["by_type"]) for summary in after.values())
    missing = {"accuracy": 0.0, "ci95": [0.0, 0.0]}  # a type that one side lacks
    sides = ((-0.2, before, "before training", BEFORE, "//"), (0.2, after, "after training", AFTER, ""))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(len(after), 1, squeeze=False,
                                      figsize=(1.5 + 0.75 * widest, 0.5 + 2.5 * len(after)))
        for axes, split in zip(panels[:, 0], after):
            names = ["all", *after[split]["by_type"]]
            for shift, summaries, label, colour, hatch in sides:
                kinds = summaries[split]["by_type"] | {"all": summaries[split]}
                cells = [kinds.get(name, missing) for name in names]
                heights = 100 * np.array([cell["accuracy"] for cell in cells])
                ends = 100 * np.array([cell["ci95"] for cell in cells]).T
                axes.bar(np.arange(len(names)) + shift, heights, 0.38, label=label, color=colour, hatch=hatch,
                         edgecolor="white", yerr=np.abs(ends - heights),
                         error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#222222"})
            axes.set_xticks(range(len(names)), names, fontsize=9)
            axes.grid(axis="x", visible=False)
            axes.set(title=f"{split} (n = {after[split]['n']})", ylim=(0, 100), xlim=(-0.5, widest - 0.5),
                     ylabel="accuracy in %")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2,
                      title="95 % intervals, clustered by clip")
    return figure


def draw_run(config: TrainConfig, summary: Mapping, evaluations: Mapping[str, Sequence[Record]]) -> list[Path]:
    r"""Write a finished run's figures to `figures/` in its folder: reward, vanishing ratio, accuracy, sample clips.

    summary: the content of its summary.json; evaluations: the records that it was evaluated on, by name.
    """
    folder, figures = Path(config.out) / "figures", {}
    metrics = list(read_lines(Path(config.out) / "metrics.jsonl"))
    if metrics:
        figures = {"reward": reward_curve(metrics, config.method), "vanishing": vanishing_curve(metrics)}
    if summary["before"] and summary["after"]:
        figures["accuracy"] = accuracy_by_type(summary["before"], summary["after"])
        name = next(iter(summary["after"]))
        samples = sample_answers(config, limited(evaluations[name], config.eval_limit), name)
        if samples:
            figures["samples"] = sample_strips(samples)
    make_folder(folder)
    for name, figure in figures.items():
        save(figure, folder / f"{name}.png")
    return [folder / f"{name}.png" for name in figures]


def sample_answers(config: TrainConfig, records: Sequence[Record], name: str, most: int = 4) -> list[dict]:
    r"""Collect one question of each type whose accuracy changed, with its clip and the completions before and after.

    records: what the evaluation `name` of the run in `config.out` was made on. Of each type the first question with a
    change is taken, whether it improved or not; types without a change are left out. most: how many types, in the
    order of the records. The completions are in words, without tags.
    """
    before, after = ({row["index"]: row for row in read_lines(Path(config.out) / f"evaluation/{when}_{name}.jsonl")
                      if "error" not in row} for when in ("before", "after"))
    by_type, samples = defaultdict(list), []
    for index in sorted(before.keys() & after.keys()):
        if records[index].clip is not None:
            by_type[records[index].question_type].append(index)
    changed = [[i for i in indices if before[i]["accuracy"] != after[i]["accuracy"]] for indices in by_type.values()]
    for index in [indices[0] for indices in changed if indices][:most]:
        record = records[index]
        with contextlib.suppress(ClipError):
            clip = read_clip(record.clip, config.num_frames, (config.frame_size, config.frame_size))
            written = {when: _in_words(record, rows[index]) for when, rows in (("before", before), ("after", after))}
            samples.append({"clip": clip, "question": f"{record.question_type}: {prompt_text(record)}",
                            "answer": record.answer_in_words, **written})
    return samples


def _in_words(record: Record, row: Mapping) -> str:
    parts = completion_in_words(row["completion"], record.options)
    if parts is None:
        return f"not in the required form (incorrect): {row['completion']}"
    verdict = "correct" if row["accuracy"] == 1 else "incorrect"
    return f"{parts[1] or 'no answer'} ({verdict}), reasoning: {parts[0] or 'none'}"


def frame_strip(clip: Clip, title: str = "", caption: str = "") -> Figure:
    r"""Draw up to eight frames of a clip, evenly spaced, side by side, with the time of each in seconds."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(1.1 * min(MOST_FRAMES, len(clip.frames)) + 0.3,
                                     1.8 + 0.2 * len(caption.splitlines())))
        _strip(figure, clip, title, caption)
    return figure


def sample_strips(samples: Sequence[Mapping]) -> Figure:
    r"""Draw clips as frame strips, each under its question and above the completions before and after training.

    samples: mappings with `clip`, `question`, `answer`, `before` and `after`, as `sample_answers` returns them.
    """
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(9.5, 2.3 * len(samples) + 0.3))
        figure.suptitle("Of each question type, the first question whose accuracy changed", fontsize=10)
        for part, sample in zip(figure.subfigures(len(samples), 1, squeeze=False)[:, 0], samples):
            written = [f"{when}: {textwrap.shorten(sample[when], 220) or '(nothing)'}" for when in ("before", "after")]
            caption = "\n".join(textwrap.fill(line, 125) for line in [f"correct answer: {sample['answer']}", *written])
            _strip(part, sample["clip"], textwrap.shorten(" ".join(sample["question"].split()), 150), caption)
    return figure


def _strip(figure, clip: Clip, title: str, caption: str) -> None:
    count = min(MOST_FRAMES, len(clip.frames))
    for k, axes in enumerate(figure.subplots(1, count, squeeze=False)[0]):
        number = int((k + 0.5) * len(clip.frames) / count)
        axes.imshow(clip.frames[number].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.set_xlabel(f"{clip.seconds[number]:.2f} s", fontsize=8)
    figure.suptitle(title, fontsize=10, parse_math=False)
    if caption:
        figure.supxlabel(caption, fontsize=8, x=0.01, ha="left", parse_math=False)


def save(figure: Figure, path: str | Path) -> None:
    r"""Write a figure as PNG and close it. Raises `UserError` if it cannot be written."""
    with writing(path):
        figure.savefig(path, dpi=STYLE["savefig.dpi"])
    plt.close(figure)
