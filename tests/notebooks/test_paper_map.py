"""PAPER_MAP.md and the plan of notebook 00 are generated; what their rows name must exist, and the stated times are measured."""

import importlib
import re
import sys
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "notebooks"))
import paper_map  # noqa: E402

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("row", paper_map.ROWS, ids=[row.paper for row in paper_map.ROWS])
def test_the_code_the_test_and_the_section_of_a_row_exist(row):
    module, _, name = row.code.rpartition(".")
    assert hasattr(importlib.import_module(f"dvr1_lite.{module}"), name)
    folder, module, name = row.test.split(".")
    assert re.search(rf"(?m)^def {name}\(", (TESTS / folder / f"test_{module}.py").read_text(encoding="utf-8"))
    assert paper_map.section(row) is not None, f"{row.paper} does not occur in {paper_map.NOTEBOOKS[row.notebook]}"


def test_every_equation_and_table_of_the_paper_has_a_row():
    equations, tables = set(), set()
    for row in paper_map.ROWS:
        kind, name = row.paper.split(" ")
        if kind == "Eq.":
            equations |= {int(name)} | paper_map.numbers(row.again)
        elif kind == "table":
            tables.add(int(name))
    assert equations == set(range(1, 25)) and tables == set(range(1, 9))


def test_the_page_shows_this_map():
    assert paper_map.MAP.read_text(encoding="utf-8") == paper_map.map_page(), "run python notebooks/paper_map.py"


def test_the_plan_lists_every_notebook_with_the_times_of_its_box():
    source = paper_map.plan_cell(nbformat.read(paper_map.START, as_version=4)).source
    assert paper_map.plan_table() in source, "run python notebooks/paper_map.py"
    rows = re.findall(r"(?m)^\| \[(\w+)\]\(.*\) \| .* \| (\d+|-) \| (\d+|-) \|$", source)
    assert [number for number, *_ in rows] == list(paper_map.NOTEBOOKS)
    assert "a beginner needs two to three times as long" in source  # the rule gives the pace of a second reading


@pytest.mark.parametrize("number", paper_map.NOTEBOOKS)
def test_the_box_of_a_notebook_states_about_the_measured_times(number):
    path = paper_map.FOLDER / paper_map.NOTEBOOKS[number]
    stated, measured = paper_map.stated_minutes(path), paper_map.reading_minutes(path)
    assert sum(stated.values()) > 0
    assert all(abs(stated[part] - measured[part]) <= 5 for part in stated), (stated, measured)


def test_reading_minutes_by_hand(tmp_path):
    new, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    cells = [new("word " * 400), code("1", metadata={"tags": ["setup"]}), code("2"),
             new("## 1. A (Core)\n" + "word " * 196), new("## 2. B (Deeper)\n" + "word " * 596), code("3"), code("4"),
             new("## 3. Exercises\n" + "word " * 1000), code("5")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "x.ipynb")
    assert paper_map.reading_minutes(tmp_path / "x.ipynb") == {"Core": 4, "Deeper": 5}


@pytest.mark.parametrize(("text", "paper", "there"), [
    (r"$$x \tag{3}$$", "Eq. 3", True), (r"\tag{8, 18}", "Eq. 18", True), ("Eq. 10 to 14", "Eq. 12", True),
    (r"\tag{02.3}", "Eq. 3", False), ("Eq. 02.2", "Eq. 2", False), ("Eq. 1", "Eq. 11", False),
    ("Table 4", "table 4", True), ("tables 44", "table 4", False), ("Eq. 7 and 8", "Eq. 8", True),
    ("appendix C.1", "appendix C", True),
])
def test_mentions_by_hand(text, paper, there):
    assert paper_map.mentions(text, paper) is there
