"""Advantages and predicted advantages (Eq. 5, 7): both conventions by hand, degenerate groups, the NaN trap."""

import math
from itertools import product

import pytest
import torch

from dvr1_lite.advantages import (
    group_advantages,
    predicted_advantages,
    vanish_probability,
    vanished,
    vanishing_ratio,
)
from dvr1_lite.errors import ConfigError


def doubles(*rows, grad=False):
    return torch.tensor(rows, dtype=torch.float64, requires_grad=grad)


# --- Eq. 5 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("std", "value"), [("population", 1.0), ("sample", math.sqrt(3) / 2), ("none", 0.5)])
def test_both_conventions_of_the_std_by_hand(std, value):
    advantages = group_advantages(doubles([1, 1, 0, 0]), eps=0.0, std=std)
    assert torch.allclose(advantages, doubles([value, value, -value, -value]))


def test_epsilon_is_added_to_the_std_outside_the_root():
    # rewards 2, 0: std 1, so the advantage is 1 / (1 + 0.25)
    assert torch.allclose(group_advantages(doubles([2, 0]), eps=0.25), doubles([0.8, -0.8]))


def test_groups_are_normalised_apart():
    both = group_advantages(doubles([1, 0, 0], [10, 0, 0]), eps=0.0)
    assert torch.allclose(both[0], both[1])
    assert torch.allclose(both.mean(-1), doubles(0.0, 0.0))
    assert torch.allclose(both.square().mean(-1), doubles(1.0, 1.0))


@pytest.mark.parametrize("std", ["population", "sample", "none"])
def test_a_group_of_one_and_an_all_equal_group_are_exactly_zero(std):
    assert group_advantages(torch.tensor([[2.0]]), std=std).tolist() == [[0.0]]
    for value in (0.1, 2.0, 1e6 * 0.7, 1e-6):
        for dtype in (torch.float32, torch.float64):
            equal = torch.full((1, 7), value, dtype=dtype)
            assert group_advantages(equal, std=std).tolist() == [[0.0] * 7]


@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("scale", [1e6, 1.0, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_large_and_tiny_rewards_stay_finite(scale, dtype, eps):
    rewards = torch.tensor([[1.0, 0.5, 0.25, 0.0]]) * min(scale, 6e4 if dtype == torch.float16 else scale)
    advantages = group_advantages(rewards.to(dtype), eps=eps)
    assert advantages.isfinite().all() and advantages.dtype == (dtype if dtype == torch.float64 else torch.float32)
    if scale >= 1:
        assert torch.allclose(advantages.double(), group_advantages(doubles([1, 0.5, 0.25, 0]), eps=0.0), atol=1e-2)


def test_a_small_spread_on_a_large_mean_keeps_its_sign():
    assert group_advantages(torch.tensor([[1e6 + 1, 1e6, 1e6, 1e6 + 1]]), eps=1e-4).sign().tolist() == [[1, -1, -1, 1]]


def test_whole_number_rewards_are_accepted():
    assert torch.allclose(group_advantages(torch.tensor([[1, 0]]), eps=0.0), torch.tensor([[1.0, -1.0]]))


def test_an_unknown_std_lists_those_that_exist():
    with pytest.raises(ConfigError, match="'bessel'.*population, sample, none"):
        group_advantages(doubles([1, 0]), std="bessel")


# --- Eq. 7 -----------------------------------------------------------------------------------------------------------


def test_predicted_advantages_by_hand():
    # rho 3, 1: mean 2, std 1
    assert torch.allclose(predicted_advantages(doubles([3, 1]), eps=0.25), doubles([0.8, -0.8]))


def test_without_epsilon_neither_scale_nor_shift_matters():
    rho = doubles([0.3, -0.2, 0.5, 0.1])
    assert torch.allclose(predicted_advantages(rho, 0.0), predicted_advantages(7 * rho - 3, 0.0))


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
def test_the_start_of_a_batch_has_a_finite_gradient(eps):
    rho = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    predicted = predicted_advantages(rho, eps)
    predicted[0, 0].backward()
    expected = doubles([0.75, -0.25, -0.25, -0.25]) / (eps or 1.0)  # (identity - 1/G) / eps
    assert predicted.tolist() == [[0.0] * 4] and torch.allclose(rho.grad, expected)


def test_the_trap_is_real():
    """The plain formula gives NaN at rho = 0; if it ever stops doing so, the care taken is needless."""
    rho = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    centred = rho - rho.mean()
    (centred / (centred.square().mean().sqrt() + 0.1)).sum().backward()
    assert rho.grad.isnan().all()


def test_the_gradient_is_that_of_the_written_out_jacobian():
    rho, eps = doubles([0.3, -0.2, 0.5, 0.1], grad=True), 0.1
    weights = doubles([1.0, -2.0, 0.5, 3.0])
    (predicted_advantages(rho, eps) * weights).sum().backward()
    centred = rho.detach() - rho.detach().mean()
    std = centred.square().mean().sqrt()
    # d Ahat_i / d rho_j = (delta_ij - 1/G) / (std + eps) - centred_i * centred_j / (G std (std + eps)^2)
    jacobian = (torch.eye(4) - 0.25) / (std + eps) - centred.T @ centred / (4 * std * (std + eps) ** 2)
    assert torch.allclose(rho.grad, weights @ jacobian)


def test_finite_differences_agree():
    assert torch.autograd.gradcheck(lambda rho: predicted_advantages(rho, 0.1), doubles([0.3, -0.2, 0.5], grad=True))


# --- vanishing (figure 3) --------------------------------------------------------------------------------------------


def test_vanished_groups_are_those_without_spread():
    rewards = torch.tensor([[2.0, 2.0], [1.0, 1.0], [2.0, 1.0], [1.0, 1.0 + 5e-7]])
    assert vanished(rewards).tolist() == [True, True, False, True]
    assert vanished(rewards, tolerance=0.0).tolist() == [True, True, False, False]
    assert vanished(torch.tensor([[3.0]])).tolist() == [True]


def test_the_ratio_is_split_into_both_ends():
    rewards = torch.tensor([[2.0, 2.0], [1.0, 1.0], [2.0, 1.0], [0.0, 0.0]])
    assert vanishing_ratio(rewards) == {"ratio": 0.75}
    assert vanishing_ratio(rewards, maximum=2.0) == {"ratio": 0.75, "all_right": 0.25, "all_wrong": 0.5}
    maxima = torch.tensor([3.0, 1.0, 3.0, 3.0])
    assert vanishing_ratio(rewards, maxima) == {"ratio": 0.75, "all_right": 0.25, "all_wrong": 0.5}
    assert vanishing_ratio(torch.zeros(0, 4), 2.0) == {"ratio": 0.0, "all_right": 0.0, "all_wrong": 0.0}


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("group_size", [1, 2, 5])
def test_the_closed_form_equals_counting_every_outcome(p, group_size):
    counted = sum(
        math.prod(p if right else 1 - p for right in outcome)
        for outcome in product([0, 1], repeat=group_size)
        if len(set(outcome)) == 1
    )
    assert vanish_probability(p, group_size) == pytest.approx(counted)


def test_the_closed_form_at_the_papers_group_size():
    assert vanish_probability(0.5, 8) == pytest.approx(2 / 256)
    assert vanish_probability(0.1, 8) == pytest.approx(0.9**8 + 1e-8)


# --- properties ------------------------------------------------------------------------------------------------------


def test_random_groups_are_finite_centred_and_bounded():
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    value = st.floats(-1e6, 1e6, width=32)

    @hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @hypothesis.given(values=st.lists(value, min_size=1, max_size=8), eps=st.sampled_from([1e-4, 0.1]))
    def check(values, eps):
        group = torch.tensor([values], dtype=torch.float64, requires_grad=True)
        for advantages in (group_advantages(group.detach(), eps), predicted_advantages(group, eps)):
            assert advantages.isfinite().all() and abs(advantages.sum().item()) < 1e-6
            assert advantages.square().mean() <= 1 + 1e-9
        (gradient,) = torch.autograd.grad(predicted_advantages(group, eps)[0, 0], group)
        assert gradient.isfinite().all()

    check()
