r"""Runs of the small world in child processes that are killed, or find the disk full, at a chosen moment.

A child ends as a killed process does: nothing is cleaned up, nothing is flushed. Children are forked from a server
that has imported everything once and computes with one thread, so that one costs a second and all agree in every bit.
"""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_run import reward_by_coin, small_config

from dvr1_lite import __main__ as cli
from dvr1_lite import checkpoints, evaluation, experiments, files, plotting, training
from dvr1_lite.errors import UserError
from dvr1_lite.files import read_lines

needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="needs fork, SIGKILL and file-size limits as on Linux")

# A moment is a name from here and the how-manieth call it is that never returns.
MOMENTS = {
    "sampling": (training, "sample_groups"),
    "updating": (training.Trainer, "_inner_update"),
    "writing a line of metrics": (training, "append_lines"),
    "writing answers": (evaluation, "append_lines"),
    "writing an adapter": (training.Policy, "save_adapter"),
    "writing a checkpoint": (torch, "save"),
    "renaming a file or folder": (os, "replace"),
    "removing a folder": (shutil, "rmtree"),
    "drawing a figure": (plotting, "save"),
    "writing a file": (training, "write_atomically"),
    "writing encoded clips": (experiments, "save_features"),
}
Moment = tuple[str, int] | None


def arm(moment: Moment, strike: Callable, patch: pytest.MonkeyPatch) -> None:
    r"""Lets `strike(original, *arguments)` stand in for the call that the moment names; other calls go through."""
    if moment is None:
        return
    owner, attribute = MOMENTS[moment[0]]
    original, calls = getattr(owner, attribute), []

    def call(*arguments, **options):
        calls.append(None)
        if len(calls) == moment[1]:
            return strike(original, *arguments, **options)
        return original(*arguments, **options)

    patch.setattr(owner, attribute, call)


def die(original: Callable, *arguments, **options) -> None:
    r"""Three quarters of what the call would append to a file get there; then the process is gone."""
    if original is files.append_lines:
        path, rows = arguments
        text = "".join(json.dumps(row) + "\n" for row in rows)
        with open(path, "a", encoding="utf-8") as file:
            file.write(text[:3 * len(text) // 4])
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk(original: Callable, *arguments, **options):
    r"""From here on no file grows, except for ten bytes of one that is appended to, and an adapter's small files."""
    import resource

    size = 12_000 if original.__name__ == "save_adapter" else 0  # so that it is the weights that do not fit
    if original is files.append_lines and Path(arguments[0]).exists():
        size = Path(arguments[0]).stat().st_size + 10
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return original(*arguments, **options)


STRIKES = {"killed": die, "disk full": fill_disk}

# --- what a child does -----------------------------------------------------------------------------------------------


def train_child(world: Path, out: Path, changes: dict) -> dict:
    r"""Begins the run of the small world in `out`, or goes on with it."""
    return training.train(small_config(world, out, **changes), progress=False, resume=True)


def command_child(*words: str) -> int:
    r"""Runs a command of the command line."""
    return cli.run(words)


def worker_child(spec: Path) -> int:
    r"""Makes one run of an experiment."""
    return experiments.perform(spec)


def orphan_child(parent: int | None) -> str:
    r"""Is a worker whose parent has the number `parent`, or is alive; looks for it as workers do."""
    os.environ[experiments.PARENT] = str(parent or os.getppid())
    experiments._end_with_parent()
    time.sleep(1.5)
    return "still here"


def reproduce_child(out: Path, changes: dict) -> list[str]:
    r"""Makes a table with workers of its own."""
    return experiments.reproduce("table8", out, 1, extra=changes)


def _main(pipe, task: Callable, arguments: tuple, moment: Moment, strike: str) -> None:
    torch.set_num_threads(1)
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
        reward_by_coin(patch)
        arm(moment, STRIKES[strike], patch)
        try:
            value = task(*arguments)
        except UserError as error:
            value = error
    pipe.send((value, told.getvalue()))


# --- starting children -----------------------------------------------------------------------------------------------


def start(task: Callable, *arguments, moment: Moment = None, strike: str = "killed"):
    r"""Starts a child and returns it, with `answer()`: waits, and gives what the task returned, the `UserError` that
    it raised, or the negative number of the signal that ended it; `told` is then what it printed."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:  # for the server, which is started by the first child
        here = Path(__file__).resolve().parent
        patch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]))
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            patch.setenv(name, "1")
        context.set_forkserver_preload(["killable_imports"])
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_main, args=(theirs, task, arguments, moment, strike), daemon=True)
        child.start()
    theirs.close()

    def answer(seconds: float = 300):
        value = None
        with contextlib.suppress(EOFError):
            value, child.told = ours.recv() if ours.poll(seconds) else pytest.fail("the child hangs")
        child.join(60)
        return child.exitcode if child.exitcode else value

    child.answer = answer
    return child


def result_of(run: Path) -> dict:
    r"""Everything of a finished run that must not depend on what befell it: names to contents."""
    found = {"metrics": [training.comparable(line) for line in read_lines(run / "metrics.jsonl")]}
    summary = training._read_summary(run)
    found |= {name: summary.get(name) for name in ("before", "after", "change", "rollouts", "updates", "step")}
    for path in [run / "adapter" / "adapter_model.safetensors", *sorted((run / "evaluation").glob("*"))]:
        found[path.name] = path.read_bytes()
    newest = checkpoints.load_newest(run)
    unseeded = ("spent", "python_rng", "numpy_rng")  # seconds, and global states that nothing here draws from
    found["checkpoint"] = {name: value for name, value in newest.state.items() if name not in unseeded}
    found["generators"] = {name: state.tolist() for name, state in newest.rng.items() if name == "sampling"}
    return found
