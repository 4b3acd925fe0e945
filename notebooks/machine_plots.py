r"""Figures and small readers of notebook 04 that are longer than the lesson they serve."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dvr1_lite.files import read_lines
from dvr1_lite.policy import Policy
from dvr1_lite.training import Group

SHORT = {"<|im_end|>": "end", "<think>": "think", "</think>": "/think", "<answer>": "ans", "</answer>": "/ans",
         "<glue>": "glue", "</glue>": "/glue"}  # tokens that would not fit their cell


def patch_order(frames: torch.Tensor, patches: torch.Tensor, label: str) -> Figure:
    r"""Draw the first frame with the number of each patch's row, and check every row against the frame's pixels.

    frames: (N_f, 3, 56, 56) in [0, 1]; patches: what `patchify` made of them with mean and std 0.5; label:
    "Figure 04-C". Raises AssertionError if a row holds other pixels than those of its place.
    """
    figure, axes = plt.subplots(figsize=(3.6, 4.0))
    axes.imshow(frames[0].permute(1, 2, 0), alpha=0.75)
    for number in range(16):
        block, within = divmod(number, 4)
        y, x = 14 * (2 * (block // 2) + within // 2), 14 * (2 * (block % 2) + within % 2)
        row = patches[number].view(3, 2, 14, 14)[:, 0] / 2 + 0.5
        assert torch.allclose(row, frames[0, :, y:y + 14, x:x + 14], atol=1e-5), f"row {number} is elsewhere"
        axes.text(x + 6.5, y + 6.5, number, ha="center", va="center", bbox={"color": "white", "pad": 1.5})
    for edge in (14, 28, 42):
        look = {"color": "white", "linewidth": 3 if edge == 28 else 0.8}
        axes.axvline(edge - 0.5, **look)
        axes.axhline(edge - 0.5, **look)
    axes.set(title=f"{label}. Four consecutive rows\nof the patch table are one block", xlabel="x (pixels)",
             ylabel="y (pixels)")
    axes.grid(visible=False)
    return figure


def add_number(figure: Figure, number: str) -> None:
    r"""Write the number ("Figure 04-D") into the title of a figure over the steps of a run; ticks at whole steps."""
    if len(figure.axes) == 1:
        figure.axes[0].set_title(f"{number}. {figure.axes[0].get_title()}")
    else:
        figure.suptitle(f"{number}. Groups that vanish, step by step", fontsize=11)
    for axes in figure.axes:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))


def token_table(policy: Policy, group: Group, values: torch.Tensor, number: str, limit: float = 0.5) -> Figure:
    r"""Draw a group's completions token by token, coloured by `values` (G, T) in nats from -limit to limit.

    Rows are sorted by reward, the highest on top.
    """
    order = sorted(range(len(group.tokens)), key=lambda i: -group.scores[i].total)
    longest = max(map(len, group.tokens))
    figure, axes = plt.subplots(figsize=(max(6.0, 0.52 * longest), 3.6))
    for y, i in enumerate(order):
        words = policy.tokenizer.convert_ids_to_tokens(group.tokens[i])
        row = torch.full((longest,), float("nan"))
        row[:len(words)] = values[i, :len(words)]
        drawn = axes.imshow(row[None], aspect="auto", cmap="PuOr", vmin=-limit, vmax=limit,
                            extent=(-0.5, longest - 0.5, y + 0.5, y - 0.5))
        for x, word in enumerate(words):
            axes.text(x, y, SHORT.get(word, word), fontsize=8.5, ha="center", va="center", parse_math=False,
                      color="white" if abs(row[x]) > 0.6 * limit else "black")
    axes.set_yticks(range(len(order)), [f"R = {group.scores[i].total:.0f}" for i in order])
    axes.set(title=f"{number}. An update moves the tokens at which completions differ", xlabel="token",
             ylim=(len(order) - 0.5, -0.5), xlim=(-0.5, longest - 0.5), xticks=range(0, longest, 2))
    axes.grid(visible=False)
    figure.colorbar(drawn, ax=axes, label="change (nats)")
    return figure


def answers(folder: Path, when: str, name: str = "tune") -> dict[int, dict]:
    r"""Read the answers of a run "before" or "after" training, by the index of their question."""
    return {row["index"]: row for row in read_lines(folder / f"evaluation/{when}_{name}.jsonl") if "error" not in row}
