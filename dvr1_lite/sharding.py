r"""Frozen weights divided between processes, for a model that no card holds: FSDP, or ZeRO 3, of what never changes.

Each of K processes keeps 1/K of the seven matrices of every language layer, their *shard*. A layer that is about to run,
forward or backward, is put together from all shards, and dropped for the next one. Adapter, its gradient and optimizer,
embeddings, output head and vision encoder are as before: whole in every process. The numbers are those of the
undivided model, bit for bit.

Putting a layer together takes all processes, and these do not walk in step: their completions have different lengths,
equal completions run once, a micro-batch without slope is left out, only some groups are augmented. torch's
`fully_shard` wants equally many passes in one order everywhere. So every process says first which layer it wants
(`_meet`: one number each, the least is told to all), the layer asked for is sent to all, and those that wanted another
ask again: whoever is behind catches up, then both go on together. One that wants none, because it is about to speak of
something else, serves the others until nobody wants any (`wait`).
"""

from __future__ import annotations

import functools
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .training import PATIENCE

GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
NOTHING = 2**31  # wanted by a process that needs no layer: more than any layer's number


class Shards:
    r"""This process's part of a model's language layers; `whole` and `wait` are called by all processes alike.

    model: in the computer's memory, with its adapter; its frozen linear layers are exchanged for `ShardedLinear`.
    size, rank: how many processes there are, and which this one is. device: where the shards go.
    """

    def __init__(self, model: torch.nn.Module, size: int, rank: int, device: str):
        self.size, self.shards, self.last = size, [], (NOTHING, None)
        core = model.get_base_model() if hasattr(model, "peft_config") else model
        for number, layer in enumerate(core.model.language_model.layers):
            flat = torch.cat(self._take_linears(layer, number))
            flat = F.pad(flat, (0, -len(flat) % size))
            self.shards.append(flat.chunk(size)[rank].clone().to(device))

    def _take_linears(self, layer: torch.nn.Module, number: int) -> list[torch.Tensor]:
        taken, start = [], 0
        for module in list(layer.modules()):
            for name, linear in list(module.named_children()):
                if type(linear) is torch.nn.Linear and not linear.weight.requires_grad:
                    setattr(module, name, ShardedLinear(linear, self, number, start))
                    taken.append(linear.weight.data.flatten())
                    start += linear.weight.numel()
        return taken

    @property
    def nbytes(self) -> int:
        r"""Bytes of weights that stand in this process, where all of them together were `size` times as many."""
        return sum(shard.nbytes for shard in self.shards)

    def whole(self, number: int) -> torch.Tensor:
        r"""All weights of layer `number`, flat. Kept until another is wanted: its backward may follow its forward."""
        while self.last[0] != number:
            self.last = (NOTHING, None)  # freed before the next one comes
            self.last = self._meet(number)
        return self.last[1]

    def wait(self) -> None:
        r"""Serves the other processes until all of them are here."""
        self.last = (NOTHING, None)
        while self._meet(NOTHING)[0] != NOTHING:
            pass

    def _meet(self, wanted: int) -> tuple[int, torch.Tensor | None]:
        r"""One meeting of all processes: the least layer that anyone wants, put together; `NOTHING` if nobody does."""
        told = torch.tensor(wanted)
        dist.all_reduce(told, op=dist.ReduceOp.MIN, group=self._group)
        number = int(told)
        if number == NOTHING:
            return NOTHING, None
        shard = self.shards[number]
        flat = shard.new_empty(self.size * len(shard))
        GATHER(flat, shard)
        return number, flat

    @functools.cached_property
    def _group(self) -> dist.ProcessGroup:
        r"""For the one number: between CPUs, so that no GPU has to be waited for."""
        return dist.new_group(backend="gloo", timeout=PATIENCE)


class ShardedLinear(torch.nn.Module):
    r"""A frozen linear layer whose `weight` (out, in) is put together whenever it is read, from all processes."""

    def __init__(self, linear: torch.nn.Linear, shards: Shards, number: int, start: int):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self._shards, self._number, self._start = shards, number, start

    @property
    def weight(self) -> torch.Tensor:
        shape = (self.out_features, self.in_features)
        return self._shards.whole(self._number)[self._start:self._start + math.prod(shape)].view(shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    r"""x W' + b, with W asked for again in the backward pass instead of kept. W and b are frozen: no gradient."""

    @staticmethod
    def forward(context, x: torch.Tensor, linear: ShardedLinear) -> torch.Tensor:
        context.linear = linear
        return F.linear(x, linear.weight, linear.bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, slope: torch.Tensor) -> tuple[torch.Tensor, None]:
        return slope @ context.linear.weight, None
