r"""Atomic checkpoints; restore the newest valid one.

A checkpoint folder holds the adapter (peft's format), `optimizer.pt` and `rng.pt` (tensors and plain values only, read
with `weights_only=True`) and `state.json`. It is written aside, flushed to the disk, then renamed, so that a folder
with its final name is complete; what a killed save leaves behind is removed by the next. No file is unpickled.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from .errors import ModelError, UserError
from .files import NOT_WRITTEN, sync

TEMPORARY = ".unfinished-"


@dataclass(frozen=True)
class Checkpoint:
    r"""A checkpoint that was read: its folder, `state` (JSON values), adapter tensors, optimizer and random states."""

    folder: Path
    state: dict[str, Any]
    adapter: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    rng: dict[str, Any]


def checkpoint_folders(run: Path) -> list[Path]:
    r"""List the complete checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step_*") if path.is_dir())


def save_checkpoint(run: Path, step: int, state: dict[str, Any], optimizer: dict[str, Any], generator: torch.Generator,
                    save_adapter: Callable[[Path], None], keep: int) -> Path:
    r"""Write `checkpoints/step_NNNNNN` of a run, remove all but the newest `keep`, and return the folder.

    state: JSON values; generator: the run's own, saved with the global random states of torch, numpy and python.
    Raises `UserError` if the disk does not take it; earlier checkpoints are then untouched.
    """
    final = run / "checkpoints" / f"step_{step:06d}"
    temporary = final.with_name(TEMPORARY + final.name)
    name, keys, *rest = np.random.get_state()
    state = state | {"step": step, "python_rng": random.getstate(), "numpy_rng": [name, keys.tolist(), *rest]}
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(run)
        temporary.mkdir()
        save_adapter(temporary / "adapter")
        torch.save(optimizer, temporary / "optimizer.pt")
        torch.save({"sampling": generator.get_state(), "global": torch.get_rng_state(), "cuda": cuda},
                   temporary / "rng.pt")
        (temporary / "state.json").write_text(json.dumps(state, allow_nan=False), encoding="utf-8")
        sync(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        sync(final.parent)
    except (*NOT_WRITTEN, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{final}: the checkpoint cannot be written ({' '.join(str(error).split())[:160]}); free disk "
                        f"space or change the folder's permissions, then continue with --resume {run}") from error
    for old in checkpoint_folders(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def remove_unfinished(run: Path) -> None:
    r"""Remove what a killed save left behind."""
    for path in (run / "checkpoints").glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def restore_newest(run: Path, restore: Callable[[Checkpoint], None]) -> int:
    r"""Restore the newest checkpoint that is not damaged; return its step, 0 if the run has none.

    restore: loads the states into what trains; whatever it raises for damaged ones (a missing generator, an optimizer
    of another shape) sends it to the checkpoint before. Raises `ModelError`, naming the file, if none can be used.
    """
    problems = []
    for folder in reversed(checkpoint_folders(run)):
        try:
            checkpoint = read_checkpoint(folder)
            restore(checkpoint)
            restore_global_random(checkpoint)
            return checkpoint.state["step"]
        except ModelError as error:
            problems.append(str(error))
        except Exception as error:  # torch, peft and the states' own loaders each have their own
            problems.append(f"checkpoint {folder}: its states do not fit this run ({type(error).__name__}: "
                            f"{' '.join(str(error).split())[:120]})")
    if problems:
        raise ModelError(f"{run}: no checkpoint can be used; start again with another --out. {problems[0]}")
    return 0


def read_checkpoint(folder: Path) -> Checkpoint:
    r"""Read one checkpoint. Raises `ModelError`, naming the file, for one that is damaged or would run code."""
    name = "state.json"
    try:
        state = json.loads((folder / name).read_text(encoding="utf-8"))
        state["step"], state["python_rng"], state["numpy_rng"]
        name = "adapter/adapter_model.safetensors"
        loaded = [load_file(folder / name)]
        for name in ("optimizer.pt", "rng.pt"):
            loaded.append(torch.load(folder / name, map_location="cpu", weights_only=True))
        loaded[-1]["sampling"], loaded[-1]["global"], loaded[-1]["cuda"]
    except Exception as error:  # json, safetensors and torch each have their own
        raise ModelError(f"checkpoint {folder}: {name} cannot be read ({type(error).__name__}: "
                         f"{' '.join(str(error).split())[:120]})") from error
    return Checkpoint(folder, state, *loaded)


def restore_global_random(checkpoint: Checkpoint) -> None:
    r"""Set the random states of torch, CUDA, python and numpy to those of the checkpoint."""
    torch.set_rng_state(checkpoint.rng["global"])
    cuda = checkpoint.rng["cuda"]
    if cuda and torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
    version, numbers, gauss = checkpoint.state["python_rng"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = checkpoint.state["numpy_rng"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
