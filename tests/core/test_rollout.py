r"""Sampling: transformers' generate token for token, the training pass's log-probs, the distribution, banned tokens."""

import pytest
import torch

import dvr1_lite.rollout as rollout_module
from dvr1_lite.errors import ConfigError
from dvr1_lite.families import FAMILIES
from dvr1_lite.loading import LoraSettings
from dvr1_lite.policy import Policy
from dvr1_lite.rollout import choose, sample_groups
from dvr1_lite.video import patchify
from tests.tiny import add_noise_to_lora, make_clip, write_model


@pytest.fixture(scope="module", params=FAMILIES)
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
    r"""Make the end token so likely that completions end at different lengths."""
    bonus = torch.zeros(len(policy.banned), dtype=torch.float64)
    bonus[policy.end_id] = 2.5
    hook = policy.core.lm_head.register_forward_hook(lambda module, given, logits: logits + bonus)
    yield
    hook.remove()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- greedy decoding -------------------------------------------------------------------------------------------------


def generate(policy, prompt, clip, length):
    r"""Decode one prompt greedily by transformers' `generate`, from the pixels; token ids up to the end token."""
    ids = prompt.input_ids[None]
    patches, grid = patchify(clip.frames, **policy.preprocessing)
    given = {"pixel_values_videos": patches.double(), "video_grid_thw": grid[None],
             "mm_token_type_ids": (ids == policy.config.video_token_id).long() * 2}
    if policy.config.model_type == "qwen2_5_vl":
        given["second_per_grid_ts"] = torch.tensor([policy.preprocessing["temporal_patch_size"] / clip.fps])
    policy.model.eval()
    found = policy.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length,
        suppress_tokens=policy.banned.nonzero().flatten().tolist(), **given)[0, ids.shape[1]:]
    policy.model.train()
    return found.tolist()


@pytest.mark.parametrize("frames, fps", [(4, 2.0), (24, 0.25), (40, 1.0)])
def test_greedy_decoding_is_transformers_generate(policy, frames, fps):
    clips = [make_clip(seed, frames=frames, fps=fps) for seed in (1, 2, 3)]
    asked = [policy.prompt(text, policy.encode(clip)) for text, clip in zip(("what", "red", "what colour"), clips)]
    if frames > 4 and policy.config.model_type != "qwen3_vl":  # the clip's last time lies beyond the last text position
        assert all(int(prompt.position_ids.max()) > prompt.next_position for prompt in asked)
    rollout = sample_groups(policy, asked, 2, 12, greedy=True)
    for b, (prompt, clip) in enumerate(zip(asked, clips)):
        expected = generate(policy, prompt, clip, 12)
        for g in range(2):
            assert rollout.completions.ids[b, g][rollout.completions.mask[b, g]].tolist() == expected


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", (1.0, 0.6, 1.7))
def test_log_probs_of_sampling_are_those_of_the_training_pass(policy, prompts, temperature):
    rollout = sample_groups(policy, prompts, 5, 9, temperature=temperature, generator=seeded())
    again = policy.logprobs(prompts, rollout.completions, temperature=temperature)
    torch.testing.assert_close(rollout.logp, again.detach(), rtol=0, atol=1e-10)
    with policy.reference():
        rollout = sample_groups(policy, prompts, 3, 6, generator=seeded())
        reference = policy.logprobs(prompts, rollout.completions).detach()
    torch.testing.assert_close(rollout.logp, reference, rtol=0, atol=1e-10)
    assert (policy.logprobs(prompts, rollout.completions) - reference).abs().max() > 1e-3


def test_shapes_masks_texts_and_ends(policy, prompts, ending):
    rollout = sample_groups(policy, prompts, 6, 40, generator=seeded(3))
    ids, mask = rollout.completions.ids, rollout.completions.mask
    assert ids.shape == mask.shape == rollout.logp.shape and ids.shape[:2] == (3, 6)
    assert int(mask.sum(-1).max()) == ids.shape[2] and rollout.finished.any()
    for b in range(3):
        for g in range(6):
            row = ids[b, g][mask[b, g]]
            assert rollout.finished[b, g] == (row[-1] == policy.end_id)
            assert policy.end_id not in row[:-1] and (ids[b, g][~mask[b, g]] == policy.pad_id).all()
            assert rollout.texts[b][g] == policy.tokenizer.decode(row, skip_special_tokens=True)
            assert "<|" not in rollout.texts[b][g]


def test_the_same_seed_gives_the_same_rollout(policy, prompts):
    first, second, other = (sample_groups(policy, prompts, 4, 8, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.completions.ids, second.completions.ids) and torch.equal(first.logp, second.logp)
    assert first.texts != other.texts


def test_sharing_equal_beginnings_changes_nothing(policy, prompts, ending, monkeypatch):
    shared, calls = sample_groups(policy, prompts, 6, 30, generator=seeded(5)), []
    assert len(set(shared.completions.mask.sum(-1).flatten().tolist())) > 3

    def all_differ(x, **_):
        calls.append(len(x))
        return x, torch.arange(len(x))

    monkeypatch.setattr(rollout_module.torch, "unique", all_differ)
    apart = sample_groups(policy, prompts, 6, 30, generator=seeded(5))
    assert calls and torch.equal(shared.completions.ids, apart.completions.ids)
    torch.testing.assert_close(shared.logp, apart.logp, rtol=0, atol=1e-12)


def test_a_step_costs_its_different_beginnings(policy, prompts, ending, monkeypatch):
    widths, forward = [], policy.forward
    monkeypatch.setattr(policy, "forward", lambda x, *rest, **more: (
        widths.append(len(x)) or forward(x, *rest, **more)))
    rollout = sample_groups(policy, prompts, 6, 30, generator=seeded(5))
    rows = [(i // 6, tuple(row[keep].tolist())) for i, (row, keep) in enumerate(
        zip(rollout.completions.ids.flatten(0, 1), rollout.completions.mask.flatten(0, 1)))]
    beginnings = [len({(group, row[:length]) for group, row in rows if len(row) > length})
                  for length in range(1, max(len(row) for _, row in rows))]
    assert widths == [3, *beginnings] and beginnings[-1] < 18
    widths.clear()
    sample_groups(policy, prompts, 8, 5, greedy=True)
    assert set(widths) <= {1, 2, 3}  # greedy rows of a group never differ


def test_banned_tokens_never_appear_even_if_the_model_prefers_them(policy, prompts):
    wanted = policy.banned.double() * 50.0
    hook = policy.core.lm_head.register_forward_hook(lambda module, given, logits: logits + wanted)
    try:
        rollout = sample_groups(policy, prompts, 8, 20, generator=seeded(2))
        greedy = sample_groups(policy, prompts, 1, 20, greedy=True)
        again = policy.logprobs(prompts, rollout.completions).detach()
    finally:
        hook.remove()
    for sampled in (rollout, greedy):
        assert not policy.banned[sampled.completions.ids[sampled.completions.mask]].any()
    torch.testing.assert_close(again, rollout.logp, rtol=0, atol=1e-10)


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


@pytest.mark.parametrize("options, expected", (
    ({"temperature": 0.0}, "temperature is 0.0"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"group_size": 0}, "group_size is 0"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0")))
def test_impossible_options(policy, prompts, options, expected):
    with pytest.raises(ConfigError, match=expected):
        sample_groups(policy, prompts, **{"group_size": 2, "max_new_tokens": 2, **options})
