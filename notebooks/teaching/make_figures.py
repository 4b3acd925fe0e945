r"""Draw the figures of SLIDES.md into notebooks/teaching/figures/: python notebooks/teaching/make_figures.py

The slide on results shows data/results/claims.png, which `python -m dvr1_lite report` draws from the recorded runs.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parent)]

import figures  # noqa: E402
from dvr1_lite.advantages import vanish_probability  # noqa: E402
from dvr1_lite.data import prompt_text, read_records  # noqa: E402
from dvr1_lite.files import resolve  # noqa: E402
from dvr1_lite.lab.plotting import frame_strip  # noqa: E402
from dvr1_lite.video import read_clip  # noqa: E402


def clip() -> Figure:
    """Draw one clip of ToyVideoQA with its question and correct answer."""
    record = next(r for r in read_records(resolve("data/toyvideoqa/L1.jsonl")) if r.question_type == "direction")
    question = prompt_text(record).replace("\n", "   ")
    return frame_strip(read_clip(record.clip, 8), question, f"correct answer: {record.answer_in_words}")


def vanishing() -> Figure:
    """Draw the probability that a group vanishes against the success rate, for four group sizes."""
    rates = np.linspace(0.001, 0.999, 300)
    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    labels = {2: (0.5, 0.52), 4: (0.5, 0.15), 8: (0.5, 0.04), 16: (0.04, 0.05)}
    for (size, place), colour in zip(labels.items(), plt.cm.viridis(np.linspace(0, 0.75, 4))):
        axes.plot(rates, vanish_probability(rates, size), color=colour, linewidth=2)
        axes.text(*place, f"G = {size}", color=colour, ha="center", fontsize=11)
    axes.set(title="Prompts that are nearly always or nearly never solved give no signal", ylim=(0, 1.02),
             xlabel="success rate p of a prompt", ylabel=r"$p^G + (1-p)^G$, share of groups that vanish")
    return figure


def scale() -> Figure:
    """Draw the loss of Reg-GRPO at rho = c A against the scale c, for three values of epsilon (Eq. 7)."""
    scales = np.geomspace(0.003, 10, 200)
    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    for eps, colour in ((0.01, "#332288"), (0.1, "#117733"), (1.0, "#CC6677")):
        axes.semilogx(scales, (eps / (scales + eps)) ** 2, color=colour, linewidth=2)
        axes.text(1.8 * eps, 0.16, rf"$\epsilon_\rho$ = {eps:g}", color=colour, fontsize=11)
    axes.set(title="Correct order, any scale: the loss falls as the policy moves further", ylim=(0, 1.02),
             xlabel=r"scale c of the log-ratios, $\rho = c\,A$ (nats)", ylabel="loss of the group")
    return figure


def published() -> Figure:
    """Draw table 4 as the paper prints it."""
    path = resolve("data/paper_results.json")
    table = json.loads(path.read_text(encoding="utf-8"))["table_4_ablation"]
    return figures.published_bars(table, "As published (table 4): one run each, no intervals")


DRAWINGS = {"method": figures.draw_method, "clip": clip, "published": published, "vanishing": vanishing, "scale": scale,
            "augmentation": lambda: figures.draw_method("augmentation", "Idea 2: difficulty-aware augmentation")}


def main() -> None:
    figures.style()
    (FOLDER / "figures").mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        path = FOLDER / "figures" / f"{name}.png"
        draw().savefig(path, dpi=110, metadata={"Software": None})
        print(f"{path.relative_to(FOLDER.parents[1])}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
