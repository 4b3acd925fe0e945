r"""Runs that are killed, interrupted, starved of disk or memory, or fed a decoder that fails: nothing is lost.

| fault | what happens | test |
| --- | --- | --- |
| killed while sampling, updating, answering, saving | ends as if it had not been | test_a_run_killed_again_and_again |
| killed at any call that computes or writes | the same | test_a_run_killed_at_any_call |
| killed at 20 random times | the same | test_a_run_killed_at_random_times |
| `evaluate` killed | the same command goes on to the same answers | test_a_killed_evaluation_goes_on |
| a worker of `reproduce` killed | named; others end; the same answers | test_a_killed_worker_is_named_and_goes_on |
| `reproduce` killed, workers too | the same answers | test_reproduce_killed_at_random_times |
| a worker's parent killed | the worker ends, so that no two share a folder | test_a_worker_whose_parent_is_gone_ends |
| newest checkpoint broken | one older | test_training.py::test_a_damaged_checkpoint_gives_way_to_the_one_before |
| Ctrl-C in a terminal | the step ends and is saved, one line, status 130 | test_ctrl_c_in_a_terminal |
| an interrupt in the middle of a step | the newest checkpoint counts, one line | test_an_interrupt_in_the_middle |
| a notebook's stop button | as Ctrl-C; the cell runs again | test_a_notebook_cell_is_stopped_and_run_again |
| disk full, whatever is written | an error with the file's name; resumed later | test_a_full_disk_is_named |
| unwritable folder | an error with its name | test_an_unwritable_folder_is_named |
| clip deleted in the middle of a run | skipped and counted | test_a_clip_deleted_in_the_middle_is_skipped |
| decoder raises | skipped and counted | test_a_decoder_that_raises_is_skipped |
| decoder hangs | given up after decode_timeout, skipped, counted | test_a_decoder_that_hangs_is_skipped |
| too many broken clips | an error that counts them | test_training.py::test_too_many_broken_clips_end_the_run |
| out of memory in a step | an error that names micro_batch; resumed | test_out_of_memory_in_a_step_names_micro_batch |
| out of memory while answering | error that names eval_batch | test_out_of_memory_in_an_evaluation_names_eval_batch |
| NaN log-prob | an error with the record | test_training.py::test_a_log_prob_that_is_not_finite_names_step_and_record |
| NaN reward | an error with the record | test_training.py::test_a_reward_that_is_not_finite_names_the_record |
| a bug | its own error, untouched | test_another_error_stays_what_it_is |

"As if it had not been": metrics, adapter, answers, counts and checkpoint are equal in every bit.
"""

import json
import os
import random
import re
import signal
import sys
import threading
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from killable import (
    MOMENTS,
    arm,
    command_child,
    needs_fork,
    orphan_child,
    reproduce_child,
    result_of,
    start,
    train_child,
    worker_child,
)
from small_run import reward_by_coin, small_config, write_world
from test_experiments import FAKE_WORKER, tiny_run

from dvr1_lite import __main__ as cli
from dvr1_lite import evaluation, experiments, plotting, video
from dvr1_lite.checkpoints import load_newest
from dvr1_lite.config import TrainConfig, to_yaml
from dvr1_lite.errors import UserError
from dvr1_lite.files import read_lines
from dvr1_lite.policy import Policy
from dvr1_lite.training import Trainer, train

HERE = Path(__file__).resolve().parent
BY_FOUR = {"eval_batch": 4}  # two batches of answers
WHOLE = BY_FOUR | {"figures": True}
KILLED = -signal.SIGKILL if os.name == "posix" else None


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def expected(world, tmp_path_factory):
    r"""What a run ends with that nothing befalls."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert start(train_child, world, out, BY_FOUR).answer()["complete"]
    return result_of(out)


@pytest.fixture
def coin(monkeypatch):
    reward_by_coin(monkeypatch)
    return monkeypatch


def steps_of(run: Path) -> list[int]:
    return [line["step"] for line in read_lines(run / "metrics.jsonl")]


def test_the_table_names_tests_that_exist():
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in __doc__.splitlines()
            if line.startswith("| ")][2:]
    here = {name for name in globals() if name.startswith("test_") and name != "test_experiments"}
    named = set()
    for fault, happens, test in rows:
        file, _, name = test.rpartition("::")
        named.add(name)
        assert fault and happens and f"def {name}(" in (HERE / (file or Path(__file__).name)).read_text(), test
    assert here - named == {"test_the_table_names_tests_that_exist", "test_the_readme_names_tests_that_exist"}


def test_the_readme_names_tests_that_exist():
    page = (HERE.parent / "README.md").read_text(encoding="utf-8")
    promises = page[page.index("## What is promised"):page.index("## Tests")]
    file, checked = "", 0
    for name in re.findall(r"`((?:test_\w+\.py::)?test_\w+)`", promises):
        file = name.rpartition("::")[0] or file  # a name alone is in the file named last
        assert f"def {name.rpartition('::')[2]}(" in (HERE / file).read_text(encoding="utf-8"), name
        checked += 1
    assert checked > 15


# --- killed ----------------------------------------------------------------------------------------------------------


@needs_fork
def test_a_run_killed_again_and_again(expected, world, tmp_path):
    out, began = tmp_path / "run", []
    for moment in [("writing answers", 2), ("sampling", 2), ("updating", 2), ("writing a checkpoint", 2)]:
        assert start(train_child, world, out, BY_FOUR, moment=moment).answer() == KILLED
        began.append(steps_of(out))
    assert began[0] == [] and (out / "checkpoints" / ".unfinished-step_000002" / "adapter").is_dir()
    assert load_newest(out).state["step"] == 1
    assert start(train_child, world, out, BY_FOUR).answer()["complete"]
    assert result_of(out) == expected


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 2, 3, 5])
@pytest.mark.parametrize("name", [name for name in MOMENTS if name != "writing encoded clips"])
def test_a_run_killed_at_any_call(name, call, expected, world, tmp_path):
    out = tmp_path / "run"
    killed = start(train_child, world, out, WHOLE, moment=(name, call)).answer() == KILLED
    assert killed or call > 2  # not everything is called more often
    assert start(train_child, world, out, WHOLE).answer()["complete"]
    assert result_of(out) == expected and len(list((out / "figures").iterdir())) == 4


@needs_fork
@pytest.mark.slow
def test_a_run_killed_at_random_times(expected, world, tmp_path):
    killed, seconds, number = 0, 2.0, 0
    while killed < 20 and number < 80:
        out, share = tmp_path / f"run{number}", random.Random(number).uniform(0.05, 1.0)
        child = start(train_child, world, out, WHOLE)
        child.join(share * seconds)
        child.kill()
        killed += child.answer() == KILLED
        began = time.monotonic()
        assert start(train_child, world, out, WHOLE).answer()["complete"]
        assert result_of(out) == expected, share
        seconds, number = max(seconds, time.monotonic() - began), number + 1
    assert killed == 20


@needs_fork
def test_a_killed_evaluation_goes_on(world, tmp_path):
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


def answers_of(shelf: Path) -> dict:
    r"""What recorded runs must agree in, by file name."""
    return {name: [run.get(key) for key in ("answers", "accuracy", "sampled", "curve", "augmentation")]
            for name, run in experiments.read_runs(shelf).items()}


@needs_fork
def test_a_killed_worker_is_named_and_goes_on(world, tmp_path, monkeypatch):
    run = tiny_run(world)
    prints, shelves = experiments.fingerprints(run.config), [tmp_path / "whole", tmp_path / "killed"]
    never = ("sampling", 1)  # once the steps are done and saved, nothing is sampled for them again
    for shelf, moments in zip(shelves, ([None], [("sampling", 2), ("writing answers", 1), never])):
        base = experiments.base_job(run, prints, shelf, "command")
        job = experiments.run_job(run, prints, shelf, "command", base)
        for one, moment in [(base, None), *((job, moment) for moment in moments)]:
            one.folder.mkdir(parents=True, exist_ok=True)
            (one.folder / "spec.json").write_text(json.dumps(one.spec))
            ended = start(worker_child, one.folder / "spec.json", moment=moment).answer()
            assert ended == (0 if moment in (None, never) else KILLED), moment
    assert answers_of(shelves[0]) == answers_of(shelves[1]) and len(answers_of(shelves[0])) == 1

    program = FAKE_WORKER.replace('sys.exit("error: out of luck")', "import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(experiments, "worker_command", lambda spec: [sys.executable, "-S", "-c", program, str(spec)])
    monkeypatch.setattr(experiments, "fingerprints", lambda config: {"model": "m", "train": "t"})
    told, runs = [], experiments.plan(experiments.EXPERIMENTS["table4"], 1)
    assert experiments.make_runs(runs, tmp_path / "table", 2, "command", told.append) == ["table4: GRPO + DA, seed 0"]
    assert "killed by signal 9 (SIGKILL): the same command goes on" in told[-1]
    assert len(experiments.read_runs(tmp_path / "table")) == 3  # the others


@needs_fork
def test_a_worker_whose_parent_is_gone_ends(world):
    gone = start(command_child, "--help")
    assert gone.answer() == 0
    assert start(orphan_child, gone.pid).answer() == 1 and start(orphan_child, None).answer() == "still here"


@needs_fork
@pytest.mark.slow
def test_reproduce_killed_at_random_times(world, tmp_path):
    small = tiny_run(world).config
    changes = {name: getattr(small, name) for name in (
        "model", "train_file", "eval_files", "num_frames", "rollout_budget", "steps", "prompts_per_step", "group_size",
        "max_new_tokens", "inner_updates", "lora_rank", "quantization")} | {"save_every": 1}
    assert start(reproduce_child, tmp_path / "whole", changes).answer(600) == []
    shelf, began = tmp_path / "killed", 0
    for number in range(4):
        child = start(reproduce_child, shelf, changes)
        child.join(random.Random(number).uniform(2, 20))
        child.kill()
        began += child.answer() == KILLED
        time.sleep(3)  # its workers end by themselves
    assert start(reproduce_child, shelf, changes).answer(600) == [] and began >= 2
    assert answers_of(shelf) == answers_of(tmp_path / "whole") and len(answers_of(shelf)) == 3


# --- interrupted -----------------------------------------------------------------------------------------------------


def wait_for_steps(run: Path, count: int, seconds: float = 120) -> int:
    r"""Waits until a run that another process makes has written `count` steps; returns how many there are."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        written = len(steps_of(run))
        if written >= count:
            return written
        time.sleep(0.02)
    raise AssertionError(f"no {count} steps after {seconds} s")


@needs_fork
def test_ctrl_c_in_a_terminal(world, tmp_path):
    out, endless = tmp_path / "run", {"steps": 100_000, "save_every": 1000, "eval_files": []}
    (tmp_path / "a.yaml").write_text(to_yaml(small_config(world, out, **endless)))
    child = start(command_child, "train", "--config", str(tmp_path / "a.yaml"))
    wait_for_steps(out, 2)
    os.kill(child.pid, signal.SIGINT)
    assert child.answer(60) == cli.INTERRUPTED
    saved = load_newest(out).state["step"]
    assert child.told.count("\n") == 1 and f"--resume {out}" in child.told
    assert f"after step {saved} of 100000" in child.told and steps_of(out) == list(range(1, saved + 1))
    assert Policy.load(world / "model", adapter=out / "adapter").trainable()
    again = start(command_child, "train", "--resume", str(out))
    wait_for_steps(out, saved + 2)
    os.kill(again.pid, signal.SIGINT)
    assert again.answer(60) == cli.INTERRUPTED
    assert steps_of(out) == list(range(1, load_newest(out).state["step"] + 1))


@pytest.mark.parametrize(("where", "call", "saved"), [("updating", 3, 1), ("writing answers", 2, 0),
                                                      ("writing answers", 3, 3)])
def test_an_interrupt_in_the_middle(where, call, saved, world, tmp_path, coin, capsys):
    def interrupt(original, *arguments, **options):
        raise KeyboardInterrupt

    config = small_config(world, tmp_path / "run", **BY_FOUR)
    with coin.context() as patch:
        arm((where, call), interrupt, patch)
        summary = train(config, progress=False, resume=True)
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and "resume=True" in told
    assert (f"after step {saved} of 3, which is saved" if saved else "before the first of 3 steps was saved") in told
    assert not summary["complete"] and summary["step"] >= saved
    adapter = tmp_path / "run" / "adapter"
    assert adapter.exists() == (saved > 0)
    if saved:
        newest = load_newest(tmp_path / "run").adapter / "adapter_model.safetensors"
        assert (adapter / "adapter_model.safetensors").read_bytes() == newest.read_bytes()
        assert Policy.load(world / "model", adapter=adapter).trainable()
    again = train(config, progress=False, resume=True)
    assert again["complete"] and steps_of(tmp_path / "run") == [1, 2, 3]


CELL = "summary = train(config, progress=False, resume=True)"
BEFORE_THE_CELL = """
from pathlib import Path
from small_run import small_config
from dvr1_lite.training import train
config = small_config(Path({world!r}), Path({out!r}), steps=60, save_every=1000, eval_files=[])
"""


@pytest.mark.slow
def test_a_notebook_cell_is_stopped_and_run_again(world, tmp_path):
    from jupyter_client.manager import start_new_kernel

    out = tmp_path / "run"
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    manager, client = start_new_kernel(env=os.environ | {"PYTHONPATH": path}, kernel_name="python3")
    printed = []

    def read(message):
        if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
            printed.append(message["content"]["text"])

    def cell(code):
        return client.execute_interactive(code, timeout=300, output_hook=read)["content"]["status"]

    try:
        assert cell(BEFORE_THE_CELL.format(world=str(world), out=str(out))) == "ok"
        stopper = threading.Thread(target=lambda: (wait_for_steps(out, 3), manager.interrupt_kernel()))
        stopper.start()
        assert cell(CELL) == "ok"
        stopper.join()
        assert len(printed) == 1 and printed[0].count("\n") == 1 and printed[0].startswith("Stopped after step")
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
            ("writing an adapter", 3): "adapter", ("writing a file", 4): "summary.json"}
    for moment, told in full.items():
        error = start(train_child, world, out, BY_FOUR, moment=moment, strike="disk full").answer()
        assert isinstance(error, UserError), (moment, error)
        assert told in str(error) and "cannot be written" in str(error) and "free space" in str(error), error
    assert start(train_child, world, out, BY_FOUR).answer()["complete"]
    assert result_of(out) == expected
    with pytest.raises(UserError, match="reward.png: cannot be written"):
        plotting.save(plt.figure(), tmp_path / "none" / "reward.png")


def test_an_unwritable_folder_is_named(world, tmp_path, capsys, coin):
    (tmp_path / "file").write_text("")
    (tmp_path / "a.yaml").write_text(to_yaml(small_config(world, tmp_path / "run", save_every=1, eval_files=[])))
    config, below = ["--config", str(tmp_path / "a.yaml")], str(tmp_path / "file" / "below")
    for command in (["train", *config, "--out", below], ["reproduce", "table8", "--quick", "--out", below],
                    ["evaluate", *config, "--data", str(world / "records.jsonl"), "--out", below]):
        assert cli.main(command) == 2, command
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith("error: ") and "cannot be written" in told and str(tmp_path / "file") in told
    update = Trainer._update
    coin.setattr(Trainer, "_update", lambda self, groups: ((tmp_path / "run" / "checkpoints").write_text(""),
                                                           update(self, groups))[1])
    assert cli.main(["train", *config]) == 2
    assert re.search("step_000001: the checkpoint cannot be written .* --resume", capsys.readouterr().err)


# --- clips -----------------------------------------------------------------------------------------------------------


def skips_of(summary: dict, out: Path) -> list[str]:
    r"""The named skips of a complete run, after a look at their count."""
    last = list(read_lines(out / "metrics.jsonl"))[-1]
    assert summary["complete"] and summary["skipped_clips"] == last["skipped_clips"] > 0
    return summary["skipped_examples"]


def test_a_clip_deleted_in_the_middle_is_skipped(tmp_path, coin):
    world, step = write_world(tmp_path / "world"), Trainer._step

    def step_and_delete(self):
        line = step(self)
        shown = {str(key[0]) for key in self.policy.features._items}
        for path in world.glob("*.mp4"):
            if str(path) not in shown:
                path.unlink()
        return line

    coin.setattr(Trainer, "_step", step_and_delete)
    out = tmp_path / "run"
    skips = skips_of(train(small_config(world, out, eval_files=[], prompts_per_step=1), progress=False), out)
    assert "no such file" in skips[0] and steps_of(out) == [1, 2, 3]


@pytest.mark.parametrize("error", [RuntimeError("[12:00] /src/video.cc:7: broken"), OSError(5, "Input/output error"),
                                   MemoryError(), AssertionError("odd")], ids=lambda error: type(error).__name__)
def test_a_decoder_that_raises_is_skipped(error, world, tmp_path, coin):
    def fail(path, indices, probe):
        if path.endswith("1.mp4"):
            raise error
        return decode(path, indices, probe)

    decode = video._decoder(None)
    coin.setattr(video, f"_decode_{video.BACKEND}", fail)
    out = tmp_path / "run"
    skips = skips_of(train(small_config(world, out, eval_files=[], augment="none"), progress=False), out)
    assert len(skips) == 1 and "1.mp4: not a readable video" in skips[0] and "/src/" not in skips[0]


def test_a_decoder_that_hangs_is_skipped(world, tmp_path, coin):
    released, decode = threading.Event(), video._decoder(None)

    def hang(path, indices, probe):
        if path.endswith("1.mp4"):
            released.wait(60)
        return decode(path, indices, probe)

    coin.setattr(video, f"_decode_{video.BACKEND}", hang)
    out, began = tmp_path / "run", time.monotonic()
    try:
        summary = train(small_config(world, out, augment="none", decode_timeout=0.3, eval_batch=4), progress=False)
    finally:
        released.set()
    skips = skips_of(summary, out)
    assert len(skips) == 1 and "1.mp4: decoding did not end within 0.3 s" in skips[0] and "decode_timeout" in skips[0]
    assert summary["before"]["L1"]["broken"] == summary["after"]["L1"]["broken"] == 2
    assert summary["after"]["L1"]["n"] == 4 and time.monotonic() - began < 60
    assert experiments.same_config(experiments.saved_config(TrainConfig()), TrainConfig(decode_timeout=5.0))


# --- memory ----------------------------------------------------------------------------------------------------------


def no_memory(kind: str):
    r"""Really asks torch for more than there is, or raises what a GPU or python would."""
    if kind == "cpu":
        torch.empty(2**58)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB") if kind == "gpu" else MemoryError


@pytest.mark.parametrize("kind", ["cpu", "gpu", "python"])
def test_out_of_memory_in_a_step_names_micro_batch(kind, world, tmp_path, coin):
    out, inner = tmp_path / "run", Trainer._inner_update
    config, told = small_config(world, out, eval_files=[]), f"micro_batch.*{out / 'config.yaml'}.*--resume"
    with coin.context() as patch, pytest.raises(UserError, match=f"step 2 ran out of memory: .*{told}"):
        patch.setattr(Trainer, "_inner_update",
                      lambda self, *a: no_memory(kind) if self.updates == 3 else inner(self, *a))
        train(config, progress=False)
    assert steps_of(out) == [1] and load_newest(out).state["step"] == 1
    if kind != "cpu":
        return
    text = (out / "config.yaml").read_text()
    assert text.count("micro_batch: null") == 1
    (out / "config.yaml").write_text(text.replace("micro_batch: null", "micro_batch: 2"))
    assert cli.main(["train", "--resume", str(out)]) == 0 and steps_of(out) == [1, 2, 3]


def test_out_of_memory_in_an_evaluation_names_eval_batch(world, tmp_path, coin):
    out, sample, calls = tmp_path / "run", evaluation.sample_groups, []

    def grow(*arguments, **options):
        calls.append(None)
        return no_memory("cpu") if len(calls) == 2 else sample(*arguments, **options)

    coin.setattr(evaluation, "sample_groups", grow)
    with pytest.raises(UserError, match="answering 2 questions together ran out of memory: give a smaller eval_batch"):
        train(small_config(world, out, **BY_FOUR), progress=False)
    assert len(list(read_lines(out / "evaluation" / "before_L1.jsonl"))) == 4
    assert train(small_config(world, out, **BY_FOUR), progress=False, resume=True)["complete"]


def test_another_error_stays_what_it_is(world, tmp_path, coin):
    coin.setattr(Trainer, "_update", lambda self, groups: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        train(small_config(world, tmp_path / "run", eval_files=[]), progress=False)
