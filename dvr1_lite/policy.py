r"""The policy: a Qwen-VL model whose frozen encoder runs once per clip and whose prompt is prefilled once per group.

A group is G completions of one prompt. Everything before the completion is the same for all G of them, so a pass over
B groups prefills B prompts (not B x G), expands their keys and values G times, and runs only the completion tokens
through the model, equal completions of a group once. Sampling, old, reference and training log-probs all take this one
path; in training the gradient flows back through the expanded keys and values into the prefill. Appendix C of the paper
has the set-up (QLoRA, frozen encoder). Differs from the paper: there the whole prompt is repeated for every completion;
the numbers are the same.

Axes: B groups, G completions of a group, T completion tokens, P prompt tokens, V visual tokens, H hidden size.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .errors import ConfigError, ModelError, NumericsError, RecordError
from .video import CLIP_MEAN, CLIP_STD, Clip, patchify

log = logging.getLogger(__name__)

FAMILIES = {"qwen2_vl": "Qwen2VLForConditionalGeneration", "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration"}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Only the language model's linear layers: the encoder's are called gate_proj, up_proj and down_proj too.
LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
# Tokens that stand for pixels or open a turn. A policy that samples one would feed on features that are not there.
NEVER_SAMPLED = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
                 "<|video_pad|>")
LOGIT_CHUNK = 2**26  # logits held at once, in elements: 256 MB in float32


@dataclass(frozen=True)
class LoraSettings:
    r"""Low-rank adapters on q, k, v, o, gate, up and down of every language layer.

    rank r >= 1; alpha: the update is scaled by alpha / r; seed of A's initial values (B starts at zero). There is no
    dropout: sampling, old and training log-probs must be those of one and the same model.
    """

    rank: int = 16
    alpha: float = 32.0
    seed: int = 0


@dataclass(frozen=True)
class VisualPart:
    r"""One encoded video or image: embeds (V, H), detached; grid (t, h, w) in patches; seconds from one grid time to
    the next."""

    kind: str
    embeds: torch.Tensor
    grid: tuple[int, int, int]
    seconds_per_grid: float = 1.0


@dataclass(frozen=True)
class Features:
    r"""What a prompt sees: its visual parts in the order in which they stand in the user turn. May be empty."""

    parts: tuple[VisualPart, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(part.embeds.numel() * part.embeds.element_size() for part in self.parts)


@dataclass(frozen=True)
class Prompt:
    r"""A tokenised prompt: input_ids (P,), position_ids (3, P) for time, height and width, and the next position."""

    text: str
    input_ids: torch.Tensor
    features: Features
    position_ids: torch.Tensor
    next_position: int


@dataclass(frozen=True)
class Completions:
    r"""Tokens of B x G completions: ids (B, G, T) int64, mask (B, G, T) bool, True up to and with the end token."""

    ids: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def from_lists(cls, groups: list[list[list[int]]], pad_id: int) -> Completions:
        r"""Right-pads lists of token ids, one list per completion, to one length."""
        rows = [torch.tensor(tokens, dtype=torch.long) for group in groups for tokens in group]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        shape = (len(groups), len(groups[0]), ids.shape[1])
        return cls(ids.view(shape), mask.view(shape))


class FeatureCache:
    r"""Encoded clips by key, at most `max_bytes` of them; the least recently used go first.

    A key names everything that changes the pixels: clip path, frame count, size, augmentation, its amount and seed.
    """

    def __init__(self, max_bytes: int = 2**28):
        self.max_bytes, self.nbytes, self.hits, self.misses = max_bytes, 0, 0, 0
        self._items: OrderedDict[Hashable, Features] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: Hashable, build: Callable[[], Features]) -> Features:
        r"""The features of `key`, built on a miss. Raises ConfigError if one clip alone is larger than the cache."""
        if key in self._items:
            self.hits += 1
            self._items.move_to_end(key)
            return self._items[key]
        self.misses += 1
        features = build()
        if features.nbytes > self.max_bytes:
            raise ConfigError(f"the features of {key} take {features.nbytes:,} bytes, the feature cache holds only "
                              f"{self.max_bytes:,}: raise feature_cache_mb (max_feature_bytes of Policy.load), or "
                              f"sample fewer or smaller frames")
        self._items[key] = features
        self.nbytes += features.nbytes
        while self.nbytes > self.max_bytes:
            self.nbytes -= self._items.popitem(last=False)[1].nbytes
        log.debug("feature cache: %d clips, %.1f of %.1f MB, %d hits, %d misses", len(self), self.nbytes / 1e6,
                  self.max_bytes / 1e6, self.hits, self.misses)
        return features


def rope_positions(pieces: list[int | VisualPart], merge_size: int, tokens_per_second: float | None,
                   after_video: str = "grid") -> tuple[torch.Tensor, int]:
    r"""Multimodal rotary positions (3, P) of time, height and width, and the position of the next token.

    pieces: text lengths and visual parts, in order. Text counts up on all three axes alike. A visual token has the time
    floor(i * tokens_per_second * seconds_per_grid) of its grid time i (i itself for an image, or where the family has
    no `tokens_per_second`: Qwen2-VL), and its row and column, all counted from where the text before it ended.
    after_video: text goes on at start + max(rows, columns), as transformers >= 5.3 has it ("grid"), or one after the
    largest position so far, as Qwen's own code and transformers <= 5.2 have it ("max"). The two differ for long clips.
    """
    blocks, start = [], 0
    for piece in pieces:
        if isinstance(piece, int):
            blocks.append((torch.arange(piece) + start).expand(3, -1))
            start += piece
            continue
        t, h, w = piece.grid[0], piece.grid[1] // merge_size, piece.grid[2] // merge_size
        scaled = piece.kind == "video" and tokens_per_second is not None
        interval = tokens_per_second * piece.seconds_per_grid if scaled else 1
        times = (torch.arange(t) * interval).long()
        grid = torch.meshgrid(times, torch.arange(h), torch.arange(w), indexing="ij")
        blocks.append(torch.stack(grid).reshape(3, -1) + start)
        start = start + max(h, w) if after_video == "grid" else int(blocks[-1].max()) + 1
    positions = torch.cat(blocks, dim=1)
    return positions, int(positions.max()) + 1


class _Recorder:
    r"""Stands in for transformers' cache while one layer prefills: keeps the keys and values it is handed."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = keys, values
        return keys, values


@dataclass(frozen=True)
class Packing:
    r"""N completions of different lengths without their padding: all M real tokens stand in one row, (1, M, ...).

    Linear layers, norms and the rotary embedding work on the packed row; attention alone unpacks it to (N, L).
    index (M,): the place of each real token in the N x L rectangle, row by row.
    """

    index: torch.Tensor
    rows: int
    length: int

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        r"""(1, heads, M, D) to (N, heads, L, D), zeros in the padding."""
        flat = x[0].transpose(0, 1)  # (M, heads, D)
        room = flat.new_zeros(self.rows * self.length, *flat.shape[1:])
        return room.index_copy(0, self.index, flat).unflatten(0, (self.rows, self.length)).transpose(1, 2)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        r"""(N, L, ...) to (1, M, ...)."""
        return x.flatten(0, 1).index_select(0, self.index)[None]


class _Prepender:
    r"""Stands in for transformers' cache in the completion forward: puts a group's prefix before each completion."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, copies: list[int], packing: Packing):
        self.prefix, self.copies, self.packing = (keys, values), copies, packing

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        new = [self.packing.unpack(x) for x in (keys, values)]
        return tuple(torch.cat([spread(old, self.copies), x], dim=2) for old, x in zip(self.prefix, new))


def _eager(module, query, key, value, mask, *, scaling: float, **_):
    r"""softmax(q k' / sqrt(d)) v, written out; one key head serves several query heads."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2), None


def _flash(module, query, key, value, mask, *, scaling: float, **options):
    r"""Without a padding mask, L queries that end where the keys end: torch's flash kernel where device and number type
    have one (a GPU; bfloat16 or float16), with neither a mask nor repeated keys in memory. Else as "sdpa"."""
    from torch.nn.attention.bias import causal_lower_right
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if mask is not None or query.shape[2] == 1:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)
    out = F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
                                         attn_mask=causal_lower_right(query.shape[2], key.shape[2]))
    return out.transpose(1, 2).contiguous(), None


def _register_attention(name: str) -> str:
    r"""Makes transformers' layers call attention `name` on unpacked completions; returns the name to configure."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    inner = {"sdpa": sdpa_attention_forward, "eager": _eager, "flash": _flash}[name]

    def attend(module, query, key, value, mask, packing: Packing | None = None, **kwargs):
        if packing is None:
            return inner(module, query, key, value, mask, **kwargs)
        out, _ = inner(module, packing.unpack(query), key, value, mask, **kwargs)  # (N, L, heads, D)
        return packing.pack(out), None

    AttentionInterface.register(f"shared_prefix_{name}", attend)
    AttentionMaskInterface.register(f"shared_prefix_{name}", sdpa_mask)
    return f"shared_prefix_{name}"


def spread(x: torch.Tensor, copies: list[int]) -> torch.Tensor:
    r"""Repeats the entry of group b copies[b] times: (B, ...) to (sum of copies, ...). Gradients sum over copies."""
    return torch.cat([part.expand(count, *x.shape[1:]) for part, count in zip(x.split(1), copies)])


@dataclass(frozen=True)
class Distinct:
    r"""The U different completions among B x G: ids (U, T), mask (U, T), their group (U,), and for each of the B x G
    its place among the U.

    Log-probs are a function of prompt and completion, so equal completions of a group need one forward, and their
    gradients add up in it. A group that has vanished often consists of a few completions many times over.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    group: torch.Tensor
    place: torch.Tensor
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, ids: torch.Tensor, mask: torch.Tensor) -> Distinct:
        groups, copies, _ = ids.shape
        owner = torch.arange(groups, device=ids.device).repeat_interleave(copies)
        keys = torch.cat([owner[:, None], ids.masked_fill(~mask, -1).flatten(0, 1)], dim=1)
        rows, place = torch.unique(keys, dim=0, return_inverse=True)  # sorted, so group by group
        return cls(rows[:, 1:].clamp(min=0), rows[:, 1:] >= 0, rows[:, 0], place, tuple(ids.shape))

    def everywhere(self, values: torch.Tensor) -> torch.Tensor:
        r"""Values (U, T) of the different completions, to all of them (B, G, T)."""
        return values[self.place].view(self.shape)

    def gather(self, slope: torch.Tensor) -> torch.Tensor:
        r"""The transpose of `everywhere`: sums slopes (B, G, T) over equal completions to (U, T)."""
        return slope.new_zeros(self.ids.shape).index_put_((self.place,), slope.flatten(0, 1), accumulate=True)

    def blocks(self, size: int | None) -> Iterator[tuple[slice, slice, list[int]]]:
        r"""Cuts the U completions into blocks of at most `size`: rows, groups touched, and rows in each of them."""
        count = len(self.ids)
        for start in range(0, count, size or count):
            rows = slice(start, min(start + (size or count), count))
            owners = self.group[rows].tolist()
            groups = slice(owners[0], owners[-1] + 1)
            yield rows, groups, [owners.count(group) for group in range(groups.start, groups.stop)]


@dataclass(frozen=True)
class Prefix:
    r"""B prefilled prompts, left-padded to P: per layer keys and values (B, heads, P, head size), the last hidden state
    (B, H), which tokens are real (B, P) and the next position (B,)."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    last: torch.Tensor
    real: torch.Tensor
    next_position: torch.Tensor

    @property
    def padded(self) -> bool:
        return not bool(self.real.all())

    def tensors(self) -> list[torch.Tensor]:
        return [*self.keys, *self.values, self.last]

    def leaves(self) -> Prefix:
        r"""The same numbers cut off from the prefill's graph, collecting gradients of their own."""
        cut = [x.detach().requires_grad_(x.requires_grad) for x in self.tensors()]
        n = len(self.keys)
        return replace(self, keys=cut[:n], values=cut[n:-1], last=cut[-1])

    def groups(self, rows: slice) -> Prefix:
        if rows == slice(0, len(self.last)):
            return self
        return Prefix([k[rows] for k in self.keys], [v[rows] for v in self.values], self.last[rows], self.real[rows],
                      self.next_position[rows])


def _layer(layer, hidden, mask, rope, cache, packing):
    out = layer(hidden, attention_mask=mask, position_embeddings=rope, past_key_values=cache, packing=packing)
    return out[0] if isinstance(out, tuple) else out


class Policy:
    r"""A video LLM with an adapter: encodes clips, builds prompts, and gives log-probs and exact gradients.

    The model stays in train mode, where nothing is random (all dropout is 0): bitsandbytes on CPU packs its weights for
    good at the first gradient-free forward in eval mode, and later training forwards would give no gradient.
    """

    def __init__(self, model: torch.nn.Module, tokenizer, preprocessing: dict, *, path: str, quantization: str,
                 gradient_checkpointing: bool = False, max_feature_bytes: int = 2**28, merge_bytes: int = 2**28,
                 after_video: str = "grid"):
        self.model, self.tokenizer, self.preprocessing, self.path = model, tokenizer, preprocessing, path
        self.quantization, self.gradient_checkpointing = quantization, gradient_checkpointing
        self.merge_bytes, self.after_video = merge_bytes, after_video
        self.features = FeatureCache(max_feature_bytes)
        self.core = model.get_base_model() if hasattr(model, "peft_config") else model
        self.language, self.visual = self.core.model.language_model, self.core.model.visual
        self.config = self.core.config
        self.device = self.language.embed_tokens.weight.device
        self.end_id, self.pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        if self.end_id is None or self.pad_id is None:
            raise ModelError(f"the tokenizer of {path} has no eos_token or no pad_token: name both in "
                             f"tokenizer_config.json")
        self.banned = self._banned_tokens()
        self.model.train()

    # ---------------------------------------------------------------------------------------------------- loading

    @classmethod
    def load(cls, path: str | Path, *, quantization: str = "none", lora: LoraSettings | None = None,
             adapter: str | Path | None = None, dtype: str = "float32", device: str = "cpu", attention: str = "sdpa",
             gradient_checkpointing: bool = False, max_feature_bytes: int = 2**28, merge_bytes: int = 2**28,
             local_files_only: bool = False, after_video: str = "grid",
             divide: Callable[[torch.nn.Module], object] | None = None) -> Policy:
        r"""Loads a Qwen2-VL or Qwen2.5-VL checkpoint from a folder or the hub; safetensors only, no remote code.

        quantization: "none" or "nf4" (double quantisation; language-model linear layers only). lora: new adapters, or
        None for a frozen model; adapter: a folder in peft's format instead, trainable again. dtype: of the frozen
        weights and the computation; adapters are at least float32. attention: "sdpa" (torch's fused kernels),
        "flash" (its flash kernel wherever no prompt is padded) or "eager" (written out). gradient_checkpointing:
        recompute each layer in the backward pass (exact, slower, less
        memory). max_feature_bytes: see `FeatureCache`; merge_bytes: see `merged`; after_video: see `rope_positions`.
        divide: called on the model in the computer's memory, before what is left of it goes to the device.
        Raises ModelError naming what cannot be loaded and the remedy.
        """
        _check_options(quantization, dtype, device, attention, after_video)
        local_files_only = _is_folder(path) or local_files_only  # a local folder never waits for the network
        config = _load_config(path, local_files_only)
        config.text_config.attention_dropout = 0.0
        first = device if divide is None else "cpu"
        model = _load_weights(path, config, quantization, dtype, first, attention, local_files_only)
        tokenizer = _load_tokenizer(path, local_files_only)
        preprocessing = _load_preprocessing(path, config, local_files_only)
        model.requires_grad_(False)
        if adapter is not None:
            model = _load_adapter(model, Path(adapter))
        elif lora is not None:
            model = _new_adapter(model, lora, str(path))
        if divide is not None:
            divide(model)
            model.to(device)
        return cls(model, tokenizer, preprocessing, path=str(path), quantization=quantization,
                   gradient_checkpointing=gradient_checkpointing, max_feature_bytes=max_feature_bytes,
                   merge_bytes=merge_bytes, after_video=after_video)

    def save_adapter(self, folder: str | Path) -> None:
        r"""Writes adapter_config.json (with the base model's path) and adapter_model.safetensors in peft's format."""
        if not hasattr(self.model, "peft_config"):
            raise ModelError("there is no adapter to save: the policy was loaded without lora")
        self.model.save_pretrained(str(folder), save_embedding_layers=False)

    def trainable(self) -> list[torch.nn.Parameter]:
        r"""The parameters that an optimizer may change, in the model's order."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        r"""Within it, linear layers use a dense copy of their weights with the adapter added: for sampling only.

        Decoding reads every weight once a token; dequantising it and adding the adapter's two products each time would
        cost more than the product itself. The copies are made once a sampling pass and dropped after it, only where
        they fit `merge_bytes` and nothing is lost by rounding (float32 or float64); the model stays as it is.
        """
        dense = {} if torch.is_grad_enabled() else self._merged_weights()
        try:
            for linear, forward in dense.items():
                linear.forward = forward
            yield
        finally:
            for linear in dense:
                del linear.forward

    def _merged_weights(self) -> dict[torch.nn.Module, Callable]:
        linears = [getattr(block, name) for layer in self.language.layers for block, names in
                   ((layer.self_attn, ("q_proj", "k_proj", "v_proj", "o_proj")),
                    (layer.mlp, ("gate_proj", "up_proj", "down_proj"))) for name in names]
        linears = [linear for linear in linears if type(linear) is not torch.nn.Linear]  # plain ones are dense
        dtype = self.language.embed_tokens.weight.dtype
        size = sum(linear.in_features * linear.out_features for linear in linears) * dtype.itemsize
        if dtype not in (torch.float32, torch.float64) or size > self.merge_bytes:
            return {}
        return {linear: functools.partial(_dense_forward, _dense_weight(linear), linear.bias) for linear in linears}

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        r"""The reference policy: the same weights with the adapter off."""
        off = self.model.disable_adapter() if hasattr(self.model, "peft_config") else contextlib.nullcontext()
        with off:
            yield

    # ------------------------------------------------------------------------------------------- clips and prompts

    def encode(self, clip: Clip | Callable[[], Clip] | None = None, image: torch.Tensor | None = None,
               key: Hashable | None = None) -> Features:
        r"""Runs the frozen encoder once on a clip, an image (3, H, W) in [0, 1], or both (the clip comes first).

        key: where given, the features are kept under it, and a clip given as a function is only read on a miss.
        """
        if key is not None:
            return self.features.get(key, lambda: self.encode(clip, image))
        clip = clip() if callable(clip) else clip
        parts = []
        if clip is not None:
            seconds = self.preprocessing["temporal_patch_size"] / clip.fps
            parts.append(self._encode_part("video", clip.frames, seconds))
        if image is not None:
            parts.append(self._encode_part("image", image.reshape(1, *image.shape[-3:]), 1.0))
        return Features(tuple(parts))

    @torch.no_grad()
    def _encode_part(self, kind: str, frames: torch.Tensor, seconds_per_grid: float) -> VisualPart:
        patches, grid = patchify(frames, **self.preprocessing)
        patches = patches.to(self.device, self.visual.patch_embed.proj.weight.dtype)
        self._stay_in_train_mode()
        encoded = self.visual(patches, grid_thw=grid[None].to(self.device))
        embeds = getattr(encoded, "pooler_output", encoded)
        return VisualPart(kind, embeds.to(self.language.embed_tokens.weight.dtype), tuple(grid.tolist()),
                          seconds_per_grid)

    def prompt(self, text: str, features: Features = Features()) -> Prompt:
        r"""The user turn (visual parts, then text) through the tokenizer's chat template, one token a visual feature.

        Raises RecordError if the text itself spells one of the model's control tokens, ModelError if the template
        fails or does not place the visual parts.
        """
        for word in (*NEVER_SAMPLED, self.tokenizer.eos_token, self.tokenizer.pad_token):
            if word in text:
                raise RecordError(f"the question contains the control token {word}: remove it ({text[:80]!r})")
        content = [*({"type": part.kind} for part in features.parts), {"type": "text", "text": text}]
        try:
            rendered = self.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                                          add_generation_prompt=True)
        except Exception as error:  # the template is the checkpoint's own program, run by Jinja's sandbox
            raise ModelError(f"the chat template of {self.path} fails ({type(error).__name__}: "
                             f"{str(error).splitlines()[0]}): download the checkpoint again") from error
        ids = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return self._expand(text, ids, features)

    def _expand(self, text: str, ids: list[int], features: Features) -> Prompt:
        r"""Repeats each visual part's single pad token to its number of features, and counts the positions."""
        pads = {self.config.video_token_id: "video", self.config.image_token_id: "image"}
        parts, pieces, expanded = list(features.parts), [], []
        for token in ids:
            if token in pads:
                if not parts or parts[0].kind != pads[token]:
                    break
                pieces.append(parts.pop(0))
                expanded += [token] * len(pieces[-1].embeds)
                continue
            expanded.append(token)
            pieces = [*pieces[:-1], pieces[-1] + 1] if pieces and isinstance(pieces[-1], int) else [*pieces, 1]
        if parts or len(expanded) != sum(p if isinstance(p, int) else len(p.embeds) for p in pieces) or (
                sum(token in pads for token in ids) != len(features.parts)):
            raise ModelError(f"the chat template of {self.path} does not place the visual parts "
                             f"{[part.kind for part in features.parts]} in order, one pad token each: use the "
                             f"checkpoint's own template")
        tokens_per_second = getattr(self.config.vision_config, "tokens_per_second", None)
        positions, after = rope_positions(pieces, self.preprocessing["merge_size"], tokens_per_second,
                                          self.after_video)
        return Prompt(text, torch.tensor(expanded, device=self.device), features, positions.to(self.device), after)

    def text(self, ids: torch.Tensor) -> str:
        r"""Decodes one completion's token ids (T,), special tokens left out."""
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    def unknown_words(self, *texts: str) -> list[str]:
        r"""The words of the texts, each once, for which the tokenizer has no token (only word-level ones lack any)."""
        words = dict.fromkeys(word.strip(".,;:!?\"'()") for text in texts for word in text.split())
        unknown = self.tokenizer.unk_token_id
        return [word for word in words if word and unknown is not None
                and unknown in self.tokenizer(word, add_special_tokens=False)["input_ids"]]

    def _banned_tokens(self) -> torch.Tensor:
        r"""Which of the vocabulary's tokens are never sampled: vision, turn and pad tokens, and ids without a word."""
        size = self.core.get_output_embeddings().weight.shape[0]
        banned = torch.zeros(size, dtype=torch.bool)
        banned[len(self.tokenizer):] = True
        known = self.tokenizer.get_vocab()
        names = [known[word] for word in NEVER_SAMPLED if word in known]
        banned[[*names, self.config.video_token_id, self.config.image_token_id, self.pad_id]] = True
        banned[self.end_id] = False
        return banned.to(self.device)

    # ------------------------------------------------------------------------------------------------ the model

    def _stay_in_train_mode(self) -> None:
        if not self.language.training or not self.visual.training:
            self.model.train()

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        r"""Cosines and sines at positions (3, B, L), as the layers of the installed transformers want them."""
        return self.language.rotary_emb(self.language.norm.weight, positions)

    def run(self, hidden: torch.Tensor, rope, mask: torch.Tensor | None, caches: list,
            packing: Packing | None = None) -> torch.Tensor:
        r"""Embeddings (N, L, H) through all layers, each with its own cache, to the final normed states (N, L, H).

        Checkpointing is done here: transformers' own drops the cache, and with it the prompt.
        """
        for layer, cache in zip(self.language.layers, caches):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(_layer, layer, hidden, mask, rope, cache, packing, use_reentrant=False,
                                    preserve_rng_state=False)
            else:
                hidden = _layer(layer, hidden, mask, rope, cache, packing)
        return self.language.norm(hidden)

    def prefill(self, prompts: list[Prompt]) -> Prefix:
        r"""Runs B prompts once, left-padded to the longest; with gradients if they are enabled."""
        self._stay_in_train_mode()
        longest = max(len(prompt.input_ids) for prompt in prompts)
        ids = torch.stack([F.pad(p.input_ids, (longest - len(p.input_ids), 0), value=self.pad_id) for p in prompts])
        positions = torch.stack([F.pad(p.position_ids, (longest - len(p.input_ids), 0)) for p in prompts], dim=1)
        lengths = torch.tensor([len(p.input_ids) for p in prompts], device=self.device)
        real = torch.arange(longest, device=self.device) >= longest - lengths[:, None]  # (B, P)
        embeds = self.language.embed_tokens(ids)
        visual = [part.embeds for prompt in prompts for part in prompt.features.parts]
        if visual:
            places = (ids == self.config.video_token_id) | (ids == self.config.image_token_id)
            embeds = embeds.masked_scatter(places[..., None], torch.cat(visual).to(embeds))
        causal = torch.ones(longest, longest, dtype=torch.bool, device=self.device).tril()
        eye = torch.eye(longest, dtype=torch.bool, device=self.device)  # a padding token attends to itself alone
        mask = None if bool(real.all()) else (causal & real[:, None, None, :]) | eye
        caches = [_Recorder() for _ in self.language.layers]
        hidden = self.run(embeds, self.rotary(positions), mask, caches)
        following = torch.tensor([prompt.next_position for prompt in prompts], device=self.device)
        return Prefix([c.keys for c in caches], [c.values for c in caches], hidden[:, -1], real, following)

    def token_logp(self, hidden: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
        r"""log p of tokens ids (N,) given the states before them (N, H); in chunks, so that few logits are held."""
        size = max(1, LOGIT_CHUNK // len(self.banned))
        if len(ids) <= size:
            return self._token_logp(hidden, ids, temperature)
        chunks = zip(hidden.split(size), ids.split(size))
        return torch.cat([checkpoint(self._token_logp, h, i, temperature, use_reentrant=False,
                                     preserve_rng_state=False) for h, i in chunks])

    def _token_logp(self, hidden, ids, temperature):
        return self.log_softmax(hidden, temperature).gather(-1, ids[:, None]).squeeze(-1)

    def log_softmax(self, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
        r"""log p(token | state), (N, H) to (N, vocabulary), at a temperature, with banned tokens at -inf."""
        logits = self.core.lm_head(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return torch.log_softmax((logits / temperature).masked_fill(self.banned, -math.inf), dim=-1)

    def _completion_logp(self, prefix: Prefix, ids: torch.Tensor, mask: torch.Tensor, copies: list[int],
                         temperature: float) -> torch.Tensor:
        r"""Log-probs (N, T) of completions ids (N, T), copies[b] of them after prefix b; 0 where mask is False.

        The first token is predicted by the prompt's last state, once per group; every later one by the token before
        it. So the last token of a completion is predicted but never read.
        """
        length = int(mask.any(0).sum())  # columns beyond the longest completion cost nothing
        first = spread(self.log_softmax(prefix.last, temperature), copies).gather(-1, ids[:, :1])  # (N, 1)
        columns = [first]
        read = mask[:, 1:length]  # (N, L): token t is read where token t + 1 is predicted
        if read.any():
            packing = Packing(read.flatten().nonzero().squeeze(-1), *read.shape)
            states = self._read_completions(prefix, ids[:, :length - 1], copies, packing)
            later = self.token_logp(states, packing.pack(ids[:, 1:length])[0], temperature)
            columns.append(later.new_zeros(read.numel()).index_copy(0, packing.index, later).view(read.shape))
        return F.pad(torch.cat(columns, dim=-1), (0, ids.shape[1] - length)).masked_fill(~mask, 0.0)

    def _read_completions(self, prefix: Prefix, tokens: torch.Tensor, copies: list[int],
                          packing: Packing) -> torch.Tensor:
        r"""Final states (M, H) at the packed ones of tokens (N, L), each row after its group's prefix."""
        steps = torch.arange(packing.length, device=self.device)
        positions = packing.pack(spread(prefix.next_position[:, None] + steps, copies))  # (1, M)
        caches = [_Prepender(k, v, copies, packing) for k, v in zip(prefix.keys, prefix.values)]
        hidden = self.run(self.language.embed_tokens(packing.pack(tokens)), self.rotary(positions.expand(3, -1, -1)),
                          self._completion_mask(prefix, copies, packing.length), caches, packing)
        return hidden[0]

    def _completion_mask(self, prefix: Prefix, copies: list[int], length: int) -> torch.Tensor | None:
        r"""What each completion token may see (N, 1, L, P + L): the real prompt tokens, the completion up to itself.
        None where that is all that stands before it and the attention knows it by itself."""
        if not prefix.padded and self.language.config._attn_implementation == "shared_prefix_flash":
            return None
        causal = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        real = prefix.real[:, None, :].expand(-1, length, -1)
        mask = torch.cat([real, causal.expand(len(real), -1, -1)], dim=-1)
        return spread(mask, copies)[:, None]

    # -------------------------------------------------------------------------------------- log-probs and gradients

    def logprobs(self, prompts: list[Prompt], completions: Completions, *, reference: bool = False,
                 temperature: float = 1.0, with_grad: bool = False, micro_batch: int | None = None) -> torch.Tensor:
        r"""Log-probs (B, G, T) of the completions, 0 where their mask is False; float32 (float64 for such a model).

        reference: with the adapter off. with_grad: keep the graph (`backward` is the way to gradients in less memory).
        micro_batch: completions per forward, None for all at once. Each prompt is prefilled once, and equal completions
        of a group are run once (`Distinct`).
        """
        distinct = self._distinct(prompts, completions, micro_batch)
        with torch.set_grad_enabled(with_grad), self.reference() if reference else contextlib.nullcontext():
            return distinct.everywhere(self._pieces(self.prefill(prompts), distinct, temperature, micro_batch))

    def _pieces(self, prefix: Prefix, distinct: Distinct, temperature: float, micro_batch: int | None) -> torch.Tensor:
        return torch.cat([self._completion_logp(prefix.groups(groups), distinct.ids[rows], distinct.mask[rows], copies,
                                                temperature) for rows, groups, copies in distinct.blocks(micro_batch)])

    def backward(self, prompts: list[Prompt], completions: Completions, objective: Callable, *,
                 micro_batch: int | None = None, temperature: float = 1.0) -> tuple[float, dict, torch.Tensor]:
        r"""Adds the full batch's exact gradient to the parameters, in forwards of `micro_batch` completions.

        objective: takes log-probs (B, G, T), gives (scalar loss, stats). Its gradient with respect to that small tensor
        is chained through the model, so that statistics over a whole group are differentiated as they should be.
        Memory: the prefill's graph (B prompts) is kept, that of the completions only for one micro-batch.
        Returns the loss, the stats and the log-probs, detached: those of the first pass on fresh rollouts are the old
        log-probs of the later ones. Raises NumericsError naming the group whose log-probs are not finite.
        """
        distinct = self._distinct(prompts, completions, micro_batch)
        with torch.enable_grad():
            prefix = self.prefill(prompts)
            whole = micro_batch is None or micro_batch >= len(distinct.ids)
            leaves = prefix if whole else prefix.leaves()
            with torch.set_grad_enabled(whole):
                values = self._pieces(leaves, distinct, temperature, micro_batch)
            logp = distinct.everywhere(values.detach())
            _check_finite(logp, prompts)
            loss, stats, slope = _differentiate(objective, logp)
            if whole:
                values.backward(distinct.gather(slope))
            else:
                self._chain(prefix, leaves, distinct, temperature, micro_batch, distinct.gather(slope))
        return loss, stats, logp

    def _chain(self, prefix: Prefix, leaves: Prefix, distinct: Distinct, temperature: float, micro_batch: int,
               slope: torch.Tensor) -> None:
        r"""Chains d loss / d logp through the completions, one micro-batch at a time, then through the prefill once."""
        for rows, groups, copies in distinct.blocks(micro_batch):
            if slope[rows].any():
                piece = self._completion_logp(leaves.groups(groups), distinct.ids[rows], distinct.mask[rows], copies,
                                              temperature)
                piece.backward(slope[rows])
        pairs = [(x, leaf.grad) for x, leaf in zip(prefix.tensors(), leaves.tensors()) if leaf.grad is not None]
        if pairs:
            torch.autograd.backward([x for x, _ in pairs], [grad for _, grad in pairs])

    def _distinct(self, prompts: list[Prompt], completions: Completions, micro_batch: int | None) -> Distinct:
        if len(prompts) != len(completions.ids):
            raise ValueError(f"{len(prompts)} prompts but {len(completions.ids)} groups of completions")
        if micro_batch is not None and micro_batch < 1:
            raise ConfigError(f"micro_batch is {micro_batch}: give 1 or more completions, or none for the whole batch")
        return Distinct.of(completions.ids.to(self.device), completions.mask.to(self.device).bool())


def _dense_forward(weight, bias, x, *_, **__):
    return F.linear(x, weight, bias)


def _dense_weight(linear: torch.nn.Module) -> torch.Tensor:
    r"""The weight (out, in) that a linear layer stands for: dequantised, and with its adapter unless that is off."""
    adapted = hasattr(linear, "get_base_layer")
    weight = (linear.get_base_layer() if adapted else linear).weight
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, weight.quant_state)
    if adapted and not linear.disable_adapters:
        for name in linear.active_adapters:
            weight = weight + linear.get_delta_weight(name)
    return weight


def _differentiate(objective: Callable, logp: torch.Tensor) -> tuple[float, dict, torch.Tensor]:
    leaf = logp.clone().requires_grad_()
    loss, stats = objective(leaf)
    if loss.requires_grad:
        loss.backward()
    slope = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    if not (bool(torch.isfinite(loss)) and bool(torch.isfinite(slope).all())):
        raise NumericsError(f"the loss is {float(loss.detach())} or its gradient is not finite: check the rewards, "
                            f"raise the objective's epsilon or lower the learning rate")
    return float(loss.detach()), stats, slope


def _check_finite(logp: torch.Tensor, prompts: list[Prompt]) -> None:
    bad = (~torch.isfinite(logp)).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise NumericsError(f"log-probs of group {bad[0]} are not finite (question {prompts[bad[0]].text[:80]!r}): "
                            f"lower the learning rate, or look for a banned token in its completions")


# -------------------------------------------------------------------------------------------------- loading, in steps


def _check_options(quantization: str, dtype: str, device: str, attention: str, after_video: str) -> None:
    choices = {"quantization": (quantization, ("none", "nf4")), "dtype": (dtype, tuple(DTYPES)),
               "attention": (attention, ("sdpa", "eager", "flash")),
               "after_video": (after_video, ("grid", "max"))}
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ConfigError(f"{name} is {value!r}: choose one of {', '.join(allowed)}")
    if quantization == "nf4" and dtype == "float64":
        raise ModelError("nf4 with float64 gives wrong numbers without a warning (bitsandbytes on CPU): use "
                         "dtype: float32, or quantization: none")
    if quantization == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("quantization: nf4 needs bitsandbytes, which is not installed (some platforms have no "
                         "wheel): pip install bitsandbytes, or run with quantization: none")
    _check_device(torch_device(device), dtype)


def torch_device(name: str) -> torch.device:
    r"""The device of that name. Raises ConfigError if there is no such kind of device."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}: give cpu, cuda or cuda:N") from error


def _check_device(device: torch.device, dtype: str) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {device} was asked for, but torch sees no GPU: use device: cpu, or install a CUDA "
                         f"build of torch")
    if device.type == "cuda" and dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ModelError(f"{torch.cuda.get_device_name(device)} has no bfloat16: use dtype: float16 or float32")


def _is_folder(path: str | Path) -> bool:
    r"""Whether `path` is a local folder; a name like "owner/model" that is no folder is taken for a hub id."""
    folder = Path(path)
    if folder.is_dir():
        return True
    text = str(path)
    if folder.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1:
        raise ModelError(f"there is no model folder {text}: give a folder with config.json and *.safetensors, or a "
                         f"hub id such as Qwen/Qwen2.5-VL-3B-Instruct")
    return False


@contextlib.contextmanager
def _load_errors(path: str | Path) -> Iterator[None]:
    r"""Turns what a missing, gated, unreachable or broken checkpoint raises into one ModelError with its remedy."""
    try:
        yield
    except Exception as error:  # torch, safetensors, transformers and the unpickler each have their own
        raise ModelError(f"model {path} {_why_not_loaded(error)}") from error


def _why_not_loaded(error: BaseException) -> str:
    told, current = "", error
    while current is not None:  # transformers wraps what the hub's client raised
        told += f" {type(current).__name__} {current}".lower()
        current = current.__cause__ or current.__context__
    if "gatedrepo" in told or "gated repo" in told:
        return "is gated: accept its terms on the hub and log in with `hf auth login`, or give a local folder"
    if "repositorynotfound" in told or "not a valid model identifier" in told:
        return "is neither a local folder nor on the hub: check the name, or log in if it is private"
    if any(word in told for word in ("connect", "offline", "localentrynotfound", "timed out", "timeout")):
        return "is no local folder, and the hub is out of reach: download it elsewhere and give its folder instead"
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return f"cannot be loaded ({first}): download or write it again, complete with tokenizer and safetensors"


def _load_config(path: str | Path, local_files_only: bool):
    if _is_folder(path) and (Path(path) / "config.json").is_file() and not any(Path(path).glob("*.safetensors")):
        raise ModelError(f"model folder {path} holds no weights (*.safetensors): download the checkpoint again, "
                         f"or convert pickled weights to safetensors")
    return load_architecture(path, local_files_only)


def load_architecture(path: str | Path, local_files_only: bool = False):
    r"""The transformers config of a checkpoint's config.json, without its weights. Raises ModelError."""
    from transformers import AutoConfig

    if _is_folder(path) and not (Path(path) / "config.json").is_file():
        raise ModelError(f"model folder {path} has no config.json: give the folder of a whole checkpoint (an "
                         f"adapter folder goes into `adapter`)")
    with _load_errors(path):
        config = AutoConfig.from_pretrained(path, local_files_only=local_files_only, trust_remote_code=False)
    if config.model_type not in FAMILIES:
        raise ModelError(f"model {path} is a {config.model_type}: choose one of {', '.join(FAMILIES)}")
    if getattr(config.text_config, "use_sliding_window", False):
        raise ModelError(f"model {path} has sliding-window attention, which a shared prefix does not keep: set "
                         f"use_sliding_window to false in its config.json")
    return config


def _load_weights(path, config, quantization, dtype, device, attention, local_files_only):
    import transformers

    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional kernel is missing
    options = {"config": config, "dtype": DTYPES[dtype], "attn_implementation": "sdpa", "use_safetensors": True,
               "local_files_only": local_files_only, "trust_remote_code": False}
    if quantization == "nf4":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[dtype], llm_int8_skip_modules=["model.visual", "visual", "lm_head"])
        options["device_map"] = {"": device}
    with _load_errors(path), _no_progress_bar():
        model = getattr(transformers, FAMILIES[config.model_type]).from_pretrained(path, **options)
    model.model.language_model.config._attn_implementation = _register_attention(attention)
    return model if quantization == "nf4" else model.to(device)


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _load_tokenizer(path: str | Path, local_files_only: bool):
    from transformers import AutoTokenizer

    with _load_errors(path):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=local_files_only, trust_remote_code=False)
    template = _read_json(path, "chat_template.json", local_files_only).get("chat_template")
    if template:  # a processor's template knows videos; the tokenizer's own may not
        tokenizer.chat_template = template
    if not tokenizer.chat_template:
        raise ModelError(f"the tokenizer of {path} has no chat template: add chat_template.jinja to the folder")
    return tokenizer


def _load_preprocessing(path: str | Path, config, local_files_only: bool) -> dict:
    r"""patch_size, temporal_patch_size, merge_size, mean and std; the vision config and CLIP's colours where unsaid."""
    said, vision = _read_json(path, "preprocessor_config.json", local_files_only), config.vision_config
    return {
        "patch_size": int(said.get("patch_size") or vision.patch_size),
        "temporal_patch_size": int(said.get("temporal_patch_size") or vision.temporal_patch_size),
        "merge_size": int(said.get("merge_size") or vision.spatial_merge_size),
        "mean": tuple(said.get("image_mean") or CLIP_MEAN),
        "std": tuple(said.get("image_std") or CLIP_STD),
    }


def _read_json(path: str | Path, name: str, local_files_only: bool) -> dict:
    from transformers.utils import cached_file

    with _load_errors(path):
        found = cached_file(str(path), name, local_files_only=local_files_only,
                            _raise_exceptions_for_missing_entries=False,
                            _raise_exceptions_for_connection_errors=False)
        return json.loads(Path(found).read_text(encoding="utf-8")) if found else {}


def _new_adapter(model, settings: LoraSettings, path: str):
    from peft import LoraConfig, get_peft_model

    if settings.rank < 1:
        raise ConfigError(f"lora rank is {settings.rank}: give 1 or more")
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, bias="none",
                        target_modules=LORA_TARGETS, task_type="CAUSAL_LM", base_model_name_or_path=path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return get_peft_model(model, config)


def _load_adapter(model, folder: Path):
    from peft import PeftModel

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(f"adapter folder {folder} has no {name}: give a folder that training wrote, in peft's "
                             f"format with safetensors")
    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except Exception as error:  # torch, peft and safetensors each have their own
        raise ModelError(f"adapter {folder} does not fit the model or is broken: load it on the base model that its "
                         f"adapter_config.json names ({str(error).splitlines()[0]})") from error
