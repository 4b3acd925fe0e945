"""Run notebooks from top to bottom and save their outputs, in the environment in which the tests compare them.

    python notebooks/save_outputs.py                       all of them
    python notebooks/save_outputs.py notebooks/02_*.ipynb  some
    python notebooks/save_outputs.py --address             run nothing: only write the address of pyproject.toml

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
SETUP = '''# Finds the project in a folder above; on Colab, downloads it first.
# In a fork, change this line: the address of a branch or tag on GitHub.
ADDRESS = "{address}"

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY, TAG = ADDRESS.split("/tree/")


def root():
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents, here / "dvr1")
                 if (folder / "dvr1_lite").is_dir()), None)


if "google.colab" in sys.modules:
    if root() is None and subprocess.run(
            ["git", "clone", "--quiet", "--depth=1", f"--branch={{TAG}}",
             REPOSITORY, "dvr1"]).returncode:
        raise SystemExit("Check the network and ADDRESS, then run this again.")
    os.chdir(root() / "notebooks")
    subprocess.run([sys.executable, "install_missing.py"], check=True)
if root() is None:
    raise SystemExit(f"Clone {{REPOSITORY}}, open this notebook in it.")
sys.path[:0] = [str(root()), str(root() / "notebooks")]'''


def notebooks() -> list[Path]:
    """Return the notebooks of the project in reading order, then the solutions and the graded assignment."""
    folders = (FOLDER.glob("[0-9]*.ipynb"), (FOLDER / "solutions").glob("*.ipynb"), (FOLDER / "teaching").glob("*.ipynb"))
    return [path for folder in folders for path in sorted(folder)]


def address() -> dict[str, str]:
    """Return `repository` and `tag`, read from the one line of pyproject.toml that a fork changes."""
    text = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["dvr1"]["address"]
    repository, found, tag = text.partition("/tree/")
    if not found or not tag:
        raise SystemExit(f"pyproject.toml: the address {text!r} has no branch or tag; write .../OWNER/NAME/tree/TAG")
    return {"repository": repository, "tag": tag}


def badge(path: Path) -> str:
    """Return the Colab badge of a notebook, as Markdown."""
    where = address()
    repository = where["repository"].removeprefix("https://github.com/")
    inside = path.resolve().relative_to(ROOT).as_posix()
    return f"{BADGE}(https://colab.research.google.com/github/{repository}/blob/{where['tag']}/{inside})"


def write_address(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write the badge (first line of the first cell) and the cell tagged `setup`, both with the project's address."""
    first = notebook.cells[0]
    lines = first.source.split("\n")
    first.source = "\n".join([badge(path)] + lines[1 if lines[0].startswith(BADGE) else 0:])
    for cell in notebook.cells:
        if "setup" in cell.metadata.get("tags", []):
            cell.source = SETUP.format(address="{repository}/tree/{tag}".format(**address()))


def address_in_pages(name: str, text: str) -> str:
    """Return README.md or CITATION.cff with the address in its Colab links, or as repository and version."""
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
