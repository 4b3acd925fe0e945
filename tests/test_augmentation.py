"""Difficulty-aware augmentation (section 3.3): what is done to whom, and how much."""

import math

import pytest
import torch

from dvr1_lite.augmentation import (
    NOTHING,
    AugmentationConfig,
    add_noise,
    augmentation_seed,
    best_trace,
    cut_hint,
    mask_frames,
    plan_augmentation,
    probed_shares,
    validate_augmentation,
)
from dvr1_lite.errors import ConfigError, NumericsError
from dvr1_lite.rewards import Score


def plan(difficulty, **settings):
    return plan_augmentation(difficulty, AugmentationConfig(**settings))


# --- whom and how much -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("difficulty", [0.0, 0.05, -0.05, 0.1, -0.1])
def test_nothing_is_done_in_the_dead_zone(difficulty):
    assert plan(difficulty) == NOTHING


@pytest.mark.parametrize(("difficulty", "share"), [(0.1 + 1e-9, 0.1), (0.55, 0.35), (1.0, 0.6), (1.7, 0.6)])
def test_the_hint_grows_linearly_with_difficulty_up_to_its_maximum(difficulty, share):
    augmentation = plan(difficulty)
    assert augmentation.kind == "hint" and augmentation.amount == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize(("difficulty", "sigma"), [(-0.2, 0.08), (-0.5, 0.2), (-1.0, 0.4)])
@pytest.mark.parametrize("kind", ["noise", "mask"])
def test_noise_and_masking_grow_with_ease(difficulty, sigma, kind):
    augmentation = plan(difficulty, easy_kind=kind)
    assert augmentation.kind == kind and augmentation.amount == pytest.approx(sigma)


def test_a_masked_share_never_exceeds_one():
    assert plan(-1.0, easy_kind="mask", noise_scale=3.0).amount == 1.0
    assert plan(-1.0, easy_kind="noise", noise_scale=3.0).amount == 3.0


@pytest.mark.parametrize(
    ("directions", "hard", "easy"),
    [("both", "hint", "noise"), ("hard", "hint", "none"), ("easy", "none", "noise"), ("none", "none", "none")],
)
def test_directions(directions, hard, easy):
    assert (plan(0.5, directions=directions).kind, plan(-0.5, directions=directions).kind) == (hard, easy)


def test_a_fixed_scale_has_one_amount_for_all_and_the_same_dead_zone():
    amounts = {plan(difficulty, scale="fixed").amount for difficulty in (0.11, 0.5, 1.0)}
    assert amounts == {plan(0.5).amount}
    assert {plan(-difficulty, scale="fixed").amount for difficulty in (0.11, 0.5, 1.0)} == {plan(-0.5).amount}
    assert plan(0.1, scale="fixed") == NOTHING


@pytest.mark.parametrize("difficulty", [math.nan, math.inf])
def test_a_difficulty_that_is_not_finite_stops(difficulty):
    with pytest.raises(NumericsError, match="difficulty"):
        plan(difficulty)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"scale": "growing"}, "'growing'.*adaptive, fixed"),
        ({"directions": "up"}, "'up'.*both, hard, easy, none"),
        ({"easy_kind": "blur"}, "'blur'.*noise, mask"),
        ({"dead_zone": 1.0}, "dead_zone"),
        ({"dead_zone": -0.1}, "dead_zone"),
        ({"hint_min": 0.7}, "hint_min"),
        ({"hint_max": 1.1}, "hint_max"),
        ({"noise_scale": -1.0}, "noise_scale"),
        ({"noise_scale": math.nan}, "noise_scale"),
        ({"fixed_difficulty": 0.0}, "fixed_difficulty"),
    ],
)
def test_impossible_settings_are_named(setting, message):
    with pytest.raises(ConfigError, match=message):
        validate_augmentation(AugmentationConfig(**setting))


def test_the_defaults_are_possible():
    validate_augmentation(AugmentationConfig())


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_the_seed_belongs_to_run_record_and_step():
    assert augmentation_seed(0, "q1", 3) == augmentation_seed(0, "q1", 3) == 8307391505743245159
    seeds = {augmentation_seed(s, r, t) for s in range(3) for r in ("q1", "q11", "\ud800") for t in range(11)}
    assert len(seeds) == 99 and all(0 <= seed < 2**63 for seed in seeds)


# --- noise -----------------------------------------------------------------------------------------------------------

FRAMES = torch.rand(8, 3, 14, 14, generator=torch.Generator().manual_seed(1))


def test_the_same_seed_gives_the_same_noise_and_another_seed_another():
    assert torch.equal(add_noise(FRAMES, 0.2, 7), add_noise(FRAMES, 0.2, 7))
    assert not torch.equal(add_noise(FRAMES, 0.2, 7), add_noise(FRAMES, 0.2, 8))


def test_noise_is_clamped_and_leaves_its_input_alone():
    before = FRAMES.clone()
    noisy = add_noise(FRAMES, 5.0, 0)
    assert noisy.min() == 0.0 and noisy.max() == 1.0 and torch.equal(FRAMES, before)


def test_noise_has_the_asked_sigma_and_a_draw_of_its_own_for_each_frame():
    grey = torch.full((8, 3, 56, 56), 0.5)
    noise = add_noise(grey, 0.05, 3) - grey  # far from the clamp
    assert noise.std().item() == pytest.approx(0.05, rel=0.02) and abs(noise.mean().item()) < 1e-3
    correlations = torch.corrcoef(noise.flatten(1)) - torch.eye(8)
    assert correlations.abs().max() < 0.05


def test_a_longer_clip_keeps_the_noise_of_its_first_frames():
    assert torch.equal(add_noise(FRAMES, 0.2, 7)[:4], add_noise(FRAMES[:4], 0.2, 7))


def test_no_noise_changes_nothing():
    assert torch.equal(add_noise(FRAMES, 0.0, 7), FRAMES)


def test_noise_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    add_noise(FRAMES, 0.2, 7)
    mask_frames(FRAMES, 0.5, 7)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("sigma", [-0.1, math.nan, math.inf])
def test_impossible_sigmas(sigma):
    with pytest.raises(ConfigError, match="sigma"):
        add_noise(FRAMES, sigma, 0)


# --- masking ---------------------------------------------------------------------------------------------------------


def masked_indices(frames, share, seed):
    masked = mask_frames(frames, share, seed)
    changed = [i for i in range(len(frames)) if not torch.equal(masked[i], frames[i])]
    assert all((masked[i] == 0.5).all() for i in changed)
    return changed


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.01, 1), (0.125, 1), (0.4, 4), (0.875, 7), (1.0, 7)])
def test_the_share_of_masked_frames_is_rounded_up_and_one_frame_stays(share, count):
    assert len(masked_indices(FRAMES, share, 0)) == count


def test_masking_follows_the_seed_and_leaves_its_input_alone():
    before = FRAMES.clone()
    chosen = [masked_indices(FRAMES, 0.4, seed) for seed in range(20)]
    assert chosen == [masked_indices(FRAMES, 0.4, seed) for seed in range(20)] and torch.equal(FRAMES, before)
    assert {i for indices in chosen for i in indices} == set(range(8))  # every frame has its turn


def test_a_single_frame_always_stays():
    assert masked_indices(FRAMES[:1], 1.0, 0) == []


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_impossible_shares(share):
    with pytest.raises(ConfigError, match="mask share"):
        mask_frames(FRAMES, share, 0)
    with pytest.raises(ConfigError, match="hint share"):
        cut_hint("a b", share)


# --- hints -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "hint"),
    [
        (0.0, "_ _ _ _ _ _"),
        (0.1, "red _ _ _ _ _"),
        (0.5, "red at 2 _ _ _"),
        (0.51, "red at 2 blue _ _"),
        (1.0, "red at 2 blue at 5"),
    ],
)
def test_a_hint_shows_the_first_words_rounded_up_and_blanks_the_rest(share, hint):
    assert cut_hint(" red at 2\nblue  at 5", share) == hint


def test_blanks_keep_the_length_unless_left_out():
    assert len(cut_hint("a b c d e", 0.3).split()) == 5
    assert cut_hint("a b c d e", 0.3, blank="") == "a b"
    assert cut_hint("a b c d e", 0.3, blank="?") == "a b ? ? ?"


def test_rounding_does_not_reveal_a_word_too_many():
    assert 0.07 * 100 > 7  # what ceil would see
    assert cut_hint(" ".join(["x"] * 100), 0.07, blank="") == " ".join(["x"] * 7)


def test_an_empty_trace_gives_an_empty_hint():
    assert cut_hint("", 0.5) == cut_hint(" \n", 1.0) == ""


def scored(think, format_=1.0, accuracy=1.0, iou=None):
    total = format_ + accuracy + (iou or 0.0)
    score = Score(format_, accuracy, iou, total, 2.0 if iou is None else 3.0)
    return f"<think>{think}</think><answer>A</answer>", score


def test_the_best_trace_is_the_right_one_with_the_highest_reward():
    assert best_trace([scored("wrong", accuracy=0.0), scored("first"), scored("second")]) == "first"
    assert best_trace([scored("a", iou=0.2), scored("b", iou=0.9), scored("c", iou=0.5)]) == "b"


def test_no_trace_serves_if_answer_or_format_is_wrong():
    assert best_trace([]) is None
    assert best_trace([scored("a", accuracy=0.0, iou=1.0), scored("b", format_=0.0), scored("c", accuracy=0.9)]) is None
    assert best_trace([scored("")]) is None


def test_the_smallest_share_that_lets_enough_succeed():
    rates = [{0.15: 0.5}, {0.15: 0.25, 0.3: 0.3}, {0.15: 0.0, 0.3: 0.0, 0.45: 1.0}, {0.15: 0.0, 0.3: 0.0, 0.45: 0.25}]
    asked = []

    def success(waiting, share):
        asked.append((tuple(waiting), share))
        return [rates[number][share] for number in waiting]

    shares = probed_shares(4, success)
    assert shares == [0.15, 0.3, 0.45, 0.6]
    assert asked == [((0, 1, 2, 3), 0.15), ((1, 2, 3), 0.3), ((2, 3), 0.45)]  # together, and none longer than needed


def test_probing_ends_when_nothing_is_open():
    asked = []
    assert probed_shares(2, lambda waiting, tried: asked.append(tried) or [1.0] * len(waiting)) == [0.15, 0.15]
    assert asked == [0.15] and probed_shares(0, None) == []
