r"""Figures and small simulations of notebook 02, which derives Reg-GRPO.

Figures are returned, with their number ("Figure 02-B") in the title; `plt.show()` stands in the notebook.
`python notebooks/derivation.py` writes the moving picture of section 11, figures/simplex.gif, with its still strip.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER)]
from dvr1_lite.config import ObjectiveConfig  # noqa: E402
from dvr1_lite.lab.plotting import METHOD_COLOURS, label_ends  # noqa: E402
from dvr1_lite.objectives import Batch, objective_loss  # noqa: E402
from small_world import (CORNERS, band, flat, group_loss, make_world, pick, sample, token_logps,  # noqa: E402
                         triangle, write_motion)

LOOKS = (("#332288", "-"), ("#CC6677", "--"), ("#117733", ":"))  # of up to three lines in a panel
WORDS = 4  # of the chain in `spread_after_one_update`

# The triangle of section 11: three completions, and a group of ten that stands for their probabilities.
OLD, REWARD = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.0, 0.6, 1.0]).double()
TEN = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
FIELDS = {
    "GRPO": ObjectiveConfig("grpo", beta=0.0),
    "GRPO, clipped": ObjectiveConfig("grpo", beta=0.0, clip_eps=0.2),
    "Reg-GRPO": ObjectiveConfig("reg-grpo", beta=0.0),
    "centred regression": ObjectiveConfig("centred-regression", beta=0.0, reward_lambda=0.5)}
TILTS = torch.cat([torch.zeros(1), torch.logspace(-2, 1.3, 80)]).double()  # 1 / lambda
CURVE = (OLD.log() + TILTS[:, None] * REWARD).softmax(-1)  # Eq. 4's policies


# --- figures ---------------------------------------------------------------------------------------------------------


def draw_optimum(lams: np.ndarray, shares: Mapping[str, Tensor], moved: Tensor, earned: Tensor, number: str) -> Figure:
    r"""Draw how Eq. 4's policy changes with lambda, and what a KL buys.

    shares: total probability of the completions of one reward, by label; moved: KL in nats; earned: expected reward.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
    figure.suptitle(rf"{number}. The best policy, from a large $\lambda$ to a small one", fontsize=11)
    for (label, share), (colour, dash) in zip(shares.items(), LOOKS):
        left.plot(lams, share, color=colour, linestyle=dash)
    left.set(xscale="log", xlabel=r"$\lambda$ (reward per nat)", ylabel=r"probability under $\pi^*$", ylim=(0, 1),
             title=r"A small $\lambda$ moves probability to the best")
    left.set_xlim(10, 0.1)
    label_ends(left, [(label, share[-1].item(), colour) for (label, share), (colour, _) in zip(shares.items(), LOOKS)])
    right.plot(moved, earned, color="black")
    right.set(title="The first half nat buys most", xlabel="KL to the old policy (nats)", ylabel="expected reward")
    return figure


def draw_correlations(advantages: Tensor, panels: Mapping[str, tuple[Tensor, float]], number: str) -> Figure:
    r"""Draw the same advantages against several log-ratios: `panels` has log-ratio (G,) and loss by title."""
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 3.2), sharey=True)
    figure.suptitle(f"{number}. Only the pairing of rewards and log-ratios counts", fontsize=11)
    for axis, (name, (rho, loss)) in zip(axes, panels.items()):
        line = np.poly1d(np.polyfit(rho, advantages, 1))
        axis.plot([-1.6, 4], line([-1.6, 4]), "--", color="grey", linewidth=1)
        axis.scatter(rho, advantages, color=METHOD_COLOURS["reg-grpo"], edgecolor="black", zorder=3)
        axis.set(title=f"{name}: loss {loss:.2f}", xlabel=r"$\rho$ (nats)", xlim=(-1.6, 4), ylim=(-1.4, 2))
    axes[0].set_ylabel("advantage A")
    return figure


def draw_inner_updates(paths: Mapping[float, Tensor], number: str) -> Figure:
    r"""Draw cosine and relative spread over the inner updates; `paths` has (updates, 2, seeds) by epsilon."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.5))
    figure.suptitle(f"{number}. Inner updates of Reg-GRPO on the small policy", fontsize=11)
    for (eps, path), (colour, dash) in zip(paths.items(), LOOKS):
        band(left, path[:, 0], color=colour, linestyle=dash)
        band(right, path[1:, 1] / eps, np.arange(1, len(path)), color=colour, linestyle=dash)
    left.set(title="The direction leaves the policy gradient", xlabel="inner updates made",
             ylabel="cosine of the two gradients")
    right.axhline(1, color="black", linewidth=1)
    right.set(title=r"... where the spread reaches $\epsilon_\rho$", xlabel="inner updates made", yscale="log",
              ylabel=r"std of $\rho$ in a group / $\epsilon_\rho$")
    label_ends(left, [(rf"$\epsilon_\rho$ = {eps}", path[-1, 0].mean().item(), colour)
                      for (eps, path), (colour, _) in zip(paths.items(), LOOKS)])
    return figure


def draw_spreads(lengths: Sequence[int], spreads: Mapping[str, Sequence[float]], eps: float, number: str) -> Figure:
    r"""Draw the spread after one update against the completion length, with epsilon as a horizontal line."""
    figure, axes = plt.subplots(figsize=(7.5, 3.2))
    for (name, values), (colour, dash) in zip(spreads.items(), LOOKS):
        axes.plot(lengths, values, color=colour, linestyle=dash, marker="o")
        axes.annotate(name, (lengths[-1], values[-1]), (8, 0), textcoords="offset points", va="center", fontsize=9,
                      color=colour, annotation_clip=False)
    axes.axhline(eps, color="black", linewidth=1)
    axes.text(lengths[0], eps * 1.08, rf"$\epsilon_\rho$ = {eps}", va="bottom", fontsize=9)
    axes.set(xscale="log", yscale="log", xlabel="completion length T (tokens)", ylabel=r"std of $\rho$ (nats)",
             ylim=(0.003, 0.4), title=f"{number}. Longer completions spread more in one update")
    axes.set_xticks(lengths, [str(length) for length in lengths], minor=False)
    axes.minorticks_off()
    return figure


def draw_signs(runs: Mapping[str, Tensor], number: str) -> Figure:
    r"""Draw reward against KL, seed by seed; `runs` has (batches, 3, seeds) as `small_world.race` returns it."""
    figure, axes = plt.subplots(figsize=(6.2, 3.2))
    for (name, run), (colour, dash) in zip(runs.items(), LOOKS):
        axes.plot(run[:, 1], run[:, 0], color=colour, linewidth=0.6, alpha=0.5, linestyle=dash)
        axes.plot(*run.mean(-1)[:, [1, 0]].T, color=colour, linestyle=dash, linewidth=2.5, label=name)
    axes.set(xlabel="KL to the reference (nats)", ylabel="expected reward", ylim=(0, 1.02),
             title=f"{number}. The printed sign goes further and earns less")
    axes.legend(loc="lower right")
    return figure


def draw_fields(points: Tensor, flows: Mapping[str, Tensor], number: str) -> Figure:
    r"""Draw the directions of descent at policies (N, 3); `flows` has changes of probability (N, 3) by method name.

    A name may carry a remark after a comma; a cross marks a policy where the method has no gradient.
    """
    figure, axes = plt.subplots(1, len(flows), figsize=(11, 3.4))
    figure.suptitle(f"{number}. Where an inner update moves each policy", fontsize=11)
    at = points.numpy() @ CORNERS
    for axis, (name, flow) in zip(axes, flows.items()):
        length = flow.norm(dim=-1)
        arrows = (flow / length.clamp(min=1e-9)[:, None]).numpy() @ CORNERS
        axis.quiver(*at.T, *arrows.T, color=METHOD_COLOURS[name.split(",")[0].lower().replace(" ", "-")], scale=17,
                    width=0.009, headwidth=3.5, headlength=4, headaxislength=3.5)
        axis.plot(*at[length < 1e-9].T, "x", color="#777777", markersize=4)
        triangle(axis, OLD, CURVE, name)
    return figure


def draw_race(runs: Mapping[str, Tensor], rollouts: int, number: str) -> Figure:
    r"""Draw reward against rollouts and against KL for up to four methods; `rollouts` is the number of one batch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.7), sharey=True)
    figure.suptitle(f"{number}. Four methods on the small policy", fontsize=11)
    for (name, run), dash in zip(runs.items(), ("-", "--", "-.", ":")):
        look = {"color": METHOD_COLOURS[name.split(",")[0]], "linestyle": dash}
        band(left, run[:, 0], np.arange(len(run)) * rollouts, label=name, **look)
        right.plot(*run.mean(-1)[:, [1, 0]].T, **look)
    left.set(title="By rollouts they end close together", xlabel="rollouts (completions)", ylabel="expected reward",
             ylim=(0, 1))
    right.set(title="By distance they differ", xlabel="KL to the reference (nats)")
    left.legend(loc="lower right")
    return figure


# --- simulations -----------------------------------------------------------------------------------------------------


def inner_path(eps: float, updates: int = 8, seeds: Sequence[int] = range(10), lr: float = 0.03) -> Tensor:
    r"""Follow inner updates of Reg-GRPO by Adam on one batch of the small world: (updates + 1, 2, seeds).

    Before each update: the cosine of its gradient to the policy gradient (GRPO with summed log-probs and one ratio for
    each completion) on the same rollouts at the same parameters, and the std of rho in a group, mean over groups.
    """
    parameters, correct = make_world(seeds)
    old = token_logps(parameters).detach()
    ids = sample(old, np.random.default_rng(1))  # (seeds, prompts, 8)
    plain = ObjectiveConfig("grpo", beta=0.0, logp_reduction="sum", ratio_level="sequence")
    reg = ObjectiveConfig("reg-grpo", beta=0.0, predicted_eps=eps)
    adam, rows = torch.optim.Adam(parameters, lr=lr), []
    for _ in range(updates + 1):
        losses = [group_loss(ids, parameters, old, old, correct, config) for config in (plain, reg)]
        theirs, ours = (torch.autograd.grad(loss, parameters) for loss in losses)
        rho = pick(token_logps(parameters).detach() - old, ids).sum(-1)
        spread = rho.std(-1, correction=0).reshape(len(ids), -1).mean(-1)
        rows.append(torch.stack([torch.cosine_similarity(flat(ours), flat(theirs), dim=1), spread]))
        for parameter, part in zip(parameters, ours):
            parameter.grad = part
        adam.step()
    return torch.stack(rows)


def descent(p: Tensor, config: ObjectiveConfig) -> Tensor:
    r"""Return minus the gradient by the logits, (N, 3), of policies `p` (N, 3) of the triangle."""
    logits = p.log().clone().requires_grad_()
    logp = logits.log_softmax(-1)[:, TEN, None]  # (N, 10, 1)
    old = OLD.log()[TEN].reshape(1, 10, 1).expand_as(logp)
    batch = Batch(logp, old, None, torch.ones_like(logp), REWARD[TEN].expand(len(p), 10))
    return -torch.autograd.grad(objective_loss(batch, config) * len(p), logits)[0]


def flow(p: Tensor, config: ObjectiveConfig) -> Tensor:
    r"""Return how the probabilities of policies `p` (N, 3) change in a small step of descent."""
    step = descent(p, config)
    return p * (step - (p * step).sum(-1, keepdim=True))


def trajectory(config: ObjectiveConfig, updates: int = 1500, first: float = 0.05) -> Tensor:
    r"""Follow inner updates from the old policy, (updates + 1, 3); the first step of the logits has length `first`."""
    p, rows, rate = OLD.clone(), [OLD], None
    for _ in range(updates):
        step = descent(p[None], config)[0]
        rate = rate or first / step.norm().item()
        p = (p.log() + rate * step).softmax(-1)
        rows.append(p)
    return torch.stack(rows)


def spread_after_one_update(length: int, shared: bool, lr: float = 0.003, eps: float = 0.1,
                            seeds: Sequence[int] = range(10), prompts: int = 16, size: int = 8) -> tuple[float, float]:
    r"""Return the std of rho in a group, and of one token's log-ratio, after one Adam update of Reg-GRPO (nats).

    A completion is a chain of `length` words out of four; a word's logits depend on the word before. shared: all
    positions use one table of logits; otherwise each has its own. The reward is the share of words that agree with a
    random target. Means over seeds.
    """
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        tables = torch.randn(1 if shared else length, WORDS, WORDS, generator=generator,
                             dtype=torch.float64).requires_grad_()
        place = torch.zeros(length, dtype=torch.long) if shared else torch.arange(length)
        with torch.no_grad():
            probabilities, words = tables.softmax(-1), [torch.zeros(prompts * size, dtype=torch.long)]
            for t in range(length):
                words.append(torch.multinomial(probabilities[place[t], words[-1]], 1, generator=generator)[:, 0])
        before, chosen = (torch.stack(part, dim=1).reshape(prompts, size, length) for part in (words[:-1], words[1:]))
        target = torch.randint(0, WORDS, (prompts, 1, length), generator=generator)
        old = tables.detach().log_softmax(-1)[place, before, chosen]
        logp = tables.log_softmax(-1)[place, before, chosen]
        batch = Batch(logp, old, None, torch.ones_like(old), (chosen == target).double().mean(-1))
        adam = torch.optim.Adam([tables], lr=lr)
        objective_loss(batch, ObjectiveConfig("reg-grpo", beta=0.0, predicted_eps=eps)).backward()
        adam.step()
        change = tables.detach().log_softmax(-1)[place, before, chosen] - old
        rows.append((change.sum(-1).std(-1, correction=0).mean().item(), change.std(correction=0).item()))
    return tuple(np.mean(rows, axis=0).tolist())


def main() -> None:
    looks = {"GRPO": {}, "GRPO, clipped": {"color": "#8C7FD6", "marker": "s"}, "Reg-GRPO": {"marker": "^"},
             "centred regression": {"marker": "D"}}
    looks = {name: {"color": METHOD_COLOURS[FIELDS[name].method]} | look for name, look in looks.items()}
    write_motion({name: (trajectory(config), looks[name]) for name, config in FIELDS.items()}, OLD, CURVE,
                 FOLDER / "figures")


if __name__ == "__main__":
    main()
