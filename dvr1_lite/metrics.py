r"""What a training step reports: statistics of its updates, and one line of metrics.jsonl over all processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .advantages import group_advantages, leave_one_out_advantages, vanished, vanishing_ratio
from .config import DPO_METHODS, ObjectiveConfig
from .distributed import gather
from .objectives import (METHODS, Batch, kl_penalty, log_partition, log_ratios, objective_loss, preference_margins,
                         reduce_tokens, surrogate)

if TYPE_CHECKING:
    from .training import Group


def step_metrics(sampled: Sequence[Group], trained: Sequence[Group], updates: Sequence[Mapping[str, float]],
                 counts: Mapping[str, int]) -> dict[str, float | None]:
    r"""Compute rewards, vanishing ratios (figure 3) before and after augmentation, statistics of the updates, counts.

    The objective, loss and gradient norm are means over the step's updates, other statistics are the last one's.
    """
    own = updates[-1] | {name: fmean([update[name] for update in updates])
                         for name in ("objective", "loss", "grad_norm")}
    own |= {"completion_tokens": fmean([len(tokens) for group in trained for tokens in group.tokens]),
            "unfinished": fmean([not end for group in trained for end in group.finished])}
    spread = [max(s.total for s in group.scores) - min(s.total for s in group.scores) > 1e-6 for group in trained]
    parts = gather((own, sum(spread)))
    values = {name: [part[name] for part, _ in parts] for name in own}
    for name in own.keys() & {"correlation", "margin"}:  # means over the groups with a reward spread alone
        values[name] = [part[name] for part, live in parts for _ in range(live)] or [0.0]
    before, after = ([scores for part in gather([group.scores for group in groups]) for scores in part]
                     for groups in (sampled, trained))
    scores = [score for group in before for score in group]
    ious = [score.iou for score in scores if score.iou is not None]  # of those that asked for a span
    line = {"reward": fmean(score.total for score in scores),
            "reward_normalised": fmean(score.total / score.maximum for score in scores),
            "format_rate": fmean(score.format for score in scores),
            "accuracy": fmean(score.accuracy for score in scores),
            "iou": fmean(ious) if ious else None,
            "reward_after": fmean(score.total / score.maximum for group in after for score in group)}
    for name, groups in (("vanishing", before), ("vanishing_after", after)):
        ratios = vanishing_ratio(torch.tensor([[s.total for s in group] for group in groups]),
                                 torch.tensor([group[0].maximum for group in groups]))
        line |= {name: ratios["ratio"], f"{name}_all_right": ratios["all_correct"],
                 f"{name}_all_wrong": ratios["all_incorrect"]}
    line |= {name: fmean(found) if all(map(math.isfinite, found)) else None for name, found in values.items()}
    totals = gather(dict(counts))
    return line | {name: sum(other[name] for other in totals) for name in counts}


@torch.no_grad()
def statistics(batch: Batch, config: ObjectiveConfig) -> dict[str, float]:
    r"""Return the numbers to log: objective, loss, rho_mean, rho_std, kl (with a reference), and the method's own.

    clip_fraction: share of completions whose gradient the clip removes; for grpo of a completion's tokens, then the
    mean over completions. correlation: mean corr(R, rho) over groups with a reward spread. margin: mean over groups
    with a pair. pairs: their share (DPO), pairs a group (rebel).
    """
    rho, live = log_ratios(batch, config), ~vanished(batch.rewards)
    values = {"objective": METHODS[config.method](batch, config), "loss": objective_loss(batch, config),
              "rho_mean": rho.mean(), "rho_std": rho.std(dim=-1, correction=0).mean()}
    if batch.logp_ref is not None:
        values["kl"] = kl_penalty(batch, config.kl_estimator)
    if config.method in ("grpo", "reinforce", "rloo"):
        values["clip_fraction"] = _clip_fraction(batch, config)
    elif config.method == "reg-grpo":
        correlations = (group_advantages(batch.rewards, 1e-12) * group_advantages(rho, 1e-12)).mean(dim=-1)
        values["correlation"] = correlations[live].sum() / live.sum().clamp(min=1)
    elif config.method == "rebel":
        values["pairs"] = math.comb(rho.shape[1], 2)
    elif config.method == "reward-regression":
        values["log_z"] = log_partition(batch.rewards, config.reward_lambda).mean()
    elif config.method in DPO_METHODS:
        margins, paired = preference_margins(batch, config)
        values |= {"margin": margins[paired].sum() / paired.sum().clamp(min=1), "pairs": paired.float().mean()}
    return {name: float(value) for name, value in values.items()}


def _clip_fraction(batch: Batch, config: ObjectiveConfig) -> Tensor:
    advantages = {"grpo": group_advantages(batch.rewards, config.advantage_eps, config.advantage_std),
                  "rloo": leave_one_out_advantages(batch.rewards), "reinforce": batch.rewards}[config.method]
    log_ratio, by_token = log_ratios(batch, config), config.method == "grpo" and config.ratio_level == "token"
    if by_token:
        log_ratio, advantages = batch.logp - batch.logp_old, advantages[..., None]
    clipped = surrogate(log_ratio, advantages, config.clip_eps) < surrogate(log_ratio, advantages, None)
    clipped = clipped.to(batch.logp)  # mean over completions, so that the processes' values average
    return (reduce_tokens(clipped, batch.mask, "mean") if by_token else clipped).mean()
