r"""What the model families share and where they differ: a prompt's text and positions, and what is never sampled.

`FAMILIES` lists the supported ones by the `model_type` of their config.json; nothing else asks which family a model is.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from .errors import ModelError, RecordError
from .features import Features, VisualPart
from .video import CLIP_MEAN, CLIP_STD

START, END = "<|vision_start|>", "<|vision_end|>"
# Tokens that stand for pixels or open a turn. A policy that samples one would read features that do not exist.
NEVER_SAMPLED = ("<|im_start|>", START, END, "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


@dataclass(frozen=True)
class Family:
    r"""What a family of models has of its own.

    model_class: its name in transformers. frames_apart: each grid time of a video is a block of visual tokens behind
    its second in words (Qwen3-VL), else the video is one block (Qwen2-VL, Qwen2.5-VL). words_per_grid: about how many
    text tokens that takes for each grid time. mean, std: of the pixels, where a checkpoint does not give them.
    """

    model_class: str
    frames_apart: bool = False
    words_per_grid: int = 0
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD


FAMILIES = {
    "qwen2_vl": Family("Qwen2VLForConditionalGeneration"),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": Family("Qwen3VLForConditionalGeneration", True, 9, (0.5,) * 3, (0.5,) * 3),
}


@dataclass(frozen=True)
class Prompt:
    r"""A tokenised prompt: input_ids (P,), position_ids (3, P) for time, height and width, and the next position."""

    text: str
    input_ids: torch.Tensor
    features: Features
    position_ids: torch.Tensor
    next_position: int


def rope_positions(pieces: list[int | VisualPart], merge_size: int, tokens_per_second: float | None,
                   after_video: str = "grid") -> tuple[torch.Tensor, int]:
    r"""Compute rotary positions (3, P) of time, height and width, and the position of the first completion token.

    pieces: text lengths and visual parts, in order. Text counts up on all three axes alike. A visual token has the time
    floor(i * tokens_per_second * seconds_per_grid) of its grid time i (i itself for an image, or where the family has
    no `tokens_per_second`: Qwen2-VL), and its row and column, all counted from where the text before it ended.
    after_video: text continues at start + max(rows, columns), as transformers >= 5.3 has it ("grid"), or one after the
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
    return torch.cat(blocks, dim=1), start


def build_prompt(tokenizer, config, merge_size: int, after_video: str, path: str, text: str,
                 features: Features) -> Prompt:
    r"""Build the user turn (visual parts, then text) with the tokenizer's chat template, one token a visual feature.

    config: the checkpoint's; path: its name, for errors. after_video: see `rope_positions`. Where frames stand apart,
    transformers 5 keeps the template's vision tokens around the whole video ("grid"); transformers 4.57, with which the
    checkpoints were published, does not ("max"; see https://github.com/vllm-project/vllm/issues/46817). Raises
    RecordError if the text itself spells one of the model's control tokens, ModelError if the template fails or does
    not place the visual parts.
    """
    for word in (*NEVER_SAMPLED, tokenizer.eos_token, tokenizer.pad_token):
        if word in text:
            raise RecordError(f"the question contains the control token {word}: remove it ({text[:80]!r})")
    kinds = [part.kind for part in features.parts]
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]
    try:
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                                 add_generation_prompt=True)
    except Exception as error:  # the template is the checkpoint's own program, run by Jinja's sandbox
        raise ModelError(f"the chat template of {path} fails ({type(error).__name__}: {str(error).splitlines()[0]}): "
                         f"download the checkpoint again") from error
    pads = {config.video_token_id: "video", config.image_token_id: "image"}
    words = dict(zip(tokenizer.convert_ids_to_tokens(list(pads)), pads.values()))
    # the text before the first visual part, then of each: START or None, its pad token, END or None, the text behind it
    start, *rest = re.split(f"({re.escape(START)})?({'|'.join(map(re.escape, words))})({re.escape(END)})?", rendered)
    if [words[pad] for pad in rest[1::4]] != kinds:
        raise ModelError(f"the chat template of {path} does not place the visual parts {kinds} in order, one pad token "
                         f"each: use the checkpoint's own template")
    written, blocks = [start], []
    for part, before, pad, after, behind in zip(features.parts, *[iter(rest)] * 4):
        apart = FAMILIES[config.model_type].frames_apart and part.kind == "video"
        count = part.grid[0] if apart else 1
        blocks += [replace(part, grid=(part.grid[0] // count, *part.grid[1:]))] * count
        shown = pad * (len(part.embeds) // count)
        if apart:
            shown = "".join(f"<{moment:.1f} seconds>{START}{shown}{END}" for moment in part.moments)
        bare = apart and after_video == "max"
        written += [shown, behind] if bare else [before or "", shown, after or "", behind]
    ids = tokenizer("".join(written), add_special_tokens=False)["input_ids"]
    if sum(map(pads.__contains__, ids)) != sum(len(part.embeds) for part in features.parts):
        raise ModelError(f"the tokenizer of {path} does not write one pad token for each visual feature, or a clip has "
                         f"fewer seconds than frames: use the checkpoint's own tokenizer, and `read_clip`")
    pieces = []
    for visual, run in groupby(ids, pads.__contains__):
        count = len(list(run))
        pieces += [] if visual else [count]
        while visual and count > 0:
            pieces.append(blocks.pop(0))
            count -= math.prod(pieces[-1].grid) // merge_size**2
    tokens_per_second = getattr(config.vision_config, "tokens_per_second", None)
    positions, following = rope_positions(pieces, merge_size, tokens_per_second, after_video)
    return Prompt(text, torch.tensor(ids), features, positions, following)


def banned_tokens(tokenizer, config, vocabulary: int) -> torch.Tensor:
    r"""Mark the tokens (vocabulary,) that are never sampled: vision, turn and pad tokens, and ids without a word."""
    banned = torch.zeros(vocabulary, dtype=torch.bool)
    banned[len(tokenizer):] = True
    known = tokenizer.get_vocab()
    names = [known[word] for word in NEVER_SAMPLED if word in known]
    banned[[*names, config.video_token_id, config.image_token_id, tokenizer.pad_token_id]] = True
    banned[tokenizer.eos_token_id] = False
    return banned
