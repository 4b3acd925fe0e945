r"""Decode video files: which frames a file holds, when each is shown, and the pictures of the frames asked for.

`probe_clip` reads the packets of a file without decoding them; `read_frames` decodes frames by number. decord is fast,
but from many kinds of file it returns other frames than the ones asked for, so it reads only what `_scan` finds safe.
PyAV reads everything else, in order or after a jump to a keyframe that no later frame looks behind, and compares the
time stamp of each frame with the one asked for. As a decoder can hang or crash on a broken file, all of this runs in a
worker process (`serve`), kept for the next calls, which ends itself when a file takes longer than its time-out.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import math
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from dvr1_lite.errors import ClipError, ConfigError

try:  # decord has no wheels for macOS and ARM
    import decord

    decord.logging.set_level(decord.logging.QUIET)
except (ImportError, OSError):
    decord = None

BACKENDS = ("auto", "decord", "pyav")
MAX_FRAME_PIXELS = 8192 * 4320  # a header that claims more is treated as broken
MAX_FPS = 1000
# Real containers only: a playlist or a concat script would name other files for the decoder to open.
OPEN = {"format_whitelist": "mov,matroska,avi,mpegts,mpeg,flv,ogg,asf,gif,h264,hevc", "protocol_whitelist": "file"}
SEEKABLE_CONTAINERS, SEEKABLE_CODECS = {"mov", "matroska", "flv"}, {"h264", "vp8", "vp9"}
DECORD_CONTAINERS, DECORD_PIXELS = {"mov", "matroska"}, {"yuv420p", "yuvj420p", "yuv422p", "yuv444p"}
DECORD_MIN_WIDTH = 128  # pixels; decord crashes on some smaller widths, and PyAV is as fast there
THREADED_PIXELS = 480 * 360  # larger frames are decoded by several threads
PICTURES = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"II*\0", b"MM\0*")  # how JPEG, PNG, BMP and TIFF files begin
WITHOUT_TIMES = ("the video has no duration: it holds no frames, or its frames have no times; encode it again, or put "
                 "it into a container (ffmpeg -i IN -c copy OUT.mp4)")
ROOT = str(Path(__file__).resolve().parents[1])
WORKER = [sys.executable, "-P", "-c",  # -P: no imports from the current folder
          f"import sys; sys.path.insert(0, {ROOT!r}); from dvr1_lite import decoding; decoding.serve()"]


class Probe(NamedTuple):
    r"""Describe a clip by its packets, without decoding it.

    starts: second at which each frame appears, ascending, on the file's clock (0 is the container's start, so the
    first frame of a clip whose sound starts earlier appears later than 0); duration: seconds from the container's
    start to the end of the last frame; width, height: pixels as stored, before a rotation flag is applied.
    """

    starts: list[float]
    duration: float
    width: int
    height: int


class _Scan(NamedTuple):
    probe: Probe
    pts: list[int]  # time stamp of each frame in the stream's unit, ascending
    keys: list[int]  # time stamps of the keyframes
    closed: bool  # decoding can start at any keyframe: no later frame needs one before it
    decord: bool  # decord reads this file correctly, if its frames are stored upright
    by_order: bool  # a frame can carry a neighbour's time stamp: AVI stores no order of presentation


def probe_clip(path: str | os.PathLike, *, timeout: float = 60.0) -> Probe:
    r"""Read the packets of the video file `path` and return its `Probe`, within `timeout` seconds and bounded memory.

    Raises ClipError, naming the file and the fix, if it is missing, empty, truncated, a picture, not a video or without
    times, or if reading takes too long.
    """
    check_file(Path(path))
    return Probe(**_ask(path, {"timeout": timeout})[1]["probe"])


def read_frames(path: str | os.PathLike, indices: Sequence[int], convert: Callable[[np.ndarray], Any], *,
                backend: str = "auto", timeout: float = 60.0) -> list:
    r"""Decode the frames numbered `indices` (ascending) of `path` and return `convert(frame)` of each.

    A frame is a uint8 array (H, W, 3), turned and mirrored as the file asks; only one is held at a time.
    backend: "auto" and "decord" use decord for the files that it reads correctly and PyAV for all others, "pyav" uses
    PyAV only; "decord" raises ConfigError where decord is not installed. Raises ClipError as `probe_clip` does.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"video_backend is {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "decord" and decord is None:
        raise ConfigError("decord is not installed here: install it, or set video_backend to auto or pyav")
    return _ask(path, {"indices": list(indices), "decord": backend != "pyav", "timeout": timeout}, convert)[0]


def check_file(path: Path) -> None:
    r"""Raise ClipError unless `path` is a readable file that is not empty."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise ClipError(f"{path}: no such file; check the path and the data root") from error
    problems = {"not a file; give the path of a video or picture": not stat.S_ISREG(status.st_mode),
                "the file is empty (0 bytes); download or encode it again": status.st_size == 0,
                "no permission to read it; change its access rights": not os.access(path, os.R_OK)}
    for problem in (text for text, found in problems.items() if found):
        raise ClipError(f"{path}: {problem}")


def short_reason(error: Exception) -> str:
    r"""Return one short line for a decoder's exception, without its source lines and stack."""
    text = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    if not text or "/src/" in text:  # decord reports the place in its own source
        text = f"{type(error).__name__} while decoding"
    return " ".join(text.split())[:120]


# --- the calling process ---------------------------------------------------------------------------------------------

_lock = threading.Lock()
_worker: subprocess.Popen | None = None
_owner = 0  # the process that started the worker; a fork of it starts its own


def _ask(path: str | os.PathLike, request: dict, convert: Callable = lambda frame: frame) -> tuple[list, dict]:
    r"""Send one request to the worker; return its frames, converted one by one, and its closing reply."""
    frames, began = [], time.monotonic()
    # An absolute path is never taken for a URL, whatever its name contains.
    line = json.dumps({"path": os.path.abspath(path), **request}).encode() + b"\n"
    with _lock:
        worker = _running_worker()
        try:
            worker.stdin.write(line)
            worker.stdin.flush()
            while "shape" in (reply := json.loads(worker.stdout.readline())):
                frame = np.empty(reply["shape"], np.uint8)
                if worker.stdout.readinto(frame.reshape(-1)) < frame.size:
                    raise EOFError
                frames.append(convert(frame))
        except (OSError, EOFError, json.JSONDecodeError) as error:  # the worker has ended
            problem = f"the decoder crashed (exit status {_stop_worker()}); encode it again"
            if time.monotonic() - began >= request["timeout"]:
                problem = (f"decoding did not finish within {request['timeout']:g} s; encode it again, or raise "
                           f"decode_timeout")
            raise ClipError(f"{path}: {problem}") from error
        except BaseException:  # an interrupt leaves half a reply in the pipe
            _stop_worker(0)
            raise
    if "error" in reply:
        raise ClipError(f"{path}: {reply['error']}")
    return frames, reply


def _running_worker() -> subprocess.Popen:
    global _worker, _owner
    if _worker is None or _owner != os.getpid() or _worker.poll() is not None:
        worker = subprocess.Popen(WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0))  # Windows
        if worker.stdout.readline() != b"ready\n":
            raise RuntimeError(f"the decoding process did not start (exit status {worker.wait()}): try {WORKER}")
        _worker, _owner = worker, os.getpid()
    return _worker


@atexit.register
def _stop_worker(patience: float = 0.5) -> int | None:
    r"""End the worker, after `patience` seconds by force, and return its exit status."""
    global _worker
    worker, _worker = _worker, None
    if worker is None or _owner != os.getpid():
        return None
    try:
        worker.communicate(timeout=patience)  # closes its input, which ends `serve` unless it is decoding
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.communicate()
    return worker.returncode


# --- the worker process ----------------------------------------------------------------------------------------------


def serve() -> None:
    r"""Answer requests, one line of JSON each, until standard input ends: the loop of the worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the caller's to handle
    output, null = os.fdopen(os.dup(1), "wb"), open(os.devnull, "w")
    output.write(b"ready\n")
    output.flush()
    for descriptor in (1, 2):  # decoders must not write to the terminal or between two replies
        os.dup2(null.fileno(), descriptor)
    scanned, scan = None, None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        faulthandler.dump_traceback_later(request["timeout"], exit=True, file=null)  # a thread in C ends the process
        try:
            if scanned != request["path"] or "indices" not in request:
                scan, scanned = _scan(request["path"]), request["path"]
            for frame in _decode(scanned, scan, request.get("indices", ()), request.get("decord")):
                output.write(json.dumps({"shape": frame.shape}).encode() + b"\n" + frame.tobytes())
            reply = {} if "indices" in request else {"probe": scan.probe._asdict()}
        except Exception as error:  # decoders raise many unrelated types
            reply = {"error": str(error if isinstance(error, ClipError) else _unreadable(short_reason(error)))}
        faulthandler.cancel_dump_traceback_later()
        output.write(json.dumps(reply).encode() + b"\n")
        output.flush()


def _unreadable(why: str) -> ClipError:
    return ClipError(f"not a readable video, or truncated ({why}); download or encode it again")


@contextlib.contextmanager
def _open(path: str) -> Iterator[tuple]:
    r"""Open a file and choose its video stream: the one flagged as default, else the first, leaving out cover art."""
    with av.open(path, metadata_errors="replace", container_options=OPEN) as container:
        cover = Disposition.attached_pic | Disposition.timed_thumbnails
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams:
            raise ClipError("the file holds no video; give a video file such as mp4 or webm")
        yield container, next((stream for stream in streams if stream.disposition & Disposition.default), streams[0])


def _scan(path: str) -> _Scan:
    r"""Read all packets of a file, keeping only their time stamps, and decide how it can be decoded."""
    needed = _declared_size(path)  # bytes
    with _open(path) as (container, stream):
        codec, kind = stream.codec_context, container.format.name.split(",")[0]
        if codec is None or not 0 < codec.width * codec.height <= MAX_FRAME_PIXELS:
            raise _unreadable(f"frame size {codec.width} x {codec.height}" if codec else "unknown codec")
        closed = kind in SEEKABLE_CONTAINERS and codec.name in SEEKABLE_CODECS
        pts, keys, end = [], [], -math.inf
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise _unreadable("its end is missing")
            if packet.pts is None or not packet.size:
                continue
            if packet.is_keyframe:
                closed = closed and (codec.name != "h264" or _starts_with_idr(packet, codec.extradata))
                keys.append(packet.pts)
            # A frame that is shown before the last keyframe may need frames before it, and others may need a frame
            # that an edit list cuts away. What needs a keyframe that is not in the file cannot be decoded.
            closed = closed and bool(keys) and packet.pts >= keys[-1] and not packet.is_discard
            if not packet.is_discard and (packet.is_keyframe or keys and packet.pts >= keys[0]):
                pts.append(packet.pts)
                end = max(end, packet.pts + (packet.duration or 0))
        if max([needed] + [entry.pos + entry.size for entry in stream.index_entries]) > os.path.getsize(path):
            raise _unreadable("its end is missing")
        packets = len(pts)
        if packets == 0 or (packets > 1 and min(pts) == max(pts)):
            raise ClipError(WITHOUT_TIMES)
        pts = _even(pts, stream) if kind == "mpeg" else sorted(set(pts))
        probe = _timing(container, stream, pts, end, kind)
        decord_reads = (closed and kind in DECORD_CONTAINERS and codec.pix_fmt in DECORD_PIXELS
                        and codec.width >= DECORD_MIN_WIDTH and probe.starts[0] == 0 and len(pts) == packets
                        and stream.frames in (0, packets) and len(container.streams.video) == 1)
        by_order = kind == "mpeg" or (kind == "avi" and codec.name in ("h264", "hevc"))
        return _Scan(probe, pts, sorted(keys), closed, decord_reads, by_order)


def _even(pts: list[int], stream) -> list[int]:
    r"""Space the time stamps of a program stream evenly: now and then they are attached to the wrong frame."""
    step = (max(pts) - min(pts)) / max(len(pts) - 1, 1)
    nominal = float(1 / (stream.average_rate * stream.time_base)) if stream.average_rate else step
    if abs(nominal - step) * len(pts) < 3 * nominal:  # at most three frames apart at the end
        step = nominal
    return [round(min(pts) + step * k) for k in range(len(pts))]


def _timing(container, stream, pts: list[int], end: float, kind: str) -> Probe:
    r"""Turn time stamps into seconds on the file's clock."""
    base, rate, origin = stream.time_base, stream.average_rate, pts[0]
    if end <= pts[-1]:  # some containers give the last packet no duration
        end = pts[-1] + (float(1 / (rate * base)) if rate else 0)
    if kind == "avi":  # the delay of decoding shifts all time stamps
        origin -= stream.start_time or 0
    elif container.start_time is not None:  # in microseconds, so it is rounded where the first frame is the start
        start = float(container.start_time / (av.time_base * base))
        origin = start if start < origin - 1e-5 / base else origin
    seconds = (np.array([*pts, end], np.float64) - origin) * base.numerator / base.denominator
    *starts, duration = seconds.tolist()
    if not len(pts) / MAX_FPS <= duration < math.inf:
        raise ClipError(WITHOUT_TIMES)
    return Probe(starts, duration, stream.codec_context.width, stream.codec_context.height)


def _starts_with_idr(packet, extradata: bytes | None) -> bool:
    r"""Return whether an H.264 keyframe resets the decoder (IDR), so that no later frame needs an earlier one."""
    if not extradata or extradata[0] != 1:
        return False  # its units are not length-prefixed
    data, position, prefix = memoryview(packet), 0, (extradata[4] & 3) + 1  # bytes of a unit's length
    while position + prefix < len(data):
        kind = data[position + prefix] & 31
        if kind in (1, 5):  # a slice of another picture, of an IDR picture
            return kind == 5
        position += prefix + int.from_bytes(data[position:position + prefix], "big")
    return False


def _declared_size(path: str) -> int:
    r"""Return the bytes that an AVI, Matroska or WebM header announces, or 0. Raises ClipError for a picture."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith(PICTURES) or head[8:12] == b"WEBP":
        raise ClipError("it is a picture, not a video; give a video file, or name it as a record's image")
    if head.startswith(b"RIFF"):
        return 8 + int.from_bytes(head[4:8], "little")
    at = head.find(b"\x18S\x80g") + 4  # Matroska's segment, which holds all after the header; then its size
    if not head.startswith(b"\x1aE\xdf\xa3") or not 4 < at < len(head) - 8:
        return 0
    width = 9 - head[at].bit_length()
    size = int.from_bytes(head[at:at + width], "big") - (1 << 7 * width)
    return 0 if size == (1 << 7 * width) - 1 else at + width + size  # all ones: unknown


def _decode(path: str, scan: _Scan, indices: Sequence[int], use_decord: bool) -> Iterator[np.ndarray]:
    r"""Yield the frames numbered `indices` with the decoder that is correct for this file."""
    if indices and use_decord and scan.decord and decord is not None:
        with _open(path) as (container, stream):
            upright = _matrix(next(container.decode(stream))) == (1, 0, 0, 1)
        reader = decord.VideoReader(path, num_threads=1) if upright else ()
        if len(reader) == len(scan.pts):
            yield from (reader[index].asnumpy() for index in indices)
            return
    done = 0
    for jump in (True, False) if scan.closed else (False,):
        for frame in _decode_pyav(path, scan, indices[done:], jump):
            yield frame
            done += 1
    if done < len(indices):
        raise _unreadable(f"{done} of {len(indices)} frames could be decoded")


def _decode_pyav(path: str, scan: _Scan, indices: Sequence[int], jump: bool) -> Iterator[np.ndarray]:
    r"""Yield frames until one's time stamp is not found; `jump` to the last keyframe before a frame if it is ahead."""
    if not indices:
        return
    reformatter, near = VideoReformatter(), 4 * (scan.pts[-1] - scan.pts[0]) / len(scan.pts)
    threads = 1 if scan.probe.width * scan.probe.height < THREADED_PIXELS else min(4, os.cpu_count() or 1)
    with _open(path) as (container, stream):
        stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
        frames, shown, now, count = container.decode(stream), None, -math.inf, 0
        for target in (scan.pts[index] for index in indices):
            key = scan.keys[bisect_right(scan.keys, target) - 1]
            if jump and key > max(now, scan.pts[0]):
                container.seek(key, stream=stream)
                frames = container.decode(stream)
            while now < target:
                if (shown := next(frames, None)) is None:
                    return
                now = now if shown.pts is None else shown.pts
                if scan.by_order and count < len(scan.pts) and abs(scan.pts[count] - now) <= near:
                    now = scan.pts[count]
                count += 1
            if now != target:
                return
            yield _to_rgb(shown, reformatter)


def _to_rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    r"""Convert to uint8 (H, W, 3), transparency on white, turned and mirrored as the frame's display matrix asks."""
    has_alpha = any(component.is_alpha for component in frame.format.components)
    picture = reformatter.reformat(frame, format="rgba" if has_alpha else "rgb24", threads=1).to_ndarray()
    if has_alpha:
        alpha = picture[..., 3:].astype(np.uint16)
        picture = ((picture[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    a, b, c, d = _matrix(frame)
    if abs(b) > abs(a):  # a quarter turn: rows become columns
        picture, a, d = picture.swapaxes(0, 1), c, b
    return picture[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]


def _matrix(frame: av.VideoFrame) -> tuple[float, ...]:
    r"""Return (a, b, c, d): the stored point (x, y) is shown at (a x + c y, b x + d y), up to an offset."""
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return 1, 0, 0, 1
    return tuple(float(value) / 65536 for value in np.frombuffer(bytes(side_data), np.int32)[[0, 1, 3, 4]])
