r"""Compare a loaded model's log-probs with a shared prefix to those of its own forward, before anything is trained.

The shared prefix rests on what transformers does inside a model: how positions are counted, what a cache is asked for,
where visual features are added. A version or an architecture that does it differently would train on incorrect numbers
without an error. The comparison takes six passes over some forty tokens.
"""

from __future__ import annotations

import torch
import transformers

from .errors import ModelError
from .families import FAMILIES, Prompt
from .policy import Completions, Policy
from .video import Clip, patchify

# Nats a token, the mean of a comparison. Half precisions round each logit, float16 an eighth as much as bfloat16.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}


@torch.no_grad()
def check_shared_prefix(policy: Policy) -> float:
    r"""Return the mean difference in nats a token between the log-probs of `policy.logprobs` and the repeated prompt.

    Two completions of random tokens follow a prompt with a clip of noise, and two a prompt of text. Raises `ModelError`
    naming family, version and difference if it is larger than the number type explains, or if the model cannot run.
    """
    generator, given = torch.Generator().manual_seed(0), policy.preprocessing
    # Two grid times, a second apart, of 3 x 3 tokens: here `after_video` makes no difference, nor do the versions of
    # transformers (before 5.18) that round seconds down.
    fps, side = given["temporal_patch_size"], 3 * given["patch_size"] * given["merge_size"]
    clip = Clip(torch.rand((2 * fps, 3, side, side), generator=generator),
                [(k + 0.5) / fps for k in range(2 * fps)], fps, 2.0, "noise")
    kind, version = policy.config.model_type, transformers.__version__
    dtype = policy.language.embed_tokens.weight.dtype
    fix = f"use a tested version of transformers (requirements.txt), or a model of {', '.join(FAMILIES)}"
    try:
        shown = [(policy.prompt("What happens first?", policy.encode(clip)), clip), (policy.prompt("Why?"), None)]
        allowed = (~policy.banned).nonzero().flatten().cpu()
        lists = [[allowed[torch.randint(len(allowed), (length,), generator=generator)].tolist() for length in (8, 5)]
                 for _ in shown]
        shared = policy.logprobs([prompt for prompt, _ in shown], Completions.from_lists(lists, policy.pad_id))
        own = [own_logp(policy, prompt, seen, tokens) for (prompt, seen), group in zip(shown, lists)
               for tokens in group]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"model {policy.path} ({kind}) does not run with a shared prefix in transformers {version} "
                         f"({type(error).__name__}: {str(error).partition(chr(10))[0]}): {fix}") from error
    pairs = zip(shared.flatten(0, 1), own)
    difference = float(torch.cat([row[:len(expected)] - expected for row, expected in pairs]).abs().mean())
    if not difference <= TOLERANCES[dtype]:  # also not a number
        raise ModelError(f"model {policy.path} ({kind}): in transformers {version} its log-probs with a shared prefix "
                         f"differ from its own forward by {difference:.3g} nats a token, more than the "
                         f"{TOLERANCES[dtype]:g} that {str(dtype).removeprefix('torch.')} explains: {fix}")
    return difference


def own_logp(policy: Policy, prompt: Prompt, clip: Clip | None, tokens: list[int]) -> torch.Tensor:
    r"""Compute the log-probs (T,) of a completion by the model's own forward on prompt and completion, from pixels."""
    ids = torch.tensor([prompt.input_ids.tolist() + tokens], device=policy.device)
    kinds = (ids == policy.config.image_token_id) + 2 * (ids == policy.config.video_token_id)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds, "use_cache": False}
    if clip is not None:
        patches, grid = patchify(clip.frames, **policy.preprocessing)
        given |= {"pixel_values_videos": patches.to(policy.device, next(policy.visual.parameters()).dtype),
                  "video_grid_thw": grid[None].to(policy.device)}
    if clip is not None and getattr(policy.config.vision_config, "tokens_per_second", None) is not None:
        given["second_per_grid_ts"] = torch.tensor([prompt.features.parts[0].seconds_per_grid])
    logits = policy.core(**given).logits[0, len(prompt.input_ids) - 1:-1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logp = torch.log_softmax(logits.masked_fill(policy.banned, -torch.inf), dim=-1)
    return logp.gather(-1, ids[0, len(prompt.input_ids):, None]).squeeze(-1)
