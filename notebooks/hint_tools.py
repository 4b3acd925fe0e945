r"""Set-up, simulation and figures of notebooks 03 and 03b: prompts and groups of the tiny model, states of groups,
the tabular simulation of Eq. 03.4, and plots."""

from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import binomtest

from dvr1_lite.advantages import vanished
from dvr1_lite.augmentation import best_trace
from dvr1_lite.config import TrainConfig, make_config
from dvr1_lite.data import Record, prompt_text, read_records
from dvr1_lite.files import data_folder
from dvr1_lite.lab.tables import VARIANTS
from dvr1_lite.lab.variants import trainer_class
from dvr1_lite.loading import LoraSettings
from dvr1_lite.policy import Policy, Prompt, encode_record
from dvr1_lite.rewards import Score, score
from dvr1_lite.rollout import sample_groups
from dvr1_lite.toy.examination import Examiner
from figures import CORRECT, FAINT, INCORRECT, INK

STATES = ("all incorrect", "live", "all correct")
STATE_COLOURS = dict(zip(STATES, (INCORRECT, "#DDCC77", CORRECT)))
PLAN_LOOKS = {"hint": ("#882255", "^", "hard: hint"), "none": ("#999999", "o", "unchanged"),
              "noise": ("#332288", "v", "easy: noise")}
CELL_COLOURS = {"F1": "#88CCEE", "F2": "#332288", "F3": "#CC6677", "F4": "#117733", "A2": "#882255", "S": "#DDCC77"}
CONFIG = TrainConfig()

# --- prompts and groups ----------------------------------------------------------------------------------------------


def read_types(split: str = "train") -> dict[str, list[Record]]:
    r"""Return the records of a file of ToyVideoQA by question type."""
    by_type: dict[str, list[Record]] = {}
    for record in read_records(data_folder() / "toyvideoqa" / f"{split}.jsonl"):
        by_type.setdefault(record.question_type, []).append(record)
    return by_type


def make_prompt(policy: Policy, record: Record, hint: str = "", show_answer: bool = False,
                change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Prompt:
    r"""Build the prompt of a record, with a hint, the answer, or a change to the frames (T, 3, H, W)."""
    features = encode_record(policy, record, CONFIG, change)
    return policy.prompt(prompt_text(record, hint=hint, show_answer=show_answer), features)


def sample(policy: Policy, records: Sequence[Record], prompts: Sequence[Prompt], size: int = 8,
           seed: int = 0) -> tuple[list[list[str]], list[list[Score]]]:
    r"""Sample a group for each prompt and score it by its record; returns texts and scores, B lists of `size`."""
    generator, texts = torch.Generator().manual_seed(seed), []
    for at in range(0, len(prompts), 60):
        texts += sample_groups(policy, prompts[at:at + 60], size, CONFIG.max_new_tokens, generator=generator).texts
    return texts, [[score(record, text) for text in group] for record, group in zip(records, texts)]


def own_traces(policy: Policy, records: Sequence[Record], seed: int = 1) -> list[str | None]:
    r"""Return for each record the best of four traces that the policy writes with the answer shown, None if none is
    correct."""
    told = [make_prompt(policy, record, show_answer=True) for record in records]
    return [best_trace(zip(*group)) for group in zip(*sample(policy, records, told, 4, seed))]


def states(scores: Sequence[Sequence[Score]]) -> list[str]:
    r"""Name each group's state: live, or, where all its rewards agree, all correct or all incorrect."""
    totals = torch.tensor([[one.total for one in group] for group in scores])
    best = totals.amin(1) >= torch.tensor([group[0].maximum for group in scores]) - 1e-6
    return [("all correct" if top else "all incorrect") if flat else "live"
            for flat, top in zip(vanished(totals).tolist(), best.tolist())]


def share(flags: Sequence[bool]) -> str:
    r"""Write a share with its count and its 95 % interval (Wilson)."""
    count, size = int(sum(flags)), len(flags)
    low, high = binomtest(count, size).proportion_ci(method="wilson")
    return f"{count:3d} of {size:3d} = {count / size:4.0%}  [{low:.0%}, {high:.0%}]"


# --- cells of the chain types ----------------------------------------------------------------------------------------


def read_cell(cell: str, split: str = "train") -> list[Record]:
    r"""Return the records of one cell of the chain types; split: "train" or "test"."""
    return read_records(data_folder() / "toyvideoqa" / f"{split}_{cell}.jsonl")


def exact_logp(policy: Policy, cell: str, words: int | None = None, number: int = 48) -> np.ndarray:
    r"""Return exact log-probs of the correct completions of a cell's first test records, (number, 8 + 1).

    Of the chain's eight values, then of all other words together; the sum over a row is the log of the success. words:
    how many of the true trace's 16 words a hint shows; None: no hint.
    """
    examiner = Examiner(policy, CONFIG.num_frames, CONFIG.max_new_tokens, torch.Generator(), batch=number)
    return examiner.success(read_cell(cell, "test")[:number], hint=words)


def train_student(cell: str, variant: str, steps: int = 5, seed: int = 0) -> tuple[Policy, int]:
    r"""Train the base model on one cell with GRPO, the project's trainer and a variant; returns it and its rollouts.

    Difficulty is measured against the reward 1, so that the first step is augmented already; the learning rate is 1e-3.
    """
    config = make_config({"method": "grpo", "learning_rate": 1e-3, "seed": seed, "difficulty_reference": "absolute",
                          "absolute_reward": 1.0} | VARIANTS.get(variant, {"augment": "both", "hint_update": variant}))
    student = Policy.load(data_folder() / "base_model",
                          lora=LoraSettings(config.lora_rank, config.lora_alpha, seed))
    trainer = trainer_class(config)(config, read_cell(cell), student)
    for _ in range(steps):
        trainer.step()
    return student, trainer.rollouts


# --- the tabular simulation ------------------------------------------------------------------------------------------
# A policy is one logit for the opening and one for each of k steps. N independent runs are simulated at once; P
# (N, 1 + k) holds the probability that each of these 1 + k positions is correct.


def start_policies(p0: float, alpha: float, runs: int = 32, k: int = 8) -> np.ndarray:
    r"""Return P (N, 1 + k) at the start: success p0, with the share alpha of log p0 in the opening (Eq. 03.4)."""
    one = np.r_[p0**alpha, [p0 ** ((1 - alpha) / k)] * k].clip(max=0.999)
    return np.tile(one, (runs, 1))


def draw_groups(P: np.ndarray, shown: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    r"""Draw a group of eight completions for each run; a completion ends with its first error.

    shown (N,): how many positions, from the first on, a hint shows; these are always correct. Returns correct
    (N, 8, 1 + k); weight, 1 at the positions that the policy itself chose, 0 at shown ones and after an error (same
    shape); reward (N, 8), 1 if all positions are correct.
    """
    not_shown = np.arange(P.shape[1]) >= shown[:, None, None]
    correct = (rng.random((len(P), 8, P.shape[1])) < P[:, None]) | ~not_shown
    no_error_yet = correct.cumprod(-1)
    reached = np.insert(no_error_yet[..., :-1], 0, 1, axis=-1)
    return correct, not_shown * reached, no_error_yet[..., -1]


def pull_on_logits(P: np.ndarray, correct: np.ndarray, weight: np.ndarray, reward: np.ndarray,
                   sharing: float) -> np.ndarray:
    r"""Return GRPO's gradient by each logit, (N, 1 + k): the mean over a group of A (correct - P), where weight is 1.

    sharing: the part of every other step's gradient that a step receives too, from 0 to 1; the opening shares nothing.
    """
    advantages = (reward - reward.mean(1, keepdims=True)) / (reward.std(1, keepdims=True) + 1e-4)
    pull = (advantages[..., None] * weight * (correct - P[:, None])).mean(1)
    total = pull[:, 1:].sum(1, keepdims=True)
    pull[:, 1:] += sharing * (total - pull[:, 1:])
    return pull


def lend(own: tuple[np.ndarray, ...], hinted: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    r"""Replace up to four incorrect completions of own groups by correct hinted ones, as "mixed" does.

    Trained on the plain prompt, a lent completion has weight 1 at all its positions: the prompt shows none of them.
    """
    correct, weight, reward = own
    number = np.minimum(hinted[2].sum(1), 4)[:, None]
    lent = (reward == 0) & ((reward == 0).cumsum(1) <= number)
    return correct | lent[..., None], weight | lent[..., None], reward | lent


def simulate(variant: str, p0: float, alpha: float, sharing: float = 0.05, runs: int = 32,
             budget: int = 4800) -> np.ndarray:
    r"""Train the tabular policy with a variant until the budget of rollouts is spent; return each run's success (N,).

    One prompt a step: 8 rollouts for its own group, and for a hard one 8 more and, with hints, 4 for traces.
    """
    P, used, rng = start_policies(p0, alpha, runs), np.zeros(runs), np.random.default_rng(0)
    steps, extra = P.shape[1] - 1, 8 + 4 * (variant != "resampled")
    while (used < budget).any():
        own = draw_groups(P, np.zeros(runs), rng)
        difficulty = (1 - own[2].mean(1)) / 2  # Eq. 9 against the reward 1; half of a reward is the format's
        hard = difficulty == 0.5 if variant == "only vanished" else difficulty > 0.1
        hard = hard & (variant != "plain")
        shown = 1 + np.ceil(steps * (0.1 + 0.5 * (difficulty - 0.1) / 0.9))  # the opening, and steps by Eq. 03.1
        second = draw_groups(P, shown * (variant != "resampled"), rng)

        own_pull = pull_on_logits(P, *own, sharing)
        hard_pull = pull_on_logits(P, *(lend(own, second) if variant == "mixed" else second), sharing)
        if variant == "kept":
            hard_pull = hard_pull + own_pull
        move = np.where(hard[:, None], hard_pull, own_pull) * (used < budget)[:, None]
        P = 1 / (1 + (1 / P - 1) * np.exp(-0.5 * move))  # the logit rises by half of the gradient
        used = used + (8 + extra * hard) * (used < budget)
    return P.prod(1)


# --- figures ---------------------------------------------------------------------------------------------------------


def draw_readings(title: str) -> Figure:
    r"""Draw what each reading trains on, for a prompt whose own group holds one lucky success."""
    own, hinted = [0, 0, 0, 1, 0, 0, 0, 0], [1, 1, 0, 1, 1, 0, 1, 1]
    parts = {"own": [(value, "o") for value in own], "hinted": [(value, "D") for value in hinted]}
    rows = {"sampled: own group": (parts["own"], "no"), "sampled: hinted group": (parts["hinted"], "yes"),
            "1 hinted (replaces own)": (parts["hinted"], "yes"), "2 only vanished": (parts["own"], "no"),
            "3 kept": (parts["own"] + parts["hinted"], "no / yes"),
            "4 mixed": ([(1, "D")] * 3 + [(1, "o"), (1, "D")] + [(0, "o")] * 3, "no"),
            "5 unhinted": (parts["hinted"], "no")}
    figure, axes = plt.subplots(figsize=(9, 3.6))
    for row, (name, (dots, hint)) in enumerate(rows.items()):
        y = row + 0.6 * (row > 1)
        axes.text(-0.6, y, name, ha="right", va="center", fontsize=10, fontweight="bold" if row > 1 else "normal")
        for x, (value, marker) in enumerate(dots):
            axes.plot(x + 0.5 * (x > 7), y, marker, markersize=10, color=CORRECT if value else INCORRECT)
        axes.text(18, y, hint, ha="center", va="center", fontsize=10)
    axes.axhline(1.8, color=FAINT, linewidth=0.8)
    axes.text(18, -0.9, "hint in the prompt\nof the update?", ha="center", va="center", fontsize=9)
    axes.text(0, -0.9, "circle: written without a hint, diamond: with it;  green: correct, dark red: incorrect",
              va="center", fontsize=9)
    axes.set(xlim=(-6, 20), ylim=(7.2, -1.5), title=title)
    axes.axis("off")
    return figure


def difficulty_by_type(types: Sequence[str], difficulty: Sequence[float], plans: Sequence[str], title: str) -> Figure:
    r"""Draw the difficulty of every group, one row for each question type, with what is planned for it."""
    types, difficulty, plans = map(np.asarray, (types, difficulty, plans))
    rows = sorted(set(types.tolist()), key=lambda kind: difficulty[types == kind].mean())
    place = np.array([rows.index(kind) for kind in types]) + np.random.default_rng(1).uniform(-0.28, 0.28, len(types))
    figure, axes = plt.subplots(figsize=(8.5, 3.9))
    axes.axvspan(-CONFIG.dead_zone, CONFIG.dead_zone, color="#DDDDDD", alpha=0.6)
    for plan, (colour, marker, label) in PLAN_LOOKS.items():
        chosen = plans == plan
        axes.scatter(difficulty[chosen], place[chosen], s=16, color=colour, marker=marker, alpha=0.8, label=label,
                     facecolor="none" if plan == "none" else colour)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(title=title, xlabel="difficulty (share of the largest reward); grey: dead zone")
    figure.legend(loc="outside right center")
    return figure


def noisy_frames(pictures: Mapping[str, torch.Tensor], title: str) -> Figure:
    r"""Draw two frames of one clip under every change; pictures: frames (T, 3, H, W) by name."""
    figure, axes = plt.subplots(2, len(pictures), figsize=(1.45 * len(pictures), 3.1))
    for column, (name, frames) in zip(axes.T, pictures.items()):
        for axis, moment in zip(column, (0, 4)):
            axis.imshow(frames[moment].permute(1, 2, 0), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
        column[0].set_title(name, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def state_bars(columns: Mapping[str, Sequence[str]], title: str) -> Figure:
    r"""Draw how many groups are in each state, a bar for each column; columns: the states of groups by name."""
    figure, axes = plt.subplots(figsize=(7, 3.2))
    left = np.zeros(len(columns))
    for state in STATES:
        width = np.array([list(column).count(state) for column in columns.values()])
        bars = axes.barh(range(len(columns)), width, left=left, color=STATE_COLOURS[state], label=state, height=0.65)
        axes.bar_label(bars, [n or "" for n in width], label_type="center", fontsize=9,
                       color="white" if state == "all incorrect" else INK)
        left += width
    axes.set_yticks(range(len(columns)), columns)
    axes.set(title=title, xlabel="groups", ylim=(len(columns) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside right center", reverse=True)
    return figure


def hint_curves(curves: Mapping[str, Sequence[float]], levels: Sequence, title: str, ylabel: str, log: bool = True,
                xlabel: str = "what the hint shows") -> Figure:
    r"""Draw one line for each cell of the chain types against what the hint shows.

    curves: values by label; a label begins with the name of its cell, such as "F2: along the chain". S is dashed, since
    it runs along A2 once a hint shows the first word.
    """
    figure, axes = plt.subplots(figsize=(8, 3.4))
    for label, values in curves.items():
        cell = label.split(":")[0]
        axes.plot(range(len(levels)), values, "o--" if cell == "S" else "o-", color=CELL_COLOURS[cell], markersize=5,
                  label=label)
    axes.set_xticks(range(len(levels)), levels)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
    figure.legend(loc="outside right center")
    return figure
