r"""The training objectives of table 5 and appendix D, and centred regression, all with one signature.

    loss, stats = objective(logp, logp_old, logp_ref, mask, rewards, config)

- `logp`, `logp_old`, `logp_ref`: (B, G, T), log-probs in nats of the sampled tokens of B groups of G completions,
  under the policy being trained, the policy that sampled, and the frozen reference. Only `logp` carries a gradient.
  `logp_ref` may be None where `uses_reference(config)` is false.
- `mask`: (B, G, T), 1 or true on completion tokens, the end token included. What stands elsewhere is never read, be
  it NaN. A completion may be empty (all zero): its sums and means are 0.
- `rewards`: (B, G), any scale.
- returns `loss`, a scalar **to be minimised** (whatever the papers maximise is negated), and `stats`, plain floats:
  `loss`, `objective` (the loss without the KL term), `kl` (if a reference was given), `rho_mean`, `rho_std`,
  `vanished`, `length`, and what a method adds.

Shared conventions. $\rho_i = \log\pi_\theta(y_i|x) - \log\pi_{old}(y_i|x)$ is reduced over tokens by
`logp_reduction`. Every loss is the mean over the completions (or pairs) of a group, then over *all* B groups, so a
group without a signal dilutes a batch instead of inflating the others. All but DPO add `+ beta * KL(policy || ref)`,
see `kl_penalty`. Half-precision log-probs are computed with in float32. Non-finite input raises `NumericsError`.
Except for DPO, whose pairs come from elsewhere, every loss is a function of `rho` and the KL term alone.

An objective never sees a model: the trainer takes `d loss / d logp` and chains it through the model in micro-batches
of any size, which is exact because the group statistics are in this small tensor.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .advantages import STD_KINDS, at_least_float32, centre, group_advantages, predicted_advantages, vanished
from .errors import ConfigError, NumericsError

KL_ESTIMATORS = ("k1", "k2", "k3")
REDUCTIONS = ("auto", "sum", "mean")
RATIO_LEVELS = ("token", "sequence")
MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8; beyond it the tangent replaces the exponential, so nothing overflows

Stats = dict[str, float]
Objective = Callable[..., tuple[Tensor, Stats]]


@dataclass(frozen=True)
class ObjectiveConfig:
    """Settings of every objective; each uses those that its docstring names. `validate_objective` checks them."""

    method: str = "reg-grpo"  # a key of METHODS
    beta: float = 0.1  # weight of the KL term towards the reference, >= 0 (paper: 0.1; figure 3 perhaps 1.0)
    kl_estimator: str = "k3"  # "k1", "k2" or "k3"
    logp_reduction: str = "auto"  # over tokens: "sum", "mean", or "auto": mean for grpo (Eq. 2), sum otherwise (Eq. 7)
    predicted_eps: float = 0.1  # added to the std of rho (Eq. 7), > 0, in nats; not given in the paper
    advantage_eps: float = 1e-4  # added to the std of the rewards (Eq. 5), >= 0; not given in the paper
    advantage_std: str = "population"  # "population", "sample" or "none"
    mask_vanished: bool = True  # reg-grpo: leave groups without reward spread out of the regression (paper: not said)
    clip_eps: float | None = None  # grpo, reinforce, rloo: clip ratios to 1 +- this; None (paper, C.1): unclipped
    ratio_level: str = "token"  # grpo: ratio per "token" (Eq. 2) or per "sequence"
    reward_lambda: float = 0.5  # lambda of Eq. 3 and 6, > 0, in units of reward per nat: rebel and the two regressions
    dpo_beta: float = 0.1  # DPO's own KL strength, > 0 (paper: not given)


# --- tokens, sequences, ratios ---------------------------------------------------------------------------------------


def reduction_of(config: ObjectiveConfig) -> str:
    """The token reduction in force, "sum" or "mean", with "auto" resolved."""
    if config.logp_reduction != "auto":
        return config.logp_reduction
    return "mean" if config.method == "grpo" else "sum"


def reduce_tokens(values: Tensor, mask: Tensor, reduction: str) -> Tensor:
    r"""Sum or mean of (..., T) `values` over the tokens where `mask` holds; (...,). An empty completion gives 0."""
    mask = mask.bool()
    total = torch.where(mask, values, torch.zeros_like(values)).sum(dim=-1)
    return total if reduction == "sum" else total / mask.sum(dim=-1).clamp(min=1)


def bounded_exp(x: Tensor) -> Tensor:
    r"""$e^x$, continued by its tangent above `MAX_LOG_RATIO`: finite, increasing and smooth for every finite x."""
    excess = (x - MAX_LOG_RATIO).clamp(min=0.0)
    return torch.exp(x.clamp(max=MAX_LOG_RATIO)) + math.exp(MAX_LOG_RATIO) * excess


class _Widen(torch.autograd.Function):
    """Half precision to float32; on the way back the gradient saturates at the narrow type's range, not at inf."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        ctx.narrow = values.dtype
        return values.float()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        limits = torch.finfo(ctx.narrow)
        return gradient.clamp(limits.min, limits.max).to(ctx.narrow)


# --- the KL term -----------------------------------------------------------------------------------------------------


def kl_terms(logp: Tensor, logp_ref: Tensor, mask: Tensor, estimator: str = "k3") -> Tensor:
    r"""Per-token estimates of $KL(\pi_\theta \| \pi_{ref})$ at sampled tokens; (B, G, T), 0 outside the mask.

    With $d = \log\pi_\theta - \log\pi_{ref}$ of the sampled token:

    | name | value | as a value, sampled on-policy | its gradient as a loss, in expectation |
    | --- | --- | --- | --- |
    | k1 | $d$ | unbiased, may be negative | 0: it does not hold the policy at all |
    | k2 | $d^2 / 2$ | biased, never negative | that of $KL(\pi_\theta \| \pi_{ref})$ |
    | k3 | $e^{-d} + d - 1$ | unbiased, never negative | that of $KL(\pi_{ref} \| \pi_\theta)$ |

    Per token the gradient with respect to `logp` is 1, $d$ and $1 - e^{-d}$. Beyond $d = -20$ k3 goes on along
    its tangent. Raises `ConfigError` for another name.
    """
    if estimator not in KL_ESTIMATORS:
        raise ConfigError(f"kl_estimator {estimator!r} is unknown. Use one of: {', '.join(KL_ESTIMATORS)}.")
    mask = mask.bool()
    d = at_least_float32(logp) - at_least_float32(logp_ref)
    d = torch.where(mask, d, torch.zeros_like(d))
    if estimator == "k1":
        return d
    return d.square() / 2 if estimator == "k2" else bounded_exp(-d) + d - 1


def kl_penalty(logp: Tensor, logp_ref: Tensor, mask: Tensor, estimator: str = "k3") -> Tensor:
    r"""The KL term of a batch: `kl_terms`, mean over a completion's tokens, then over all B x G completions; scalar.

    Always a token mean, whatever `logp_reduction` says. Vanished groups count here: the term asks nothing of rewards.
    Differs from the paper: Eq. 8 and 18 print `- beta KL` in a loss to be minimised, which would reward divergence;
    here it is `+ beta KL`, as in Eq. 2.
    """
    return reduce_tokens(kl_terms(logp, logp_ref, mask, estimator), mask, "mean").mean()


# --- what every objective begins and ends with -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Checked and widened inputs, zero outside the mask."""

    logp: Tensor  # (B, G, T)
    logp_old: Tensor
    logp_ref: Tensor | None
    mask: Tensor  # bool
    rewards: Tensor  # (B, G), at least float32
    rho: Tensor  # (B, G)


def check_finite(
    logp: Tensor,
    logp_old: Tensor,
    logp_ref: Tensor | None,
    mask: Tensor,
    rewards: Tensor,
    records: Sequence[str] | None = None,
) -> None:
    """Raise `NumericsError` for the first non-finite reward, or log-prob inside the mask, naming its record.

    `records` are the names of the B groups; without them the group's number is named. Every objective calls this,
    a trainer that knows the names calls it first.
    """
    named = {"log-prob": logp, "old log-prob": logp_old, "reference log-prob": logp_ref}
    outside = ~mask.bool()
    bad = {name: (~torch.isfinite(values) & ~outside).any(-1) for name, values in named.items() if values is not None}
    for name, where in {"reward": ~torch.isfinite(rewards), **bad}.items():
        if where.any():
            group, completion = where.nonzero()[0].tolist()
            record = f"record {records[group]!r}" if records else f"group {group}"
            raise NumericsError(
                f"The {name} of {record}, completion {completion}, is not finite. Lower the learning rate, use float32 "
                "or bfloat16 instead of float16, or leave the record out."
            )


def _prepare(
    logp: Tensor, logp_old: Tensor, logp_ref: Tensor | None, mask: Tensor, rewards: Tensor, config: ObjectiveConfig
) -> _Batch:
    shapes = {tuple(x.shape) for x in (logp, logp_old, logp_ref, mask) if x is not None}
    if len(shapes) != 1 or logp.dim() != 3 or rewards.shape != logp.shape[:2]:
        raise ValueError(f"log-probs and mask must share one (B, G, T), rewards be (B, G): {shapes}, {rewards.shape}")
    if logp_ref is None and uses_reference(config):
        raise ValueError(f"{config.method} with beta {config.beta} needs logp_ref")
    check_finite(logp, logp_old, logp_ref, mask, rewards)
    mask = mask.bool()
    current, old, ref = (_widen(values, mask) for values in (logp, logp_old, logp_ref))
    old, ref = old.detach(), None if ref is None else ref.detach()
    rho = reduce_tokens(current - old, mask, reduction_of(config))
    return _Batch(current, old, ref, mask, at_least_float32(rewards.detach().to(logp.device)), rho)


def _widen(values: Tensor | None, mask: Tensor) -> Tensor | None:
    if values is None:
        return None
    wide = _Widen.apply(values) if values.dtype in (torch.float16, torch.bfloat16) else values
    return torch.where(mask, wide, torch.zeros_like(wide))


def _finish(
    objective: Tensor, batch: _Batch, config: ObjectiveConfig, **extra: Tensor | float
) -> tuple[Tensor, Stats]:
    """Add `+ beta * KL` (not for DPO, which holds its own) and gather the numbers to log."""
    stats: dict[str, Tensor | float] = {"objective": objective}
    loss = objective
    if batch.logp_ref is not None:
        stats["kl"] = kl_penalty(batch.logp, batch.logp_ref, batch.mask, config.kl_estimator)
        if config.beta > 0 and config.method not in _DPO:
            loss = objective + config.beta * stats["kl"]
    stats |= {
        "loss": loss,
        "rho_mean": batch.rho.mean(),
        "rho_std": batch.rho.std(dim=-1, correction=0).mean(),
        "vanished": vanished(batch.rewards).float().mean(),
        "length": batch.mask.sum(dim=-1).float().mean(),
        **extra,
    }
    return loss, {name: float(value.detach() if isinstance(value, Tensor) else value) for name, value in stats.items()}


# --- policy gradients ------------------------------------------------------------------------------------------------


def _surrogate(log_ratio: Tensor, advantages: Tensor, clip_eps: float | None) -> tuple[Tensor, Tensor]:
    r"""$\min(r A, \mathrm{clip}(r, 1 \pm \epsilon) A)$, to be maximised, and where the clip took the gradient."""
    ratio = bounded_exp(log_ratio)
    if clip_eps is None:
        return ratio * advantages, torch.zeros_like(ratio, dtype=torch.bool)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return torch.minimum(ratio * advantages, clipped * advantages), clipped * advantages < ratio * advantages


def grpo(
    logp: Tensor, logp_old: Tensor, logp_ref: Tensor | None, mask: Tensor, rewards: Tensor, config: ObjectiveConfig
) -> tuple[Tensor, Stats]:
    r"""Group relative policy optimisation, Eq. 2 (Shao et al. 2024, arXiv 2402.03300), negated to be minimised:

    $$-\frac1G\sum_i \frac{1}{|y_i|}\sum_t \min\big(r_{it} A_i,\ \mathrm{clip}(r_{it}, 1\pm\epsilon) A_i\big)
    + \beta\,KL$$

    `ratio_level` "token": $r_{it}$ per token as printed; `logp_reduction` "mean" (the default) divides by the length
    $|y_i|$, "sum" does not. "sequence": one ratio $e^{\rho_i}$ a completion, with "mean" the geometric mean of GSPO
    (arXiv 2507.18071), with "sum" the true ratio. `clip_eps` None means no clipping. `advantage_std`, `advantage_eps`:
    Eq. 5. The gradient at the start is $-A_i / |y_i|$ a token; *the value there is 0* whatever the rewards, because
    ratios are 1 and advantages sum to 0, so watch the reward and not the loss.

    Differs from the paper: it does not, `clip_eps` None being the setting of its baseline (appendix C.1). Ratios
    beyond $e^{20}$ follow the tangent, so that none overflows.
    """
    batch = _prepare(logp, logp_old, logp_ref, mask, rewards, config)
    advantages = group_advantages(batch.rewards, config.advantage_eps, config.advantage_std).to(batch.logp)
    if config.ratio_level == "sequence":
        surrogate, clipped = _surrogate(batch.rho, advantages, config.clip_eps)
        return _finish(-surrogate.mean(), batch, config, clip_fraction=clipped.float().mean())
    surrogate, clipped = _surrogate(batch.logp - batch.logp_old, advantages[..., None], config.clip_eps)
    per_completion = reduce_tokens(surrogate, batch.mask, reduction_of(config))
    fraction = (clipped & batch.mask).sum() / batch.mask.sum().clamp(min=1)
    return _finish(-per_completion.mean(), batch, config, clip_fraction=fraction)


def reinforce(
    logp: Tensor, logp_old: Tensor, logp_ref: Tensor | None, mask: Tensor, rewards: Tensor, config: ObjectiveConfig
) -> tuple[Tensor, Stats]:
    r"""REINFORCE without a baseline (Williams 1992): $-\frac1G\sum_i e^{\rho_i} R_i + \beta\,KL$.

    One ratio a completion; at the start it is 1 and the gradient the textbook's $-R_i \nabla\log\pi(y_i)$. The ratio
    keeps later inner updates on the same rollouts unbiased; `clip_eps` clips it as in GRPO. There is no group
    statistic, so a group of one is allowed and a vanished group still pushes: rewards that are never negative push
    every sampled completion up.

    Differs from the paper: appendix D does not say how it reuses rollouts.
    """
    batch = _prepare(logp, logp_old, logp_ref, mask, rewards, config)
    surrogate, clipped = _surrogate(batch.rho, batch.rewards.to(batch.logp), config.clip_eps)
    return _finish(-surrogate.mean(), batch, config, clip_fraction=clipped.float().mean())


def rloo(
    logp: Tensor, logp_old: Tensor, logp_ref: Tensor | None, mask: Tensor, rewards: Tensor, config: ObjectiveConfig
) -> tuple[Tensor, Stats]:
    r"""REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740):

    $$-\frac1G\sum_i e^{\rho_i}\Big(R_i - \frac1{G-1}\sum_{j\ne i}R_j\Big) + \beta\,KL$$

    The advantage equals $\frac{G}{G-1}(R_i - \bar R)$; it is not divided by a std. The baseline is independent of
    completion $i$, so the gradient stays unbiased. Ratio and `clip_eps` as in `reinforce`. A group of one gives 0.
    """
    batch = _prepare(logp, logp_old, logp_ref, mask, rewards, config)
    size = rewards.shape[-1]
    advantages = centre(batch.rewards).to(batch.logp) * (size / max(size - 1, 1))
    surrogate, clipped = _surrogate(batch.rho, advantages, config.clip_eps)
    return _finish(-surrogate.mean(), batch, config, clip_fraction=clipped.float().mean())


# --- regressions -----------------------------------------------------------------------------------------------------


def reg_grpo(
    logp: Tensor, logp_old: Tensor, logp_ref: Tensor | None, mask: Tensor, rewards: Tensor, config: ObjectiveConfig
) -> tuple[Tensor, Stats]:
    r"""Regressive GRPO, Eq. 8 and 18: regress the advantages on those the policy predicts.

    $$\frac1G\sum_i (A_i - \hat A_i)^2 + \beta\,KL, \qquad
    \hat A_i = \frac{\rho_i - \bar\rho}{\mathrm{std}\,\rho + \epsilon}$$

    `predicted_eps` is $\epsilon$, `advantage_eps` and `advantage_std` belong to $A$ (Eq. 5); $\hat A$ always takes the
    population std. `mask_vanished` sets the error of groups without reward spread to 0 (they stay in the mean).
    With both epsilons 0 the loss is $2(1 - \mathrm{corr}(R, \rho))$ for a live group: blind to scale and shift of
    $\rho$, and without gradient at G = 2. With $\epsilon$ it is $(\epsilon/(c+\epsilon))^2$ at $\rho = cA$, so no
    finite scale is best, and the gradient at the start is $2/\epsilon$ times the group-normalised policy gradient.
    Adds `correlation`, the mean over live groups of corr(R, rho) (0 where rho has no spread).

    Differs from the paper: `+ beta KL` (printed `-`), the epsilons, and the mask.
    """
    batch = _prepare(logp, logp_old, logp_ref, mask, rewards, config)
    advantages = group_advantages(batch.rewards, config.advantage_eps, config.advantage_std).to(batch.logp)
    error = (advantages - predicted_advantages(batch.rho, config.predicted_eps)).square()
    gone = vanished(batch.rewards)
    if config.mask_vanished:
        error = torch.where(gone[:, None], torch.zeros_like(error), error)
    standard = [group_advantages(values.detach(), eps=1e-12).to(batch.logp) for values in (batch.rewards, batch.rho)]
    live = (~gone).sum().clamp(min=1)
    correlation = torch.where(gone, 0.0, (standard[0] * standard[1]).mean(dim=-1)).sum() / live
    return _finish(error.mean(), batch, config, correlation=correlation)


def rebel(
    logp: Tensor, logp_old: Tensor, logp_ref: Tensor | None, mask: Tensor, rewards: Tensor, config: ObjectiveConfig
) -> tuple[Tensor, Stats]:
    r"""REBEL (Gao et al. 2024, arXiv 2404.16767): regress reward gaps on gaps of the log-ratio.

    $$\frac{2}{G(G-1)}\sum_{i<j}\big(\lambda(\rho_i - \rho_j) - (R_i - R_j)\big)^2 + \beta\,KL$$

    Over *all* $G(G-1)/2$ distinct pairs of a group, each once; `reward_lambda` is the $1/\eta$ of the REBEL paper.
    G = 2 is the published loss, one pair a prompt. In reward units, so its size grows with the rewards squared.

    Differs from the paper: appendix D does not say which pairs it forms.
    """
    batch = _prepare(logp, logp_old, logp_ref, mask, rewards, config)
    size = rewards.shape[-1]
    first, second = torch.triu_indices(size, size, offset=1, device=batch.rho.device)
    residual = config.reward_lambda * batch.rho - centre(batch.rewards).to(batch.logp)
    gaps = (residual[:, first] - residual[:, second]).square()  # (B, pairs)
    return _finish(gaps.sum() / max(gaps.numel(), 1), batch, config, pairs=gaps.shape[-1])


def reward_regression(
    logp: Tensor, logp_old: Tensor, logp_ref: Tensor | None, mask: Tensor, rewards: Tensor, config: ObjectiveConfig
) -> tuple[Tensor, Stats]:
    r"""Reward-Regression, Eq. 6 (15) with a Monte-Carlo partition function:

    $$\frac1G\sum_i\big(R_i - \lambda(\log\hat Z + \rho_i)\big)^2 + \beta\,KL,\qquad
    \log\hat Z = \log\frac1G\sum_j e^{R_j/\lambda}$$

    The mean over the group estimates $Z(x) = E_{\pi_{old}} e^{R/\lambda}$, its log is biased low (Jensen), the more
    so the smaller $\lambda$. `reward_lambda` is $\lambda$. In reward units. A vanished group has $\log\hat Z =
    R/\lambda$ and pulls every $\rho_i$ to 0.

    Differs from the paper: it does not give the estimator or $\lambda$; this is the plain one.
    """
    batch = _prepare(logp, logp_old, logp_ref, mask, rewards, config)
    scaled = batch.rewards / config.reward_lambda
    top = scaled.amax(dim=-1, keepdim=True)  # taken off first: R - lambda log Z keeps its digits at rewards of 1e6
    log_z = (scaled - top).exp().mean(dim=-1, keepdim=True).log()
    target = config.reward_lambda * ((scaled - top) - log_z)
    error = (target.to(batch.logp) - config.reward_lambda * batch.rho).square()
    return _finish(error.mean(), batch, config, log_z=(top + log_z).mean())


def centred_regression(
    logp: Tensor, logp_old: Tensor, logp_ref: Tensor | None, mask: Tensor, rewards: Tensor, config: ObjectiveConfig
) -> tuple[Tensor, Stats]:
    r"""Eq. 6 with `Z` removed by centring alone; not in the paper.

    $$\frac1G\sum_i\Big(\frac{R_i - \bar R}{\lambda} - (\rho_i - \bar\rho)\Big)^2 + \beta\,KL$$

    `reward_lambda` is $\lambda$, in reward per nat. It equals REBEL averaged over all $G^2$ ordered pairs (a
    completion with itself included) divided by $2\lambda^2$, so $\frac{G-1}{G}\,$`rebel`$\,/\,2\lambda^2$ here; GVPO
    (Zhang et al. 2025, arXiv 2504.19599) has the same gradient up to a factor. For `beta` 0, token sums and an
    expressive policy its optimum is Eq. 4's policy. It keeps $\lambda$, so the inner updates of a batch have a target
    to stop at, and its gradient at the start is finite: $-\frac{2}{\lambda G}(R_i - \bar R)$ per unit of $\rho_i$.
    A vanished group asks for equal $\rho_i$, which is what Eq. 4 asks of it, so it is not masked.
    """
    batch = _prepare(logp, logp_old, logp_ref, mask, rewards, config)
    target = centre(batch.rewards).to(batch.logp) / config.reward_lambda
    error = (target - centre(batch.rho)).square()
    return _finish(error.mean(), batch, config)


# --- preferences -----------------------------------------------------------------------------------------------------


def best_and_worst(rewards: Tensor) -> tuple[Tensor, Tensor]:
    r"""Index (B,) of the best and of the worst completion by reward; of equals the first, on every device."""
    places = torch.arange(rewards.shape[-1], device=rewards.device).expand_as(rewards)
    extremes = (rewards.amax(dim=-1, keepdim=True), rewards.amin(dim=-1, keepdim=True))
    best, worst = (torch.where(rewards == value, places, rewards.shape[-1]).amin(dim=-1) for value in extremes)
    return best, worst


def dpo(
    logp: Tensor, logp_old: Tensor, logp_ref: Tensor | None, mask: Tensor, rewards: Tensor, config: ObjectiveConfig
) -> tuple[Tensor, Stats]:
    r"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) on pairs from the group:

    $$-\log\sigma\big(\beta_{dpo}\,(s(y_w) - s(y_l))\big), \qquad s(y) = \log\pi_\theta(y|x) - \log\pi_{ref}(y|x)$$

    One pair a group: $y_w$ the completion with the highest reward, $y_l$ the one with the lowest, of equals the
    first. A vanished group has no pair and contributes 0. Rollouts of "dpo" are drawn from the *fixed reference*
    (`samples_from_reference`), those of "online-dpo" from the current policy; the loss is the same. `dpo_beta` is
    its KL strength; `beta` and `logp_old` are not used. Adds `margin` (nats) and `pairs`, the share of groups with one.

    Differs from the paper: appendix D does not say how many pairs it forms.
    """
    batch = _prepare(logp, logp_old, logp_ref, mask, rewards, config)
    preference = reduce_tokens(batch.logp - batch.logp_ref, batch.mask, reduction_of(config))  # (B, G)
    best, worst = best_and_worst(batch.rewards)
    margin = (preference.gather(-1, best[:, None]) - preference.gather(-1, worst[:, None])).squeeze(-1)
    paired = ~vanished(batch.rewards)
    loss = torch.where(paired, -F.logsigmoid(config.dpo_beta * margin), torch.zeros_like(margin))
    mean_margin = torch.where(paired, margin, 0.0).sum() / paired.sum().clamp(min=1)
    return _finish(loss.mean(), batch, config, margin=mean_margin, pairs=paired.float().mean())


# --- by name ---------------------------------------------------------------------------------------------------------

METHODS: dict[str, Objective] = {
    "grpo": grpo,
    "reg-grpo": reg_grpo,
    "reinforce": reinforce,
    "rloo": rloo,
    "rebel": rebel,
    "reward-regression": reward_regression,
    "dpo": dpo,
    "online-dpo": dpo,
    "centred-regression": centred_regression,
}
_DPO = ("dpo", "online-dpo")
_SMALLEST_GROUP = {"reinforce": 1, "reg-grpo": 3}


def get_objective(name: str) -> Objective:
    """The objective of that name; `ConfigError` listing those that exist."""
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is unknown. Use one of: {', '.join(METHODS)}.")
    return METHODS[name]


def samples_from_reference(name: str) -> bool:
    """Whether the rollouts must be drawn from the fixed reference instead of the current policy: DPO only."""
    get_objective(name)
    return name == "dpo"


def uses_reference(config: ObjectiveConfig) -> bool:
    """Whether `logp_ref` is needed: for the KL term when `beta` > 0, and always for DPO."""
    return config.beta > 0 or config.method in _DPO


def min_group_size(name: str) -> int:
    """Fewest completions a prompt that give the method a signal: 3 for reg-grpo, 1 for reinforce, else 2."""
    get_objective(name)
    return _SMALLEST_GROUP.get(name, 2)


def validate_objective(config: ObjectiveConfig, group_size: int) -> None:
    """Raise `ConfigError` for an unknown name, an impossible number, or a group too small for the method."""
    get_objective(config.method)
    choices = {
        "kl_estimator": KL_ESTIMATORS,
        "logp_reduction": REDUCTIONS,
        "advantage_std": STD_KINDS,
        "ratio_level": RATIO_LEVELS,
    }
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ConfigError(f"{name} {getattr(config, name)!r} is unknown. Use one of: {', '.join(known)}.")
    for name in ("beta", "advantage_eps", "predicted_eps", "reward_lambda", "dpo_beta", "clip_eps"):
        value = getattr(config, name)
        if name != "clip_eps" or value is not None:
            _check_number(name, value, zero_allowed=name in ("beta", "advantage_eps"))
    _check_group_size(config.method, group_size)


def _check_number(name: str, value: float, zero_allowed: bool) -> None:
    wanted = "of at least 0" if zero_allowed else "greater than 0"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name} is {value!r}. Give a finite number {wanted}.")
    if value < 0 or (value == 0 and not zero_allowed):
        raise ConfigError(f"{name} is {value!r}. Give a number {wanted}.")


def _check_group_size(method: str, group_size: int) -> None:
    smallest = min_group_size(method)
    if group_size >= smallest:
        return
    reason = {
        "reg-grpo": "two normalised values are always +1 and -1, whatever the policy does, and one is always 0",
        "reinforce": "there is nothing to learn from",
    }.get(method, "a single completion has nothing to be compared with")
    raise ConfigError(
        f"group_size is {group_size}, but {method} needs at least {smallest}: {reason}. Raise group_size."
    )
