r"""The training objectives of table 5: GRPO (Eq. 2), Reg-GRPO (Eq. 8) and their rivals, one short function each.

Each is `f(batch, config) -> loss`, a scalar to be *minimised*: the mean over a group's completions (or pairs), then
over all B groups, so that a group without a signal dilutes the batch and does not inflate the others. Losses and
gradients are finite in float32 for log-probs down to -1e4 a token and rewards up to 1e6.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .advantages import centre, group_advantages, leave_one_out_advantages, predicted_advantages, vanished
from .config import DPO_METHODS, ObjectiveConfig
from .errors import NumericsError

MAX_LOG_RATIO = 20.0  # e^20 = 4.9e8; beyond it the tangent replaces the exponential, so that nothing overflows


@dataclass(frozen=True, eq=False)
class Batch:
    r"""Hold log-probs and rewards of B groups of G completions of at most T tokens.

    Log-probs of the sampled tokens, in nats, float32 or float64, under the trained policy (the only one with a
    gradient), the policy before this step's first update, and the frozen reference. mask: true on a completion's tokens
    and its end token; values elsewhere are replaced by 0, even NaN. rewards: any scale; they take the dtype of `logp`.
    """

    logp: Tensor  # (B, G, T)
    logp_old: Tensor  # (B, G, T)
    logp_ref: Tensor | None  # (B, G, T), None where neither a KL term nor DPO needs it
    mask: Tensor  # (B, G, T)
    rewards: Tensor  # (B, G)

    def __post_init__(self) -> None:
        mask = self.mask.bool()
        for name in ("logp", "logp_old") + ("logp_ref",) * (self.logp_ref is not None):
            values = getattr(self, name)
            if values.shape != mask.shape or mask.dim() != 3 or self.rewards.shape != mask.shape[:2]:
                shapes = [tuple(x.shape) for x in (values, mask, self.rewards)]
                raise ValueError(f"{name}, mask and rewards have shapes {shapes}: give (B, G, T) twice and (B, G)")
            if values.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"{name} is {values.dtype}, too coarse for ratios: take log_softmax of logits.float()")
            values = values if name == "logp" else values.detach()
            object.__setattr__(self, name, torch.where(mask, values, 0.0))
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "rewards", self.rewards.detach().to(self.logp))


# --- log-ratios and KL -----------------------------------------------------------------------------------------------

def reduce_tokens(values: Tensor, mask: Tensor, reduction: str) -> Tensor:
    r"""Sum or average (..., T) values over the tokens where the mask holds; (...,). An empty completion gives 0."""
    total = torch.where(mask.bool(), values, 0.0).sum(dim=-1)
    return total if reduction == "sum" else total / mask.sum(dim=-1).clamp(min=1)


def log_ratios(batch: Batch, config: ObjectiveConfig) -> Tensor:
    r"""Compute $\rho_i = \log\pi_\theta(y_i|x) - \log\pi_{old}(y_i|x)$ of Eq. 7, (B, G), by `config.reduction`."""
    return reduce_tokens(batch.logp - batch.logp_old, batch.mask, config.reduction)


def bounded_exp(x: Tensor) -> Tensor:
    r"""Compute $e^x$, continued by its tangent above `MAX_LOG_RATIO`: increasing and smooth, without overflow."""
    return torch.exp(x.clamp(max=MAX_LOG_RATIO)) + math.exp(MAX_LOG_RATIO) * (x - MAX_LOG_RATIO).clamp(min=0.0)


def kl_terms(logp: Tensor, logp_ref: Tensor, estimator: str = "k3") -> Tensor:
    r"""Estimate $KL(\pi_\theta \| \pi_{ref})$ at each sampled token, from $d = \log\pi_\theta - \log\pi_{ref}$ there.

    | name | value | as a value, sampled on-policy | expected gradient as a loss |
    | --- | --- | --- | --- |
    | k1 | $d$ | unbiased, may be negative | 0: it does not hold the policy |
    | k2 | $d^2 / 2$ | biased, not negative | that of $KL(\pi_\theta \| \pi_{ref})$ |
    | k3 | $e^{-d} + d - 1$ | unbiased, not negative | that of $KL(\pi_{ref} \| \pi_\theta)$ |

    Near the reference k3 has the lower variance; far from it k3 can vary far more than k1 (probabilities .98, .01, .01
    against .01, .01, .98: standard deviation 8.8 against 1.0). The gradients hold for whole sequences sampled from the
    current policy; per token, and after several updates on the same rollouts, only approximately.
    """
    d = logp - logp_ref
    if estimator == "k3":
        return bounded_exp(-d) + d - 1
    return {"k1": d, "k2": d.square() / 2}[estimator]


def kl_penalty(batch: Batch, estimator: str = "k3") -> Tensor:
    r"""Average `kl_terms` over a completion's tokens, then over all completions, vanished groups included; a scalar."""
    return reduce_tokens(kl_terms(batch.logp, batch.logp_ref, estimator), batch.mask, "mean").mean()


# --- policy gradients ------------------------------------------------------------------------------------------------

def surrogate(log_ratio: Tensor, advantages: Tensor, clip_eps: float | None) -> Tensor:
    r"""Compute $\min(r A,\ \mathrm{clip}(r, 1 \pm \epsilon_{clip}) A)$, to be maximised; r A without clipping."""
    ratio = bounded_exp(log_ratio)
    if clip_eps is None:
        return ratio * advantages
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages)


def grpo(batch: Batch, config: ObjectiveConfig) -> Tensor:
    r"""Compute GRPO's loss, Eq. 2: $-\frac1G\sum_i\frac{1}{|y_i|}\sum_t\min(r_{it}A_i,\ \mathrm{clip}(r_{it})A_i)$.

    Reduction "mean" divides by the length $|y_i|$ ("sum" does not): at the start the value is then 0 whatever the
    rewards, the gradient $-A_i / |y_i|$ a token. "mean" with one ratio for each sequence is GSPO (arXiv 2507.18071).
    """
    advantages = group_advantages(batch.rewards, config.advantage_eps, config.advantage_std)
    if config.ratio_level == "sequence":
        return -surrogate(log_ratios(batch, config), advantages, config.clip_eps).mean()
    per_token = surrogate(batch.logp - batch.logp_old, advantages[..., None], config.clip_eps)
    return -reduce_tokens(per_token, batch.mask, config.reduction).mean()


def reinforce(batch: Batch, config: ObjectiveConfig) -> Tensor:
    r"""Compute the loss of REINFORCE without a baseline (Williams 1992): $-\frac1G\sum_i e^{\rho_i} R_i$.

    Rewards that are never negative push every sampled completion up, in a vanished group too.
    """
    return -surrogate(log_ratios(batch, config), batch.rewards, config.clip_eps).mean()


def rloo(batch: Batch, config: ObjectiveConfig) -> Tensor:
    r"""Compute RLOO's loss (arXiv 2402.14740): $-\frac1G\sum_i e^{\rho_i}(R_i - \frac{1}{G-1}\sum_{j\ne i}R_j)$."""
    return -surrogate(log_ratios(batch, config), leave_one_out_advantages(batch.rewards), config.clip_eps).mean()


# --- regressions and DPO ---------------------------------------------------------------------------------------------

def reg_grpo(batch: Batch, config: ObjectiveConfig) -> Tensor:
    r"""Compute Reg-GRPO's loss, Eq. 8 and 18: $\frac1G\sum_i (A_i - \hat A_i)^2$ with $\hat A$ of Eq. 7.

    With advantage_eps 0 a live group's loss is $1 - 2cu + u^2$, $u = s / (s + \epsilon_\rho)$; c is the correlation of
    rewards and rho, s = std(rho). For c > 0 the best s is $\epsilon_\rho c / (1 - c)$, for c = 1 none is finite. With
    both epsilons 0 it is $2(1 - c)$, blind to shift and scale; G = 2 has no gradient. The gradient starts as 2/eps
    times that of GRPO with weight beta eps/2 and *summed* log-probs (eps = `predicted_eps`; Eq. 2 divides by $|y|$).
    Differs from the paper: the epsilons; with `mask_vanished` vanished groups have error 0 and stay in the mean.
    """
    advantages = group_advantages(batch.rewards, config.advantage_eps, config.advantage_std)
    error = (advantages - predicted_advantages(log_ratios(batch, config), config.predicted_eps)).square()
    if config.mask_vanished:
        error = torch.where(vanished(batch.rewards)[:, None], 0.0, error)
    return error.mean()


def rebel(batch: Batch, config: ObjectiveConfig) -> Tensor:
    r"""Compute REBEL's loss (arXiv 2404.16767): mean over all pairs i < j of $(\lambda(\rho_i-\rho_j)-(R_i-R_j))^2$."""
    residual = config.reward_lambda * log_ratios(batch, config) - centre(batch.rewards)
    first, second = torch.triu_indices(residual.shape[1], residual.shape[1], offset=1, device=residual.device)
    gaps = (residual[:, first] - residual[:, second]).square()  # (B, G (G - 1) / 2)
    return gaps.sum() / max(gaps.numel(), 1)


def log_partition(rewards: Tensor, reward_lambda: float) -> Tensor:
    r"""Estimate $\log Z(x)$ of Eq. 4 by $\log\frac1G\sum_j e^{R_j/\lambda}$; (B, 1). Biased low."""
    return torch.logsumexp(rewards / reward_lambda, dim=-1, keepdim=True) - math.log(rewards.shape[-1])


def reward_regression(batch: Batch, config: ObjectiveConfig) -> Tensor:
    r"""Compute the Reward-Regression loss, Eq. 6 and 15: $\frac1G\sum_i(R_i - \lambda(\log\hat Z + \rho_i))^2$."""
    rewards = batch.rewards - batch.rewards.amax(dim=-1, keepdim=True)  # cancels with log Z; keeps the digits at 1e6
    target = rewards - config.reward_lambda * log_partition(rewards, config.reward_lambda)
    return (target - config.reward_lambda * log_ratios(batch, config)).square().mean()


def centred_regression(batch: Batch, config: ObjectiveConfig) -> Tensor:
    r"""Compute $\frac1G\sum_i((R_i - \bar R)/\lambda - (\rho_i - \bar\rho))^2$: Eq. 6 with Z removed by centring.

    Not in the paper. Equals (G-1)/G times REBEL's loss over $2\lambda^2$; GVPO (arXiv 2504.19599) has the same gradient
    up to a factor. It keeps lambda, so several updates have a target to stop at: for beta 0, Eq. 4's policy.
    """
    return (centre(batch.rewards) / config.reward_lambda - centre(log_ratios(batch, config))).square().mean()


def preference_margins(batch: Batch, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    r"""Return $s(y_w) - s(y_l)$ with $s = \log\pi_\theta - \log\pi_{ref}$, (B,), and which groups have a pair, (B,).

    y_w has the group's highest reward, y_l the lowest, ties go to the first; a group without reward spread has no pair.
    """
    best, worst = (batch.rewards.sort(dim=-1, descending=d, stable=True).indices[:, :1] for d in (True, False))
    score = reduce_tokens(batch.logp - batch.logp_ref, batch.mask, config.reduction)
    return (score.gather(-1, best) - score.gather(-1, worst)).squeeze(-1), ~vanished(batch.rewards)


def dpo(batch: Batch, config: ObjectiveConfig) -> Tensor:
    r"""Compute DPO's loss (arXiv 2305.18290): $-\log\sigma(\beta_{dpo}(s(y_w) - s(y_l)))$, one pair for each group."""
    margins, paired = preference_margins(batch, config)
    return torch.where(paired, -F.logsigmoid(config.dpo_beta * margins), 0.0).mean()


METHODS: dict[str, Callable[[Batch, ObjectiveConfig], Tensor]] = {
    "grpo": grpo, "reg-grpo": reg_grpo, "reinforce": reinforce, "rloo": rloo, "rebel": rebel, "dpo": dpo,
    "online-dpo": dpo, "reward-regression": reward_regression, "centred-regression": centred_regression}


# --- the whole loss --------------------------------------------------------------------------------------------------

def objective_loss(batch: Batch, config: ObjectiveConfig, names: Sequence[str] | None = None) -> Tensor:
    r"""Compute the method's objective `+ beta * KL` (DPO: no KL term, its loss holds the reference); to be minimised.

    names: ids of the B records, for the error of `check_finite`. Differs from the paper: Eq. 8 and 18 print `- beta KL`
    in a loss to be minimised, which would reward divergence; the sign here is that of Eq. 2.
    """
    if batch.logp_ref is None and (config.beta > 0 or config.method in DPO_METHODS):
        raise ValueError(f"{config.method} with beta {config.beta} needs reference log-probs: give logp_ref")
    check_finite(batch, names)
    loss = METHODS[config.method](batch, config)
    if config.beta == 0 or config.method in DPO_METHODS:
        return loss
    return loss + config.beta * kl_penalty(batch, config.kl_estimator)


def check_finite(batch: Batch, names: Sequence[str] | None = None) -> None:
    r"""Raise `NumericsError` for the first reward or log-prob that is not finite, with its record and completion."""
    for field, values in (("reward", batch.rewards[..., None]), ("log-prob", batch.logp),
                          ("old log-prob", batch.logp_old), ("reference log-prob", batch.logp_ref)):
        if values is not None and not values.isfinite().all():
            group, completion, _ = (~values.isfinite()).nonzero()[0].tolist()
            record = f"record {names[group]!r}" if names else f"group {group}"
            raise NumericsError(f"the {field} of {record}, completion {completion}, is not finite: lower the learning "
                                f"rate, use dtype float32 or bfloat16, or remove the record")
