"""What every notebook keeps to, so that nbval checks all of it and a reader finds nothing broken."""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "notebooks"))
import copy_to_my  # noqa: E402
import install_missing  # noqa: E402
import save_outputs  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = save_outputs.notebooks()
PAGES = [ROOT / "README.md", *sorted((ROOT / "notebooks").rglob("*.md")), *sorted((ROOT / "data").glob("*.md"))]
PAGES = [page for page in PAGES if "my" not in page.relative_to(ROOT).parts]
MAX_BYTES, MAX_CELLS, MAX_COLUMNS = 1_000_000, 60, 79
MIMES = {"text/plain", "image/png"}  # of outputs; nbval compares the first, a reader sees both everywhere
LINK = re.compile(r"\]\(([^()\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code" and cell.source.strip()]


def markdown(notebook: nbformat.NotebookNode) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs if output.output_type == "stream")


def broken_links(text: str, folder: Path) -> list[str]:
    links = [a or b for a, b in LINK.findall(re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S))]
    local = [unquote(link.split("#")[0]) for link in links if not re.match(r"(https?|mailto|data|attachment):|#", link)]
    return [link for link in local if not (folder / link).exists()]


each = pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.relative_to(ROOT / "notebooks").as_posix() for p in NOTEBOOKS])


@each
def test_a_notebook_is_valid_small_and_has_a_solution(path):
    nbformat.validate(read(path))
    assert path.stat().st_size <= MAX_BYTES and len(read(path).cells) <= MAX_CELLS
    assert path.parent.name == "solutions" or (path.parent / "solutions" / path.name).exists()


@each
def test_a_notebook_was_run_from_top_to_bottom(path):
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1)), "run notebooks/save_outputs.py: nbval skips cells without a count"


@each
def test_there_is_no_stored_error_and_only_plain_outputs(path):
    for cell in code_cells(path):
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", f"a warning is stored under: {cell.source}"
            assert set(output.get("data", {})) <= MIMES, cell.source


@each
def test_code_lines_fit_a_laptop(path):
    assert [line for cell in code_cells(path) for line in cell.source.split("\n") if len(line) > MAX_COLUMNS] == []


@each
def test_every_figure_has_an_assert_or_a_number(path):
    cells = code_cells(path)
    for cell, following in zip(cells, cells[1:] + [None]):
        if any("image/png" in output.get("data", {}) for output in cell.outputs):
            pair = [cell] + ([following] if following is not None else [])
            assert any(re.search(r"\bassert\b", c.source) or re.search(r"\d", printed(c)) for c in pair), cell.source


@each
def test_relative_links_resolve_also_in_the_copy_for_readers(path):
    assert broken_links(markdown(read(path)), path.parent) == []
    if path.parent.name == "notebooks":
        copy = re.sub(r"\]\(\d\d_[^/)]*\.ipynb\)", "]", markdown(copy_to_my.without_outputs(path)))
        assert broken_links(copy, ROOT / "notebooks/solutions") == []  # as deep as my/


@each
def test_the_badge_and_the_setup_cell_hold_the_one_address(path):
    notebook, source = read(path), read(path)
    save_outputs.write_address(source, path)
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in source.cells]
    setup = [cell.source for cell in notebook.cells if "setup" in cell.metadata.get("tags", [])]
    assert len(setup) == 1 and all(f'"{value}"' in setup[0] for value in save_outputs.address().values())


@each
def test_metadata_hold_nothing_of_the_machine(path):
    notebook, cleaned = read(path), read(path)
    save_outputs.clean(cleaned)
    assert notebook == cleaned, "run notebooks/save_outputs.py"


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_links_of_pages_resolve(page):
    assert broken_links(page.read_text(encoding="utf-8"), page.parent) == []


def test_the_link_check_finds_a_broken_one(tmp_path):
    (tmp_path / "there.md").write_text("")
    text = '[a](there.md) [b](gone.md#part) [c](https://example.org/x) <img src="gone.png"> `[d](code.md)` [e](#here)'
    assert broken_links(text, tmp_path) == ["gone.md", "gone.png"]


def test_the_readme_and_the_citation_have_the_address_of_pyproject():
    repository, tag = save_outputs.address()["repository"], save_outputs.address()["tag"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f'repository-code: "{repository}"' in citation
    assert f"version: {tag.removeprefix('v')}\n" in citation
    for link in re.findall(r"https://colab\.research\.google\.com/github/[^)\s]+", (ROOT / "README.md").read_text()):
        path = ROOT / link.split(f"/blob/{tag}/")[-1]
        assert f"({link})" in save_outputs.badge(path) and path.exists()


def test_a_new_address_reaches_the_readme_and_the_citation(monkeypatch):
    new = {"repository": "https://github.com/some/where", "tag": "semester"}
    monkeypatch.setattr(save_outputs, "address", lambda: new)
    pages = {"README.md": "github/some/where/blob/semester/notebooks/", "CITATION.cff": "version: semester\n"}
    for name, wanted in pages.items():
        before = (ROOT / name).read_text(encoding="utf-8")
        after = save_outputs.address_in_pages(name, before)
        assert wanted in after and len(after.splitlines()) == len(before.splitlines())
        assert "deepvideo-r1-lite/blob" not in after


def test_ci_runs_the_command_of_the_readme():
    command = (ROOT / ".ci/run").read_text(encoding="utf-8").rstrip().rsplit("\n", 1)[-1]
    assert command == "python -m pytest"
    assert f"pip install -r requirements.txt && {command}\n" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_saving_keeps_hidden_outputs_and_drops_times():
    cell = nbformat.v4.new_code_cell("1", metadata={"jupyter": {"outputs_hidden": True}, "execution": {"started": "x"}})
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"language_info": {"name": "python", "version": "3.11"}})
    save_outputs.clean(notebook)
    assert notebook.cells[0].metadata == {"jupyter": {"outputs_hidden": True}}
    assert "version" not in notebook.metadata.language_info


def test_copies_for_readers_carry_no_outputs():
    cells = [cell for cell in copy_to_my.without_outputs(NOTEBOOKS[0]).cells if cell.cell_type == "code"]
    assert cells and all(not cell.outputs and cell.execution_count is None for cell in cells)


def test_installing_on_colab_leaves_torch_and_satisfied_requirements_alone():
    found = {"peft": "0.21.0", "transformers": "5.3.0", "numpy": "2.4.0"}
    text = "# why\ntorch>=99\npeft>=0.18,<1\ntransformers>=5.4,<6\nav>=14\nnumpy>=2\npytest>=8\nx>=1; os_name=='?'"
    assert install_missing.missing(text, found.get) == ["transformers<6,>=5.4", "av>=14"]


CLAIMS = (  # source, what it is said to have printed, metadata
    ("print('loss 0.59')", "loss 0.59", {}),
    ("print('loss 0.59')", "loss 0.58", {}),
    ("print('answer 3.2')", "answer 3.3", {"jupyter": {"outputs_hidden": True}}),
    ("print('took 7 s')", "took 9 s", {"tags": ["nbval-ignore-output"]}),
)


def test_a_changed_number_fails_in_folded_outputs_too_and_a_tagged_time_does_not(tmp_path):
    cells = [nbformat.v4.new_code_cell(source, metadata=metadata, execution_count=number, outputs=[
        nbformat.v4.new_output("stream", name="stdout", text=text + "\n")])
        for number, (source, text, metadata) in enumerate(CLAIMS, start=1)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "claims.ipynb")
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-q", "--nbval",
               "-c", str(ROOT / "pyproject.toml"), str(tmp_path / "claims.ipynb")]
    report = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout
    assert report.startswith(".FF.") and "2 failed, 2 passed" in report, report
