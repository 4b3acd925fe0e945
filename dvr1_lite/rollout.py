r"""Sample a group of completions for every prompt, from one prefill each (appendix C).

Equal beginnings of a group are decoded once: a *branch* is one beginning that some of the group's rows share. A group
starts as one branch, its prompt; where its rows draw different tokens the branch divides, keys and values copied; where
all of its rows have ended it is dropped. So a step costs what its different beginnings cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from .errors import ConfigError
from .loading import merged
from .policy import Completions, Policy, Prefix, Prompt


@dataclass(frozen=True)
class Rollout:
    r"""Sampled groups: completions, their texts (B lists of G), whether the end token came before the limit (B, G),
    and the log-probs at sampling (B, G, T)."""

    completions: Completions
    texts: list[list[str]]
    finished: torch.Tensor
    logp: torch.Tensor


class DecodingCache(DynamicCache):
    r"""Keys and values of the branches being decoded, with room for whole completions: a step writes one token."""

    def __init__(self, prefix: Prefix, room: int):
        super().__init__()
        self.used = prefix.real.shape[1]
        self.buffers = [[F.pad(x, (0, 0, 0, room)) for x in layer] for layer in prefix.layers]

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_, **__):
        for buffer, new in zip(self.buffers[layer], (keys, values)):
            buffer[:, :, self.used:self.used + 1] = new
        return tuple(buffer[:, :, :self.used + 1] for buffer in self.buffers[layer])

    def select(self, parents: torch.Tensor) -> None:
        r"""Continue with one branch for each of `parents`, indices of branches, some perhaps repeated or left out."""
        for layer in self.buffers:  # one layer at a time, so that the cache is never held twice
            layer[:] = [x.index_select(0, parents) for x in layer]


def choose(logp: torch.Tensor, uniform: torch.Tensor | None) -> torch.Tensor:
    r"""Choose token ids (N,) from log-probs (N, V): the most probable where `uniform` is None, else by inverting the
    distribution function at `uniform` (N,), float64 in [0, 1). A token of probability 0 is never chosen."""
    if uniform is None:
        return logp.argmax(dim=-1)
    heights = logp.double().exp().cumsum(dim=-1)
    target = uniform[:, None] * heights[:, -1:] * (1 - 1e-12)  # strictly below the top, whatever the rounding
    return torch.searchsorted(heights, target, right=True).squeeze(-1)


@torch.no_grad()
def sample_groups(policy: Policy, prompts: list[Prompt], group_size: int, max_new_tokens: int, *,
                  temperature: float = 1.0, generator: torch.Generator | None = None,
                  greedy: bool = False) -> Rollout:
    r"""Sample `group_size` completions of every prompt from one prefill each; banned tokens have probability 0.

    max_new_tokens counts the end token. One uniform number per row and step is drawn from `generator` (torch's own if
    None), finished rows included, so a row's randomness does not depend on when other rows end. greedy takes the most
    probable token; the log-probs are still those at `temperature`. Raises ConfigError for an impossible number.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}: give a positive number, or choose greedy decoding")
    if group_size < 1 or max_new_tokens < 1:
        raise ConfigError(f"group_size is {group_size} and max_new_tokens is {max_new_tokens}: both must be 1 or more")
    total, words, device = len(prompts) * group_size, len(policy.banned), policy.device
    where = generator.device if generator is not None else "cpu"
    ids = torch.full((total, max_new_tokens), policy.pad_id, device=device)
    logp = torch.zeros(total, max_new_tokens, dtype=torch.float64, device=device)
    rows = torch.arange(total, device=device)  # the rows that have not ended
    branch = rows // group_size  # and the branch that each of them is on
    with merged(policy.language, policy.merge_bytes):
        prefix = policy.prefill(prompts)
        state, position, real = prefix.last, prefix.next_position, prefix.real
        cache = DecodingCache(prefix, max_new_tokens)
        for step in range(max_new_tokens):
            every = policy.log_softmax(state, temperature)[branch]  # (rows, vocabulary)
            uniform = None if greedy else torch.rand(
                total, generator=generator, dtype=torch.float64, device=where).to(device)[rows]
            token = choose(every, uniform)
            ids[rows, step] = token
            logp[rows, step] = every.gather(-1, token[:, None]).squeeze(-1).double()
            running = token != policy.end_id
            rows, branch, token = rows[running], branch[running], token[running]
            if len(rows) == 0 or step + 1 == max_new_tokens:
                break
            new, branch = torch.unique(branch * words + token, return_inverse=True)
            parents, token = new // words, new % words
            if not torch.equal(parents, torch.arange(len(state), device=device)):
                cache.select(parents)
                position, real = position[parents], real[parents]
            real = torch.cat([real, real.new_ones(len(real), 1)], dim=1)
            embeds = policy.language.embed_tokens(token)[:, None]
            state = policy.forward(embeds, position[:, None].expand(3, -1, -1), real[:, None, None], cache)[:, 0]
            cache.used, position = cache.used + 1, position + 1
    return _collect(policy, ids[:, :step + 1], logp[:, :step + 1].to(every.dtype), len(prompts))


def _collect(policy: Policy, ids: torch.Tensor, logp: torch.Tensor, groups: int) -> Rollout:
    r"""Split rows of token ids (B * G, T) into groups, with masks and texts."""
    ended = ids == policy.end_id
    mask = ended.cumsum(dim=1) - ended.long() == 0  # up to and including the first end token
    texts = policy.tokenizer.batch_decode([row[keep] for row, keep in zip(ids.cpu(), mask.cpu())],
                                          skip_special_tokens=True)
    size = len(ids) // groups
    shape = (groups, size, ids.shape[1])
    return Rollout(Completions(ids.view(shape), mask.view(shape)), [texts[at:at + size] for at in
                   range(0, len(texts), size)], ended.any(1).view(groups, size), (logp * mask).view(shape))
