"""Where the shipped data stand: `data/` beside the module in a clone, or the folder named by DVR1_DATA."""

import os
from pathlib import Path

from .errors import ConfigError


def data_folder() -> Path:
    """The folder with ToyVideoQA, the base model and the recorded results. Raises ConfigError if there is none."""
    places = [Path(os.environ["DVR1_DATA"])] if "DVR1_DATA" in os.environ else [
        Path(__file__).resolve().parents[1] / "data", Path.cwd() / "data"]
    for place in places:
        if (place / "toyvideoqa").is_dir():
            return place
    raise ConfigError(f"no data folder with toyvideoqa/ in it at {' or '.join(map(str, places))}: clone the whole "
                      "repository (pip installs the code alone), or set DVR1_DATA to its data/ folder")


def resolve(path: str | Path) -> Path:
    """A path as given; one that begins with "data/" and does not exist from here is looked up in `data_folder()`."""
    path = Path(path)
    if not path.exists() and path.parts and path.parts[0] == "data":
        return data_folder().joinpath(*path.parts[1:])
    return path
