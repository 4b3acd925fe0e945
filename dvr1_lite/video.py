r"""From a video file to the patches that Qwen-VL's vision encoder reads (paper, appendix C).

clip.mp4 -> `read_clip` -> frames (T, 3, H, W) in [0, 1] at known seconds -> `patchify` -> patches (N, D)
"""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from .decoding import MAX_FRAME_PIXELS, check_file, probe_clip, read_frames, short_reason
from .errors import ClipError

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
CLOCK_TOLERANCE = 1e-6  # seconds; containers round the times of frames

# Mean and standard deviation of CLIP's training images, which every Qwen-VL checkpoint normalises with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Clip:
    r"""The sampled frames of one video.

    frames: float32 (T, 3, H, W) in [0, 1]; seconds: the T moments at which they are on screen, (k + 1/2) duration / T,
    counted from the clip's start; fps: *sampled* frames per second, T / duration (not the file's frame rate);
    duration: seconds; path: the file.
    """

    frames: torch.Tensor
    seconds: list[float]
    fps: float
    duration: float
    path: str


def read_clip(path: str | os.PathLike, num_frames: int, size: tuple[int, int] | None = None, *, backend: str = "auto",
              timeout: float = 60.0) -> Clip:
    r"""Sample `num_frames` frames of a video file evenly in time and decode them.

    The clip is divided into `num_frames` equal stretches, and the frame on screen in the middle of each is taken:
    $t_k = (k + \tfrac12) D / N$ seconds of the file's own clock, which starts with its first sound or picture (before
    the first frame appears, that frame is taken). A frame that is on screen at several moments is returned for each.

    size: (height, width) in pixels to resize to; None keeps the file's own. backend: "auto", "decord" or "pyav"; all
    return the same frames, turned and mirrored as the file's orientation flag asks. timeout: seconds for decoding.
    Raises ClipError, naming the file and the fix, if it is missing, empty, truncated, not a video, without duration,
    has fewer than `num_frames` frames, crashes the decoder or takes too long.
    Differs from the paper: it gives the number of frames (16) but not how they are placed.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, not {num_frames}")
    probe = probe_clip(path, timeout=timeout)
    total, duration = len(probe.starts), probe.duration
    if total < num_frames:
        raise ClipError(f"{path}: the clip has {total} frame{'s' * (total != 1)} but {num_frames} are asked for; "
                        f"sample at most {total} or leave the clip out")
    seconds = [(k + 0.5) * duration / num_frames for k in range(num_frames)]
    on_screen = [max(bisect_right(probe.starts, second + CLOCK_TOLERANCE) - 1, 0) for second in seconds]
    frames = read_frames(path, on_screen, lambda picture: _to_float(picture, size), backend=backend, timeout=timeout)
    if len({frame.shape for frame in frames}) != 1:
        raise ClipError(f"{path}: the size of its pictures changes; encode it again with one size, or give `size`")
    return Clip(torch.stack(frames), seconds, num_frames / duration, duration, str(path))


def read_image(path: str | os.PathLike, size: tuple[int, int] | None = None) -> torch.Tensor:
    r"""Read a picture (JPEG, PNG, WebP, BMP) as one frame: float32 (1, 3, H, W) in [0, 1], resized to `size` if given.

    An EXIF flag turns the picture upright, transparency is shown on white, and 16-bit grey keeps its full range.
    Raises ClipError, naming the file and the fix, if the file is missing, empty, too large or not a readable picture.
    """
    check_file(Path(path))
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as picture:
            if picture.width * picture.height > MAX_FRAME_PIXELS:
                raise ClipError(f"{path}: {picture.width} x {picture.height} pixels are too many; make it smaller")
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):  # 16-bit grey
                grey = np.array(picture, np.float32)[..., None].repeat(3, -1) / 65535
                return _to_float(255 * grey, size)[None]
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            pixels = np.array(picture.convert("RGB"))
    except ClipError:
        raise
    except Exception as error:  # Pillow's plug-ins raise many unrelated types
        raise ClipError(f"{path}: not a readable picture ({short_reason(error)}); download or save it again") from error
    return _to_float(pixels, size)[None]


def _to_float(picture: np.ndarray, size: tuple[int, int] | None) -> torch.Tensor:
    r"""Convert a picture (H, W, 3) in 0 to 255 to float32 (3, H, W) in [0, 1], resized to `size` if given."""
    frame = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1).float().div_(255)
    return frame.contiguous() if size is None else resize(frame[None], size)[0]


def resize(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    r"""Resize frames (T, 3, H, W) to `size` = (height, width) with antialiased bicubic interpolation.

    The result is clamped to [0, 1], because bicubic weights overshoot at edges.
    """
    if tuple(frames.shape[-2:]) == tuple(size):
        return frames
    return F.interpolate(frames, size=tuple(size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def patchify(
    frames: torch.Tensor,
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Cut frames (T, 3, H, W) in [0, 1] into the patches of Qwen2-VL's vision encoder, normalised by mean and std.

    Returns patches (N, 3 * temporal_patch_size * patch_size ** 2) float32 and grid_thw (3,) int64 with
    N = t * h * w. One row holds colour, time, height, width, in that order. Rows run over time, then over blocks of
    merge_size x merge_size patches (row by row), then over the patches within a block, so that the patches that
    become one language token are adjacent. The last frame is repeated until T fills whole temporal patches; an
    image is one frame. Raises ValueError if H or W is no multiple of patch_size * merge_size.
    """
    _, channels, height, width = frames.shape
    if height % (patch_size * merge_size) or width % (patch_size * merge_size):
        raise ValueError(f"frames of {height} x {width} do not divide into blocks of {patch_size * merge_size} pixels")
    frames = frames.float().sub(torch.tensor(mean).view(-1, 1, 1)).div_(torch.tensor(std).view(-1, 1, 1))
    if missing := -len(frames) % temporal_patch_size:
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    t, h, w = len(frames) // temporal_patch_size, height // patch_size, width // patch_size
    rows, columns = (h // merge_size, merge_size, patch_size), (w // merge_size, merge_size, patch_size)
    # (t, time, colour, block row, row, y, block column, column, x)
    blocks = frames.reshape(t, temporal_patch_size, channels, *rows, *columns)
    patches = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)
    return patches, torch.tensor([t, h, w])
