r"""Write video clips that every decoder reads and that one machine always writes with the same bytes."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_clip(path: str | os.PathLike, frames: np.ndarray, fps: float, *, crf: int = 16) -> None:
    r"""Write uint8 frames (T, H, W, 3) as an H.264 mp4 file without sound.

    fps: frames per second. crf: quality of x264, from 0 (lossless) to 51. Colours keep their full resolution (yuv444p)
    and a single thread encodes, so that the bytes do not vary. The file appears complete or not at all.
    Raises ValueError for arrays of another shape or type.
    """
    frames = np.ascontiguousarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}: give uint8 (T, H, W, 3)")
    part = Path(f"{path}.part")
    try:
        with av.open(str(part), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv444p"
            stream.codec_context.thread_count = 1
            stream.options = {"crf": str(crf), "preset": "medium", "bf": "0"}
            for pixels in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
