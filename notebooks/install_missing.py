"""On Colab: install what requirements.txt asks for and the machine does not have. Never touches torch.

The set-up cell of every notebook runs this after fetching the project. What only the tests need is left out.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"
NOT_HERE = {"torch", "jupyter", "nbformat", "nbclient", "nbval", "pytest"}


def installed(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def missing(requirements: str, find: Callable[[str], str | None] = installed) -> list[str]:
    """The lines of a requirements file that hold on this platform and are not met."""
    lines = [line.split("#")[0].strip() for line in requirements.splitlines()]
    wanted = [Requirement(line) for line in lines if line]
    return [f"{r.name}{r.specifier}" for r in wanted if r.name not in NOT_HERE and (not r.marker or r.marker.evaluate())
            and not ((found := find(r.name)) and r.specifier.contains(found, prereleases=True))]


def main() -> None:
    packages = missing(REQUIREMENTS.read_text(encoding="utf-8"))
    if not packages:
        return
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "constraints.txt"  # whatever is installed needs, torch stays as it is
        pins.write_text(f"torch=={version('torch')}\n", encoding="utf-8")
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-c", str(pins), *packages], check=True)
    print("installed:", ", ".join(packages))


if __name__ == "__main__":
    main()
