"""Run notebooks from top to bottom and save their outputs, in the environment in which the tests compare them.

    python notebooks/save_outputs.py                       all of them
    python notebooks/save_outputs.py notebooks/02_*.ipynb  some
    python notebooks/save_outputs.py --address             no running: only write the address wherever it stands

Saved are outputs and execution counts; times, versions and the kernel's own name are not, so that a second run changes
nothing. Cell metadata stay, among them the hidden outputs of cells that answer a prediction.
"""

import argparse
import os
import re
import sys
import time
import tomllib
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
sys.path.insert(0, str(ROOT))
from conftest import CELL_TIMEOUT, notebook_environment  # noqa: E402

KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
          "language_info": {"name": "python"}}
CELL_METADATA = ("tags", "jupyter")  # all that a cell keeps
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"


def notebooks() -> list[Path]:
    """The notebooks of the project, solutions included, in reading order."""
    return sorted(FOLDER.glob("[0-9]*.ipynb")) + sorted((FOLDER / "solutions").glob("*.ipynb"))


def address() -> dict[str, str]:
    """`repository` and `tag` from pyproject.toml, the one place where they stand."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["dvr1"]


def badge(path: Path) -> str:
    """The Colab badge of a notebook, as Markdown."""
    where = address()
    repository = where["repository"].removeprefix("https://github.com/")
    inside = path.resolve().relative_to(ROOT).as_posix()
    return f"{BADGE}(https://colab.research.google.com/github/{repository}/blob/{where['tag']}/{inside})"


def write_address(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Put the address into the badge (first line of the first cell) and into the cells tagged `setup`."""
    first = notebook.cells[0]
    lines = first.source.split("\n")
    first.source = "\n".join([badge(path)] + lines[1 if lines[0].startswith(BADGE) else 0:])
    for cell in notebook.cells:
        if "setup" in cell.metadata.get("tags", []):
            for name, value in address().items():
                cell.source = re.sub(rf'(?m)^{name.upper()} = ".*"$', f'{name.upper()} = "{value}"', cell.source)


def address_in_pages(name: str, text: str) -> str:
    """The text of README.md or CITATION.cff with the address in its Colab links, or as repository and version."""
    where = address()
    if name == "README.md":
        links = where["repository"].replace("https://github.com/", "https://colab.research.google.com/github/")
        return re.sub(r"https://colab\.research\.google\.com/github/[^)\s]+?/blob/[^/]+/", f"{links}/blob/{where['tag']}/", text)
    text = re.sub(r'(?m)^repository-code: ".*"$', f'repository-code: "{where["repository"]}"', text)
    return re.sub(r"(?m)^version: .*$", f"version: {where['tag'].removeprefix('v')}", text)


def run(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Execute in place, in the notebook's own folder."""
    NotebookClient(notebook, timeout=CELL_TIMEOUT, kernel_name="python3", record_timing=False, coalesce_streams=True,
                   resources={"metadata": {"path": str(path.parent)}}).execute()


def clean(notebook: nbformat.NotebookNode) -> None:
    """Leave only what belongs to the text: no times, no versions, no empty output."""
    notebook.metadata = nbformat.from_dict(KERNEL)
    for number, cell in enumerate(notebook.cells):
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in CELL_METADATA})
        cell.id = f"cell-{number:02d}"
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all, solutions too")
    parser.add_argument("--address", action="store_true", help="only write the address, run nothing")
    arguments = parser.parse_args()
    os.environ.update(notebook_environment())
    for page in (ROOT / "README.md", ROOT / "CITATION.cff") if arguments.address else ():
        page.write_text(address_in_pages(page.name, page.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
    for path in arguments.notebooks or notebooks():
        start = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        write_address(notebook, path)
        if not arguments.address:
            run(notebook, path)
        clean(notebook)
        nbformat.write(notebook, path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
