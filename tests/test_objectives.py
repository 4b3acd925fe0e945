"""Every objective against an independent form: by hand, written-out gradients, identities, exact expectations."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from dvr1_lite.advantages import group_advantages
from dvr1_lite.errors import ConfigError, NumericsError
from dvr1_lite.objectives import (
    METHODS,
    ObjectiveConfig,
    best_and_worst,
    bounded_exp,
    check_finite,
    get_objective,
    kl_penalty,
    kl_terms,
    min_group_size,
    reduce_tokens,
    reduction_of,
    samples_from_reference,
    uses_reference,
    validate_objective,
)

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def config(method, **settings):
    return ObjectiveConfig(method=method, **({"beta": 0.0} | settings))


def evaluate(method, batch, **settings):
    """Loss, d loss / d logp and stats."""
    logp = batch.logp.detach().clone().requires_grad_()
    loss, stats = get_objective(method)(
        logp, batch.old, batch.ref, batch.mask, batch.rewards, config(method, **settings)
    )
    loss.backward()
    return loss.detach(), logp.grad, stats


def make_batch(groups=2, size=4, length=5, step=0.1, seed=0):
    """Completions of different lengths; `step` is how far the policy has moved from the old one, per token."""
    generator = torch.Generator().manual_seed(seed)
    shape = (groups, size, length)
    draw = lambda *dims: torch.randn(*dims, generator=generator, dtype=torch.float64)  # noqa: E731
    old = -draw(*shape).abs()
    lengths = torch.randint(1, length + 1, shape[:2], generator=generator)
    lengths[0, 0] = length
    mask = torch.arange(length) < lengths[..., None]
    rewards = torch.randint(0, 9, shape[:2], generator=generator).double() / 4
    rewards[:, :2] = torch.tensor([2.0, 0.0])  # no vanished group
    return SimpleNamespace(
        logp=old + step * draw(*shape), old=old, ref=old + 0.3 * draw(*shape), mask=mask, rewards=rewards
    )


def one_token(rho, rewards):
    """A group of one-token completions, so that d loss / d logp is d loss / d rho."""
    rho, rewards = (torch.tensor([values], dtype=torch.float64) for values in (rho, rewards))
    zeros = torch.zeros_like(rho)[..., None]
    return SimpleNamespace(logp=rho[..., None], old=zeros, ref=zeros, mask=zeros + 1, rewards=rewards)


def token_share(batch):
    """1 / |y| at every token of a completion."""
    return batch.mask.double() / batch.mask.sum(-1, keepdim=True)


def as_dtype(batch, dtype):
    return SimpleNamespace(**vars(batch) | {name: getattr(batch, name).to(dtype) for name in ("logp", "old", "ref")})


def rho_of(batch, reduction="sum"):
    return reduce_tokens(batch.logp - batch.old, batch.mask, reduction)


# --- tokens and ratios -----------------------------------------------------------------------------------------------


def test_tokens_are_summed_or_averaged_within_the_mask():
    values = torch.tensor([[1.0, 2.0, 99.0], [3.0, math.nan, math.nan], [math.nan] * 3])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert reduce_tokens(values, mask, "sum").tolist() == [3.0, 3.0, 0.0]
    assert reduce_tokens(values, mask, "mean").tolist() == [1.5, 3.0, 0.0]


def test_the_bounded_exponential_is_the_exponential_and_then_its_tangent():
    x = torch.tensor([-1000.0, -1.0, 0.0, 5.0, 20.0], dtype=torch.float64)
    assert torch.equal(bounded_exp(x), x.exp())
    beyond = torch.tensor([20.0 + 1e-6, 25.0, 1e6], dtype=torch.float64, requires_grad=True)
    bounded_exp(beyond).sum().backward()
    assert torch.allclose(beyond.grad, torch.full_like(beyond, math.exp(20)), rtol=1e-9)
    assert bounded_exp(beyond)[1].item() == pytest.approx(math.exp(20) * 6)


def test_auto_reduction_follows_each_methods_own_equation():
    assert {name: reduction_of(config(name)) for name in METHODS} == {
        name: "mean" if name == "grpo" else "sum" for name in METHODS
    }
    assert reduction_of(config("grpo", logp_reduction="sum")) == "sum"
    assert reduction_of(config("dpo", logp_reduction="mean")) == "mean"


# --- KL --------------------------------------------------------------------------------------------------------------


def test_the_three_estimators_by_hand():
    logp, ref = torch.tensor([[[-1.0, -2.0]]]), torch.tensor([[[-1.5, -1.0]]])  # d = 0.5, -1
    mask = torch.ones(1, 1, 2)
    expected = {"k1": [0.5, -1.0], "k2": [0.125, 0.5], "k3": [math.exp(-0.5) - 0.5, math.e - 2]}
    for name, values in expected.items():
        assert torch.allclose(kl_terms(logp, ref, mask, name), torch.tensor([[values]]))


@pytest.mark.parametrize(
    ("estimator", "derivative"),
    [("k1", lambda d: torch.ones_like(d)), ("k2", lambda d: d), ("k3", lambda d: 1 - torch.exp(-d))],
)
def test_the_gradients_of_the_estimators_per_token(estimator, derivative):
    batch = make_batch()
    logp = batch.logp.clone().requires_grad_()
    kl_penalty(logp, batch.ref, batch.mask, estimator).backward()
    weight = token_share(batch) / batch.rewards.numel()
    assert torch.allclose(logp.grad, weight * derivative(batch.logp - batch.ref), **EXACT)


def test_the_estimators_in_expectation_over_a_policy_that_can_be_enumerated():
    """k1 and k3 are unbiased; the gradients are 0, that of KL(policy || ref), and that of KL(ref || policy)."""
    theta = torch.tensor([0.3, -0.8, 1.1, 0.2], dtype=torch.float64, requires_grad=True)
    log_ref = torch.log_softmax(torch.tensor([0.1, 0.6, -0.4, 0.9], dtype=torch.float64), 0)
    log_policy = torch.log_softmax(theta, 0)
    probabilities = log_policy.exp().detach()
    reverse = (log_policy.exp() * (log_policy - log_ref)).sum()
    forward = (log_ref.exp() * (log_ref - log_policy)).sum()
    gradient = lambda value: torch.autograd.grad(value, theta, retain_graph=True)[0]  # noqa: E731
    mask = torch.ones_like(log_ref)
    expected = {
        name: (probabilities * kl_terms(log_policy, log_ref, mask, name)).sum() for name in ("k1", "k2", "k3")
    }
    assert torch.allclose(expected["k1"], reverse, **EXACT) and torch.allclose(expected["k3"], reverse, **EXACT)
    assert not torch.allclose(expected["k2"], reverse, rtol=1e-3)
    assert torch.allclose(gradient(expected["k1"]), torch.zeros(4, dtype=torch.float64), **EXACT)
    assert torch.allclose(gradient(expected["k2"]), gradient(reverse), **EXACT)
    assert torch.allclose(gradient(expected["k3"]), gradient(forward), **EXACT)


def test_the_kl_term_is_averaged_over_tokens_and_then_over_completions():
    d = torch.tensor([[[1.0, 3.0, 9.0], [4.0, 9.0, 9.0]]])
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]]])
    assert kl_penalty(d, torch.zeros_like(d), mask, "k1").item() == pytest.approx((2.0 + 4.0) / 2)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"dpo", "online-dpo"}))
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_kl_term_is_added_so_that_a_step_down_comes_nearer_to_the_reference(method, estimator):
    batch = make_batch()
    settings = {"kl_estimator": estimator}
    without, gradient_without, _ = evaluate(method, batch, **settings)
    with_, gradient_with, stats = evaluate(method, batch, beta=0.7, **settings)
    penalty = kl_penalty(batch.logp, batch.ref, batch.mask, estimator)
    assert torch.allclose(with_, without + 0.7 * penalty, **EXACT)
    assert stats["loss"] == pytest.approx(stats["objective"] + 0.7 * stats["kl"]) and stats["kl"] > 0
    pull = gradient_with - gradient_without
    assert kl_penalty(batch.logp - 0.1 * pull, batch.ref, batch.mask, estimator) < penalty


# --- GRPO ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_eps", [None, 0.2])
def test_on_policy_grpo_has_value_zero_and_gradient_minus_the_advantage_over_the_length(clip_eps):
    batch = make_batch(step=0.0)
    loss, gradient, _ = evaluate("grpo", batch, clip_eps=clip_eps)
    advantages = group_advantages(batch.rewards)
    lengths = batch.mask.sum(-1)
    expected = -(advantages / lengths)[..., None] * batch.mask / batch.rewards.numel()
    assert abs(loss.item()) < 1e-12
    assert torch.allclose(gradient, expected, **EXACT)


@pytest.mark.parametrize(
    ("settings", "divide_by_length"),
    [
        ({"logp_reduction": "sum"}, False),
        ({"ratio_level": "sequence"}, True),
        ({"ratio_level": "sequence", "logp_reduction": "sum"}, False),
    ],
)
def test_on_policy_gradients_of_the_other_forms_of_grpo(settings, divide_by_length):
    batch = make_batch(step=0.0)
    _, gradient, _ = evaluate("grpo", batch, **settings)
    weight = -group_advantages(batch.rewards) / (batch.mask.sum(-1) if divide_by_length else 1)
    assert torch.allclose(gradient, weight[..., None] * batch.mask / batch.rewards.numel(), **EXACT)


def test_unclipped_grpo_off_policy_by_its_written_out_gradient():
    batch = make_batch(step=0.5)
    loss, gradient, _ = evaluate("grpo", batch)
    ratio = (batch.logp - batch.old).exp()
    advantages = group_advantages(batch.rewards)[..., None]
    weight = token_share(batch) / batch.rewards.numel()
    assert torch.allclose(loss, -(ratio * advantages * weight).sum(), **EXACT)
    assert torch.allclose(gradient, -ratio * advantages * weight, **EXACT)


def test_sequence_level_grpo_uses_one_ratio_for_all_tokens():
    batch = make_batch(step=0.5)
    for reduction in ("mean", "sum"):
        loss, gradient, _ = evaluate("grpo", batch, ratio_level="sequence", logp_reduction=reduction)
        signal = rho_of(batch, reduction).exp() * group_advantages(batch.rewards)
        per_token = token_share(batch) if reduction == "mean" else batch.mask
        assert torch.allclose(loss, -signal.mean(), **EXACT)
        assert torch.allclose(gradient, -signal[..., None] * per_token / batch.rewards.numel(), **EXACT)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_clipped_grpo_by_hand(level):
    # advantages 1 and -1; ratios 1.5 and 0.5 are beyond the clip in the direction the advantage asks for
    batch = one_token([math.log(1.5), math.log(0.5)], [1.0, 0.0])
    loss, gradient, stats = evaluate("grpo", batch, clip_eps=0.2, advantage_eps=0.0, ratio_level=level)
    assert loss.item() == pytest.approx(-(1.2 - 0.8) / 2)
    assert gradient.abs().max() == 0.0 and stats["clip_fraction"] == 1.0
    # the other way round the policy moved against the advantage: min keeps the worse value and the gradient
    batch = one_token([math.log(0.5), math.log(1.5)], [1.0, 0.0])
    loss, gradient, stats = evaluate("grpo", batch, clip_eps=0.2, advantage_eps=0.0, ratio_level=level)
    assert loss.item() == pytest.approx(-(0.5 - 1.5) / 2)
    assert torch.allclose(gradient.flatten(), torch.tensor([-0.25, 0.75], dtype=torch.float64))
    assert stats["clip_fraction"] == 0.0


def test_both_conventions_of_the_std_reach_the_loss():
    batch = one_token([0.0] * 4, [1.0, 1.0, 0.0, 0.0])
    for std, advantage in (("population", 1.0), ("sample", math.sqrt(3) / 2), ("none", 0.5)):
        _, gradient, _ = evaluate("grpo", batch, advantage_std=std, advantage_eps=0.0)
        assert gradient.flatten()[0].item() == pytest.approx(-advantage / 4)


# --- REINFORCE and RLOO ----------------------------------------------------------------------------------------------


def test_reinforce_has_no_baseline():
    batch = make_batch(step=0.0)
    loss, gradient, _ = evaluate("reinforce", batch)
    expected = -batch.rewards[..., None] * batch.mask / batch.rewards.numel()
    assert torch.allclose(loss, -batch.rewards.mean(), **EXACT) and torch.allclose(gradient, expected, **EXACT)
    shifted = SimpleNamespace(**vars(batch) | {"rewards": batch.rewards + 1})
    assert not torch.allclose(evaluate("reinforce", shifted)[1], gradient)


def test_rloo_takes_the_mean_of_the_others_as_baseline():
    batch = make_batch(step=0.0)
    _, gradient, _ = evaluate("rloo", batch)
    size = batch.rewards.shape[1]
    others = torch.stack([(batch.rewards.sum(1) - batch.rewards[:, i]) / (size - 1) for i in range(size)], dim=1)
    expected = -(batch.rewards - others)[..., None] * batch.mask / batch.rewards.numel()
    assert torch.allclose(gradient, expected, **EXACT)
    shifted = SimpleNamespace(**vars(batch) | {"rewards": batch.rewards + 1})
    assert torch.allclose(evaluate("rloo", shifted)[1], gradient, **EXACT)


@pytest.mark.parametrize("method", ["reinforce", "rloo"])
def test_policy_gradients_estimate_the_gradient_of_the_expected_reward_off_policy_too(method):
    """Over every group that the old policy can draw, the mean gradient is that of E[R], whatever the new policy is."""
    old, rewards = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), torch.tensor([1.0, 3.0, 2.0]).double()
    theta = torch.tensor([0.2, -0.5, 0.4], dtype=torch.float64, requires_grad=True)
    batch = every_group(old, size=2)
    log_policy = torch.log_softmax(theta, 0)
    logp = log_policy[batch.outcomes][..., None]
    loss, _ = METHODS[method](logp, batch.old, None, batch.mask, rewards[batch.outcomes], config(method))
    expected = -(log_policy.exp() * rewards).sum()
    gradients = [torch.autograd.grad(value, theta, retain_graph=True)[0] for value in (loss, expected)]
    assert torch.allclose(*gradients, **EXACT)


def every_group(old, size):
    """All groups of `size` one-token completions, each as often as `old` (quarters) draws it: an exact expectation."""
    copies = [outcome for outcome, p in enumerate(old.tolist()) for _ in range(round(4 * p))]
    outcomes = torch.tensor(list(itertools.product(copies, repeat=size)))
    log_old = old.log()[outcomes][..., None]
    return SimpleNamespace(outcomes=outcomes, old=log_old, mask=torch.ones_like(log_old))


# --- Reg-GRPO and what is odd about it -------------------------------------------------------------------------------

RHO, REWARDS = [0.3, -0.2, 0.5, 0.1], [2.0, 1.0, 1.0, 0.0]
NO_EPS = {"predicted_eps": 0.0, "advantage_eps": 0.0}


def test_reg_grpo_by_hand():
    # A = +1, -1; rho = 3, 1 gives Ahat = +-1/(1 + 0.25) = +-0.8; errors 0.2 squared
    loss, _, stats = evaluate("reg-grpo", one_token([3.0, 1.0], [1.0, 0.0]), predicted_eps=0.25, advantage_eps=0.0)
    assert loss.item() == pytest.approx(0.04) and stats["correlation"] == pytest.approx(1.0)


def test_without_epsilon_reg_grpo_is_a_correlation():
    loss, _, stats = evaluate("reg-grpo", one_token(RHO, REWARDS), **NO_EPS)
    correlation = torch.corrcoef(torch.tensor([RHO, REWARDS], dtype=torch.float64))[0, 1].item()
    assert loss.item() == pytest.approx(2 * (1 - correlation)) and stats["correlation"] == pytest.approx(correlation)


def test_without_epsilon_reg_grpo_is_blind_to_scale_and_shift_of_rho():
    loss = evaluate("reg-grpo", one_token(RHO, REWARDS), **NO_EPS)[0]
    for scale, shift in ((3.0, 0.0), (0.01, 0.0), (1.0, -5.0), (40.0, 7.0)):
        moved = [scale * r + shift for r in RHO]
        assert torch.allclose(evaluate("reg-grpo", one_token(moved, REWARDS), **NO_EPS)[0], loss)


def test_without_epsilon_two_completions_give_no_gradient():
    _, gradient, _ = evaluate("reg-grpo", one_token([0.3, -0.2], [1.0, 0.0]), **NO_EPS)
    assert gradient.abs().max() < 1e-12
    assert evaluate("reg-grpo", one_token(RHO[:3], REWARDS[:3]), **NO_EPS)[1].abs().max() > 1e-3


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0, 10.0])
def test_with_epsilon_no_finite_scale_is_best(scale):
    eps = 0.1
    advantages = group_advantages(torch.tensor([REWARDS], dtype=torch.float64), eps=0.0)
    batch = one_token((scale * advantages)[0].tolist(), REWARDS)
    loss, gradient, _ = evaluate("reg-grpo", batch, predicted_eps=eps, advantage_eps=0.0)
    assert loss.item() == pytest.approx((eps / (scale + eps)) ** 2)
    assert (gradient.flatten() @ advantages.flatten()).item() < 0  # a step down raises the scale further


def test_the_start_gradient_is_two_over_epsilon_times_the_policy_gradient():
    batch = make_batch(step=0.0)
    for eps in (0.1, 1e-2):
        _, gradient, _ = evaluate("reg-grpo", batch, predicted_eps=eps)
        _, policy_gradient, _ = evaluate("grpo", batch, ratio_level="sequence", logp_reduction="sum")
        assert torch.allclose(gradient, 2 / eps * policy_gradient, **EXACT)


def test_later_it_follows_the_residual_over_the_spread():
    batch = one_token(RHO, REWARDS)
    _, gradient, stats = evaluate("reg-grpo", batch, **NO_EPS)
    advantages, predicted = (group_advantages(x, eps=0.0) for x in (batch.rewards, batch.logp[..., 0]))
    spread = batch.logp[..., 0].std(correction=0)
    expected = -2 / (4 * spread) * (advantages - stats["correlation"] * predicted)
    assert torch.allclose(gradient[..., 0], expected)


def test_reg_grpo_by_its_written_out_gradient_with_epsilon():
    batch, eps = make_batch(groups=3, step=0.4), 0.1
    _, gradient, _ = evaluate("reg-grpo", batch, predicted_eps=eps)
    rho = rho_of(batch)
    size = rho.shape[1]
    centred = rho - rho.mean(1, keepdim=True)
    std = centred.square().mean(1, keepdim=True).sqrt()
    error = group_advantages(batch.rewards) - centred / (std + eps)
    through_mean = (error - error.mean(1, keepdim=True)) / (std + eps)
    through_std = (error * centred).sum(1, keepdim=True) * centred / (size * std * (std + eps) ** 2)
    expected = -2 / rho.numel() * (through_mean - through_std)
    assert torch.allclose(gradient, expected[..., None] * batch.mask, **EXACT)


def test_the_first_gradient_is_not_a_number_trap():
    loss, gradient, _ = evaluate("reg-grpo", make_batch(step=0.0))
    assert loss.isfinite() and gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize("spread", [1e-3, 0.05, 0.1, 1.0])
def test_the_gradient_of_a_vanished_group(spread):
    """Printed form: a pull of the rho towards each other. Masked: nothing."""
    eps, size = 0.1, 4
    rho = spread * group_advantages(torch.tensor([RHO], dtype=torch.float64), eps=0.0)
    batch = one_token(rho[0].tolist(), [1.0] * size)
    loss, gradient, _ = evaluate("reg-grpo", batch, predicted_eps=eps, mask_vanished=False)
    norm = 2 * spread * eps / (spread + eps) ** 3 / math.sqrt(size)
    assert gradient.norm().item() == pytest.approx(norm)
    assert loss.item() == pytest.approx((spread / (spread + eps)) ** 2)
    assert torch.allclose(gradient.flatten() / gradient.norm(), rho.flatten() / rho.norm())  # descent: together
    masked_loss, masked_gradient, stats = evaluate("reg-grpo", batch, predicted_eps=eps)
    assert masked_loss.item() == 0.0 and masked_gradient.abs().max() == 0.0 and stats["vanished"] == 1.0


def test_without_epsilon_a_vanished_group_has_constant_loss_one():
    loss, gradient, _ = evaluate("reg-grpo", one_token(RHO, [1.0] * 4), **NO_EPS, mask_vanished=False)
    assert loss.item() == pytest.approx(1.0) and gradient.abs().max() < 1e-12


def test_a_masked_group_stays_in_the_mean_and_does_not_inflate_the_others():
    live, gone = one_token(RHO, REWARDS), one_token(RHO, [1.0] * 4)
    both = SimpleNamespace(**{k: torch.cat([v, vars(gone)[k]]) for k, v in vars(live).items()})
    loss, gradient, stats = evaluate("reg-grpo", both)
    alone, gradient_alone, _ = evaluate("reg-grpo", live)
    assert torch.allclose(loss, alone / 2, **EXACT) and torch.allclose(gradient[:1], gradient_alone / 2, **EXACT)
    assert stats["vanished"] == 0.5
    assert stats["correlation"] == pytest.approx(evaluate("reg-grpo", live)[2]["correlation"])


# --- REBEL, reward regression, centred regression --------------------------------------------------------------------


def test_rebel_with_two_completions_is_the_published_form():
    lam, (a, b), (r, s) = 0.5, (0.3, -0.2), (2.0, 0.5)
    loss, gradient, _ = evaluate("rebel", one_token([a, b], [r, s]), reward_lambda=lam)
    eta = 1 / lam
    residual = (a - b) / eta - (r - s)
    assert loss.item() == pytest.approx(residual**2)
    assert torch.allclose(gradient.flatten(), torch.tensor([2, -2]).double() * residual / eta)


def test_rebel_takes_every_distinct_pair_once():
    lam = 0.5
    loss, _, stats = evaluate("rebel", one_token(RHO, REWARDS), reward_lambda=lam)
    pairs = list(itertools.combinations(range(4), 2))
    gaps = [(lam * (RHO[i] - RHO[j]) - (REWARDS[i] - REWARDS[j])) ** 2 for i, j in pairs]
    assert loss.item() == pytest.approx(sum(gaps) / len(pairs)) and stats["pairs"] == len(pairs)


@pytest.mark.parametrize("lam", [0.25, 1.0, 3.0])
def test_centred_regression_is_all_pairs_rebel_over_two_lambda_squared(lam):
    batch = make_batch(step=0.4)
    centred, gradient, _ = evaluate("centred-regression", batch, reward_lambda=lam)
    rho, size = rho_of(batch), batch.rewards.shape[1]
    gaps = lam * (rho[:, :, None] - rho[:, None]) - (batch.rewards[:, :, None] - batch.rewards[:, None])
    assert torch.allclose(centred, gaps.square().mean() / (2 * lam**2), **EXACT)  # all G^2 ordered pairs
    rebel, rebel_gradient, _ = evaluate("rebel", batch, reward_lambda=lam)
    share = (size - 1) / size / (2 * lam**2)  # distinct pairs only
    assert torch.allclose(centred, share * rebel, **EXACT) and torch.allclose(gradient, share * rebel_gradient, **EXACT)


def test_centred_regression_by_hand_and_its_finite_start():
    # rewards 2, 0 with lambda 0.5 ask for a gap of 4; rho has 1: errors 1.5
    loss, _, _ = evaluate("centred-regression", one_token([0.5, -0.5], [2.0, 0.0]), reward_lambda=0.5)
    assert loss.item() == pytest.approx(1.5**2)
    batch = make_batch(step=0.0)
    _, gradient, _ = evaluate("centred-regression", batch, reward_lambda=0.5)
    centred = batch.rewards - batch.rewards.mean(1, keepdim=True)
    assert torch.allclose(gradient, -2 / 0.5 * centred[..., None] * batch.mask / centred.numel(), **EXACT)


def test_centred_regression_keeps_the_scale_that_reg_grpo_loses():
    target = [r / 0.5 for r in REWARDS]
    at_target, gradient, _ = evaluate("centred-regression", one_token(target, REWARDS), reward_lambda=0.5)
    assert at_target.item() == pytest.approx(0.0) and gradient.abs().max() < 1e-12
    beyond = one_token([2 * value for value in target], REWARDS)
    _, gradient, _ = evaluate("centred-regression", beyond, reward_lambda=0.5)
    assert (gradient.flatten() @ beyond.logp.flatten()).item() > 0  # descent comes back


def test_the_optimum_of_centred_regression_is_the_policy_of_equation_four():
    old, rewards, lam = torch.tensor([0.5, 0.25, 0.25]).double(), torch.tensor([0.0, 1.0, 2.0]).double(), 0.7
    optimum = old * (rewards / lam).exp()
    optimum /= optimum.sum()
    for size in (2, 3):
        assert torch.allclose(minimise("centred-regression", old, rewards, lam, size), optimum, atol=1e-6)
    # a Monte-Carlo Z in a small group is biased, and so is the policy it ends at
    biased = minimise("reward-regression", old, rewards, lam, 2)
    assert (biased - optimum).abs().max() > 0.01


def minimise(method, old, rewards, lam, size):
    """The policy over three outcomes that minimises the exact expected loss under groups from `old`."""
    batch = every_group(old, size)
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        logp = torch.log_softmax(theta, 0)[batch.outcomes][..., None]
        arguments = (logp, batch.old, None, batch.mask, rewards[batch.outcomes])
        loss, _ = METHODS[method](*arguments, config(method, reward_lambda=lam))
        loss.backward()
        return loss

    optimiser.step(closure)
    return theta.detach().softmax(0)


def test_reward_regression_by_hand():
    lam, rho, rewards = 0.5, [0.3, -0.2], [2.0, 1.0]
    loss, gradient, stats = evaluate("reward-regression", one_token(rho, rewards), reward_lambda=lam)
    log_z = math.log((math.exp(4.0) + math.exp(2.0)) / 2)
    residuals = [r - lam * (log_z + p) for r, p in zip(rewards, rho, strict=True)]
    assert loss.item() == pytest.approx(sum(x**2 for x in residuals) / 2) and stats["log_z"] == pytest.approx(log_z)
    assert gradient.flatten().tolist() == pytest.approx([-2 * lam * x / 2 for x in residuals])  # Z is a constant


def test_reward_regression_pulls_a_vanished_group_back_to_the_old_policy():
    loss, gradient, _ = evaluate("reward-regression", one_token(RHO, [1.0] * 4), reward_lambda=0.5)
    expected = 0.25 * torch.tensor(RHO).double()
    assert loss.item() == pytest.approx((expected.square() / 0.25).mean().item())
    assert torch.allclose(gradient.flatten(), 2 * expected / 4)


# --- DPO -------------------------------------------------------------------------------------------------------------


def test_dpo_pairs_the_best_with_the_worst_and_of_equals_takes_the_first():
    best, worst = best_and_worst(torch.tensor([[1.0, 2.0, 0.0, 2.0, 0.0], [3.0, 3.0, 3.0, 3.0, 3.0]]))
    assert (best.tolist(), worst.tolist()) == ([1, 0], [2, 0])


@pytest.mark.parametrize("method", ["dpo", "online-dpo"])
def test_dpo_by_its_published_form(method):
    batch, beta = make_batch(groups=1), 0.3
    loss, gradient, stats = evaluate(method, batch, dpo_beta=beta)
    score = ((batch.logp - batch.ref) * batch.mask).sum(-1)[0]
    best, worst = batch.rewards[0].argmax(), batch.rewards[0].argmin()
    margin = score[best] - score[worst]
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-beta * margin.item()))))
    pull = -beta * torch.sigmoid(-beta * margin)
    expected = torch.zeros_like(gradient)
    expected[0, best], expected[0, worst] = pull * batch.mask[0, best], -pull * batch.mask[0, worst]
    assert torch.allclose(gradient, expected, **EXACT)
    assert stats["margin"] == pytest.approx(margin.item()) and stats["pairs"] == 1.0


def test_dpo_ignores_beta_and_the_old_policy_and_skips_vanished_groups():
    batch = make_batch()
    loss, gradient, _ = evaluate("dpo", batch)
    other = SimpleNamespace(**vars(batch) | {"old": batch.old - 1})
    assert torch.equal(evaluate("dpo", other, beta=5.0)[0], loss)
    batch.rewards[1] = 1.0
    loss, gradient, stats = evaluate("dpo", batch)
    first = SimpleNamespace(**{name: value[:1] for name, value in vars(batch).items()})
    assert torch.allclose(loss, evaluate("dpo", first)[0] / 2, **EXACT)
    assert gradient[1].abs().max() == 0.0 and stats["pairs"] == 0.5


def test_only_dpo_draws_from_the_reference():
    assert [name for name in METHODS if samples_from_reference(name)] == ["dpo"]
    assert uses_reference(config("dpo")) and uses_reference(config("online-dpo"))
    assert not uses_reference(config("grpo")) and uses_reference(config("grpo", beta=0.1))


# --- every objective: exactness --------------------------------------------------------------------------------------


class TinyPolicy(torch.nn.Module):
    """A two-layer next-token model in float64, small enough to differentiate in every way."""

    def __init__(self, words=7, width=6, seed=3):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.nn.Parameter(torch.randn(*shape, generator=generator).double())  # noqa: E731
        self.embed, self.out = draw(words, width), draw(width, words)

    def forward(self, ids):
        hidden = torch.tanh(self.embed[ids[..., :-1]].cumsum(-2))  # every position sees all before it
        return torch.log_softmax(hidden @ self.out, -1).gather(-1, ids[..., 1:, None]).squeeze(-1)


def rollouts(step=0.3):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 7, (2, 4, 6), generator=generator)
    policy, old = TinyPolicy(), TinyPolicy()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += step * torch.randn(parameter.shape, generator=generator).double()
        batch = make_batch(seed=1)
        batch.old, batch.ref = old(ids), old(ids) + 0.1
    return policy, ids, batch


def parameter_gradient(policy, scalar):
    return torch.cat([g.flatten() for g in torch.autograd.grad(scalar, list(policy.parameters()))])


ALL_SETTINGS = [(name, {}) for name in METHODS] + [
    ("grpo", {"clip_eps": 0.2}),
    ("grpo", {"ratio_level": "sequence"}),
    ("reg-grpo", {"mask_vanished": False, "logp_reduction": "mean"}),
]


@pytest.mark.parametrize(("method", "settings"), ALL_SETTINGS, ids=str)
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_chaining_the_gradient_of_the_log_probs_through_micro_batches_is_exact(method, settings, micro_batch):
    policy, ids, batch = rollouts()
    settings = config(method, beta=0.2, **settings)
    arguments = (batch.old, batch.ref, batch.mask, batch.rewards, settings)
    whole = parameter_gradient(policy, METHODS[method](policy(ids), *arguments)[0])

    logp = policy(ids).detach().requires_grad_()
    METHODS[method](logp, *arguments)[0].backward()
    flat_ids, flat_gradient = ids.flatten(0, 1), logp.grad.flatten(0, 1)
    parts = [
        parameter_gradient(policy, (policy(some) * gradient).sum())
        for some, gradient in zip(flat_ids.split(micro_batch), flat_gradient.split(micro_batch), strict=True)
    ]
    assert torch.allclose(sum(parts), whole, rtol=1e-10, atol=1e-12) and whole.abs().max() > 1e-6


@pytest.mark.parametrize("step", [0.0, 0.3])
def test_a_loss_per_sample_with_detached_group_statistics_is_wrong_once_rho_is_not_zero(step):
    policy, ids, batch = rollouts(step)
    eps = 0.1
    arguments = (batch.old, None, batch.mask, batch.rewards, config("reg-grpo", predicted_eps=eps))
    exact = parameter_gradient(policy, METHODS["reg-grpo"](policy(ids), *arguments)[0])
    rho = reduce_tokens(policy(ids) - batch.old, batch.mask, "sum")
    mean, std = (value.detach() for value in (rho.mean(1, keepdim=True), rho.std(1, keepdim=True, correction=0)))
    per_sample = (group_advantages(batch.rewards) - (rho - mean) / (std + eps)).square()
    naive = parameter_gradient(policy, per_sample.mean())
    error = ((naive - exact).norm() / exact.norm()).item()
    assert error < 1e-9 if step == 0.0 else error > 0.05


@pytest.mark.parametrize(("method", "settings"), ALL_SETTINGS, ids=str)
def test_padding_is_never_read_and_order_does_not_matter(method, settings):
    batch = make_batch()
    loss, gradient, stats = evaluate(method, batch, beta=0.2, **settings)

    junk = torch.full_like(batch.logp[..., :2], math.nan)
    padded = SimpleNamespace(**vars(batch))
    for name in ("logp", "old", "ref"):
        setattr(padded, name, torch.cat([getattr(batch, name).masked_fill(~batch.mask, math.inf), junk], -1))
    padded.mask = torch.cat([batch.mask, torch.zeros_like(junk, dtype=torch.bool)], -1)
    padded_loss, padded_gradient, _ = evaluate(method, padded, beta=0.2, **settings)
    assert torch.equal(padded_loss, loss) and torch.equal(padded_gradient[..., :-2], gradient)
    assert padded_gradient[~padded.mask].abs().max() == 0.0

    turned = SimpleNamespace(**{name: value.flip(0, 1) for name, value in vars(batch).items()})
    turned.rewards = turned.rewards + 1e-9 * torch.arange(4)  # only DPO minds ties
    batch.rewards = batch.rewards + 1e-9 * torch.arange(4).flip(0)
    loss, gradient, _ = evaluate(method, batch, beta=0.2, **settings)
    turned_loss, turned_gradient, _ = evaluate(method, turned, beta=0.2, **settings)
    assert torch.allclose(turned_loss, loss) and torch.allclose(turned_gradient.flip(0, 1), gradient)
    assert all(type(value) is float for value in stats.values())


@pytest.mark.parametrize("method", METHODS)
def test_mean_log_probs_are_an_option_of_every_objective(method):
    """With completions of one length T, token means are sums over T, so the objective sees rho / T."""
    batch = make_batch(length=4)
    batch.mask = torch.ones_like(batch.mask)
    settings = {"ratio_level": "sequence"} if method == "grpo" else {}
    mean_loss = evaluate(method, batch, logp_reduction="mean", **settings)[0]
    shrunk = SimpleNamespace(**vars(batch) | {"logp": batch.logp / 4, "old": batch.old / 4, "ref": batch.ref / 4})
    assert torch.allclose(mean_loss, evaluate(method, shrunk, logp_reduction="sum", **settings)[0], **EXACT)
    assert not torch.allclose(mean_loss, evaluate(method, batch, logp_reduction="sum", **settings)[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_small_step_down_lowers_the_loss(method):
    batch = make_batch()
    loss, gradient, _ = evaluate(method, batch, beta=0.1)
    batch.logp = batch.logp - 1e-4 * gradient
    assert evaluate(method, batch, beta=0.1)[0] < loss


# --- every objective: odd input --------------------------------------------------------------------------------------


def odd(**changes):
    return SimpleNamespace(**vars(make_batch(groups=2, size=4, length=5)) | changes)


def odd_batches():
    plain = make_batch()
    empty = plain.mask.clone()
    empty[0, 0] = False
    alone = SimpleNamespace(**{name: value[:, :1] for name, value in vars(plain).items()})
    same = SimpleNamespace(**{n: v[:, :1].expand_as(v).clone() for n, v in vars(plain).items() if n != "rewards"})
    same.rewards = plain.rewards
    long = make_batch(length=1024)
    far = {"logp": plain.old - 1000.0, "ref": plain.old + 3.0}
    return {
        "plain": plain,
        "on-policy": odd(logp=plain.old, ref=plain.old),
        "one empty completion": odd(mask=empty),
        "only empty completions": odd(mask=torch.zeros_like(plain.mask)),
        "a group of one": alone,
        "identical completions": same,
        "long completions": long,
        "no reward spread": odd(rewards=torch.ones_like(plain.rewards)),
        "rewards of 1e6": odd(rewards=plain.rewards * 1e6),
        "rewards of 1e-6": odd(rewards=plain.rewards * 1e-6),
        "rewards of -1e6": odd(rewards=plain.rewards * -1e6),
        "policy far below": odd(**far),
        "policy far above": odd(logp=plain.old, old=plain.old - 1000.0, ref=plain.old - 1000.0),
        "no groups": SimpleNamespace(**{name: value[:0] for name, value in vars(plain).items()}),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("method", "settings"), ALL_SETTINGS, ids=str)
def test_odd_input_gives_a_finite_loss_and_gradient(method, settings, dtype):
    for name, batch in odd_batches().items():
        if name == "no groups":
            continue
        narrow = as_dtype(batch, dtype)
        loss, gradient, stats = evaluate(method, narrow, beta=0.1, **settings)
        assert loss.isfinite() and gradient.isfinite().all(), name
        assert all(math.isfinite(value) for value in stats.values()), (name, stats)
        assert loss.dtype == (dtype if dtype in (torch.float32, torch.float64) else torch.float32)
        assert gradient.dtype == dtype and gradient[~narrow.mask.bool()].abs().sum() == 0.0


def test_random_groups_give_a_finite_loss_and_gradient():
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @hypothesis.given(
        seed=st.integers(0, 2**31),
        shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.sampled_from([1, 2, 3, 5, 28, 1024])),
        step=st.sampled_from([0.0, 1e-6, 0.1, 10.0, 300.0]),
        scale=st.sampled_from([0.0, 1e-6, 1.0, 1e6, -1e6]),
        identical=st.booleans(),  # all completions of a group
        filled=st.sampled_from([0.7, 1.0, 0.0]),  # share of the tokens: some, up to the longest length, none
        dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
        settings=st.fixed_dictionaries(
            {
                "logp_reduction": st.sampled_from(["auto", "sum", "mean"]),
                "kl_estimator": st.sampled_from(["k1", "k2", "k3"]),
                "advantage_std": st.sampled_from(["population", "sample", "none"]),
                "ratio_level": st.sampled_from(["token", "sequence"]),
                "clip_eps": st.sampled_from([None, 0.2]),
                "mask_vanished": st.booleans(),
                "predicted_eps": st.sampled_from([1e-6, 0.1]),
                "reward_lambda": st.sampled_from([0.01, 0.5]),
            }
        ),
    )
    def check(seed, shape, step, scale, identical, filled, dtype, settings):
        generator = torch.Generator().manual_seed(seed)
        same = (lambda x: x[:, :1].expand(shape).clone()) if identical else (lambda x: x)
        old = same(-torch.rand(shape, generator=generator) * 10)
        logp = same(old + step * torch.randn(shape, generator=generator)).to(dtype)
        batch = SimpleNamespace(
            logp=logp,
            old=old.to(dtype),
            ref=(old - 1).to(dtype),
            mask=same(torch.rand(shape, generator=generator) < filled),
            rewards=scale * torch.randint(0, 3, shape[:2], generator=generator),
        )
        for method in METHODS:
            loss, gradient, _ = evaluate(method, batch, beta=0.1, **settings)
            assert loss.isfinite() and gradient.isfinite().all(), method

    check()


def test_half_precision_is_computed_with_in_float32():
    batch = make_batch(step=0.01)
    narrow = as_dtype(batch, torch.bfloat16)
    wide = as_dtype(narrow, torch.float64)
    for method in METHODS:
        expected, result = (evaluate(method, b, beta=0.1)[0].item() for b in (wide, narrow))
        assert result == pytest.approx(expected, rel=1e-4, abs=1e-6), method


@pytest.mark.parametrize("where", ["logp", "old", "ref", "rewards"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_input_that_is_not_finite_stops_and_names_the_record(where, value):
    batch = make_batch()
    spoiled = getattr(batch, where).clone()
    spoiled[1, 0] = value
    setattr(batch, where, spoiled)
    for method in METHODS:
        with pytest.raises(NumericsError, match="group 1, completion 0"):
            evaluate(method, batch, beta=0.1)
    with pytest.raises(NumericsError, match="record 'q7', completion 0"):
        check_finite(batch.logp, batch.old, batch.ref, batch.mask, batch.rewards, records=["q3", "q7"])


def test_shapes_that_do_not_fit_are_refused():
    batch = make_batch()
    batch.rewards = batch.rewards[:1]
    with pytest.raises(ValueError, match="share one"):
        evaluate("grpo", batch)
    batch = make_batch()
    batch.ref = None
    with pytest.raises(ValueError, match="needs logp_ref"):
        evaluate("grpo", batch, beta=0.1)
    assert "kl" not in evaluate("grpo", batch)[2]


# --- names and settings ----------------------------------------------------------------------------------------------


def test_an_unknown_method_lists_those_that_exist():
    for ask in (get_objective, samples_from_reference, min_group_size):
        with pytest.raises(ConfigError, match="'ppo' is unknown. Use one of: grpo, reg-grpo"):
            ask("ppo")
    with pytest.raises(ConfigError, match="centred-regression"):
        validate_objective(config("ppo"), 8)


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_of_every_method_are_possible(method):
    validate_objective(ObjectiveConfig(method=method), 8)
    validate_objective(ObjectiveConfig(method=method), min_group_size(method))


@pytest.mark.parametrize("method", METHODS)
def test_groups_too_small_for_a_method_are_refused(method):
    smallest = {"reinforce": 1, "reg-grpo": 3}.get(method, 2)
    assert min_group_size(method) == smallest
    for size in range(smallest):
        with pytest.raises(ConfigError, match=f"group_size is {size}, but {method} needs at least {smallest}"):
            validate_objective(config(method), size)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"beta": -0.1}, "beta is -0.1. Give a number of at least 0"),
        ({"beta": math.nan}, "beta is nan"),
        ({"beta": "much"}, "beta is 'much'"),
        ({"predicted_eps": -0.1}, "predicted_eps is -0.1. Give a number greater than 0"),
        ({"predicted_eps": 0.0}, "predicted_eps"),
        ({"advantage_eps": -1e-4}, "advantage_eps"),
        ({"clip_eps": -0.2}, "clip_eps"),
        ({"clip_eps": 0.0}, "clip_eps"),
        ({"reward_lambda": 0.0}, "reward_lambda"),
        ({"dpo_beta": -1.0}, "dpo_beta"),
        ({"dpo_beta": math.inf}, "dpo_beta"),
        ({"kl_estimator": "k4"}, "'k4' is unknown. Use one of: k1, k2, k3"),
        ({"logp_reduction": "max"}, "'max' is unknown. Use one of: auto, sum, mean"),
        ({"advantage_std": "bessel"}, "population, sample, none"),
        ({"ratio_level": "word"}, "token, sequence"),
    ],
)
def test_impossible_settings_are_named(setting, message):
    with pytest.raises(ConfigError, match=message):
        validate_objective(replace(ObjectiveConfig(), **setting), 8)


# --- TRL -------------------------------------------------------------------------------------------------------------


def trl_inputs(batch):
    """The batch as TRL lays it out, and a stand-in for its trainer that answers with our log-probs."""
    flat = {name: value.flatten(0, 1) for name, value in vars(batch).items() if name != "rewards"}
    ids = torch.zeros(flat["mask"].shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": flat["mask"].double(),
        "old_per_token_logps": flat["old"],
        "old_logps": (flat["old"] * flat["mask"]).sum(-1),
        "ref_per_token_logps": flat["ref"],
    }
    trainer = MagicMock()
    trainer.logp = flat["logp"].detach().clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies.return_value = (trainer.logp, torch.zeros_like(trainer.logp), None)
    trainer.accelerator.reduce = trainer.accelerator.gather = lambda values, **_: values
    trainer.configure_mock(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        use_liger_kernel=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1.0,
        loss_type="grpo",
    )
    trainer.args.delta, trainer.args.use_bias_correction_kl = None, False
    return trainer, inputs


@pytest.mark.slow
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("clip_eps", "beta"), [(0.2, 0.0), (0.2, 0.3), (1e6, 0.0)])
def test_grpo_equals_trl(level, clip_eps, beta):
    trl = pytest.importorskip("trl")
    batch = make_batch(step=0.5)
    trainer, inputs = trl_inputs(batch)
    trainer.configure_mock(importance_sampling_level=level, epsilon_low=clip_eps, epsilon_high=clip_eps, beta=beta)
    inputs["advantages"] = group_advantages(batch.rewards).flatten()
    theirs = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    theirs.backward()
    own_clip = None if clip_eps > 1 else clip_eps
    ours, gradient, _ = evaluate("grpo", batch, ratio_level=level, clip_eps=own_clip, beta=beta)
    assert torch.allclose(ours, theirs.detach(), **EXACT)
    assert torch.allclose(gradient.flatten(0, 1), trainer.logp.grad, **EXACT)


@pytest.mark.slow
def test_rloo_equals_trl():
    trl = pytest.importorskip("trl")
    batch = make_batch(step=0.5)
    trainer, inputs = trl_inputs(batch)
    trainer.configure_mock(epsilon_low=0.2, epsilon_high=0.2)
    others = (batch.rewards.sum(1, keepdim=True) - batch.rewards) / (batch.rewards.shape[1] - 1)
    inputs["advantages"] = (batch.rewards - others).flatten()
    theirs = trl.RLOOTrainer._compute_loss(trainer, None, inputs)
    theirs.backward()
    ours, gradient, _ = evaluate("rloo", batch, clip_eps=0.2)
    assert torch.allclose(ours, theirs.detach(), **EXACT)
    assert torch.allclose(gradient.flatten(0, 1), trainer.logp.grad, **EXACT)
