r"""A reward of your own: what it earns, what is checked first, who may name it, how a run keeps it."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch

from dvr1_lite import __main__ as cli
from dvr1_lite import evaluation, own_reward
from dvr1_lite.data import Record
from dvr1_lite.errors import ConfigError, RewardError
from dvr1_lite.evaluation import prediction, summarise
from dvr1_lite.files import read_lines
from dvr1_lite.own_reward import OwnReward, load_reward, reward_for, trial_completions, try_on_types
from dvr1_lite.rewards import Score, score
from dvr1_lite.run import train
from dvr1_lite.words import changes_table
from tests.small_run import small_config, train_files, write_world

CHOICE = Record("r1", "which", ("red", "green"), "B", "multiple choice", "multiple choice", None)
SPAN = Record("r2", "when", (), "red", "grounding", "grounding", None, spans=((1.0, 3.0),))
RIGHT, WRONG = "<think> x </think> <answer> B </answer>", "<think> x </think> <answer> A </answer>"
FILE = """
import math
SEEN = []
def half(record, completion):
    SEEN.append((record.record_id, completion))
    return 0.5
def by_length(record, completion): return (len(completion) % 7) / 7
def fails(record, completion): return {}["x"]
def leaves(record, completion): raise SystemExit(3)
def sometimes(record, completion):
    if len(completion) % 2: raise ValueError("odd length")
    return 1.0
def one(record): return 1.0
def swapped(completion, record): return 1.0
def other_names(text, row): return float(row.answer in text)
value = 3
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    r"""A file with rewards in the current folder; the import path is restored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


# --- what it earns ---------------------------------------------------------------------------------------------------


def test_the_value_takes_the_place_of_accuracy_and_iou_and_the_format_stays():
    reward = OwnReward(lambda record, text: 0.25, "f.py:f")
    good = reward(CHOICE, RIGHT)
    assert (good.format, good.accuracy, good.task, good.total, good.maximum) == (1.0, 1.0, 0.25, 1.25, 2.0)
    assert good.normalised == 0.625 and good.correct
    bad = reward(CHOICE, WRONG)
    assert (bad.accuracy, bad.total) == (0.0, 1.25) and not bad.correct
    spans = reward(SPAN, "<think> x </think> <answer> red </answer> <glue> 1 2 </glue>")
    assert (spans.iou, spans.accuracy, spans.total, spans.maximum) == (0.5, 1.0, 1.25, 2.0)


@pytest.mark.parametrize("text", ["", "B", "<think> x </think> <answer> B </answer> more", "<answer> B </answer>",
                                  "<think> x </think> <answer> B </answer> <glue> 1 2 </glue>"])
def test_a_malformed_completion_earns_nothing_and_the_function_is_not_asked(text):
    asked = []
    found = OwnReward(lambda record, completion: asked.append(completion) or 1.0, "f.py:f")(CHOICE, text)
    assert (found.format, found.task, found.total, asked) == (0.0, 0.0, 0.0, [])


@pytest.mark.parametrize("value", [0, 1, True, 0.5, torch.tensor(0.5), torch.tensor([0.5])])
def test_any_number_from_0_to_1_is_a_reward(value):
    assert OwnReward(lambda *_: value, "f.py:f")(CHOICE, RIGHT).task == float(value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.0001, 7, None, "1", "x", [1.0], torch.ones(3), 1j])
def test_what_is_no_number_from_0_to_1_stops_with_record_and_completion(value):
    with pytest.raises(RewardError, match=r"f\.py:f, record 'r1', completion '<think> x .*it returned .*no number from "
                                          r"0 to 1; correct the function, or set reward_errors: skip"):
        OwnReward(lambda *_: value, "f.py:f")(CHOICE, RIGHT)


def test_an_exception_names_its_line_and_is_counted_where_the_run_may_skip_it(file, caplog):
    for name, text in (("fails", "KeyError: 'x'"), ("leaves", "SystemExit: 3")):
        with pytest.raises(RewardError, match=rf"record 'r1', completion '.*': it raised {text} \(mine.py, line \d+\)"):
            load_reward(f"mine.py:{name}")(CHOICE, RIGHT)
    reward = load_reward("mine.py:sometimes", "skip")
    found = [reward(CHOICE, RIGHT + " " * count) for count in range(4)]
    assert sorted(one.task for one in found) == [0.0, 0.0, 1.0, 1.0] and reward.failed == 2
    assert sorted(one.total for one in found) == [1.0, 1.0, 2.0, 2.0], "the format still counts"
    assert caplog.text.count("scored 0: reward mine.py:sometimes, record 'r1'") == 2
    long = RIGHT.replace("x", "x" * 5000)
    with pytest.raises(RewardError) as stopped:
        load_reward("mine.py:fails")(CHOICE, long)
    assert len(str(stopped.value)) < 600 and f"({len(long)} characters)" in str(stopped.value)


def test_arguments_in_the_other_order_are_named_where_the_function_fails(file):
    with pytest.raises(RewardError, match=r"'str' object has no attribute 'answer' .*; its arguments are \(record, "
                                          r"completion\), a Record and a text, in this order; correct"):
        load_reward("mine.py:other_names")(CHOICE, RIGHT)
    with pytest.raises(RewardError) as stopped:
        load_reward("mine.py:fails")(CHOICE, RIGHT)
    assert "in this order" not in str(stopped.value), "a KeyError has another cause"


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "expected"), [
    ("mine.py", "write it as FILE.py:function"), ("mine:half", "write it as FILE.py:function"),
    ("mine.py:a b", "write it as FILE.py:function"), ("none.py:half", "there is no file none.py"),
    ("mine.py:hlf", "has no function hlf; it has half, by_length, fails"), ("mine.py:value", "has no function value"),
    ("mine.py:one", r"it takes \(record\); define it as def one\(record, completion\)"),
    ("mine.py:swapped", r"it takes \(completion, record\); define it as def swapped\(record, completion\)"),
    ("typo.py:f", r"cannot be loaded \(SyntaxError.*correct it"),
    ("ends.py:f", r"cannot be loaded \(SystemExit: 4 \(ends.py, line 2\)"),
    ("needs.py:f", "cannot be loaded .*no_such_package")])
def test_mistakes_in_the_file_are_explained(file, name, expected):
    (file.parent / "typo.py").write_text("def f(record, completion) return 1\n")
    (file.parent / "ends.py").write_text("import sys\nsys.exit(4)\n")
    (file.parent / "needs.py").write_text("import no_such_package\n")
    with pytest.raises(ConfigError, match=expected):
        load_reward(name)


def test_a_file_is_run_as_it_is_now_and_finds_its_neighbours(file):
    folder = file.parent / "rewards"
    folder.mkdir()
    (folder / "neighbour_of_mine.py").write_text("VALUE = 0.5\n")
    path = folder / "r.py"
    for value in ("0.50", "0.75"):  # of equal length, within a second
        path.write_text(f"from neighbour_of_mine import VALUE\ndef f(record, completion): return 2 * VALUE * {value}\n")
        assert load_reward(f"{path}:f")(CHOICE, RIGHT).task == float(value)
    assert not (folder / "__pycache__" / "r.cpython-311.pyc").exists()
    digests = {load_reward(f"{path}:f").digest}
    path.write_text(path.read_text() + "# changed\n")
    assert load_reward(f"{path}:f").digest not in digests


def test_only_a_command_line_can_name_a_reward(file):
    assert reward_for("", None, "stop", [CHOICE]) is None and reward_for("", "", "stop", [CHOICE]) is None
    (file.parent / "mark.py").write_text("open('ran', 'w')\ndef f(record, completion): return 1.0\n")
    with pytest.raises(ConfigError, match=r"asks for the reward mark.py:f, which is code: read it, then name it .*"
                                          r"--reward mark.py:f"):
        reward_for("mark.py:f", None, "stop", [CHOICE])
    with pytest.raises(ConfigError) as stopped:  # an interrupted run cannot be resumed with the built-in rewards
        reward_for("mark.py:f", None, "stop", [CHOICE])
    assert '""' not in str(stopped.value)
    assert not (file.parent / "ran").exists(), "nothing ran"
    assert reward_for("mark.py:f", "mark.py:f", "stop", [CHOICE]).name == "mark.py:f"


def test_a_reward_that_fails_on_a_correct_completion_is_refused_at_once(file):
    for errors in ("stop", "skip"):
        with pytest.raises(RewardError, match="fails for a correct completion of record 'r1': it raised KeyError"):
            reward_for("mine.py:fails", "mine.py:fails", errors, [CHOICE])


# --- the trial -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [CHOICE, SPAN, replace(CHOICE, options=(), answer="red", problem_type="exact"),
                                    replace(CHOICE, options=(), answer="3.5", problem_type="numerical")])
def test_the_five_trial_completions_are_what_they_are_called(record):
    texts = trial_completions(record, [record, replace(record, answer="C" if record.options else "2")])
    scores = {kind: score(record, text) for kind, text in texts.items()}
    assert [one.format for one in scores.values()] == [1, 1, 0, 0, 1] and list(texts)[-1] == "very long"
    assert (scores["correct"].accuracy, scores["incorrect"].accuracy, scores["very long"].accuracy) == (1, 0, 1)
    assert texts["empty"] == "" and len(texts["very long"]) > 100_000
    assert scores["correct"].iou in (None, 1.0) and scores["incorrect"].iou in (None, 0.0)


def test_the_trial_shows_values_failures_and_a_reward_that_teaches_nothing(file):
    text, sound = try_on_types(load_reward("mine.py:half"), [CHOICE, SPAN, CHOICE])
    assert sound and text.count("record r1") == 1 and "record r2 (grounding), answer red from 1.0 to 3.0" in text
    assert text.count("not called") == 4 and "correct            1        0.500       1.500" in text
    assert text.count("the correct completion earns no more than the incorrect one") == 2
    text, sound = try_on_types(load_reward("mine.py:fails"), [CHOICE])
    assert not sound and text.count("failed") == 3 and "incorrect: it raised KeyError: 'x' (mine.py, line 8)" in text


def test_the_reward_command_prints_the_trial(file, capsys):
    rows = [{"video": "a.mp4", "question": "q", "answer": "red"}]
    (file.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["reward", "mine.py:half", "--data", "rows.jsonl"]) == 0
    assert "record rows.jsonl, line 1 (exact), answer red\ncompletion " in capsys.readouterr().out
    assert cli.main(["reward", "mine.py:fails", "--data", "rows.jsonl"]) == 1
    assert cli.main(["reward", "mine.py:gone", "--data", "rows.jsonl"]) == 2
    assert "error: reward mine.py:gone: mine.py has no function gone" in capsys.readouterr().err


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def well_formed(monkeypatch):
    r"""Take every completion for well formed and incorrect: a random model hardly ever writes the form."""
    monkeypatch.setattr(own_reward, "score", lambda record, text, judge: Score(1.0, 0.0, None, 1.0, 2.0))


def test_a_run_is_scored_by_the_reward_and_its_evaluations_show_it(file, well_formed):
    world, out = write_world(file.parent / "world"), file.parent / "run"
    config = small_config(world, out, reward="mine.py:sometimes", reward_errors="skip", augment="none",
                          eval_temperature=1.0)
    reward = load_reward("mine.py:sometimes", "skip")
    asked = []
    called = reward.function
    reward.function = lambda record, text: asked.append(len(text) % 2) or called(record, text)
    summary = train_files(config, scoring=reward)
    lines, rows = list(read_lines(out / "metrics.jsonl")), list(read_lines(out / "evaluation" / "before_L1.jsonl"))
    for line in lines:  # of 8 completions, each earns 0 with an error or 1 without
        assert line["reward"] == pytest.approx(2 - line["reward_errors"] / 8) and line["accuracy"] == 0.0
    failed = [row for row in rows + list(read_lines(out / "evaluation" / "after_L1.jsonl")) if row["reward_error"]]
    assert 0 < sum(line["reward_errors"] for line in lines) < len(lines) * 8 == 24
    assert sum(line["reward_errors"] for line in lines) + len(failed) == sum(asked) and len(asked) == 24 + 12
    assert summary["reward_errors"] == sum(line["reward_errors"] for line in lines)
    assert summary["reward_change"]["L1"]["n"] == 6 and "L1, your reward: " in changes_table(summary)
    saved = json.loads((out / "reward.json").read_text())
    assert saved["text"] == FILE and saved["reward"] == "mine.py:sometimes" and len(saved["sha256"]) == 64


def test_the_reward_decides_the_gradient(file, well_formed):
    world, found = write_world(file.parent / "world"), {}
    for name in ("by_length", "half"):
        config = small_config(world, file.parent / name, reward=f"mine.py:{name}", augment="none", eval_files=[],
                              method="grpo", beta=0.0, steps=1)
        train_files(config, scoring=load_reward(f"mine.py:{name}"))
        [found[name]] = read_lines(file.parent / name / "metrics.jsonl")
    assert found["half"]["vanishing"] == 1.0 and found["half"]["grad_norm"] == 0.0
    assert found["by_length"]["vanishing"] < 1.0 and found["by_length"]["grad_norm"] > 0.0


def test_a_run_is_resumed_with_the_same_reward_only(file):
    world, out = write_world(file.parent / "world"), file.parent / "run"
    config = small_config(world, out, reward="mine.py:half", augment="none", eval_files=[])
    with pytest.raises(ConfigError, match="reward is 'mine.py:half' in the config, and scoring is None"):
        train(config, [], progress=False)
    with pytest.raises(ConfigError, match="reward is '' in the config, and scoring is 'mine.py:half'"):
        train(replace(config, reward=""), [], progress=False, scoring=load_reward("mine.py:half"))
    train_files(config, scoring=load_reward("mine.py:half"))
    resume = {"resume": True}
    for other, expected in (("by_length", "holds a run with the reward 'mine.py:half', not 'mine.py:by_length'"),
                            (None, "holds a run with the reward 'mine.py:half', not 'built in'")):
        named = f"mine.py:{other}" if other else ""
        with pytest.raises(ConfigError, match=expected):
            train_files(replace(config, reward=named), scoring=load_reward(named) if named else None, **resume)
    (file.parent / "moved.py").write_text(FILE)
    moved = replace(config, reward="moved.py:half")
    assert train_files(moved, scoring=load_reward("moved.py:half"), **resume)["complete"]
    file.write_text(FILE + "# one more line\n")
    with pytest.raises(ConfigError, match="mine.py has changed since .*run began: put the file back"):
        train_files(config, scoring=load_reward("mine.py:half"), **resume)


def test_commands_run_a_reward_only_where_they_name_it(file, capsys, monkeypatch):
    world = write_world(file.parent / "world")
    (file.parent / "evil.py").write_text("open('ran', 'w')\ndef f(record, completion): return 1.0\n")
    base = f"model: {world / 'model'}\ntrain_file: {world / 'records.jsonl'}\neval_files: {{}}\nquantization: none\n"
    (file.parent / "c.yaml").write_text(base + "reward: evil.py:f\n")
    for command in ("train", "pilot"):
        assert cli.main([command, "--config", "c.yaml"]) == 2
        assert "name it on the command line too, --reward evil.py:f" in capsys.readouterr().err
    (file.parent / "run").mkdir()
    (file.parent / "run" / "config.yaml").write_text(base + "reward: evil.py:f\nout: run\n")
    assert cli.main(["train", "--resume", "run"]) == 2
    assert "--reward evil.py:f" in capsys.readouterr().err
    evaluated = []
    monkeypatch.setattr(evaluation, "evaluate", lambda policy, records, config, scoring, **_: evaluated.append(scoring)
                        or [prediction(0, records[0], RIGHT)])
    options = ["evaluate", "--config", "run/config.yaml", "--data", str(world / "records.jsonl"), "--out"]
    assert cli.main([*options, "e"]) == 0 and evaluated == [None]
    assert "trained with the reward evil.py:f" in capsys.readouterr().err and not (file.parent / "ran").exists()
    assert cli.main([*options, "f", "--reward", "evil.py:f"]) == 0
    assert evaluated[1].name == "evil.py:f" and (file.parent / "ran").exists()


def test_an_evaluation_lists_the_reward_beside_the_accuracy():
    reward = OwnReward(lambda record, text: 1.0 if "A" in text else {}["x"], "f.py:f", errors="skip")
    rows = [prediction(index, replace(CHOICE, record_id=str(index)), text, scoring=reward)
            for index, text in enumerate([RIGHT, WRONG, WRONG, ""])]
    found = summarise(rows)
    assert (found["accuracy"], found["task_reward"], found["reward_errors"]) == (0.25, 0.5, 1)
    assert rows[0]["reward_error"].startswith("it raised KeyError: 'x'") and rows[1]["task_reward"] == 1.0
