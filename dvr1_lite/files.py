r"""Text files that survive a kill: whole or not there, or lines of which only the last can be torn."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from .errors import RecordError, UserError

NOT_WRITTEN = (OSError, SafetensorError)  # what a full disk raises; safetensors has an error of its own


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    r"""Turns what a full disk or an unwritable folder raises into a `UserError` that names `path`."""
    try:
        yield
    except NOT_WRITTEN as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({reason}); free space, mend the folder, or give "
                        f"another one; what was written before is kept and can be resumed") from error


def make_folder(path: str | Path) -> None:
    r"""Makes a folder and those above it, if they are missing. Raises `UserError`."""
    with writing(path):
        Path(path).mkdir(parents=True, exist_ok=True)


def write_atomically(path: str | Path, text: str) -> None:
    r"""Writes a text file that appears whole or not at all. Raises `UserError`."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with writing(path):
        with open(part, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)


def append_lines(path: str | Path, rows: Iterable[dict]) -> None:
    r"""Appends rows to a JSONL file. Raises `UserError`, and ValueError for NaN or infinity: they are not JSON."""
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    with writing(path), open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(text)


def read_lines(path: str | Path) -> Iterator[dict]:
    r"""Rows of a JSONL file; none if there is no file. A last line that was cut short by a kill is left out."""
    path = Path(path)
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise RecordError(f"{path}, line {number}: not valid JSON ({error.msg}); delete the file") from error


def sync(path: Path) -> None:
    r"""Forces a folder's files and the folder itself onto the disk (a folder only where the system can)."""
    for entry in [*path.rglob("*"), path]:
        if entry.is_dir() and os.name == "nt":
            continue
        descriptor = os.open(entry, os.O_RDONLY if entry.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
