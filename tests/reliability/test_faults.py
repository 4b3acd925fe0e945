r"""Runs that are killed, interrupted, out of disk or memory, or given a decoder that fails: nothing is lost.

| fault | what happens | test |
| --- | --- | --- |
| killed while sampling, updating, answering, saving | resumed, equal in every bit | test_a_run_killed_several_times |
| killed at any call that computes or writes | the same | test_a_run_killed_at_any_call |
| killed at 20 random times | the same | test_a_run_killed_at_random_times |
| `evaluate` killed | the same command gives the same answers | test_a_killed_evaluation_is_resumed |
| Ctrl-C in a terminal | the step ends and is saved, one line, status 130 | test_ctrl_c_in_a_terminal |
| an interrupt in the middle of a step | the newest checkpoint counts, one line | test_an_interrupt_in_the_middle |
| a notebook's stop button | as Ctrl-C; the cell can be run again | test_a_notebook_cell_is_stopped_and_run_again |
| disk full, whatever is written | an error with the file's name; resumed later | test_a_full_disk_is_named |
| unwritable folder | an error with its name | test_an_unwritable_folder_is_named |
| clip deleted in the middle of a run | skipped and counted | test_a_clip_deleted_in_the_middle_is_skipped |
| decoder raises, crashes or hangs | skipped and counted | test_a_decoder_that_fails_is_skipped |
| out of memory in a step | an error that names micro_batch; resumed | test_out_of_memory_in_a_step_names_micro_batch |
| out of memory while answering | an error that names eval_batch | test_out_of_memory_while_answering_names_eval_batch |
| a bug | its own error, unchanged | test_another_error_is_not_changed |

Damaged checkpoints, too many broken clips and numbers that are not finite: tests/core/test_training.py. Killed workers
of `reproduce`: tests/lab/test_runner.py. Equal in every bit are metrics, adapter, answers, counts and checkpoint.
"""

import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dvr1_lite import __main__ as cli
from dvr1_lite import decoding, evaluation
from dvr1_lite.checkpoint import checkpoint_folders
from dvr1_lite.config import to_yaml
from dvr1_lite.errors import UserError
from dvr1_lite.files import read_lines
from dvr1_lite.policy import Policy
from dvr1_lite.training import Trainer
from tests.reliability.killable import MOMENTS, ROOT, arm, command_child, needs_fork, result_of, start, train_child
from tests.small_run import reward_by_coin, small_config, train_files, write_world

BY_FOUR = {"eval_batch": 4}  # two batches of answers
KILLED = -signal.SIGKILL if os.name == "posix" else None


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def expected(world, tmp_path_factory):
    r"""Make an uninterrupted run; everything that must not depend on interruptions."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert start(train_child, world, out, BY_FOUR).answer()["complete"]
    return result_of(out)


@pytest.fixture
def coin(monkeypatch):
    reward_by_coin(monkeypatch)
    return monkeypatch


def steps_of(run: Path) -> list[int]:
    return [line["step"] for line in read_lines(run / "metrics.jsonl")]


def saved_steps(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("step_")) for folder in checkpoint_folders(run)]


def test_the_table_names_tests_that_exist():
    named = {line.rsplit("|", 2)[1].strip() for line in __doc__.splitlines() if line.startswith("| ")} - {"test", "---"}
    assert named == {name for name in globals() if name.startswith("test_")} - {"test_the_table_names_tests_that_exist"}


# --- killed ----------------------------------------------------------------------------------------------------------


@needs_fork
def test_a_run_killed_several_times(expected, world, tmp_path):
    out, written = tmp_path / "run", []
    for moment in [("writing answers", 2), ("sampling", 2), ("updating", 2), ("writing a checkpoint", 2)]:
        assert start(train_child, world, out, BY_FOUR, moment=moment).answer() == KILLED
        written.append(steps_of(out))
    assert written[0] == [] and (out / "checkpoints" / ".unfinished-step_000002" / "adapter").is_dir()
    assert saved_steps(out) == [1]
    assert start(train_child, world, out, BY_FOUR).answer()["complete"]
    assert result_of(out) == expected


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 2, 3, 5])
@pytest.mark.parametrize("name", MOMENTS)
def test_a_run_killed_at_any_call(name, call, expected, world, tmp_path):
    out, changes = tmp_path / "run", BY_FOUR
    if name == "writing encoded clips":
        changes = changes | {"feature_folder": str(tmp_path / "features")}
    killed = start(train_child, world, out, changes, moment=(name, call)).answer() == KILLED
    assert killed or call > (1 if name == "copying an adapter" else 2)  # not everything is called more often
    assert start(train_child, world, out, changes).answer()["complete"]
    assert result_of(out) == expected


@needs_fork
@pytest.mark.slow
def test_a_run_killed_at_random_times(expected, world, tmp_path):
    killed, seconds, number = 0, 2.0, 0
    while killed < 20 and number < 80:
        out, share = tmp_path / f"run{number}", random.Random(number).uniform(0.05, 1.0)
        child = start(train_child, world, out, BY_FOUR)
        child.join(share * seconds)
        child.kill()
        killed += child.answer() == KILLED
        began = time.monotonic()
        assert start(train_child, world, out, BY_FOUR).answer()["complete"]
        assert result_of(out) == expected, share
        seconds, number = max(seconds, time.monotonic() - began), number + 1
    assert killed == 20


@needs_fork
def test_a_killed_evaluation_is_resumed(world, tmp_path):
    (tmp_path / "small.yaml").write_text(to_yaml(small_config(world, tmp_path / "unused")))
    words = ["evaluate", "--config", str(tmp_path / "small.yaml"), "--data", str(world / "records.jsonl"),
             "--batch", "2", "--out"]
    assert start(command_child, *words, str(tmp_path / "whole")).answer() == 0
    for moment in [("renaming a file or folder", 1), ("writing answers", 2)]:
        assert start(command_child, *words, str(tmp_path / "a"), moment=moment).answer() == KILLED
    torn = (tmp_path / "a" / "predictions.jsonl").read_text()
    assert torn.count("\n") == 3 and not torn.endswith("\n") and not (tmp_path / "a" / "summary.json").exists()
    assert start(command_child, *words, str(tmp_path / "a")).answer() == 0
    whole, again = ((tmp_path / name / "predictions.jsonl").read_bytes() for name in ("whole", "a"))
    assert again == whole and whole.count(b"\n") == 6
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "a")]
    assert {key for key in summaries[0] if summaries[0][key] != summaries[1][key]} <= {"seconds"}


# --- interrupted -----------------------------------------------------------------------------------------------------


def wait_for_steps(run: Path, count: int, alive: Callable[[], bool]) -> None:
    r"""Wait until a run that another process makes, while it is alive, has written `count` steps."""
    end = time.monotonic() + 120
    while len(steps_of(run)) < count:
        assert alive() and time.monotonic() < end, f"no {count} steps"
        time.sleep(0.02)


@needs_fork
def test_ctrl_c_in_a_terminal(world, tmp_path):
    out, endless = tmp_path / "run", {"steps": 100_000, "save_every": 1000, "eval_files": []}
    (tmp_path / "a.yaml").write_text(to_yaml(small_config(world, out, **endless)))
    for words in (["--config", str(tmp_path / "a.yaml")], ["--resume", str(out)]):
        child, before = start(command_child, "train", *words), max(saved_steps(out), default=0)
        wait_for_steps(out, before + 2, child.is_alive)
        os.kill(child.pid, signal.SIGINT)
        assert child.answer(60) == cli.INTERRUPTED
        saved = saved_steps(out)[-1]
        assert child.printed.count("\n") == 1 and f"--resume {out}" in child.printed
        assert f"after step {saved} of 100000" in child.printed and steps_of(out) == list(range(1, saved + 1))
        assert Policy.load(world / "model", adapter=out / "adapter").trainable()


@pytest.mark.parametrize(("where", "call", "saved"), [("updating", 3, 1), ("writing answers", 2, 0),
                                                      ("writing answers", 3, 3)])
def test_an_interrupt_in_the_middle(where, call, saved, world, tmp_path, coin, capsys):
    def interrupt(original, *arguments, **options):
        raise KeyboardInterrupt

    config, out = small_config(world, tmp_path / "run", **BY_FOUR), tmp_path / "run"
    with coin.context() as patch:
        arm((where, call), interrupt, patch)
        summary = train_files(config)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "resume=True" in printed
    assert (f"after step {saved} of 3, which is saved" if saved else "before the first of 3 steps") in printed
    assert not summary["complete"] and summary["step"] >= saved and (out / "adapter").exists() == (saved > 0)
    if saved:
        name = "adapter/adapter_model.safetensors"
        assert (out / name).read_bytes() == (checkpoint_folders(out)[-1] / name).read_bytes()
    assert train_files(config, resume=True)["complete"] and steps_of(out) == [1, 2, 3]


CELL = "summary = train_files(config, resume=True)"
BEFORE_THE_CELL = """
from pathlib import Path
from tests.small_run import small_config, train_files
config = small_config(Path({world!r}), Path({out!r}), steps=60, save_every=1000, eval_files=[])
"""


@pytest.mark.slow
def test_a_notebook_cell_is_stopped_and_run_again(world, tmp_path):
    from jupyter_client.manager import start_new_kernel

    out, printed = tmp_path / "run", []
    manager, client = start_new_kernel(env=os.environ | {"PYTHONPATH": str(ROOT)}, kernel_name="python3")

    def read(message):
        if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
            printed.append(message["content"]["text"])

    def cell(code):
        return client.execute_interactive(code, timeout=300, output_hook=read)["content"]["status"]

    try:
        assert cell(BEFORE_THE_CELL.format(world=str(world), out=str(out))) == "ok"
        stopper = threading.Thread(target=lambda: (wait_for_steps(out, 3, manager.is_alive), manager.interrupt_kernel()))
        stopper.start()
        assert cell(CELL) == "ok"
        stopper.join()
        assert "".join(printed).count("\n") == 1 and printed[0].startswith("Stopped after step")
        assert (out / "adapter" / "adapter_model.safetensors").exists() and 3 <= len(steps_of(out)) < 60
        assert cell(CELL + "\nassert summary['complete']") == "ok" and steps_of(out) == list(range(1, 61))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


# --- disk ------------------------------------------------------------------------------------------------------------


@needs_fork
def test_a_full_disk_is_named(expected, world, tmp_path):
    out = tmp_path / "run"
    full = {("writing answers", 2): "before_L1.jsonl", ("writing a line of metrics", 1): "metrics.jsonl",
            ("writing a checkpoint", 1): "step_000001", ("writing an adapter", 2): "step_000002",
            ("copying an adapter", 1): "adapter", ("writing a file", 5): "summary.json"}
    for moment, name in full.items():
        error = start(train_child, world, out, BY_FOUR, moment=moment, strike="disk full").answer()
        assert isinstance(error, UserError), (moment, error)
        assert name in str(error) and "cannot be written" in str(error) and "free disk space" in str(error), error
    assert start(train_child, world, out, BY_FOUR).answer()["complete"]
    assert result_of(out) == expected


def test_an_unwritable_folder_is_named(world, tmp_path, capsys, coin):
    (tmp_path / "file").write_text("")
    (tmp_path / "a.yaml").write_text(to_yaml(small_config(world, tmp_path / "run", save_every=1, eval_files=[])))
    config, below = ["--config", str(tmp_path / "a.yaml")], str(tmp_path / "file" / "below")
    for command in (["train", *config, "--out", below], ["reproduce", "table8", "--quick", "--out", below],
                    ["evaluate", *config, "--data", str(world / "records.jsonl"), "--out", below]):
        assert cli.main(command) == 2, command
        printed = capsys.readouterr().err.splitlines()[-1]
        assert printed.startswith("error: ") and "cannot be written" in printed and str(tmp_path / "file") in printed
    augment = Trainer.augment
    coin.setattr(Trainer, "augment", lambda self, *groups: ((tmp_path / "run" / "checkpoints").write_text(""),
                                                            augment(self, *groups))[1])
    assert cli.main(["train", *config]) == 2
    assert re.search("step_000001: the checkpoint cannot be written .* --resume", capsys.readouterr().err)


# --- clips -----------------------------------------------------------------------------------------------------------


def skips_of(summary: dict, out: Path) -> list[str]:
    r"""Return the named skips of a complete run, after checking their count."""
    last = list(read_lines(out / "metrics.jsonl"))[-1]
    assert summary["complete"] and summary["skipped_clips"] == last["skipped_clips"] > 0
    return summary["skipped_examples"]


def test_a_clip_deleted_in_the_middle_is_skipped(tmp_path, coin):
    world, step, out = write_world(tmp_path / "world"), Trainer.step, tmp_path / "run"

    def step_and_delete(self):
        line = step(self)
        shown = {str(key[0]) for key in self.policy.features._items}
        for path in world.glob("*.mp4"):
            if str(path) not in shown:
                path.unlink()
        return line

    coin.setattr(Trainer, "step", step_and_delete)
    skips = skips_of(train_files(small_config(world, out, eval_files=[], prompts_per_step=1)), out)
    assert "no such file" in skips[0] and steps_of(out) == [1, 2, 3]


FAILING_WORKER = """
import os, time
from dvr1_lite import decoding
decode = decoding._decode
def fail(path, *rest):
    if path.endswith("1.mp4"):
        {what}
    return decode(path, *rest)
decoding._decode = fail
decoding.serve()
"""


@pytest.mark.parametrize(("what", "message"), [
    ("raise RuntimeError('[12:00] /src/video.cc:7: broken')", "not a readable video.*RuntimeError while decoding"),
    ("raise MemoryError", "not a readable video"), ("os.kill(os.getpid(), 11)", "the decoder crashed"),
    ("time.sleep(60)", "decoding did not finish within 1.5 s.*decode_timeout")],
    ids=["raises", "no memory", "crashes", "hangs"])
def test_a_decoder_that_fails_is_skipped(what, message, world, tmp_path, coin):
    decoding._stop_worker()
    coin.setattr(decoding, "WORKER", [sys.executable, "-c", FAILING_WORKER.format(what=what)])
    out, began = tmp_path / "run", time.monotonic()
    try:
        summary = train_files(small_config(world, out, augment="none", decode_timeout=1.5, eval_batch=6, steps=2,
                                           prompts_per_step=3, eval_before=False))
    finally:
        decoding._stop_worker()
    skips = skips_of(summary, out)
    assert len(skips) == 1 and re.search(f"1.mp4: {message}", skips[0]) and "/src/" not in skips[0]
    assert summary["after"]["L1"]["broken"] == 2 and summary["after"]["L1"]["n"] == 4
    assert time.monotonic() - began < 55


# --- memory ----------------------------------------------------------------------------------------------------------


def no_memory(kind: str):
    r"""Ask torch for more memory than there is, or raise what a GPU or python would."""
    if kind == "cpu":
        torch.empty(2**58)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB") if kind == "gpu" else MemoryError


@pytest.mark.parametrize("kind", ["cpu", "gpu", "python"])
def test_out_of_memory_in_a_step_names_micro_batch(kind, world, tmp_path, coin):
    out, update = tmp_path / "run", Trainer.update_weights
    config, fix = small_config(world, out, eval_files=[]), f"micro_batch.*{out / 'config.yaml'}.*--resume"
    with coin.context() as patch, pytest.raises(UserError, match=f"step 2 ran out of memory: .*{fix}"):
        patch.setattr(Trainer, "update_weights",
                      lambda self, *a: no_memory(kind) if self.updates == 3 else update(self, *a))
        train_files(config)
    assert steps_of(out) == [1] and saved_steps(out) == [1]
    if kind == "cpu":
        text = (out / "config.yaml").read_text()
        assert text.count("micro_batch: null") == 1
        (out / "config.yaml").write_text(text.replace("micro_batch: null", "micro_batch: 2"))
        assert cli.main(["train", "--resume", str(out)]) == 0 and steps_of(out) == [1, 2, 3]


def test_out_of_memory_while_answering_names_eval_batch(world, tmp_path, coin):
    out, sample, calls = tmp_path / "run", evaluation.sample_groups, []

    def grow(*arguments, **options):
        calls.append(None)
        return no_memory("cpu") if len(calls) == 2 else sample(*arguments, **options)

    coin.setattr(evaluation, "sample_groups", grow)
    with pytest.raises(UserError, match="answering 2 questions together ran out of memory: give a smaller eval_batch"):
        train_files(small_config(world, out, **BY_FOUR))
    assert len(list(read_lines(out / "evaluation" / "before_L1.jsonl"))) == 4
    assert train_files(small_config(world, out, **BY_FOUR), resume=True)["complete"]


def test_another_error_is_not_changed(world, tmp_path, coin):
    coin.setattr(Trainer, "augment", lambda self, *groups: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        train_files(small_config(world, tmp_path / "run", eval_files=[]))
