r"""Sampling a group of completions from one prefill (appendix C).

The prompt of each group is prefilled once, and equal beginnings of a group are decoded once: a *branch* is one
beginning that some of the group's rows share. A group starts as one branch, the prompt; where its rows draw different
tokens, the branch divides, keys and values copied; where all its rows have ended, it is dropped. So a step costs what
its different beginnings cost, and a few long completions do not make the short ones pay.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from .errors import ConfigError
from .policy import Completions, Policy, Prefix, Prompt

@dataclass(frozen=True)
class Rollout:
    r"""Sampled groups: completions, their texts (B lists of G), log-probs at sampling (B, G, T), lengths in tokens with
    the end token (B, G), and whether the end token came before the limit (B, G)."""

    completions: Completions
    texts: list[list[str]]
    logp_sampling: torch.Tensor
    lengths: torch.Tensor
    finished: torch.Tensor


class _Slots:
    r"""One layer's keys and values with room for the whole completion, so that a step copies one token only."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, room: int):
        self.used, self.size = keys.shape[2], keys.shape[2] + room
        self.buffers = [self._with_room(x) for x in (keys, values)]

    def _with_room(self, x: torch.Tensor) -> torch.Tensor:
        buffer = x.new_empty(x.shape[0], x.shape[1], self.size, x.shape[3])
        buffer[:, :, :self.used] = x
        return buffer

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        start, self.used = self.used, self.used + keys.shape[2]
        for buffer, x in zip(self.buffers, (keys, values)):
            buffer[:, :, start:self.used] = x
        return tuple(buffer[:, :, :self.used] for buffer in self.buffers)

    def branch(self, parents: torch.Tensor) -> None:
        self.buffers = [self._with_room(buffer[:, :, :self.used].index_select(0, parents)) for buffer in self.buffers]


class _Decoder:
    r"""Decodes the branches still needed, one token a step; at first there is one for each prompt."""

    def __init__(self, policy: Policy, prefix: Prefix, room: int):
        self.policy, self.position = policy, prefix.next_position  # (branches,), of the token read next
        self.caches = [_Slots(k, v, room) for k, v in zip(prefix.keys, prefix.values)]
        self.state = prefix.last  # (branches, H), the state that predicts the next token
        self.real = None
        if prefix.padded:
            written = torch.ones(len(prefix.real), room, dtype=torch.bool, device=policy.device)
            self.real = torch.cat([prefix.real, written], dim=1)[:, None, None]

    def feed(self, tokens: torch.Tensor) -> None:
        r"""Reads the next token of each branch (branches,)."""
        embeds = self.policy.language.embed_tokens(tokens)[:, None]
        rope = self.policy.rotary(self.position[:, None].expand(3, -1, -1))
        mask = None if self.real is None else self.real[..., :self.caches[0].used + 1]
        self.state = self.policy.run(embeds, rope, mask, self.caches)[:, 0]
        self.position = self.position + 1

    def branch(self, parents: torch.Tensor) -> None:
        r"""Goes on with one branch for each of `parents`: indices of branches, some perhaps several times or never."""
        if torch.equal(parents, torch.arange(len(self.state), device=parents.device)):
            return
        for cache in self.caches:
            cache.branch(parents)
        self.position, self.state = self.position[parents], self.state[parents]
        self.real = None if self.real is None else self.real[parents]


def choose(logp: torch.Tensor, uniform: torch.Tensor | None) -> torch.Tensor:
    r"""Token ids (N,) from log-probs (N, V): the most probable where `uniform` is None, else by inverting the
    distribution function at `uniform` (N,), float64 in [0, 1). A token of probability 0 is never chosen."""
    if uniform is None:
        return logp.argmax(dim=-1)
    heights = logp.double().exp().cumsum(dim=-1)
    target = uniform[:, None] * heights[:, -1:] * (1 - 1e-12)  # strictly below the top, whatever the rounding
    return torch.searchsorted(heights, target, right=True).squeeze(-1)


@torch.no_grad()
def sample_groups(policy: Policy, prompts: list[Prompt], group_size: int, max_new_tokens: int, *,
                  temperature: float = 1.0, generator: torch.Generator | None = None, greedy: bool = False,
                  reference: bool = False) -> Rollout:
    r"""Samples `group_size` completions of every prompt from one prefill each; banned tokens have probability 0.

    max_new_tokens counts the end token. One uniform number per row and step is drawn from `generator` (torch's own if
    None), finished rows included, so a row's randomness does not depend on when other rows end. greedy takes the most
    probable token; the log-probs are still those at `temperature`. reference: samples with the adapter off.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}: give a positive number, or choose greedy decoding")
    if group_size < 1 or max_new_tokens < 1:
        raise ConfigError(f"group_size is {group_size} and max_new_tokens is {max_new_tokens}: both must be 1 or more")
    with policy.reference() if reference else contextlib.nullcontext(), policy.merged():
        return _sample(policy, prompts, group_size, max_new_tokens, temperature, generator, greedy)


def _sample(policy, prompts, group_size, max_new_tokens, temperature, generator, greedy) -> Rollout:
    decoder = _Decoder(policy, policy.prefill(prompts), max_new_tokens)
    total, vocabulary = len(prompts) * group_size, len(policy.banned)
    ids = torch.full((total, max_new_tokens), policy.pad_id, device=policy.device)
    logp = torch.zeros((total, max_new_tokens), dtype=torch.float64, device=policy.device)
    rows = torch.arange(total, device=policy.device)  # the rows still writing
    branch = rows // group_size  # and the branch that each of them is on
    for step in range(max_new_tokens):
        every = policy.log_softmax(decoder.state, temperature)[branch]  # (rows, vocabulary)
        token = choose(every, None if greedy else _draw(total, generator, policy.device)[rows])
        ids[rows, step] = token
        logp[rows, step] = every.gather(-1, token[:, None]).squeeze(-1).double()
        going = token != policy.end_id
        rows, branch, token = rows[going], branch[going], token[going]
        if len(rows) == 0 or step + 1 == max_new_tokens:
            break
        divided, branch = torch.unique(branch * vocabulary + token, return_inverse=True)
        decoder.branch(divided // vocabulary)
        decoder.feed(divided % vocabulary)
    return _finish(policy, ids[:, :step + 1], logp[:, :step + 1].to(every.dtype), len(prompts))


def _draw(count: int, generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    where = generator.device if generator is not None else "cpu"
    return torch.rand(count, generator=generator, dtype=torch.float64, device=where).to(device)


def _finish(policy: Policy, ids: torch.Tensor, logp: torch.Tensor, groups: int) -> Rollout:
    r"""Masks, lengths and texts of the token ids (B * G, T)."""
    ended = ids == policy.end_id
    mask = ended.cumsum(dim=1) - ended.long() == 0  # up to and with the first end token
    texts = [policy.text(row[keep]) for row, keep in zip(ids.cpu(), mask.cpu())]
    size = len(ids) // groups
    shape = (groups, size, ids.shape[1])
    return Rollout(
        completions=Completions(ids.view(shape), mask.view(shape)),
        texts=[texts[start:start + size] for start in range(0, len(texts), size)],
        logp_sampling=(logp * mask).view(shape),
        lengths=mask.sum(1).view(groups, size),
        finished=ended.any(1).view(groups, size),
    )
