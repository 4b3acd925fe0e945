r"""How much memory a run takes, from its configuration and the model's architecture alone: no weights, no GPU.

What stands in memory all the time (weights, adapter, gradients, optimizer, feature cache) is counted exactly. What
comes and goes is predicted for each phase of a step (encode, sample, update, evaluate), of which one runs at a time:

    peak = standing + the largest phase,        needed on a GPU = peak x 1.05 (fragments) + 0.6 GB (CUDA itself)

A phase's activations follow from what autograd keeps of one token in one layer (`saved_per_token`). `LiveBytes`
measures the same on a real model, and the tests hold the two against each other on small models of both families.
Differs from the paper: it names its GPUs (A100, H200) and no memory.

Letters: B prompts, G completions each, P prompt tokens, T completion tokens, V vocabulary, H hidden size, I the MLP's
inner size, Q and K the widths of all query and of all key heads; s bytes of the computation's numbers, a the adapter's.
"""

from __future__ import annotations

import functools
import json
import math
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .config import TrainConfig
from .errors import ConfigError
from .paths import resolve
from .policy import DTYPES, FAMILIES, LOGIT_CHUNK, load_architecture, torch_device

GB = 2**30
FACTS = Path(__file__).parent / "configs" / "architectures.json"
CUDA_BYTES = int(0.6 * GB)  # the driver's context and the libraries' own buffers, whatever the model
FRAGMENTS = 0.05  # of the peak: gaps that PyTorch's allocator cannot use
TEXT_TOKENS = 256  # question, options, instruction and the chat template, unless told otherwise
NF4_BLOCK, NESTED_BLOCK = 64, 256  # weights that share one scale; scales that share one scale
OPTIMIZER_BLOCK, OPTIMIZER_SMALLEST = 256, 4096  # 8-bit AdamW: values that share a scale; smaller tensors stay 32-bit
LOGIT_BYTES = 12  # of one logit: three float32 values at once, forward (logit, masked, log-softmax) and backward


# --- architectures ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    r"""The sizes of a Qwen-VL model that memory depends on.

    linears: (out, in) of the seven quantised and adapted matrices of one language layer. The rest are parameter
    counts: language_rest (norms and biases), embeddings, head (0 where it is tied to the embeddings), vision.
    """

    name: str
    layers: int
    hidden: int
    inner: int
    query_width: int
    key_width: int
    heads: int
    vocabulary: int
    linears: tuple[tuple[int, int], ...]
    language_rest: int
    embeddings: int
    head: int
    vision: int
    vision_hidden: int
    vision_inner: int
    patch: int
    merge: int
    temporal: int

    @property
    def matrix_parameters(self) -> int:
        return self.layers * sum(rows * columns for rows, columns in self.linears)

    @property
    def parameters(self) -> int:
        return self.matrix_parameters + self.language_rest + self.embeddings + self.head + self.vision


def architecture_of(model: str | Path) -> Architecture:
    r"""The architecture of a model folder, of a hub id that `configs/architectures.json` knows, or of the hub's own.

    Raises `ModelError` if none of them has it.
    """
    folder = resolve(model)
    if not folder.is_dir() and str(model) in known_models():
        return _from_facts(str(model))
    return measure_architecture(load_architecture(folder if folder.is_dir() else model), str(model))


def is_known(model: str | Path) -> bool:
    r"""Whether `architecture_of` needs no network for this model."""
    return resolve(model).is_dir() or str(model) in known_models()


def known_models() -> dict[str, dict]:
    r"""Hub ids and the numbers of their config.json, for machines that cannot reach the hub."""
    return json.loads(FACTS.read_text(encoding="utf-8"))["models"]


@functools.cache
def _from_facts(model: str) -> Architecture:
    from transformers import CONFIG_MAPPING

    facts = known_models()[model]
    config = CONFIG_MAPPING[facts["model_type"]](text_config=facts["text"], vision_config=facts["vision"],
                                                 tie_word_embeddings=facts["text"]["tie_word_embeddings"])
    return measure_architecture(config, model)


def measure_architecture(config, name: str) -> Architecture:
    r"""Builds the model of a transformers config on the meta device, where tensors have shapes and no numbers."""
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, FAMILIES[config.model_type])(config)
    language, visual = model.model.language_model, model.model.visual
    text, vision = config.text_config, config.vision_config
    layer = language.layers[0]
    linears = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.o_proj,
               layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]
    shapes = tuple(tuple(linear.weight.shape) for linear in linears)
    embeddings = language.embed_tokens.weight
    matrices = len(language.layers) * sum(rows * columns for rows, columns in shapes)
    wide = getattr(vision, "embed_dim", None) or vision.hidden_size
    return Architecture(
        name=name, layers=len(language.layers), hidden=text.hidden_size, inner=text.intermediate_size,
        query_width=shapes[0][0], key_width=shapes[1][0], heads=text.num_attention_heads,
        vocabulary=embeddings.shape[0], linears=shapes,
        language_rest=_count(language) - matrices - embeddings.numel(), embeddings=embeddings.numel(),
        head=0 if model.lm_head.weight is embeddings else model.lm_head.weight.numel(), vision=_count(visual),
        vision_hidden=wide, vision_inner=getattr(vision, "intermediate_size", None) or int(wide * vision.mlp_ratio),
        patch=vision.patch_size, merge=vision.spatial_merge_size, temporal=vision.temporal_patch_size)


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- what stands all the time ----------------------------------------------------------------------------------------


def nf4_bytes(count: int) -> int:
    r"""Bytes of one matrix of `count` weights in NF4 with double quantisation, as bitsandbytes stores it.

    Half a byte a weight; one byte for the scale of 64 weights; four for the scale of 256 scales; and for each matrix
    two tables (16 and 256 numbers) and one offset. About 0.516 bytes a weight.
    """
    blocks = math.ceil(count / NF4_BLOCK)
    return math.ceil(count / 2) + blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 4 * (16 + 256 + 1)


def weight_bytes(architecture: Architecture, quantization: str, dtype: str) -> dict[str, int]:
    r"""Bytes of the frozen weights by part. NF4 is for the language layers' matrices alone: embeddings, output head,
    vision encoder, norms and biases stay in `dtype`."""
    a, s = architecture, DTYPES[dtype].itemsize
    size = nf4_bytes if quantization == "nf4" else lambda count: s * count
    matrices = a.layers * sum(size(rows * columns) for rows, columns in a.linears)
    return {"language layers": matrices + s * a.language_rest,
            "embeddings": s * a.embeddings, "output head": s * a.head, "vision encoder": s * a.vision}


def adapter_shapes(architecture: Architecture, rank: int) -> list[int]:
    r"""Number of parameters of each of the adapter's matrices: A is (rank, in) and B (out, rank), for each linear."""
    return [size for _ in range(architecture.layers) for rows, columns in architecture.linears
            for size in (rank * columns, rank * rows)]


def optimizer_bytes(sizes: list[int], optimizer: str, item: int = 4) -> int:
    r"""Bytes of AdamW's two means: as wide as the parameters, or 8-bit with a 32-bit scale for 256 of them."""
    if optimizer == "adamw":
        return sum(2 * item * size + 4 for size in sizes)  # and a step counter for each
    small = [size for size in sizes if size < OPTIMIZER_SMALLEST]
    large = [size for size in sizes if size >= OPTIMIZER_SMALLEST]
    return 8 * sum(small) + sum(2 * size + 2 * 4 * math.ceil(size / OPTIMIZER_BLOCK) for size in large)


def standing_bytes(config: TrainConfig, architecture: Architecture, shards: int = 1) -> dict[str, int]:
    r"""What is in memory in every phase, by part; of divided weights one shard and the layer that is whole just now."""
    sizes, item = adapter_shapes(architecture, config.lora_rank), _adapter_item(config)
    weights = weight_bytes(architecture, config.quantization, config.dtype)
    if shards > 1 and config.quantization == "none":
        layer = DTYPES[config.dtype].itemsize * architecture.matrix_parameters // architecture.layers
        weights["language layers"] -= architecture.layers * (layer - math.ceil(layer / shards))
        weights["one layer whole"] = layer
    return weights | {
        "adapter": item * sum(sizes), "gradients": item * sum(sizes),
        "optimizer": optimizer_bytes(sizes, config.optimizer, item), "feature cache": config.feature_cache_mb * 2**20}


def _adapter_item(config: TrainConfig) -> int:
    return max(4, DTYPES[config.dtype].itemsize)  # adapters are never narrower than float32


# --- tokens ----------------------------------------------------------------------------------------------------------


def visual_tokens(config: TrainConfig, architecture: Architecture, image: bool = True) -> int:
    r"""Tokens that stand for a clip, and for one more picture if `image`: one for merge x merge patches."""
    side = config.frame_size // (architecture.patch * architecture.merge)
    return (math.ceil(config.num_frames / architecture.temporal) + image) * side**2


def prompt_tokens(config: TrainConfig, architecture: Architecture, image: bool = True,
                  text_tokens: int = TEXT_TOKENS) -> int:
    r"""P of the longest prompt: what is seen, the text, and a hint of `hint_max` of the longest completion."""
    hints = config.augment in ("both", "hard")
    hint = math.ceil(config.hint_max * config.max_new_tokens) if hints else 0
    return visual_tokens(config, architecture, image) + text_tokens + hint


# --- what comes and goes ---------------------------------------------------------------------------------------------


def saved_per_token(architecture: Architecture, s: int, a: int, rank: int) -> int:
    r"""Bytes that autograd keeps of one token in one language layer, outside of attention.

    | what is kept, for which gradient | bytes |
    | --- | --- |
    | input of both norms, float32 | 2 x 4H |
    | input of q, k, v, and of gate, up, for their A (cast to a bytes, a copy each, where a > s) | 5aH, or 2aH |
    | gate's output, its SiLU and up's output, for the product | 3sI |
    | input of o's A; input of down's A | aQ + aI |
    | the seven A's outputs, for their B | 7ar |
    """
    m, copies = architecture, 5 if a > s else 2
    return (8 + copies * a) * m.hidden + a * m.query_width + (3 * s + a) * m.inner + 7 * a * rank


def working_per_token(architecture: Architecture, s: int, a: int) -> int:
    r"""Bytes of one token's temporary values at the widest point of a layer without gradients: the MLP and its
    adapters (gate's SiLU, up's output, and the adapter's part of it twice)."""
    return (2 * s + 2 * a) * architecture.inner + (3 * s + a) * architecture.hidden


def backward_per_token(architecture: Architecture, s: int, a: int) -> int:
    r"""The same in the backward pass: the gradients of the MLP's product, by way of down and of its adapter."""
    return (s + a) * architecture.inner + (2 * s + a) * architecture.hidden


@dataclass(frozen=True)
class Sizes:
    r"""The numbers that the phases share; see the letters in this module's docstring."""

    architecture: Architecture
    s: int
    a: int
    rank: int
    prompt: int
    completion: int

    @property
    def cache_per_token(self) -> int:
        r"""Keys and values of one token in all layers."""
        return 2 * self.s * self.architecture.key_width * self.architecture.layers

    def attended(self, rows: int, queries: int, keys: int, *, masked: bool, packed: bool) -> int:
        r"""What one layer's attention keeps: queries and output; where there is a mask, the mask in the computation's
        numbers and keys and values repeated for every query head (else those of the prompt are the cache's own); and,
        where padding was packed away, queries, keys and values once more as they were packed."""
        q, k = self.architecture.query_width, self.architecture.key_width
        own_output = packed or self.a > self.s  # else it is the input of o's A, which is counted already
        token = q * (1 + own_output) + packed * (q + 2 * k)
        key = 2 * q + queries if masked else 2 * k * packed
        return self.s * rows * (queries * token + keys * key)

    def graph(self, tokens: int, attended: int, checkpointing: bool) -> tuple[int, int]:
        r"""(kept over all layers, one layer more while it is recomputed) for a forward with gradients."""
        m = self.architecture
        layer = tokens * saved_per_token(m, self.s, self.a, self.rank) + attended
        ends = tokens * (4 + self.s) * m.hidden  # the embeddings, and the last norm's input in float32
        if checkpointing:
            return m.layers * tokens * self.s * m.hidden + ends, layer
        return m.layers * layer + ends, 0

    def forward(self, tokens: int) -> int:
        return tokens * working_per_token(self.architecture, self.s, self.a)

    def backward(self, tokens: int) -> int:
        return tokens * backward_per_token(self.architecture, self.s, self.a)


def _sizes(config: TrainConfig, architecture: Architecture, image: bool, text_tokens: int) -> Sizes:
    return Sizes(architecture, DTYPES[config.dtype].itemsize, _adapter_item(config), config.lora_rank,
                 prompt_tokens(config, architecture, image, text_tokens), config.max_new_tokens)


def encode_phase(config: TrainConfig, architecture: Architecture) -> dict[str, int]:
    r"""The vision encoder on one clip, without gradients."""
    m, s = architecture, DTYPES[config.dtype].itemsize
    patches = math.ceil(config.num_frames / m.temporal) * (config.frame_size // m.patch) ** 2
    pixels = patches * 3 * m.temporal * m.patch**2 * 12  # float32: frames, normalised, as patches
    return {"pixels": pixels, "working values": patches * (s * (5 * m.vision_hidden + 3 * m.vision_inner)
                                                           + 4 * m.vision_hidden)}


def sampling_phase(sizes: Sizes, prompts: int, samples: int, greedy: bool, dense: int) -> dict[str, int]:
    r"""Sampling `samples` completions of each of `prompts` prompts; or evaluation, which is the same."""
    m, rows = sizes.architecture, prompts * samples
    cache = rows * (sizes.prompt + sizes.completion) * sizes.cache_per_token
    logits = rows * m.vocabulary * (LOGIT_BYTES if greedy else 20)  # sampling accumulates in float64
    prefill = (sizes.forward(prompts * sizes.prompt) + prompts * sizes.prompt**2 * (1 + sizes.s)
               + prompts * sizes.prompt * sizes.cache_per_token)
    decoding = cache + cache // m.layers + logits  # a layer's cache stands twice while the group divides
    return {"key-value cache": cache, "logits": logits,
            "working values": max(prefill - cache - logits, decoding - cache - logits), "dense weights": dense}


def update_phase(sizes: Sizes, prompts: int, group: int, micro_batch: int | None, checkpointing: bool, dense: int,
                 flash: bool = False) -> dict[str, int]:
    r"""Forward and backward of one inner update: the prompts' graph, that of one micro-batch of completions, logits."""
    m, rows = sizes.architecture, min(micro_batch or prompts * group, prompts * group)
    read = max(sizes.completion - 1, 1)  # the last token is predicted and never read
    tokens, keys = prompts * sizes.prompt, sizes.prompt + read
    seen = sizes.attended(prompts, sizes.prompt, sizes.prompt, masked=prompts > 1, packed=False)
    prompt, prompt_layer = sizes.graph(tokens, seen, checkpointing)
    cache = tokens * sizes.cache_per_token
    seen = sizes.attended(rows, read, keys, masked=not flash or prompts > 1, packed=True)
    completion, completion_layer = sizes.graph(rows * read, seen, checkpointing)
    chunk = min(rows * read, max(1, LOGIT_CHUNK // m.vocabulary))
    logits = (chunk * LOGIT_BYTES + 4 * (prompts + rows)) * m.vocabulary
    end = completion + max(logits, completion_layer + sizes.backward(rows * read))
    begin = prompt_layer + sizes.backward(tokens)
    return {"prompts' graph": prompt, "key-value cache": cache, "its gradient": cache,
            "completions' graph": completion if end >= begin else 0,
            "working values": max(end, begin) - (completion if end >= begin else 0), "dense weights": dense}


# --- the whole -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    r"""Predicted bytes: `standing` by part, `phases` each by part, and what a GPU needs besides (`reserve`)."""

    standing: dict[str, int]
    phases: dict[str, dict[str, int]]
    on_gpu: bool
    prompt: int

    @property
    def largest(self) -> str:
        r"""The phase that takes most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        r"""Bytes of all tensors at the worst moment."""
        return sum(self.standing.values()) + sum(self.phases[self.largest].values())

    @property
    def needed(self) -> int:
        r"""What the device must have: the peak, and on a GPU fragments and CUDA itself."""
        return int(self.peak * (1 + FRAGMENTS)) + CUDA_BYTES if self.on_gpu else self.peak


def predict(config: TrainConfig, architecture: Architecture | None = None, *, image: bool = True,
            text_tokens: int = TEXT_TOKENS, on_gpu: bool | None = None, shards: int = 1) -> Prediction:
    r"""Predicts the memory of a training run.

    image: every record has one more picture (SEED-Bench-R1's observation). text_tokens: of question, options,
    instruction and template. on_gpu: count what CUDA takes; None: if the config's device is one.
    shards: of how many processes each keeps its part of the language layers' matrices (sharding.py; NF4 ones are never
    divided).
    """
    m = architecture or architecture_of(config.model)
    sizes = _sizes(config, m, image, text_tokens)
    largest = max(rows * columns for rows, columns in m.linears)
    dense = largest * sizes.s if config.quantization == "nf4" else 0  # one matrix at a time is unpacked
    merged = m.matrix_parameters * sizes.s
    if sizes.s < 4 or merged > config.merge_mb * 2**20:
        merged = dense
    batch = min(config.eval_batch, config.eval_limit or config.eval_batch) if config.eval_files else 0
    phases = {
        "encode": encode_phase(config, m),
        "sample": sampling_phase(sizes, config.prompts_per_step, config.group_size, False, merged),
        "update": update_phase(sizes, config.prompts_per_step, config.group_size, config.micro_batch,
                               config.gradient_checkpointing, dense, config.attention == "flash"),
    }
    if batch:
        phases["evaluate"] = sampling_phase(sizes, batch, config.eval_samples, config.eval_temperature == 0, merged)
    gpu = torch_device(config.device).type == "cuda" if on_gpu is None else on_gpu
    return Prediction(standing_bytes(config, m, shards), phases, gpu, sizes.prompt)


def table(prediction: Prediction) -> str:
    r"""The prediction as text: every part of what stands, every phase, and the sum, in units of 2**30 bytes."""
    lines = [f"{name:<24}{size / GB:8.2f} GB" for name, size in prediction.standing.items() if size]
    lines.append(f"{'standing':<24}{sum(prediction.standing.values()) / GB:8.2f} GB")
    for name, parts in prediction.phases.items():
        told = ", ".join(f"{part} {size / GB:.2f}" for part, size in parts.items() if size >= 0.005 * GB)
        mark = "  <- the largest" if name == prediction.largest else ""
        lines.append(f"{'phase ' + name:<24}{sum(parts.values()) / GB:8.2f} GB{mark}" + (f"  ({told})" if told else ""))
    lines.append(f"{'peak':<24}{prediction.peak / GB:8.2f} GB of tensors, prompts of {prediction.prompt} tokens")
    if prediction.on_gpu:
        lines.append(f"{'needed':<24}{prediction.needed / GB:8.2f} GB with CUDA's own")
    return "\n".join(lines)


# --- what to change --------------------------------------------------------------------------------------------------

# Fields that may be halved, and the least they are halved to: a number, or a share of what the config has.
SAME_NUMBERS = {"eval_batch": 1, "micro_batch": 1, "feature_cache_mb": 32}
OTHER_NUMBERS = {"prompts_per_step": 1, "max_new_tokens": 0.25, "num_frames": 0.25, "lora_rank": 0.25}


def remedies(config: TrainConfig) -> list[list[dict[str, object]]]:
    r"""Changes that save memory in three groups: what leaves the numbers as they are, what changes them a little, and
    what changes the experiment."""
    return [[{"gradient_checkpointing": True}, *_halves(config, SAME_NUMBERS)],
            [{"optimizer": "paged-adamw-8bit"}, {"quantization": "nf4"}], _halves(config, OTHER_NUMBERS)]


def _halves(config: TrainConfig, least: Mapping[str, float]) -> list[dict[str, object]]:
    changes = []
    for name, floor in least.items():
        value = getattr(config, name) or config.prompts_per_step * config.group_size  # micro_batch: none is all
        floor = floor * value if isinstance(floor, float) else floor
        while value // 2 >= max(floor, 1):
            value //= 2
            changes.append({name: value})
    return changes


def advise(config: TrainConfig, gb: float, architecture: Architecture | None = None, **options) -> dict[str, object]:
    r"""The changes with which the run fits `gb` x 2**30 bytes, none of them in vain; {} if it fits as it is.

    Raises `ConfigError` if all together are not enough.
    """
    m = architecture or architecture_of(config.model)
    need = lambda changes: predict(replace(config, **changes), m, **options).needed
    changes: dict[str, object] = {}
    groups = remedies(config)
    for group in groups + groups:  # once a later group has spoken, an earlier one may help again
        before = None
        while changes != before and need(changes) > gb * GB:  # one phase after another is the largest
            before = dict(changes)
            for change in group:
                if need(changes) > gb * GB and need(changes | change) < need(changes):
                    changes |= change
    if need(changes) > gb * GB:
        raise ConfigError(f"{config.model} needs {need(changes) / GB:.1f} GB even with {_told(changes)}; there are "
                          f"{gb:.1f} GB: choose a smaller model or a larger card")
    for name in reversed(list(changes)):  # what costs most comes last, and may have made earlier changes idle
        fewer = {key: value for key, value in changes.items() if key != name}
        changes = fewer if need(fewer) <= gb * GB else changes
    return changes


def _told(changes: Mapping[str, object]) -> str:
    words = {True: "true", False: "false"}
    return ", ".join(f"{name}: {words.get(value, value) if isinstance(value, bool) else value}"
                     for name, value in changes.items()) or "no change"


def check_fits(config: TrainConfig, gb: float, architecture: Architecture | None = None, **options) -> Prediction:
    r"""The prediction; raises `ConfigError`, naming the fields to lower, if it is more than `gb` x 2**30 bytes."""
    prediction = predict(config, architecture, **options)
    if prediction.needed <= gb * GB:
        return prediction
    changes = advise(config, gb, architecture, **options)
    raise ConfigError(f"the run needs about {prediction.needed / GB:.1f} GB (most in phase {prediction.largest}), "
                      f"there are {gb:.1f} GB: set {_told(changes)}; `python -m dvr1_lite memory` shows what takes "
                      f"it, and check_memory: false trains all the same")


def device_gb(device: str) -> float:
    r"""Memory of a GPU in 2**30 bytes."""
    return torch.cuda.get_device_properties(torch.device(device)).total_memory / GB


# --- measuring -------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    r"""Counts the bytes of all tensors that are made within it and still alive: `now`, and their `peak`.

    Tensors made before are not counted; scratch space inside a kernel is not seen.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, function, kinds, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        made = [result] if isinstance(result, torch.Tensor) else tree_leaves(result)
        for leaf in made:
            if isinstance(leaf, torch.Tensor) and id(leaf.untyped_storage()) not in self._known:
                self._watch(leaf.untyped_storage(), (arguments, keywords))
        return result

    def _watch(self, storage: torch.UntypedStorage, given) -> None:
        key = id(storage)
        if any(key == id(leaf.untyped_storage()) for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)):
            return  # a view, or in place, of something made before
        self._known[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key)


def as_dict(prediction: Prediction) -> dict:
    r"""The prediction as JSON values, with its sums."""
    return asdict(prediction) | {"peak": prediction.peak, "needed": prediction.needed, "largest": prediction.largest}
