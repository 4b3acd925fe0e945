r"""The command line: options, messages, exit status."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from dvr1_lite import __main__ as cli
from dvr1_lite.config import TrainConfig
from dvr1_lite.data import Record
from dvr1_lite.files import resolve
from dvr1_lite.run import fingerprint
from dvr1_lite.words import clips_needed, completion_in_words, plural, ranges, run_in_words
from tests.small_run import write_world

SMALL = ["--num-frames", "4", "--steps", "2", "--prompts-per-step", "2", "--group_size=3", "--max-new-tokens", "5",
         "--inner-updates", "1", "--quantization", "none"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    r"""Train through the command line, with a config file and overrides; the run's folder and what was printed."""
    out, file = tmp_path_factory.mktemp("runs") / "cli", world / "small.yaml"
    file.write_text(f"model: {world / 'model'}\ntrain_file: {world / 'records.jsonl'}\n"
                    f"eval_files:\n  val: {world / 'records.jsonl'}\nsteps: 99\n")
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, file=None, **_: printed.append(" ".join(map(str, words))))
        patch.setenv("MPLBACKEND", "Agg")
        assert cli.main(["train", "--config", str(file), *SMALL, "--out", str(out)]) == 0
    return out, "\n".join(printed)


@pytest.fixture(scope="module")
def run(trained):
    return trained[0]


def fails(capsys, arguments, *expected):
    assert cli.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: ") and captured.err.count("error: ") == 1 and not captured.out
    for text in expected:
        assert text in last


def python(*arguments, **variables) -> subprocess.CompletedProcess:
    r"""Run python with the package on its path; stdout and stderr as bytes."""
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | variables)


# --- train -----------------------------------------------------------------------------------------------------------


def test_overrides_win_over_the_file(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[0])["rollouts"] == 6


def test_training_ends_with_the_change_its_figures_and_the_next_command(trained):
    run, printed = trained
    assert re.search(r"val: [\d.]+ -> [\d.]+ %, change [+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\] points .*n = 6 on 3 clips",
                     printed)
    assert "12 rollouts, 2 updates" in printed and f"everything is in {run}" in printed
    figures = re.search("figures: (.+)", printed)[1].split(", ")
    assert figures and {*map(str, (run / "figures").iterdir())} == set(figures)
    assert f"next: python -m dvr1_lite ask --adapter {run}" in printed.splitlines()[-1]


def test_a_complete_run_is_not_repeated(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if "figures" not in path.parts}
    assert cli.main(["train", "--resume", str(run)]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.count("\n") == 1
    assert captured.out.startswith(f"The run in {run} is complete, all 2 steps; nothing was done. For a longer one")
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if "figures" not in path.parts}


def test_help_lists_every_field_with_unit_and_paper_value(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and "--config" in printed and "--resume" in printed
    for field in fields(TrainConfig):
        assert f"--{field.name}" in printed, field.name
    assert printed.count("; paper: ") >= len(fields(TrainConfig))
    assert "The objective: --beta" in printed and "The run: --seed" in printed
    first = printed[printed.index("Used most: "):printed.index("The model: ")]
    assert re.findall(r"--(\w+)(?![\w-])", first) == [
        "help", "config", "card", "resume", "model", "train_file", "eval_files", "steps", "method", "learning_rate",
        "out"]
    assert "--no_figures, --no-figures The same as --figures false." in printed


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and printed.startswith(f"usage: python -m dvr1_lite {command}")


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--group-size", "1"], "group_size is 1"),
    (["--group-size", "1000000000"], "group_size is 1000000000"),
    (["--group-size", "two"], "invalid int value: 'two'"),
    (["--history-window=0"], "history_window is 0"),
    (["--learning-rat", "1"], "did you mean learning_rate"),
    (["--lr=1"], "learning_rate"),
    (["--step", "3"], "did you mean steps"), (["--num-frame", "3"], "did you mean num_frames"),
    (["--method", "ppo"], "reg-grpo"),
    (["--beta"], "expected one argument"),
    (["--config", "none.yaml"], "none.yaml cannot be read"),
    (["--card", "7", "--config", "seed_bench_r1_qwen2_5_vl_3b"], "choose one of 15, 16, 24, 80"),
    (["extra"], "unknown config key 'extra'")])
def test_mistakes_in_the_options_of_train_are_explained(arguments, expected, capsys):
    fails(capsys, ["train", *arguments], expected)


def test_none_and_empty_lists_can_be_given():
    _, _, given = cli.parse_training(["--clip-eps", "none", "--micro-batch", "4", "--eval-files", "--mask-vanished",
                                      "false", "--beta", "1"])
    assert given == {"clip_eps": None, "micro_batch": 4, "eval_files": [], "mask_vanished": False, "beta": 1.0}
    assert cli.parse_training([]) == (None, None, {})


def test_a_folder_that_holds_a_run_is_refused(run, capsys):
    fails(capsys, ["train", "--out", run], "already holds a run", "--resume", "another --out")
    fails(capsys, ["train", "--resume", run, "--steps", 5, "--reward", "a.py:f"], "leave out steps")
    fails(capsys, ["train", "--resume", run.parent], "holds no run")


def test_a_run_is_resumed_with_another_share_of_broken_clips_but_not_with_other_records(run, world, tmp_path, capsys):
    from dvr1_lite.config import load_config

    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped)
    (stopped / "summary.json").unlink()
    text = (world / "records.jsonl").read_text()
    (world / "records.jsonl").write_text("".join(text.splitlines(keepends=True)[:-1]))
    try:
        fails(capsys, ["train", "--resume", stopped], f"the records in {world / 'records.jsonl'} have changed since "
              f"{stopped} began: put the file back, or give another --out")
    finally:
        (world / "records.jsonl").write_text(text)
    assert cli.main(["train", "--resume", str(stopped), "--max-broken-share", "0.2"]) == 0
    assert load_config(stopped / "config.yaml").max_broken_share == 0.2
    (stopped / "summary.json").unlink()
    (stopped / "records.json").unlink()  # as in a run of an earlier version
    assert cli.main(["train", "--resume", str(stopped)]) == 0 and (stopped / "records.json").exists()


def test_records_are_the_same_wherever_their_folder_is():
    record = Record("r1", "what colour", ("red", "blue"), "A", "multiple choice", "colour", Path("a/0.mp4"))
    same = replace(record, record_id="r2", clip=Path("b/0.mp4"))
    assert fingerprint([record]) == fingerprint([same]) != fingerprint([record, same])
    for change in ({"question": "what"}, {"answer": "B"}, {"options": ("red",)}, {"clip": Path("a/1.mp4")}):
        assert fingerprint([replace(record, **change)]) != fingerprint([record])


def test_a_run_ends_with_the_number_of_prompts_whose_clip_cannot_be_read(trained):
    summary = json.loads((trained[0] / "summary.json").read_text())
    assert "skipped" not in trained[1]
    assert "\n2 prompts skipped, as the clip cannot be read; the first: 0.mp4: broken\n" in run_in_words(
        summary | {"skipped_clips": 2, "skipped_examples": ["0.mp4: broken"]}, "out")


def test_records_models_and_packages_that_are_missing_are_named(world, tmp_path, capsys, monkeypatch):
    import importlib.util

    record = {"problem_id": 1, "data_type": "video", "problem_type": "exact", "path": "a"}
    (tmp_path / "bad.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "config.json").write_text("{}")
    base = ["train", "--out", tmp_path / "x", "--eval-files", "--train-file"]
    fails(capsys, [*base, tmp_path / "bad.jsonl"], "bad.jsonl, line 1", "problem")
    monkeypatch.chdir(tmp_path)
    fails(capsys, [*base, "no/records.jsonl"], f"{tmp_path}/no/records.jsonl: no such file", "from the current folder")
    fails(capsys, [*base, world / "records.jsonl", "--model", tmp_path], str(tmp_path))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest))
    fails(capsys, [*base, world / "records.jsonl", "--model", world / "model"], "bitsandbytes", "quantization: none")


# --- the console -----------------------------------------------------------------------------------------------------


def test_a_console_of_few_characters_ends_in_no_traceback(world):
    row = {"video": "0.mp4", "question": "what \u6f22 colour", "answer": "A", "options": ["red", "\u6f22"]}
    (world / "a.jsonl").write_text(json.dumps(row) + "\n")
    done = python("-m", "dvr1_lite", "check", "--data", world / "a.jsonl", PYTHONIOENCODING="cp1252", PYTHONUTF8="0")
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stdout + done.stderr
    assert b"what \\u6f22 colour" in done.stdout and b"never seen \\u6f22" in done.stderr


def test_a_missing_package_is_one_line():
    done = python("-c", "import sys; sys.modules['torch'] = None; from dvr1_lite.__main__ import main; "
                        "sys.exit(main(['ask', '--clip', 'a', '--question', 'b']))")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and done.stdout == b""
    assert done.stderr.startswith(b"error: the package torch is not installed here: activate the environment")


def test_ctrl_c_is_one_line(capsys, monkeypatch):
    def stop(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "ask", stop)
    assert cli.main(["ask"]) == cli.INTERRUPTED and capsys.readouterr().err == "interrupted\n"


def test_commands_are_listed_and_guessed(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in cli.COMMANDS)
    fails(capsys, ["trian"], "did you mean train?")
    fails(capsys, ["xyzzy"], "use one of train, evaluate")


# --- words -----------------------------------------------------------------------------------------------------------


def test_the_clips_that_an_interval_needs_follow_from_its_standard_error():
    # t(19) = 2.0930: a standard error of 0.1 on 20 clips; 20 * (1.96 * 0.1 / 0.05)^2 = 307.3, / 0.02: 1920.8
    assert clips_needed([0.5 - 0.20930, 0.5 + 0.20930], 20) == (
        "now +-20.9 points on 20 clips; with as many questions a clip, +-5 points about 308 clips, +-2 points about "
        "1921 clips")


def test_counts_ranges_and_completions_in_words():
    assert (plural(1, "clip"), plural(0, "clip"), plural(2, "clip")) == ("1 clip", "0 clips", "2 clips")
    assert ranges([7, 1, 2, 3, 9]) == "1-3, 7, 9" and ranges([]) == ""
    assert completion_in_words("<think> a b </think> <answer> B </answer>", ["red", "green"]) == ("a b", "B (green)")
    assert completion_in_words("<answer> B </answer>") is None


# --- evaluate and ask ------------------------------------------------------------------------------------------------


def test_evaluate_uses_the_runs_config_and_resumes(run, world, tmp_path, capsys):
    arguments = ["evaluate", "--adapter", str(run), "--data", str(world / "records.jsonl"), "--out",
                 str(tmp_path / "e"), "--batch", "2"]
    assert cli.main(arguments) == 0
    first, printed = json.loads((tmp_path / "e" / "summary.json").read_text()), capsys.readouterr().out
    assert first["n"] == 6 and "all " in printed and "n = 6 on 3 clips" in printed and "format" in printed
    assert "3 clips cannot tell how many are needed: evaluate on at least 20\n" in printed
    after = json.loads((run / "summary.json").read_text())["after"]["val"]
    assert first["accuracy"] == after["accuracy"] and first["by_type"] == after["by_type"]
    predictions = tmp_path / "e" / "predictions.jsonl"
    kept = predictions.read_text()
    predictions.write_text("".join(kept.splitlines(keepends=True)[:3]))
    assert cli.main(arguments) == 0 and predictions.read_text() == kept
    assert json.loads((tmp_path / "e" / "summary.json").read_text())["accuracy"] == first["accuracy"]
    capsys.readouterr()
    fails(capsys, [*arguments[:-1], "3"], "another batch")


def test_own_records_are_evaluated_from_another_folder_and_two_evaluations_compared(world, tmp_path, capsys):
    rows = [{"video": f"{number}.mp4", "question": "what colour", "answer": "red", "options": ["red", "green"]}
            for number in range(3)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = ["evaluate", "--model", str(world / "model"), "--config", str(world / "evaluate.yaml"), "--data-root",
            str(world), "--data", str(tmp_path / "own.jsonl"), "--out"]
    (world / "evaluate.yaml").write_text("num_frames: 4\nmax_new_tokens: 5\nquantization: none\n")
    for out in ("a", "b"):
        assert cli.main([*base, str(tmp_path / out)]) == 0
    kept = (tmp_path / "b" / "predictions.jsonl").read_text().splitlines()
    assert {json.loads(row)["clip"] for row in kept} == {f"{world}/{number}.mp4" for number in range(3)}
    changed = [json.dumps(json.loads(row) | {"accuracy": float("0.mp4" in row)}) for row in kept]
    (tmp_path / "b" / "predictions.jsonl").write_text("\n".join(changed) + "\n")  # one of three becomes correct
    capsys.readouterr()
    assert cli.main(["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    # differences 1, 0, 0 of three clips: 1/3 +- t(2) = 4.3027 times sqrt(1/3) / sqrt(3), cut to what is possible
    assert re.match(r"0.0 -> .* %, change \+33.3 \[-100.0, \+100.0\] points \(95 %, paired, by clip; n = 3 on 3 "
                    r"clips\), format 0.0 %\n3 clips cannot tell .*\n$", capsys.readouterr().out)
    assert cli.main(["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out.endswith("\nno answer differs\n")
    for out, values in (("a", (0.2, 0.4, 0.6)), ("b", (0.5, 0.7, 0.9))):  # 0.3 more in each clip
        file, summary = tmp_path / out / "predictions.jsonl", tmp_path / out / "summary.json"
        file.write_text("".join(json.dumps(json.loads(row) | {"task_reward": value}) + "\n"
                                for row, value in zip(kept, values)))
        summary.write_text(json.dumps(json.loads(summary.read_text()) | {"task_reward": sum(values) / 3}))
    assert cli.main(["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    # all agree, t(2)^2 / (3 + t(2)^2) = 0.8606 of the way from 0.3 to each of -1 and 1
    assert "\nyour reward: 40.0 -> 70.0 %, change +30.0 [-81.9, +90.2] points\n3 clips" in capsys.readouterr().out
    settings = tmp_path / "b" / "evaluation.json"
    settings.write_text(settings.read_text().replace('"num_frames": 4', '"num_frames": 8'))
    assert cli.main(["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "note: the two were asked with another num_frames\n" in capsys.readouterr().err
    (tmp_path / "b" / "predictions.jsonl").write_text(kept[0] + "\n")
    fails(capsys, ["evaluate", "--compare", tmp_path / "a", tmp_path / "b"], "answers to different questions (3 and 1)")
    fails(capsys, ["evaluate", "--compare", tmp_path / "a", tmp_path / "none"], "none holds no finished evaluation")
    fails(capsys, ["evaluate", "--data", tmp_path / "own.jsonl"], "give both --data and --out")


def test_evaluate_takes_batch_and_frames_from_the_config_of_a_merged_model(run, world, tmp_path, capsys):
    merged = tmp_path / "merged"
    assert cli.main(["merge", "--adapter", str(run), "--out", str(merged), "--dtype", "float32"]) == 0
    file = merged / "dvr1_config.yaml"
    assert file.read_text() == (run / "config.yaml").read_text()
    file.write_text(re.sub(r"(?m)^eval_batch: .*$", "eval_batch: 3", file.read_text()))
    capsys.readouterr()
    assert cli.main(["evaluate", "--model", str(merged), "--data", str(world / "records.jsonl"), "--out",
                     str(tmp_path / "e")]) == 0
    saved = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert (saved["num_frames"], saved["batch"]) == (4, 3)
    assert "asked with 4 frames of 56 pixels, at most " in capsys.readouterr().err


def test_resume_says_that_a_killed_run_had_no_checkpoint(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints")
    (tmp_path / "killed" / "summary.json").unlink()
    assert cli.main(["train", "--resume", str(tmp_path / "killed")]) == 0
    assert "killed has no checkpoint yet (save_every is " in capsys.readouterr().out


def test_training_names_clips_that_an_evaluation_shares(run, capsys):
    from dvr1_lite.config import load_config

    cli._prepare(load_config(run / "config.yaml"), None)
    assert re.search(r"note: val and the training file share 3 clips, such as .*0\.mp4: split by", capsys.readouterr().err)


def test_mistakes_in_the_options_of_evaluate_are_explained(run, world, tmp_path, capsys):
    base = ["evaluate", "--data", world / "records.jsonl", "--model", world / "model"]
    fails(capsys, ["evaluate", "--out", tmp_path / "e"], "--data")
    fails(capsys, [*base, "--out", tmp_path / "e", "--samples", 0], "samples is 0")
    fails(capsys, [*base, "--out", run], "holds no evaluation")
    fails(capsys, [*base, "--out", tmp_path / "e", "--video", "blin"], "unknown video control 'blin': did you mean blind?")
    fails(capsys, [*base, "--out", tmp_path / "e", "--adapter", tmp_path], "adapter_config.json")
    fails(capsys, ["evaluate", "--num-frames", 4], "set num_frames in the file of --config")
    fails(capsys, ["evaluate", "--sample", 4], "did you mean --samples?")
    fails(capsys, ["merge", "--num-frames", 4, "--adapter", "a", "--out", "b"], "`python -m dvr1_lite merge --help`")


def test_the_folder_of_a_killed_run_names_its_newest_checkpoint(run, world, tmp_path, capsys):
    killed = tmp_path / "killed"
    shutil.copytree(run, killed)
    shutil.rmtree(killed / "adapter")
    newest = killed / "checkpoints" / "step_000002"
    shutil.copytree(newest, killed / "checkpoints" / "step_000001")
    asked = ["evaluate", "--data", str(world / "records.jsonl"), "--out", str(tmp_path / "e"), "--adapter"]
    for folder in (killed, killed / "checkpoints"):
        fails(capsys, [*asked, folder], f"{folder} has no adapter_config.json: give the newest checkpoint, {newest}, ")
    assert cli.main([*asked, str(newest)]) == 0, "--out is free as long as it holds no answer"
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text())["num_frames"] == 4, "the run's config"


def test_ask_prints_trace_answer_and_span(run, world, capsys, monkeypatch):
    where = ["--clip", str(world / "0.mp4"), "--adapter", str(run / "adapter"), "--question", "when"]
    assert cli.main(["ask", *where]) == 0
    assert capsys.readouterr().out.startswith(("trace: ", "not in the form"))
    text = "<think> red first </think> <answer> B </answer> <glue> 1.0 2.5 </glue>"
    monkeypatch.setattr("dvr1_lite.rollout.sample_groups", lambda *_, **__: type("Rollout", (), {"texts": [[text]]}))
    assert cli.main(["ask", *where]) == 0
    assert capsys.readouterr().out == "trace:  red first\nanswer: B, from 1.0 to 2.5 s\n"
    assert cli.main(["ask", *where, "--options", "red", "B. green"]) == 0
    assert "answer: B (green), from 1.0 to 2.5 s\n" in capsys.readouterr().out
    fails(capsys, ["ask", "--clip", world / "none.mp4", *where[2:]], "none.mp4: no such file")


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
    seen, new = [], tmp_path / "new"
    monkeypatch.setattr("dvr1_lite.toy.world.build_dataset", lambda out, seed: seen.append((out, seed)) or {
        "splits": {"train": {"questions": 2, "clips": 1}, "L1": {"questions": 1, "clips": 2}}})
    monkeypatch.setattr("dvr1_lite.toy.recipe.pretrain",
                        lambda out, recipe: seen.append((out, recipe.seed)) or {"parameters": 7, "minutes": 1.5})
    monkeypatch.setattr("dvr1_lite.toy.examination.examine_base", lambda folder, config: seen.append(folder))
    monkeypatch.setattr("dvr1_lite.toy.examination.as_table", lambda found: "a table")
    for command in ("data", "pretrain"):
        assert cli.main([command, "--out", str(new), "--seed", "3"]) == 0
    assert seen == [(new, 3), (new, 3), new]
    assert capsys.readouterr().out == (f"train: 2 questions on 1 clip\nL1: 1 question on 2 clips\n7 parameters in "
                                       f"{new}, 1.5 minutes\na table\n")
