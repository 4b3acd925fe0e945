r"""The policy against transformers' own forward on a repeated prompt: positions, features, log-probs, gradients."""

import contextlib
import hashlib
import json
import os
import shutil

import pytest
import torch
import transformers
from packaging.version import Version

import dvr1_lite.policy as policy_module
from dvr1_lite import loading
from dvr1_lite.config import TrainConfig
from dvr1_lite.data import Record, prompt_text, read_records
from dvr1_lite.errors import ConfigError, ModelError, RecordError
from dvr1_lite.families import FAMILIES, rope_positions
from dvr1_lite.features import FeatureCache, Features, VisualPart
from dvr1_lite.files import data_folder
from dvr1_lite.loading import LoraSettings
from dvr1_lite.policy import Completions, Policy, encode_record
from dvr1_lite.rollout import sample_groups
from dvr1_lite.run import load_policy
from dvr1_lite.video import patchify
from tests.small_run import small_config, write_world
from tests.tiny import add_noise_to_lora, make_clip, write_model

LORA = LoraSettings(rank=3, alpha=6)
CLIPS = [(make_clip(1), None), (make_clip(1), make_clip(2, frames=2).frames[0]), (None, None)]
QUESTIONS = ["what colour comes first", "what colour comes then hint red _ _", "red"]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def policy(folder):
    return load(folder, dtype="float64")


@pytest.fixture(scope="module")
def qwen25(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("qwen25"))


def load(folder, **options):
    loaded = Policy.load(folder, lora=LORA, **options)
    add_noise_to_lora(loaded.model)
    return loaded


def make_prompts(policy):
    r"""Make three prompts of different length: a video, a video with an image and a hint, and text alone."""
    return [policy.prompt(text, policy.encode(*shown)) for text, shown in zip(QUESTIONS, CLIPS)]


def make_completions(policy, groups=3, copies=4, length=7):
    generator = torch.Generator().manual_seed(0)
    allowed = (~policy.banned).nonzero().flatten()
    draw = lambda high, count: torch.randint(high, (count,), generator=generator)
    lists = [[allowed[draw(len(allowed), 1 + int(draw(length, 1)))].tolist() for _ in range(copies)]
             for _ in range(groups)]
    lists[0][0] = allowed[:length].tolist()  # at least one of full length
    return Completions.from_lists(lists, policy.pad_id)


def group_loss(logp):
    r"""Compute a loss with statistics over each group, as Reg-GRPO has."""
    total = logp.sum(-1) / 10
    standard = (total - total.mean(1, keepdim=True)) / (total.var(1, keepdim=True) + 0.1).sqrt()
    target = torch.linspace(-1, 1, total.shape[1]).to(total)
    return ((standard - target) ** 2).mean() + 0.01 * (logp.exp() ** 2).mean()


def gradient(model, logp):
    r"""Backpropagate `group_loss` and return the flat gradient of the adapter, peft's parameters in their order."""
    model.zero_grad()
    group_loss(logp).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def relative(a, b) -> float:
    return float((a - b).abs().max() / b.abs().max())


# --- transformers' way: the prompt repeated for every completion -----------------------------------------------------


def token_types(policy, tokens):
    kinds = {policy.config.image_token_id: 1, policy.config.video_token_id: 2}
    return [kinds.get(token, 0) for token in tokens]


def pixels(policy, clips, copies=1):
    r"""Build the pixel arguments of transformers' forward, each clip and image `copies` times."""
    seconds = policy.preprocessing["temporal_patch_size"]
    videos = [(*patchify(clip.frames, **policy.preprocessing), seconds / clip.fps)
              for clip, _ in clips if clip is not None for _ in range(copies)]
    images = [patchify(image[None], **policy.preprocessing) for _, image in clips if image is not None
              for _ in range(copies)]
    given, dtype = {}, policy.visual.patch_embed.proj.weight.dtype
    if videos:
        given |= {"pixel_values_videos": torch.cat([v[0] for v in videos]).to(dtype),
                  "video_grid_thw": torch.stack([v[1] for v in videos])}
    if videos and policy.config.model_type == "qwen2_5_vl":
        given["second_per_grid_ts"] = torch.tensor([v[2] for v in videos])
    if images:
        given |= {"pixel_values": torch.cat([i[0] for i in images]).to(dtype),
                  "image_grid_thw": torch.stack([i[1] for i in images])}
    return given


def repeated_forward(policy, model, prompts, completions, side, temperature=1.0):
    r"""Compute log-probs (B, G, T) by transformers' forward: every row has prompt, pixels and completion of its own."""
    (groups, copies, _), out = completions.ids.shape, torch.zeros(completions.ids.shape, dtype=torch.float64)
    wanted = [completions.ids[b, g][completions.mask[b, g]] for b in range(groups) for g in range(copies)]
    rows = [prompts[i // copies].input_ids.tolist() + tokens.tolist() for i, tokens in enumerate(wanted)]
    longest = max(map(len, rows))

    def fill(row, value):
        pad = [value] * (longest - len(row))
        return pad + row if side == "left" else row + pad

    logits = model(input_ids=torch.tensor([fill(row, policy.pad_id) for row in rows]),
                   attention_mask=torch.tensor([fill([1] * len(row), 0) for row in rows]),
                   mm_token_type_ids=torch.tensor([fill(token_types(policy, row), 0) for row in rows]),
                   **pixels(policy, CLIPS, copies)).logits
    logp = torch.log_softmax((logits / temperature).masked_fill(policy.banned, -torch.inf), -1)
    for i, tokens in enumerate(wanted):
        start = longest - len(rows[i]) if side == "left" else 0
        at = start + len(prompts[i // copies].input_ids) - 1 + torch.arange(len(tokens))
        out[i // copies, i % copies, :len(tokens)] = logp[i, at].gather(-1, tokens[:, None])[:, 0]
    return out


@pytest.fixture(scope="module")
def truth(folder, policy, tmp_path_factory):
    r"""Log-probs, reference log-probs and gradient from transformers and peft alone, prompts left- and right-padded."""
    from peft import PeftModel

    adapter = tmp_path_factory.mktemp("adapter")
    policy.save_adapter(adapter)
    kind = getattr(transformers, FAMILIES[policy.config.model_type].model_class)
    model = PeftModel.from_pretrained(kind.from_pretrained(folder, dtype=torch.float64), adapter, is_trainable=True)
    prompts, completions = make_prompts(policy), make_completions(policy)
    logp = repeated_forward(policy, model, prompts, completions, "left", 0.8)
    with model.disable_adapter(), torch.no_grad():
        reference = repeated_forward(policy, model, prompts, completions, "right", 0.8)
    with torch.no_grad():
        other_side = repeated_forward(policy, model, prompts, completions, "right", 0.8)
    torch.testing.assert_close(logp, other_side, rtol=0, atol=1e-7)
    return logp.detach(), reference, gradient(model, logp)


@pytest.fixture(scope="module")
def checkpointed(folder):
    return load(folder, dtype="float64", gradient_checkpointing=True)


@pytest.mark.parametrize("micro_batch", (None, 1, 2, 3))
@pytest.mark.parametrize("kind", ("policy", "checkpointed"))
def test_log_probs_and_gradients_equal_the_repeated_prompt(kind, micro_batch, truth, request):
    ours, (expected, reference, expected_gradient) = request.getfixturevalue(kind), truth
    prompts, completions = make_prompts(ours), make_completions(ours)
    options = {"temperature": 0.8, "micro_batch": micro_batch}
    logp = ours.logprobs(prompts, completions, **options)
    torch.testing.assert_close(logp.detach(), expected, rtol=0, atol=1e-7)
    assert relative(gradient(ours.model, logp), expected_gradient) < 1e-7
    with torch.no_grad(), ours.reference():
        without = ours.logprobs(prompts, completions, **options)
    torch.testing.assert_close(without, reference, rtol=0, atol=1e-7)
    assert (expected - reference).abs().max() > 0.01 and (expected[~completions.mask] == 0).all()


def test_logits_in_chunks_give_the_same_gradient(policy, truth, monkeypatch):
    runs, real = [], policy_module.checkpoint
    monkeypatch.setattr(policy_module, "LOGIT_CHUNK", 5 * len(policy.banned))
    monkeypatch.setattr(policy_module, "checkpoint", lambda *a, **k: runs.append(len(a[1])) or real(*a, **k))
    completions = make_completions(policy)
    logp = policy.logprobs(make_prompts(policy), completions, temperature=0.8)
    torch.testing.assert_close(logp.detach(), truth[0], rtol=0, atol=1e-7)
    assert relative(gradient(policy.model, logp), truth[2]) < 1e-7
    assert max(runs) == 5 and sum(runs) == completions.mask.sum()


@contextlib.contextmanager
def counted(policy):
    r"""Count the rows of every pass through the language model, and the encoder's calls."""
    seen = {"rows": [], "encoded": 0}
    hooks = [policy.language.register_forward_pre_hook(
        lambda module, args, kwargs: seen["rows"].append(len(kwargs["inputs_embeds"])), with_kwargs=True),
        policy.visual.register_forward_hook(lambda *_: seen.update(encoded=seen["encoded"] + 1))]
    yield seen
    for hook in hooks:
        hook.remove()


def test_a_prompt_is_prefilled_once_and_equal_completions_run_once(policy):
    prompts, completions = make_prompts(policy), make_completions(policy)
    ids, mask = completions.ids.clone(), completions.mask.clone()
    ids[0, 2], mask[0, 2] = ids[0, 0], mask[0, 0]
    ids[1], mask[1] = ids[1, 0].clone(), mask[1, 0].clone()
    ids[2, 0], mask[2, 0] = ids[0, 0], mask[0, 0]  # equal to one of another group: another prompt, so no copy
    separate = [policy.logprobs([prompts[b]], Completions(ids[b:b + 1, g:g + 1], mask[b:b + 1, g:g + 1])).detach()
                for b in range(3) for g in range(4)]
    ids[1, 3][~mask[1, 3]] = 9  # what stands in the padding makes no difference
    with counted(policy) as seen:
        logp = policy.logprobs(prompts, Completions(ids, mask)).detach()
    assert seen["rows"] == [3, 3 + 1 + 4] and seen["encoded"] == 0
    torch.testing.assert_close(logp, torch.cat(separate).view(logp.shape), rtol=0, atol=1e-7)
    assert torch.equal(logp[0, 2], logp[0, 0]) and not torch.equal(logp[2, 0], logp[0, 0])
    with counted(policy) as seen, torch.no_grad():
        policy.logprobs(prompts, Completions(ids, mask), micro_batch=5)
    assert seen["rows"] == [3, 5, 3]


def test_banned_tokens_have_probability_zero(policy):
    completions = make_completions(policy, groups=1)
    completions.ids[0, 0, 0] = policy.config.video_token_id
    logp = policy.logprobs(make_prompts(policy)[:1], completions)
    assert logp[0, 0, 0] == -torch.inf and torch.isfinite(logp[0, 1:]).all()
    names = set(policy.tokenizer.convert_ids_to_tokens(policy.banned.nonzero().flatten().tolist()))
    assert names == {"<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>",
                     "<|endoftext|>"} and not policy.banned[policy.end_id]


# --- positions and features ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ("video", "slow video", "image", "mixed", "text"))
def test_positions_are_those_of_transformers(policy, layout):
    if layout in ("slow video", "mixed") and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("transformers before 5.18 rounds the seconds of a grid time down")
    clip = {"video": make_clip(1, frames=6), "slow video": make_clip(1, frames=6, fps=0.35),
            "mixed": make_clip(1, frames=4, fps=1.3)}.get(layout)
    image = make_clip(2, size=84).frames[0] if layout in ("image", "mixed") else None
    prompt = policy.prompt("what colour", policy.encode(clip, image))
    tokens = prompt.input_ids.tolist() + [9]  # with the first token of a completion
    given = {key: value for key, value in pixels(policy, [(clip, image)]).items() if not key.startswith("pixel")}
    expected, _ = policy.core.model.get_rope_index(torch.tensor([tokens]), mm_token_type_ids=torch.tensor(
        [token_types(policy, tokens)]), **given)
    assert torch.equal(prompt.position_ids, expected[:, 0, :-1])
    assert expected[:, 0, -1].tolist() == [prompt.next_position] * 3


@pytest.mark.parametrize("pieces, after, times, following", [
    # 2 x 2 patches merge into one token for each grid time; 2 positions a second
    ([1, ((2, 2, 2), 5.0), 1], "grid", [0, 1, 11, 2], 3),
    ([1, ((2, 2, 2), 5.0), 1], "max", [0, 1, 11, 12], 13),
    ([2, ((8, 2, 2), 2.0), 1], "grid", [0, 1, 2, 6, 10, 14, 18, 22, 26, 30, 3], 4),
    ([2, ((8, 2, 2), 2.0), 1], "max", [0, 1, 2, 6, 10, 14, 18, 22, 26, 30, 31], 32),
    ([1, ((1, 4, 6), 1.0), 2], "grid", [0, 1, 1, 1, 1, 1, 1, 4, 5], 6),
    ([1, ((2, 2, 2), 0.7)], "grid", [0, 1, 2], 2)])
def test_positions_by_hand(pieces, after, times, following):
    parts = [piece if isinstance(piece, int) else VisualPart("video", torch.zeros(1, 4), *piece) for piece in pieces]
    positions, found = rope_positions(parts, merge_size=2, tokens_per_second=2, after_video=after)
    assert positions[0].tolist() == times and found == following
    if parts[1].grid == (1, 4, 6):
        assert positions[1:].tolist() == [[0, 1, 1, 1, 2, 2, 2, 4, 5], [0, 1, 2, 3, 1, 2, 3, 4, 5]]


def test_log_probs_depend_on_the_video_and_on_its_seconds(qwen25):
    policy = load(qwen25, dtype="float64")
    completions, shown = make_completions(policy, groups=1), [make_clip(1), make_clip(2), None, make_clip(1, fps=0.25)]
    clip, *others = [policy.logprobs([policy.prompt("what", policy.encode(one))], completions) for one in shown]
    assert all((clip - other).abs().max() > 1e-4 for other in others)


def test_features_are_those_of_transformers_and_detached(policy):
    part = policy.encode(make_clip(3)).parts[0]
    given = pixels(policy, [(make_clip(3), None)])
    theirs = policy.core.model.get_video_features(given["pixel_values_videos"], given["video_grid_thw"])
    torch.testing.assert_close(part.embeds, theirs.pooler_output[0])
    assert not part.embeds.requires_grad and part.grid == (2, 4, 4) and part.seconds_per_grid == 1.0
    assert policy.preprocessing["mean"] == (0.5, 0.4, 0.3)  # from preprocessor_config.json, not CLIP's


def test_preprocessing_falls_back_to_the_vision_config(qwen25, tmp_path):
    shutil.copytree(qwen25, tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    found = Policy.load(tmp_path / "model").preprocessing
    assert (found["patch_size"], found["merge_size"], found["temporal_patch_size"]) == (14, 2, 2)
    assert found["mean"][0] == pytest.approx(0.48145466) and found["std"][2] == pytest.approx(0.27577711)


def test_the_feature_cache_stays_within_its_bytes(policy):
    features, built = policy.encode(make_clip(0)), []
    size, tensors = features.nbytes, 1 + len(features.parts[0].deep)
    cache = FeatureCache(max_bytes=2 * size)
    for index in (0, 1, 0, 2, 0, 1):  # 1 is the least recently used when 2 comes, then 2 when 1 comes back
        features = cache.get(("clip", index), lambda: built.append(index) or policy.encode(make_clip(index)))
        assert torch.equal(features.parts[0].embeds, policy.encode(make_clip(index)).parts[0].embeds)
        assert cache.nbytes <= cache.max_bytes and len(cache) <= 2
    assert built == [0, 1, 2, 1] and size == tensors * 8 * 32 * 8  # 8 tokens of 32 numbers of 8 bytes
    with pytest.raises(ConfigError, match=f"the features of clip take {size:,} bytes.* raise feature_cache_mb"):
        FeatureCache(max_bytes=size - 1).get("clip", lambda: policy.encode(make_clip(0)))


def test_the_encoder_runs_once_for_a_clip_in_memory_and_with_a_folder_once_for_all_policies(tmp_path):
    world = write_world(tmp_path / "world")
    config = small_config(world, tmp_path, feature_folder=str(tmp_path / "features"))
    records, first = read_records(world / "records.jsonl"), load_policy(config)
    with counted(first) as seen:
        features = [encode_record(first, record, config) for record in records * 2]
    assert seen["encoded"] == 3 and len(list((tmp_path / "features").glob("*/*.safetensors"))) == 3
    second = load_policy(config)
    with counted(second) as seen:
        again = [encode_record(second, record, config) for record in records]
        noisy = encode_record(second, records[0], config, lambda frames: frames * 0)
    assert seen["encoded"] == 1 and not torch.equal(noisy.parts[0].embeds, again[0].parts[0].embeds)
    for one, other in zip(features, again):
        assert torch.equal(one.parts[0].embeds, other.parts[0].embeds)
        assert one.parts[0].grid == other.parts[0].grid and one.parts[0].seconds_per_grid == 1.0  # 2 frames
    os.utime(records[0].clip, (1, 1))  # another file of the same name
    third = load_policy(config)
    with counted(third) as seen:
        encode_record(third, records[0], config)
    assert seen["encoded"] == 1


# --- adapters and NF4 ------------------------------------------------------------------------------------------------


def test_one_step_changes_adapters_only_and_only_in_the_language_model(folder):
    policy = Policy.load(folder, lora=LORA)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    optimizer = torch.optim.AdamW(policy.trainable(), lr=1e-2, weight_decay=0.0)
    gradient(policy.model, policy.logprobs(make_prompts(policy), make_completions(policy)))
    optimizer.step()
    changed = {name for name, p in policy.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_B" in name and "language_model" in name for name in changed)  # A's gradient is 0 yet
    assert not any("visual" in name or "lm_head" in name for name in before if "lora_" in name)
    assert len(policy.trainable()) == 2 * 2 * 7  # A and B for 7 matrices of 2 layers


def test_dense_weights_for_sampling_are_exact_and_removed_afterwards(policy):
    prompts, completions = make_prompts(policy), make_completions(policy)
    linear, plain = policy.language.layers[0].mlp.up_proj, policy.logprobs(prompts, completions).detach()
    with contextlib.suppress(RuntimeError), torch.no_grad(), loading.merged(policy.language, 2**28):
        assert "forward" in vars(linear)
        torch.testing.assert_close(policy.logprobs(prompts, completions), plain, rtol=0, atol=1e-10)
        raise RuntimeError
    assert "forward" not in vars(linear)
    for max_bytes, context in ((0, torch.no_grad()), (2**28, contextlib.nullcontext())):  # too small, or gradients
        with context, loading.merged(policy.language, max_bytes):
            assert "forward" not in vars(linear)


def test_an_adapter_round_trip_changes_nothing(policy, folder, tmp_path):
    prompts, completions = make_prompts(policy), make_completions(policy)
    policy.save_adapter(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    again = Policy.load(folder, adapter=tmp_path, dtype="float64")  # the folder above it does too
    torch.testing.assert_close(again.logprobs(prompts, completions), policy.logprobs(prompts, completions))
    assert len(again.trainable()) == len(policy.trainable())


def test_a_new_adapter_depends_on_its_seed_alone(qwen25):
    loaded = []
    for global_seed, seed in ((1, 0), (2, 0), (2, 5)):
        torch.manual_seed(global_seed)
        loaded.append([p.detach() for p in Policy.load(qwen25, lora=LoraSettings(3, 6, seed)).trainable()])
    assert all(map(torch.equal, loaded[0], loaded[1])) and not all(map(torch.equal, loaded[0], loaded[2]))


def test_nf4_trains_after_sampling_and_equals_the_repeated_prompt(folder):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    nf4 = load(folder, quantization="nf4")
    quantized = {name: module for name, module in nf4.core.named_modules()
                 if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert len(quantized) == 2 * 7 and all("language_model.layers" in name for name in quantized)
    assert all(m.weight.quant_state.quant_type == "nf4" and m.weight.quant_state.nested for m in quantized.values())
    prompts = make_prompts(nf4)
    rollout = sample_groups(nf4, prompts, 3, 6, generator=torch.Generator().manual_seed(0))
    nf4.model.eval()  # would pack the weights for good at the next pass without gradients
    with torch.no_grad():
        nf4.logprobs(prompts, rollout.completions)
    nf4.encode(make_clip(5))
    assert not any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in quantized.values())
    logp = nf4.logprobs(prompts, rollout.completions)
    grads = gradient(nf4.model, logp)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in nf4.trainable())
    torch.testing.assert_close(logp, rollout.logp, rtol=0, atol=1e-4)
    direct = repeated_forward(nf4, nf4.model, prompts, rollout.completions, "right")
    torch.testing.assert_close(logp.double(), direct, rtol=0, atol=1e-4)
    assert relative(grads, gradient(nf4.model, direct)) < 1e-4


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_a_prompt_has_one_token_for_each_feature(policy):
    features = policy.encode(make_clip(1, frames=6), image=make_clip(2, size=84).frames[0])
    prompt = policy.prompt("what colour", features)
    ids = prompt.input_ids.tolist()
    assert ids.count(policy.config.video_token_id) == 3 * 4 == len(features.parts[0].embeds)
    assert ids.count(policy.config.image_token_id) == 9 == len(features.parts[1].embeds)
    assert policy.tokenizer.decode(ids).endswith("what colour <|im_end|> <|im_start|> assistant")
    assert Features().nbytes == 0 and prompt.position_ids.shape == (3, len(ids))


def test_questions_with_control_tokens_and_templates_without_videos_are_refused(policy, monkeypatch):
    for word in ("<|video_pad|>", "<|im_end|>", "<|im_start|>", "<|endoftext|>"):
        with pytest.raises(RecordError, match="control token"):
            policy.prompt(f"what {word} colour")
    monkeypatch.setattr(policy.tokenizer, "chat_template", "{{ messages[0]['content'][-1]['text'] }}")
    with pytest.raises(ModelError, match="chat template"):
        policy.prompt("what", policy.encode(make_clip(1)))


# --- bad input -------------------------------------------------------------------------------------------------------


def test_models_that_cannot_be_loaded_name_the_problem(qwen25, tmp_path):
    def fails(match, path=tmp_path / "bare"):
        with pytest.raises(ModelError, match=match):
            Policy.load(path)

    fails("no model folder", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    fails("no config.json", tmp_path / "empty")
    shutil.copytree(qwen25, tmp_path / "bare")
    weights, config = tmp_path / "bare" / "model.safetensors", json.loads((qwen25 / "config.json").read_text())
    whole = weights.read_bytes()
    weights.unlink()
    (tmp_path / "bare" / "pytorch_model.bin").write_bytes(b"pickle")
    fails("no weights.*safetensors")
    weights.write_bytes(whole[:1000])
    fails("cannot be loaded")
    (tmp_path / "bare" / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    fails("llama.*qwen2_5_vl")
    config["text_config"]["use_sliding_window"] = True
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    fails("sliding-window")


@pytest.mark.parametrize("error, expected", (
    (OSError("We couldn't connect to 'https://huggingface.co' to load the files"), "out of reach.*folder"),
    (OSError("You are trying to access a gated repo."), "gated.*log in"),
    (OSError("x is not a local folder and is not a valid model identifier listed on the hub"), "neither a local")))
def test_errors_of_the_hub_are_distinguished(monkeypatch, error, expected):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(ModelError, match=expected):
        Policy.load("someone/some-model")


@pytest.mark.parametrize("options, error, expected", (
    ({"quantization": "nf4", "dtype": "float64"}, ModelError, "float64"),
    ({"quantization": "int3"}, ConfigError, "none, nf4"),
    ({"dtype": "float8"}, ConfigError, "float32"),
    ({"device": "cuda:7"}, ModelError, "GPU"),
    ({"device": "gpu"}, ConfigError, "cpu, cuda"),
    ({"lora": LoraSettings(rank=0)}, ConfigError, "rank")))
def test_impossible_options(qwen25, options, error, expected):
    if options.get("device") == "cuda:7" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(error, match=expected):
        Policy.load(qwen25, **options)


def test_arguments_of_logprobs_are_checked(policy):
    with pytest.raises(ConfigError, match="micro_batch is 0"):
        policy.logprobs(make_prompts(policy), make_completions(policy), micro_batch=0)
    with pytest.raises(ValueError, match="2 prompts but 3 groups"):
        policy.logprobs(make_prompts(policy)[:2], make_completions(policy))


def test_adapters_that_do_not_fit_are_named(qwen25, tmp_path):
    with pytest.raises(ModelError, match="adapter_config.json"):
        Policy.load(qwen25, adapter=tmp_path)
    with pytest.raises(ModelError, match="no adapter"):
        Policy.load(qwen25).save_adapter(tmp_path)
    Policy.load(write_model(tmp_path / "wide", hidden=64), lora=LORA).save_adapter(tmp_path / "adapter")
    with pytest.raises(ModelError, match="does not fit"):
        Policy.load(qwen25, adapter=tmp_path / "adapter")


# --- the shipped model -----------------------------------------------------------------------------------------------


def test_log_probs_of_the_shipped_model_are_the_recorded_ones(request):
    r"""The numbers in golden.json were computed by an earlier, independent implementation, in float32, unquantized."""
    golden = json.loads(request.path.with_name("golden.json").read_text())
    weights = data_folder() / "base_model" / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == golden["model_sha256"], "another base model: record anew"
    policy, config = Policy.load(weights.parent), TrainConfig()
    known = {record.record_id: record for record in read_records(data_folder() / "toyvideoqa" / "train.jsonl")}
    records: list[Record] = [known[row["record_id"]] for row in golden["records"]]
    prompts = [policy.prompt(prompt_text(record), encode_record(policy, record, config)) for record in records]
    completions = Completions.from_lists([row["tokens"] for row in golden["records"]], policy.pad_id)
    logp = policy.logprobs(prompts, completions)
    expected = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(values) for row in golden["records"] for values in row["logp"]], batch_first=True)
    torch.testing.assert_close(logp.flatten(0, 1), expected, rtol=0, atol=1e-4)
