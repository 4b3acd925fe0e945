"""Copy the notebooks to notebooks/my/, without outputs, for your own answers: python notebooks/copy_to_my.py

Git and the tests leave that folder alone. A notebook that is there already is kept; --again replaces it.
"""

import argparse
from pathlib import Path

import nbformat

FOLDER = Path(__file__).resolve().parent


def without_outputs(path: Path) -> nbformat.NotebookNode:
    """The notebook as it is before its first run."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
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
