r"""The policy: a video language model whose frozen encoder runs once per clip, its prompt once per group and pass.

A group is G completions of one prompt. Everything before the completion is the same for all of them, so B groups need
B prefills (not B x G). The prefill's keys and values are put before each completion's own (`PrefixCache`), and only
the completion's tokens run through the model. Sampling and old, reference and training log-probs all take this path; in
training the gradient flows back through the shared keys and values into the prefill. Differs from the paper
(appendix C): there the whole prompt is repeated for every completion; the numbers are equal up to rounding.

Axes: B groups, G completions of a group, T completion tokens, P prompt tokens, V visual tokens, H hidden size.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from .config import VideoConfig
from .data import Record
from .errors import ConfigError, ModelError
from .families import Prompt, banned_tokens, build_prompt
from .features import FeatureCache, Features, VisualPart, encoder_digest
from .loading import LoraSettings, load_model
from .video import Clip, patchify, read_clip, read_image

LOGIT_CHUNK = 2**26  # logits held at once, in elements: 256 MB in float32


@dataclass(frozen=True)
class Completions:
    r"""Tokens of B x G completions: ids (B, G, T) int64, mask (B, G, T) bool, true through the end token."""

    ids: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def from_lists(cls, groups: list[list[list[int]]], pad_id: int) -> Completions:
        r"""Right-pad lists of token ids, one list per completion, to one length."""
        rows = [torch.tensor(tokens, dtype=torch.long) for group in groups for tokens in group]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        shape = (len(groups), len(groups[0]), ids.shape[1])
        return cls(ids.view(shape), mask.view(shape))


# --- the shared prefix -----------------------------------------------------------------------------------------------


class PrefixCache(DynamicCache):
    r"""The cache of a prefill, and then of the completions after it. Recomputing a layer (gradient checkpointing)
    changes nothing.

    Without `layers` it records each layer's keys and values (`recorded`). Given those of B prefilled prompts, it
    prepends to completion n the keys and values of prompt `owner[n]`, and stores nothing.
    """

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
                 owner: torch.Tensor | None = None):
        super().__init__()
        self.prefix, self.owner = layers, owner
        self.recorded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_, **__):
        if self.prefix is None:
            self.recorded[layer] = (keys, values)
            return keys, values
        return tuple(torch.cat([old.index_select(0, self.owner), new], dim=2)
                     for old, new in zip(self.prefix[layer], (keys, values)))


@dataclass(frozen=True)
class Prefix:
    r"""B prefilled prompts, left-padded to P: each layer's keys and values (B, heads, P, head size), the last hidden
    state (B, H), which tokens are real (B, P) and the next position (B,)."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    last: torch.Tensor
    real: torch.Tensor
    next_position: torch.Tensor


def _checkpointed(forward: Callable, *args, **kwargs):
    r"""Run a function whose activations are recomputed in the backward pass. Transformers' own way drops the cache."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class Policy:
    r"""A video LLM with an adapter: encodes clips, builds prompts, and gives the log-probs of completions.

    The model stays in train mode, where nothing is random (all dropout is 0): bitsandbytes on CPU packs its weights for
    good at the first gradient-free forward in eval mode, and later training forwards would give no gradient.
    """

    def __init__(self, model: torch.nn.Module, tokenizer, preprocessing: dict, *, path: str,
                 gradient_checkpointing: bool = False, max_feature_bytes: int = 2**28, merge_bytes: int = 2**28,
                 after_video: str = "grid", feature_folder: str | Path | None = None):
        self.model, self.tokenizer, self.preprocessing, self.path = model, tokenizer, preprocessing, path
        self.merge_bytes, self.after_video = merge_bytes, after_video
        self.core = model.get_base_model() if hasattr(model, "peft_config") else model
        self.language, self.visual = self.core.model.language_model, self.core.model.visual
        self.config = self.core.config
        self.features = FeatureCache(max_feature_bytes, feature_folder and Path(feature_folder, encoder_digest(
            self.visual, preprocessing)))
        self.device = self.language.embed_tokens.weight.device
        self.end_id, self.pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.banned = banned_tokens(tokenizer, self.config, self.core.get_output_embeddings().weight.shape[0])
        self.banned = self.banned.to(self.device)
        known = inspect.signature(self.language.forward).parameters  # transformers renamed the cache at 5.24
        self._cache_name = "cache" if "cache" in known else "past_key_values"
        for layer in self.language.layers if gradient_checkpointing else ():
            layer.forward = functools.partial(_checkpointed, layer.forward)
        self.model.train()

    @classmethod
    def load(cls, path: str | Path, *, quantization: str = "none", lora: LoraSettings | None = None,
             adapter: str | Path | None = None, dtype: str = "float32", device: str = "cpu",
             local_files_only: bool = False, **options) -> Policy:
        r"""Load a checkpoint of one of `families.FAMILIES` from a folder or the hub; safetensors only, no remote code.

        quantization: "none" or "nf4" (double quantization; language-model linear layers only). lora: new adapters, or
        None for a frozen model; adapter: a folder in peft's format instead, trainable again. dtype: of the frozen
        weights and the computation; adapters are at least float32. options: gradient_checkpointing,
        max_feature_bytes and feature_folder (see `FeatureCache`), merge_bytes (see `merged`), after_video (see
        `rope_positions`). Raises ModelError naming what cannot be loaded and the fix.
        """
        model, tokenizer, preprocessing = load_model(path, quantization, dtype, device, lora, adapter,
                                                     local_files_only)
        return cls(model, tokenizer, preprocessing, path=str(path), **options)

    def save_adapter(self, folder: str | Path) -> None:
        r"""Write adapter_config.json (with the base model's path) and adapter_model.safetensors in peft's format."""
        if not hasattr(self.model, "peft_config"):
            raise ModelError("there is no adapter to save: the policy was loaded without lora")
        self.model.save_pretrained(str(folder), save_embedding_layers=False)

    def trainable(self) -> list[torch.nn.Parameter]:
        r"""Return the parameters that an optimizer may change, in the model's order."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def reference(self) -> contextlib.AbstractContextManager:
        r"""Within it the policy is the reference: the base model, the adapter off (also one that was loaded)."""
        return self.model.disable_adapter() if hasattr(self.model, "peft_config") else contextlib.nullcontext()

    # --- clips and prompts -------------------------------------------------------------------------------------------

    def encode(self, clip: Clip | Callable[[], Clip] | None = None, image: torch.Tensor | None = None,
               key: Hashable | None = None) -> Features:
        r"""Run the frozen encoder once on a clip, an image (3, H, W) or (1, 3, H, W) in [0, 1], or both (clip first).

        key: where given, the features are kept under it, and a clip given as a function is only read on a miss.
        """
        if key is not None:
            return self.features.get(key, lambda: self.encode(clip, image))
        clip = clip() if callable(clip) else clip
        parts = [] if clip is None else [self._encode_part("video", clip.frames, clip)]
        if image is not None:
            parts.append(self._encode_part("image", image.reshape(1, *image.shape[-3:])))
        return Features(tuple(parts))

    @torch.no_grad()
    def _encode_part(self, kind: str, frames: torch.Tensor, clip: Clip | None = None) -> VisualPart:
        patches, grid = patchify(frames, **self.preprocessing)
        patches = patches.to(self.device, self.visual.patch_embed.proj.weight.dtype)
        encoded = self.visual(patches, grid_thw=grid[None].to(self.device))
        tensors = [getattr(encoded, "pooler_output", encoded), *getattr(encoded, "deepstack_features", ())]
        embeds, *deep = [x.to(self.language.embed_tokens.weight.dtype) for x in tensors]
        seconds, size = clip.seconds if clip else [], self.preprocessing["temporal_patch_size"]
        moments = tuple((seconds[k] + seconds[k:k + size][-1]) / 2 for k in range(0, len(seconds), size))
        return VisualPart(kind, embeds, tuple(grid.tolist()), size / clip.fps if clip else 1.0, moments, tuple(deep))

    def prompt(self, text: str, features: Features = Features()) -> Prompt:
        r"""Build the user turn (visual parts, then text) as the model's family does; see `families.build_prompt`."""
        return build_prompt(self.tokenizer, self.config, self.preprocessing["merge_size"], self.after_video, self.path,
                            text, features)

    # --- the model ---------------------------------------------------------------------------------------------------

    def forward(self, embeds: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None,
                cache: DynamicCache, **visual) -> torch.Tensor:
        r"""Run embeddings (N, L, H) at positions (3, N, L) through the language model; the final states (N, L, H).

        mask: bool (N, 1, L, keys), true where a token may attend; None: causal. cache: sees every layer's new keys
        and values, and returns those to attend to. visual: what deepstack adds to the first layers, and where.
        """
        return self.language(inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=True,
                             **{self._cache_name: cache}, **visual).last_hidden_state

    def prefill(self, prompts: list[Prompt]) -> Prefix:
        r"""Run B prompts once, left-padded to the longest; with gradients if they are enabled."""
        if not self.language.training:
            self.model.train()
        lengths = torch.tensor([len(prompt.input_ids) for prompt in prompts], device=self.device)
        longest = int(lengths.max())
        padding = [longest - len(prompt.input_ids) for prompt in prompts]
        ids = torch.stack([F.pad(p.input_ids, (pad, 0), value=self.pad_id) for p, pad in zip(prompts, padding)])
        positions = torch.stack([F.pad(p.position_ids, (pad, 0)) for p, pad in zip(prompts, padding)], dim=1)
        ids, positions = ids.to(self.device), positions.to(self.device)
        real = torch.arange(longest, device=self.device) >= longest - lengths[:, None]  # (B, P)
        parts = [part for prompt in prompts for part in prompt.features.parts]
        embeds, visual = self.language.embed_tokens(ids), {}
        if parts:
            places = (ids == self.config.video_token_id) | (ids == self.config.image_token_id)
            embeds = embeds.masked_scatter(places[..., None], torch.cat([part.embeds for part in parts]).to(embeds))
            deep = [torch.cat(layer).to(embeds) for layer in zip(*(part.deep for part in parts))]
            visual = {"visual_pos_masks": places, "deepstack_visual_embeds": deep} if deep else {}
        causal = torch.ones(longest, longest, dtype=torch.bool, device=self.device).tril()
        itself = torch.eye(longest, dtype=torch.bool, device=self.device)  # a padding token attends to itself alone
        mask = None if bool(real.all()) else (causal & real[:, None, None, :]) | itself
        cache = PrefixCache()
        hidden = self.forward(embeds, positions, mask, cache, **visual)
        following = torch.tensor([prompt.next_position for prompt in prompts], device=self.device)
        return Prefix([cache.recorded[layer] for layer in sorted(cache.recorded)], hidden[:, -1], real, following)

    def log_softmax(self, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
        r"""Compute log p(token | state), (N, H) to (N, vocabulary), at a temperature, with banned tokens at -inf."""
        logits = self.core.lm_head(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return torch.log_softmax((logits / temperature).masked_fill(self.banned, -math.inf), dim=-1)

    def token_logp(self, hidden: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
        r"""Compute log p of tokens ids (N,) from the states before them (N, H)."""
        return self.log_softmax(hidden, temperature).gather(-1, ids[:, None]).squeeze(-1)

    def completion_logp(self, prefix: Prefix, owner: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor,
                        temperature: float) -> torch.Tensor:
        r"""Compute log-probs (N, T) of completions ids (N, T), each after prompt `owner` (N,); 0 outside the mask.

        The prompt's last state predicts the first token, and every token the next; the last one is never read.
        """
        length = int(mask.any(0).sum())
        states = prefix.last[owner][:, None]  # (N, 1, H)
        if length > 1:
            steps = torch.arange(length - 1, device=self.device)
            positions = (prefix.next_position[owner][:, None] + steps).expand(3, -1, -1)
            causal = (steps <= steps[:, None]).expand(len(ids), -1, -1)
            seen = torch.cat([prefix.real[owner][:, None].expand(-1, length - 1, -1), causal], dim=-1)
            embeds = self.language.embed_tokens(ids[:, :length - 1])
            hidden = self.forward(embeds, positions, seen[:, None], PrefixCache(prefix.layers, owner))
            states = torch.cat([states, hidden], dim=1)
        states, tokens, size = states[mask[:, :length]], ids[mask], max(1, LOGIT_CHUNK // len(self.banned))
        if len(tokens) <= size:
            values = self.token_logp(states, tokens, temperature)
        else:  # in chunks that hold few logits, recomputed in the backward pass
            values = torch.cat([_checkpointed(self.token_logp, part, token, temperature)
                                for part, token in zip(states.split(size), tokens.split(size))])
        return values.new_zeros(ids.shape).masked_scatter(mask, values)

    def logprobs(self, prompts: list[Prompt], completions: Completions, *, temperature: float = 1.0,
                 micro_batch: int | None = None) -> torch.Tensor:
        r"""Compute log-probs (B, G, T) of the completions, 0 outside their mask; float32 (float64 for such a model).

        They have a graph where gradients are enabled; `with policy.reference():` gives the reference's. Each prompt is
        prefilled once, and equal completions of a group run once. micro_batch: different completions whose activations
        are held at a time, beside those of all prefills; fewer need a second forward in the backward pass, and give
        the same numbers up to rounding.
        Raises ConfigError for a micro_batch below 1.
        """
        if len(prompts) != len(completions.ids):
            raise ValueError(f"{len(prompts)} prompts but {len(completions.ids)} groups of completions")
        if micro_batch is not None and micro_batch < 1:
            raise ConfigError(f"micro_batch is {micro_batch}: give 1 or more completions, or none for the whole batch")
        shape, mask = completions.ids.shape, completions.mask.to(self.device).flatten(0, 1)
        owner = torch.arange(shape[0], device=self.device).repeat_interleave(shape[1])
        rows = torch.cat([owner[:, None], completions.ids.to(self.device).flatten(0, 1).masked_fill(~mask, -1)], dim=1)
        rows, inverse = torch.unique(rows, dim=0, return_inverse=True)  # sorted, so group by group
        owner, ids, mask = rows[:, 0], rows[:, 1:].clamp(min=0), rows[:, 1:] >= 0
        prefix, size = self.prefill(prompts), micro_batch or len(rows)
        run = self.completion_logp if size >= len(rows) else functools.partial(_checkpointed, self.completion_logp)
        pieces = [run(prefix, owner[at:at + size], ids[at:at + size], mask[at:at + size], temperature)
                  for at in range(0, len(rows), size)]
        return torch.cat(pieces)[inverse].view(shape)


def encode_record(policy: Policy, record: Record, config: VideoConfig,
                  change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Features:
    r"""Read and encode a record's clip and image; unchanged ones are kept in the policy's feature cache.

    change: what an augmentation does to the clip's frames (T, 3, H, W), or to the image (1, 3, H, W) if there is no
    clip; such features serve one step only and are not kept. Raises `ClipError`, naming a file that cannot be read.
    """
    size = (config.frame_size, config.frame_size)

    def encode() -> Features:
        clip = read_clip(record.clip, config.num_frames, size, backend=config.video_backend,
                         timeout=config.decode_timeout) if record.clip else None
        image = read_image(record.image, size) if record.image else None
        if change is not None and clip is not None:
            clip = replace(clip, frames=change(clip.frames))
        elif change is not None and image is not None:
            image = change(image)
        return policy.encode(clip, image)

    if change is not None:
        return encode()
    return policy.features.get((record.clip, record.image, config.num_frames, size), encode)
