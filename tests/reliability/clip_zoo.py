r"""Clips whose pictures spell their own number, so that a test can tell which frame was decoded.

A picture is a grid of 3 x 5 black or white blocks: ten bits of the frame's number, then the lower five inverted. The
truth of every test is what was written here: the numbers, and the time stamps given to the writer.
"""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
from av.stream import Disposition

ROWS, COLUMNS = 3, 5
# Display matrices (a, b, c, d): the stored point (x, y) is shown at (a x + c y, b x + d y), up to an offset.
MATRICES = {
    "upright": (1, 0, 0, 1), "mirrored": (-1, 0, 0, 1), "flipped": (1, 0, 0, -1), "half turn": (-1, 0, 0, -1),
    "quarter turn": (0, 1, -1, 0), "three quarters": (0, -1, 1, 0), "transposed": (0, 1, 1, 0),
    "anti-transposed": (0, -1, -1, 0),
}
OPEN_GOP = {"libx264": {"x264-params": "open-gop=1:bframes=3:b-adapt=0:scenecut=0"},
            "libx265": {"x265-params": "open-gop=1:bframes=3:b-adapt=0:log-level=none"}, "mpeg2video": {"bf": "2"},
            "mpeg1video": {"bf": "2"}, "mpeg4": {"bf": "2"}}
CLOSED_GOP = {"libx264": {"bf": "2", "preset": "veryfast"}, "libx265": {"x265-params": "open-gop=0:log-level=none"},
              "mpeg2video": {"bf": "0"}, "mpeg4": {"bf": "0"}}
QUALITY = {"libsvtav1": {"preset": "8", "crf": "20"}} | dict.fromkeys(
    ["mpeg4", "mpeg2video", "mpeg1video", "wmv2", "msmpeg4v3", "flv"], {"qmin": "1", "qmax": "4"}) | dict.fromkeys(
    ["libvpx", "libvpx-vp9"], {"deadline": "realtime", "cpu-used": "8", "crf": "20", "b": "800k"})
PIXELS = {"gif": "rgb8", "prores": "yuv422p10le", "mjpeg": "yuvj420p"}
SOUND = {".mp4": "flac", ".mov": "pcm_s16le", ".mkv": "pcm_s16le", ".avi": "pcm_s16le", ".ts": "mp2", ".mpg": "mp2",
         ".webm": "libopus"}  # where possible a codec that does not start earlier than its first sample


class Written(NamedTuple):
    r"""What a player can show: numbers, start of each and end of the last, in seconds since the first sound or frame.
    latest_end: at a variable frame rate files do not say how long the last frame stays."""

    numbers: list[int]
    starts: list[float]
    end: float
    latest_end: float

    def on_screen(self, second: float) -> int:
        return [self.numbers[0], *(n for n, start in zip(self.numbers, self.starts) if start <= second)][-1]


def picture(number: int, height: int = 96, width: int = 160) -> np.ndarray:
    r"""Draw a uint8 (height, width, 3) picture that spells `number`, 0 to 1023."""
    bits = [(number >> k) & 1 for k in range(10)]
    grid = np.array(bits + [1 - bit for bit in bits[:5]], bool).reshape(ROWS, COLUMNS)
    y, x = np.arange(height) * ROWS // height, np.arange(width) * COLUMNS // width
    return np.where(grid[y][:, x], 235, 20).astype(np.uint8)[..., None].repeat(3, -1)


def number_in(frame) -> int | None:
    r"""Read the number in a decoded frame (3, H, W) in [0, 1]; None if the picture spells none."""
    grey = np.asarray(frame).mean(0)
    y, x = ([(2 * i + 1) * length // (2 * n) for i in range(n)] for length, n in zip(grey.shape, (ROWS, COLUMNS)))
    values = grey[np.ix_(y, x)].reshape(-1)
    bits = values > 0.5
    clear = (np.abs(values - 0.5) > 0.15).all() and (bits[10:] != bits[:5]).all()
    return int(sum(int(bit) << k for k, bit in enumerate(bits[:10]))) if clear else None


def stored(shown: np.ndarray, orientation: str) -> np.ndarray:
    r"""Return the picture to store so that the display matrix of `orientation` shows `shown`."""
    a, b, c, d = MATRICES[orientation]
    height, width = shown.shape[:2]
    y, x = np.mgrid[:height, :width] if a else np.mgrid[:width, :height]
    shown_x, shown_y = a * x + c * y, b * x + d * y
    return shown[shown_y - shown_y.min(), shown_x - shown_x.min()]


def _add_video(container, codec: str, size: tuple[int, int], rate: Fraction, base: Fraction, pix_fmt: str | None,
               options: dict):
    try:
        stream = container.add_stream(codec, rate=rate)
    except (av.error.FFmpegError, ValueError) as error:
        pytest.skip(f"this build of PyAV does not write {codec}: {error}")
    stream.height, stream.width = size
    stream.pix_fmt = pix_fmt or PIXELS.get(codec, "yuv420p")
    stream.codec_context.time_base = stream.time_base = base
    stream.codec_context.thread_count = 1
    stream.options = QUALITY.get(codec, {}) | options
    return stream


def _pictures(stream, frames, ticks, base) -> list:
    packets = []
    for picture_, tick in zip(frames, ticks):
        frame = av.VideoFrame.from_ndarray(picture_, format="rgb24")
        frame.pts, frame.time_base = tick, base
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def _silence(stream, begin: float, end: float) -> list:
    stream.codec_context.open()
    size = stream.codec_context.frame_size or 1024
    packets, layout = [], "s16" if "s16" in [f.name for f in stream.codec_context.codec.audio_formats] else "s16p"
    for position in range(round(begin * 48000), round(end * 48000), size):
        frame = av.AudioFrame(format=layout, layout="mono", samples=size)
        frame.planes[0].update(bytes(frame.planes[0].buffer_size))
        frame.sample_rate, frame.pts, frame.time_base = 48000, position, Fraction(1, 48000)
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def write(path: Path, codec: str = "libx264", *, seconds: list[float] | None = None, count: int = 60, fps: float = 25,
          start: float = 0.0, size: tuple[int, int] = (96, 160), orientation: str = "upright",
          pix_fmt: str | None = None, options: dict | None = None, sound: tuple[float, float] | None = None,
          cover: str = "", decoy: str = "", cut: int = 0, **container_options) -> Written:
    r"""Write a clip of numbered pictures and return what a player shows.

    seconds: start of each frame (variable frame rate); None gives `count` frames at `fps` from `start`. sound: begin
    and end of a sound track in seconds. cover: "first" or "last" adds cover art at that place among the streams. decoy:
    "first" or "last" adds a second video stream of white pictures; the numbered stream is flagged as the default.
    cut: drop all packets before keyframe number `cut`, as cutting without encoding again does.
    """
    rate, path = Fraction(fps).limit_denominator(1001), Path(path)
    base = Fraction(1, 1000) if seconds is not None else 1 / rate
    ticks = [round(second / base) for second in seconds or ()] or [round(start / base) + i for i in range(count)]
    white = [np.full((*size, 3), 255, np.uint8)]
    with av.open(str(path), "w", **container_options) as container:
        streams = {}
        order = {"cover": cover, "decoy": decoy, "video": "middle", "sound": "middle" if sound else ""}
        for name in sorted(filter(order.get, order), key=lambda name: ["first", "middle", "last"].index(order[name])):
            if name == "sound":
                streams[name] = container.add_stream(SOUND[path.suffix], rate=48000, layout="mono")
            elif name == "cover":
                streams[name] = _add_video(container, "png", size, Fraction(1), Fraction(1), "rgb24", {})
                streams[name].disposition = Disposition.attached_pic
            else:
                shape = stored(np.zeros(size), orientation).shape
                streams[name] = _add_video(container, codec, shape, rate, base, pix_fmt, options or {})
        if decoy:
            streams["video"].disposition = Disposition.default
        if orientation != "upright":
            a, b, c, d = (65536 * v for v in MATRICES[orientation])
            streams["video"].set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        frames = [stored(picture(number, *size), orientation) for number in range(len(ticks))]
        packets = _pictures(streams["video"], frames, ticks, base)
        if cut:
            first = [i for i, packet in enumerate(packets) if packet.is_keyframe][cut]
            key, packets = packets[first].pts, packets[first:]
            ticks = [tick for tick in ticks if tick >= key]
        if decoy:
            packets += _pictures(streams["decoy"], white * len(ticks), ticks, base)
        if cover:
            packets += _pictures(streams["cover"], white, [0], Fraction(1))
        if sound:
            packets += _silence(streams["sound"], *sound)
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            container.mux(packet)
    origin = min([ticks[0] * base] + [p.pts * p.time_base for p in packets if p.stream.type == "audio"])
    numbers = range(len(frames) - len(ticks), len(frames))
    starts = [float(tick * base - origin) for tick in ticks]
    ends = (0.001, 2) if seconds is not None else (float(base),) * 2
    return Written(list(numbers), starts, starts[-1] + ends[0], starts[-1] + ends[1])


def wrong_frames(path: Path, written: Written, num_frames: int, backend: str, tolerance: float) -> list[str]:
    r"""Read a clip and describe each frame that is not the one on screen at its second, within `tolerance` seconds."""
    from dvr1_lite.video import read_clip

    clip, faults = read_clip(path, num_frames, backend=backend), []
    if not written.end - 2 * tolerance <= clip.duration <= written.latest_end + 2 * tolerance:
        faults.append(f"duration {clip.duration} for {written.end}")
    for k, (second, frame) in enumerate(zip(clip.seconds, clip.frames)):
        if abs(second - (k + 0.5) * clip.duration / num_frames) > 1e-6:
            faults.append(f"second {second} at {k} of {num_frames}")
        found = number_in(frame)
        if found is None or not written.on_screen(second - tolerance) <= found <= written.on_screen(second + tolerance):
            faults.append(f"{found} for {written.on_screen(second)} at {second:.4f} s")
    return faults


def random_clip(path_without_suffix: Path, seed: int) -> tuple[Path, Written, float, str]:
    r"""Write a random clip; return its path, what a player shows, the container's time resolution and a description."""
    rng = random.Random(seed)
    suffix, codecs, tolerance = rng.choice([
        (".mp4", "libx264 libx264 libx265 mpeg4 libsvtav1 libvpx-vp9", 1e-3), (".avi", "libx264 mpeg4 mjpeg", 1e-3),
        (".mkv", "libx264 libx264 libx265 mpeg4 mpeg2video ffv1 libvpx-vp9", 1.1e-3), (".gif", "gif", 1.1e-2),
        (".webm", "libvpx libvpx-vp9 libsvtav1", 1.1e-3), (".mov", "libx264 mpeg4 prores mjpeg", 1e-3),
        (".ts", "libx264 libx265 mpeg2video", 1e-3), (".mpg", "mpeg2video mpeg1video", 1e-3),
        (".wmv", "wmv2 msmpeg4v3", 1.1e-3), (".flv", "libx264 flv", 1.1e-3)])
    codec, count = rng.choice(codecs.split()), rng.randrange(20, 200)
    options = rng.choice([OPEN_GOP, CLOSED_GOP]).get(codec, {}) | {"g": str(rng.choice([1, 4, 10, 12, 25, 50, 250]))}
    if codec == "libx264" and rng.random() < 0.1:
        options = {"x264-params": "intra-refresh=1:keyint=20:bframes=0"}
    what = {"fps": rng.choice([25, 24, 30, 50, 60] if "mpeg" in codec else [4, 10, 23.976, 25, 29.97, 30, 60]),
            "size": (rng.choice([32, 48, 96, 100, 144]), rng.choice([32, 48, 80, 128, 160, 200, 256, 320])),
            "options": options, "count": count}
    if codec == "libx264" and rng.random() < 0.2:
        what["pix_fmt"] = rng.choice(["yuv444p", "yuv422p", "yuv420p10le", "yuvj420p"])
    if codec in ("libsvtav1", "libx265"):  # these encoders fail on small pictures
        what["size"] = (96, 160)
    if suffix in (".mp4", ".mov", ".mkv", ".webm") and codec != "mpeg2video" and rng.random() < 0.3:
        steps = [rng.choice([20, 40, 40, 50, 100, 400, 1500]) for _ in range(count)]
        what["seconds"], tolerance = [sum(steps[:i]) / 1000 for i in range(count)], 2e-3  # variable frame rate
    elif suffix not in (".avi", ".gif", ".wmv") and rng.random() < 0.25:
        what["start"] = rng.choice([0.4, 1.0, 2.0])
    if suffix in SOUND and suffix != ".webm" and rng.random() < 0.3:
        what["sound"] = (0.0, rng.choice([0.5, 2.0]))
        tolerance = max(tolerance, 0.02 if SOUND[suffix] == "mp2" else 0)
    if suffix in (".mp4", ".mov", ".mkv") and rng.random() < 0.3 and hasattr(av.VideoStream, "set_display_matrix"):
        what["orientation"] = rng.choice(list(MATRICES))
    if suffix in (".mp4", ".mkv") and rng.random() < 0.15:
        what["decoy"] = rng.choice(["first", "last"])
    if suffix in (".mkv", ".ts") and options.get("g") in ("4", "10", "12") and not what.get("sound"):
        what["cut"] = int(rng.random() < 0.3)
    path = path_without_suffix.with_suffix(suffix)
    return path, write(path, codec, **what), tolerance, f"seed {seed}: {suffix} {codec} {what}"


# How files of other kinds begin: Matroska, AVI, MPEG-TS, FLV, Ogg, GIF, ZIP, PNG, ELF, HTML.
BEGINNINGS = [b"\x1aE\xdf\xa3" + bytes(range(32)), b"RIFF\xff\xff\xff\x7fAVI LIST", (b"G@\0\x10" + b"\xff" * 184) * 3,
              b"FLV\x01\x05\0\0\0\x09\0\0\0\0", b"OggS\0\x02" + bytes(20), b"GIF89a\xff\xff\xff\xff\xf7\0\0",
              b"PK\x03\x04" + bytes(26), b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff\x08\x02\0\0\0",
              b"\x7fELF\x02\x01\x01", b"<!DOCTYPE html><html>"]
EXTREMES = [b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4), b"\x80" + bytes(3)]


def mutate(seed: int, whole: bytes) -> bytes:
    r"""Damage a file in one of seven ways, by the seed modulo 7: cut short, bits flipped, header bytes replaced, large
    numbers in the header, a piece removed, a piece inserted, another container's beginning or nothing at all."""
    rng, data, kind = random.Random(seed), bytearray(whole), seed % 7
    at, header = rng.randrange(len(data) - 8), rng.randrange(min(len(data) - 8, 1200))
    if kind == 1:
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    beginning = rng.choice(BEGINNINGS)
    begin, end, new = [
        (at, len(data), b""), (0, 0, b""), (header, header + 4, rng.randbytes(4)),
        (header, header + 4, rng.choice(EXTREMES)), (at, at + rng.randrange(1, 400), b""),
        (at, at, rng.randbytes(rng.randrange(1, 300))),
        (0, rng.choice([0, len(beginning), len(data)]), rng.choice([beginning, b""]))][kind]
    data[begin:end] = new
    return bytes(data)
