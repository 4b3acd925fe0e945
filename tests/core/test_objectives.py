r"""The objectives against hand-worked values, finite differences, published forms and exact expectations."""

import itertools
import math
from dataclasses import replace
from unittest.mock import MagicMock

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from dvr1_lite.advantages import group_advantages
from dvr1_lite.errors import ConfigError, NumericsError
from dvr1_lite.config import ObjectiveConfig, check_group_size
from dvr1_lite.metrics import statistics
from dvr1_lite.objectives import (METHODS, Batch, bounded_exp, check_finite, kl_penalty, kl_terms, objective_loss,
                                  reduce_tokens)
from dvr1_lite.settings import check_settings

EXACT = {"rtol": 1e-10, "atol": 1e-12}
WITH_KL = sorted(set(METHODS) - {"dpo", "online-dpo"})
VARIANTS = [(name, {}) for name in METHODS] + [
    ("grpo", {"clip_eps": 0.2}), ("grpo", {"ratio_level": "sequence"}), ("grpo", {"logp_reduction": "sum"}),
    ("reg-grpo", {"mask_vanished": False, "logp_reduction": "mean"})]


def config(method, **settings):
    return ObjectiveConfig(method=method, **({"beta": 0.0} | settings))


def random_batch(groups=2, size=4, length=5, step=0.1, seed=0):
    r"""Completions of different lengths, no vanished group; step: how far the policy has moved, in nats per token."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, groups, size, length, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, length + 1, (groups, size), generator=generator)
    lengths[0, 0] = length
    rewards = torch.randint(0, 9, (groups, size), generator=generator).double() / 4
    rewards[:, :2] = torch.tensor([2.0, 0.0])
    old = -noise[0].abs()
    return Batch(old + step * noise[1], old, old + 0.3 * noise[2], torch.arange(length) < lengths[..., None], rewards)


def one_token(rho, rewards):
    r"""One group of completions of one token, so that logp is rho and d loss / d logp is d loss / d rho."""
    rho, rewards = (torch.tensor([values], dtype=torch.float64) for values in (rho, rewards))
    zeros = torch.zeros_like(rho)[..., None]
    return Batch(rho[..., None], zeros, zeros, zeros + 1, rewards)


def evaluate(method, batch, **settings):
    r"""Loss and d loss / d logp."""
    logp = batch.logp.clone().requires_grad_()
    loss = objective_loss(replace(batch, logp=logp), config(method, **settings))
    loss.backward()
    return loss.detach(), logp.grad


def stats(method, batch, **settings):
    return statistics(batch, config(method, **settings))


def as_weights(per_completion, batch, per_token=False):
    r"""Spread a gradient per completion over its tokens, and divide by the number of completions."""
    share = batch.mask.double() / (batch.mask.sum(-1, keepdim=True) if per_token else 1)
    return per_completion[..., None] * share / batch.rewards.numel()


# --- tokens and ratios -----------------------------------------------------------------------------------------------

def test_tokens_are_summed_or_averaged_within_the_mask():
    values = torch.tensor([[1.0, 2.0, 99.0], [3.0, math.nan, math.nan], [math.nan] * 3])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert reduce_tokens(values, mask, "sum").tolist() == [3.0, 3.0, 0.0]
    assert reduce_tokens(values, mask, "mean").tolist() == [1.5, 3.0, 0.0]


def test_the_bounded_exponential_is_continued_by_its_tangent():
    x = torch.tensor([-1000.0, -1.0, 0.0, 5.0, 20.0], dtype=torch.float64)
    assert torch.equal(bounded_exp(x), x.exp())
    beyond = torch.tensor([20.0 + 1e-6, 25.0, 1e6], dtype=torch.float64, requires_grad=True)
    bounded_exp(beyond).sum().backward()
    assert torch.allclose(beyond.grad, torch.full_like(beyond, math.exp(20)), rtol=1e-9)
    assert bounded_exp(beyond)[1].item() == pytest.approx(math.exp(20) * 6)


def test_only_grpo_averages_log_probs_unless_told_otherwise():
    assert {name for name in METHODS if config(name).reduction == "mean"} == {"grpo"}
    assert config("grpo", logp_reduction="sum").reduction == "sum"
    batch = random_batch(length=4)
    batch = replace(batch, mask=torch.ones_like(batch.mask))
    shrunk = replace(batch, logp=batch.logp / 4, logp_old=batch.logp_old / 4, logp_ref=batch.logp_ref / 4)
    for method in METHODS:  # for equal lengths T a token mean is the sum over T
        level = {"ratio_level": "sequence"}
        mean, total = evaluate(method, batch, logp_reduction="mean", **level), evaluate(method, shrunk,
                                                                                       logp_reduction="sum", **level)
        assert torch.allclose(mean[0], total[0], **EXACT), method


# --- KL --------------------------------------------------------------------------------------------------------------

def test_the_three_estimators_by_hand():
    logp, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])  # d = 0.5, -1
    expected = {"k1": [0.5, -1.0], "k2": [0.125, 0.5], "k3": [math.exp(-0.5) - 0.5, math.e - 2]}
    for name, values in expected.items():
        assert torch.allclose(kl_terms(logp, ref, name), torch.tensor(values))


def test_the_kl_term_is_averaged_over_tokens_and_then_over_completions():
    d = torch.tensor([[[1.0, 3.0, 9.0], [4.0, 9.0, 9.0]]])
    batch = Batch(d, 0 * d, 0 * d, torch.tensor([[[1, 1, 0], [1, 0, 0]]]), torch.zeros(1, 2))
    assert kl_penalty(batch, "k1").item() == pytest.approx((2.0 + 4.0) / 2)


def test_expected_values_and_gradients_of_the_estimators():
    r"""k1 and k3 are unbiased; the gradients are 0, that of KL(policy || ref) and that of KL(ref || policy)."""
    theta = torch.tensor([0.3, -0.8, 1.1, 0.2], dtype=torch.float64, requires_grad=True)
    log_ref = torch.log_softmax(torch.tensor([0.1, 0.6, -0.4, 0.9], dtype=torch.float64), 0)
    log_policy = torch.log_softmax(theta, 0)
    reverse, forward = (log_policy.exp() * (log_policy - log_ref)).sum(), (log_ref.exp() * (log_ref - log_policy)).sum()
    probabilities = log_policy.exp().detach()
    sampled = {name: (probabilities * kl_terms(log_policy, log_ref, name)).sum() for name in ("k1", "k2", "k3")}
    assert torch.allclose(sampled["k1"], reverse, **EXACT) and torch.allclose(sampled["k3"], reverse, **EXACT)
    assert not torch.allclose(sampled["k2"], reverse, rtol=1e-3)
    for name, truth in (("k1", 0 * reverse), ("k2", reverse), ("k3", forward)):
        gradients = [torch.autograd.grad(value, theta, retain_graph=True)[0] for value in (sampled[name], truth)]
        assert torch.allclose(*gradients, **EXACT), name


def test_k3_varies_less_than_k1_near_the_reference_and_more_far_from_it():
    def deviations(policy, reference):
        policy, reference = (torch.tensor(p, dtype=torch.float64) for p in (policy, reference))
        for name in ("k1", "k3"):
            terms = kl_terms(policy.log(), reference.log(), name)
            yield ((policy * terms.square()).sum() - (policy * terms).sum() ** 2).sqrt().item()

    assert list(deviations([.98, .01, .01], [.01, .01, .98])) == pytest.approx([1.0, 8.8], abs=0.06)
    k1, k3 = deviations([.5, .3, .2], [.45, .33, .22])
    assert k3 < k1 / 5


@pytest.mark.parametrize("method", WITH_KL)
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_kl_term_is_added_so_that_a_descent_step_approaches_the_reference(method, estimator):
    batch, settings = random_batch(), {"kl_estimator": estimator}
    (without, gradient_without), (loss, gradient) = (evaluate(method, batch, beta=b, **settings) for b in (0.0, 0.7))
    penalty = kl_penalty(batch, estimator)
    assert torch.allclose(loss, without + 0.7 * penalty, **EXACT)
    values = stats(method, batch, beta=0.7, **settings)
    assert values["loss"] == pytest.approx(loss.item()) and values["kl"] == pytest.approx(penalty.item())
    assert values["objective"] == pytest.approx(without.item())
    assert kl_penalty(replace(batch, logp=batch.logp - 0.1 * (gradient - gradient_without)), estimator) < penalty


# --- policy gradients ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("settings", "per_token"), [
    ({}, True), ({"clip_eps": 0.2}, True), ({"logp_reduction": "sum"}, False), ({"ratio_level": "sequence"}, True),
    ({"ratio_level": "sequence", "logp_reduction": "sum"}, False)], ids=str)
def test_grpo_starts_with_the_gradient_of_eq_2_and_the_value_0_of_a_mean_over_tokens(settings, per_token):
    batch = random_batch(step=0.0)
    loss, gradient = evaluate("grpo", batch, **settings)
    assert abs(loss.item()) < 1e-12 or settings == {"logp_reduction": "sum"}
    assert torch.allclose(gradient, as_weights(-group_advantages(batch.rewards), batch, per_token), **EXACT)


def test_unclipped_grpo_after_an_update_by_its_formula():
    batch = random_batch(step=0.5)
    ratio, advantages = (batch.logp - batch.logp_old).exp(), group_advantages(batch.rewards)
    assert torch.allclose(evaluate("grpo", batch)[0], (-ratio * as_weights(advantages, batch, True)).sum(), **EXACT)
    for reduction in ("mean", "sum"):
        rho = reduce_tokens(batch.logp - batch.logp_old, batch.mask, reduction)
        loss, _ = evaluate("grpo", batch, ratio_level="sequence", logp_reduction=reduction)
        assert torch.allclose(loss, -(rho.exp() * advantages).mean(), **EXACT)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_clipped_grpo_by_hand(level):
    settings = {"clip_eps": 0.2, "advantage_eps": 0.0, "ratio_level": level}
    # advantages 1 and -1: ratios 1.5 and 0.5 have passed the clip in the direction that the advantage asks for
    batch = one_token([math.log(1.5), math.log(0.5)], [1.0, 0.0])
    loss, gradient = evaluate("grpo", batch, **settings)
    assert loss.item() == pytest.approx(-(1.2 - 0.8) / 2) and gradient.abs().max() == 0.0
    assert stats("grpo", batch, **settings)["clip_fraction"] == 1.0
    # with the ratios exchanged the policy moved against the advantage: min keeps the worse value and the gradient
    batch = one_token([math.log(0.5), math.log(1.5)], [1.0, 0.0])
    loss, gradient = evaluate("grpo", batch, **settings)
    assert loss.item() == pytest.approx(-(0.5 - 1.5) / 2)
    assert gradient.flatten().tolist() == pytest.approx([-0.25, 0.75])
    assert stats("grpo", batch, **settings)["clip_fraction"] == 0.0


def test_the_clip_fraction_counts_tokens_of_grpo_and_completions_of_rloo_and_reinforce():
    batch = Batch(torch.tensor([[[1.0, 0.0, 9.0], [0.0, 0.0, 1.0]]]), torch.zeros(1, 2, 3), None,
                  torch.tensor([[[1, 1, 0], [1, 1, 1]]]), torch.tensor([[1.0, 0.0]]))
    # token: the first completion's first of two (advantage above 0, ratio e). sequence: both ratios are e.
    assert stats("grpo", batch, clip_eps=0.2)["clip_fraction"] == pytest.approx((1 / 2 + 0) / 2)
    assert stats("rloo", batch, clip_eps=0.2)["clip_fraction"] == pytest.approx(1 / 2)
    assert stats("reinforce", replace(batch, rewards=batch.rewards + 1), clip_eps=0.2)["clip_fraction"] == 1.0
    assert stats("grpo", batch)["clip_fraction"] == 0.0


@pytest.mark.parametrize(("std", "advantage"), [("population", 1.0), ("sample", math.sqrt(3) / 2), ("none", 0.5)])
def test_the_std_convention_reaches_the_loss(std, advantage):
    batch = one_token([0.0] * 4, [1.0, 1.0, 0.0, 0.0])
    for method, scale in (("grpo", -1 / 4), ("reg-grpo", -2 / 0.1 / 4)):
        _, gradient = evaluate(method, batch, advantage_std=std, advantage_eps=0.0)
        assert gradient.flatten()[0].item() == pytest.approx(scale * advantage)


def test_reinforce_has_no_baseline_and_rloo_takes_the_mean_of_the_others():
    batch = one_token([0.0] * 3, [1.0, 2.0, 6.0])
    assert evaluate("reinforce", batch)[1].flatten().tolist() == pytest.approx([-1 / 3, -2 / 3, -6 / 3])
    expected = [-(1 - 4) / 3, -(2 - 3.5) / 3, -(6 - 1.5) / 3]
    for shift in (0.0, 10.0):
        shifted = replace(batch, rewards=batch.rewards + shift)
        assert evaluate("rloo", shifted)[1].flatten().tolist() == pytest.approx(expected)


def every_group(old, theta, rewards, size):
    r"""All groups of `size` one-token completions, each as often as `old` (quarters) draws it: an exact expectation."""
    copies = [outcome for outcome, p in enumerate(old.tolist()) for _ in range(round(4 * p))]
    outcomes = torch.tensor(list(itertools.product(copies, repeat=size)))
    logp, log_old = torch.log_softmax(theta, 0)[outcomes][..., None], old.log()[outcomes][..., None]
    return Batch(logp, log_old, None, torch.ones_like(log_old), rewards[outcomes])


OLD, PAYOFF = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("method", ["reinforce", "rloo"])
def test_the_policy_gradient_is_unbiased_after_updates_too(method):
    theta = torch.tensor([0.2, -0.5, 0.4], dtype=torch.float64, requires_grad=True)
    loss = objective_loss(every_group(OLD, theta, PAYOFF, 2), config(method))
    expected = -(theta.softmax(0) * PAYOFF).sum()
    gradients = [torch.autograd.grad(value, theta)[0] for value in (loss, expected)]
    assert torch.allclose(*gradients, **EXACT)


# --- Reg-GRPO --------------------------------------------------------------------------------------------------------

RHO, REWARDS = [0.3, -0.2, 0.5, 0.1], [2.0, 1.0, 1.0, 0.0]
NO_EPS = {"predicted_eps": 0.0, "advantage_eps": 0.0}


def test_reg_grpo_by_hand():
    # A = 1, -1; rho = 3, 1 gives predicted advantages of +-1 / (1 + 0.25) = +-0.8 and errors of 0.2
    batch = one_token([3.0, 1.0], [1.0, 0.0])
    assert evaluate("reg-grpo", batch, predicted_eps=0.25, advantage_eps=0.0)[0].item() == pytest.approx(0.04)
    assert stats("reg-grpo", batch)["correlation"] == pytest.approx(1.0)


def test_two_completions_have_a_gradient_in_the_correct_direction_unless_epsilon_is_zero():
    # A = -1, 1; rho = 0.3, 0.1 (std 0.1) and eps 0.1 give predicted advantages of +-0.5 and errors of +-1.5
    batch = one_token([0.3, 0.1], [0.0, 1.0])
    loss, gradient = evaluate("reg-grpo", batch, predicted_eps=0.1, advantage_eps=0.0)
    assert loss.item() == pytest.approx(2.25) and gradient.flatten().tolist() == pytest.approx([3.75, -3.75])
    assert evaluate("reg-grpo", batch, **NO_EPS)[1].abs().max() < 1e-12
    assert evaluate("reg-grpo", one_token(RHO[:3], REWARDS[:3]), **NO_EPS)[1].abs().max() > 1e-3


def test_without_epsilons_reg_grpo_is_a_correlation_blind_to_shift_and_scale():
    correlation = torch.corrcoef(torch.tensor([RHO, REWARDS], dtype=torch.float64))[0, 1].item()
    for scale, shift in ((1.0, 0.0), (3.0, 0.0), (0.01, 0.0), (1.0, -5.0), (40.0, 7.0)):
        batch = one_token([scale * r + shift for r in RHO], REWARDS)
        assert evaluate("reg-grpo", batch, **NO_EPS)[0].item() == pytest.approx(2 * (1 - correlation))
        assert stats("reg-grpo", batch)["correlation"] == pytest.approx(correlation)


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0, 10.0])
def test_with_epsilon_no_finite_scale_is_best(scale):
    advantages = group_advantages(torch.tensor([REWARDS], dtype=torch.float64), eps=0.0)
    batch = one_token((scale * advantages)[0].tolist(), REWARDS)
    loss, gradient = evaluate("reg-grpo", batch, predicted_eps=0.1, advantage_eps=0.0)
    assert loss.item() == pytest.approx((0.1 / (scale + 0.1)) ** 2)
    assert (gradient.flatten() @ advantages.flatten()).item() < 0  # descent raises the scale further


@pytest.mark.parametrize("eps", [0.1, 0.01])
def test_reg_grpo_starts_as_sequence_summed_grpo_times_two_over_epsilon(eps):
    batch, summed = random_batch(step=0.0), {"logp_reduction": "sum"}
    for beta in (0.0, 0.1):
        _, gradient = evaluate("reg-grpo", batch, predicted_eps=eps, beta=beta)
        _, policy_gradient = evaluate("grpo", batch, beta=beta * eps / 2, **summed)
        assert torch.allclose(gradient, 2 / eps * policy_gradient, **EXACT) and gradient.abs().max() > 0.1


@pytest.mark.parametrize("spread", [1e-3, 0.05, 0.1, 1.0])
def test_a_vanished_group_is_masked_or_pulled_together(spread):
    rho = spread * group_advantages(torch.tensor([RHO], dtype=torch.float64), eps=0.0)
    batch = one_token(rho[0].tolist(), [1.0] * 4)
    loss, gradient = evaluate("reg-grpo", batch, predicted_eps=0.1, mask_vanished=False)
    assert loss.item() == pytest.approx((spread / (spread + 0.1)) ** 2)
    assert gradient.norm().item() == pytest.approx(2 * spread * 0.1 / (spread + 0.1) ** 3 / math.sqrt(4))
    assert torch.allclose(gradient.flatten() / gradient.norm(), rho.flatten() / rho.norm())
    loss, gradient = evaluate("reg-grpo", batch, **NO_EPS, mask_vanished=False)  # the printed form: constant
    assert loss.item() == pytest.approx(1.0) and gradient.abs().max() < 1e-9
    loss, gradient = evaluate("reg-grpo", batch)
    assert loss.item() == 0.0 and gradient.abs().max() == 0.0 and stats("reg-grpo", batch)["correlation"] == 0.0


# --- regressions and DPO ---------------------------------------------------------------------------------------------

def test_rebel_takes_every_pair_once_and_with_two_completions_is_the_published_form():
    loss, gradient = evaluate("rebel", one_token([0.3, -0.2], [2.0, 0.5]), reward_lambda=0.5)
    residual = (0.3 + 0.2) / 2.0 - (2.0 - 0.5)  # eta = 1 / lambda = 2
    assert loss.item() == pytest.approx(residual**2)
    assert gradient.flatten().tolist() == pytest.approx([2 * residual / 2.0, -2 * residual / 2.0])
    batch = one_token(RHO, REWARDS)
    gaps = [(0.5 * (RHO[i] - RHO[j]) - (REWARDS[i] - REWARDS[j])) ** 2 for i, j in itertools.combinations(range(4), 2)]
    assert evaluate("rebel", batch, reward_lambda=0.5)[0].item() == pytest.approx(sum(gaps) / 6)
    assert stats("rebel", batch)["pairs"] == 6


def test_reward_regression_by_hand():
    batch = one_token([0.3, -0.2], [2.0, 1.0])
    log_z = math.log((math.exp(4.0) + math.exp(2.0)) / 2)
    residuals = [2.0 - 0.5 * (log_z + 0.3), 1.0 - 0.5 * (log_z - 0.2)]
    loss, gradient = evaluate("reward-regression", batch, reward_lambda=0.5)
    assert loss.item() == pytest.approx(sum(x**2 for x in residuals) / 2)
    assert gradient.flatten().tolist() == pytest.approx([-0.5 * x for x in residuals])
    assert stats("reward-regression", batch, reward_lambda=0.5)["log_z"] == pytest.approx(log_z)
    vanished = evaluate("reward-regression", one_token(RHO, [1.0] * 4), reward_lambda=0.5)[1]  # log Z = R / lambda
    assert vanished.flatten().tolist() == pytest.approx([2 * 0.25 * rho / 4 for rho in RHO])
    single = Batch(*(x.float() for x in (batch.logp, batch.logp_old, batch.logp_ref, batch.mask, batch.rewards + 1e6)))
    shifted = evaluate("reward-regression", single, reward_lambda=0.5)[1]  # float32 keeps its digits
    assert shifted.flatten().tolist() == pytest.approx(gradient.flatten().tolist(), rel=1e-5)


@pytest.mark.parametrize("lam", [0.25, 1.0, 3.0])
def test_centred_regression_is_all_pairs_rebel_over_two_lambda_squared(lam):
    batch, share = random_batch(step=0.4), 3 / 4 / (2 * lam**2)  # (G - 1) / G
    (loss, gradient), (rebel, rebel_gradient) = (
        evaluate(method, batch, reward_lambda=lam) for method in ("centred-regression", "rebel"))
    assert torch.allclose(loss, share * rebel, **EXACT) and torch.allclose(gradient, share * rebel_gradient, **EXACT)
    at_target = evaluate("centred-regression", one_token([r / lam + 7 for r in REWARDS], REWARDS), reward_lambda=lam)
    assert at_target[0].item() == pytest.approx(0.0) and at_target[1].abs().max() < 1e-9


def test_only_centred_regression_has_its_optimum_at_the_policy_of_eq_4():
    def minimum(method, size):
        theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = objective_loss(every_group(OLD, theta, PAYOFF, size), config(method, reward_lambda=0.7))
            loss.backward()
            return loss

        optimizer.step(closure)
        return theta.detach().softmax(0)

    optimum = OLD * (PAYOFF / 0.7).exp()
    optimum /= optimum.sum()
    for size in (2, 3):
        assert torch.allclose(minimum("centred-regression", size), optimum, atol=1e-6)
    assert (minimum("reward-regression", 2) - optimum).abs().max() > 0.01  # the Monte-Carlo Z of a small group


def test_dpo_by_its_published_form():
    batch = random_batch(groups=2)
    rewards = torch.tensor([[1.0, 2.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]])  # of equals the first; no pair
    batch = replace(batch, rewards=rewards)
    score = ((batch.logp - batch.logp_ref) * batch.mask).sum(-1)
    margin = score[0, 1] - score[0, 2]
    for method in ("dpo", "online-dpo"):
        loss, gradient = evaluate(method, batch, dpo_beta=0.3)
        assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.3 * margin.item())) / 2)
        pull = -0.3 * torch.sigmoid(-0.3 * margin) / 2
        expected = torch.zeros_like(gradient)
        expected[0, 1], expected[0, 2] = pull * batch.mask[0, 1], -pull * batch.mask[0, 2]
        assert torch.allclose(gradient, expected, **EXACT)
        values = stats(method, batch)
        assert values["margin"] == pytest.approx(margin.item()) and values["pairs"] == 0.5
        other = replace(batch, logp_old=batch.logp_old - 1)
        assert torch.equal(evaluate(method, other, dpo_beta=0.3, beta=5.0)[0], loss)


# --- every objective -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("method", "settings"), VARIANTS, ids=str)
def test_gradients_equal_finite_differences(method, settings):
    batch = random_batch(step=0.3)

    def loss(logp):
        return objective_loss(replace(batch, logp=logp), config(method, beta=0.2, **settings))

    assert torch.autograd.gradcheck(loss, batch.logp.clone().requires_grad_())


@pytest.mark.parametrize(("method", "settings"), VARIANTS, ids=str)
def test_a_loss_is_the_mean_over_groups_and_the_order_of_groups_and_completions_does_not_matter(method, settings):
    batch = random_batch(groups=3)
    rewards = batch.rewards + 1e-3 * torch.arange(4)  # no ties, on which DPO depends
    rewards[2] = 1.0  # a vanished group stays in the mean
    batch = replace(batch, rewards=rewards)
    loss, gradient = evaluate(method, batch, beta=0.2, **settings)
    part = lambda change: Batch(*(change(getattr(batch, name)) for name in batch.__dataclass_fields__))  # noqa: E731
    single = [evaluate(method, part(lambda x: x[i:i + 1]), beta=0.2, **settings) for i in range(3)]
    assert torch.allclose(loss, sum(value for value, _ in single) / 3, **EXACT)
    assert torch.allclose(gradient, torch.cat([value for _, value in single]) / 3, **EXACT)
    if method in ("dpo", "online-dpo"):
        batch = replace(batch, rewards=rewards[:2], **{name: getattr(batch, name)[:2] for name in (
            "logp", "logp_old", "logp_ref", "mask")})
        loss, gradient = evaluate(method, batch, beta=0.2, **settings)
    turned_loss, turned_gradient = evaluate(method, part(lambda x: x.flip(0, 1)), beta=0.2, **settings)
    assert torch.allclose(turned_loss, loss) and torch.allclose(turned_gradient.flip(0, 1), gradient)


@pytest.mark.parametrize(("method", "settings"), VARIANTS, ids=str)
def test_values_outside_the_mask_are_never_read(method, settings):
    batch = random_batch()
    padding = torch.full((2, 4, 2), math.nan, dtype=torch.float64)
    pad = lambda values: torch.cat([values.masked_fill(~batch.mask, math.inf), padding], -1)  # noqa: E731
    padded = Batch(pad(batch.logp), pad(batch.logp_old), pad(batch.logp_ref),
                   torch.cat([batch.mask, torch.zeros_like(padding, dtype=torch.bool)], -1), batch.rewards)
    loss, gradient = evaluate(method, batch, beta=0.2, **settings)
    padded_loss, padded_gradient = evaluate(method, padded, beta=0.2, **settings)
    assert torch.equal(padded_loss, loss) and torch.equal(padded_gradient[..., :-2], gradient)
    assert padded_gradient[~padded.mask].abs().max() == 0.0
    values = stats(method, padded, beta=0.2, **settings)
    assert values == stats(method, batch, beta=0.2, **settings)
    assert all(type(value) is float and math.isfinite(value) for value in values.values())


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.float32, torch.float64]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.sampled_from([1, 2, 5, 28, 1024])),
    step=st.sampled_from([0.0, 1e-6, 0.1, 10.0, 1000.0, 1e4]),  # nats a token
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e6, -1e6]),  # of the rewards
    identical=st.booleans(), filled=st.sampled_from([0.7, 1.0, 0.0]),  # completions of a group; share of tokens
    settings=st.fixed_dictionaries({
        "logp_reduction": st.sampled_from(["auto", "sum", "mean"]), "kl_estimator": st.sampled_from(["k1", "k2", "k3"]),
        "advantage_std": st.sampled_from(["population", "sample", "none"]), "mask_vanished": st.booleans(),
        "ratio_level": st.sampled_from(["token", "sequence"]), "clip_eps": st.sampled_from([None, 0.2]),
        "predicted_eps": st.sampled_from([1e-6, 0.1]), "reward_lambda": st.sampled_from([0.01, 0.5])}))
def test_every_objective_has_a_finite_loss_and_gradient(
        seed, dtype, shape, step, scale, identical, filled, settings):
    generator = torch.Generator().manual_seed(seed)
    same = (lambda x: x[:, :1].expand(shape).clone()) if identical else (lambda x: x)
    old = same(-torch.rand(shape, generator=generator) * 10).to(dtype)
    logp = same(old + step * torch.randn(shape, generator=generator)).to(dtype).clamp(min=-1e4)
    mask = same(torch.rand(shape, generator=generator) < filled)
    batch = Batch(logp, old, old - 1, mask, scale * torch.randint(0, 3, shape[:2], generator=generator))
    for method in METHODS:
        loss, gradient = evaluate(method, batch, beta=0.1, **settings)
        assert loss.isfinite() and gradient.isfinite().all() and loss.dtype == gradient.dtype == dtype, method
        assert all(map(math.isfinite, stats(method, batch, beta=0.1, **settings).values())), method


# --- input that is refused -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("field", ["logp", "logp_old", "logp_ref", "rewards"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_an_error_that_names_the_record(field, value):
    batch = random_batch()
    spoiled = getattr(batch, field).clone()
    spoiled[1, 0] = value
    batch = replace(batch, **{field: spoiled})
    for method in METHODS:
        with pytest.raises(NumericsError, match="group 1, completion 0, is not finite"):
            objective_loss(batch, config(method, beta=0.1))
    with pytest.raises(NumericsError, match="record 'q7', completion 0"):
        check_finite(batch, ["q3", "q7"])


def test_batches_of_other_shapes_or_half_precision_are_refused():
    batch = random_batch()
    for change in ({"rewards": batch.rewards[:1]}, {"logp_old": batch.logp_old[..., :1]}, {"mask": batch.mask[0]}):
        with pytest.raises(ValueError, match="shapes"):
            replace(batch, **change)
    for name in ("logp", "logp_old", "logp_ref"):
        for dtype in (torch.float16, torch.bfloat16):
            with pytest.raises(TypeError, match=f"{name} is {dtype}, too coarse"):
                replace(batch, **{name: getattr(batch, name).to(dtype)})
    with pytest.raises(ValueError, match="needs reference log-probs"):
        objective_loss(replace(batch, logp_ref=None), config("grpo", beta=0.1))
    assert "kl" not in stats("grpo", replace(batch, logp_ref=None))


def test_what_each_method_needs():
    assert set(METHODS) == set(ObjectiveConfig.__dataclass_fields__["method"].metadata["choices"])
    for name in METHODS:
        smallest = 1 if name == "reinforce" else 2
        check_group_size(name, smallest)
        with pytest.raises(ConfigError, match=f"too small for {name}: give at least {smallest}"):
            check_group_size(name, smallest - 1)


@pytest.mark.parametrize("change", [
    {"method": "ppo"}, {"beta": -0.1}, {"beta": math.nan}, {"beta": "much"}, {"predicted_eps": 0.0},
    {"advantage_eps": -1e-4}, {"clip_eps": 0.0}, {"reward_lambda": 0.0}, {"dpo_beta": math.inf}, {"kl_estimator": "k4"},
    {"logp_reduction": "max"}, {"advantage_std": "bessel"}, {"ratio_level": "word"}, {"mask_vanished": 1}], ids=str)
def test_impossible_settings_are_named(change):
    check_settings(ObjectiveConfig())
    [(name, value)] = change.items()
    with pytest.raises(ConfigError, match=f"{name} is {value!r}"):
        check_settings(ObjectiveConfig(**change))


# --- TRL -------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize(("method", "level", "clip_eps", "beta"), [
    ("grpo", "token", 0.2, 0.0), ("grpo", "token", 0.2, 0.3), ("grpo", "token", None, 0.0),
    ("grpo", "sequence", 0.2, 0.3), ("grpo", "sequence", None, 0.0), ("rloo", "sequence", 0.2, 0.0)])
def test_grpo_and_rloo_equal_trl(method, level, clip_eps, beta):
    trl = pytest.importorskip("trl")
    batch = random_batch(step=0.5)
    others = (batch.rewards.sum(1, keepdim=True) - batch.rewards) / 3
    advantages = group_advantages(batch.rewards) if method == "grpo" else batch.rewards - others
    logp, old, ref, mask = (x.flatten(0, 1) for x in (batch.logp, batch.logp_old, batch.logp_ref, batch.mask.double()))
    logp, ids = logp.clone().requires_grad_(), torch.zeros(mask.shape, dtype=torch.long)
    trainer = MagicMock()
    trainer._get_per_token_logps_and_entropies.return_value = (logp, torch.zeros_like(logp), None)
    trainer.accelerator.reduce = trainer.accelerator.gather = lambda values, **_: values
    trainer.configure_mock(
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, beta=beta,
        use_liger_kernel=False, _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1.0,
        loss_type="grpo", importance_sampling_level=level, epsilon_low=clip_eps or 1e6, epsilon_high=clip_eps or 1e6)
    trainer.args.delta, trainer.args.use_bias_correction_kl = None, False
    theirs = {"grpo": trl.GRPOTrainer, "rloo": trl.RLOOTrainer}[method]._compute_loss(trainer, None, {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids, "completion_mask": mask,
        "old_per_token_logps": old, "old_logps": (old * mask).sum(-1), "ref_per_token_logps": ref,
        "advantages": advantages.flatten()})
    theirs.backward()
    ours, gradient = evaluate(method, batch, ratio_level=level, clip_eps=clip_eps, beta=beta)
    assert torch.allclose(ours, theirs.detach(), **EXACT)
    assert torch.allclose(gradient.flatten(0, 1), logp.grad, **EXACT)
