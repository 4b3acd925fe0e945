"""The reward history and difficulty (Eq. 9)."""

import json
import math

import pytest

from dvr1_lite.difficulty import RewardHistory
from dvr1_lite.errors import ConfigError, NumericsError


def filled(rewards, **settings):
    history = RewardHistory(**settings)
    for reward in rewards:
        history.push(reward)
    return history


def test_difficulty_is_the_history_mean_minus_the_groups_own():
    history = filled([0.5, 1.0, 0.75], window=4)
    assert history.difficulty(0.25) == pytest.approx(0.5)  # hard
    assert history.difficulty(1.0) == pytest.approx(-0.25)  # easy
    assert history.difficulty(0.75) == 0.0


def test_only_the_last_window_counts():
    history = filled([0.0, 0.0, 1.0, 0.5], window=2)
    assert len(history) == 2 and history.mean == 0.75


@pytest.mark.parametrize(("window", "needed"), [(100, 25), (10, 3), (4, 1), (1, 1)])
def test_nothing_is_hard_or_easy_before_a_quarter_of_the_window(window, needed):
    history = RewardHistory(window)
    for _ in range(needed):
        assert not history.ready and history.difficulty(0.0) == 0.0
        history.push(1.0)
    assert history.ready and history.difficulty(0.0) == 1.0


def test_an_absolute_reference_replaces_the_mean_and_nothing_else():
    history = filled([1.0], window=8, reference=0.4)
    assert history.difficulty(0.1) == 0.0  # not ready yet, as with the relative reference
    history.push(1.0)
    assert history.difficulty(0.1) == pytest.approx(0.3) and history.mean == 1.0


def test_asking_does_not_change_the_history():
    history = filled([0.5], window=2)
    history.difficulty(0.1)
    assert len(history) == 1 and history.mean == 0.5


def test_an_empty_history_has_no_mean():
    assert math.isnan(RewardHistory().mean)


def test_a_saved_history_comes_back_bit_for_bit_through_json():
    history = filled([1 / 3, 0.1, 2 / 7, 0.9], window=3, reference=None)
    restored = filled([0.5], window=3)
    restored.load_state_dict(json.loads(json.dumps(history.state_dict())))
    assert restored.state_dict() == history.state_dict() and restored.mean == history.mean
    for history_ in (history, restored):
        history_.push(0.2)
    assert restored.difficulty(0.123) == history.difficulty(0.123)


@pytest.mark.parametrize("state", [{}, {"window": 3}, {"window": 3, "reference": None, "rewards": ["x"]}, None])
def test_a_broken_saved_history_is_named(state):
    with pytest.raises(ConfigError, match="saved reward history"):
        RewardHistory(3).load_state_dict(state)


def test_a_history_kept_with_other_settings_is_refused():
    with pytest.raises(ConfigError, match="window 3.*has 5"):
        RewardHistory(5).load_state_dict(RewardHistory(3).state_dict())


@pytest.mark.parametrize("window", [0, -1, 2.5])
def test_impossible_windows(window):
    with pytest.raises(ConfigError, match="history window"):
        RewardHistory(window)


@pytest.mark.parametrize("reference", [-0.1, 1.5, math.nan])
def test_impossible_references(reference):
    with pytest.raises(ConfigError, match="reference"):
        RewardHistory(reference=reference)


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_stops(reward):
    with pytest.raises(NumericsError, match="mean reward"):
        RewardHistory().push(reward)
