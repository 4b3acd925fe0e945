r"""Where a training step's time goes: `python -m dvr1_lite bench --profile`.

Functions of the trainer and the policy are wrapped for the length of the profile; each second belongs to the innermost
wrapped function that runs (its *part*), so the parts add up to the steps' time.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import evaluation, policy, rollout, training
from .config import TrainConfig, load_config
from .experiments import machine
from .training import Trainer, quiet_libraries, versions

REST = "the rest: lists, tensors of a few numbers, bookkeeping"
# part -> (owner, name) of the functions that it is spent in. The first two are the model itself.
MODEL = ("model forward", "model backward")
PARTS = {
    "model forward": [(policy.Policy, "run"), (policy.Policy, "log_softmax"), (policy.Policy, "rotary")],
    "model backward": [(torch.autograd, "backward")],
    "objective": [(policy, "_differentiate"), (training, "check_finite")],
    "optimizer, with the gradient's norm": [(torch.optim.AdamW, "step"), (torch.optim.AdamW, "zero_grad"),
                                            (torch.nn.utils, "clip_grad_norm_")],
    "choosing tokens": [(rollout, "choose"), (rollout, "_draw"), (rollout, "_sample")],
    "dividing branches: copies of keys and values": [(rollout._Decoder, "branch")],
    "dense weights for sampling": [(policy.Policy, "_merged_weights")],
    "reading clips": [(evaluation, "read_clip")],
    "patches": [(policy, "patchify")],
    "prompts": [(policy.Policy, "prompt")],
    "rewards": [(training, "score_groups")],
    "texts": [(policy.Policy, "text")],
    "around the forward: embeddings, masks, equal completions, packing": [
        (policy.Policy, "prefill"), (policy.Policy, "_completion_logp"), (policy.Policy, "_distinct"),
        (policy.Policy, "backward"), (policy.Policy, "logprobs"), (rollout._Decoder, "feed")],
    REST: [(Trainer, "_step")],
}


class Parts:
    r"""Seconds, processor seconds of all threads, and calls by part; what a part calls counts for the inner one."""

    WHOLE = ("objective",)  # its small backward pass is not the model's

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.processor: dict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self.open: list[str] = []
        self.since = (0.0, 0.0)

    def wrap(self, part: str, function):
        @functools.wraps(function)
        def timed(*arguments, **keywords):
            if part != REST and not self.open or self.open and self.open[-1] in self.WHOLE:
                return function(*arguments, **keywords)
            self._switch()
            self.open.append(part)
            self.calls[part] += 1
            try:
                return function(*arguments, **keywords)
            finally:
                self._switch()
                self.open.pop()

        return timed

    def _switch(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = (time.perf_counter(), time.process_time())
        if self.open:
            self.seconds[self.open[-1]] += now[0] - self.since[0]
            self.processor[self.open[-1]] += now[1] - self.since[1]
        self.since = now

    @contextlib.contextmanager
    def watching(self, extra: dict[str, list[tuple[Any, str]]]) -> Iterator[None]:
        r"""Within it, the functions of PARTS and `extra` are timed."""
        with contextlib.ExitStack() as undo:
            for part, places in [*PARTS.items(), *extra.items()]:
                for owner, name in places:
                    own = name in vars(owner)
                    old = getattr(owner, name)
                    setattr(owner, name, self.wrap(part, old))
                    undo.callback(setattr, owner, name, old) if own else undo.callback(delattr, owner, name)
            yield


def profile(steps: int = 20, overrides: dict | None = None, progress: bool = True) -> dict:
    r"""Trains `steps` steps after one to warm up, by the default config, and tells where the time went.

    Returns `share_in_model` (forward and backward, encoder included), `seconds_per_step`, and `parts`: for each its
    seconds a step, share and calls a step. Nothing is evaluated, and the run is thrown away.
    """
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        given = {"eval_files": [], "figures": False, "steps": steps + 1, "save_every": steps + 1,
                 "out": str(Path(folder) / "run")}
        config = load_config(None, given | (overrides or {}))
        trainer, parts = Trainer(config, Path(config.out)), Parts()
        trainer.begin()
        try:
            trainer._guarded_step()
            with parts.watching({"model forward": [(trainer.policy.visual, "forward")]}):
                for _ in range(steps):
                    trainer._guarded_step()
        finally:
            trainer.close()
    return figures(config, steps, parts)


def figures(config: TrainConfig, steps: int, parts: Parts) -> dict:
    r"""Shares of the steps' time, largest first."""
    total, work = sum(parts.seconds.values()), sum(parts.processor.values())
    table = {part: {"seconds": seconds / steps, "share": seconds / total, "calls": parts.calls[part] / steps,
                    "processor_share": parts.processor[part] / work}
             for part, seconds in sorted(parts.seconds.items(), key=lambda item: -item[1])}
    in_model = {key: sum(table[part][key] for part in MODEL if part in table) for key in ("share", "processor_share")}
    return {"date": datetime.date.today().isoformat(), "machine": machine(config.device), "versions": versions(),
            "command": f"python -m dvr1_lite bench --profile --profile-steps {steps}", "model": config.model,
            "quantization": config.quantization, "method": config.method, "steps": steps,
            "threads": torch.get_num_threads(), "seconds_per_step": total / steps, "share_in_model": in_model["share"],
            "processor_share_in_model": in_model["processor_share"], "parts": table}


def as_table(found: dict) -> str:
    r"""The profile in Markdown."""
    lines = [f"A step of the default run ({found['model']}, {found['quantization']}, {found['method']}; mean of "
             f"{found['steps']} steps after one to warm up) takes {found['seconds_per_step']:.2f} s; "
             f"{found['share_in_model']:.0%} of it is the model's forward and backward "
             f"({found['processor_share_in_model']:.0%} by processor time, which other programs do not lengthen).", "",
             f"`{found['command']}`, {found['date']}, {found['machine']}, {found['threads']} threads; "
             + ", ".join(f"{name} {version}" for name, version in found["versions"].items()), "",
             "| part | s a step | share | by processor time | calls a step |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {part} | {row['seconds']:.3f} | {row['share']:.1%} | {row['processor_share']:.1%} | "
              f"{row['calls']:.0f} |" for part, row in found["parts"].items()]
    return "\n".join(lines)
