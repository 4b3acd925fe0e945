"""The feedback that notebooks give to readers: nothing raises, whatever a reader has written."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "notebooks"))
from reader import REFRESHER, exercise, predict, quiz, same  # noqa: E402


@pytest.mark.parametrize(("answer", "truth", "tolerance", "right"), [
    (0.14, 0.144, 0.01, True), (0.2, 0.144, 0.01, False), (1, 1.0, 0.0, True), ("Zero ", "zero", 0.0, True),
    (True, True, 0.0, True), (1, True, 0.0, False), (True, 1, 0.0, False), ("b", 2, 0.0, False), ([1], [1], 0.0, True),
])
def test_same(answer, truth, tolerance, right):
    assert same(answer, truth, tolerance) is right


@pytest.mark.parametrize(("guess", "begins"), [(None, "No guess made. It is 2"), (2, "Yes, 2"), (3, "You said 3; it is 2")])
def test_predict_says_what_came_out(guess, begins, capsys):
    predict(guess, 2, "because")
    assert capsys.readouterr().out == f"{begins}: because\n"


def test_quiz_counts_and_explains_only_what_was_answered_wrong(capsys):
    quiz({name: None for name in REFRESHER}, REFRESHER)
    quiz({"q1": -5, "q4": 1.0, "q7": True}, REFRESHER, tolerance=0.01)
    unanswered, wrong, count = capsys.readouterr().out.splitlines()
    assert unanswered == "not attempted yet" and wrong.startswith("q4: not quite.")
    assert count == "answered 3 of 10, right 2"


def test_exercise_never_raises(capsys):
    def fails():
        assert 1 == 2, "1 is not 2."

    exercise("1", None, fails)
    exercise("2", (1, None), fails)
    exercise("3", 1, fails)
    exercise("4", 1, lambda: 1 / 0)
    exercise("5", 1, lambda: None)
    assert capsys.readouterr().out.splitlines() == [
        "Exercise 1: not attempted yet", "Exercise 2: not attempted yet", "Exercise 3: not yet. 1 is not 2.",
        "Exercise 4: it stopped with ZeroDivisionError: division by zero", "Exercise 5: right"]
