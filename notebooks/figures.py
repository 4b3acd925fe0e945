r"""Figures of the notebooks: one style, the drawing of the method, and plots that are longer than eight lines.

A function draws into the axes that it is given, or makes and returns a figure; `plt.show()` stands in the notebook.
Colours of methods are those of `dvr1_lite.lab.plotting`, so that a method looks the same in every figure.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor

from dvr1_lite.advantages import vanish_probability
from dvr1_lite.data import Record, prompt_text
from dvr1_lite.lab.plotting import METHOD_COLOURS, label_ends, use_style
from dvr1_lite.video import read_clip
from small_world import band

IDEA_1, IDEA_2 = METHOD_COLOURS["reg-grpo"], "#117733"  # the loss, the augmentation
CORRECT, INCORRECT = "#44AA99", "#882255"
INK, FAINT, LIT = "#222222", "#8C8C8C", "#FFF3C4"
ROWS = (7.6, 5.2, 2.8, 0.4)  # heights of the four completions in the drawing
PARTS = {  # name: heading, caption, place of its left edge
    "clip": ("1 clip and question", "the prompt x = (v, q)", 0.0),
    "group": ("2 group", r"$\pi_{old}$ samples G completions", 20.5),
    "rewards": ("3 rewards", "a program gives points, R", 41.0),
    "advantages": ("4 advantages", "above or below the group, A", 61.5),
    "update": ("5 update", r"change the weights of $\pi_\theta$", 82.0)}
WIDTH = 18.0  # of a box


def style() -> None:
    r"""Make the project's style the default of later figures, with resolution and text large enough for a notebook."""
    use_style()
    plt.rcParams.update({"figure.dpi": 100, "font.size": 10, "legend.fontsize": 9, "xtick.labelsize": 9,
                         "ytick.labelsize": 9})


# --- the drawing of the method ---------------------------------------------------------------------------------------


def draw_method(highlight: str | Sequence[str] = (), title: str = "One training step of DeepVideo-R1") -> Figure:
    r"""Draw one training step, from clip to update, with the paper's two ideas where they act.

    highlight: the parts that the notebook is about, one or several of "clip", "group", "rewards", "advantages",
    "update", "reg-grpo" and "augmentation" (the paper's ideas 1 and 2); they are lit and the others grey. Empty: all
    parts are drawn alike. Raises KeyError for another name.
    """
    lit = {highlight} if isinstance(highlight, str) else set(highlight)
    names = (*PARTS, "reg-grpo", "augmentation")
    if unknown := lit - set(names):
        raise KeyError(f"{sorted(unknown)} is no part of the drawing: choose from {', '.join(names)}")
    ink = {name: INK if name in lit or not lit else FAINT for name in names}
    figure = plt.figure(figsize=(10, 3.5), layout="none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-1, 101), ylim=(-12.5, 21.5))
    axes.axis("off")
    axes.text(0, 19.6, title, fontsize=12, fontweight="bold", color=INK)
    between = FAINT if lit else INK
    for name, (heading, caption, left) in PARTS.items():
        _box(axes, (left, -1.5, WIDTH, 13.5), name in lit, ink[name])
        axes.text(left + WIDTH / 2, 12.9, heading, ha="center", fontsize=10.5, fontweight="bold", color=ink[name])
        axes.text(left + WIDTH / 2, 10.2, caption, ha="center", fontsize=8, color=ink[name])
        if name != "update":
            _arrow(axes, (left + WIDTH + 0.2, 5), (left + WIDTH + 2.3, 5), between)
    _rows(axes, ink)
    _ideas(axes, lit, ink)
    axes.plot((91, 91, 29.5), (14.9, 16.2, 16.2), color=between, linewidth=1.2)
    _arrow(axes, (29.5, 16.2), (29.5, 14.7), between)
    axes.text(60, 16.8, r"next step: the updated policy samples, $\pi_{old} \leftarrow \pi_\theta$", ha="center",
              fontsize=8.5, color=between)
    return figure


def _rows(axes: Axes, ink: dict[str, str]) -> None:
    r"""Fill the boxes: three frames with a moving disc, then one row a completion, followed through all boxes."""
    for number in range(3):
        axes.add_patch(Rectangle((1.2 + 5.4 * number, 3.2), 4.8, 5, facecolor="white", edgecolor=ink["clip"]))
        axes.plot(2.3 + 6.7 * number, 5.7, "o", color=ink["clip"], markersize=8)
    axes.text(9, 0.6, '"Which way does it move?"', ha="center", fontsize=8, style="italic", color=ink["clip"])
    completions = (("right ... B", 2), ("guess ... C", 1), ("left ... A", 1), ("right ... B", 2))
    for height, (text, reward) in zip(ROWS, completions):
        better = reward == 2
        axes.text(29.5, height, text, ha="center", va="center", fontsize=9, family="monospace", color=ink["group"])
        axes.text(50, height, f"R = {reward}", ha="center", va="center", fontsize=9, color=ink["rewards"])
        colour = FAINT if ink["advantages"] == FAINT else CORRECT if better else INCORRECT
        axes.barh(height, 5 if better else -5, left=67.5, height=1.4, color=colour)
        axes.text(77.2, height, "+1" if better else "\N{MINUS SIGN}1", va="center", ha="right", fontsize=9,
                  color=ink["advantages"])
        axes.text(91, height, "more likely" if better else "less likely", ha="center", va="center", fontsize=9,
                  color=ink["update"])
    axes.plot((67.5, 67.5), (-0.6, 8.6), color=ink["advantages"], linewidth=0.8)


def _ideas(axes: Axes, lit: set[str], ink: dict[str, str]) -> None:
    r"""Mark the two ideas: the augmentation leads from the rewards back to the input, the regression is the loss."""
    first, second = (FAINT if ink[name] == FAINT else colour
                     for name, colour in (("reg-grpo", IDEA_1), ("augmentation", IDEA_2)))
    axes.plot((50, 50, 47), (-1.8, -7.5, -7.5), color=second, linewidth=1.8)
    axes.plot((13, 9), (-7.5, -7.5), color=second, linewidth=1.8)
    _arrow(axes, (9, -7.5), (9, -1.7), second)
    _arrow(axes, (91, -3.4), (91, -1.7), first)
    for x, name, colour, heading, text in (
            (30, "augmentation", second, "Idea 2: difficulty-aware augmentation",
             "hard: add a hint    easy: add noise\nthen sample the group again"),
            (83, "reg-grpo", first, "Idea 1: Reg-GRPO, another loss",
             "fit the log-ratio of the two policies to A,\na regression without clipping")):
        _box(axes, (x - 17, -11.8, 34, 8.2), name in lit, colour)
        axes.text(x, -5.9, heading, ha="center", va="center", fontsize=9, fontweight="bold", color=ink[name])
        axes.text(x, -9.1, text, ha="center", va="center", fontsize=8.5, color=ink[name], linespacing=1.3)


def _box(axes: Axes, place: tuple[float, float, float, float], lit: bool, edge: str) -> None:
    left, bottom, width, height = place
    axes.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0,rounding_size=1", edgecolor=edge,
                                  linewidth=2.5 if lit else 1.2, facecolor=LIT if lit else "white"))


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, shrinkA=0, shrinkB=0, color=colour,
                                   linewidth=1.8))


# --- notebook 00 -----------------------------------------------------------------------------------------------------


def published_bars(table: Mapping[str, Sequence[float]], title: str) -> Figure:
    r"""Draw a table of `paper_results.json`, a group of bars for each column; "+ DA-Aug" rows are hatched.

    table: "columns" and, for each row, its accuracies in %.
    """
    names = [name for name in table if name != "columns"]
    figure, axes = plt.subplots(figsize=(9, 3.4))
    for row, name in enumerate(names):
        method = name.split(" +")[0].lower()
        places = np.arange(len(table["columns"])) + 0.16 * (row - 2)
        bars = axes.bar(places, table[name], 0.15, label=name, edgecolor="white", hatch="//" if "Aug" in name else "",
                        color=METHOD_COLOURS.get(method, METHOD_COLOURS["base"]))
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set(title=title, ylabel="accuracy in %", ylim=(0, 60))
    axes.set_xticks(range(len(table["columns"])), table["columns"])
    axes.grid(axis="x", visible=False)
    axes.legend(ncols=len(names), loc="upper center", fontsize=8.5)
    return figure


def clips_and_questions(clips: Mapping[str, Sequence[Record]], title: str) -> Figure:
    r"""Draw clips, each above the questions that are asked about it and their correct answers.

    clips: for each heading the records of one clip.
    """
    figure = plt.figure(figsize=(10, 0.4 + sum(1.25 + 0.17 * len(records) for records in clips.values())))
    figure.suptitle(title, fontsize=11)
    heights = [1.25 + 0.17 * len(records) for records in clips.values()]
    parts = figure.subfigures(len(clips), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (heading, records) in zip(parts, clips.items()):
        lines = [f"{record.question_type:10s}{prompt_text(record).replace(chr(10), '  ')}  ->  {record.answer}"
                 for record in records]
        _strip_and_text(part, records[0], heading, lines, height=0.17 * len(records))
    return figure


def draw_groups(groups: Mapping[str, tuple[Record, Sequence[str], Sequence[float], Sequence[float]]]) -> Figure:
    r"""Draw groups, each under its heading: the clip, the question, and every completion with reward and advantage.

    groups: for each heading a record and its G completions, rewards and advantages.
    """
    figure = plt.figure(figsize=(10, 2.95 * len(groups)))
    for part, (heading, (record, texts, rewards, advantages)) in zip(
            figure.subfigures(len(groups), 1, squeeze=False)[:, 0], groups.items()):
        lines = [f"{prompt_text(record).replace(chr(10), '  ')}   (correct: {record.answer})",
                 "reward  advantage  completion"]
        lines += [f"{reward:6.1f}  {advantage:+9.2f}  {text[:110]}"
                  for text, reward, advantage in zip(texts, rewards, advantages)]
        _strip_and_text(part, record, heading, lines, height=0.17 * len(lines))
    return figure


def _strip_and_text(part, record: Record, heading: str, lines: Sequence[str], height: float) -> None:
    r"""Fill a subfigure: a heading, eight frames of the record's clip, and `height` inches of lines below."""
    part.suptitle(heading, fontsize=10, fontweight="bold", x=0.01, ha="left")
    grid = part.add_gridspec(2, 8, height_ratios=[0.8, height])
    for column, frame in enumerate(read_clip(record.clip, 8).frames):
        axes = part.add_subplot(grid[0, column])
        axes.imshow(frame.permute(1, 2, 0), interpolation="nearest")
        axes.axis("off")
    axes = part.add_subplot(grid[1, :])
    axes.axis("off")
    axes.text(0, 1, "\n".join(lines), family="monospace", fontsize=8.5, va="top", parse_math=False)


# --- notebook 01 -----------------------------------------------------------------------------------------------------


def reward_and_loss(reward: Tensor, loss: Tensor, title: str) -> Figure:
    r"""Draw mean reward and loss of every step, (steps, seeds) each, as means over seeds with 95 % intervals."""
    figure, axes = plt.subplots(figsize=(7, 3.2))
    band(axes, reward, color=METHOD_COLOURS["grpo"])
    band(axes, loss, color=INCORRECT, linestyle="--")
    axes.set(title=title, xlabel="update", ylabel=f"mean of {reward.shape[1]} seeds", ylim=(-0.08, 1.08))
    label_ends(axes, [("mean reward", reward[-1].mean().item(), METHOD_COLOURS["grpo"]),
                      ("loss", loss[-1].mean().item(), INCORRECT)])
    return figure


def clipped_surrogate(panels: Sequence[tuple[float, np.ndarray, np.ndarray, np.ndarray]], title: str) -> Figure:
    r"""Draw min(r A, clip(r) A) against the ratio r, one panel for each advantage A, and shade where it is flat.

    panels: (A, ratios, surrogate, flat) with flat true where the gradient is 0.
    """
    figure, row = plt.subplots(1, len(panels), figsize=(9.5, 3.2), sharex=True)
    figure.suptitle(title, fontsize=11)
    for axes, (A, ratios, surrogate, flat) in zip(row, panels):
        axes.plot(ratios, A * ratios, ":", color="#777777")
        axes.plot(ratios, surrogate, color=METHOD_COLOURS["grpo"])
        axes.axvspan(ratios[flat].min(), ratios[flat].max(), color=METHOD_COLOURS["dpo"], alpha=0.4)
        axes.text(ratios[flat].mean(), 0.5 if A > 0 else -1.7, "gradient 0", ha="center", fontsize=9)
        axes.plot(1, A, "ko", markersize=5)
        axes.annotate("start", (1, A), xytext=(5, -12 if A > 0 else 6), textcoords="offset points", fontsize=9)
        axes.set(title=f"advantage A = {A:+.0f}", xlabel=r"ratio $r = \pi_\theta/\pi_{old}$", ylabel="surrogate")
    return figure


def vanishing_by_rate(sizes: Sequence[int], types: Mapping[str, tuple[float, float]], group: int, title: str) -> Figure:
    r"""Draw Eq. 01.3 against the success rate for several group sizes, and question types as dots.

    types: for each question type its success rate and its share of vanished groups of size `group`.
    """
    rates = np.linspace(0, 1, 201)
    figure, axes = plt.subplots(figsize=(8, 4.2))
    for number, size in enumerate(sizes):
        axes.plot(rates, vanish_probability(rates, size), color=plt.cm.cividis(number / len(sizes)),
                  label=f"G = {size}", linewidth=2.6 if size == group else 1.4)
    axes.set(title=title, xlabel="success rate p of a prompt; dots: mean over a type's prompts", ylim=(-0.03, 1.1),
             ylabel="share of groups that vanish")
    axes.legend(loc="upper center", ncols=len(sizes))
    _label_dots(axes, types)
    return figure


def _label_dots(axes: Axes, types: Mapping[str, tuple[float, float]], gap: float = 0.075) -> None:
    r"""Draw a dot for each type and a line from it to its name; types at one place share a line, names keep a gap."""
    names: dict[tuple[float, float], list[str]] = {}
    for name, place in types.items():
        axes.plot(*place, "o", color=INCORRECT, markersize=5)
        names.setdefault((round(place[0], 2), round(place[1], 2)), []).append(name)
    for left in (True, False):
        height = np.inf
        for place in sorted((dot for dot in names if (dot[0] < 0.5) == left), key=lambda dot: (-dot[1], dot[0])):
            height = min(place[1], height - gap)
            axes.annotate(", ".join(names[place]), types[names[place][0]], fontsize=8.5,
                          xytext=(place[0] + (0.09 if left else -0.05), height), ha="left" if left else "right", va="center", annotation_clip=False, zorder=3,
                          bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
                          arrowprops={"arrowstyle": "-", "color": INCORRECT, "linewidth": 0.8, "shrinkA": 0})


def vanishing_shares(shares: Mapping[str, Tensor], title: str) -> Figure:
    r"""Draw shares of groups while training, stacked, as means over seeds, each with its name where it is largest.

    shares: "all correct" and "all incorrect", (updates, seeds) each.
    """
    means = {name: share.mean(1).numpy() for name, share in shares.items()}
    figure, axes = plt.subplots(figsize=(8, 3.2))
    colours = [CORRECT if name == "all correct" else INCORRECT for name in means]
    axes.stackplot(range(len(next(iter(means.values())))), *means.values(), colors=colours, alpha=0.85)
    axes.set(title=title, xlabel="update", ylabel="share of groups that vanish", ylim=(0, 1))
    axes.margins(x=0)
    for name, mean in means.items():
        first = mean[:len(mean) // 2].sum() > mean[len(mean) // 2:].sum()
        axes.text(0.03 if first else 0.97, 0.12, name, transform=axes.transAxes, fontweight="bold",
                  color=INK if name == "all correct" else "white", ha="left" if first else "right")
    return figure
