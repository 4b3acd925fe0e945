r"""A policy small enough to enumerate, used by the theory notebooks: every probability, reward and KL is an exact sum.

16 prompts; a completion is three tokens out of four words, so there are 64. The logits of a token depend on its place
and on the word before; one part of them is shared by all prompts, one part is the prompt's own. A completion is right
(reward 1) if at least two of its words stand where the prompt's three target words do. Many *seeds* (worlds with
policies of their own) are trained at once: S of them, in the first dimension of every tensor.
"""

from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from dvr1_lite.advantages import vanish_probability
from dvr1_lite.config import ObjectiveConfig
from dvr1_lite.objectives import Batch, objective_loss

WORDS, TOKENS, PROMPTS, GROUP = 4, 3, 16, 8
COMPLETIONS = torch.tensor(list(product(range(WORDS), repeat=TOKENS)))  # (64, T)
BEFORE = torch.cat([torch.zeros(64, 1, dtype=torch.long), COMPLETIONS[:, :-1]], dim=1)
PLACE = torch.arange(TOKENS).expand(64, TOKENS)

# --- the world -------------------------------------------------------------------------------------------------------


def make_world(seeds) -> tuple[list[Tensor], Tensor]:
    """Parameters (shared (S, T, 4, 4), own (S, P, T, 4, 4)), standard normal, and the rewards (S, P, 64)."""
    rngs = [np.random.default_rng(seed) for seed in seeds]
    shape = (TOKENS, WORDS, WORDS)
    shared = torch.tensor(np.stack([rng.normal(size=shape) for rng in rngs]))
    own = torch.tensor(np.stack([rng.normal(size=(PROMPTS, *shape)) for rng in rngs]))
    target = torch.tensor(np.stack([rng.integers(0, WORDS, (PROMPTS, 1, TOKENS)) for rng in rngs]))
    right = (COMPLETIONS == target).sum(dim=-1) >= 2
    return [shared.requires_grad_(), own.requires_grad_()], right.double()


def token_logps(parameters: list[Tensor]) -> Tensor:
    """Log-probs of the tokens of every completion, (S, P, 64, T), in nats."""
    shared, own = parameters
    return (shared[:, None] + own).log_softmax(dim=-1)[:, :, PLACE, BEFORE, COMPLETIONS]


def exact_kl(logps: Tensor, reference: Tensor) -> Tensor:
    """KL(policy || reference) in nats, mean over prompts; both (S, P, 64, T), returns (S,)."""
    return (logps.sum(-1).exp() * (logps - reference).sum(-1)).sum(-1).mean(-1)


# --- groups and losses -----------------------------------------------------------------------------------------------


def sample(logps: Tensor, rng: np.random.Generator, group_size: int = GROUP) -> Tensor:
    """Groups drawn from a policy: the numbers of their completions, (S, P, G)."""
    cumulative = logps.sum(-1).exp().cumsum(-1).contiguous()
    draws = torch.tensor(rng.random((*cumulative.shape[:2], group_size)))
    return torch.searchsorted(cumulative, draws).clamp(max=len(COMPLETIONS) - 1)


def pick(table: Tensor, ids: Tensor) -> Tensor:
    """The sampled rows of a table (S, P, 64, T), as objectives want them: (S * P, G, T)."""
    chosen = table.gather(2, ids[..., None].expand(-1, -1, -1, TOKENS))
    return chosen.reshape(-1, ids.shape[-1], TOKENS)


def group_loss(
    ids: Tensor, parameters: list[Tensor], old: Tensor, reference: Tensor, right: Tensor, config: ObjectiveConfig
) -> Tensor:
    """The loss of sampled groups: mean over the prompts of a seed, summed over seeds, so that none sees another."""
    rewards = right.gather(2, ids).reshape(-1, ids.shape[-1])
    logp_old = pick(old, ids)
    mask = torch.ones_like(logp_old)
    batch = Batch(pick(token_logps(parameters), ids), logp_old, pick(reference, ids), mask, rewards)
    return objective_loss(batch, config) * len(ids)


def rho_gradient(method: str, rho: Tensor, rewards: Tensor, **settings) -> Tensor:
    r"""d loss / d rho of one group, (G,), without a KL term; one token each, no epsilon on the rewards' std."""
    logp = rho.detach().clone().reshape(1, -1, 1).requires_grad_()
    settings = {"beta": 0.0, "advantage_eps": 0.0, "logp_reduction": "sum"} | settings
    config = ObjectiveConfig(method=method, **settings)
    batch = Batch(logp, torch.zeros_like(logp), None, torch.ones_like(logp), rewards[None])
    return torch.autograd.grad(objective_loss(batch, config), logp)[0].flatten()


def flat(tensors) -> Tensor:
    """Parameters or gradients of every seed in one row, (S, everything)."""
    return torch.cat([tensor.flatten(1) for tensor in tensors], dim=1)


# --- training --------------------------------------------------------------------------------------------------------


def race(config: ObjectiveConfig, lr: float, seeds, batches: int = 30, inner: int = 4) -> Tensor:
    """Train from scratch: reward, KL to the start and vanishing share, before each batch and at the end.

    Returns (batches + 1, 3, S), exact values, means over prompts. A batch is one group of 8 for each of the
    16 prompts, used for `inner` Adam updates. "dpo" samples from the start.
    """
    parameters, right = make_world(seeds)
    reference = token_logps(parameters).detach()
    adam = torch.optim.Adam(parameters, lr=lr)
    rng = np.random.default_rng(7)
    rows = []
    for batch in range(batches + 1):
        old = token_logps(parameters).detach()
        success = (old.sum(-1).exp() * right).sum(-1)  # (S, P)
        gone = vanish_probability(success, GROUP).mean(-1)
        rows.append(torch.stack([success.mean(-1), exact_kl(old, reference), gone]))
        if batch == batches:
            return torch.stack(rows)
        ids = sample(reference if config.method == "dpo" else old, rng)
        for _ in range(inner):
            adam.zero_grad()
            group_loss(ids, parameters, old, reference, right, config).backward()
            adam.step()


def best_rate(config: ObjectiveConfig, rates=(0.03, 0.1, 0.3), seeds=range(100, 106)) -> float:
    """The learning rate with the highest final reward, on seeds that no comparison uses; the same rule for all."""
    return max(rates, key=lambda lr: race(config, lr, seeds)[-1, 0].mean().item())


T_QUANTILE = {5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}  # of Student's t at 97.5 %, by the number of seeds


def band(axes, rows: Tensor, x=None, **look) -> None:
    """Draw the mean over seeds of `rows` (N, S), with its 95 % interval (Student's t) as a band."""
    rows = rows.numpy()
    seeds = rows.shape[1]
    mean, reach = rows.mean(axis=1), T_QUANTILE[seeds] * rows.std(axis=1, ddof=1) / seeds**0.5
    x = np.arange(len(mean)) if x is None else x
    axes.plot(x, mean, **look)
    axes.fill_between(x, mean - reach, mean + reach, color=look["color"], alpha=0.2, linewidth=0)


# --- the triangle of three-action policies ---------------------------------------------------------------------------

CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]])


def triangle(axes, old: Tensor, curve: Tensor, title: str) -> None:
    """Draw the simplex, the old policy (dot) and a curve of policies (dashed). Policies are (..., 3)."""
    axes.fill(*CORNERS.T, fill=False, edgecolor="black")
    axes.plot(*(curve.numpy() @ CORNERS).T, "k--", linewidth=1)
    axes.plot(*(old.numpy() @ CORNERS), "ko", markersize=5)
    for number, shift in enumerate([(-0.06, -0.06), (0.02, -0.06), (0.0, 0.03)]):
        axes.text(*(CORNERS[number] + shift), f"$y_{number + 1}$")
    axes.set_title(title, pad=12)
    axes.set_aspect("equal")
    axes.axis("off")


def tracks_picture(tracks: dict[str, tuple[Tensor, dict]], step: int, old: Tensor, curve: Tensor) -> np.ndarray:
    """Tracks (name: policies (N, 3), look of its line) up to a step, as an image (H, W, 3).

    The names stand right of the triangle, in the order in which the whole tracks end, with a thin line to each end.
    """
    figure = plt.figure(figsize=(5.2, 3.7), dpi=80, layout="none")
    axes = figure.add_axes((0, 0, 1, 0.9))
    triangle(axes, old, curve, f"after {step} inner updates")
    axes.set(xlim=(-0.12, 1.5), ylim=(-0.1, 0.98))
    heights = np.linspace(0.15, 0.82, len(tracks) + 1)[1:]
    order = sorted(tracks, key=lambda name: tracks[name][0][-1].numpy() @ CORNERS[:, 1])
    for name, (track, look) in tracks.items():
        places, look = track[: step + 1].numpy() @ CORNERS, {"marker": "o"} | look
        marker, height = look.pop("marker"), heights[order.index(name)]
        axes.plot(*places.T, linewidth=2, **look)
        axes.plot(*places[-1], marker, color=look["color"], markersize=7, zorder=3)
        axes.plot((places[-1, 0], 1.03), (places[-1, 1], height), color=look["color"], linewidth=0.6)
        axes.text(1.05, height, name, color=look["color"], fontsize=9, va="center")
    figure.canvas.draw()
    picture = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    plt.close(figure)
    return picture


def write_motion(tracks: dict[str, tuple[Tensor, dict]], old: Tensor, curve: Tensor, folder: Path) -> None:
    """Write `simplex.gif`, slow and without flashes, and the still `simplex_strip.png`."""
    from PIL import Image

    last = max(len(track) for track, _ in tracks.values()) - 1
    folder.mkdir(exist_ok=True)
    moments = sorted({round(last * (k / 39) ** 2.5) for k in range(40)})
    pictures = [Image.fromarray(tracks_picture(tracks, m, old, curve)).quantize(48) for m in moments]
    pictures[0].save(folder / "simplex.gif", save_all=True, append_images=pictures[1:], loop=0,
                     duration=[160] * (len(pictures) - 1) + [3000])
    strip = np.concatenate([tracks_picture(tracks, m, old, curve) for m in (0, 10, 60, last)], axis=1)
    Image.fromarray(strip).quantize(48).save(folder / "simplex_strip.png", optimize=True)
