r"""Predict a run's memory from its configuration and the model's architecture alone: no weights, no GPU, within 20 %.

What is there all the time (weights, adapter, gradients, optimizer, feature cache) is counted exactly; what a phase of
a step (encode, sample, update, evaluate) adds is estimated, and one phase runs at a time:

    peak = static + the largest phase,        needed on a GPU = peak x 1.05 (fragments) + 0.6 GB (CUDA itself)

Letters: B prompts, G completions each, P prompt tokens, T completion tokens, V vocabulary, H hidden size, I the MLP's
inner size, Q and K the widths of all query and of all key heads; s bytes of the computation's numbers, a the adapter's.
Differs from the paper: it names its GPUs (A100, H200) and no memory.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from ..config import CONFIGS, TrainConfig
from ..errors import ConfigError, ModelError
from ..families import FAMILIES
from ..files import resolve
from ..loading import DTYPES, check_hardware, load_architecture
from ..policy import LOGIT_CHUNK

GB = 2**30
CUDA_BYTES = int(0.6 * GB)  # the driver's context and the libraries' own buffers, whatever the model
FRAGMENTS = 0.05  # of the peak: gaps that PyTorch's allocator cannot use
TEXT_TOKENS = 256  # question, options, instruction and the chat template, unless given
LOGIT_BYTES = 12  # of one logit: three float32 values at once, forward (logit, masked, log-softmax) and backward


@dataclass(frozen=True)
class Architecture:
    r"""The sizes of a Qwen-VL model that memory depends on.

    linears: (out, in) of the matrices q, k, v, o, gate, up, down of one language layer, which are quantized and
    adapted; matrices: their parameters in all layers. language_rest (norms and biases), embeddings, head (0 where it is
    tied to the embeddings) and vision are parameter counts. head_norms: width of the queries and keys that are
    normalised head by head, 0 where they are not. words_per_grid: text tokens of a video for each grid time.
    """

    layers: int
    hidden: int
    inner: int
    vocabulary: int
    linears: tuple[tuple[int, int], ...]
    matrices: int
    language_rest: int
    embeddings: int
    head: int
    vision: int
    vision_hidden: int
    vision_inner: int
    patch: int
    merge: int
    temporal: int
    head_norms: int = 0
    words_per_grid: int = 0


def known_models() -> dict[str, dict]:
    r"""Return hub ids and the numbers of their config.json, for machines that cannot reach the hub."""
    return json.loads((CONFIGS / "architectures.json").read_text(encoding="utf-8"))["models"]


def is_known(model: str | Path) -> bool:
    r"""Tell whether `architecture_of` needs no network for this model."""
    return resolve(model).is_dir() or str(model) in known_models()


@functools.cache
def architecture_of(model: str | Path) -> Architecture:
    r"""Return the architecture of a model folder, of a hub id in `configs/architectures.json`, or of another hub id.

    The model is built on the meta device, where tensors have shapes and no numbers. Raises `ModelError`.
    """
    folder, facts = resolve(model), known_models().get(str(model))
    if facts and not folder.is_dir():
        config = transformers.CONFIG_MAPPING[facts["model_type"]](
            text_config=facts["text"], vision_config=facts["vision"],
            tie_word_embeddings=facts["text"]["tie_word_embeddings"])
    else:
        config = load_architecture(folder if folder.is_dir() else model)
    family = FAMILIES[config.model_type]
    with torch.device("meta"):
        built = getattr(transformers, family.model_class)(config)
    language, text, vision = built.model.language_model, config.text_config, config.vision_config
    layer, head, embeddings = language.layers[0], built.lm_head.weight, language.embed_tokens.weight
    linears = tuple(tuple(getattr(part, f"{name}_proj").weight.shape) for part, names in
                    ((layer.self_attn, "qkvo"), (layer.mlp, ("gate", "up", "down"))) for name in names)
    matrices = len(language.layers) * sum(rows * columns for rows, columns in linears)
    wide = getattr(vision, "embed_dim", None) or vision.hidden_size
    return Architecture(
        layers=len(language.layers), hidden=text.hidden_size, inner=text.intermediate_size,
        vocabulary=embeddings.shape[0], linears=linears, matrices=matrices,
        language_rest=language.num_parameters() - matrices - embeddings.numel(), embeddings=embeddings.numel(),
        head=0 if head is embeddings else head.numel(), vision=built.model.visual.num_parameters(), vision_hidden=wide,
        vision_inner=getattr(vision, "intermediate_size", None) or int(wide * vision.mlp_ratio),
        patch=vision.patch_size, merge=vision.spatial_merge_size, temporal=vision.temporal_patch_size,
        head_norms=linears[0][0] + linears[1][0] if hasattr(layer.self_attn, "q_norm") else 0,
        words_per_grid=family.words_per_grid)


def nf4_bytes(count: int) -> int:
    r"""Return the bytes of one matrix of `count` weights in NF4 with double quantization, about 0.516 a weight: half a
    byte each, one for the scale of 64, four for the scale of 256 scales, and per matrix 16 + 256 + 1 float32."""
    blocks = math.ceil(count / 64)
    return math.ceil(count / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 * (16 + 256 + 1)


def optimizer_bytes(sizes: list[int], optimizer: str, item: int = 4) -> int:
    r"""Return the bytes of AdamW's two moments: as wide as the parameters with a step counter each, or 8-bit with a
    float32 scale for 256 of them (tensors below 4096 values stay float32)."""
    if optimizer == "adamw":
        return sum(2 * item * size + 4 for size in sizes)
    return sum(8 * size if size < 4096 else 2 * size + 8 * math.ceil(size / 256) for size in sizes)


def static_bytes(config: TrainConfig, architecture: Architecture) -> dict[str, int]:
    r"""Return what every phase has in memory, by part. NF4 is for the language layers' matrices alone."""
    m, s = architecture, DTYPES[config.dtype].itemsize
    item = max(4, s)  # adapters are never narrower than float32
    size = nf4_bytes if config.quantization == "nf4" else lambda count: s * count
    adapters = [config.lora_rank * side for _ in range(m.layers) for shape in m.linears for side in shape]
    matrices = m.layers * sum(size(rows * columns) for rows, columns in m.linears)
    return {"language layers": matrices + s * m.language_rest, "embeddings": s * m.embeddings,
            "output head": s * m.head, "vision encoder": s * m.vision, "adapter": item * sum(adapters),
            "gradients": item * sum(adapters), "optimizer": optimizer_bytes(adapters, config.optimizer, item),
            "feature cache": config.feature_cache_mb * 2**20}


@dataclass(frozen=True)
class Sizes:
    r"""The numbers that the phases share; see the letters in this module's docstring."""

    m: Architecture
    s: int
    a: int
    rank: int
    prompt: int
    completion: int

    @property
    def cache_per_token(self) -> int:
        r"""Keys and values of one token in all layers."""
        return 2 * self.s * self.m.linears[1][0] * self.m.layers

    def saved(self, rows: int, queries: int, keys: int, masked: bool) -> int:
        r"""Bytes that autograd keeps of one language layer for rows of `queries` tokens that attend to `keys`.

        | what is kept, for which gradient | bytes a token |
        | --- | --- |
        | input of both norms, and of those of queries and keys (Qwen3), float32 | 2 x 4H, and 4(Q + K) |
        | input of q, k, v, and of gate, up, for their A (cast to a bytes, a copy each, where a > s) | 5aH, or 2aH |
        | gate's output, its SiLU and up's output, for the product; input of down's A | 3sI + aI |
        | queries, attention's output, and input of o's A (which is that output where a = s) | 2sQ + aQ, or sQ + aQ |
        | the seven A's outputs, for their B | 7ar |

        and of attention with a mask: the mask, and keys and values repeated for every query head.
        """
        m, a, s, cast, query = self.m, self.a, self.s, self.a > self.s, self.m.linears[0][0]
        token = ((8 + (5 if cast else 2) * a) * m.hidden + (3 * s + a) * m.inner + (a + (1 + cast) * s) * query
                 + 7 * a * self.rank + 4 * m.head_norms)
        return rows * queries * token + (s * rows * keys * (2 * query + queries) if masked else 0)

    def graph(self, rows: int, queries: int, keys: int, masked: bool, checkpointing: bool) -> tuple[int, int]:
        r"""(bytes kept of all layers, of one layer more while it is recomputed) for a forward with gradients."""
        m, layer, tokens = self.m, self.saved(rows, queries, keys, masked), rows * queries
        ends = tokens * (4 + self.s) * m.hidden  # the embeddings, and the last norm's input in float32
        if checkpointing:
            return m.layers * tokens * self.s * m.hidden + ends, layer
        return m.layers * layer + ends, 0

    def temporary(self, tokens: int, backward: bool = False) -> int:
        r"""Bytes at the widest point of a layer besides what is kept: the MLP's product and its adapters."""
        m, s, a = self.m, self.s, self.a
        inner, hidden = (s + a, 2 * s + a) if backward else (2 * s + 2 * a, 3 * s + a)
        return tokens * (inner * m.inner + hidden * m.hidden)


def encode_phase(config: TrainConfig, m: Architecture) -> dict[str, int]:
    r"""The vision encoder on one clip, without gradients."""
    patches = math.ceil(config.num_frames / m.temporal) * (config.frame_size // m.patch) ** 2
    inside = DTYPES[config.dtype].itemsize * (5 * m.vision_hidden + 3 * m.vision_inner) + 4 * m.vision_hidden
    return {"pixels": patches * 3 * m.temporal * m.patch**2 * 12,  # float32: frames, normalised, as patches
            "temporary values": patches * inside}


def sampling_phase(sizes: Sizes, prompts: int, samples: int, greedy: bool, dense: int) -> dict[str, int]:
    r"""Sampling `samples` completions of each of `prompts` prompts; or evaluation, which is the same."""
    m, rows, keys, tokens = sizes.m, prompts * samples, sizes.prompt + sizes.completion, prompts * sizes.prompt
    cache = rows * keys * sizes.cache_per_token
    logits = rows * m.vocabulary * (LOGIT_BYTES if greedy else 20)  # sampling accumulates in float64
    prefill = sizes.temporary(tokens) + tokens * sizes.prompt * (1 + sizes.s)
    repeated = 2 * sizes.s * rows * keys * m.linears[0][0]  # one layer's keys and values for every query head
    copied = 0 if samples == 1 else cache // m.layers  # a group divides into a new cache, layer by layer
    return {"prompts' cache": tokens * sizes.cache_per_token, "key-value cache": cache,
            "temporary values": max(prefill - cache, logits + max(copied, repeated)), "dense weights": dense}


def update_phase(sizes: Sizes, prompts: int, rows: int, checkpointing: bool, dense: int) -> dict[str, int]:
    r"""Forward and backward of one update: the prompts' graph, and that of a micro-batch of `rows` completions."""
    read, tokens = max(sizes.completion - 1, 1), prompts * sizes.prompt  # a completion's last token is never read
    prompt, prompt_layer = sizes.graph(prompts, sizes.prompt, sizes.prompt, prompts > 1, checkpointing)
    completion, layer = sizes.graph(rows, read, sizes.prompt + read, True, checkpointing)
    logits = min(rows * read * sizes.m.vocabulary, max(LOGIT_CHUNK, sizes.m.vocabulary)) * LOGIT_BYTES
    completions = completion + max(logits, layer + sizes.temporary(rows * read, backward=True))
    cache = tokens * sizes.cache_per_token
    return {"prompts' graph": prompt, "key-value cache": cache, "its gradient": cache,
            "completions": max(completions, prompt_layer + sizes.temporary(tokens, backward=True)),
            "dense weights": dense}


@dataclass(frozen=True)
class Prediction:
    r"""Predicted bytes: `static` by part, `phases` each by part; largest: the phase that takes most; peak: all tensors
    in it; needed: what the device must have, on a GPU with what CUDA takes. prompt: tokens of a prompt."""

    static: dict[str, int]
    phases: dict[str, dict[str, int]]
    on_gpu: bool
    prompt: int
    peak: int
    needed: int
    largest: str


as_dict = asdict  # a prediction's JSON values


def predict(config: TrainConfig, *, image: bool = True, text_tokens: int = TEXT_TOKENS,
            on_gpu: bool | None = None) -> Prediction:
    r"""Predict the memory of a training run.

    image: every record has a picture besides its clip (SEED-Bench-R1's observation). text_tokens: of question,
    options, instruction and template. on_gpu: add what CUDA takes; None: if the config's device is a GPU.
    """
    m, s = architecture_of(config.model), DTYPES[config.dtype].itemsize
    grids = math.ceil(config.num_frames / m.temporal)
    seen = (grids + image) * (config.frame_size // (m.patch * m.merge)) ** 2 + grids * m.words_per_grid
    hint = math.ceil(config.hint_max * config.max_new_tokens) if config.augment in ("both", "hard") else 0
    sizes = Sizes(m, s, max(4, s), config.lora_rank, seen + text_tokens + hint, config.max_new_tokens)
    dense = max(rows * columns for rows, columns in m.linears) * s if config.quantization == "nf4" else 0
    # While sampling, dense copies of all matrices; else one matrix at a time is dequantized.
    merged = m.matrices * s if s >= 4 and m.matrices * s <= config.merge_mb * 2**20 else dense
    prompts, group = config.prompts_per_step, config.group_size
    sampled = min(config.sample_batch or prompts, prompts)
    phases = {"encode": encode_phase(config, m), "sample": sampling_phase(sizes, sampled, group, False, merged),
              "update": update_phase(sizes, prompts, min(config.micro_batch or math.inf, prompts * group),
                                     config.gradient_checkpointing, dense)}
    if config.eval_files:
        batch = min(config.eval_batch, config.eval_limit or config.eval_batch)
        phases["evaluate"] = sampling_phase(sizes, batch, config.eval_samples, config.eval_temperature == 0, merged)
    static, on_gpu = static_bytes(config, m), torch.device(config.device).type == "cuda" if on_gpu is None else on_gpu
    largest = max(phases, key=lambda name: sum(phases[name].values()))
    peak = sum(static.values()) + sum(phases[largest].values())
    needed = int(peak * (1 + FRAGMENTS)) + CUDA_BYTES if on_gpu else peak
    return Prediction(static, phases, on_gpu, sizes.prompt, peak, needed, largest)


def table(prediction: Prediction) -> str:
    r"""Return the prediction as text: every static part, every phase, and the sum, in units of 2**30 bytes."""
    rows = [(name, size, "") for name, size in prediction.static.items() if size]
    rows.append(("static", sum(prediction.static.values()), ""))
    for name, parts in prediction.phases.items():
        named = ", ".join(f"{part} {size / GB:.2f}" for part, size in parts.items() if size >= 0.005 * GB)
        mark = "  <- the largest" if name == prediction.largest else ""
        rows.append((f"phase {name}", sum(parts.values()), mark + (f"  ({named})" if named else "")))
    rows.append(("peak", prediction.peak, f" of tensors, prompts of {prediction.prompt} tokens"))
    rows += [("needed", prediction.needed, " with what CUDA takes")] * prediction.on_gpu
    return "\n".join(f"{name:<24}{size / GB:8.2f} GB{note}" for name, size, note in rows)


FIXES = {  # what to change when a phase is too large, the most useful first
    "encode": "lower num_frames or frame_size",
    "sample": "lower sample_batch, max_new_tokens or num_frames",
    "update": "set gradient_checkpointing: true, lower micro_batch, or lower prompts_per_step",
    "evaluate": "lower eval_batch or num_frames",
}


def check_fits(config: TrainConfig, gb: float, **options) -> Prediction:
    r"""Return the prediction (options as in `predict`); raise `ConfigError`, naming the fields to change, if it needs
    more than `gb` x 2**30 bytes."""
    prediction = predict(config, **options)
    if prediction.needed > gb * GB:
        fix = FIXES[prediction.largest]
        if sum(prediction.static.values()) > 0.8 * gb * GB:
            left = [text for text, done in (("quantization: nf4", config.quantization == "nf4"), (
                "optimizer: paged-adamw-8bit", config.optimizer == "paged-adamw-8bit")) if not done]
            fix = f"set {' or '.join(left)}, or choose a smaller model" if left else "choose a smaller model"
        raise ConfigError(f"the run needs about {prediction.needed / GB:.1f} GB (most in phase {prediction.largest}), "
                          f"and there are {gb:.1f} GB: {fix}; `python -m dvr1_lite memory` lists what takes it, and "
                          f"check_memory: false trains anyway")
    return prediction


def device_gb(device: str) -> float:
    r"""Return the memory of a GPU in 2**30 bytes."""
    return torch.cuda.get_device_properties(torch.device(device)).total_memory / GB


def check_machine(config: TrainConfig) -> None:
    r"""Check, before anything large is loaded, that this machine can run the config. Raises `UserError`."""
    device = check_hardware(config.quantization, config.dtype, config.device)
    if config.optimizer != "adamw" and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"optimizer: {config.optimizer} needs bitsandbytes, which is not installed: pip install "
                         f"bitsandbytes, or use optimizer: adamw")
    if config.optimizer == "paged-adamw-8bit" and device.type != "cuda":
        raise ConfigError(f"optimizer: paged-adamw-8bit moves its moments between a GPU and the computer's memory, and "
                          f"device is {config.device}: use optimizer: adamw-8bit or adamw, or device: cuda")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", device.index or 0)))
        if config.check_memory and is_known(config.model):
            check_fits(config, device_gb(config.device))
