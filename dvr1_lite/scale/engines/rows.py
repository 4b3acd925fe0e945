r"""Records as rows of ms-swift's data format: `python -m dvr1_lite.scale.engines.rows --data FILE --out rows.jsonl`.

A row is {"messages", "videos", "images", "chat_template_kwargs", "record"}. The last field holds the whole record as
JSON, for rewards and hints; the one before it gives the engine's video reader the config's number and size of frames.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import av
from torch import Tensor

from ...config import TrainConfig, load_config
from ...data import Record, prompt_text
from ...errors import UserError
from ...files import write_atomically
from ..datasets import read_any


def content(record: Record, instruction: str = "", **extra) -> str:
    r"""Return the user's turn with a tag for each clip and picture; extra: hint or show_answer of `prompt_text`."""
    tags = "<video>" * (record.clip is not None) + "<image>" * (record.image is not None)
    return tags + prompt_text(record, instruction=instruction, **extra)


def row(record: Record, config: TrainConfig) -> dict:
    r"""Make the row of a record."""
    frames = {"nframes": config.num_frames, "resized_height": config.frame_size, "resized_width": config.frame_size}
    return {"messages": [{"role": "user", "content": content(record, config.instruction)}],
            "videos": [str(record.clip)] if record.clip else [], "images": [str(record.image)] if record.image else [],
            "chat_template_kwargs": frames, "record": json.dumps(asdict(record), default=str)}


def read_record(text: str) -> Record:
    r"""Restore the record of a row."""
    values = json.loads(text)
    paths = {name: values[name] and Path(values[name]) for name in ("clip", "image")}
    return Record(**values | paths | {"options": tuple(values["options"]), "spans": tuple(map(tuple, values["spans"]))})


def write_frames(path: Path, frames: Tensor, fps: float) -> None:
    r"""Write frames (T, 3, H, W) in [0, 1] as a clip that keeps noise, for an engine's own reader.

    The rate is 0.01 % below `fps`, because readers count frames as duration times rate, rounded down.
    """
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=Fraction(int(fps * 999_900), 1_000_000), options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[-2:], "yuv444p"
        for frame in (frames * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy():
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())


def main(arguments: Sequence[str] | None = None) -> None:
    r"""Write the rows of a data file in any format that `scale/datasets.py` reads."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", required=True, metavar="FILE", help="Records: JSONL, JSON or CSV.")
    parser.add_argument("--root", metavar="DIR", help="Folder that clip paths start from; none: the file's own.")
    parser.add_argument("--config", metavar="FILE.yaml", help="Config of frames, their size and the instruction.")
    parser.add_argument("--out", required=True, metavar="FILE.jsonl", help="Where the rows go.")
    options = parser.parse_args(arguments)
    try:
        config, records = load_config(options.config), read_any(options.data, options.root)
    except UserError as error:
        parser.error(str(error))
    write_atomically(options.out, "".join(json.dumps(row(record, config)) + "\n" for record in records))
    print(f"{len(records)} rows in {options.out}")


if __name__ == "__main__":
    main()
