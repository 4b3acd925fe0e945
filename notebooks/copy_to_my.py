"""Copy the notebooks and the assignment to notebooks/my/, without outputs: python notebooks/copy_to_my.py

Write your own answers there; git and the tests ignore that folder. A copy that exists is kept unless --replace is given.
"""

import argparse
import os
import re
from pathlib import Path

import nbformat

FOLDER = Path(__file__).resolve().parent
LINK = re.compile(r"\]\(([^()\s#]+)")  # of Markdown, to a page or a picture


def links_from_my(text: str, folder: Path) -> str:
    """Return the Markdown of a page in `folder` with links that work from notebooks/my/, where numbered notebooks are."""
    def rewrite(found: re.Match) -> str:
        target = (folder / found[1]).resolve()
        if not target.exists():
            return found[0]
        copied = target.parent == FOLDER and re.fullmatch(r"\d\d[a-z]?_.*\.ipynb", target.name)
        return f"]({target.name if copied else Path(os.path.relpath(target, FOLDER / 'my')).as_posix()}"

    return LINK.sub(rewrite, text)


def without_outputs(path: Path) -> nbformat.NotebookNode:
    """Return a notebook as it is before its first run, with links that work from notebooks/my/."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = links_from_my(cell.source, path.resolve().parent)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replace", action="store_true", help="replace copies, with the answers in them")
    replace = parser.parse_args().replace
    (FOLDER / "my").mkdir(exist_ok=True)
    for path in [*sorted(FOLDER.glob("[0-9]*.ipynb")), FOLDER / "teaching" / "ASSIGNMENT.ipynb"]:
        copy = FOLDER / "my" / path.name
        if copy.exists() and not replace:
            print(f"kept   {copy.relative_to(FOLDER.parent)}")
            continue
        nbformat.write(without_outputs(path), copy)
        print(f"copied {copy.relative_to(FOLDER.parent)}")


if __name__ == "__main__":
    main()
