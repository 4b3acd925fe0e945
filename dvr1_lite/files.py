r"""Files that survive a kill (written completely or not at all), and where the shipped data are."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from .errors import ConfigError, RecordError, UserError

NOT_WRITTEN = (OSError, SafetensorError)  # what a full disk raises; safetensors has an error of its own


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    r"""Turn what a full disk or an unwritable folder raises into a `UserError` that names `path`."""
    try:
        yield
    except NOT_WRITTEN as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({reason}); free disk space, change the folder's permissions, "
                        f"or give another folder; what was written before is kept and can be resumed") from error


def make_folder(path: str | Path) -> None:
    r"""Create a folder and its parents if they are missing. Raises `UserError`."""
    with writing(path):
        Path(path).mkdir(parents=True, exist_ok=True)


def write_atomically(path: str | Path, text: str) -> None:
    r"""Write a text file that appears complete or not at all. Raises `UserError`."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with writing(path):
        with open(part, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)


def append_lines(path: str | Path, rows: Iterable[dict]) -> None:
    r"""Append rows to a JSONL file. Raises `UserError`, and ValueError for NaN or infinity, which are not JSON."""
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    with writing(path), open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(text)


def read_lines(path: str | Path) -> Iterator[dict]:
    r"""Yield the rows of a JSONL file (none if there is no file), without a last line that a kill cut short."""
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
    r"""Flush a path to the disk; for a folder, its files and the folder itself (where the system can)."""
    for entry in [*path.rglob("*"), path]:
        if entry.is_dir() and os.name == "nt":
            continue
        descriptor = os.open(entry, os.O_RDONLY if entry.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def data_folder() -> Path:
    r"""Find the folder with ToyVideoQA, the base model and the recorded results: `data/` beside the module in a clone,
    or below the working directory, or the folder named by DVR1_DATA. Raises `ConfigError` if there is none."""
    places = [Path(os.environ["DVR1_DATA"])] if "DVR1_DATA" in os.environ else [
        Path(__file__).resolve().parents[1] / "data", Path.cwd() / "data"]
    for place in places:
        if (place / "toyvideoqa").is_dir():
            return place
    raise ConfigError(f"there is no data folder with toyvideoqa/ in it at {' or '.join(map(str, places))}: clone the "
                      f"whole repository (pip installs the code alone), or set DVR1_DATA to its data/ folder")


def resolve(path: str | Path) -> Path:
    r"""Return the path as given; if it begins with "data/" and does not exist from here, that in the data folder."""
    path = Path(path)
    if not path.exists() and path.parts and path.parts[0] == "data":
        return data_folder().joinpath(*path.parts[1:])
    return path
