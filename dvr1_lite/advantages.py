r"""Group advantages (Eq. 5), predicted advantages (Eq. 7) and how often they vanish (figure 3).

A *group* is the `G` completions of one prompt, the last dimension of every tensor here. Conventions that change
numbers: the std is the population's (divide by `G`) unless "sample" (divide by `G - 1`) is asked, and `eps` is added
to the std, outside the square root. The two epsilons are different things: that of the advantages is a guard
(1e-4), that of the predicted advantages sets the scale of Reg-GRPO's first gradient (`2 / eps`).
"""

import torch
from torch import Tensor

from .errors import ConfigError

STD_KINDS = ("population", "sample", "none")


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision and integers become float32; float32 and float64 stay."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def group_advantages(rewards: Tensor, eps: float = 1e-4, std: str = "population") -> Tensor:
    r"""Advantages of a group's completions, Eq. 5: $A_i = (R_i - \bar R) / (\mathrm{std}\,R + \epsilon)$.

    `rewards` is (B, G), any scale. `std` is "population" (rewards [1, 1, 0, 0] have 0.5, so advantages of +-1.000),
    "sample" (0.577, so +-0.866) or "none" (only the mean is subtracted). Returns (B, G), float32 or float64.
    A group whose rewards all agree, and a group of one, gives exact zeros. Raises `ConfigError` for another `std`.

    Differs from the paper: `eps`, which Eq. 5 lacks; the paper does not say which std it means.
    """
    if std not in STD_KINDS:
        raise ConfigError(f"advantage_std {std!r} is unknown. Use one of: {', '.join(STD_KINDS)}.")
    centred = centre(at_least_float32(rewards))
    if std == "none" or centred.shape[-1] == 1:
        return centred
    return _divide(centred, centred.std(dim=-1, keepdim=True, correction=int(std == "sample")) + eps)


def predicted_advantages(rho: Tensor, eps: float = 0.1) -> Tensor:
    r"""Predicted advantages, Eq. 7: $\hat A_i = (\rho_i - \bar\rho) / (\mathrm{std}\,\rho + \epsilon)$.

    `rho` is (B, G), the log-ratio of policy and old policy of each whole completion, in nats. Population std.
    Differentiable through the mean and the std, which is what makes Reg-GRPO a group loss. At `rho = 0`, the start
    of every batch, the value is 0 and the gradient finite, `(identity - 1/G) / eps`: the std's own gradient there is
    taken as 0 (`sqrt(mean of squares)` would give NaN).

    Differs from the paper: `eps`, without which the start is 0/0.
    """
    centred = centre(at_least_float32(rho))
    return _divide(centred, centred.std(dim=-1, keepdim=True, correction=0) + eps)


def centre(values: Tensor) -> Tensor:
    r"""$x_i - \bar x$ over the last dimension. Taking off the first value before makes equal values exactly 0,
    also at 1e6, where the rounding of a mean would be as large as a reward.
    """
    shifted = values - values[..., :1]
    return shifted - shifted.mean(dim=-1, keepdim=True)


def _divide(values: Tensor, scale: Tensor) -> Tensor:
    return values / torch.where(scale == 0, torch.ones_like(scale), scale)


def vanished(rewards: Tensor, tolerance: float = 1e-6) -> Tensor:
    r"""Which groups have no reward spread, so that every advantage is 0 (figure 3).

    `rewards` is (B, G); returns bool (B,), true where the largest and smallest reward differ by at most `tolerance`
    (absolute, in units of the reward: scale it down if your rewards are that small).
    """
    rewards = at_least_float32(rewards)
    return rewards.amax(dim=-1) - rewards.amin(dim=-1) <= tolerance


def vanishing_ratio(rewards: Tensor, maximum: float | Tensor | None = None) -> dict[str, float]:
    r"""Share of vanished groups in a batch, in [0, 1], as `{"ratio": ...}`; 0 for an empty batch.

    `rewards` is (B, G). With `maximum`, the largest possible reward (a number, or (B,) for records with different
    maxima), also `"all_right"` (every completion earned it) and `"all_wrong"` (all agree below it, for instance the
    format without the answer); the two add up to the ratio.
    """
    if rewards.shape[0] == 0:
        return {"ratio": 0.0} | ({} if maximum is None else {"all_right": 0.0, "all_wrong": 0.0})
    gone = vanished(rewards)
    shares = {"ratio": gone.float().mean().item()}
    if maximum is not None:
        right = gone & (at_least_float32(rewards).amin(dim=-1) >= maximum - 1e-6)
        shares["all_right"] = right.float().mean().item()
        shares["all_wrong"] = (gone & ~right).float().mean().item()
    return shares


def vanish_probability(p: float | Tensor, group_size: int) -> float | Tensor:
    r"""Chance that a group of independent right-or-wrong completions vanishes: $p^G + (1 - p)^G$.

    `p` is the probability of a right completion, in [0, 1]. At `G = 8` it is 0.008 for p = 0.5 and 0.43 for p = 0.1.
    """
    return p**group_size + (1 - p) ** group_size
