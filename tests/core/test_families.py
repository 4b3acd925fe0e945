r"""What differs between model families: Qwen3-VL's prompt against transformers' processor, and the check at load."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from dvr1_lite import prefix_check
from dvr1_lite.errors import ModelError
from dvr1_lite.families import FAMILIES, Family, build_prompt
from dvr1_lite.features import Features, VisualPart
from dvr1_lite.policy import Completions, Policy
from dvr1_lite.prefix_check import TOLERANCES, check_shared_prefix
from dvr1_lite.run import load_policy
from tests.small_run import small_config, write_world
from tests.tiny import SPECIAL, TEMPLATE, WORDS, make_clip, write_model, write_tokenizer

START, END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"


@pytest.fixture(scope="module")
def tokenizer():
    r"""A tokenizer with a token for every byte, so that any difference between two texts shows."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bytes_only.pre_tokenizer, bytes_only.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   additional_special_tokens=SPECIAL)
    fast.chat_template = TEMPLATE
    return fast


def by_processor(tokenizer, rendered, grids, metadata) -> tuple[str, str]:
    r"""Expand a rendered chat as `Qwen3VLProcessor` does, without its pixel processors, which need torchvision: in this
    version of transformers, and in 4.57, where the video's text replaces the vision tokens around the pad token too."""
    processor = object.__new__(Qwen3VLProcessor)
    for name, value in {"image_token": IMAGE, "video_token": VIDEO, "vision_start_token": START,
                        "vision_end_token": END, "tokenizer": tokenizer,
                        "image_processor": SimpleNamespace(merge_size=2),
                        "video_processor": SimpleNamespace(merge_size=2, temporal_patch_size=2)}.items():
        setattr(processor, name, value)
    images = [processor.replace_image_token({"image_grid_thw": grids["image"]}, i) for i in range(len(grids["image"]))]
    video = processor.replace_video_token({"video_grid_thw": grids["video"], "video_metadata": [metadata]}, 0)
    older = rendered.replace(START + VIDEO + END, video).replace(IMAGE, "".join(images))
    return processor.get_text_with_replacements([rendered], images, [video])[0][0], older


@pytest.mark.parametrize(("frames", "fps"), [(4, 2.0), (5, 2.0), (16, 0.37), (1, 30.0)])
@pytest.mark.parametrize("with_image", (False, True))
def test_the_prompt_of_qwen3_vl_is_that_of_transformers_processor(tokenizer, tmp_path, frames, fps, with_image):
    policy = Policy.load(write_model(tmp_path, "qwen3_vl"))
    clip, image = make_clip(1, frames=frames, fps=fps), make_clip(2, size=84).frames[0] if with_image else None
    features = policy.encode(clip, image)
    video, image_id = tokenizer.convert_tokens_to_ids([VIDEO, IMAGE])
    config = SimpleNamespace(model_type="qwen3_vl", video_token_id=video, image_token_id=image_id,
                             vision_config=SimpleNamespace())
    kinds = ["video"] + ["image"] * with_image
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": [*({"type": kind} for kind in kinds), {"type": "text", "text": "what colour"}]}],
        tokenize=False, add_generation_prompt=True)
    # frame k is on screen at (k + 1/2) / fps seconds: number 2k + 1 of a clip with twice the frames a second
    metadata = VideoMetadata(total_num_frames=2 * frames, fps=2 * fps,
                             frames_indices=[2 * k + 1 for k in range(frames)])
    grids = {"video": torch.tensor([[-(-frames // 2), 4, 4]]), "image": torch.tensor([[1, 6, 6]] * with_image)}
    for after_video, expected in zip(("grid", "max"), by_processor(tokenizer, rendered, grids, metadata)):
        found = build_prompt(tokenizer, config, 2, after_video, "tiny", "what colour", features)
        assert found.input_ids.tolist() == tokenizer(expected, add_special_tokens=False)["input_ids"]
        assert expected.count(VIDEO) == 4 * len(features.parts[0].moments) and " seconds>" in expected


def test_a_moment_is_the_middle_of_the_frames_of_a_grid_time(tmp_path):
    policy = Policy.load(write_model(tmp_path, "qwen3_vl"))
    clip = dataclasses.replace(make_clip(1, frames=5), seconds=[0.0, 1.0, 4.0, 4.5, 9.0])
    assert policy.encode(clip).parts[0].moments == (0.5, 4.25, 9.0)  # the last frame stands alone
    assert policy.encode(image=clip.frames[0]).parts[0].moments == ()


def test_a_clip_without_seconds_is_refused_and_never_left_out(tmp_path):
    policy = Policy.load(write_model(tmp_path, "qwen3_vl"))
    with pytest.raises(ModelError, match="one pad token for each visual feature"):
        policy.prompt("what", policy.encode(dataclasses.replace(make_clip(1), seconds=[])))


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_inputs_of_the_processor_give_the_same_log_probs(family, tmp_path):
    pytest.importorskip("torchvision")
    policy = Policy.load(write_model(tmp_path, family), dtype="float64")
    own = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5, 0.4, 0.3],
           "image_std": [0.3, 0.2, 0.25]}
    names = {"qwen2_vl": ("Qwen2VLVideoProcessor", "Qwen2VLProcessor"), "qwen3_vl": (
        "Qwen3VLVideoProcessor", "Qwen3VLProcessor"), "qwen2_5_vl": ("Qwen2VLVideoProcessor", "Qwen2_5_VLProcessor")}
    video_processor, processor = (getattr(transformers, name) for name in names[family])
    processor = processor(transformers.Qwen2VLImageProcessor(**own), policy.tokenizer, video_processor(**own))
    clip, text = make_clip(1, frames=6), "what colour"
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}]
    rendered = policy.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    metadata = VideoMetadata(total_num_frames=12, fps=2 * clip.fps, frames_indices=[1, 3, 5, 7, 9, 11], duration=3.0)
    inputs = processor(text=[rendered], videos=[clip.frames], video_metadata=[metadata], fps=clip.fps, do_resize=False,
                       do_rescale=False, do_sample_frames=False, return_tensors="pt")
    prompt, tokens = policy.prompt(text, policy.encode(clip)), [9, 12, 20]
    assert inputs["input_ids"][0].tolist() == prompt.input_ids.tolist()
    end = torch.tensor([tokens])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], end], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(end)], 1)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].double()
    with torch.no_grad():
        logits = policy.core(**inputs).logits[0, -4:-1].masked_fill(policy.banned, -torch.inf)
        ours = policy.logprobs([prompt], Completions.from_lists([[tokens]], policy.pad_id))[0, 0]
    torch.testing.assert_close(ours, logits.log_softmax(-1).gather(-1, end.T)[:, 0], rtol=0, atol=1e-6)


# --- the check at load -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "after_video"), [("float64", "grid"), ("float32", "max"), ("float16", "grid"),
                                                    ("bfloat16", "max")])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_the_check_at_load(family, after_video, dtype, tmp_path):
    policy = Policy.load(write_model(tmp_path, family), dtype=dtype, after_video=after_video)
    generator = torch.get_rng_state()
    assert check_shared_prefix(policy) < TOLERANCES[getattr(torch, dtype)] / 5
    assert torch.equal(torch.get_rng_state(), generator) and len(policy.features) == 0


def shifted(prompt):
    return dataclasses.replace(prompt, next_position=prompt.next_position + 1)


def flat(prompt):
    positions = torch.arange(len(prompt.input_ids)).expand(3, -1)
    return dataclasses.replace(prompt, position_ids=positions, next_position=positions.shape[1])


def without_deepstack(prompt):
    parts = [dataclasses.replace(part, deep=tuple(0 * x for x in part.deep)) for part in prompt.features.parts]
    return dataclasses.replace(prompt, features=Features(tuple(parts)))


@pytest.mark.parametrize("fault", (shifted, flat, without_deepstack))
def test_a_model_whose_numbers_would_be_incorrect_is_refused(fault, tmp_path, monkeypatch):
    policy = Policy.load(write_model(tmp_path, "qwen3_vl"))
    prompt = policy.prompt
    monkeypatch.setattr(policy, "prompt", lambda *given: fault(prompt(*given)))
    with pytest.raises(ModelError, match=rf"{tmp_path} \(qwen3_vl\): in transformers {transformers.__version__} its "
                                         r"log-probs .* differ .* by 0\.\d+ nats a token, more than the 0.001 that "
                                         r"float32 explains: use a tested version .*qwen2_vl"):
        check_shared_prefix(policy)


def test_log_probs_that_are_no_numbers_are_refused(tmp_path):
    policy = Policy.load(write_model(tmp_path))
    policy.core.lm_head.weight.data[15] = torch.nan
    with pytest.raises(ModelError, match="by nan nats"):
        check_shared_prefix(policy)


def write_qwen3_5(folder):
    r"""Write a tiny Qwen3.5, whose layers of linear attention keep a state instead of keys and values."""
    ids = write_tokenizer(folder)
    text = {"vocab_size": len(SPECIAL + WORDS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "linear_key_head_dim": 8,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1],
                                "mrope_interleaved": True, "partial_rotary_factor": 1.0}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 14,
              "out_hidden_size": 32, "num_position_embeddings": 16}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision, image_token_id=ids[IMAGE],
                                        video_token_id=ids[VIDEO])
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_qwen3_5_is_refused_by_name_and_by_the_check(tmp_path, monkeypatch):
    folder = write_qwen3_5(tmp_path)
    with pytest.raises(ModelError, match="is a qwen3_5, which is not supported: .*qwen2_vl, qwen2_5_vl, qwen3_vl"):
        Policy.load(folder)
    monkeypatch.setitem(FAMILIES, "qwen3_5", Family("Qwen3_5ForConditionalGeneration", frames_apart=True))
    with pytest.raises(ModelError, match=rf"\(qwen3_5\).* transformers {transformers.__version__}"):
        check_shared_prefix(Policy.load(folder))


def test_an_architecture_that_transformers_does_not_know_lists_the_families(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl_chat"}))
    with pytest.raises(ModelError, match="no supported family: choose a model of one of qwen2_vl, qwen2_5_vl"):
        Policy.load(tmp_path)


def test_the_model_of_a_run_is_checked_when_it_is_loaded(tmp_path, monkeypatch):
    config = small_config(write_world(tmp_path / "world", clips=1), tmp_path / "run")
    load_policy(config)
    monkeypatch.setattr(prefix_check, "own_logp", lambda policy, prompt, clip, tokens: torch.zeros(len(tokens)))
    with pytest.raises(ModelError, match="differ from its own forward"):
        load_policy(config)


# --- features on disk ------------------------------------------------------------------------------------------------


def test_features_with_deepstack_survive_the_feature_folder(tmp_path):
    model, clip = write_model(tmp_path / "model", "qwen3_vl"), make_clip(1)
    first, second = (Policy.load(model, feature_folder=tmp_path / "features") for _ in range(2))
    written = first.encode(clip, clip.frames[0], key=("a",)).parts
    kept = second.encode(lambda: pytest.fail("the clip was encoded again"), clip.frames[0], key=("a",)).parts
    for one, other in zip(written, kept, strict=True):
        assert isinstance(other, VisualPart) and len(other.deep) == 2
        assert all(map(torch.equal, (one.embeds, *one.deep), (other.embeds, *other.deep)))
        assert dataclasses.replace(one, embeds=None, deep=()) == dataclasses.replace(other, embeds=None, deep=())
