r"""Checkpoints that survive a kill at any moment: written aside, synced to disk, then renamed into place.

A checkpoint folder holds the adapter (peft's format), `optimizer.pt` and `rng.pt` (tensors and plain values only, read
with `weights_only=True`) and `state.json`. A folder with its final name is complete; the temporary one of a killed save
is thrown away by the next. No file is unpickled.
"""

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

from .errors import ModelError, UserError
from .files import NOT_WRITTEN, sync

TEMPORARY = ".unfinished-"


@dataclass(frozen=True)
class Checkpoint:
    r"""A checkpoint that was read: its folder, `state` (JSON values), the optimizer's state and the random states."""

    folder: Path
    state: dict[str, Any]
    optimizer: dict[str, Any]
    rng: dict[str, Any]

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


def checkpoint_folders(run: Path) -> list[Path]:
    r"""The complete checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step_*") if path.is_dir())


def save_checkpoint(run: Path, step: int, state: dict[str, Any], optimizer: dict[str, Any],
                    generators: dict[str, torch.Generator], save_adapter: Callable[[Path], None], keep: int) -> Path:
    r"""Writes `checkpoints/step_NNNNNN` of a run and removes all but the newest `keep`. Returns the folder.

    state: JSON values; generators: the run's own, saved with the global states of torch, numpy and python.
    Raises `UserError` if the disk does not take it; earlier checkpoints are then untouched.
    """
    final = run / "checkpoints" / f"step_{step:06d}"
    temporary = final.with_name(TEMPORARY + final.name)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(run)
        temporary.mkdir()
        save_adapter(temporary / "adapter")
        torch.save(optimizer, temporary / "optimizer.pt")
        torch.save(_torch_states(generators), temporary / "rng.pt")
        state = state | {"step": step, "python_rng": random.getstate(), "numpy_rng": _numpy_state()}
        (temporary / "state.json").write_text(json.dumps(state, allow_nan=False), encoding="utf-8")
        sync(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        sync(final.parent)
    except (*NOT_WRITTEN, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{final}: the checkpoint cannot be written ({' '.join(str(error).split())[:160]}); free space "
                        f"or mend the folder, then continue with --resume {run}") from error
    for old in checkpoint_folders(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def remove_unfinished(run: Path) -> None:
    r"""Removes what a killed save left behind."""
    for path in (run / "checkpoints").glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def load_newest(run: Path) -> Checkpoint | None:
    r"""The newest checkpoint that can be read; None if the run has none. Raises `ModelError` if none of them can."""
    folders, problems = checkpoint_folders(run), []
    for folder in reversed(folders):
        try:
            return read_checkpoint(folder)
        except ModelError as error:
            problems.append(str(error))
    if problems:
        raise ModelError(f"{run}: no checkpoint can be read; start again with another --out. {problems[0]}")
    return None


def read_checkpoint(folder: Path) -> Checkpoint:
    r"""Reads one checkpoint. Raises `ModelError`, naming the file, for one that is damaged or would run code."""
    from safetensors import safe_open

    name = "state.json"
    try:
        state = json.loads((folder / name).read_text(encoding="utf-8"))
        state["step"], state["python_rng"], state["numpy_rng"]
        name = "adapter/adapter_model.safetensors"
        with safe_open(folder / name, framework="pt") as tensors:
            tensors.keys()
        loaded = []
        for name in ("optimizer.pt", "rng.pt"):
            loaded.append(torch.load(folder / name, map_location="cpu", weights_only=True))
    except Exception as error:  # json, safetensors and torch each have their own
        raise ModelError(f"checkpoint {folder}: {name} cannot be read ({type(error).__name__}: "
                         f"{' '.join(str(error).split())[:120]})") from error
    return Checkpoint(folder, state, *loaded)


def _torch_states(generators: dict[str, torch.Generator]) -> dict[str, Any]:
    states = {name: generator.get_state() for name, generator in generators.items()}
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return states | {"global": torch.get_rng_state(), "cuda": cuda}


def _numpy_state() -> list:
    name, keys, *rest = np.random.get_state()
    return [name, keys.tolist(), *rest]


def restore_random(checkpoint: Checkpoint, generators: dict[str, torch.Generator]) -> None:
    r"""Puts the run's generators and the global random states back to where the checkpoint left them."""
    for name, generator in generators.items():
        generator.set_state(checkpoint.rng[name])
    torch.set_rng_state(checkpoint.rng["global"])
    cuda = checkpoint.rng["cuda"]
    if cuda and torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
    version, numbers, gauss = checkpoint.state["python_rng"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = checkpoint.state["numpy_rng"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
