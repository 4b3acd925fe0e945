"""Copy the notebooks to notebooks/my/, without outputs, for your own answers: python notebooks/copy_to_my.py

Git and the tests leave that folder alone. A notebook that is there already is kept; --again replaces it.
"""

import argparse
import re
from pathlib import Path

import nbformat

FOLDER = Path(__file__).resolve().parent
LINK = re.compile(r"\]\(([^()\s#]+)")  # of Markdown, to a page or a picture


def from_below(text: str) -> str:
    """Markdown whose links to pictures, code and solutions work one folder deeper; numbered notebooks are copied too."""
    def deeper(found: re.Match) -> str:
        copied = re.fullmatch(r"\d\d_[^/]*\.ipynb", found[1])
        return f"](../{found[1]}" if (FOLDER / found[1]).exists() and not copied else found[0]

    return LINK.sub(deeper, text)


def without_outputs(path: Path) -> nbformat.NotebookNode:
    """The notebook as it is before its first run, for the folder below its own."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = from_below(cell.source)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="replace copies, with the answers in them")
    replace = parser.parse_args().again
    (FOLDER / "my").mkdir(exist_ok=True)
    for path in sorted(FOLDER.glob("[0-9]*.ipynb")):
        copy = FOLDER / "my" / path.name
        if copy.exists() and not replace:
            print(f"kept   {copy.relative_to(FOLDER.parent)}")
            continue
        nbformat.write(without_outputs(path), copy)
        print(f"copied {copy.relative_to(FOLDER.parent)}")


if __name__ == "__main__":
    main()
