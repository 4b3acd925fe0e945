"""A printed number that changes fails the notebook tests, in folded outputs too; only what is tagged may change."""

import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
CELLS = (  # source, what it is said to have printed, metadata
    ("print('loss 0.59')", "loss 0.59", {}),
    ("print('loss 0.59')", "loss 0.58", {}),
    ("print('answer 3.2')", "answer 3.3", {"jupyter": {"outputs_hidden": True}}),
    ("print('took 7 s')", "took 9 s", {"tags": ["nbval-ignore-output"]}),
)


def test_a_changed_number_fails_printed_or_folded_and_a_time_does_not(tmp_path):
    cells = [nbformat.v4.new_code_cell(source, metadata=metadata, execution_count=number, outputs=[
        nbformat.v4.new_output("stream", name="stdout", text=text + "\n")])
        for number, (source, text, metadata) in enumerate(CELLS, start=1)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "claims.ipynb")
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-q", "--nbval",
               "-c", str(ROOT / "pyproject.toml"), str(tmp_path / "claims.ipynb")]
    report = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout
    assert report.startswith(".FF.") and "2 failed, 2 passed" in report, report
