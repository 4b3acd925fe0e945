r"""How long a training step takes and how much memory it needs, three ways: `python -m dvr1_lite bench`.

A group is one prompt with G completions of T tokens; the prompt has P tokens, nearly all of them the video's.

- **shared**: this project. The frozen encoder runs once a clip, the prompt is prefilled once a pass: P + G T tokens.
- **repeated**: the same model, weights and objective as peers do it. `generate(num_return_sequences=G)` with its cache,
  then forwards of G whole sequences with pixel values, reference and updates alike: G (P + T) tokens, and G clips.
- **trl**: TRL's `GRPOTrainer` on the same model with as many visual tokens and patches, given as images, because it
  cannot train on video. An optional extra: without TRL the table says so.

All ways force completions of the same length, make the same number of updates with AdamW, and take turns within one
process, so that whatever else the machine does falls on all alike. Figures are medians. The weights are random: only
times are measured, and hardly any completion begins like another, so the savings of `rollout.py` and `Distinct` for
equal completions do not count here. No tokens ratio includes the encoder, whose work the repeated ways do G times in
every pass.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import logging
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from .errors import ConfigError, ModelError
from .experiments import machine
from .files import make_folder, write_atomically
from .objectives import ObjectiveConfig, get_objective
from .policy import DTYPES, LORA_TARGETS, NEVER_SAMPLED, LoraSettings, Policy, _new_adapter
from .policy import _check_device as check_device
from .policy import _register_attention as register_attention
from .pretraining import build_tokenizer
from .rollout import sample_groups
from .training import quiet_libraries, versions
from .video import CLIP_MEAN, CLIP_STD, Clip, patchify

WAYS = ("shared", "repeated", "trl")
PHASES = ("sample", "log-probs", "forward + backward", "step")
PREPROCESSING = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "mean": CLIP_MEAN, "std": CLIP_STD}
QUESTION = "Tell me the shapes second by second."
LORA = LoraSettings()
LEARNING_RATE, MAX_GRAD_NORM = 1e-3, 1.0
# Dense bfloat16 peak in 1e12 operations a second, from the makers' data sheets; other cards get no share.
CARD_PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165, "3090": 71}


# --- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    r"""Sizes of a Qwen2.5-VL. The defaults are the 3B's with every width divided by 16 and four layers each."""

    name: str = "tiny: every width of Qwen2.5-VL-3B / 16, 4 + 4 layers"
    hidden: int = 128
    intermediate: int = 688
    layers: int = 4
    heads: int = 4
    vocabulary: int = 1024  # the share of the parameters that it has in the 3B
    sections: tuple[int, int, int] = (4, 6, 6)  # rotary pairs of time, height and width
    vision_hidden: int = 80
    vision_intermediate: int = 216
    vision_layers: int = 4
    vision_heads: int = 4
    full_attention: tuple[int, ...] = (3,)


SHAPES = {
    "tiny": Shape(),
    "3B": Shape("Qwen2.5-VL-3B", 2048, 11008, 36, 16, 151936, (16, 24, 24), 1280, 3420, 32, 16, (7, 15, 23, 31)),
}


@dataclass(frozen=True)
class Kind:
    r"""A model to measure: a key of SHAPES, how its frozen weights are kept, its number type, and where it runs."""

    model: str = "tiny"
    quantization: str = "none"
    dtype: str = "float32"
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.model}, {'NF4 in ' if self.quantization == 'nf4' else ''}{self.dtype}, {self.device}"


def kinds(device: str, model: str | None = None) -> list[Kind]:
    r"""What is measured on a device: the tiny model in float32 on a CPU; the 3B in bfloat16 and in NF4 on a GPU."""
    if torch.device(device).type == "cpu":
        return [Kind(model or "tiny")]
    check_device(torch.device(device), "bfloat16")
    return [Kind(model or "3B", quantization, "bfloat16", device) for quantization in ("none", "nf4")]


def completion_tokens(kind: Kind) -> int:
    r"""The usual length of a completion: 64, and 256 for the 3B, as in the paper's setting."""
    return 256 if kind.model == "3B" else 64


def build_model(kind: Kind, tokenizer, seed: int = 0):
    r"""A `Qwen2_5_VLForConditionalGeneration` of the kind's shape with random frozen weights; the same for a seed."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    shape = SHAPES[kind.model]
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in
           ("image_pad", "video_pad", "vision_start", "vision_end", "im_end", "endoftext")}
    text = {"vocab_size": shape.vocabulary, "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": 2,
            "max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": ids["im_end"],
            "pad_token_id": ids["endoftext"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(shape.sections)}}
    vision = {"depth": shape.vision_layers, "hidden_size": shape.vision_hidden, "num_heads": shape.vision_heads,
              "intermediate_size": shape.vision_intermediate, "out_hidden_size": shape.hidden, "patch_size": 14,
              "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "tokens_per_second": 2,
              "fullatt_block_indexes": list(shape.full_attention)}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"])
    with torch.random.fork_rng(devices=_devices(kind)), torch.device(kind.device):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=DTYPES[kind.dtype],
                                                                attn_implementation="sdpa")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = ids["im_end"], ids["endoftext"]
    model.name_or_path = kind.model  # peft asks
    model.requires_grad_(False)
    return quantise(model, kind).train() if kind.quantization == "nf4" else model.train()


def _devices(kind: Kind) -> list[torch.device]:
    return [torch.device(kind.device)] if torch.device(kind.device).type == "cuda" else []


def quantise(model: torch.nn.Module, kind: Kind) -> torch.nn.Module:
    r"""Replaces the language model's linear layers by NF4 ones with double quantisation, as `Policy.load` does."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("nf4 needs bitsandbytes, which is not installed: pip install bitsandbytes, or leave it out")
    import bitsandbytes

    for layer in model.model.language_model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if not isinstance(linear, torch.nn.Linear):
                    continue
                new = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None,
                                                 compute_dtype=DTYPES[kind.dtype], quant_type="nf4")
                new.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4",
                                                        compress_statistics=True)
                new.bias = linear.bias
                setattr(block, name, new.to(kind.device))
    model.is_loaded_in_4bit = True  # peft asks
    return model


def build_policy(kind: Kind) -> Policy:
    r"""This project's policy around the random model, with adapters; tokens that would end or feed it are banned."""
    tokenizer = build_tokenizer()
    model = build_model(kind, tokenizer)
    model.model.language_model.config._attn_implementation = register_attention("sdpa")
    policy = Policy(_new_adapter(model, LORA, kind.model), tokenizer, PREPROCESSING, path=kind.model,
                    quantization=kind.quantization)
    policy.banned[:] = False
    policy.banned[banned_ids(tokenizer)] = True
    return policy


def banned_ids(tokenizer) -> list[int]:
    r"""Vision, turn and pad tokens, and the end token, so that every completion has its full length."""
    words = {*NEVER_SAMPLED, tokenizer.eos_token, tokenizer.pad_token} & set(tokenizer.get_vocab())
    return sorted(tokenizer.convert_tokens_to_ids(word) for word in words)


# --- time and memory -------------------------------------------------------------------------------------------------


class Meter:
    r"""Memory in bytes: that of the process on Linux, that of the GPU on a GPU; elsewhere it cannot be reset."""

    def __init__(self, device: str):
        self.cuda = torch.device(device).type == "cuda"
        self.known = self.cuda or Path("/proc/self/clear_refs").exists()

    def level(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else self._status("VmRSS")

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")

    def reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif self.known:
            Path("/proc/self/clear_refs").write_text("5")

    def settle(self) -> None:
        r"""Gives freed memory back to the system, so that one way's leavings are not another's peak."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        elif sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL("libc.so.6").malloc_trim(0)

    def _status(self, name: str) -> int:
        if not self.known:
            return 0
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


class Watch:
    r"""Seconds, processor seconds of all threads, and peak memory above the round's start, by phase.

    Phases may nest, and repeat within a round. Processor time tells the work also where other programs take the cores.
    """

    def __init__(self, device: str):
        self.meter, self.open = Meter(device), []
        self.begin()

    def begin(self) -> None:
        r"""Starts a round."""
        self.meter.settle()
        self.seconds, self.peaks, self.processor = defaultdict(float), defaultdict(int), defaultdict(float)
        self.start, self.open = self.meter.level(), []
        self.meter.reset()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave(name)

    def enter(self, name: str) -> None:
        self._note()
        self.open.append(name)
        self.processor[name] -= time.process_time()
        self.seconds[name] -= self._now()

    def leave(self, name: str) -> None:
        self.seconds[name] += self._now()
        self.processor[name] += time.process_time()
        self._note()
        self.open.remove(name)

    def _now(self) -> float:
        if self.meter.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _note(self) -> None:
        peak = self.meter.peak() - self.start
        for name in self.open:
            self.peaks[name] = max(self.peaks[name], peak)
        self.meter.reset()


# --- three ways ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    r"""What is measured: frames of size x size pixels, G completions of T tokens, updates of the weights a step."""

    frames: int = 16
    group_size: int = 8
    completion_tokens: int = 64
    inner_updates: int = 1
    size: int = 252

    @property
    def visual_tokens(self) -> int:
        return (self.frames + 1) // 2 * (self.size // 28) ** 2

    def token_ratio(self, prompt_tokens: int) -> float:
        r"""G (P + T) / (P + G T): tokens that the repeated forward reads for each that the shared one reads."""
        group, length = self.group_size, self.completion_tokens
        return group * (prompt_tokens + length) / (prompt_tokens + group * length)

    def __str__(self) -> str:
        return f"{self.frames} frames, G = {self.group_size}, updates = {self.inner_updates}"


def make_clip(setting: Setting) -> Clip:
    r"""Random pixels, two frames a second."""
    pixels = torch.rand((setting.frames, 3, setting.size, setting.size), generator=torch.Generator().manual_seed(0))
    return Clip(frames=pixels, seconds=[(i + 0.5) / 2 for i in range(setting.frames)], fps=2.0,
                duration=setting.frames / 2, path="random")


class Updates:
    r"""The objective and the optimizer, the same for the shared and the repeated way."""

    def __init__(self, parameters: list[torch.nn.Parameter], setting: Setting, device):
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
        self.config = ObjectiveConfig()
        self.rewards = torch.tensor([[2.0 * (i % 2) for i in range(setting.group_size)]], device=device)
        self.old = None

    def objective(self, reference: torch.Tensor) -> Callable:
        r"""Reg-GRPO; the first log-probs that it sees are the old ones."""
        self.old, mask = None, torch.ones_like(reference, dtype=torch.bool)

        def loss(logp: torch.Tensor):
            self.old = logp.detach() if self.old is None else self.old
            return get_objective(self.config.method)(logp, self.old, reference, mask, self.rewards, self.config)

        return loss

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Shared:
    r"""This project's step, from a clip that no cache holds yet."""

    def __init__(self, policy: Policy, setting: Setting, clip: Clip, micro_batch: int | None = None):
        self.policy, self.setting, self.clip, self.micro_batch = policy, setting, clip, micro_batch
        self.updates = Updates(policy.trainable(), setting, policy.device)

    def sample(self):
        r"""The prompts, a list of one, and their completions (1, G, T)."""
        prompts = [self.policy.prompt(QUESTION, self.policy.encode(self.clip))]
        return prompts, sample_groups(self.policy, prompts, self.setting.group_size,
                                      self.setting.completion_tokens).completions

    def round(self, watch: Watch) -> None:
        with watch.phase("step"):
            with watch.phase("sample"):
                prompts, completions = self.sample()
            with watch.phase("log-probs"):
                reference = self.policy.logprobs(prompts, completions, reference=True, micro_batch=self.micro_batch)
            objective = self.updates.objective(reference)
            for _ in range(self.setting.inner_updates):
                with watch.phase("forward + backward"):
                    self.policy.backward(prompts, completions, objective, micro_batch=self.micro_batch)
                self.updates.step()


class Repeated:
    r"""The same step by transformers' own `generate` and forward; every completion has prompt and pixels of its own.

    Written as one who wants speed would: a cache in generation, logits at the completion's places only, pixel values
    made once, no gradients through the frozen encoder, one pass less than TRL (the first log-probs are the old ones).
    The adapters stay beside the weights in generation, as peers leave them.
    """

    def __init__(self, model: torch.nn.Module, policy: Policy, setting: Setting, clip: Clip):
        self.model, self.setting, self.clip = model, setting, clip
        self.ids = policy.prompt(QUESTION, policy.encode(clip)).input_ids[None]
        self.video_id, self.banned, self.device = policy.config.video_token_id, policy.banned, policy.device
        self.dtype = policy.visual.patch_embed.proj.weight.dtype
        self.updates = Updates([p for p in model.parameters() if p.requires_grad], setting, policy.device)

    def inputs(self, ids: torch.Tensor, video: tuple[torch.Tensor, torch.Tensor]) -> dict:
        r"""Arguments of transformers' forward for token ids (N, L) that all begin with the prompt."""
        pixels, grid = video
        rows = len(ids)
        seconds = PREPROCESSING["temporal_patch_size"] / self.clip.fps
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": 2 * (ids == self.video_id).long(), "pixel_values_videos": pixels.repeat(rows, 1),
                "video_grid_thw": grid.repeat(rows, 1), "second_per_grid_ts": torch.full((rows,), seconds)}

    def pixels(self) -> tuple[torch.Tensor, torch.Tensor]:
        patches, grid = patchify(self.clip.frames, **PREPROCESSING)
        return patches.to(self.device, self.dtype), grid[None].to(self.device)

    @torch.no_grad()
    def sample(self, video: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        r"""Prompts with completions (G, P + T)."""
        length = self.setting.completion_tokens
        return self.model.generate(
            **self.inputs(self.ids, video), num_return_sequences=self.setting.group_size, do_sample=True, top_k=0,
            top_p=1.0, temperature=1.0, min_new_tokens=length, max_new_tokens=length, use_cache=True,
            suppress_tokens=self.banned.nonzero().flatten().tolist())

    def logprobs(self, ids: torch.Tensor, video: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        r"""Log-probs (1, G, T) of the completions in ids (G, P + T)."""
        length = self.setting.completion_tokens
        logits = self.model(**self.inputs(ids, video), logits_to_keep=length + 1, use_cache=False).logits[:, :-1]
        logits = logits.float().masked_fill(self.banned, -torch.inf)
        chosen = logits.gather(-1, ids[:, -length:, None]).squeeze(-1)
        return (chosen - logits.logsumexp(-1))[None]

    def round(self, watch: Watch) -> None:
        with watch.phase("step"):
            with watch.phase("sample"):
                video = self.pixels()
                ids = self.sample(video)
            with watch.phase("log-probs"), torch.no_grad(), self.model.disable_adapter():
                reference = self.logprobs(ids, video)
            objective = self.updates.objective(reference)
            for _ in range(self.setting.inner_updates):
                with watch.phase("forward + backward"):
                    objective(self.logprobs(ids, video))[0].backward()
                self.updates.step()


def repeated_model(kind: Kind) -> torch.nn.Module:
    r"""The weights and adapters of `build_policy` with transformers' own attention."""
    return _new_adapter(build_model(kind, build_tokenizer()), LORA, kind.model)


class Trl:
    r"""One step of TRL's `GRPOTrainer`, from `on_step_begin` to `on_step_end`; its data loading does not count."""

    def __init__(self, trainer, prompt: str):
        self.trainer, self.prompt = trainer, prompt

    def round(self, watch: Watch) -> None:
        self.trainer.watch = watch
        self.trainer.train()
        for times in (watch.seconds, watch.processor):
            times["forward + backward"] -= times["prepare"]


def build_trl(kind: Kind, setting: Setting, clip: Clip, prompt_tokens: int, folder: str, images: bool = True) -> Trl:
    r"""TRL's trainer on the same weights, all its options at what is fastest here and no reports to anyone.

    images: the clip's visual tokens as images, each one frame; otherwise text of `prompt_tokens` words.
    Raises ModelError if TRL, or something that it needs, is not installed.
    """
    try:
        import trl
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import PrinterCallback, TrainerCallback
    except (ImportError, RuntimeError) as error:
        raise ModelError(f"not measured: TRL cannot be imported ({_first_line(error)}): pip install 'trl>=1.16,<2'"
                         ) from error

    class Steps(TrainerCallback):
        def on_step_begin(self, *_, **__):
            trainer.watch.enter("step")

        def on_step_end(self, *_, **__):
            trainer.watch.leave("step")

    class Timed(trl.GRPOTrainer):
        watch: Watch

        def _send_telemetry(self):
            r"""Nothing leaves this machine."""

        def _generate(self, *arguments, **keywords):
            with self.watch.phase("sample"):
                return super()._generate(*arguments, **keywords)

        def _get_per_token_logps_and_entropies(self, *arguments, **keywords):
            phase = contextlib.nullcontext() if torch.is_grad_enabled() else self.watch.phase("log-probs")
            with phase:
                return super()._get_per_token_logps_and_entropies(*arguments, **keywords)

        def _prepare_inputs(self, *arguments, **keywords):
            with self.watch.phase("prepare"):
                return super()._prepare_inputs(*arguments, **keywords)

        def training_step(self, *arguments, **keywords):
            with self.watch.phase("forward + backward"):
                return super().training_step(*arguments, **keywords)

    class Rows(Dataset):
        r"""One row in memory; a table of its own would pickle and hash it first."""

        column_names = None

        def __init__(self):
            pass

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return row

        def __getitems__(self, indices):
            return [row for _ in indices]

        def __del__(self):
            pass

    tokenizer = build_tokenizer()
    processor, row, told = tokenizer, _text_row(tokenizer, prompt_tokens), f"text of {prompt_tokens} tokens"
    if images:
        processor, row = _image_processor(tokenizer), _image_row(setting, clip)
        told = f"{len(row['images'])} images"
    length, cuda = setting.completion_tokens, torch.device(kind.device).type == "cuda"
    options = trl.GRPOConfig(
        output_dir=folder, report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True, beta=0.1,
        per_device_train_batch_size=setting.group_size, num_generations=setting.group_size,
        num_iterations=setting.inner_updates, max_steps=setting.inner_updates, max_completion_length=length,
        temperature=1.0, top_p=1.0, learning_rate=LEARNING_RATE, lr_scheduler_type="constant", weight_decay=0.0,
        max_grad_norm=MAX_GRAD_NORM, gradient_checkpointing=False, bf16=kind.dtype == "bfloat16", fp16=False,
        use_cpu=not cuda, dataloader_pin_memory=False, remove_unused_columns=False, push_to_hub=False,
        generation_kwargs={"min_new_tokens": length, "suppress_tokens": banned_ids(tokenizer)})
    trainer = Timed(
        model=build_model(kind, tokenizer), processing_class=processor, args=options, callbacks=[Steps()],
        reward_funcs=lambda completions, **_: [2.0 * (i % 2) for i in range(len(completions))],
        train_dataset=Rows(),
        peft_config=LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, lora_dropout=0.0, target_modules=LORA_TARGETS,
                               task_type="CAUSAL_LM"))
    trainer.remove_callback(PrinterCallback)
    return Trl(trainer, told)


def _text_row(tokenizer, prompt_tokens: int) -> dict:
    word = "red "
    around = len(tokenizer.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True,
                                               return_dict=True)["input_ids"])
    return {"prompt": [{"role": "user", "content": word * (prompt_tokens - around)}]}


def _image_row(setting: Setting, clip: Clip) -> dict:
    r"""The question after one image for every pair of frames: an image fills a patch of two frames by itself."""
    from PIL import Image

    frames = (clip.frames[::2].permute(0, 2, 3, 1) * 255).round().byte().numpy()
    return {"prompt": [{"role": "user", "content": QUESTION}], "images": [Image.fromarray(f) for f in frames]}


def _image_processor(tokenizer):
    r"""Qwen's processor for images alone, by Pillow: the whole one wants torchvision for videos."""
    from transformers import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.processing_utils import ProcessorMixin

    class ImageProcessor(Qwen2_5_VLProcessor):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **_):
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return ImageProcessor(Qwen2VLImageProcessorPil(), tokenizer, chat_template=tokenizer.chat_template)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    r"""What one call measures. The grid is made at `inner_updates[0]`; its middle also at the others."""

    frames: tuple[int, ...] = (8, 16, 32)
    group_sizes: tuple[int, ...] = (4, 8, 16)
    completion_tokens: int = 64
    inner_updates: tuple[int, ...] = (1, 4)
    size: int = 252
    repeats: int = 5
    ways: tuple[str, ...] = WAYS
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        counts = {"frames": self.frames, "group_size": self.group_sizes, "inner_updates": self.inner_updates,
                  "completion_tokens": (self.completion_tokens,), "repeats": (self.repeats,),
                  "micro_batch": (self.micro_batch or 1,)}
        least = {"group_size": 3, "completion_tokens": 2}  # Reg-GRPO's smallest group; a first and a later token
        for name, values in counts.items():
            bound = least.get(name, 1)
            if not values or min(values) < bound:
                raise ConfigError(f"{name} is {' '.join(map(str, values)) or 'empty'}: give {bound} or more")
        if self.size < 28 or self.size % 28:
            raise ConfigError(f"size is {self.size}: give a multiple of 28 pixels, Qwen2.5-VL's block")
        for way in self.ways:
            if way not in WAYS:
                raise ConfigError(f"ways has {way!r}: choose from {', '.join(WAYS)}")

    def middle(self) -> tuple[int, int]:
        r"""The setting that growth is told against: the middle one of the frames and of the group sizes."""
        frames, groups = sorted(self.frames), sorted(self.group_sizes)
        return frames[len(frames) // 2], groups[len(groups) // 2]

    def settings(self) -> list[Setting]:
        r"""The middle setting first, with every number of updates, then its row and its column, last the corners."""
        first, *more = self.inner_updates
        middle = self.middle()
        pairs = sorted(((f, g) for f in sorted(set(self.frames)) for g in sorted(set(self.group_sizes))),
                       key=lambda pair: (pair[0] != middle[0]) + (pair[1] != middle[1]))
        grid = [Setting(f, g, self.completion_tokens, first, self.size) for f, g in pairs]
        return [grid[0], *(replace(grid[0], inner_updates=count) for count in more), *grid[1:]]


def measure(kind: Kind, plan: Plan, result: dict, save: Callable[[dict], None], progress: bool = True) -> bool:
    r"""Measures all settings on one kind of model into `result["settings"]`, saving after each.

    Returns whether Ctrl-C stopped it; what was measured until then is kept, the last setting with the repeats it has.
    """
    settings = plan.settings()
    work = [s.group_size * (s.visual_tokens + s.completion_tokens) * (s.inner_updates + 1) for s in settings]
    shown = "{desc}{percentage:3.0f}% |{bar}| {elapsed} so far, {remaining} left"
    with tqdm(total=sum(work), bar_format=shown, disable=None if progress else True) as bar:
        policy, model = build_policy(kind), repeated_model(kind) if "repeated" in plan.ways else None
        for setting, cost in zip(settings, work):
            bar.set_description(str(setting))
            rounds: list[dict] = []
            with tempfile.TemporaryDirectory() as folder:
                try:
                    ways, told = _ways(kind, plan, setting, policy, model, folder)
                    for entry in _rounds(ways, told, plan.repeats, kind.device):
                        rounds.append(entry)
                        bar.update(cost / (plan.repeats + 1))
                except KeyboardInterrupt:
                    _keep(result, kind, setting, policy, told if rounds[1:] else {}, rounds[1:], save)
                    return True
            _keep(result, kind, setting, policy, told, rounds[1:], save)
    return False


def _ways(kind: Kind, plan: Plan, setting: Setting, policy: Policy, model, folder: str) -> tuple[dict, dict]:
    r"""The ways that can be measured here, and what is told of each."""
    clip = make_clip(setting)
    ways: dict = {"shared": Shared(policy, setting, clip, plan.micro_batch)}
    told = {"shared": "this project, shared prefix"}
    prompt = policy.prompt(QUESTION, policy.encode(clip))
    if "repeated" in plan.ways:
        ways["repeated"] = Repeated(model, policy, setting, clip)
        told["repeated"] = "transformers, repeated prompt"
    if "trl" in plan.ways:
        try:
            ways["trl"], told["trl"] = _trl(kind, setting, clip, len(prompt.input_ids), folder)
        except ModelError as error:
            told["trl"] = str(error)
    return ways, told


def _trl(kind: Kind, setting: Setting, clip: Clip, prompt_tokens: int, folder: str) -> tuple[Trl, str]:
    r"""TRL on images, or, where a processor for them cannot be had, on text of as many tokens."""
    try:
        way = build_trl(kind, setting, clip, prompt_tokens, folder)
    except (ImportError, AttributeError) as error:
        way = build_trl(kind, setting, clip, prompt_tokens, folder, images=False)
        return way, f"TRL on {way.prompt} (no image processor: {_first_line(error)})"
    return way, f"TRL on {way.prompt} of as many visual tokens"


def _rounds(ways: dict, told: dict, repeats: int, device: str) -> Iterator[dict]:
    r"""One warm-up and `repeats` rounds; in each every way makes a step, and each round another one begins.

    A way that runs out of memory is left out from there on; raises `ConfigError` where that is the shared one.
    """
    watch, names = Watch(device), list(ways)
    for number in range(repeats + 1):
        entry = {}
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            if name not in ways:
                continue
            watch.begin()
            try:
                ways[name].round(watch)
            except torch.OutOfMemoryError as error:
                if name == "shared":
                    raise ConfigError("out of memory: give fewer --frames, a smaller --group-size or a "
                                      "--micro-batch; settings measured before are kept") from error
                told[name] = "not measured everywhere: out of memory"
                del ways[name]
                continue
            entry[name] = {"seconds": dict(watch.seconds), "processor": dict(watch.processor),
                           "bytes": dict(watch.peaks)}
        yield entry


def _keep(result: dict, kind: Kind, setting: Setting, policy: Policy, told: dict, rounds: list[dict], save) -> None:
    if rounds:
        prompt_tokens = len(policy.prompt(QUESTION, policy.encode(make_clip(setting))).input_ids)
        result["settings"].append(figures(kind, setting, prompt_tokens, told, rounds))
    save(result)


def figures(kind: Kind, setting: Setting, prompt_tokens: int, told: dict, rounds: list[dict]) -> dict:
    r"""Medians over the rounds, and the ratios of each way to the shared one; "forward + backward" is one update's."""
    known = Meter(kind.device).known
    ways = {}
    for name in (name for name in WAYS if all(name in entry for entry in rounds)):
        ways[name] = {"what": told[name]}
        for phase in PHASES:
            share = setting.inner_updates if phase == "forward + backward" else 1
            seconds, processor, peaks = ([entry[name][figure].get(phase, 0) for entry in rounds]
                                         for figure in ("seconds", "processor", "bytes"))
            ways[name][phase] = {"seconds": statistics.median(seconds) / share,
                                 "processor_seconds": statistics.median(processor) / share,
                                 "all": [round(second / share, 4) for second in seconds],
                                 "peak_mb": statistics.median(peaks) / 2**20 if known else None}
    ratios, by_processor = ({name: {phase: way[phase][figure] / ways["shared"][phase][figure] for phase in PHASES}
                             for name, way in ways.items() if name != "shared"}
                            for figure in ("seconds", "processor_seconds"))
    ratio = setting.token_ratio(prompt_tokens)
    return {"kind": str(kind), **asdict(setting), "prompt_tokens": prompt_tokens, "n": len(rounds), "ways": ways,
            "not_measured": {name: text for name, text in told.items() if name not in ways}, "ratios": ratios,
            "processor_ratios": by_processor,
            "token_ratio": ratio, "reached": {name: {phase: value / ratio for phase, value in given.items()}
                                              for name, given in ratios.items()}, **_card(kind, setting, prompt_tokens,
                                                                                         ways["shared"])}


def step_operations(shape: Shape, setting: Setting, prompt_tokens: int) -> float:
    r"""Floating-point operations of the shared way's step: 2 a weight and token forward, as many again for gradients of
    the activations (frozen weights need none). Attention's own products and the adapters are left out."""
    block = (2 * shape.hidden * (shape.hidden + shape.hidden // shape.heads * 2) + 3 * shape.hidden
             * shape.intermediate)
    language = shape.layers * block
    vision = shape.vision_layers * (4 * shape.vision_hidden**2 + 3 * shape.vision_hidden * shape.vision_intermediate)
    written = setting.group_size * setting.completion_tokens
    tokens, head = prompt_tokens + written, shape.vocabulary * shape.hidden * written
    passes = 1 + 1 + 2 * setting.inner_updates  # sampling, reference, and forward with backward for every update
    return 2 * (passes * (tokens * language + head) + 4 * setting.visual_tokens * vision)


def _card(kind: Kind, setting: Setting, prompt_tokens: int, way: dict) -> dict:
    r"""Tokens written and read a second; on a GPU also its name, the share of its peak, and the peak of memory."""
    seconds, written = way["step"]["seconds"], setting.group_size * setting.completion_tokens
    speed = {"tokens_per_second": {"sample": written / way["sample"]["seconds"], "step": written / seconds}}
    if torch.device(kind.device).type != "cuda":
        return speed
    card = torch.cuda.get_device_name(kind.device)
    peak = next((value for name, value in CARD_PEAKS.items() if name in card), None)
    reached = step_operations(SHAPES[kind.model], setting, prompt_tokens) / seconds / 1e12
    held = torch.cuda.memory_allocated(kind.device) / 2**30
    return speed | {"card": card, "held_gb": held, "teraflops": reached, "share_of_peak": peak and reached / peak}


def bench(kinds: Sequence[Kind], plan: Plan, *, command: str, json_file: Path | None = None,
          table_file: Path | None = None, note: str = "", progress: bool = True) -> tuple[dict, bool]:
    r"""Measures each kind of model; returns the result and whether Ctrl-C stopped it.

    json_file, table_file: written anew after every setting, so that nothing measured is lost. note: a line for the
    table, such as what else the machine was doing.
    """
    quiet_libraries()
    logging.getLogger("trl").setLevel(logging.ERROR)
    for path in (json_file, table_file):
        if path is not None:
            make_folder(Path(path).parent)
    models = dict.fromkeys(f"{SHAPES[kind.model].name}, {_parameters(SHAPES[kind.model])}" for kind in kinds)
    result = {"date": datetime.date.today().isoformat(), "machine": machine(kinds[0].device), "command": command,
              "threads": torch.get_num_threads(), "versions": versions() | _extra_versions(), "note": note,
              "model": "; ".join(models), "settings": []}

    def save(result: dict) -> None:
        if json_file is not None:
            write_atomically(json_file, json.dumps(result, indent=1) + "\n")
        if table_file is not None:
            write_atomically(table_file, as_table(result))

    stopped = False
    for kind in kinds:
        stopped = stopped or measure(kind, plan, result, save, progress)
    return result, stopped


def _parameters(shape: Shape) -> str:
    kind = next(name for name, known in SHAPES.items() if known is shape)
    model = build_model(Kind(kind, device="meta"), build_tokenizer())
    vision = sum(p.numel() for p in model.model.visual.parameters())
    language = sum(p.numel() for p in model.model.language_model.parameters())
    return f"{language / 1e6:.1f} million parameters in the language model, {vision / 1e6:.1f} in the encoder"


def _extra_versions() -> dict[str, str]:
    found = {}
    for name in ("trl", "datasets", "pillow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# --- telling ---------------------------------------------------------------------------------------------------------


def as_table(result: dict) -> str:
    r"""The result in Markdown: whole steps, phases, growth, and what could not be measured."""
    rows = result["settings"]
    if not rows:
        return "Nothing was measured."
    parts = [_heading(result)]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        ordered = sorted(mine, key=lambda row: (row["frames"], row["group_size"], row["inner_updates"]))
        parts += [f"## {kind}", _about_ways(mine[0]), _steps(ordered), *_growth(mine), _phases(ordered)]
        parts += [_card_line(row) for row in mine if "card" in row]
    return "\n\n".join(parts) + "\n"


def _heading(result: dict) -> str:
    found = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = ["# Seconds and memory of a training step", f"`{result['command']}`",
             f"{result['date']}, {result['machine']}, {result['threads']} threads; {found}.",
             f"Model: {result['model']}, random weights, adapters of rank {LORA.rank}."]
    lines += [result["note"]] if result.get("note") else []
    return "\n\n".join(lines + ["Medians; all ways take turns in one process. Memory is the peak above what the "
                                "process held when the step began, so without the weights."])


def _about_ways(row: dict) -> str:
    lines = [f"- **{name}**: {way['what']}" for name, way in row["ways"].items()]
    return "\n".join([*lines, *(f"- **{name}**: {text}" for name, text in row["not_measured"].items())])


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _steps(rows: Sequence[dict]) -> str:
    r"""The whole step: seconds by way, how many times slower than the shared one, and the ratio of tokens."""
    others = [name for name in WAYS[1:] if any(name in row["ways"] for row in rows)]
    header = ["frames", "G", "updates", "prompt tokens", "n", "shared, s", *(f"{name}, s" for name in others),
              *(f"{name} / shared" for name in others), "token ratio"]
    lines = []
    for row in rows:
        cell = lambda name: f"{row['ways'][name]['step']['seconds']:.2f}" if name in row["ways"] else "-"
        ratio = lambda name: (f"{row['ratios'][name]['step']:.1f} ({row['processor_ratios'][name]['step']:.1f})"
                              if name in row["ratios"] else "-")
        lines.append([str(row["frames"]), str(row["group_size"]), str(row["inner_updates"]),
                      str(row["prompt_tokens"]), str(row["n"]), cell("shared"), *map(cell, others),
                      *map(ratio, others), f"{row['token_ratio']:.1f}"])
    return "Whole step; ratios of seconds, in brackets those of processor time\n\n" + _grid(header, lines)


def _phases(rows: Sequence[dict]) -> str:
    r"""Each phase: seconds and peak memory by way; repeated / shared, and that as a share of the token ratio."""
    names = [name for name in WAYS if any(name in row["ways"] for row in rows)]
    header = ["frames", "G", "updates", "phase", *(f"{name}, s" for name in names), *(f"{name}, MB" for name in names),
              "repeated / shared", "of the token ratio"]
    lines = []
    for row in rows:
        for phase in PHASES:
            ways = [row["ways"].get(name, {}).get(phase) for name in names]
            ratio, by_processor = (row[figure].get("repeated", {}).get(phase) for figure in
                                   ("ratios", "processor_ratios"))
            lines.append([str(row["frames"]), str(row["group_size"]), str(row["inner_updates"]), phase,
                          *(f"{way['seconds']:.2f}" if way else "-" for way in ways),
                          *(f"{way['peak_mb']:.0f}" if way and way["peak_mb"] is not None else "-" for way in ways),
                          f"{ratio:.1f} ({by_processor:.1f})" if ratio else "-",
                          f"{ratio / row['token_ratio']:.0%} ({by_processor / row['token_ratio']:.0%})" if ratio
                          else "-"])
    return ("Phases; in brackets by processor time. Forward + backward is that of one update; log-probs are the "
            "reference's, and with several updates TRL's own old ones too; MB are 2**20 bytes\n\n"
            + _grid(header, lines))


def _growth(rows: Sequence[dict]) -> Iterator[str]:
    r"""How the step grows along the row and the column of the grid that cross in its first, middle setting."""
    middle = rows[0]
    for name, other, label in (("frames", "group_size", "frames"), ("group_size", "frames", "G")):
        line = sorted((row for row in rows if row[other] == middle[other]
                       and row["inner_updates"] == middle["inner_updates"]), key=lambda row: row[name])
        if len(line) > 1:
            told = "; ".join(f"{way} {_along(line, way, 'seconds')} ({_along(line, way, 'processor_seconds')})"
                             for way in WAYS if all(way in row["ways"] for row in line))
            yield (f"Growth of the step with {label} {', '.join(str(row[name]) for row in line)}, in brackets by "
                   f"processor time: {told}.")


def _along(line: Sequence[dict], way: str, figure: str) -> str:
    steps = [row["ways"][way]["step"][figure] for row in line]
    return ", ".join(f"{step / steps[0]:.1f}" for step in steps)


def _card_line(row: dict) -> str:
    share = "unknown" if row["share_of_peak"] is None else f"{row['share_of_peak']:.1%}"
    return (f"{row['card']}, {row['frames']} frames, G = {row['group_size']}, {row['inner_updates']} updates, shared: "
            f"{row['tokens_per_second']['sample']:.0f} tokens/s in sampling, {row['tokens_per_second']['step']:.0f} in "
            f"the whole step, {row['held_gb'] + row['ways']['shared']['step']['peak_mb'] / 1024:.1f} GB at most with "
            f"the weights of all ways, {row['teraflops']:.1f} teraflops ({share} of the card's bfloat16 peak)")
