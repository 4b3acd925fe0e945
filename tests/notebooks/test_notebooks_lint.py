"""What every notebook keeps to, so that nbval checks all of it and a reader finds nothing broken.

    python tests/notebooks/test_notebooks_lint.py     prints the measures of rhythm and the times of every notebook
"""

import re
import shutil
import statistics
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
MAX_BYTES, MAX_CELLS, MAX_COLUMNS = 1_000_000, 110, 79
MEDIAN_CODE, MEDIAN_WORDS, MAX_CODE, MAX_PARAGRAPH = 10, 60, 20, 120  # lines, words, lines, words
WORDS_A_MINUTE, CODE_CELLS_A_MINUTE = 200, 1
MIMES = {"text/plain", "image/png"}  # of outputs; nbval compares the first, a reader sees both everywhere
LINK = re.compile(r"\]\(([^()\s]+)\)|(?:src|href)=\"([^\"]+)\"")
FORBIDDEN = {  # STYLE.md: words that a technical editor would not pass, and what to write
    r"\bmend(s|ed|ing)?\b": "fix", r"\bgone\b": "vanished, removed", r"\bgo(es)? on\b": "continue",
    r"\bstands? on\b": "is based on", r"what (it|they) amounts? to": "the sum", r"\bwhom\b": "which, who",
    r"\bdear\b": "expensive", r"\bpatience\b": "time limit", r"\ba (row|line) (a|each)\b": "one ... for each",
    r"\b(right|wrong)(ly)?[- ](answer|completion|one|form|group|trace|word|hint|guess)": "correct, incorrect",
    r"\b(answer|answered|completion|completions|all|is|are) (right|wrong)\b(?! of| side| panel)": "correct, incorrect",
    r"\ball-(right|wrong)\b": "all correct, all incorrect", r"\bversion 0\.1\b": "nothing: the project has no past",
    r"\bbackwards\b|[\"'`]return[\"'`]": "nothing: these types of question were dropped"}


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


def short_name(path: Path) -> str:
    return path.relative_to(ROOT / "notebooks").as_posix()


def plain_text(text: str) -> str:
    """Markdown without code blocks, display formulas, tables, link targets and the badge."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$|!?\[!\[.*?\]\(.*?\)\]\(.*?\)", " ", text, flags=re.S)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return "\n".join(line for line in text.split("\n") if not line.lstrip().startswith("|"))


def count_words(text: str) -> int:
    return sum(bool(re.search(r"\w", part)) for part in plain_text(text).split())


def paragraphs(text: str) -> list[str]:
    """Blocks between empty lines; items of a list and headings are blocks of their own."""
    return re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )|(?<=\n)(?=#)", plain_text(text))


def code_lines(cell: nbformat.NotebookNode) -> int:
    return sum(bool(line.strip()) for line in cell.source.split("\n"))


def measures(path: Path) -> dict[str, float]:
    """Code lines (set-up cell left out), words, and minutes to read and run the Core and the Deeper sections."""
    code = [code_lines(cell) for cell in code_cells(path) if "setup" not in cell.metadata.get("tags", [])]
    texts = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    words, minutes, part = [count_words(text) for text in texts], {"core": 0.0, "deeper": 0.0}, "core"
    for cell in read(path).cells:
        if cell.cell_type == "markdown" and (headings := re.findall(r"(?m)^## (.*)$", cell.source)):
            part = "deeper" if "Deeper" in headings[-1] else "core"
        minutes[part] += count_words(cell.source) / WORDS_A_MINUTE if cell.cell_type == "markdown" else (
            1 / CODE_CELLS_A_MINUTE)
    return {"cells": len(read(path).cells), "code median": statistics.median(code), "code longest": max(code),
            "words median": statistics.median(words), "words in all": sum(words),
            "longest paragraph": max(count_words(p) for text in texts for p in paragraphs(text)), **minutes}


def forbidden_words(text: str) -> list[str]:
    return [f"{found[0]!r} (write: {instead})" for pattern, instead in FORBIDDEN.items()
            for found in re.finditer(pattern, text, flags=re.I)]


def truth_values(text: str) -> list[str]:
    """Printed lines that give a bare True or False where a number belongs; prediction lines name the two words."""
    lines = [line for line in text.split("\n") if not line.startswith("Prediction ")]
    return [line for line in lines if re.search(r"(?:^|[\s\[(,:=])(?:True|False)(?=$|[\s\]),;.])", line)]


each = pytest.mark.parametrize("path", NOTEBOOKS, ids=[short_name(p) for p in NOTEBOOKS])
@each
def test_a_notebook_is_valid_small_and_has_a_solution(path):
    nbformat.validate(read(path))
    assert path.stat().st_size <= MAX_BYTES and len(read(path).cells) <= MAX_CELLS
    assert path.parent.name != "notebooks" or (path.parent / "solutions" / path.name).exists()


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
def test_the_rhythm_is_short_code_and_short_text(path):
    found = measures(path)
    print(short_name(path), found)
    if path.parent.name != "solutions":  # they hold exercises alone
        assert found["code median"] <= MEDIAN_CODE and found["words median"] <= MEDIAN_WORDS, found
    assert found["code longest"] <= MAX_CODE and found["longest paragraph"] <= MAX_PARAGRAPH, found


@each
def test_no_bare_truth_value_is_printed(path):
    results = [output.get("data", {}).get("text/plain", "") for cell in code_cells(path) for output in cell.outputs]
    lines = [line for cell in code_cells(path) for line in truth_values(printed(cell))]
    assert lines + [line for text in results for line in truth_values(text)] == [], "print the number, with n"


@each
def test_notebooks_use_the_words_of_the_field(path):
    cells = read(path).cells
    text = "\n".join(cell.source + "\n" + (printed(cell) if cell.cell_type == "code" else "") for cell in cells)
    assert forbidden_words(text) == []


@each
def test_figures_are_labelled_with_the_number_of_the_notebook_and_a_letter(path):
    cells, number = read(path).cells, re.match(r"\d\d[a-z]?|[A-Z]", path.name)[0]
    around = [cells[max(i - 1, 0):i + 2] for i, cell in enumerate(cells)
              if any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))]
    for near in around:
        assert any(re.search(rf"\b{number}-[A-Z]\b", cell.source) for cell in near), near[1].source
    if path.parent.name == "solutions":  # they may name figures of their notebook
        return
    letters = sorted(set(re.findall(rf"Figure {number}-([A-Z])\b", "\n".join(cell.source for cell in cells))))
    assert letters == [chr(ord("A") + i) for i in range(len(letters))], letters
    assert not re.search(r"\b[Oo]ur figure|^\*Figure \d+\.", markdown(read(path)), flags=re.M)


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
    if path.parent.name in ("notebooks", "teaching"):
        copy = re.sub(r"\]\(\d\d[a-z]?_[^/)]*\.ipynb\)", "]", markdown(copy_to_my.without_outputs(path)))
        assert broken_links(copy, ROOT / "notebooks/solutions") == []  # as deep as my/


@each
def test_the_badge_and_the_setup_cell_hold_the_one_address(path):
    notebook, source = read(path), read(path)
    save_outputs.write_address(source, path)
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in source.cells]
    setup = [cell.source for cell in notebook.cells if "setup" in cell.metadata.get("tags", [])]
    assert len(setup) == 1 and "{repository}/tree/{tag}".format(**save_outputs.address()) in setup[0]


@each
def test_metadata_hold_nothing_of_the_machine(path):
    notebook, cleaned = read(path), read(path)
    save_outputs.clean(cleaned)
    assert notebook == cleaned, "run notebooks/save_outputs.py"


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_links_of_pages_resolve(page):
    assert broken_links(page.read_text(encoding="utf-8"), page.parent) == []


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_pages_use_the_words_of_the_field(page):
    assert forbidden_words(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(("text", "count"), [
    ("a bug was mended", 1), ("the group is gone; the right answer", 2), ("All-wrong prompts", 1),
    ("to the right of 0", 0), ("the right panel", 0), ("the question type `return`, then backwards", 2),
    ("a backward pass returns all rights", 0), ("half of them are wrong", 1), ("a row a step", 1)])
def test_forbidden_words_are_found_and_others_are_not(text, count):
    assert len(forbidden_words(text)) == count


@pytest.mark.parametrize(("text", "count"), [
    ("True", 1), ("the form is right: True", 1), ("[True, False]", 1), ("checkpointing False [1.2]", 1),
    ("Prediction 01-b: no guess yet - put True or False in place of None", 0), ("3 of 4", 0), ("Falsehood", 0)])
def test_printed_truth_values_are_found(text, count):
    assert len(truth_values(text)) == count


def test_words_and_paragraphs_are_counted_without_formulas_tables_and_links():
    text = "# A title\n\nOne two [three](http://x/y z) $x$.\n\n$$a b c$$\n\n| a | b |\n| - | - |\n\n- four five\n- six\n"
    assert count_words(text) == 9  # a title one two three x four five six
    assert max(count_words(part) for part in paragraphs(text)) == 4


def test_the_link_check_finds_a_broken_one(tmp_path):
    (tmp_path / "there.md").write_text("")
    text = '[a](there.md) [b](lost.md#part) [c](https://example.org/x) <img src="lost.png"> `[d](code.md)` [e](#here)'
    assert broken_links(text, tmp_path) == ["lost.md", "lost.png"]


def test_the_readme_and_the_citation_have_the_address_of_pyproject():
    repository, tag = save_outputs.address()["repository"], save_outputs.address()["tag"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f'repository-code: "{repository}"' in citation
    assert f"version: {tag.removeprefix('v')}\n" in citation
    for link in re.findall(r"https://colab\.research\.google\.com/github/[^)\s]+", (ROOT / "README.md").read_text()):
        path = ROOT / link.split(f"/blob/{tag}/")[-1]
        assert f"({link})" in save_outputs.badge(path) and path.exists()


def test_one_line_of_pyproject_reaches_badges_setup_cells_readme_and_citation(tmp_path, monkeypatch):
    old = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    line = 'address = "https://github.com/some/where/tree/semester"'
    (tmp_path / "pyproject.toml").write_text(re.sub(r'(?m)^address = ".*"$', line, old), encoding="utf-8")
    monkeypatch.setattr(save_outputs, "ROOT", tmp_path)
    notebook = read(NOTEBOOKS[0])
    save_outputs.write_address(notebook, tmp_path / "notebooks" / NOTEBOOKS[0].name)
    assert f"github/some/where/blob/semester/notebooks/{NOTEBOOKS[0].name})" in notebook.cells[0].source
    assert 'ADDRESS = "https://github.com/some/where/tree/semester"' in notebook.cells[1].source
    pages = {"README.md": "github/some/where/blob/semester/notebooks/", "CITATION.cff": "version: semester\n"}
    for name, wanted in pages.items():
        before = (ROOT / name).read_text(encoding="utf-8")
        after = save_outputs.address_in_pages(name, before)
        assert wanted in after and len(after.splitlines()) == len(before.splitlines())
        assert "deepvideo-r1-lite/blob" not in after


def test_an_address_without_a_branch_names_the_fix(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('[tool.dvr1]\naddress = "https://github.com/some/where"\n')
    monkeypatch.setattr(save_outputs, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="has no branch or tag; write .../OWNER/NAME/tree/TAG"):
        save_outputs.address()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_setup_cell_fetches_a_fork_when_its_one_line_is_changed(tmp_path):
    """The cell as Colab runs it: `google.colab` is imported, and the folder holds nothing of the project."""
    fork, colab = tmp_path / "fork", tmp_path / "colab"
    for name, text in (("dvr1_lite/__init__.py", ""), ("notebooks/install_missing.py", "open('ran', 'w').close()")):
        (fork / name).parent.mkdir(parents=True, exist_ok=True)
        (fork / name).write_text(text)
    colab.mkdir()
    git = ["git", "-C", str(fork), "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q", "-b", "main"], ["commit", "-q", "--allow-empty", "-m", "empty"],
                    ["checkout", "-q", "-b", "semester"], ["add", "."], ["commit", "-q", "-m", "files"],
                    ["checkout", "-q", "main"]):
        subprocess.run(git + command, check=True, capture_output=True)
    cell = re.sub(r'(?m)^ADDRESS = ".*"$', f'ADDRESS = "{fork.as_uri()}/tree/semester"',
                  save_outputs.SETUP.format(address="x/tree/y"))
    script = ("import sys, types\nsys.modules['google.colab'] = types.ModuleType('google.colab')\n"
              f"{cell}\nprint(os.getcwd(), sys.path[0], os.path.exists('ran'))")
    run = subprocess.run([sys.executable, "-c", script], cwd=colab, capture_output=True, text=True, timeout=60)
    found = colab.resolve() / "dvr1"
    assert run.stdout.split() == [str(found / "notebooks"), str(found), "True"], run.stderr


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


if __name__ == "__main__":
    for notebook in NOTEBOOKS:
        print(short_name(notebook), {name: round(value, 1) for name, value in measures(notebook).items()})
