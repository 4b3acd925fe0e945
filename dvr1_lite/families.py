r"""What the model families share and where they differ: a prompt's text and positions, and what is never sampled.

`FAMILIES` lists the supported ones by the `model_type` of their config.json; nothing else asks which family a model is.
"""

from __future__ import annotations

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
    r"""A model family in which a video is one block of visual tokens: Qwen2-VL, and Qwen2.5-VL.

    model_class: its name in transformers. mean, std: of the pixels, where a checkpoint does not give them.
    words_per_grid: text tokens of a video beside its visual tokens, about so many for each grid time.
    """

    model_class: str
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    words_per_grid: int = 0

    def layout(self, part: VisualPart, before: str, after: str, own_code: bool) -> list[str | VisualPart]:
        r"""List what a part is in the prompt: texts, and blocks of adjacent visual tokens, each with its grid.

        before, after: the vision tokens that the chat template has around it. own_code: as the code that the checkpoint
        was published with writes it, where transformers 5 differs.
        """
        return [before, part, after]


class FramesApart(Family):
    r"""A model family in which each grid time of a video is a block, behind its second in words: Qwen3-VL.

    Transformers 5 keeps the template's pair of vision tokens around the whole video; the code that the checkpoints were
    published with (transformers 4.57) and vLLM leave it out (https://github.com/vllm-project/vllm/issues/46817).
    """

    def layout(self, part: VisualPart, before: str, after: str, own_code: bool) -> list[str | VisualPart]:
        if part.kind != "video":
            return super().layout(part, before, after, own_code)
        frame = replace(part, grid=(1, *part.grid[1:]))
        pieces = [piece for moment in part.moments for piece in (f"<{moment:.1f} seconds>{START}", frame, END)]
        return pieces if own_code else [before, *pieces, after]


FAMILIES = {
    "qwen2_vl": Family("Qwen2VLForConditionalGeneration"),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": FramesApart("Qwen3VLForConditionalGeneration", (0.5,) * 3, (0.5,) * 3, words_per_grid=9),
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

    config: the checkpoint's; path: its name, for errors. Raises RecordError if the text itself spells one of the
    model's control tokens, ModelError if the template fails or does not place the visual parts.
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
    placed = re.compile("({})?({})({})?".format(re.escape(START), "|".join(map(re.escape, words)), re.escape(END)))
    if [words[match[2]] for match in placed.finditer(rendered)] != kinds:
        raise ModelError(f"the chat template of {path} does not place the visual parts {kinds} in order, one pad token "
                         f"each: use the checkpoint's own template")
    parts, blocks = iter(features.parts), []

    def write(match: re.Match) -> str:
        layout = FAMILIES[config.model_type].layout(next(parts), match[1] or "", match[3] or "", after_video == "max")
        blocks.extend(piece for piece in layout if isinstance(piece, VisualPart))
        return "".join(piece if isinstance(piece, str) else match[2] * piece.tokens(merge_size) for piece in layout)

    ids = tokenizer(placed.sub(write, rendered), add_special_tokens=False)["input_ids"]
    if sum(map(pads.__contains__, ids)) != sum(len(part.embeds) for part in features.parts):
        raise ModelError(f"the tokenizer of {path} does not write one pad token for each visual feature: use the "
                         f"checkpoint's own tokenizer, and clips with one second a frame")
    waiting, pieces = iter(blocks), []
    for visual, run in groupby(ids, pads.__contains__):
        count = len(list(run))
        pieces += [] if visual else [count]
        while visual and count > 0:
            pieces.append(next(waiting))
            count -= pieces[-1].tokens(merge_size)
    tokens_per_second = getattr(config.vision_config, "tokens_per_second", None)
    positions, following = rope_positions(pieces, merge_size, tokens_per_second, after_video)
    return Prompt(text, torch.tensor(ids), features, positions, following)


def insert_features(embeds: torch.Tensor, ids: torch.Tensor, config, parts: list[VisualPart]
                    ) -> tuple[torch.Tensor, dict]:
    r"""Put visual parts, in order, at the visual tokens of ids (B, P) in embeds (B, P, H); return the embeddings and
    what else the language model takes: with deepstack, the states that its first layers add at the same places."""
    if not parts:
        return embeds, {}
    places = (ids == config.video_token_id) | (ids == config.image_token_id)
    embeds = embeds.masked_scatter(places[..., None], torch.cat([part.embeds for part in parts]).to(embeds))
    deep = [torch.cat(layer).to(embeds) for layer in zip(*(part.deep for part in parts), strict=True)]
    return embeds, {"visual_pos_masks": places, "deepstack_visual_embeds": deep} if deep else {}


def banned_tokens(tokenizer, config, vocabulary: int) -> torch.Tensor:
    r"""Mark the tokens (vocabulary,) that are never sampled: vision, turn and pad tokens, and ids without a word."""
    banned = torch.zeros(vocabulary, dtype=torch.bool)
    banned[len(tokenizer):] = True
    known = tokenizer.get_vocab()
    names = [known[word] for word in NEVER_SAMPLED if word in known]
    banned[[*names, config.video_token_id, config.image_token_id, tokenizer.pad_token_id]] = True
    banned[tokenizer.eos_token_id] = False
    return banned
