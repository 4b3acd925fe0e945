"""The graded assignment: exemplar answers get the points they deserve, and no submission can stop the grader."""

import csv
import json
import sys
import time
from pathlib import Path

import nbformat
import pytest

TEACHING = Path(__file__).resolve().parents[2] / "notebooks" / "teaching"
INSTRUCTORS = TEACHING / "instructors"
sys.path.insert(0, str(INSTRUCTORS))
import grade  # noqa: E402
import make_runs  # noqa: E402

FULL, PARTIAL = INSTRUCTORS / "exemplar_full.ipynb", INSTRUCTORS / "exemplar_partial.ipynb"


def points(found: dict) -> list[float]:
    return [found["tasks"][task]["points"] for task in grade.TITLES]


def notebook_of(folder: Path, *cells: str) -> Path:
    path = folder / "submission.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": cell} for cell in cells]}))
    return path


def test_the_points_of_the_tasks_add_up_to_twenty():
    assert [grade.maximum(task) for task in grade.TITLES] == [3, 3, 3, 4, 4, 3] and grade.maximum() == 20
    statements = nbformat.read(TEACHING / "ASSIGNMENT.ipynb", as_version=4)
    for task, title in grade.TITLES.items():
        heading = f"## Task {task}. {title} ({grade.maximum(task):g} points)"
        assert any(heading in cell.source for cell in statements.cells), heading


@pytest.mark.parametrize("seed", [0, 1, 2027])
def test_the_full_answer_gets_all_points_with_any_seed(seed):
    found = grade.grade(FULL, seed)
    assert points(found) == [3, 3, 3, 4, 4, 3] and found["total"] == 20, grade.report(FULL, found)


@pytest.mark.parametrize("seed", [0, 1, 2027])
def test_the_partial_answer_gets_half_of_the_points_with_any_seed(seed):
    found = grade.grade(PARTIAL, seed)
    assert points(found) == [1.5, 2, 1, 1.5, 3, 1] and found["total"] == 10, grade.report(PARTIAL, found)


def test_the_assignment_as_handed_out_gets_no_points():
    found = grade.grade(TEACHING / "ASSIGNMENT.ipynb")
    assert found["total"] == 0 and found["problem"] == ""
    assert all("not attempted" in note for note in found["tasks"][1]["notes"])


@pytest.mark.parametrize(("content", "problem"), [
    (b"", "JSONDecodeError"), (b"\xff\xfe\x00 no notebook", "JSONDecodeError"), (b"[1, 2]", "TypeError"),
    (b'{"cells": 3}', "TypeError"), (b'{"nbformat": 4}', "KeyError"), (None, "FileNotFoundError")])
def test_a_file_that_is_no_notebook_gets_no_points_and_a_reason(tmp_path, content, problem):
    path = tmp_path / "submission.ipynb"
    if content is not None:
        path.write_bytes(content)
    found = grade.grade(path)
    assert found["total"] == 0 and problem in found["problem"]
    assert "0 of 20 points not a readable notebook" in grade.report(path, found)


@pytest.mark.parametrize(("code", "note"), [
    ("def vanishing_ratio(rewards)\n    pass", "the cell stops with SyntaxError"),
    ("import sys\nsys.exit()", "the cell stops with SystemExit"),
    ("import os\nos._exit(0)", "the process ended before this test"),
    ("def vanishing_ratio(rewards):\n    return vanishing_ratio(rewards)", "stops with RecursionError"),
    ("def vanishing_ratio(rewards):\n    return 'half'", "stops with "),
    ("vanishing_ratio = 3", "stops with TypeError"),
    ("def vanishing_ratio(rewards):\n    raise KeyboardInterrupt", "stops with KeyboardInterrupt"),
    ("raise Exception('x' * 10_000_000)", "the cell stops with Exception"),
    ("input()", "the cell stops with EOFError"),
    ("print('x' * 50_000_000)", "'vanishing_ratio' is missing"),
    ("open('results.jsonl', 'w').write('x' * 1000)", "'vanishing_ratio' is missing"),
])
def test_a_task_that_fails_costs_its_points_and_no_others(tmp_path, code, note):
    others = grade.cells_of(FULL, "# Task 1") + grade.cells_of(FULL, "# Task 3")
    found = grade.grade(notebook_of(tmp_path, *others, f"# Task 2\n{code}"), seconds=30)
    assert points(found) == [3, 0, 3, 0, 0, 0]
    assert note in found["tasks"][2]["notes"][0], found["tasks"][2]["notes"]


@pytest.mark.parametrize("code", ["while True:\n    pass", "import signal, time\nfor s in (2, 15):\n    signal.signal(s, "
                                  "signal.SIG_IGN)\ntime.sleep(100)"])
def test_a_task_that_never_ends_is_stopped_and_keeps_the_others(tmp_path, code):
    path = notebook_of(tmp_path, *grade.cells_of(FULL, "# Task 1"), f"# Task 2\n{code}")
    grade.grade_task(FULL, 1, 0, 60)  # the first process imports torch
    begin = time.monotonic()
    found = {task: grade.grade_task(path, task, 0, 4) for task in (1, 2)}
    assert 4 < time.monotonic() - begin < 15
    assert found[1]["points"] == 3 and found[2]["points"] == 0
    assert found[2]["notes"][0].endswith("not finished in 4 s")


def test_points_earned_before_a_hang_are_kept(tmp_path):
    hang = "def expected_vanishing(rates, size):\n    while True:\n        pass"
    path = notebook_of(tmp_path, *grade.cells_of(FULL, "# Task 2"), f"# Task 2\n{hang}")
    assert grade.grade_task(path, 2, 0, 8)["points"] == 1


def test_stored_results_do_not_pass_and_a_submission_cannot_change_the_given_cells(tmp_path):
    cheat = "# Given\ngroup_advantages = lambda rewards: 0 * rewards\n"
    path = notebook_of(tmp_path, cheat, *grade.cells_of(FULL, "# Task 4"))
    assert grade.grade(path)["tasks"][4]["points"] == 4
    stored = "# Task 2\ndef expected_vanishing(rates, size):\n    return {2: 0.7, 8: 0.4}[size]"
    assert grade.grade_task(notebook_of(tmp_path, stored), 2, 5, 60)["points"] == 0


def test_the_command_prints_a_report_for_each_file_and_writes_a_table(tmp_path, capsys):
    broken = tmp_path / "broken.ipynb"
    broken.write_text("{")
    grade.main([str(PARTIAL), str(broken), "--csv", str(tmp_path / "grades.csv"), "--seed", "3"])
    printed = capsys.readouterr().out
    assert "exemplar_partial.ipynb: 10 of 20 points" in printed and "broken.ipynb: 0 of 20 points" in printed
    rows = list(csv.reader((tmp_path / "grades.csv").open()))
    assert [row[0] for row in rows] == ["file", "exemplar_partial.ipynb", "broken.ipynb"] and rows[1][7] == "10.0"


def test_exemplar_answers_differ_from_the_assignment_only_in_the_task_cells():
    def outside_tasks(path: Path) -> list[str]:
        cells = nbformat.read(path, as_version=4).cells[1:]
        rest = [cell for cell in cells if "setup" not in cell.metadata.get("tags", [])]
        return [cell.source for cell in rest if not cell.source.startswith("# Task")]

    assert outside_tasks(FULL) == outside_tasks(PARTIAL) == outside_tasks(TEACHING / "ASSIGNMENT.ipynb")


def test_the_recorded_runs_are_those_of_the_script_and_deserve_their_diagnosis():
    recorded = json.loads(make_runs.RUNS.read_text())
    by_name = {grade.DIAGNOSIS[name]: run for name, run in recorded.items()}
    assert list(recorded) == list(make_runs.SETTINGS) and len(by_name) == 4
    assert by_name["healthy"]["reward"][-1] > 0.9 and by_name["healthy"]["vanishing_all_correct"][-1] > 0.5
    assert max(by_name["collapsed"]["reward"][5:]) < 0.1 and by_name["collapsed"]["kl"][-1] > 3
    assert min(by_name["vanished"]["vanishing"]) > 0.9 and by_name["vanished"]["kl"][-1] < 0.1
    slow = by_name["rate too small"]
    assert abs(slow["reward"][-1] - slow["reward"][0]) < 0.1 and slow["kl"][-1] < 0.02 and slow["vanishing"][-1] < 0.7


def test_a_recorded_run_is_made_again(monkeypatch):
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        made = make_runs.run(**make_runs.SETTINGS["B"])
    finally:
        torch.set_default_dtype(before)
    recorded = json.loads(make_runs.RUNS.read_text())["B"]
    assert made["reward"][:5] == recorded["reward"][:5]
    assert made["kl"] == pytest.approx(recorded["kl"], abs=2e-3)
