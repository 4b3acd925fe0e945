r"""Several processes, one run: `accelerate launch --num_processes K -m dvr1_lite train ...`.

Every process holds the whole model (NF4 weights are small; others may be divided, see sharding.py) and samples, encodes
and differentiates its own groups; a group never straddles processes. What the processes tell each other is small:

- the log-probs of all groups, so that each computes the loss of the *whole* batch and differentiates it with respect to
  its own: whatever the objective does with the batch, the gradient is that of one process with all groups;
- the sum of the adapter's gradients (a few MB to some hundred MB), after which all make the same step;
- scores, for one reward history and one line of metrics.

The first process writes everything. `prompts_per_step` counts the groups of all processes together, so a run may be
resumed with another number of them; sampling draws from a stream of its own for each step and process, so completions
(not the mathematics) differ with that number.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .checkpoints import Checkpoint
from .config import TrainConfig
from .errors import ClipError, ConfigError, UserError
from .files import read_lines, write_atomically
from .objectives import get_objective
from .policy import Policy
from .sharding import Shards
from .training import Groups, Trainer, check_machine, load_policy, mean_of

COUNTS = ("hard", "easy", "hints_found", "augmented", "hints_missing")  # added up; the other local figures are averaged
LOCAL_MEANS = ("completion_tokens", "unfinished")


def processes() -> int:
    r"""How many processes this run was launched with (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    r"""The place of this process among them; the first, 0, writes and prints."""
    return int(os.environ.get("RANK", "0"))


def interleave(parts: Sequence[Sequence[Any]]) -> list[Any]:
    r"""Groups of all processes in the order of the records: the first of each process, then the second of each."""
    return [entry for row in zip(*parts, strict=True) for entry in row]


def weights_divided(config: TrainConfig) -> bool:
    r"""Whether the launcher asks for FSDP, so that `sharding` divides the frozen weights.

    Takes the request out of the environment: accelerate and transformers would divide too. Raises `ConfigError` where
    weights cannot be divided as the launcher asks.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ConfigError("the launcher asks for DEEPSPEED: ZeRO 1 and 2 divide gradients and optimizer, here the "
                          "adapter's only, some hundred MB at most, and ZeRO 3 divides weights, which fsdp.yaml does "
                          "without DeepSpeed: launch with --config_file dvr1_lite/configs/accelerate/ddp.yaml or "
                          "fsdp.yaml")
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if config.quantization != "none":
        raise ConfigError(f"the launcher asks for FSDP, and quantization: {config.quantization} packs weights as they "
                          f"cannot be divided: launch with --config_file dvr1_lite/configs/accelerate/ddp.yaml (in NF4 "
                          f"a 7B model takes 6.4 GB of a card), or give quantization: none")
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise ConfigError("the launcher asks to keep FSDP's shards in the computer's memory (fsdp_offload_params), "
                          "which is not done here: set it to false, or take more processes or NF4 weights")
    return True


class TeamTrainer(Trainer):
    r"""A trainer that is one of several; see the module. Raises `ConfigError` if the groups cannot be shared evenly."""

    def __init__(self, config: TrainConfig, out: Path, checkpoint: Checkpoint | None = None):
        self.size, self.rank = processes(), rank()
        if config.prompts_per_step % self.size:
            raise ConfigError(f"prompts_per_step is {config.prompts_per_step} and there are {self.size} processes: "
                              f"give a multiple, so that each has equally many whole groups")
        self.divided, self.shards = weights_divided(config), None
        if torch.device(config.device).type == "cuda" and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # "cuda" is this one from here on
        super().__init__(config, out, checkpoint)
        self.share, self.stride, self.main = config.prompts_per_step // self.size, self.size, self.rank == 0

    def _check_machine(self) -> None:
        own = replace(self.config, prompts_per_step=self.config.prompts_per_step // self.size)
        check_machine(own, self.size if self.divided else 1)

    def _load_policy(self, adapter: Path | None) -> Policy:
        def divide(model: torch.nn.Module) -> None:
            self.shards = Shards(model, self.size, self.rank, self.config.device)

        return load_policy(self.config, adapter, divide if self.divided else None)

    def gather(self, value: Any) -> list[Any]:
        r"""The values of all processes, in their order, on every one of them. Tensors must be on the CPU.

        The one place where processes speak of anything but weights: those still at work on divided ones come first.
        """
        if self.shards is not None:
            self.shards.wait()
        values = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    # ------------------------------------------------------------------------------------------- the first one writes

    def run(self, progress: bool) -> bool:
        return super().run(progress and self.main)

    def begin(self) -> None:
        self._alone(super().begin)

    def save(self) -> None:
        self._alone(super().save)
        self.saved_step = self.step

    def evaluate(self, when: str, progress: bool) -> None:
        r"""Every process answers its share of the questions; the first one puts them together and counts."""
        for name, records in self.evaluations.items():
            whole = self.out / "evaluation" / f"{when}_{name}.jsonl"
            if not self.gather(whole.exists())[0]:
                shares = self.gather(self._share_of_answers(when, records, whole, progress and self.main))
                rows = [row | {"index": row["index"] * self.size + place}
                        for place, share in enumerate(shares) for row in share]
                self._alone(lambda: write_atomically(whole, "".join(json.dumps(row) + "\n" for row in rows)))
        self._alone(lambda: super(TeamTrainer, self).evaluate(when, progress))

    def _share_of_answers(self, when: str, records: list, whole: Path, progress: bool) -> list[dict]:
        # Kept until the summary, so that a stop loses none.
        part = whole.with_name(f".{whole.stem}_{self.rank}_of_{self.size}.jsonl")
        with contextlib.suppress(ClipError):  # no clip of this share; whether none at all, the first process finds
            self._answers(when, records[self.rank::self.size], part, whole.stem, progress)
        return list(read_lines(part))

    def _record(self, line: dict) -> None:
        if self.main:
            super()._record(line)

    def _export_adapter(self, save) -> None:
        self._alone(lambda: super(TeamTrainer, self)._export_adapter(save))

    def _alone(self, action) -> None:
        r"""Runs it in the first process while the others wait; if it fails there, it fails everywhere."""
        told = None
        try:
            if self.main:
                action()
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
            raise
        finally:
            failed = self.gather(told)[0]
        if failed:
            raise UserError(f"the first process failed ({failed}): mend that, then continue with --resume {self.out}")

    def _agreed(self, stop: bool) -> bool:
        return any(self.gather(stop))

    def close(self) -> None:
        r"""Nothing yet: ending the trackers ends the process group too, and the summary is still to be told to all."""

    def summary(self, complete: bool) -> dict:
        told = self.gather(super().summary(complete))[0]
        for part in (self.out / "evaluation").glob(f".*_{self.rank}_of_{self.size}.jsonl") if complete else ():
            part.unlink()
        super().close()
        return told

    # ------------------------------------------------------------------------------------------------------ one step

    def _sample_batch(self) -> Groups:
        self.generator.manual_seed(random.Random(f"{self.config.seed}/{self.step}/{self.rank}").getrandbits(63))
        self.position += self.rank
        sampled = super()._sample_batch()
        self.position = max(self.gather(self.position - self.rank))
        return sampled

    def _whole(self, groups: Groups) -> Groups:
        return replace(groups, scores=interleave(self.gather(groups.scores)))

    def _step(self) -> dict:
        rollouts, skipped = self.rollouts, self.skipped
        line = super()._step()
        lines = self.gather({name: line[name] for name in (*COUNTS, *LOCAL_MEANS)} | {
            "rollouts": self.rollouts - rollouts, "skipped": self.skipped - skipped})
        self.rollouts = rollouts + sum(other["rollouts"] for other in lines)
        self.skipped = skipped + sum(other["skipped"] for other in lines)
        return line | {name: sum(other[name] for other in lines) for name in COUNTS} | {
            name: mean_of([other[name] for other in lines]) for name in LOCAL_MEANS} | {
            "rollouts": self.rollouts, "skipped_clips": self.skipped}

    def _objective(self, logp: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        r"""The loss of all groups, differentiable in this process's own log-probs."""
        parts = self.gather([tensor.detach().cpu() for tensor in (logp, *others)])
        length = max(part[0].shape[-1] for part in parts)
        whole = []
        for place, own in enumerate((logp, *others)):
            pieces = [part[place].to(logp.device) for part in parts]
            pieces[self.rank] = own
            whole.append(torch.cat([F.pad(piece, (0, length - piece.shape[-1])) if piece.ndim == 3 else piece
                                    for piece in pieces]))
        return get_objective(self.config.method)(*whole, self.objective)

    def _share_gradients(self) -> None:
        r"""Adds up the gradients of all processes; one that had none adds nothing."""
        parameters = self.policy.trainable()
        if not any(self.gather(any(p.grad is not None for p in parameters))):
            return
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        torch.distributed.all_reduce(flat)
        for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            parameter.grad = grad.view_as(parameter).clone()
