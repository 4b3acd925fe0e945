"""What notebooks print for their readers: feedback on predictions, quizzes and exercises, and the list of projects."""

import json
import re
import sys
import types
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from dvr1_lite.lab.runner import fingerprints, plan, read_settings, saved_config
from dvr1_lite.lab.tables import EXPERIMENTS, PROJECTS

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
sys.path.insert(0, str(FOLDER))
import exercises  # noqa: E402
import reader  # noqa: E402
from projects import LOOK_AT, alike, projects  # noqa: E402
from reader import exercise, predict, quiz, same  # noqa: E402


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """An own answers.json with one prediction of each kind, written through the command line."""
    monkeypatch.setattr(reader, "ANSWERS", tmp_path / "answers.json")
    reader.main(["add", "01-a", "2.65", "The square root of 7.", "--tolerance", "0.02"])
    reader.main(["add", "01-b", "true", "It is negative for some samples."])
    reader.main(["add", "02-a", "zero", "Equal rewards differ from their mean by 0."])
    reader.main(["add", "warm-q1", "-5", "Log-probs are summed."])
    return reader.ANSWERS


@pytest.fixture
def checks(monkeypatch):
    """Stand-ins for the checks of exercises.py."""
    def exercise_09_1(attempt):
        assert attempt == 2, "two was asked for\nmore"

    def exercise_09_2(attempt):
        double, name = attempt
        if double(3) != 6 or name != "x":
            raise AssertionError  # an assert without a message; pytest would add one

    module = types.SimpleNamespace(exercise_09_1=exercise_09_1, exercise_09_2=exercise_09_2)
    monkeypatch.setitem(sys.modules, "exercises", module)


@pytest.mark.parametrize(("answer", "truth", "tolerance", "agrees"), [
    (0.14, 0.144, 0.01, True), (0.2, 0.144, 0.01, False), (1, 1.0, 0.0, True), ("Zero ", "zero", 0.0, True),
    (True, True, 0.0, True), (1, True, 0.0, False), (True, 1, 0.0, False), ("b", 2, 0.0, False), ([1], [1], 0.0, True),
    (np.int64(3), 3, 0.0, True), (torch.tensor(2.5), 2.5, 0.0, True), (torch.ones(2), 1.0, 0.0, False),
])
def test_answers_are_compared_with_a_tolerance_and_booleans_are_no_numbers(answer, truth, tolerance, agrees):
    assert same(answer, truth, tolerance) is agrees


def test_without_a_guess_a_prediction_prints_the_same_line_and_no_answer(answers, capsys):
    predict("01-a", None)
    predict("01-b", None)
    predict("02-a", None)
    end = "in place of None, then run the next cells."
    assert capsys.readouterr().out.splitlines() == [
        f"Prediction 01-a: no guess yet - put a number {end}",
        f"Prediction 01-b: no guess yet - put True or False {end}",
        f"Prediction 02-a: no guess yet - put a word in quotes {end}"]


def test_a_guess_is_compared_and_only_then_the_answer_and_its_reason_appear(answers, capsys):
    predict("01-a", 2.64)
    predict("01-a", 3)
    predict("02-a", "ZERO")
    assert capsys.readouterr().out.splitlines() == [
        "Prediction 01-a: your guess 2.64 agrees; the answer is 2.65. The square root of 7.",
        "Prediction 01-a: your guess is 3; the answer is 2.65. The square root of 7.",
        "Prediction 02-a: your guess ZERO agrees; the answer is zero. Equal rewards differ from their mean by 0."]


def test_an_unknown_prediction_or_exercise_names_the_fix(answers, checks):
    with pytest.raises(KeyError, match="reader.py add 01-z VALUE"):
        predict("01-z", None)
    with pytest.raises(KeyError, match=r"add exercise_09_7\(attempt\) to exercises.py"):
        exercise("09.7", None)


def test_answers_cannot_be_read_by_accident_and_survive_the_file(answers, capsys):
    text = answers.read_text()
    assert "square" not in text and "2.65" not in text and list(json.loads(text)) == ["01-a", "01-b", "02-a", "warm-q1"]
    reader.main(["remove", "01-b"])
    reader.main(["show", "01"])
    assert capsys.readouterr().out == "01-a: 2.65 (tolerance 0.02). The square root of 7.\n"


def test_a_quiz_counts_and_explains_only_incorrect_answers(answers, capsys):
    reader.main(["add", "warm-q2", "0.14", "It is 0.144.", "--tolerance", "0.006"])
    quiz("warm", {"q1": None, "q2": None})
    quiz("warm", {"q1": -5, "q2": 0.2})
    assert capsys.readouterr().out.splitlines() == [
        "not attempted yet", "q2: not yet. It is 0.144.", "answered 2 of 2, correct 1"]


def test_the_refresher_of_notebook_01_has_ten_questions():
    entries = {name: entry for name, entry in reader.load_answers().items() if name.startswith("refresher-")}
    assert sorted(entries) == sorted(f"refresher-q{number}" for number in range(1, 11))
    assert entries["refresher-q2"]["answer"] == pytest.approx(np.exp(0.5), abs=0.002)


@pytest.mark.parametrize(("name", "attempt", "line"), [
    ("09.1", None, "not attempted yet"), ("09.1", 2, "correct"), ("09.1", 3, "not yet. two was asked for"),
    ("09.2", (None, "x"), "not attempted yet"), ("09.2", (lambda x: None, "x"), "not attempted yet"),
    ("09.2", (lambda x: 2 * x, "x"), "correct"), ("09.2", (lambda x: x, "x"), "not yet. the check fails"),
    ("09.2", (lambda x: 1 / 0, "x"), "stopped with ZeroDivisionError: division by zero"),
    ("09.2", 5, "stopped with TypeError: cannot unpack non-iterable int object"),
])
def test_an_exercise_prints_one_line_and_never_raises(checks, capsys, name, attempt, line):
    exercise(name, attempt)
    assert capsys.readouterr().out == f"Exercise {name}: {line}\n"


def test_a_function_that_is_not_implemented_counts_as_not_attempted(checks, capsys):
    def later(x):
        raise NotImplementedError

    exercise("09.2", (later, "x"))
    assert capsys.readouterr().out == "Exercise 09.2: not attempted yet\n"


@pytest.mark.parametrize(("test", "message"), [
    (lambda function: function([1, 2, 4]) == 7, None),
    (lambda function: function is sum, "your test rejects a correct implementation"),
    (lambda function: True, "your test accepts the faulty function"),
    (lambda function: function([0, 0, 3]) == 3, "your test accepts the faulty function"),
    (lambda function: function([2, 1, -1]) == 2 and function([1, 3]) != 3, "your test accepts 1 of 2 faulty functions"),
])
def test_a_readers_test_is_held_to_functions_that_the_reader_has_not_seen(test, message):
    correct = [sum, lambda values: float(np.sum(values))]
    faulty = [max, lambda values: values[0]]
    if message is None:
        return exercises.check_test(test, correct, faulty)
    with pytest.raises(AssertionError, match=message):
        exercises.check_test(test, correct, faulty)


def names(kind: str) -> dict[str, list[str]]:
    """Of every notebook the first arguments of its calls of `predict` or `exercise` that are looked up by name."""
    found = {}
    for path in sorted(FOLDER.glob("[0-9]*.ipynb")):
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        pattern = rf'\b{kind}\("(\d\d[a-z]?[.-]\w+)",'
        found[path.name] = [name for source in cells for name in re.findall(pattern, source)]
    return found


def test_every_prediction_has_an_answer_and_every_answer_a_prediction():
    asked = {name for several in names("predict").values() for name in several}
    known = {name for name in reader.load_answers() if re.match(r"\d\d", name)}
    assert asked == known, f"without an answer {sorted(asked - known)}, without a cell {sorted(known - asked)}"


def test_predictions_and_exercises_carry_the_number_of_their_notebook_and_stand_once():
    for kind in ("predict", "exercise"):
        for notebook, found in names(kind).items():
            prefix = re.match(r"\d\d[a-z]?", notebook)[0]
            assert all(re.split("[.-]", name)[0] == prefix for name in found), (notebook, found)
            assert len(set(found)) == len(found), (notebook, found)


def test_every_exercise_has_a_check_and_every_check_an_exercise():
    asked = {"exercise_" + name.replace(".", "_") for several in names("exercise").values() for name in several}
    known = {name for name in vars(exercises) if name.startswith("exercise_")}
    assert asked == known, f"without a check {sorted(asked - known)}, without a cell {sorted(known - asked)}"


def test_every_project_says_what_to_look_at():
    assert list(LOOK_AT) == [one.name for one in PROJECTS]


def test_a_project_counts_the_runs_that_are_missing(tmp_path):
    done = [one.name for one in PROJECTS if one.name != "eps"]
    runs = plan(EXPERIMENTS["eps"], settings=read_settings(tmp_path))
    recorded = {f"eps/{i}.json": {"table": "eps", "seed": run.seed, "method": run.config.method,
                                  "config": saved_config(run.config), "inputs": fingerprints(run.config),
                                  "sampled_limit": run.sampled_limit, "seconds": {"process": 120.0}}
                for i, run in enumerate(runs[:4])}
    [text] = projects(tmp_path, recorded, done)
    assert text.startswith("eps: ") and "reproduce eps --jobs 2" in text
    assert f"{len(runs) - 4} runs to make, about {2 * (len(runs) - 4)} core-minutes" in text
    assert list(alike(runs[1], recorded)) == ["eps/1.json"]
