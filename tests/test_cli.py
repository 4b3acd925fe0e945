r"""The command line: options, messages, exit status."""

import json
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from small_run import write_world

from dvr1_lite import __main__ as cli
from dvr1_lite.config import TrainConfig
from dvr1_lite.paths import resolve

SMALL = ["--num-frames", "4", "--steps", "2", "--prompts-per-step", "2", "--group_size=3", "--max-new-tokens", "5",
         "--inner-updates", "1", "--no-figures"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    r"""A run trained through the command line, with a config file and overrides."""
    out, file = tmp_path_factory.mktemp("runs") / "cli", world / "small.yaml"
    file.write_text(f"model: {world / 'model'}\ntrain_file: {world / 'records.jsonl'}\n"
                    f"eval_files:\n  val: {world / 'records.jsonl'}\nsteps: 99\n")
    assert cli.main(["train", "--config", str(file), *SMALL, "--out", str(out)]) == 0
    return out


def fails(capsys, arguments, *told):
    assert cli.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and not captured.out
    for text in told:
        assert text in captured.err


# --- train -----------------------------------------------------------------------------------------------------------


def test_overrides_win_over_the_file(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[0])["rollouts"] == 6
    assert not (run / "figures").exists()


def test_the_result_is_told_with_its_interval(run, capsys):
    assert cli.main(["train", "--resume", str(run)]) == 0  # finished: nothing is repeated
    told = capsys.readouterr().out
    assert re.search(r"val: [\d.]+ -> [\d.]+ %, change [+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\] points .*n = 6", told)
    assert "12 rollouts, 2 updates" in told and str(run) in told


def test_help_lists_every_field_with_unit_and_paper_value(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and "--config" in told and "--resume" in told
    for field in fields(TrainConfig):
        assert f"--{field.name}" in told, field.name
    assert told.count("; paper: ") >= len(fields(TrainConfig))
    assert "The objective: --method" in told and "The run: --seed" in told
    assert "--no_figures, --no-figures The same as --figures false." in told


@pytest.mark.parametrize(("arguments", "told"), [
    (["--group-size", "2"], "group_size is 2"),
    (["--group-size", "two"], "invalid int value: 'two'"),
    (["--history-window=0"], "history window is 0"),
    (["--learning-rat", "1"], "did you mean learning_rate"),
    (["--lr=1"], "or learning_rate"),
    (["--step", "3"], "did you mean steps"),
    (["--method", "ppo"], "reg-grpo"),
    (["--beta"], "expected one argument"),
    (["--config", "none.yaml"], "none.yaml cannot be read"),
    (["extra"], "unknown config key 'extra'"),
])
def test_bad_options_of_train(arguments, told, capsys):
    fails(capsys, ["train", *arguments], told)


def test_none_and_nothing_can_be_said():
    _, _, given = cli.parse_training(["--clip-eps", "none", "--micro-batch", "4", "--eval-files", "--mask-vanished",
                                      "false", "--beta", "1"])
    assert given == {"clip_eps": None, "micro_batch": 4, "eval_files": [], "mask_vanished": False, "beta": 1.0}
    assert cli.parse_training([]) == (None, None, {})


def test_a_folder_that_holds_a_run(run, capsys):
    fails(capsys, ["train", "--out", run], "already holds a run", "--resume", "another --out")
    fails(capsys, ["train", "--resume", run, "--steps", 5], "leave out steps")
    fails(capsys, ["train", "--resume", run.parent], "holds no run")


def test_a_complete_run_says_so_and_is_left_alone(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert "complete, all 2 steps; nothing was done. For a longer one" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_records_that_are_wrong(world, tmp_path, capsys):
    record = {"problem_id": 1, "data_type": "video", "problem_type": "exact", "path": "a"}
    (tmp_path / "bad.jsonl").write_text(json.dumps(record) + "\n")
    fails(capsys, ["train", "--out", tmp_path / "x", "--train-file", tmp_path / "bad.jsonl"], "bad.jsonl, line 1",
          "'solution'")


def test_a_model_without_weights(world, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    fails(capsys, ["train", "--out", tmp_path / "x", "--model", tmp_path, "--train-file", world / "records.jsonl",
                   "--eval-files"], "no weights")


def test_bitsandbytes_missing(world, tmp_path, capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    fails(capsys, ["train", "--out", tmp_path / "x", "--model", world / "model", "--train-file",
                   world / "records.jsonl", "--eval-files"], "bitsandbytes", "quantization: none")


def test_a_mistake_ends_with_status_2_and_without_traceback(tmp_path):
    done = subprocess.run([sys.executable, "-m", "dvr1_lite", "ask", "--clip", str(tmp_path / "no.mp4"), "--question",
                           "what", "--model", str(tmp_path / "no-model")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# --- evaluate and ask ------------------------------------------------------------------------------------------------


def test_evaluate_uses_the_runs_config_and_goes_on(run, world, tmp_path, capsys):
    arguments = ["evaluate", "--adapter", str(run / "adapter"), "--data", str(world / "records.jsonl"), "--out",
                 str(tmp_path / "e"), "--batch", "2"]
    assert cli.main(arguments) == 0
    first = json.loads((tmp_path / "e" / "summary.json").read_text())
    told = capsys.readouterr().out
    assert first["n"] == 6 and "all " in told and "n = 6" in told and "format" in told
    after = json.loads((run / "summary.json").read_text())["after"]["val"]
    assert first["accuracy"] == after["accuracy"] and first["by_type"] == after["by_type"]
    predictions = tmp_path / "e" / "predictions.jsonl"
    kept = predictions.read_text()
    predictions.write_text("".join(kept.splitlines(keepends=True)[:3]))
    assert cli.main(arguments) == 0
    assert predictions.read_text() == kept
    assert json.loads((tmp_path / "e" / "summary.json").read_text())["accuracy"] == first["accuracy"]


def test_bad_options_of_evaluate(run, world, tmp_path, capsys):
    base = ["evaluate", "--data", world / "records.jsonl", "--model", world / "model"]
    fails(capsys, ["evaluate", "--out", tmp_path / "e"], "--data")
    fails(capsys, [*base, "--out", tmp_path / "e", "--samples", 0], "--samples is 0")
    fails(capsys, [*base, "--out", run], "holds no evaluation")
    fails(capsys, [*base, "--out", tmp_path / "e", "--adapter", tmp_path], "adapter_config.json")


def test_ask_answers_about_a_clip(run, world, capsys):
    arguments = ["ask", "--clip", str(world / "0.mp4"), "--question", "what colour comes first", "--options", "red",
                 "green", "--adapter", str(run / "adapter")]
    assert cli.main(arguments) == 0
    told = capsys.readouterr().out
    assert told.startswith(("trace: ", "not in the form"))
    fails(capsys, [*arguments[:2], world / "none.mp4", *arguments[3:]], "none.mp4: no such file")


def test_ask_prints_trace_answer_and_span(run, world, capsys, monkeypatch):
    text = "<think> red first </think> <answer> B </answer> <glue> 1.0 2.5 </glue>"
    rollout = type("Rollout", (), {"texts": [[text]]})
    monkeypatch.setattr("dvr1_lite.rollout.sample_groups", lambda *_, **__: rollout)
    where = ["--clip", str(world / "0.mp4"), "--adapter", str(run / "adapter")]
    assert cli.main(["ask", *where, "--question", "when"]) == 0
    assert capsys.readouterr().out == "trace:  red first\nanswer: B, from 1.0 to 2.5 s\n"
    assert cli.main(["ask", *where, "--question", "when", "--options", "red", "green"]) == 0
    assert "answer: B (green), from 1.0 to 2.5 s\n" in capsys.readouterr().out


def test_ask_names_words_that_the_model_does_not_know(capsys):
    where = ["ask", "--clip", str(resolve("data/toyvideoqa/clips/L1/parade_0000.mp4")), "--question"]
    assert cli.main([*where, "What vehicle, if any, is first?"]) == 0
    assert "never seen vehicle, if, any;" in capsys.readouterr().err
    assert cli.main([*where, "Tell me the shapes second by second."]) == 0
    assert capsys.readouterr().err == ""


# --- the others ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["data", "pretrain"])
def test_a_folder_in_use_is_not_built_into(command, tmp_path, capsys):
    (tmp_path / "something").write_text("")
    fails(capsys, [command, "--out", tmp_path], "not empty")
    fails(capsys, [command, "--out", tmp_path / "something"], "not empty")
    fails(capsys, [command], "--out")


def test_data_and_pretrain_pass_seed_and_folder(tmp_path, capsys, monkeypatch):
    seen = []
    split = {"questions": 2, "clips": 1}
    monkeypatch.setattr("dvr1_lite.toy.build_dataset",
                        lambda out, seed: seen.append((out, seed)) or {"splits": {"train": split}})
    monkeypatch.setattr("dvr1_lite.pretraining.pretrain",
                        lambda out, recipe: seen.append((out, recipe.seed)) or {"parameters": 7, "minutes": 1.5})
    monkeypatch.setattr("dvr1_lite.policy.Policy.load", lambda folder: folder)
    monkeypatch.setattr("dvr1_lite.acceptance.examine", lambda policy, records, **how: {"policy": policy})
    monkeypatch.setattr("dvr1_lite.acceptance.write", lambda found, out: seen.append((found["policy"], out)))
    monkeypatch.setattr("dvr1_lite.acceptance.as_table", lambda found: "a table")
    for command in ("data", "pretrain"):
        assert cli.main([command, "--out", str(tmp_path / "new"), "--seed", "3"]) == 0
    new = tmp_path / "new"
    assert seen == [(new, 3), (new, 3), (new, new)]
    told = capsys.readouterr().out
    assert told == f"train: 2 questions on 1 clips\n7 parameters in {tmp_path / 'new'}, 1.5 minutes\na table\n"


def test_commands_are_listed_and_guessed(capsys):
    assert cli.main([]) == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in cli.COMMANDS)
    fails(capsys, ["trian"], "did you mean train?")
    fails(capsys, ["xyzzy"], "use one of train, evaluate")


def test_ctrl_c_is_one_line(capsys, monkeypatch):
    def stop(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "ask", stop)
    assert cli.main(["ask"]) == cli.INTERRUPTED and capsys.readouterr().err == "interrupted\n"
