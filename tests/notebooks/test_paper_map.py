"""The map of notebook 00 is generated from one table; what its rows name must exist."""

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


def test_the_notebook_shows_this_table():
    cell = paper_map.table_cell(nbformat.read(paper_map.START, as_version=4))
    assert paper_map.markdown() in cell.source, "run python notebooks/paper_map.py"


@pytest.mark.parametrize(("text", "paper", "there"), [
    (r"$$x \tag{3}$$", "Eq. 3", True), (r"\tag{8, 18}", "Eq. 18", True), ("Eq. 10 to 14", "Eq. 12", True),
    (r"\tag{02.3}", "Eq. 3", False), ("Eq. 02.2", "Eq. 2", False), ("Eq. 1", "Eq. 11", False),
    ("Table 4", "table 4", True), ("tables 44", "table 4", False), ("Eq. 7 and 8", "Eq. 8", True),
    ("appendix C.1", "appendix C", True),
])
def test_mentions_by_hand(text, paper, there):
    assert paper_map.mentions(text, paper) is there
