r"""Small runs in child processes that are killed, or find the disk full, at a chosen moment.

A child ends as a killed process does: nothing is cleaned up, nothing is flushed. Children are forked from a server
that has imported everything once and computes with one thread, so that a child costs a second and all of them agree in
every bit.
"""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dvr1_lite import __main__ as cli
from dvr1_lite import checkpoint, evaluation, features, files, policy, run, training
from dvr1_lite.errors import UserError
from dvr1_lite.files import read_lines
from tests.small_run import reward_by_coin, small_config, train_files

ROOT = Path(__file__).resolve().parents[2]
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="needs fork, SIGKILL and file-size limits as on Linux")

# A moment is a name from here and the number of the call, from 1, that never returns.
MOMENTS = {
    "sampling": (training, "sample_groups"),
    "updating": (training.Trainer, "update_weights"),
    "writing a line of metrics": (run, "append_lines"),
    "writing answers": (evaluation, "append_lines"),
    "writing an adapter": (policy.Policy, "save_adapter"),
    "writing a checkpoint": (torch, "save"),
    "flushing a checkpoint": (checkpoint, "sync"),
    "renaming a file or folder": (os, "replace"),
    "copying an adapter": (shutil, "copytree"),
    "removing a folder": (shutil, "rmtree"),
    "writing a file": (run, "write_atomically"),
    "writing encoded clips": (features, "save_file"),
}
Moment = tuple[str, int] | None


def arm(moment: Moment, strike: Callable, patch: pytest.MonkeyPatch) -> None:
    r"""Replace the call that the moment names by `strike(original, *arguments)`; other calls are not changed."""
    if moment is None:
        return
    owner, attribute = MOMENTS[moment[0]]
    original, calls = getattr(owner, attribute), []

    def call(*arguments, **options):
        calls.append(None)
        return (strike if len(calls) == moment[1] else lambda o, *a, **k: o(*a, **k))(original, *arguments, **options)

    patch.setattr(owner, attribute, call)


def die(original: Callable, *arguments, **options) -> None:
    r"""End the process at once; of a call that appends to a file, three quarters are written."""
    if original is files.append_lines:
        path, rows = arguments
        text = "".join(json.dumps(row) + "\n" for row in rows)
        with open(path, "a", encoding="utf-8") as file:
            file.write(text[:3 * len(text) // 4])
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk(original: Callable, *arguments, **options):
    r"""Let no file grow any more, except for ten bytes of one that is appended to, and an adapter's small files."""
    import resource

    size = 12_000 if original.__name__ == "save_adapter" else 0  # so that it is the weights that do not fit
    if original is files.append_lines and Path(arguments[0]).exists():
        size = Path(arguments[0]).stat().st_size + 10
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return original(*arguments, **options)


STRIKES = {"killed": die, "disk full": fill_disk}


def train_child(world: Path, out: Path, changes: dict) -> dict:
    r"""Begin the small run in `out`, or resume it."""
    return train_files(small_config(world, out, **changes), resume=True)


def command_child(*words: str) -> int:
    r"""Run a command of the command line."""
    return cli.run(words)


def _main(pipe, task: Callable, arguments: tuple, moment: Moment, strike: str) -> None:
    torch.set_num_threads(1)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        reward_by_coin(patch)
        arm(moment, STRIKES[strike], patch)
        try:
            value = task(*arguments)
        except UserError as error:
            value = error
    pipe.send((value, printed.getvalue()))


def start(task: Callable, *arguments, moment: Moment = None, strike: str = "killed"):
    r"""Start a child and return it, with `answer()`: wait, and return what the task returned, the `UserError` that it
    raised, or the negative number of the signal that ended it; `printed` is then what it wrote to stdout."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:  # for the server, which is started by the first child
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            patch.setenv(name, "1")
        context.set_forkserver_preload(["tests.reliability.killable_imports"])
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_main, args=(theirs, task, arguments, moment, strike))
        child.start()
    theirs.close()

    def answer(seconds: float = 300):
        value = None
        with contextlib.suppress(EOFError):
            value, child.printed = ours.recv() if ours.poll(seconds) else pytest.fail("the child hangs")
        child.join(60)
        return child.exitcode if child.exitcode else value

    child.answer = answer
    return child


def result_of(out: Path) -> dict:
    r"""Return everything of a finished run that must not depend on interruptions: names to contents."""
    found = {"metrics": [run.comparable(line) for line in read_lines(out / "metrics.jsonl")]}
    summary = json.loads((out / "summary.json").read_text())
    found |= {name: summary[name] for name in ("before", "after", "change", "rollouts", "updates", "step", "complete")}
    for path in [out / "adapter" / "adapter_model.safetensors", *sorted((out / "evaluation").glob("*"))]:
        found[path.name] = path.read_bytes()
    newest = checkpoint.read_checkpoint(checkpoint.checkpoint_folders(out)[-1])
    unseeded = ("spent", "python_rng", "numpy_rng")  # seconds, and global states that nothing here draws from
    found["checkpoint"] = {name: value for name, value in newest.state.items() if name not in unseeded}
    return found | {"generator": newest.rng["sampling"].tolist()}
