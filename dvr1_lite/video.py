r"""From an mp4 file to the patches that Qwen-VL's vision encoder reads (paper, appendix C).

clip.mp4 -> `read_clip` (decord or PyAV) -> frames (T, 3, H, W) in [0, 1] -> `patchify` -> patches (N, D)
"""

import math
import os
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from PIL import Image

from dvr1_lite.errors import ClipError

try:  # decord has no wheels for macOS and ARM
    import decord

    decord.logging.set_level(decord.logging.QUIET)
except (ImportError, OSError):
    decord = None

BACKEND = "decord" if decord is not None else "pyav"
MAX_FRAME_PIXELS = 8192 * 4320  # a header that claims more is taken for a broken file
MAX_FPS = 1000
DECODE_TIMEOUT = 60.0  # seconds for one clip, hundreds of times what one takes
# Real containers only: a playlist or a concat script would name other files for the decoder to open.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,ogg,asf,gif,h264,hevc"
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")

# Mean and standard deviation of CLIP's training images, which every Qwen-VL checkpoint normalises with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Clip:
    r"""The sampled frames of one video.

    frames: float32 (T, 3, H, W) in [0, 1]; seconds: T start times of the frames, counted from the clip's start;
    fps: *sampled* frames per second, T / duration (not the file's frame rate); duration: seconds; path: the file.
    """

    frames: torch.Tensor
    seconds: list[float]
    fps: float
    duration: float
    path: str


class Probe(NamedTuple):
    """What a container says about its first video stream, found without decoding a picture."""

    starts: list[float]  # start of each frame in seconds, ascending, the first is 0
    duration: float  # seconds, to the end of the last frame
    width: int
    height: int
    pts: list[int]  # the same starts in the stream's own unit
    keys: list[int]  # pts of the frames that can be decoded without others
    consistent: bool  # whether the header's frame count, if it has one, is what the packets say


def frame_indices(total: int, num_frames: int) -> list[int]:
    r"""Middles of `num_frames` equal stretches of `total` frames: $\lfloor (i + 1/2)\, total / num\_frames \rfloor$.

    Deterministic, ascending, without repeats. Raises ValueError unless 1 <= num_frames <= total.
    Differs from the paper: it gives the number of frames (16) but not how they are placed.
    """
    if not 1 <= num_frames <= total:
        raise ValueError(f"cannot sample {num_frames} frames from {total}")
    return [(2 * i + 1) * total // (2 * num_frames) for i in range(num_frames)]


def read_clip(
    path: str | os.PathLike, num_frames: int, size: tuple[int, int] | None = None, *, backend: str | None = None,
    timeout: float = DECODE_TIMEOUT
) -> Clip:
    r"""Decodes `num_frames` uniformly spaced frames of a video file, and only those.

    size: (height, width) in pixels to resize to; None keeps the file's own. backend: "decord" or "pyav"; None takes
    decord where it is installed. Both give the same frames, turned upright as a telephone's rotation flag asks.
    timeout: seconds after which decoding is given up.
    Raises ClipError, naming the file and the remedy, if it is missing, empty, truncated, not a video, without
    duration, has fewer than `num_frames` frames or takes too long. No frame is ever repeated or taken from elsewhere.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, not {num_frames}")
    path, decode = Path(path), _decoder(backend)
    try:
        return _within(timeout, lambda: _read(path, num_frames, size, decode))
    except TimeoutError as error:
        raise ClipError(f"{path}: decoding did not end within {timeout:g} s; encode it again, or raise "
                        f"decode_timeout") from error


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    r"""What `work` returns or raises, or TimeoutError after `seconds`.

    The work runs in a thread of its own (0.1 ms to start one). A decoder that hangs in C cannot be stopped, so its
    thread is left behind; it ends with the process, and meanwhile holds neither the interpreter's lock nor a file of
    the run.
    """
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:  # raised again below, in the caller's thread
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def _read(path: Path, num_frames: int, size: tuple[int, int] | None, decode: Callable) -> Clip:
    probe = probe_clip(path)
    total = len(probe.starts)
    if total < num_frames:
        raise ClipError(f"{path}: the clip has {total} frames but {num_frames} are asked for; "
                        f"sample at most {total} frames or leave the clip out")
    indices = frame_indices(total, num_frames)
    try:
        frames = [_to_float(picture, size) for picture in decode(str(path), indices, probe)]
    except Exception as error:  # the decoders raise many unrelated types
        raise _undecodable(path, error) from error
    if len(frames) != num_frames or len({frame.shape for frame in frames}) != 1:
        raise _undecodable(path, f"{len(frames)} of {num_frames} frames could be decoded")
    seconds = [probe.starts[i] for i in indices]
    return Clip(torch.stack(frames), seconds, num_frames / probe.duration, probe.duration, str(path))


def read_image(path: str | os.PathLike, size: tuple[int, int] | None = None) -> torch.Tensor:
    r"""Reads a picture (JPEG, PNG, WebP, BMP) as one frame: float32 (1, 3, H, W) in [0, 1], resized to `size` if given.

    Raises ClipError as `read_clip` does.
    """
    path = Path(path)
    _check_file(path)
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as picture:
            if picture.width * picture.height > MAX_FRAME_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels")
            pixels = np.array(picture.convert("RGB"))
    except Exception as error:  # Pillow's plug-ins raise many unrelated types
        raise ClipError(f"{path}: not a readable picture ({_reason(error)}); download or save it again") from error
    return _to_float(pixels, size)[None]


def probe_clip(path: str | os.PathLike) -> Probe:
    r"""Counts and times the frames of a video file by reading its packets, not its pictures (0.3 ms for a short clip).

    Raises ClipError as `read_clip` does.
    """
    path = Path(path)
    _check_file(path)
    try:
        with _open(path) as container:
            if not container.streams.video:
                raise ClipError(f"{path}: the file holds no video; give a video file such as mp4 or webm")
            stream = container.streams.video[0]
            codec, base, rate = stream.codec_context, stream.time_base, stream.average_rate
            size = (codec.width, codec.height) if codec else (0, 0)
            packets = [p for p in container.demux(stream) if p.pts is not None and not p.is_discard]
            consistent = stream.frames in (0, len(packets))
            end = max((entry.pos + entry.size for entry in getattr(stream, "index_entries", ())), default=0)
            if end > path.stat().st_size or any(packet.is_corrupt for packet in packets):
                raise _undecodable(path, "its end is missing")
            entries = sorted((p.pts, p.duration or 0, p.is_keyframe) for p in packets)
    except ClipError:
        raise
    except Exception as error:
        raise _undecodable(path, error) from error
    return _timing(path, entries, base, rate, *size)._replace(consistent=consistent)


def _timing(path: Path, entries: list[tuple[int, int, bool]], base, rate, width: int, height: int) -> Probe:
    if not 0 < width * height <= MAX_FRAME_PIXELS:
        raise _undecodable(path, f"its header gives a frame size of {width} x {height}")
    if not entries or base is None:
        raise ClipError(f"{path}: the video holds no frames; download or encode it again")
    pts = [entry[0] for entry in entries]
    length = entries[-1][1] or (1 / (rate * base) if rate else 0)  # webm gives its last packet no duration
    duration = float((pts[-1] - pts[0] + length) * base)
    at_once = len(pts) > 1 and pts[0] == pts[-1]
    if at_once or not len(pts) / MAX_FPS <= duration < math.inf:
        raise ClipError(f"{path}: the video has no duration, its frames have no times; encode it with a frame rate")
    starts = [float((p - pts[0]) * base) for p in pts]
    return Probe(starts, duration, width, height, pts, [p for p, _, is_key in entries if is_key], True)


def _check_file(path: Path) -> None:
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        if isinstance(error, PermissionError):
            raise ClipError(f"{path}: no permission to read it; change its access rights") from error
        raise ClipError(f"{path}: no such file; check the path and the data root") from error
    if not stat.S_ISREG(status.st_mode):
        raise ClipError(f"{path}: not a file; give the path of a video or picture")
    if status.st_size == 0:
        raise ClipError(f"{path}: the file is empty (0 bytes); download or encode it again")
    if not os.access(path, os.R_OK):
        raise ClipError(f"{path}: no permission to read it; change its access rights")


def _undecodable(path: Path, why: object) -> ClipError:
    return ClipError(f"{path}: not a readable video, or truncated ({_reason(why)}); download or encode it again")


def _reason(why: object) -> str:
    """One short line from an exception or a text, without a decoder's source lines and stack."""
    if isinstance(why, str):
        return why
    text = getattr(why, "strerror", None) or str(why).partition("\n")[0]
    if not text or "/src/" in text:  # decord reports the place in its own source
        text = f"{type(why).__name__} while decoding"
    return " ".join(text.split())[:120]


def _open(path: str | os.PathLike):
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    return av.open(str(path), container_options=options, metadata_errors="replace")


def _decoder(backend: str | None):
    decoders = {"decord": _decode_decord, "pyav": _decode_pyav}
    name = backend or BACKEND
    if name not in decoders:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(decoders)}")
    if name == "decord" and decord is None:
        raise ValueError("decord is not installed here; use backend='pyav'")
    return decoders[name]


def _decode_decord(path: str, indices: list[int], probe: Probe) -> Iterator[np.ndarray]:
    # decord allocates what the header claims, and a broken header ends the process; it also shows frames that an
    # edit list cuts away. PyAV does neither.
    reader = decord.VideoReader(path, num_threads=1) if probe.consistent else None
    if reader is None or len(reader) != len(probe.pts):
        yield from _decode_pyav(path, indices, probe)
        return
    for index in indices:
        yield reader[index].asnumpy()


def _decode_pyav(path: str, indices: list[int], probe: Probe) -> Iterator[np.ndarray]:
    r"""Frames by their position in presentation order; jumps to the keyframe before one where that saves decoding."""
    reformatter, position, frames = VideoReformatter(), None, iter(())
    with _open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for target in (probe.pts[i] for i in indices):
            key = max((k for k in probe.keys if k <= target), default=probe.pts[0])
            if position is None or key > position:
                container.seek(key, stream=stream)
                frames = container.decode(stream)
            for frame in frames:
                position = frame.pts
                if position is not None and position >= target:
                    picture = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
                    yield np.rot90(picture, frame.rotation // 90)
                    break


def _to_float(picture: np.ndarray, size: tuple[int, int] | None) -> torch.Tensor:
    frame = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1).float().div_(255)
    return frame.contiguous() if size is None else resize(frame[None], size)[0]


def resize(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    r"""Bicubic, antialiased resize of frames (T, 3, H, W) to `size` = (height, width), clamped to [0, 1].

    Bicubic weights overshoot at edges, hence the clamp.
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
    r"""Cuts frames (T, 3, H, W) in [0, 1] into the patches of Qwen2-VL's vision encoder, normalised by mean and std.

    Returns patches (N, 3 * temporal_patch_size * patch_size ** 2) float32 and grid_thw (3,) int64 with
    N = t * h * w. One row holds colour, time, height, width, in that order. Rows run over time, then over blocks of
    merge_size x merge_size patches (row by row), then over the patches within a block, so that the four patches that
    become one language token stand together. The last frame is repeated until T fills whole temporal patches; an
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


def write_clip(path: str | os.PathLike, frames: np.ndarray, fps: float, *, crf: int = 16) -> None:
    r"""Writes uint8 frames (T, H, W, 3) as an H.264 mp4 without sound.

    fps: frames per second. crf: x264's quality, 0 (lossless) to 51. Colours are kept at full resolution (yuv444p)
    and one thread encodes, so one machine always writes the same bytes. The file appears whole or not at all.
    """
    frames = np.ascontiguousarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"frames must be uint8 (T, H, W, 3), not {frames.dtype} {frames.shape}")
    part = Path(f"{path}.part")
    try:
        with av.open(str(part), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            _encode(container, frames, Fraction(fps).limit_denominator(1001), crf)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _encode(container, frames: np.ndarray, rate: Fraction, crf: int) -> None:
    stream = container.add_stream("libx264", rate=rate)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv444p"
    stream.codec_context.thread_count = 1
    stream.options = {"crf": str(crf), "preset": "medium", "bf": "0"}
    for picture in frames:
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode())
