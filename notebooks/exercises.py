r"""Checks of the exercises: `exercise("01.1", attempt)` of a notebook runs `exercise_01_1(attempt)` of this file.

A check is a list of asserts whose messages say what is off, never what the answer is. An attempt that is None, or a
function that returns None, ends a check as "not attempted yet" before an assert is reached (`reader.guarded`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dvr1_lite.advantages import group_advantages, predicted_advantages, vanish_probability
from dvr1_lite.augmentation import RewardHistory, plan_augmentation
from dvr1_lite.config import AugmentationConfig, ObjectiveConfig
from dvr1_lite.data import Record
from dvr1_lite.objectives import Batch, objective_loss
from dvr1_lite.rewards import Score, score


def check_test(test: Callable[[Any], bool], correct: Sequence[Any], faulty: Sequence[Any]) -> None:
    """Hold a test that the reader wrote to implementations of this file, all of which the reader has not seen.

    test: returns True for an implementation that it accepts. It must accept all of `correct` (give at least two that
    are written differently) and reject all of `faulty` (the planted bug first); one that raises counts as rejected.
    """
    def accepts(implementation: Any) -> bool:
        try:
            return bool(test(implementation))
        except (ArithmeticError, AssertionError, IndexError, KeyError, RuntimeError, ValueError):
            return False

    assert all(accepts(one) for one in correct), "your test rejects a correct implementation"
    missed = [number for number, one in enumerate(faulty) if accepts(one)]
    assert 0 not in missed, "your test accepts the faulty function"
    assert not missed, f"your test accepts {len(missed)} of {len(faulty)} faulty functions"


# 00 ------------------------------------------------------------------------------------------------------------------

def exercise_00_1(attempt):
    correct, incorrect = attempt
    truth = group_advantages(torch.tensor([[2.0, 1, 1, 1, 2, 1, 1, 1]]), eps=0.0)[0]
    assert abs(correct - truth[0]) < 0.01, "the advantage of the correct one is off"
    assert abs(incorrect - truth[1]) < 0.01, "the advantage of the incorrect one is off"


def choice(text: str) -> Score:
    """Score a completion for a question with the options A to D whose correct answer is B."""
    return score(Record("x", "Which?", ("red", "blue", "green", "white"), "B", "multiple choice", "x", None), text)


def exercise_00_2(attempt):
    assert "B" in attempt[0], "the first must contain the correct answer"
    for points, text in enumerate(attempt):
        earned = choice(text).total
        assert earned == points, f"{text!r} earns {earned:g}, not {points}"


def exercise_00_3(attempt):
    cheat, colleagues_reward = attempt
    assert colleagues_reward(cheat) == 2, "the colleague's reward is not 2"
    assert choice(cheat).total < 2, "it earns 2 from the project as well, so it is no cheat"


def exercise_00_4(attempt):
    grpo = 35.4
    for answer, (table, full) in zip(attempt, (("table 4", 39.5), ("table 8", 36.3))):
        assert abs(answer - (full - grpo)) < 0.051, f"by {table} it is not {answer}"


# 01 ------------------------------------------------------------------------------------------------------------------

def exercise_01_1(attempt):
    rewards = torch.randint(0, 3, (20, 6), generator=torch.Generator().manual_seed(2)).double()
    rewards[0] = 2.0
    for std in ("population", "sample"):
        for eps in (0.0, 0.1):
            result = attempt(rewards, eps, std)
            assert result.isfinite().all(), f"not finite for std {std!r} and eps {eps}"
            assert torch.allclose(result, group_advantages(rewards, eps, std)), f"incorrect for {std!r} and eps {eps}"


def exercise_01_2(attempt):
    def by_hand(rewards, eps=1e-4):
        spread = (rewards.square().mean(-1, keepdim=True) - rewards.mean(-1, keepdim=True).square()).clamp(min=0).sqrt()
        return (rewards - rewards.mean(-1, keepdim=True)) / (spread + eps)

    def std_of_the_batch(rewards, eps=1e-4):
        centred = rewards - rewards.mean(dim=-1, keepdim=True)
        return centred / (centred.std(correction=0) + eps)

    def mean_std(rewards, eps=1e-4):
        centred = rewards - rewards.mean(dim=-1, keepdim=True)
        return centred / (centred.std(-1, correction=0).mean() + eps)

    check_test(attempt, [group_advantages, by_hand], [std_of_the_batch, mean_std])


def exercise_01_3(attempt):
    for name, size, p in zip("abc", attempt, (0.5, 0.1, 0.02)):
        assert vanish_probability(p, size) < 0.05, f"({name}) is too small"
        assert vanish_probability(p, size - 1) >= 0.05, f"({name}) works, but a smaller group does too"


def exercise_01_4(attempt):
    loss_a, loss_b = attempt
    advantages = group_advantages(torch.tensor([[1.0, 0.0]]), eps=0.0)[0]
    lengths = torch.tensor([10.0, 2.0])
    assert abs(loss_a + advantages.mean().item()) < 1e-6, "(a) is off"
    assert abs(loss_b + ((advantages * lengths).sum() / lengths.sum()).item()) < 0.01, "(b) is off"


def exercise_01_5(attempt):
    p = torch.tensor(attempt, dtype=torch.float64)
    assert ((p >= 0.001) & (p <= 0.999)).all(), "each rate must be from 0.001 to 0.999"
    before, after = (vanish_probability(p, size).mean().item() for size in (8, 16))
    assert after > 0.8 * before, f"{after / before:.0%} of the vanished share is left, not more than 80 %"


# 02 ------------------------------------------------------------------------------------------------------------------

def exercise_02_1(attempt):
    rho, rewards = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for eps in (0.1, 1.0):
        truth = (group_advantages(rewards, 0.0) - predicted_advantages(rho, eps)).square().mean()
        mine = attempt(rho, rewards, eps)
        assert abs(mine - truth) < 1e-9, f"{mine:.4f} is off by {abs(mine - truth):.4f} at eps {eps}"
    wide = attempt(torch.cat([rho, 9 * rho]), rewards.repeat(2, 1), 0.0)
    assert abs(wide - attempt(rho, rewards, 0.0)) < 1e-9, "a wide group changes its neighbours: take the std per group"


def exercise_02_2(attempt):
    # No epsilon on the std of the rewards, as exercise 02.1 has it, so that tests may compare closely with that loss.
    def correct(rho, rewards, eps=0.1):
        return (group_advantages(rewards, 0.0) - predicted_advantages(rho, eps)).square().mean()

    def by_hand(rho, rewards, eps=0.1):
        centred = rho - rho.mean(-1, keepdim=True).detach()  # errors add up to 0: the mean needs no gradient
        predicted = centred / (rho.std(-1, keepdim=True, correction=0) + eps)  # sqrt(var) has no gradient at the start
        return torch.nn.functional.mse_loss(predicted, group_advantages(rewards, 0.0))

    def detached(rho, rewards, eps=0.1):
        mean = rho.detach().mean(-1, keepdim=True)
        spread = rho.detach().std(-1, keepdim=True, correction=0) + eps
        return (group_advantages(rewards, 0.0) - (rho - mean) / spread).square().mean()

    def half(rho, rewards, eps=0.1):
        return 0.5 * correct(rho, rewards, eps) + 0.5 * detached(rho, rewards, eps)

    check_test(attempt, [correct, by_hand], [detached, half])


def exercise_02_3(attempt):
    rho = torch.tensor([[[0.1], [-0.1], [0.1], [-0.1]]], dtype=torch.float64)
    for name, mine, beta, masked in zip("abc", attempt, (0.0, 0.0, 0.1), (True, False, True)):
        logp = rho.clone().requires_grad_()
        batch = Batch(logp, 0 * rho, 0 * rho, torch.ones_like(rho), torch.ones(1, 4))
        loss = objective_loss(batch, ObjectiveConfig("reg-grpo", beta=beta, mask_vanished=masked))
        truth = torch.autograd.grad(loss, logp)[0].norm().item()
        assert abs(mine - truth) <= 0.02 * truth + 1e-9, f"({name}) is off"


def exercise_02_4(attempt):
    at_start, later = attempt
    assert abs(at_start - 0.04 * 2 / 0.05) < 1e-6, "(a) is off"
    assert abs(later - 0.04 * 2 / (0.15 + 0.05)) < 1e-6, "(b) is off"


def exercise_02_5(attempt):
    policy = torch.as_tensor(attempt, dtype=torch.float64)
    old = torch.tensor([0.40, 0.25, 0.15, 0.10, 0.05, 0.05], dtype=torch.float64)
    rewards = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 2.0], dtype=torch.float64)
    assert policy.shape == (6,) and (policy > 0).all(), "give six probabilities above 0"
    assert abs(policy.sum() - 1) < 1e-6, f"they add up to {policy.sum():.3f}, not 1"
    rho = (policy / old).log()[[0, 1, 3, 4]]
    error = group_advantages(rewards[[0, 1, 3, 4]], 0.0) - predicted_advantages(rho, 0.1)
    assert error.square().mean() < 0.5, f"the loss is {error.square().mean():.2f}"
    fall = ((old - policy) * rewards).sum()
    assert fall >= 0.3, f"the expected reward falls by {fall:.2f} only"


# 03 ------------------------------------------------------------------------------------------------------------------


def exercise_03_1(attempt: Callable) -> None:
    rng = np.random.default_rng(4)
    maxima, totals = rng.integers(2, 4, 90).astype(float), rng.integers(0, 3, (90, 8)).astype(float)
    for window in (100, 20):
        history, truth = RewardHistory(window), []
        for mean in totals.mean(1) / maxima:
            truth.append(history.difficulty(mean))
            history.push(mean)
        mine = attempt(totals, maxima, window)
        assert len(mine) == 90, "give one number for each group"
        off = np.abs(np.array(mine, dtype=float) - truth)
        assert off.max() < 1e-9, f"window {window}: off from group {int((off > 1e-9).argmax()) + 1}"


def exercise_03_2(attempt: Callable) -> None:
    def loop(pushed: Callable, before: bool = False) -> Callable:
        def run(sampled: Sequence[float], trained: Sequence[float], window: int = 100) -> list[float]:
            history, found = RewardHistory(window), []
            for own, augmented in zip(sampled, trained):
                if before:
                    history.push(pushed(own, augmented))
                found.append(history.difficulty(own))
                if not before:
                    history.push(pushed(own, augmented))
            return found
        return run

    def by_hand(sampled: Sequence[float], trained: Sequence[float], window: int = 100) -> list[float]:
        return [float(np.mean(sampled[max(0, i - window):i]) - mean) if i >= window / 4 else 0.0
                for i, mean in enumerate(sampled)]

    check_test(attempt, [loop(lambda own, augmented: own), by_hand],
               [loop(lambda own, augmented: augmented), loop(lambda own, augmented: (own + augmented) / 2)])


def exercise_03_3(attempt: tuple[float, int, float]) -> None:
    difficulty, words, sigma = attempt
    truth = 0.90 - (1 + 1 / 8) / 2
    assert abs(difficulty - truth) < 0.005, "(a) is off"
    amount = plan_augmentation(truth, AugmentationConfig()).amount
    assert words == math.ceil(16 * amount), "(b) is off: it is rounded up"
    easy = plan_augmentation(0.90 - 1.0, AugmentationConfig())
    assert abs(sigma - easy.amount) < 0.005, "(c) is off: compare |dR| with the dead zone"


def exercise_03_4(attempt: Callable) -> None:
    for own_correct, hinted_correct in ((0, 8), (1, 8), (1, 2), (6, 8), (8, 8), (0, 0)):
        own = [(f"own {i}", i < own_correct) for i in range(8)]
        hinted = [(f"hinted {i}", i < hinted_correct) for i in range(8)]
        mine, case = attempt(list(own), list(hinted)), f"{own_correct} own and {hinted_correct} hinted correct"
        assert len(mine) == 8 and len(set(mine)) == 8, f"{case}: give eight different completions"
        assert set(own[:own_correct]) <= set(mine), f"{case}: a correct own completion is lost"
        lent = [one for one in mine if one in hinted]
        assert all(correct for _, correct in lent), f"{case}: an incorrect hinted completion is lent"
        assert len(lent) == min(4, 8 - own_correct, hinted_correct), f"{case}: {len(lent)} are lent"
        assert set(mine) <= set(own) | set(hinted), f"{case}: a completion is new"


# 03b -----------------------------------------------------------------------------------------------------------------


def exercise_03b_1(attempt: tuple[float, float, int]) -> None:
    step, success, values = attempt
    truth = 1e-4 ** (1 / 8)
    assert abs(step - truth) < 0.005, "(a) is off"
    assert abs(success - truth**4) < 0.001, "(b) is off"
    assert values == min(h for h in range(9) if truth ** (8 - h) >= 0.3), "(c) is off"


def exercise_03b_2(attempt: Callable) -> None:
    def of_prompts(logp: np.ndarray) -> float:
        return float(np.mean([math.exp(sum(row)) for row in logp.tolist()]))

    check_test(attempt, [lambda logp: float(np.exp(logp.sum(1)).mean()), of_prompts],
               [lambda logp: float(np.exp(logp.mean(0).sum())), lambda logp: float(np.exp(logp).mean(0).prod()),
                lambda logp: float(np.exp(logp.mean(1)).mean())])


def exercise_03b_3(attempt: tuple[Callable, str]) -> None:
    shares, (function, supports) = np.linspace(0.1, 0.6, 40).tolist(), attempt
    control = [float(one) for one in function(list(shares))]
    assert len(control) == 40, "give one share for each prompt"
    assert abs(np.mean(control) - np.mean(shares)) < 1e-6, "the mean share differs: now length differs, too"
    assert np.std(control) < 1e-9 or np.allclose(sorted(control), shares), "the lengths have another distribution"
    assert np.std(control) < 1e-9 or abs(np.corrcoef(control, shares)[0, 1]) < 0.5, "length still follows difficulty"
    assert str(supports).strip().lower() == "no", "(b) is off: compute the 95 % interval of the difference"


# 04 ------------------------------------------------------------------------------------------------------------------


def exercise_04_1(attempt: Callable[[int, int, int], int]) -> None:
    import torch

    from dvr1_lite.video import patchify

    for frames, height, width in ((8, 56, 56), (16, 252, 252), (5, 84, 112), (1, 252, 252)):
        truth = int(patchify(torch.zeros(frames, 3, height, width))[1].prod()) // 4
        mine = attempt(frames, height, width)
        assert mine == truth, f"{frames} frames of {height} by {width}: {mine} is not what the encoder gives"


def exercise_04_2(attempt: tuple[float, float]) -> None:
    for name, mine, truth in zip("ab", attempt, (4 + 32 / 64, 4 + 8 / 32 + 32 / (32 * 256))):
        assert abs(mine - truth) < 1e-3, f"({name}) {mine} is off"


def exercise_04_3(attempt: Callable[[Callable], bool]) -> None:
    import torch
    from transformers import DynamicCache

    from dvr1_lite.policy import Completions

    def module(policy, prompt, ids, mask):
        return policy.logprobs([prompt], Completions(ids[None], mask[None]))[0]

    def states(policy, prompt, ids, late=0):  # before each token, and after each token
        cache, embed = DynamicCache(), policy.language.embed_tokens
        embeds = embed(prompt.input_ids[None])
        embeds[0, prompt.input_ids == policy.config.video_token_id] = prompt.features.parts[0].embeds
        last = policy.forward(embeds, prompt.position_ids[:, None], None, cache)[:, -1:]
        cache.batch_repeat_interleave(len(ids))
        steps = torch.arange(ids.shape[1]) + prompt.next_position + late
        after = policy.forward(embed(ids), steps.expand(3, len(ids), -1), None, cache)
        return torch.cat([last.expand(len(ids), -1, -1), after[:, :-1]], dim=1), after

    def read(policy, before, ids, mask):
        logp = policy.log_softmax(before.flatten(0, 1), 1.0).view(*ids.shape, -1)
        return logp.gather(-1, ids[..., None]).squeeze(-1).where(mask, 0.0)

    def by_cache(policy, prompt, ids, mask):
        return read(policy, states(policy, prompt, ids)[0], ids, mask)

    def shifted(policy, prompt, ids, mask):
        return read(policy, states(policy, prompt, ids)[1], ids, mask)

    def without_end(policy, prompt, ids, mask):
        return module(policy, prompt, ids, mask).where(ids != policy.end_id, 0.0)

    def late_positions(policy, prompt, ids, mask):
        return read(policy, states(policy, prompt, ids, late=1)[0], ids, mask)

    def without_adapter(policy, prompt, ids, mask):
        with policy.reference():
            return module(policy, prompt, ids, mask)

    check_test(attempt, [module, by_cache], [shifted, without_end, late_positions, without_adapter])


def exercise_04_4(attempt: list[list[int]]) -> None:
    from dvr1_lite.config import TrainConfig
    from dvr1_lite.data import prompt_text, read_records
    from dvr1_lite.files import resolve
    from dvr1_lite.policy import encode_record
    from dvr1_lite.rollout import sample_groups
    from dvr1_lite.run import load_policy

    config = TrainConfig()
    policy, records = load_policy(config), read_records(resolve("data/toyvideoqa/L1.jsonl"))[:3]
    prompts = [policy.prompt(prompt_text(r), encode_record(policy, r, config)) for r in records]
    made = sample_groups(policy, prompts, 1, config.max_new_tokens, greedy=True).completions
    for number, (mine, ids, mask) in enumerate(zip(attempt, made.ids, made.mask), 1):
        truth = ids[0][mask[0]].tolist()
        same = next((at for at, (a, b) in enumerate(zip(mine, truth)) if a != b), min(len(mine), len(truth)))
        assert list(mine) == truth, f"question {number}: the answers differ from token {same} on"



# 05 ------------------------------------------------------------------------------------------------------------------


def exercise_05_1(attempt: Callable[[Sequence[float], Sequence[float]], tuple[float, float]]) -> None:
    import numpy as np

    quantile = {3: 4.3026527, 5: 2.7764451, 10: 2.2621572}  # of Student's t at 0.975, n - 1 degrees of freedom
    rng = np.random.default_rng(5)
    for n, t in quantile.items():
        luck = rng.normal(70, 6, n)  # of a seed, shared by both rows
        one, two = luck + rng.normal(2, 1, n), luck
        gaps = one - two
        reach = t * np.sqrt(((gaps - gaps.mean()) ** 2).sum() / (n - 1) / n)
        mine = attempt(list(one), list(two))
        for name, end, truth in (("low", mine[0], gaps.mean() - reach), ("high", mine[1], gaps.mean() + reach)):
            assert abs(end - truth) < 1e-4, f"{n} seeds: the {name} end is off by {abs(end - truth):.3g}"


def exercise_05_2(attempt: Callable[[Callable], bool]) -> None:
    def by_seed(mine, theirs):
        return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]

    def in_the_order_of_the_first(mine, theirs):
        return [value - theirs[seed] for seed, value in mine.items() if seed in theirs]

    def by_position(mine, theirs):
        return [a - b for a, b in zip(mine.values(), theirs.values())]

    def sorted_values(mine, theirs):
        return [a - b for a, b in zip(sorted(mine.values()), sorted(theirs.values()))]

    check_test(attempt, [by_seed, in_the_order_of_the_first], [by_position, sorted_values])


def exercise_05_3(attempt: tuple[float, float, int]) -> None:
    from scipy.stats import t

    def effect(n):
        return (t.ppf(1 - 0.025 / 4, n - 1) + t.ppf(0.8, n - 1)) * 5 / n**0.5

    with_5, with_10, seeds = attempt
    assert abs(with_5 - effect(5)) < 0.05, "(a) is off"
    assert abs(with_10 - effect(10)) < 0.05, "(b) is off"
    assert effect(seeds) <= 3, "(c) is too small: t depends on n as well"
    assert effect(seeds - 1) > 3, "(c) is enough, but a smaller number is too"


def exercise_05_4(attempt: tuple[float, int, int]) -> None:
    p_of_5, n_alone, n_of_7 = attempt
    assert abs(p_of_5 - 1 / 16) < 1e-3, "(a) is off: both sides count"
    for name, n, level in (("b", n_alone, 0.05), ("c", n_of_7, 0.05 / 7)):
        assert 0.5 ** (n - 1) <= level, f"({name}) cannot reach it"
        assert 0.5 ** (n - 2) > level, f"({name}) is not the smallest"


def exercise_05_5(attempt: tuple[float, float, int]) -> None:
    from math import comb

    def p(n, k, other):  # Fisher's exact test of k of n against other of n, by counting tables
        tables = [comb(n, i) * comb(n, k + other - i) for i in range(k + other + 1)]
        return sum(ways for ways in tables if ways <= tables[k]) / comb(2 * n, k + other)

    against_two, against_none, n = attempt
    assert abs(against_two - p(5, 5, 2)) < 1e-3, "(a) is off"
    assert abs(against_none - p(5, 5, 0)) < 1e-4, "(b) is off"
    assert p(n, n, 0) <= 0.01, "(c) cannot reach it"
    assert p(n - 1, n - 1, 0) > 0.01, "(c) is not the smallest"


# 06 ------------------------------------------------------------------------------------------------------------------


def exercise_06_1(attempt: Callable[[Any, float], int]) -> None:
    from dataclasses import replace

    from dvr1_lite.config import card_settings, make_config, read_yaml
    from dvr1_lite.scale.memory import GB, predict

    values = read_yaml("seed_bench_r1_qwen2_5_vl_7b")
    config = make_config(values | card_settings(16, values["model"]))
    for gb in (14.0, 15.5):
        frames = attempt(config, gb)
        assert frames % 2 == 0, f"{frames} frames are not an even number"
        fits = [predict(replace(config, num_frames=n)).needed <= gb * GB for n in (frames, frames + 2)]
        assert fits[0], f"{frames} frames need more than {gb} GB"
        assert not fits[1], f"two frames more than {frames} fit into {gb} GB too"


def exercise_06_2(attempt: Callable[[int, int, int, bool], float]) -> None:
    for rank, rows, columns in ((16, 11008, 2048), (8, 2048, 2048)):
        numbers = rank * rows + rank * columns
        assert attempt(rank, rows, columns, False) == 16 * numbers, "with moments of 32 bits it is off"
        assert abs(attempt(rank, rows, columns, True) - numbers * (8 + 2 + 8 / 256)) < 1, "with 8-bit moments it is off"


def exercise_06_3(attempt: Callable[[Callable], bool]) -> None:
    from itertools import chain
    from statistics import fmean

    def pooled(shares):
        return fmean(chain.from_iterable(shares))

    def weighted(shares):
        return sum(fmean(share) * len(share) for share in shares) / sum(map(len, shares))

    def mean_of_means(shares):
        return fmean(map(fmean, shares))

    def first_process(shares):
        return fmean(shares[0])

    def equal_lengths(shares):  # drops what the longer shares have more
        shortest = min(map(len, shares))
        return fmean(chain.from_iterable(share[:shortest] for share in shares))

    check_test(attempt, [pooled, weighted], [mean_of_means, first_process, equal_lengths])


# 07 ------------------------------------------------------------------------------------------------------------------


def exercise_07_1(attempt: float) -> None:
    assert 590 <= attempt <= 645, f"{attempt} clips do not give +-3: the width falls with the root of their number"


def exercise_07_2(attempt: tuple[str, Callable[[Record, str], float]]) -> None:
    cheat, better = attempt
    for true in ("2 5", "7", "3 4 8", "1 2 5 6"):
        record = Record(true, "When?", (), true, "exact", "exact", None)
        assert set(true.split()) <= set(cheat.split()), f"(a) earns less than 1 from `mentioned` where {true} is true"
        values = {answer: better(record, answer) for answer in (true, cheat, true.split()[0], "none", "")}
        assert all(0.0 <= value <= 1.0 for value in values.values()), "(b) returns values outside 0 to 1"
        assert values[true] == 1.0, f"(b) gives {values[true]:g} to the true moments"
        assert values[cheat] <= 0.5, f"(b) gives {values[cheat]:g} to your cheat where {true} is true"
        if len(true.split()) > 1:
            assert 0.0 < values[true.split()[0]] < 1.0, f"(b) gives no partial credit to one moment of {true}"


def exercise_07_3(attempt: Callable[[Callable], bool]) -> None:
    from statistics import stdev

    def reach(changes):
        return 1.96 * stdev(changes) / len(changes) ** 0.5

    def by_index(before, after):
        old = {row["index"]: row["accuracy"] for row in before}
        return reach([row["accuracy"] - old[row["index"]] for row in after])

    def both_sorted(before, after):
        pairs = zip(*(sorted(rows, key=lambda row: row["index"]) for rows in (before, after)))
        return reach([b["accuracy"] - a["accuracy"] for a, b in pairs])

    def by_position(before, after):
        return reach([b["accuracy"] - a["accuracy"] for a, b in zip(before, after)])

    def one_sorted(before, after):
        return by_position(sorted(before, key=lambda row: row["index"]), after)

    def unpaired(before, after):
        parts = [reach([row["accuracy"] for row in rows]) for rows in (before, after)]
        return (parts[0] ** 2 + parts[1] ** 2) ** 0.5

    check_test(attempt, [by_index, both_sorted], [by_position, one_sorted, unpaired])


def exercise_07_4(attempt: Callable[[list[dict]], str]) -> None:
    from dvr1_lite.files import data_folder, read_lines

    runs = {file.stem: list(read_lines(file)) for file in (data_folder() / "results" / "sick").glob("*.jsonl")}
    cases = [(name, lines[:length]) for name, lines in runs.items() for length in (24, 30)]
    found = sum(attempt(lines) == name for name, lines in cases)
    assert found == len(cases), f"{found} of {len(cases)} diagnoses are correct"
