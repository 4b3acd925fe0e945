r"""Threads, and data parallel training over whole groups on accelerate. One process is several with world size 1.

Each process samples and trains on its own groups. Every objective is a mean over groups, so the mean of the processes'
gradients is exactly the gradient of all groups; log-probs need not be exchanged.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import random
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from .config import ModelConfig
from .errors import ConfigError, UserError
from .files import resolve

SMALL_MODEL_BYTES = 100e6  # weights below which one thread is fastest
TIMEOUT = datetime.timedelta(hours=24)  # the other processes wait while the main one evaluates or saves


def set_threads(threads: int | None, config: ModelConfig | None = None) -> str:
    r"""Set torch's threads and say which: as asked, OMP_NUM_THREADS, or 1 where the model is so small that more threads
    only wait for each other."""
    if threads is None and "OMP_NUM_THREADS" not in os.environ and config is not None and config.device == "cpu":
        weights = list(resolve(config.model).glob("*.safetensors")) if resolve(config.model).is_dir() else []
        if weights and sum(path.stat().st_size for path in weights) < SMALL_MODEL_BYTES:
            threads = 1
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"--threads is {threads}: give 1 or more")
        torch.set_num_threads(threads)
    count = torch.get_num_threads()
    return f"computing with {count} thread{'s' * (count > 1)} (--threads or OMP_NUM_THREADS changes that)"


def processes(device: str = "cpu") -> PartialState:
    r"""Return accelerate's state: num_processes, process_index, is_main_process. Connects the processes once."""
    options = {"timeout": TIMEOUT} if not PartialState._shared_state else {}
    return PartialState(cpu=torch.device(device).type == "cpu", **options)


def gather(value: Any) -> list[Any]:
    r"""Return the values of all processes, in their order, on every one of them."""
    return gather_object([value]) if PartialState().num_processes > 1 else [value]


class Order:
    r"""The order in which records come: a shuffle for each epoch, a function of seed and epoch alone."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self._epoch, self._indices = count, seed, None, []

    def __getitem__(self, position: int) -> int:
        r"""Return the index of the record at a position counted from the run's start."""
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            self._epoch, self._indices = epoch, list(range(self.count))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._indices)
        return self._indices[place]


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    r"""Replace every gradient by its mean over all processes; a process without one counts as zero."""
    if not any(gather(any(p.grad is not None for p in parameters))):
        return
    count = PartialState().num_processes
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    for parameter, grad in zip(parameters, (flat / count).split([p.numel() for p in parameters])):
        parameter.grad = grad.view_as(parameter).clone()


def on_main(action: Callable[[], None]) -> None:
    r"""Run an action in the main process while the others wait; if it fails there, it fails everywhere."""
    failure = None
    try:
        if PartialState().is_main_process:
            action()
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"
        raise
    finally:
        with contextlib.suppress(RuntimeError) if failure else contextlib.nullcontext():
            failures = gather(failure)
    if failures[0]:
        raise UserError(f"the main process failed ({failures[0]}): fix that, then resume the run")
