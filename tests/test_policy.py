r"""The policy against transformers' own forward: positions, features, log-probs, gradients, and the traps of others."""

import contextlib
import json
import shutil

import pytest
import torch
import transformers
from packaging import version
from tiny import add_noise_to_lora, make_clip, write_model

import dvr1_lite.policy as policy_module
from dvr1_lite.errors import ConfigError, ModelError, NumericsError, RecordError
from dvr1_lite.policy import (
    Completions,
    Distinct,
    FeatureCache,
    Features,
    LoraSettings,
    Packing,
    Policy,
    VisualPart,
    rope_positions,
    spread,
)
from dvr1_lite.rollout import sample_groups

FAMILIES = ("qwen2_5_vl", "qwen2_vl")
LORA = LoraSettings(rank=3, alpha=6)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def policy(folder):
    loaded = Policy.load(folder, lora=LORA, dtype="float64")
    add_noise_to_lora(loaded.model)
    return loaded


@pytest.fixture(scope="module")
def qwen25(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("qwen25"))


def make_prompts(policy, seed=0):
    r"""Three prompts of different length: a video, a video with an image and a hint, and text alone."""
    video, image = make_clip(seed + 1), make_clip(seed + 2, frames=2, fps=0.7)
    return [
        policy.prompt("what colour comes first", policy.encode(video)),
        policy.prompt("what colour comes then hint red _ _", policy.encode(video, image=image.frames[0])),
        policy.prompt("red", policy.encode()),
    ]


def make_completions(policy, groups=3, copies=4, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    allowed = (~policy.banned).nonzero().flatten()
    lists = [[allowed[torch.randint(len(allowed), (1 + int(torch.randint(length, (1,), generator=generator)),),
                                    generator=generator)].tolist() for _ in range(copies)] for _ in range(groups)]
    lists[0][0] = allowed[:length].tolist()  # at least one of full length
    return Completions.from_lists(lists, policy.pad_id)


def group_objective(logp):
    r"""Something with statistics over each group, as Reg-GRPO has, so that no completion's gradient stands alone."""
    total = logp.sum(-1) / 10
    standard = (total - total.mean(1, keepdim=True)) / (total.var(1, keepdim=True) + 0.1).sqrt()
    target = torch.linspace(-1, 1, total.shape[1]).to(total)
    return ((standard - target) ** 2).mean() + 0.01 * (logp.exp() ** 2).mean(), {"spread": float(total.detach().std())}


def gradient(policy) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in policy.trainable()])


def backward(policy, *arguments, **keywords):
    policy.model.zero_grad()
    return policy.backward(*arguments, **keywords)


def relative(a, b) -> float:
    return float((a - b).abs().max() / b.abs().max())


# --------------------------------------------------------------------------------- transformers' way, prompt repeated


def repeated_forward(policy, model, prompts, completions, clips, side, temperature=1.0):
    r"""Log-probs (B, G, T) by transformers' own forward: every row has prompt, pixels and completion of its own."""
    rows, types, masks = [], [], []
    kinds = {policy.config.image_token_id: 1, policy.config.video_token_id: 2}
    for b, prompt in enumerate(prompts):
        for g in range(completions.ids.shape[1]):
            tokens = prompt.input_ids.tolist() + completions.ids[b, g][completions.mask[b, g]].tolist()
            rows.append(tokens)
            types.append([kinds.get(token, 0) for token in tokens])
    longest = max(map(len, rows))
    pads = [longest - len(row) for row in rows]
    fill = (lambda row, n, x: [x] * n + row) if side == "left" else (lambda row, n, x: row + [x] * n)
    ids = torch.tensor([fill(row, n, policy.pad_id) for row, n in zip(rows, pads)])
    masks = torch.tensor([fill([1] * len(row), n, 0) for row, n in zip(rows, pads)])
    types = torch.tensor([fill(row, n, 0) for row, n in zip(types, pads)])
    logits = model(input_ids=ids, attention_mask=masks, mm_token_type_ids=types,
                   **pixels(policy, clips, completions.ids.shape[1])).logits
    logp = torch.log_softmax((logits / temperature).masked_fill(policy.banned, -torch.inf), -1)
    out = torch.zeros(completions.ids.shape, dtype=logp.dtype)
    for row, prompt_index in enumerate(b for b in range(len(prompts)) for _ in range(completions.ids.shape[1])):
        g, start = row % completions.ids.shape[1], pads[row] if side == "left" else 0
        tokens = completions.ids[prompt_index, g][completions.mask[prompt_index, g]]
        at = start + len(prompts[prompt_index].input_ids) - 1 + torch.arange(len(tokens))
        out[prompt_index, g, :len(tokens)] = logp[row, at].gather(-1, tokens[:, None])[:, 0]
    return out


def pixels(policy, clips, copies):
    from dvr1_lite.video import patchify

    videos, images = [], []
    for clip, image in clips:
        for _ in range(copies):
            if clip is not None:
                seconds = policy.preprocessing["temporal_patch_size"] / clip.fps
                videos.append((*patchify(clip.frames, **policy.preprocessing), seconds))
            if image is not None:
                images.append(patchify(image[None], **policy.preprocessing))
    given = {}
    if videos:
        given = {"pixel_values_videos": torch.cat([v[0] for v in videos]).double(),
                 "video_grid_thw": torch.stack([v[1] for v in videos])}
        if policy.config.model_type == "qwen2_5_vl":
            given["second_per_grid_ts"] = torch.tensor([v[2] for v in videos])
    if images:
        given |= {"pixel_values": torch.cat([i[0] for i in images]).double(),
                  "image_grid_thw": torch.stack([i[1] for i in images])}
    return given


@pytest.fixture(scope="module")
def plain(folder, policy, tmp_path_factory):
    r"""The same model and adapter through transformers and peft alone."""
    from peft import PeftModel

    adapter = tmp_path_factory.mktemp("adapter")
    policy.save_adapter(adapter)
    kind = getattr(transformers, policy_module.FAMILIES[policy.config.model_type])
    model = kind.from_pretrained(folder, dtype=torch.float64)
    return PeftModel.from_pretrained(model, adapter, is_trainable=True)


CLIPS = [(make_clip(1), None), (make_clip(1), make_clip(2, frames=2, fps=0.7).frames[0]), (None, None)]


@pytest.mark.parametrize("side", ("left", "right"))
def test_shared_prefix_equals_the_repeated_prompt(policy, plain, side):
    prompts, completions = make_prompts(policy), make_completions(policy)
    expected = repeated_forward(policy, plain, prompts, completions, CLIPS, side, temperature=0.8)
    logp = policy.logprobs(prompts, completions, temperature=0.8)
    torch.testing.assert_close(logp, expected.detach(), rtol=0, atol=1e-7)
    with plain.disable_adapter(), torch.no_grad():
        reference = repeated_forward(policy, plain, prompts, completions, CLIPS, side, temperature=0.8)
    torch.testing.assert_close(policy.logprobs(prompts, completions, reference=True, temperature=0.8), reference,
                               rtol=0, atol=1e-7)
    loss, _ = group_objective(expected)
    plain.zero_grad()
    loss.backward()
    ours, _, _ = backward(policy, prompts, completions, group_objective, temperature=0.8)
    theirs = torch.cat([p.grad.flatten() for p in plain.parameters() if p.requires_grad])
    assert ours == pytest.approx(float(loss.detach()), abs=1e-9)
    assert relative(gradient(policy), theirs) < 1e-7


@pytest.mark.parametrize("layout", ("video", "slow video", "image", "mixed", "text"))
def test_positions_are_those_of_transformers(policy, layout):
    if layout in ("slow video", "mixed") and version.parse(transformers.__version__) < version.parse("5.23"):
        pytest.skip("transformers 5.3 to 5.22 cuts seconds_per_grid down to whole seconds")
    clip = {"video": make_clip(1, frames=6), "slow video": make_clip(1, frames=6, fps=0.35),
            "mixed": make_clip(1, frames=4, fps=1.3)}.get(layout)
    image = make_clip(2, size=84).frames[0] if layout in ("image", "mixed") else None
    prompt = policy.prompt("what colour", policy.encode(clip, image))
    kinds = {policy.config.image_token_id: 1, policy.config.video_token_id: 2}
    types = torch.tensor([[kinds.get(token, 0) for token in prompt.input_ids.tolist()]])
    given = {key: value for key, value in pixels(policy, [(clip, image)], 1).items() if not key.startswith("pixel")}
    expected, delta = policy.core.model.get_rope_index(prompt.input_ids[None], mm_token_type_ids=types, **given)
    assert torch.equal(prompt.position_ids, expected[:, 0])
    assert prompt.next_position == int(delta) + len(prompt.input_ids)


def test_text_after_a_long_video_starts_where_it_is_told_to():
    video = VisualPart("video", torch.zeros(8, 4), (8, 2, 2), seconds_per_grid=2.0)
    grid, after_grid = rope_positions([2, video, 1], 2, 2)
    most, after_most = rope_positions([2, video, 1], 2, 2, after_video="max")
    assert grid[0].tolist() == [0, 1, 2, 6, 10, 14, 18, 22, 26, 30, 3] and after_grid == 31
    assert most[0].tolist() == [0, 1, 2, 6, 10, 14, 18, 22, 26, 30, 31] and after_most == 32


def test_features_are_those_of_transformers_and_detached(policy):
    clip = make_clip(3)
    part = policy.encode(clip).parts[0]
    given = pixels(policy, [(clip, None)], 1)
    theirs = policy.core.model.get_video_features(given["pixel_values_videos"], given["video_grid_thw"])
    torch.testing.assert_close(part.embeds, theirs.pooler_output[0])
    assert not part.embeds.requires_grad and part.grid == (2, 4, 4)
    assert policy.preprocessing["mean"] == (0.5, 0.4, 0.3)  # from preprocessor_config.json, not CLIP's


def test_preprocessing_falls_back_to_the_vision_config(qwen25, tmp_path):
    shutil.copytree(qwen25, tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    said = Policy.load(tmp_path / "model").preprocessing
    assert (said["patch_size"], said["merge_size"], said["temporal_patch_size"]) == (14, 2, 2)
    assert said["mean"][0] == pytest.approx(0.48145466) and said["std"][2] == pytest.approx(0.27577711)


# --------------------------------------------------------------------------------------------- invariances, exactness


def test_log_probs_do_not_depend_on_the_other_groups(policy):
    prompts, completions = make_prompts(policy), make_completions(policy)
    together = policy.logprobs(prompts, completions)
    for b, prompt in enumerate(prompts):
        alone = policy.logprobs([prompt], Completions(completions.ids[b:b + 1], completions.mask[b:b + 1]))
        torch.testing.assert_close(alone, together[b:b + 1], rtol=0, atol=1e-12)
    assert (together[~completions.mask] == 0).all() and (together[completions.mask] < 0).all()


def test_padding_tokens_of_completions_do_not_matter(policy):
    prompts, completions = make_prompts(policy), make_completions(policy)
    wider = Completions(torch.nn.functional.pad(completions.ids, (0, 3), value=9),
                        torch.nn.functional.pad(completions.mask, (0, 3)))
    torch.testing.assert_close(policy.logprobs(prompts, wider)[..., :-3], policy.logprobs(prompts, completions),
                               rtol=0, atol=1e-12)


@pytest.mark.parametrize("micro_batch", (1, 2, 3, 4, 5, 8, 12, 100))
def test_micro_batches_give_the_full_gradient(policy, micro_batch):
    prompts, completions = make_prompts(policy), make_completions(policy)
    loss, stats, logp = backward(policy, prompts, completions, group_objective)
    whole = gradient(policy)
    loss_micro, stats_micro, logp_micro = backward(policy, prompts, completions, group_objective,
                                                   micro_batch=micro_batch)
    assert relative(gradient(policy), whole) < 1e-10
    assert loss_micro == pytest.approx(loss, abs=1e-12) and stats_micro == pytest.approx(stats)
    torch.testing.assert_close(logp_micro, logp, rtol=0, atol=1e-12)
    direct = policy.logprobs(prompts, completions, with_grad=True, micro_batch=micro_batch)
    policy.model.zero_grad()
    group_objective(direct)[0].backward()
    assert relative(gradient(policy), whole) < 1e-10


def test_detached_group_statistics_would_be_wrong(policy):
    r"""A loss per completion with the group's mean and spread held fixed is the naive way to micro-batch."""
    prompts, completions = make_prompts(policy), make_completions(policy)
    backward(policy, prompts, completions, group_objective)
    exact = gradient(policy)

    def naive(logp):
        total = logp.sum(-1) / 10
        mean, spread = total.detach().mean(1, keepdim=True), (total.detach().var(1, keepdim=True) + 0.1).sqrt()
        target = torch.linspace(-1, 1, total.shape[1]).to(total)
        return (((total - mean) / spread - target) ** 2).mean() + 0.01 * (logp.exp() ** 2).mean(), {}

    backward(policy, prompts, completions, naive)
    assert relative(gradient(policy), exact) > 0.05


@pytest.mark.parametrize("micro_batch", (None, 3))
def test_checkpointing_is_exact(policy, micro_batch):
    prompts, completions = make_prompts(policy), make_completions(policy)
    backward(policy, prompts, completions, group_objective)
    whole = gradient(policy)
    calls = 0

    def counting(*arguments, **keywords):
        nonlocal calls
        calls += 1
        return real(*arguments, **keywords)

    real, policy.gradient_checkpointing = policy_module.checkpoint, True
    policy_module.checkpoint = counting
    try:
        backward(policy, prompts, completions, group_objective, micro_batch=micro_batch)
    finally:
        policy_module.checkpoint, policy.gradient_checkpointing = real, False
    assert calls and relative(gradient(policy), whole) < 1e-10


def test_logits_in_chunks_are_exact(policy, monkeypatch):
    prompts, completions = make_prompts(policy), make_completions(policy)
    backward(policy, prompts, completions, group_objective)
    whole = gradient(policy)
    monkeypatch.setattr(policy_module, "LOGIT_CHUNK", 5 * len(policy.banned))
    backward(policy, prompts, completions, group_objective)
    assert relative(gradient(policy), whole) < 1e-10


def test_eager_attention_is_the_same(folder, policy):
    prompts, completions = make_prompts(policy), make_completions(policy)
    eager = Policy.load(folder, lora=LORA, dtype="float64", attention="eager")
    add_noise_to_lora(eager.model)
    torch.testing.assert_close(eager.logprobs(prompts, completions), policy.logprobs(prompts, completions), rtol=0,
                               atol=1e-9)


@pytest.mark.parametrize("groups", (1, 3))
def test_flash_attention_is_the_same(folder, policy, groups, monkeypatch):
    prompts, completions = make_prompts(policy)[:groups], make_completions(policy, groups)
    flash = Policy.load(folder, lora=LORA, dtype="float64", attention="flash")
    add_noise_to_lora(flash.model)
    masks, real = [], flash._completion_mask
    monkeypatch.setattr(flash, "_completion_mask", lambda *given: masks.append(real(*given)) or masks[-1])
    ours = backward(flash, prompts, completions, group_objective)[2]
    assert (masks[0] is None) == (groups == 1)  # prompts of different lengths are padded, and need one
    expected = backward(policy, prompts, completions, group_objective)[2]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)
    assert relative(gradient(flash), gradient(policy)) < 1e-7
    sampled = [sample_groups(one, prompts, 3, 5, generator=torch.Generator().manual_seed(0)).completions.ids
               for one in (flash, policy)]
    assert torch.equal(*sampled)


def test_packing_keeps_order_and_zeros():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    packing = Packing(mask.flatten().nonzero().squeeze(-1), 3, 3)
    x = torch.randn(3, 3, 2, 5) * mask[..., None, None]
    packed = packing.pack(x)
    assert packed.shape == (1, 6, 2, 5)
    assert torch.equal(packing.unpack(packed.transpose(1, 2)).transpose(1, 2), x)


def double_norm(norm, x):
    return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def test_equal_completions_run_once(policy, monkeypatch):
    # Transformers' norm rounds to float32 in a float64 model too, and a sum is not rounded as its terms are.
    monkeypatch.setattr(type(policy.language.norm), "forward", double_norm)
    prompts, completions = make_prompts(policy), make_completions(policy)
    ids, mask = completions.ids.clone(), completions.mask.clone()
    ids[0, 2], mask[0, 2] = ids[0, 0], mask[0, 0]
    ids[1], mask[1] = ids[1, 0].clone(), mask[1, 0].clone()
    ids[2, 0], mask[2, 0] = ids[0, 0], mask[0, 0]  # equal to one of another group: another prompt, so no copy
    ids[1, 3][~mask[1, 3]] = 9  # what stands in the padding makes no difference
    backward(policy, prompts, Completions(ids, mask), group_objective)
    merged, seen = gradient(policy), []
    real = policy._completion_logp
    monkeypatch.setattr(policy, "_completion_logp",
                        lambda prefix, rows, *rest: seen.append(len(rows)) or real(prefix, rows, *rest))
    logp = backward(policy, prompts, Completions(ids, mask), group_objective, micro_batch=5)[2]
    assert sum(seen) == 2 * (3 + 1 + 4) and relative(gradient(policy), merged) < 1e-10
    assert torch.equal(logp[0, 2], logp[0, 0]) and not torch.equal(logp[2, 0], logp[0, 0])

    def every_one(cls, ids, mask):
        group = torch.arange(len(ids)).repeat_interleave(ids.shape[1])
        place = torch.arange(len(group))
        return cls(ids.flatten(0, 1).clone(), mask.flatten(0, 1).clone(), group, place, tuple(ids.shape))

    monkeypatch.setattr(Distinct, "of", classmethod(every_one))
    separate = backward(policy, prompts, Completions(ids, mask), group_objective)[2]
    assert seen[-1] == 12 and relative(merged, gradient(policy)) < 1e-10
    torch.testing.assert_close(logp, separate, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size, expected", ((1, 6), (2, 3), (3, 2), (4, 2), (6, 1), (9, 1), (None, 1)))
def test_blocks_cover_everything_once(size, expected):
    ids = torch.arange(6).view(2, 3, 1)
    distinct = Distinct.of(ids, torch.ones_like(ids, dtype=torch.bool))
    blocks = list(distinct.blocks(size))
    assert len(blocks) == expected
    assert [row for rows, _, _ in blocks for row in range(rows.start, rows.stop)] == list(range(6))
    for rows, groups, copies in blocks:
        assert size is None or rows.stop - rows.start <= size
        owners = spread(torch.arange(2)[groups], copies)
        assert torch.equal(owners, distinct.group[rows])
    assert torch.equal(distinct.everywhere(distinct.ids), ids)


# ----------------------------------------------------------------------------------------------------- others' traps


def four_passes(policy, prompts, completions):
    r"""The log-probs of the same completions in sampling's decoder, the old, the reference and the training pass."""
    from dvr1_lite.rollout import _Decoder

    with torch.no_grad(), policy.merged():
        decoder = _Decoder(policy, policy.prefill(prompts), completions.ids.shape[2])
        rows = completions.ids.flatten(0, 1)
        decoder.branch(torch.arange(len(prompts)).repeat_interleave(completions.ids.shape[1]))
        sampling = torch.zeros(rows.shape, dtype=torch.float64)
        for step in range(rows.shape[1]):
            logp = policy.log_softmax(decoder.state, 1.0)
            sampling[:, step] = logp.gather(-1, rows[:, step:step + 1])[:, 0]
            decoder.feed(rows[:, step])
    sampling = sampling.view(completions.ids.shape) * completions.mask
    training = backward(policy, prompts, completions, group_objective)[2]
    return {"sampling": sampling, "old": policy.logprobs(prompts, completions),
            "reference": policy.logprobs(prompts, completions, reference=True), "training": training}


def test_every_pass_sees_the_video(folder):
    policy = Policy.load(folder, lora=LORA, dtype="float64")
    completions = make_completions(policy, groups=1)
    completions.mask[:] = True
    completions.ids[:] = completions.ids.masked_fill(policy.banned[completions.ids], 9)
    question = "what colour comes first"
    seen = {name: four_passes(policy, [policy.prompt(question, features)], completions)
            for name, features in (("clip", policy.encode(make_clip(1))), ("other clip", policy.encode(make_clip(2))),
                                   ("no clip", policy.encode()))}
    for passes in seen.values():  # at the start the adapter changes nothing, and all four agree
        for logp in passes.values():
            torch.testing.assert_close(logp, passes["training"], rtol=0, atol=1e-10)
    for name in ("sampling", "old", "reference", "training"):
        assert (seen["clip"][name] - seen["other clip"][name]).abs().max() > 1e-3, name
        assert (seen["clip"][name] - seen["no clip"][name]).abs().max() > 1e-3, name


def test_every_pass_sees_the_seconds_between_frames(qwen25):
    policy = Policy.load(qwen25, lora=LORA, dtype="float64")
    completions = make_completions(policy, groups=1)
    completions.mask[:] = True
    completions.ids[:] = completions.ids.masked_fill(policy.banned[completions.ids], 9)
    fast, slow = (four_passes(policy, [policy.prompt("what", policy.encode(make_clip(1, fps=fps)))], completions)
                  for fps in (2.0, 0.25))
    for name, logp in fast.items():
        assert (logp - slow[name]).abs().max() > 1e-4, name
        torch.testing.assert_close(logp, fast["training"], rtol=0, atol=1e-10)
        torch.testing.assert_close(slow[name], slow["training"], rtol=0, atol=1e-10)


def test_the_adapter_changes_the_policy_but_not_the_reference(folder, policy):
    fresh = Policy.load(folder, lora=LORA, dtype="float64")
    prompts, completions = make_prompts(policy), make_completions(policy)
    start = fresh.logprobs(prompts, completions)
    torch.testing.assert_close(policy.logprobs(prompts, completions, reference=True), start, rtol=0, atol=1e-12)
    assert (policy.logprobs(prompts, completions) - start).abs().max() > 0.01
    assert all(p.requires_grad for p in policy.trainable()) and len(policy.trainable()) == 2 * 2 * 7


def test_one_step_changes_adapters_only_and_only_in_the_language_model(folder):
    policy = Policy.load(folder, lora=LORA)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    optimizer = torch.optim.AdamW(policy.trainable(), lr=1e-2, weight_decay=0.0)
    backward(policy, make_prompts(policy), make_completions(policy), group_objective)
    optimizer.step()
    changed = {name for name, p in policy.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_B" in name and "language_model" in name for name in changed)  # A's gradient is 0 yet
    assert not any("visual" in name or "lm_head" in name for name in before if "lora_" in name)


def test_merged_weights_are_dropped_again(policy):
    prompts, completions = make_prompts(policy), make_completions(policy)
    plain = policy.logprobs(prompts, completions)
    linear = policy.language.layers[0].mlp.up_proj
    with torch.no_grad(), policy.merged():
        assert "forward" in vars(linear)
        torch.testing.assert_close(policy.logprobs(prompts, completions), plain, rtol=0, atol=1e-10)
    assert "forward" not in vars(linear)
    with contextlib.suppress(RuntimeError), torch.no_grad(), policy.merged():
        raise RuntimeError
    assert "forward" not in vars(linear)
    policy.merge_bytes, kept = 0, policy.merge_bytes
    with torch.no_grad(), policy.merged():
        assert "forward" not in vars(linear)
    policy.merge_bytes = kept


# -------------------------------------------------------------------------------------------------- NF4 and adapters


@pytest.fixture(scope="module")
def nf4(folder):
    pytest.importorskip("bitsandbytes")
    loaded = Policy.load(folder, quantization="nf4", lora=LORA)
    add_noise_to_lora(loaded.model)
    return loaded


def test_nf4_quantises_the_language_models_linear_layers_only(nf4):
    import bitsandbytes

    quantised = {name for name, module in nf4.core.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert len(quantised) == 2 * 7 and all("language_model.layers" in name for name in quantised)
    state = nf4.language.layers[0].mlp.up_proj.base_layer.weight.quant_state
    assert state.quant_type == "nf4" and state.nested  # double quantisation


def test_nf4_trains_after_sampling_and_equals_the_repeated_prompt(nf4):
    import bitsandbytes

    prompts = make_prompts(nf4)
    rollout = sample_groups(nf4, prompts, 3, 6, generator=torch.Generator().manual_seed(0))
    nf4.logprobs(prompts, rollout.completions, reference=True)
    nf4.encode(make_clip(5))
    loss, _, logp = backward(nf4, prompts, rollout.completions, group_objective)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in nf4.trainable())
    torch.testing.assert_close(logp, rollout.logp_sampling, rtol=0, atol=1e-4)
    grads = gradient(nf4)
    for module in nf4.core.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            assert not getattr(module.weight.quant_state, "packing_format_for_cpu", False)
    with as_float32():
        direct = repeated_forward(nf4, nf4.model, prompts, rollout.completions, CLIPS, "right")
    torch.testing.assert_close(logp, direct.detach(), rtol=0, atol=1e-4)
    nf4.model.zero_grad()
    group_objective(direct)[0].backward()
    assert relative(grads, gradient(nf4)) < 1e-4


@contextlib.contextmanager
def as_float32():
    double, torch.Tensor.double = torch.Tensor.double, torch.Tensor.float
    try:
        yield
    finally:
        torch.Tensor.double = double


def test_eval_mode_is_undone_before_it_can_pack_the_weights(nf4):
    prompts, completions = make_prompts(nf4), make_completions(nf4)
    nf4.model.eval()
    nf4.logprobs(prompts, completions)
    backward(nf4, prompts, completions, group_objective)
    assert gradient(nf4).abs().max() > 0


def test_adapter_round_trip(policy, folder, tmp_path):
    prompts, completions = make_prompts(policy), make_completions(policy)
    policy.save_adapter(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json",
                                                                       "adapter_model.safetensors"}
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(folder)
    again = Policy.load(folder, adapter=tmp_path / "adapter", dtype="float64")
    torch.testing.assert_close(again.logprobs(prompts, completions), policy.logprobs(prompts, completions))
    assert len(again.trainable()) == len(policy.trainable())


def test_merged_adapter_is_the_same_model(policy, plain):
    import copy

    prompts, completions = make_prompts(policy), make_completions(policy)
    merged = copy.deepcopy(plain).merge_and_unload()
    with torch.no_grad():
        logp = repeated_forward(policy, merged, prompts, completions, CLIPS, "right")
    torch.testing.assert_close(logp, policy.logprobs(prompts, completions), rtol=0, atol=1e-8)


def test_adapter_initialisation_is_seeded(qwen25):
    torch.manual_seed(1)
    first = [p.detach().clone() for p in Policy.load(qwen25, lora=LORA).trainable()]
    torch.manual_seed(2)
    second = Policy.load(qwen25, lora=LORA).trainable()
    other = Policy.load(qwen25, lora=LoraSettings(rank=3, seed=5)).trainable()
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))


# ------------------------------------------------------------------------------------------------- prompts and caches


def test_prompt_has_one_token_for_each_feature(policy):
    features = policy.encode(make_clip(1, frames=6), image=make_clip(2, size=84).frames[0])
    prompt = policy.prompt("what colour", features)
    ids = prompt.input_ids.tolist()
    assert ids.count(policy.config.video_token_id) == 3 * 4 == len(features.parts[0].embeds)
    assert ids.count(policy.config.image_token_id) == 9 == len(features.parts[1].embeds)
    assert policy.tokenizer.decode(ids).endswith("what colour <|im_end|> <|im_start|> assistant")
    assert prompt.position_ids.shape == (3, len(ids))


def test_a_question_cannot_smuggle_in_control_tokens(policy):
    for word in ("<|video_pad|>", "<|im_end|>", "<|im_start|>", "<|endoftext|>"):
        with pytest.raises(RecordError, match="control token"):
            policy.prompt(f"what {word} colour")


def test_a_template_without_videos_is_refused(policy, monkeypatch):
    monkeypatch.setattr(policy.tokenizer, "chat_template", "{{ messages[0]['content'][-1]['text'] }}")
    with pytest.raises(ModelError, match="chat template"):
        policy.prompt("what", policy.encode(make_clip(1)))


def test_feature_cache_stays_within_its_bytes(policy):
    size = policy.encode(make_clip(0)).nbytes
    cache, built = FeatureCache(max_bytes=2 * size), []

    def build(index):
        built.append(index)
        return policy.encode(make_clip(index))

    for index in (0, 1, 0, 2, 0, 1):  # 1 is the least recently used when 2 comes, then 2 when 1 comes back
        features = cache.get(("clip", index), lambda index=index: build(index))
        assert torch.equal(features.parts[0].embeds, policy.encode(make_clip(index)).parts[0].embeds)
        assert cache.nbytes <= cache.max_bytes and len(cache) <= 2
    assert built == [0, 1, 2, 1] and (cache.hits, cache.misses) == (2, 4)
    with pytest.raises(ConfigError, match="the features of clip take .* feature_cache_mb .*max_feature_bytes"):
        FeatureCache(max_bytes=size - 1).get("clip", lambda: policy.encode(make_clip(0)))


def test_encode_reads_a_cached_clip_once(policy):
    reads = []

    def read():
        reads.append(1)
        return make_clip(7)

    first = policy.encode(read, key=("clip7", "none", 0))
    assert policy.encode(read, key=("clip7", "none", 0)) is first and len(reads) == 1
    assert policy.encode(read, key=("clip7", "noise", 3)) is not first and len(reads) == 2


# ---------------------------------------------------------------------------------------------------------- bad input


def test_non_finite_log_probs_name_the_group(policy):
    prompts, completions = make_prompts(policy), make_completions(policy)
    completions.ids[1, 0, 0] = policy.config.video_token_id  # never sampled, so its log-prob is -inf
    with pytest.raises(NumericsError, match="group 1.*hint red"):
        policy.backward(prompts, completions, group_objective)


def test_non_finite_loss_stops(policy):
    with pytest.raises(NumericsError, match="loss"):
        policy.backward(make_prompts(policy), make_completions(policy), lambda logp: (logp.sum() * torch.nan, {}))


def test_micro_batch_below_one(policy):
    with pytest.raises(ConfigError, match="micro_batch"):
        policy.logprobs(make_prompts(policy), make_completions(policy), micro_batch=0)


def test_unloadable_models_say_what_to_do(qwen25, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="no model folder"):
        Policy.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="config.json"):
        Policy.load(tmp_path / "empty")
    shutil.copytree(qwen25, tmp_path / "bare")
    weights = tmp_path / "bare" / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    (tmp_path / "bare" / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="no weights.*safetensors"):
        Policy.load(tmp_path / "bare")
    weights.write_bytes(whole[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        Policy.load(tmp_path / "bare")
    config = json.loads((qwen25 / "config.json").read_text())
    (tmp_path / "bare" / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ModelError, match="llama.*qwen2_5_vl"):
        Policy.load(tmp_path / "bare")


@pytest.mark.parametrize("error, told", (
    (OSError("We couldn't connect to 'https://huggingface.co' to load the files"), "out of reach.*local|folder"),
    (OSError("You are trying to access a gated repo."), "gated.*log in"),
    (OSError("x is not a local folder and is not a valid model identifier listed on the hub"), "neither a local"),
))
def test_hub_errors_are_told_apart(monkeypatch, error, told):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(ModelError, match=told):
        Policy.load("someone/some-model")


def test_missing_bitsandbytes_names_the_way_without(qwen25, monkeypatch):
    real = policy_module.importlib.util.find_spec
    monkeypatch.setattr(policy_module.importlib.util, "find_spec",
                        lambda name, *rest: None if name == "bitsandbytes" else real(name, *rest))
    with pytest.raises(ModelError, match="quantization: none"):
        Policy.load(qwen25, quantization="nf4")


@pytest.mark.parametrize("options, error, told", (
    ({"quantization": "nf4", "dtype": "float64"}, ModelError, "float64"),
    ({"quantization": "int3"}, ConfigError, "none, nf4"),
    ({"dtype": "float8"}, ConfigError, "float32"),
    ({"attention": "fast"}, ConfigError, "sdpa, eager, flash"),
    ({"device": "cuda:7"}, ModelError, "GPU"),
    ({"lora": LoraSettings(rank=0)}, ConfigError, "rank"),
))
def test_impossible_options(qwen25, options, error, told):
    if options.get("device") and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(error, match=told):
        Policy.load(qwen25, **options)


def test_bad_adapters(qwen25, tmp_path):
    with pytest.raises(ModelError, match="adapter_config.json"):
        Policy.load(qwen25, adapter=tmp_path)
    with pytest.raises(ModelError, match="no adapter"):
        Policy.load(qwen25).save_adapter(tmp_path)
    other = Policy.load(write_model(tmp_path / "wide", hidden=64), lora=LORA)
    other.save_adapter(tmp_path / "adapter")
    with pytest.raises(ModelError, match="does not fit"):
        Policy.load(qwen25, adapter=tmp_path / "adapter")


def test_an_empty_turn_has_no_features():
    assert Features().nbytes == 0
