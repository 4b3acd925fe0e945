"""What notebooks print for their readers: feedback on answers, and the list of student projects."""

import sys
from pathlib import Path

import pytest

from dvr1_lite.lab.runner import fingerprints, plan, read_settings, saved_config
from dvr1_lite.lab.tables import BEYOND, EXPERIMENTS

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "notebooks"))
from projects import LOOK_AT, alike, projects  # noqa: E402
from reader import REFRESHER, exercise, predict, quiz, same  # noqa: E402


@pytest.mark.parametrize(("answer", "truth", "tolerance", "right"), [
    (0.14, 0.144, 0.01, True), (0.2, 0.144, 0.01, False), (1, 1.0, 0.0, True), ("Zero ", "zero", 0.0, True),
    (True, True, 0.0, True), (1, True, 0.0, False), (True, 1, 0.0, False), ("b", 2, 0.0, False), ([1], [1], 0.0, True),
])
def test_answers_are_compared_with_a_tolerance_and_booleans_are_no_numbers(answer, truth, tolerance, right):
    assert same(answer, truth, tolerance) is right


@pytest.mark.parametrize(("guess", "begins"), [
    (None, "No guess made. It is 2"), (2, "Yes, 2"), (3, "You said 3; it is 2")])
def test_a_prediction_is_compared_with_the_result(guess, begins, capsys):
    predict(guess, 2, "because")
    assert capsys.readouterr().out == f"{begins}: because\n"


def test_the_quiz_counts_and_explains_only_incorrect_answers(capsys):
    quiz({name: None for name in REFRESHER}, REFRESHER)
    quiz({"q1": -5, "q4": 1.0, "q7": True}, REFRESHER, tolerance=0.01)
    unanswered, incorrect, count = capsys.readouterr().out.splitlines()
    assert unanswered == "not attempted yet" and incorrect.startswith("q4: not quite.")
    assert count == "answered 3 of 10, right 2"


def test_an_exercise_never_raises(capsys):
    def fails():
        assert 1 == 2, "1 is not 2."

    for number, attempt, check in ((1, None, fails), (2, (1, None), fails), (3, 1, fails), (4, 1, lambda: 1 / 0),
                                   (5, 1, lambda: None)):
        exercise(str(number), attempt, check)
    assert capsys.readouterr().out.splitlines() == [
        "Exercise 1: not attempted yet", "Exercise 2: not attempted yet", "Exercise 3: not yet. 1 is not 2.",
        "Exercise 4: it stopped with ZeroDivisionError: division by zero", "Exercise 5: right"]


def test_every_experiment_beyond_the_paper_says_what_to_look_at():
    assert list(LOOK_AT) == [one.name for one in BEYOND]


def test_a_project_counts_the_runs_that_are_missing(tmp_path):
    done = [one.name for one in BEYOND if one.name != "eps"]
    runs = plan(EXPERIMENTS["eps"], settings=read_settings(tmp_path))
    recorded = {f"eps/{i}.json": {"table": "eps", "seed": run.seed, "method": run.config.method,
                                  "config": saved_config(run.config), "inputs": fingerprints(run.config),
                                  "sampled_limit": run.sampled_limit, "seconds": {"process": 120.0}}
                for i, run in enumerate(runs[:4])}
    [told] = projects(tmp_path, recorded, done)
    assert told.startswith("eps: ") and "reproduce eps --jobs 2" in told
    assert f"{len(runs) - 4} runs to make, about {2 * (len(runs) - 4)} core-minutes" in told
    assert list(alike(runs[1], recorded)) == ["eps/1.json"]
