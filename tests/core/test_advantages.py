r"""Advantages (Eq. 5, Eq. 7) and vanishing groups (figure 3): by hand, degenerate groups, finite differences."""

import math
from itertools import product

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from dvr1_lite.advantages import (group_advantages, leave_one_out_advantages, predicted_advantages, vanish_probability,
                                  vanished, vanishing_ratio)


def doubles(*rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("std", "value"), [("population", 1.0), ("sample", math.sqrt(3) / 2), ("none", 0.5)])
def test_the_conventions_of_the_std_by_hand(std, value):
    advantages = group_advantages(torch.tensor([[1, 1, 0, 0]]), eps=0.0, std=std)  # integers are accepted
    assert torch.allclose(advantages, torch.tensor([[value, value, -value, -value]]))


def test_epsilon_is_added_to_the_std_outside_the_root():
    # rewards 2, 0 and log-ratios 3, 1: std 1, so 1 / (1 + 0.25)
    assert torch.allclose(group_advantages(doubles([2, 0]), eps=0.25), doubles([0.8, -0.8]))
    assert torch.allclose(predicted_advantages(doubles([3, 1]), eps=0.25), doubles([0.8, -0.8]))


def test_each_group_is_normalised_by_itself():
    both = group_advantages(doubles([1, 0, 0], [10, 0, 0]), eps=0.0)
    assert torch.allclose(both[0], both[1])
    assert torch.allclose(both.mean(-1), doubles(0, 0)) and torch.allclose(both.square().mean(-1), doubles(1, 1))


def test_leave_one_out_advantages_by_hand():
    # the means of the others are 3, 2.5 and 1.5
    assert torch.allclose(leave_one_out_advantages(doubles([1, 2, 4])), doubles([1 - 3, 2 - 2.5, 4 - 1.5]))
    assert leave_one_out_advantages(doubles([5])).tolist() == [[0.0]]


@pytest.mark.parametrize("std", ["population", "sample", "none"])
def test_a_group_of_one_and_a_group_of_equal_rewards_give_exactly_zero(std):
    assert group_advantages(torch.tensor([[2.0]]), std=std).tolist() == [[0.0]]
    for value, dtype, eps in product((0.1, 1e6 * 0.7, 1e-6), (torch.float32, torch.float64), (0.0, 1e-4)):
        assert group_advantages(torch.full((1, 7), value, dtype=dtype), eps, std).tolist() == [[0.0] * 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_large_and_tiny_rewards_keep_their_advantages(dtype):
    for scale in (3e4 if dtype == torch.float16 else 1e6, 1.0, 1e-3):
        advantages = group_advantages((torch.tensor([[1.0, 0.5, 0.25, 0.0]]) * scale).to(dtype), eps=0.0)
        assert advantages.dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert torch.allclose(advantages.double(), group_advantages(doubles([1, 0.5, 0.25, 0]), eps=0.0), atol=1e-2)
    assert group_advantages(torch.tensor([[1e6 + 1, 1e6, 1e6, 1e6 + 1]])).sign().tolist() == [[1, -1, -1, 1]]


def test_without_epsilon_neither_scale_nor_shift_of_rho_matters():
    rho = doubles([0.3, -0.2, 0.5, 0.1])
    assert torch.allclose(predicted_advantages(rho, 0.0), predicted_advantages(7 * rho - 3, 0.0))


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
def test_the_gradient_at_the_start_is_finite_where_the_plain_formula_gives_nan(eps):
    rho = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    predicted = predicted_advantages(rho, eps)
    (gradient,) = torch.autograd.grad(predicted[0, 0], rho)
    expected = doubles([0.75, -0.25, -0.25, -0.25]) / (eps or 1.0)  # (identity - 1/G) / eps
    assert predicted.tolist() == [[0.0] * 4] and torch.allclose(gradient, expected)
    centred = rho - rho.mean()
    plain = centred / (centred.square().mean().sqrt() + 0.1)
    assert torch.autograd.grad(plain.sum(), rho)[0].isnan().all()


def test_the_gradient_goes_through_mean_and_std():
    rho = doubles([0.3, -0.2, 0.5, 0.1]).requires_grad_()
    assert torch.autograd.gradcheck(lambda rho: predicted_advantages(rho, 0.1), rho)


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8), st.sampled_from([1e-4, 0.1]))
def test_any_group_has_finite_centred_and_bounded_advantages(values, eps):
    group = torch.tensor([values], dtype=torch.float64, requires_grad=True)
    advantages = predicted_advantages(group, eps)
    assert advantages.isfinite().all() and abs(advantages.sum().item()) < 1e-6
    assert advantages.square().mean() <= 1 + 1e-9
    assert torch.autograd.grad(advantages[0, 0], group)[0].isfinite().all()


# --- vanishing -------------------------------------------------------------------------------------------------------

def test_vanished_groups_are_those_without_spread():
    rewards = torch.tensor([[2.0, 2.0], [1.0, 1.0], [2.0, 1.0], [1.0, 1.0 + 5e-7]])
    assert vanished(rewards).tolist() == [True, True, False, True]
    assert vanished(rewards, tolerance=0.0).tolist() == [True, True, False, False]


def test_the_vanishing_ratio_is_split_into_correct_and_incorrect_groups():
    rewards = torch.tensor([[2.0, 2.0], [1.0, 1.0], [2.0, 1.0], [0.0, 0.0]])
    expected = {"ratio": 0.75, "all_correct": 0.25, "all_incorrect": 0.5}
    assert vanishing_ratio(rewards, 2.0) == vanishing_ratio(rewards, torch.tensor([3.0, 1.0, 3.0, 3.0])) == expected
    assert vanishing_ratio(torch.zeros(0, 4), 2.0) == {"ratio": 0.0, "all_correct": 0.0, "all_incorrect": 0.0}


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("group_size", [1, 2, 5])
def test_the_chance_to_vanish_equals_counting_every_outcome(p, group_size):
    outcomes = (outcome for outcome in product([0, 1], repeat=group_size) if len(set(outcome)) == 1)
    counted = sum(math.prod(p if correct else 1 - p for correct in outcome) for outcome in outcomes)
    assert vanish_probability(p, group_size) == pytest.approx(counted)
