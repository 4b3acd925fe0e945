r"""A tiny random video LLM in a folder: the architectures and file formats of the real ones, a few kB of weights."""

import json
from pathlib import Path

import torch

from dvr1_lite.video import Clip

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>"]
WORDS = ["<unk>", "<think>", "</think>", "<answer>", "</answer>", "<glue>", "</glue>", "user", "assistant", "what",
         "colour", "comes", "first", "then", "red", "green", "blue", "A", "B", "C", "D", "hint", "_", "options", "is",
         "the", "answer", "1", "2", "3"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path) -> dict[str, int]:
    r"""Write a word-level tokenizer with Qwen's special tokens and a chat template; return the special tokens' ids."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.normalizer = normalizers.Replace(".", " ")
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>", additional_special_tokens=SPECIAL)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return {word: vocabulary[word] for word in SPECIAL}


def write_model(folder: Path, family: str = "qwen2_5_vl", *, seed: int = 0, hidden: int = 32, layers: int = 2,
                heads: int = 4, intermediate: int = 64, scale: float = 0.3) -> Path:
    r"""Write model, tokenizer and preprocessor; weights of standard deviation `scale` make sharp predictions."""
    import transformers as hf

    folder.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(folder)
    per_axis = hidden // heads // 2  # rotary pairs, divided over time, height and width
    text = {"vocab_size": len(SPECIAL + WORDS), "hidden_size": hidden, "intermediate_size": intermediate,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads // 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                "mrope_section": [per_axis - 2 * (per_axis // 3), per_axis // 3, per_axis // 3]},
            "bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    vision = {"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    special = {"image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
               "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"]}
    if family == "qwen3_vl":
        vision |= {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": hidden, "depth": 3,
                   "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
        text |= {"head_dim": hidden // heads}
        text["rope_parameters"]["mrope_interleaved"] = True
        config, kind = hf.Qwen3VLConfig, hf.Qwen3VLForConditionalGeneration
    elif family == "qwen2_5_vl":
        vision |= {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": hidden, "window_size": 56,
                   "fullatt_block_indexes": [1], "tokens_per_second": 2}
        config, kind = hf.Qwen2_5_VLConfig, hf.Qwen2_5_VLForConditionalGeneration
    else:
        vision |= {"embed_dim": 16, "hidden_size": hidden, "mlp_ratio": 2}
        config, kind = hf.Qwen2VLConfig, hf.Qwen2VLForConditionalGeneration
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config(text_config=text, vision_config=vision, **special))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=scale * (32 / parameter[0].numel()) ** 0.5)
    model.save_pretrained(folder)
    preprocessing = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "image_mean": [0.5, 0.4, 0.3],
                     "image_std": [0.3, 0.2, 0.25], "image_processor_type": "Qwen2VLImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


def make_clip(seed: int = 0, frames: int = 4, size: int = 56, fps: float = 2.0) -> Clip:
    r"""Make a clip of random pixels: `frames` frames of `size` x `size`, sampled at `fps` frames a second."""
    pixels = torch.rand((frames, 3, size, size), generator=torch.Generator().manual_seed(seed))
    seconds = [(index + 0.5) / fps for index in range(frames)]
    return Clip(frames=pixels, seconds=seconds, fps=fps, duration=frames / fps, path=f"clip{seed}.mp4")


def add_noise_to_lora(model: torch.nn.Module, seed: int = 1, scale: float = 0.2) -> None:
    r"""Give LoRA's B values, which are zero at the start, so that the adapter changes the outputs."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
