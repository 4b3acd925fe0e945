r"""Difficulty (Eq. 9) and augmentation (section 3.3): which prompts are changed, how much, and reproducibly."""

import json
import math

import pytest
import torch

from dvr1_lite.augmentation import (Augmentation, AugmentationConfig, RewardHistory, add_noise, augmentation_seed,
                                    best_trace, cut_hint, mask_frames, plan_augmentation)
from dvr1_lite.errors import ConfigError, NumericsError
from dvr1_lite.rewards import Score
from dvr1_lite.settings import check_settings

FRAMES = torch.rand(8, 3, 14, 14, generator=torch.Generator().manual_seed(1))


def filled(rewards, **settings):
    history = RewardHistory(**settings)
    for reward in rewards:
        history.push(reward)
    return history


def plan(difficulty, **settings):
    return plan_augmentation(difficulty, AugmentationConfig(**settings))


# --- difficulty ------------------------------------------------------------------------------------------------------

def test_difficulty_is_the_mean_of_the_last_window_minus_the_groups_own():
    history = filled([0.0, 0.0, 0.5, 1.0, 0.75], window=3)
    assert len(history) == 3 and history.mean == 0.75
    assert history.difficulty(0.25) == pytest.approx(0.5) and history.difficulty(1.0) == pytest.approx(-0.25)
    assert len(history) == 3 and math.isnan(RewardHistory().mean)


@pytest.mark.parametrize(("window", "needed"), [(100, 25), (10, 3), (4, 1), (1, 1)])
def test_nothing_is_hard_or_easy_before_a_quarter_of_the_window(window, needed):
    history = RewardHistory(window)
    for _ in range(needed):
        assert history.difficulty(0.0) == 0.0
        history.push(1.0)
    assert history.difficulty(0.0) == 1.0


def test_a_fixed_reference_needs_no_history():
    history = RewardHistory(100, 0.4)
    assert history.difficulty(0.0) == 0.4 and history.difficulty(1.0) == pytest.approx(-0.6)
    history.push(1.0)
    assert history.difficulty(0.0) == 0.4


def test_a_saved_history_is_restored_bit_for_bit_through_json():
    history = filled([1 / 3, 0.1, 2 / 7, 0.9], window=3)
    restored = filled([0.5], window=3)
    restored.load_state_dict(json.loads(json.dumps(history.state_dict())))
    for each in (history, restored):
        each.push(0.2)
    assert restored.state_dict() == history.state_dict() and restored.difficulty(0.123) == history.difficulty(0.123)


@pytest.mark.parametrize("state", [{}, {"window": 3}, {"window": 3, "reference": None, "rewards": ["x"]}, None,
                                   {"window": 5, "reference": None, "rewards": []},
                                   {"window": 3, "reference": 0.5, "rewards": []}])
def test_a_damaged_history_or_one_of_other_settings_is_refused(state):
    with pytest.raises(ConfigError, match="saved reward history"):
        RewardHistory(3).load_state_dict(state)


def test_impossible_windows_references_and_rewards_are_refused():
    for arguments in ((0,), (-1,), (2.5,), (100, -0.1), (100, 1.5), (100, math.nan)):
        with pytest.raises(ConfigError, match="reward history has window"):
            RewardHistory(*arguments)
    for reward in (math.nan, math.inf):
        with pytest.raises(NumericsError, match="mean reward"):
            RewardHistory().push(reward)


# --- the plan --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("difficulty", "share"), [(0.1 + 1e-9, 0.1), (0.55, 0.35), (1.0, 0.6), (1.7, 0.6)])
def test_the_hint_grows_linearly_with_difficulty_up_to_its_maximum(difficulty, share):
    augmentation = plan(difficulty)
    assert augmentation.kind == "hint" and augmentation.amount == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize(("difficulty", "sigma"), [(-0.2, 0.08), (-0.5, 0.2), (-1.0, 0.4)])
@pytest.mark.parametrize("kind", ["noise", "mask"])
def test_noise_and_masking_grow_as_the_prompt_gets_easier(difficulty, sigma, kind):
    augmentation = plan(difficulty, easy_kind=kind)
    assert augmentation.kind == kind and augmentation.amount == pytest.approx(sigma)
    assert plan(-1.0, easy_kind=kind, noise_scale=3.0).amount == {"mask": 1.0, "noise": 3.0}[kind]


@pytest.mark.parametrize(("augment", "hard", "easy"), [
    ("both", "hint", "noise"), ("hard", "hint", "none"), ("easy", "none", "noise"), ("none", "none", "none"),
    ("resample", "hint", "noise")])
def test_each_direction_alone_and_the_dead_zone(augment, hard, easy):
    assert (plan(0.5, augment=augment).kind, plan(-0.5, augment=augment).kind) == (hard, easy)
    for difficulty in (0.0, 0.05, -0.05, 0.1, -0.1):
        assert plan(difficulty, augment=augment) == Augmentation("none", 0.0)


def test_a_fixed_scale_has_one_amount_for_each_direction_and_the_same_dead_zone():
    for sign in (1, -1):
        fixed = {plan(sign * difficulty, augment_scale="fixed") for difficulty in (0.11, 0.5, 1.0)}
        assert fixed == {plan(sign * 0.5)} and plan(sign * 0.1, augment_scale="fixed").kind == "none"


@pytest.mark.parametrize("difficulty", [math.nan, math.inf])
def test_a_difficulty_that_is_not_finite_is_an_error(difficulty):
    with pytest.raises(NumericsError, match="difficulty"):
        plan(difficulty)


@pytest.mark.parametrize("change", [
    {"augment_scale": "growing"}, {"augment": "up"}, {"easy_kind": "blur"}, {"dead_zone": 1.0}, {"dead_zone": -0.1},
    {"hint_min": -0.1}, {"hint_max": -0.1}, {"noise_scale": -1.0}, {"noise_scale": math.nan}, {"hint_traces": 0},
    {"fixed_difficulty": 0.0}, {"history_window": 0}, {"hint_update": "x"}, {"difficulty_reference": "x"}], ids=str)
def test_impossible_settings_are_named(change):
    [(name, value)] = change.items()
    with pytest.raises(ConfigError, match=f"{name} is {value!r}"):
        check_settings(AugmentationConfig(**change))
    check_settings(AugmentationConfig())


def test_the_seed_depends_on_run_record_and_step_alone():
    assert augmentation_seed(0, "q1", 3) == 8307391505743245159  # the same on every machine
    seeds = {augmentation_seed(s, r, t) for s in range(3) for r in ("q1", "q11", "\ud800") for t in range(11)}
    assert len(seeds) == 99 and all(0 <= seed < 2**63 for seed in seeds)


# --- frames ----------------------------------------------------------------------------------------------------------

def test_noise_has_the_sigma_asked_for_and_an_own_draw_for_each_frame():
    grey = torch.full((8, 3, 56, 56), 0.5)
    noise = add_noise(grey, 0.05, 3) - grey  # far from the clamp
    assert noise.std().item() == pytest.approx(0.05, rel=0.02) and abs(noise.mean().item()) < 1e-3
    assert (torch.corrcoef(noise.flatten(1)) - torch.eye(8)).abs().max() < 0.05


def test_noise_is_reproducible_clamped_and_changes_nothing_else():
    before = FRAMES.clone()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    noisy = add_noise(FRAMES, 5.0, 0)
    mask_frames(FRAMES, 0.5, 7)
    assert torch.equal(torch.rand(3), expected) and torch.equal(FRAMES, before)  # global generator and input
    assert noisy.min() == 0.0 and noisy.max() == 1.0 and torch.equal(add_noise(FRAMES, 0.0, 7), FRAMES)
    assert torch.equal(add_noise(FRAMES, 0.2, 7), add_noise(FRAMES, 0.2, 7))
    assert not torch.equal(add_noise(FRAMES, 0.2, 7), add_noise(FRAMES, 0.2, 8))
    assert torch.equal(add_noise(FRAMES, 0.2, 7)[:4], add_noise(FRAMES[:4], 0.2, 7))  # a longer clip


def masked_indices(frames, share, seed):
    masked = mask_frames(frames, share, seed)
    changed = [i for i in range(len(frames)) if not torch.equal(masked[i], frames[i])]
    assert all((masked[i] == 0.5).all() for i in changed)
    return changed


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.01, 1), (0.125, 1), (0.4, 4), (0.875, 7), (1.0, 7)])
def test_the_share_of_masked_frames_is_rounded_up_and_one_frame_stays(share, count):
    chosen = [masked_indices(FRAMES, share, seed) for seed in range(20)]
    assert {len(indices) for indices in chosen} == {count} and masked_indices(FRAMES[:1], share, 0) == []
    assert chosen == [masked_indices(FRAMES, share, seed) for seed in range(20)]
    assert share != 0.4 or {i for indices in chosen for i in indices} == set(range(8))  # every frame can be drawn


def test_impossible_amounts_are_refused():
    for sigma in (-0.1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="sigma"):
            add_noise(FRAMES, sigma, 0)
    for share in (-0.1, 1.1, math.nan):
        for change in (lambda: mask_frames(FRAMES, share, 0), lambda: cut_hint("a b", share)):
            with pytest.raises(ConfigError, match=r"give a share in \[0, 1\]"):
                change()


# --- hints -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("share", "hint"), [
    (0.0, "_ _ _ _ _ _"), (0.1, "red _ _ _ _ _"), (0.5, "red at 2 _ _ _"), (0.51, "red at 2 blue _ _"),
    (1.0, "red at 2 blue at 5")])
def test_a_hint_shows_the_first_words_rounded_up_and_blanks_for_the_others(share, hint):
    assert cut_hint(" red at 2\nblue  at 5", share) == hint
    assert cut_hint("a b c d e", 0.3, blank="") == "a b" and cut_hint("a b c d e", 0.3, blank="?") == "a b ? ? ?"
    assert cut_hint(" \n", share) == ""


def test_rounding_does_not_reveal_a_word_too_many():
    assert 0.07 * 100 > 7 and cut_hint(" ".join(["x"] * 100), 0.07, blank="") == " ".join(["x"] * 7)


def scored(think, format_=1.0, accuracy=1.0, iou=None):
    score = Score(format_, accuracy, iou, format_ + accuracy + (iou or 0.0), 2.0 if iou is None else 3.0)
    return f"<think>{think}</think><answer>A</answer>" + ("" if iou is None else "<glue>1 2</glue>"), score


def test_the_best_trace_is_correct_and_has_the_highest_reward():
    assert best_trace([scored("incorrect", accuracy=0.0), scored("first"), scored("second")]) == "first"
    assert best_trace([scored("a", iou=0.2), scored("b", iou=0.9), scored("c", iou=0.5)]) == "b"
    unusable = [scored("a", accuracy=0.0, iou=1.0), scored("b", format_=0.0), scored("c", accuracy=0.9), scored("")]
    assert best_trace(unusable) is best_trace([]) is None
