r"""Group advantages (Eq. 5), predicted advantages (Eq. 7), and how often they vanish (figure 3).

A *group* is the G completions of one prompt, the last dimension of every tensor here. Stds are those of the population
(divided by G) unless "sample" (G - 1) is asked for, and `eps` is added to the std, outside the square root.
"""

import torch
from torch import Tensor


def centre(values: Tensor) -> Tensor:
    r"""Subtract the group's mean, $x_i - \bar x$. Equal values give exactly 0, also at 1e6 in float32."""
    shifted = values - values[..., :1]  # the mean of large equal values would be rounded, that of zeros is not
    return shifted - shifted.mean(dim=-1, keepdim=True)


def group_advantages(rewards: Tensor, eps: float = 1e-4, std: str = "population") -> Tensor:
    r"""Normalise the rewards of each group, Eq. 5: $A_i = (R_i - \bar R) / (\mathrm{std}\,R + \epsilon_A)$; (B, G).

    rewards: (B, G), any scale, integers and half precision become float32. std: "population" (rewards [1, 1, 0, 0]
    give advantages of 1.000), "sample" (0.866) or "none" (0.5: only the mean is subtracted). A group of one and a group
    of equal rewards give 0. Differs from the paper: it has no eps, and does not say which std it means.
    """
    centred = centre(rewards if rewards.dtype in (torch.float32, torch.float64) else rewards.float())
    if std == "none" or centred.shape[-1] == 1:
        return centred
    scale = centred.std(dim=-1, keepdim=True, correction={"population": 0, "sample": 1}[std]) + eps
    return centred / torch.where(scale == 0, 1.0, scale)


def predicted_advantages(rho: Tensor, eps: float = 0.1) -> Tensor:
    r"""Normalise the log-ratios of a group, Eq. 7: $\hat A_i = (\rho_i-\bar\rho)/(\mathrm{std}\,\rho+\epsilon_\rho)$.

    rho: (B, G) in nats, see `objectives.log_ratios`. The gradient flows through mean and std. At rho = 0, the start of
    every batch, the value is 0 and the gradient (identity - 1/G) / eps: PyTorch's std has gradient 0 there, where
    sqrt(mean of squares) would give NaN. Differs from the paper: without eps the start is 0/0.
    """
    return group_advantages(rho, eps)


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    r"""Subtract the mean reward of the *other* completions: $R_i - \frac{1}{G-1}\sum_{j \ne i} R_j$; (B, G)."""
    size = rewards.shape[-1]
    return centre(rewards) * (size / max(size - 1, 1))  # = G / (G - 1) * (R_i - mean R)


def vanished(rewards: Tensor, tolerance: float = 1e-6) -> Tensor:
    r"""Return which groups have no reward spread, so that every advantage is 0; (B, G) -> bool (B,)."""
    return rewards.amax(dim=-1) - rewards.amin(dim=-1) <= tolerance


def vanishing_ratio(rewards: Tensor, maximum: float | Tensor) -> dict[str, float]:
    r"""Compute the share of vanished groups in a batch (figure 3) as "ratio" = "all_correct" + "all_incorrect".

    rewards: (B, G). maximum: the largest possible reward, a number or (B,). A group is all correct if every completion
    has it; all incorrect if the rewards agree below it, for instance format without accuracy. No groups give 0.
    """
    flat = vanished(rewards)
    correct = flat & (rewards.amin(dim=-1) >= maximum - 1e-6)
    shares = {"ratio": flat, "all_correct": correct, "all_incorrect": flat & ~correct}
    return {name: which.sum().item() / max(len(which), 1) for name, which in shares.items()}


def vanish_probability(p: float | Tensor, group_size: int) -> float | Tensor:
    r"""Compute the chance $p^G + (1 - p)^G$ that a group vanishes whose completions are correct with probability p."""
    return p**group_size + (1 - p) ** group_size
