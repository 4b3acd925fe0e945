r"""Reads mutated copies of a clip in a process of its own, with a limit on memory: one line of JSON for each.

    python tests/mutate_clips.py CLIP FIRST COUNT BACKEND[,BACKEND]
"""

import json
import random
import sys
import time
from pathlib import Path

# How files of other kinds begin: Matroska, AVI, MPEG-TS, FLV, Ogg, GIF, ZIP, PNG, ELF, HTML.
BEGINNINGS = [b"\x1aE\xdf\xa3" + bytes(range(32)), b"RIFF\xff\xff\xff\x7fAVI LIST", (b"G@\0\x10" + b"\xff" * 184) * 3,
              b"FLV\x01\x05\0\0\0\x09\0\0\0\0", b"OggS\0\x02" + bytes(20), b"GIF89a\xff\xff\xff\xff\xf7\0\0",
              b"PK\x03\x04" + bytes(26), b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff\x08\x02\0\0\0",
              b"\x7fELF\x02\x01\x01", b"<!DOCTYPE html><html>"]
EXTREMES = [b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4), b"\x80" + bytes(3)]


def mutate(seed: int, whole: bytes) -> bytes:
    r"""Truncated, bits flipped, header rewritten, absurd numbers in the header, a piece lost, a piece too many, another
    container's beginning, or (a quarter of those) nothing at all: by the seed modulo 7."""
    rng, data = random.Random(seed), bytearray(whole)
    at, kind = rng.randrange(len(data) - 8), seed % 7
    if kind == 0:
        del data[at:]
    elif kind == 1:
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(min(len(data), 1200))] = rng.randrange(256)
    elif kind == 3:
        at = rng.randrange(min(len(data) - 8, 1200))
        data[at:at + 4] = rng.choice(EXTREMES)
    elif kind == 4:
        del data[at:at + rng.randrange(1, 400)]
    elif kind == 5:
        data[at:at] = rng.randbytes(rng.randrange(1, 300))
    elif rng.random() < 0.25:
        data = bytearray()
    else:
        beginning = rng.choice(BEGINNINGS)
        data[:rng.choice([0, len(beginning)])] = beginning
    return bytes(data)


def read(path: Path, backend: str) -> str:
    r""""read", or "refused" with an error that names the file; anything else is a fault."""
    from dvr1_lite.errors import ClipError
    from dvr1_lite.video import read_clip

    try:
        frames = read_clip(path, 8, (56, 56), backend=backend).frames
        return "read" if frames.shape == (8, 3, 56, 56) and frames.isfinite().all() else "wrong frames"
    except ClipError as error:
        return "refused" if str(error).startswith(str(path)) and "; " in str(error) else str(error)
    except BaseException as error:
        return repr(error)


def main(source: Path, first: int, count: int, backends: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    except ImportError:  # Windows
        pass
    whole, path = source.read_bytes(), source.with_name(f"mutated{first}.mp4")
    for seed in range(first, first + count):
        path.write_bytes(mutate(seed, whole))
        for backend in backends:
            began = time.monotonic()
            print(json.dumps([seed, backend, read(path, backend), time.monotonic() - began]), flush=True)
    path.unlink()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].split(","))
