r"""Sampling: the log-probs are the training forward's, the draws are right, the banned tokens never appear."""

import pytest
import torch
from tiny import add_noise_to_lora, make_clip, write_model

import dvr1_lite.rollout as rollout_module
from dvr1_lite.errors import ConfigError
from dvr1_lite.policy import LoraSettings, Policy
from dvr1_lite.rollout import choose, sample_groups


@pytest.fixture(scope="module", params=("qwen2_5_vl", "qwen2_vl"))
def policy(request, tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp(request.param), request.param)
    loaded = Policy.load(folder, lora=LoraSettings(rank=3), dtype="float64")
    add_noise_to_lora(loaded.model)
    return loaded


@pytest.fixture(scope="module")
def prompts(policy):
    return [policy.prompt("what colour comes first", policy.encode(make_clip(1))),
            policy.prompt("what hint red _ _ _", policy.encode(make_clip(2), image=make_clip(3).frames[0])),
            policy.prompt("red", policy.encode())]


@pytest.fixture
def ending(policy):
    r"""Makes the end token likely enough that completions end at different lengths."""
    bonus = torch.zeros(len(policy.banned), dtype=torch.float64)
    bonus[policy.end_id] = 2.5
    hook = policy.core.lm_head.register_forward_hook(lambda module, given, logits: logits + bonus)
    yield
    hook.remove()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("temperature", (1.0, 0.6, 1.7))
def test_sampling_log_probs_are_the_training_forwards(policy, prompts, temperature):
    rollout = sample_groups(policy, prompts, 5, 9, temperature=temperature, generator=seeded())
    again = policy.logprobs(prompts, rollout.completions, temperature=temperature)
    torch.testing.assert_close(rollout.logp_sampling, again, rtol=0, atol=1e-10)
    assert torch.isfinite(again).all()


def test_shapes_masks_texts_and_ends(policy, prompts, ending):
    rollout = sample_groups(policy, prompts, 6, 40, generator=seeded(3))
    ids, mask = rollout.completions.ids, rollout.completions.mask
    assert ids.shape == mask.shape == rollout.logp_sampling.shape and ids.shape[:2] == (3, 6)
    assert torch.equal(mask.sum(-1), rollout.lengths) and int(rollout.lengths.max()) == ids.shape[2]
    assert rollout.finished.any()
    for b in range(3):
        for g in range(6):
            row = ids[b, g][mask[b, g]]
            assert rollout.finished[b, g] == (row[-1] == policy.end_id)
            assert policy.end_id not in row[:-1] and (ids[b, g][~mask[b, g]] == policy.pad_id).all()
            assert rollout.texts[b][g] == policy.tokenizer.decode(row, skip_special_tokens=True)
            assert "<|" not in rollout.texts[b][g]


def test_the_same_seed_gives_the_same_rollout(policy, prompts):
    first, second, other = (sample_groups(policy, prompts, 4, 8, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.completions.ids, second.completions.ids)
    assert torch.equal(first.logp_sampling, second.logp_sampling)
    assert first.texts != other.texts


def test_sharing_equal_beginnings_changes_nothing(policy, prompts, ending, monkeypatch):
    shared = sample_groups(policy, prompts, 6, 30, generator=seeded(5))
    assert len(set(shared.lengths.flatten().tolist())) > 3
    unique, calls = torch.unique, []

    def all_differ(x, **_):
        calls.append(len(x))
        return x, torch.arange(len(x))

    monkeypatch.setattr(rollout_module.torch, "unique", all_differ)
    apart = sample_groups(policy, prompts, 6, 30, generator=seeded(5))
    monkeypatch.setattr(rollout_module.torch, "unique", unique)
    assert calls and torch.equal(shared.completions.ids, apart.completions.ids)
    torch.testing.assert_close(shared.logp_sampling, apart.logp_sampling, rtol=0, atol=1e-12)


def test_a_step_costs_its_different_beginnings(policy, prompts, ending, monkeypatch):
    widths = []
    real = policy.run
    monkeypatch.setattr(policy, "run", lambda hidden, *rest: widths.append(len(hidden)) or real(hidden, *rest))
    rollout = sample_groups(policy, prompts, 6, 30, generator=seeded(5))
    rows = [(i // 6, tuple(row[keep].tolist())) for i, (row, keep) in enumerate(
        zip(rollout.completions.ids.flatten(0, 1), rollout.completions.mask.flatten(0, 1)))]
    beginnings = [len({(group, row[:length]) for group, row in rows if len(row) > length})
                  for length in range(1, max(len(row) for _, row in rows))]
    assert widths == [3, *beginnings] and beginnings[-1] < 18
    widths.clear()
    sample_groups(policy, prompts, 8, 5, greedy=True)
    assert set(widths) <= {1, 2, 3}  # greedy rows of a group never differ


def test_greedy_is_transformers_generate(policy, prompts):
    rollout = sample_groups(policy, prompts[2:], 1, 12, greedy=True)
    never = policy.banned.nonzero().flatten().tolist()
    ids = prompts[2].input_ids[None]
    policy.model.eval()
    theirs = policy.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                   max_new_tokens=12, suppress_tokens=never)[0, ids.shape[1]:]
    policy.model.train()
    ours = rollout.completions.ids[0, 0][rollout.completions.mask[0, 0]]
    assert ours.tolist() == theirs.tolist()
    assert torch.equal(sample_groups(policy, prompts[2:], 2, 12, greedy=True).completions.ids[0, 1][:len(ours)], ours)


def test_banned_tokens_never_appear_even_if_the_model_wants_them(policy, prompts):
    wanted = policy.banned.double() * 50.0
    hook = policy.core.lm_head.register_forward_hook(lambda module, given, logits: logits + wanted)
    try:
        rollout = sample_groups(policy, prompts, 8, 20, generator=seeded(2))
        greedy = sample_groups(policy, prompts, 1, 20, greedy=True)
        again = policy.logprobs(prompts, rollout.completions)
    finally:
        hook.remove()
    for sampled in (rollout, greedy):
        assert not policy.banned[sampled.completions.ids[sampled.completions.mask]].any()
    torch.testing.assert_close(again, rollout.logp_sampling, rtol=0, atol=1e-10)
    names = policy.tokenizer.convert_ids_to_tokens(policy.banned.nonzero().flatten().tolist())
    assert {"<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>",
            "<|endoftext|>"} <= set(names)
    assert not policy.banned[policy.end_id]


def test_swapping_or_removing_the_video_changes_what_is_sampled(policy):
    question = "what colour comes first"
    outputs = [sample_groups(policy, [policy.prompt(question, features)], 3, 6, generator=seeded())
               for features in (policy.encode(make_clip(1)), policy.encode(make_clip(2)), policy.encode())]
    first = [output.logp_sampling[..., 0] for output in outputs]
    assert (first[0] - first[1]).abs().max() > 1e-3 and (first[0] - first[2]).abs().max() > 1e-3


def test_reference_rollouts_come_from_the_model_without_its_adapter(policy, prompts):
    rollout = sample_groups(policy, prompts, 3, 6, generator=seeded(), reference=True)
    torch.testing.assert_close(policy.logprobs(prompts, rollout.completions, reference=True), rollout.logp_sampling,
                               rtol=0, atol=1e-10)
    assert (policy.logprobs(prompts, rollout.completions) - rollout.logp_sampling).abs().max() > 1e-3


def test_choose_draws_from_the_distribution():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    uniform = torch.rand(20000, dtype=torch.float64, generator=seeded())
    counts = torch.bincount(choose(probabilities.log().expand(20000, -1), uniform), minlength=6) / 20000
    torch.testing.assert_close(counts, probabilities, rtol=0, atol=0.015)
    assert (counts[probabilities == 0] == 0).all()


@pytest.mark.parametrize("uniform", (0.0, 1 - 2**-53))
def test_choose_never_takes_an_impossible_token(uniform):
    logp = torch.log_softmax(torch.randn(50, 9, generator=seeded()).index_fill(1, torch.tensor([0, 4, 8]), -torch.inf),
                             dim=-1)
    token = choose(logp, torch.full((50,), uniform, dtype=torch.float64))
    assert torch.isfinite(logp.gather(-1, token[:, None])).all()
    assert torch.equal(choose(logp, None), logp.argmax(-1))


@pytest.mark.parametrize("options, told", (
    ({"temperature": 0.0}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"group_size": 0}, "group_size"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
))
def test_impossible_options(policy, prompts, options, told):
    with pytest.raises(ConfigError, match=told):
        sample_groups(policy, prompts, **{"group_size": 2, "max_new_tokens": 2, **options})
