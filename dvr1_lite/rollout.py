r"""Sampling a group of completions from one prefill (appendix C).

The prompt of each group is prefilled once, its keys and values are copied to the G rows of the group, and all B x G
rows are decoded together, one token a step, until every row has written its end token. The rows that have finished
leave the batch, so a few long completions do not make the short ones pay.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from .errors import ConfigError
from .policy import Completions, Policy, Prefix, Prompt, spread

SHRINK = 0.75  # leave finished rows behind once at most this share of the rows is still writing


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

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, copies: int, room: int):
        self.used = keys.shape[2]
        self.buffers = [self._with_room(spread(x, copies), room) for x in (keys, values)]

    @staticmethod
    def _with_room(x: torch.Tensor, room: int) -> torch.Tensor:
        buffer = x.new_empty(x.shape[0], x.shape[1], x.shape[2] + room, x.shape[3])
        buffer[:, :, :x.shape[2]] = x
        return buffer

    def update(self, *new, **_) -> tuple[torch.Tensor, torch.Tensor]:
        start, self.used = self.used, self.used + new[0].shape[2]
        for buffer, x in zip(self.buffers, new):
            buffer[:, :, start:self.used] = x
        return tuple(buffer[:, :, :self.used] for buffer in self.buffers)

    def keep(self, rows: torch.Tensor) -> None:
        self.buffers = [buffer[rows] for buffer in self.buffers]


class _Decoder:
    r"""Decodes the rows still writing, one token a step."""

    def __init__(self, policy: Policy, prefix: Prefix, copies: int, room: int):
        self.policy = policy
        self.position = spread(prefix.next_position, copies)  # (rows,), of the token read next, on all three axes
        self.caches = [_Slots(k, v, copies, room) for k, v in zip(prefix.keys, prefix.values)]
        self.state = spread(prefix.last, copies)  # (rows, H), the state that predicts the next token
        self.real = None
        if prefix.padded:
            written = torch.ones(len(prefix.real), room, dtype=torch.bool, device=policy.device)
            self.real = spread(torch.cat([prefix.real, written], dim=1), copies)[:, None, None]

    def feed(self, tokens: torch.Tensor) -> None:
        r"""Reads the tokens (rows,) just sampled."""
        embeds = self.policy.language.embed_tokens(tokens)[:, None]
        rope = self.policy.rotary(self.position[:, None].expand(3, -1, -1))
        mask = None if self.real is None else self.real[..., :self.caches[0].used + 1]
        self.state = self.policy.run(embeds, rope, mask, self.caches)[:, 0]
        self.position = self.position + 1

    def keep(self, rows: torch.Tensor) -> None:
        r"""Goes on with these rows (a list of indices) only."""
        for cache in self.caches:
            cache.keep(rows)
        self.position, self.state = self.position[rows], self.state[rows]
        self.real = None if self.real is None else self.real[rows]


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
    decoder = _Decoder(policy, policy.prefill(prompts), group_size, max_new_tokens)
    total = len(prompts) * group_size
    ids = torch.full((total, max_new_tokens), policy.pad_id, device=policy.device)
    logp = torch.zeros((total, max_new_tokens), dtype=torch.float64, device=policy.device)
    rows = torch.arange(total, device=policy.device)  # which of all rows the decoder still holds
    writing = torch.ones(total, dtype=torch.bool, device=policy.device)  # of the rows held
    for step in range(max_new_tokens):
        every = policy.log_softmax(decoder.state, temperature)
        token = choose(every, None if greedy else _draw(total, generator, policy.device)[rows])
        here = rows[writing]
        ids[here, step] = token[writing]
        logp[here, step] = every.gather(-1, token[:, None]).squeeze(-1)[writing].double()
        writing = writing & (token != policy.end_id)
        count = int(writing.sum())
        if count == 0 or step + 1 == max_new_tokens:
            break
        if count <= SHRINK * len(rows):
            held = writing.nonzero().squeeze(-1)
            decoder.keep(held)
            rows, token, writing = rows[held], token[held], writing[held]
        decoder.feed(token)
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
