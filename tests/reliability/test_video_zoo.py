r"""Clips of many kinds, broken clips and hanging decoders: the frames that are read, or the error that is raised."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import av
import clip_zoo
import numpy as np
import pytest
import torch
from clip_zoo import CLOSED_GOP, MATRICES, OPEN_GOP, number_in, write, wrong_frames
from PIL import Image

from dvr1_lite import decoding
from dvr1_lite.decoding import probe_clip
from dvr1_lite.errors import ClipError
from dvr1_lite.toy.clips import write_clip
from dvr1_lite.video import read_clip

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ["pyav"] + ["decord"] * (decoding.decord is not None)
VARIABLE = [0.0, 0.04, 0.08, 0.1, 0.5, 2.0, 2.02, 2.04, 2.1, 4.0, 4.5, 4.54, 4.58, 4.6, 4.7, 6.2, 6.24, 6.3, 6.36, 6.4]

# name: (file, codec, further arguments of clip_zoo.write)
ZOO = {f"{gop} gop, {codec} in {suffix}": (f"a{suffix}", codec, {"options": options.get(codec, {}) | {"g": "12"}})
       for gop, options in (("closed", CLOSED_GOP), ("open", OPEN_GOP))
       for codec, suffixes in {"libx264": ".mp4 .mov .mkv .flv .avi .ts", "libx265": ".mp4 .mkv .ts",
                               "mpeg4": ".mp4 .avi", "mpeg2video": ".mkv .ts .mpg"}.items()
       for suffix in suffixes.split()}
ZOO |= {f"{codec} in {suffix}": (f"a{suffix}", codec, {"options": {"g": "12"}})
        for suffix, codec in [(".webm", "libvpx"), (".webm", "libvpx-vp9"), (".mp4", "libvpx-vp9"), (".gif", "gif"),
                              (".mp4", "libsvtav1"), (".webm", "libsvtav1"), (".wmv", "wmv2"), (".mov", "prores"),
                              (".avi", "mjpeg"), (".mkv", "ffv1"), (".mpg", "mpeg1video"), (".flv", "flv")]}
ZOO |= {f"variable frame rate, {codec} in {suffix}": (f"a{suffix}", codec, {
            "seconds": VARIABLE, "options": CLOSED_GOP.get(codec, {})})
        for suffix, codec in [(".mp4", "libx264"), (".mkv", "libx264"), (".webm", "libvpx-vp9"), (".mp4", "libx265")]}
ZOO |= {f"cut inside an open group, {codec} in {suffix}": (f"a{suffix}", codec, {
            "cut": 2, "options": OPEN_GOP[codec] | {"g": "12"}})
        for suffix, codec in [(".mkv", "libx264"), (".mkv", "libx265"), (".ts", "libx265"), (".ts", "mpeg2video")]}
ZOO |= {f"{name} in {suffix}": (f"a{suffix}", "mpeg1video" if suffix == ".mpg" else "libx264", what)
        for name, suffixes, what in [
            *((f"{fps} fps", (".mp4", ".mkv", ".avi", ".ts"), {"fps": fps, "count": 40})
              for fps in (1, 23.976, 29.97, 60)),
            *((orientation, (".mp4", ".mkv"), {"orientation": orientation, "count": 30}) for orientation in MATRICES),
            *((f"width {width}", (".mp4",), {"size": (66, width), "pix_fmt": "yuv444p", "options": {"crf": "0"}})
              for width in (10, 12, 16, 24, 48, 56, 72, 127, 128, 130)),
            *((f"{kind} {place}", suffixes, {kind: place}) for kind, suffixes in (
                ("cover", (".mp4",)), ("decoy", (".mp4", ".mkv"))) for place in ("first", "last")),
            ("late start", (".mp4", ".mkv", ".ts", ".flv"), {"start": 2.0}),
            ("sound first", (".mp4", ".mov", ".mkv", ".ts", ".mpg"), {"start": 2.0, "sound": (0.0, 3.0)}),
            ("sound from the start", (".mp4", ".mkv", ".avi"), {"sound": (0.0, 1.0)}),
            ("intra refresh", (".mkv",), {"options": {"x264-params": "intra-refresh=1:keyint=20:bframes=0"}}),
            ("10 bit", (".mp4",), {"pix_fmt": "yuv420p10le", "options": {"g": "12"}})] for suffix in suffixes}
TOLERANCE = {".mkv": 1.1e-3, ".webm": 1.1e-3, ".flv": 1.1e-3, ".wmv": 1.1e-3, ".gif": 1.1e-2}  # clocks that round


@pytest.fixture
def clip_path(tmp_path):
    write(tmp_path / "clip.mp4", count=16, fps=4)
    return tmp_path / "clip.mp4"


def assert_readable(path: Path) -> None:
    assert [number_in(frame) for frame in read_clip(path, 8).frames] == [1, 3, 5, 7, 9, 11, 13, 15]


# The frames that are read


@pytest.mark.parametrize("kind", ZOO)
def test_each_kind_of_clip_gives_the_frames_on_screen(tmp_path, kind):
    name, codec, what = ZOO[kind]
    if "orientation" in what and not hasattr(av.VideoStream, "set_display_matrix"):
        pytest.skip("this version of PyAV does not write display matrices")
    written = write(tmp_path / name, codec, **what)
    tolerance = 2e-3 if "seconds" in what else TOLERANCE.get(Path(name).suffix, 1e-4)
    if "sound" in what and name.endswith((".ts", ".mpg")):
        tolerance = 0.02  # these sound codecs start a little before their first sample
    for backend in BACKENDS:
        for num_frames in (1, 7, 16):
            assert wrong_frames(tmp_path / name, written, num_frames, backend, tolerance) == []


@pytest.mark.parametrize("kind, decord_reads", [
    *((kind, True) for kind in ("closed gop, libx264 in .mp4", "closed gop, libx264 in .mov", "width 128 in .mp4",
                                "closed gop, libx264 in .mkv", "libvpx in .webm", "libvpx-vp9 in .webm")),
    *((kind, False) for kind in ZOO if kind.startswith("open gop")),
    *((kind, False) for kind in ("closed gop, libx264 in .flv", "closed gop, libx264 in .ts", "width 127 in .mp4",
                                 "closed gop, libx265 in .mp4", "closed gop, mpeg4 in .avi", "wmv2 in .wmv",
                                 "intra refresh in .mkv", "10 bit in .mp4", "sound first in .mp4",
                                 "cover last in .mp4"))])
def test_decord_reads_only_kinds_that_it_reads_correctly(tmp_path, kind, decord_reads):
    name, codec, what = ZOO[kind]
    write(tmp_path / name, codec, **what)
    assert decoding._scan(str(tmp_path / name)).decord == decord_reads


@pytest.mark.skipif("decord" not in BACKENDS, reason="decord has no wheel for this platform")
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuvj420p"])
def test_decord_and_pyav_give_the_same_colours(tmp_path, pix_fmt):
    frames = np.random.default_rng(0).integers(0, 256, (40, 6, 10, 3), np.uint8).repeat(16, 1).repeat(16, 2)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt, stream.options = 96, 160, pix_fmt, {"g": "9"}
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    assert decoding._scan(str(tmp_path / "a.mp4")).decord
    one, other = (read_clip(tmp_path / "a.mp4", 13, backend=backend).frames for backend in BACKENDS)
    assert (one - other).abs().max() <= 1.001 / 255


@pytest.mark.parametrize("width", [2, 4, 6, 8])
def test_the_smallest_widths_are_read(tmp_path, width):
    levels = np.arange(10, 170, 10, dtype=np.uint8)
    write_clip(tmp_path / "a.mp4", np.broadcast_to(levels[:, None, None, None], (16, 64, width, 3)), 4, crf=0)
    clip = read_clip(tmp_path / "a.mp4", 8)
    assert torch.allclose(clip.frames.mean((1, 2, 3)) * 255, torch.from_numpy(levels[1::2]).float(), atol=2)


def test_transparent_parts_of_an_animation_are_shown_on_white(tmp_path):
    pictures = [Image.new("RGBA", (40, 40), (0, 0, 0, 0)) for _ in range(4)]
    for x, picture in enumerate(pictures):
        picture.paste((255, 0, 0, 255), (10 * x, 0, 10 * x + 10, 40))
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=100, disposal=2)
    for x, frame in enumerate(read_clip(tmp_path / "a.gif", 4).frames):
        red = frame[0] - frame[1] > 0.5
        assert red[:, 10 * x : 10 * x + 10].all() and red.sum() == 400 and frame[:, ~red].min() > 0.95


@pytest.mark.slow
def test_no_wrong_frame_in_many_random_clips(tmp_path):
    frames, faults = 0, []
    for seed in range(320):
        path, written, tolerance, description = clip_zoo.random_clip(tmp_path / "clip", seed)
        for backend in BACKENDS:
            for num_frames in (1, 5, 8, min(16, len(written.numbers))):
                frames += num_frames
                found = wrong_frames(path, written, num_frames, backend, tolerance)
                faults += [f"{description}, {backend}: {fault}" for fault in found]
        path.unlink()
    print(f"{len(faults)} wrong of {frames} frames")
    assert not faults, faults[:10]


# Broken files


@pytest.mark.parametrize("name, codec", [("a.mkv", "libx264"), ("a.webm", "libvpx"), ("a.avi", "mpeg4"),
                                         ("a.264", "libx264")])  # a stream without container has no times
@pytest.mark.parametrize("share", [0.3, 0.7, 0.99, 0.9999])
def test_a_truncated_clip_is_named(tmp_path, name, codec, share):
    write(tmp_path / name, codec)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ClipError, match="truncated|no duration"):
        read_clip(tmp_path / name, 8)


def read_mutated(source: Path, seeds: range) -> dict[str, int]:
    """Every damaged copy must be read or refused with an error that names it, in time."""
    outcomes, path, whole = {}, source.with_name("mutated" + source.suffix), source.read_bytes()
    for seed in seeds:
        path.write_bytes(clip_zoo.mutate(seed, whole))
        for backend in BACKENDS:
            began, outcome = time.monotonic(), "read"
            try:
                clip = read_clip(path, 8, (56, 56), backend=backend, timeout=10)
                assert clip.frames.shape == (8, 3, 56, 56) and clip.frames.isfinite().all()
            except ClipError as error:
                assert str(error).startswith(str(path)) and "; " in str(error)
                outcome = "crashed" if "crashed" in str(error) else "refused"
            assert time.monotonic() - began < 9, f"seed {seed}"
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes


@pytest.mark.parametrize("name, seeds", [("a.mp4", 60), *(pytest.param(f"a.{kind}", 1200, marks=pytest.mark.slow)
                                                          for kind in ("mp4", "mkv", "avi", "webm"))])
def test_damaged_clips_are_read_or_refused(tmp_path, name, seeds):
    write(tmp_path / name, "libvpx" if name.endswith("webm") else "libx264", count=40)
    outcomes = read_mutated(tmp_path / name, range(seeds))
    print(name, outcomes)
    assert outcomes["read"] and outcomes["refused"] and (seeds > 60 or not outcomes.get("crashed"))


# The worker process


def worker_with(monkeypatch, decode: str) -> None:
    """Start workers whose decoder runs the expression `decode` instead."""
    decoding._stop_worker()
    program = ("import faulthandler, re; from dvr1_lite import decoding\n"
               f"decoding._decode = lambda *_: {decode}; decoding.serve()")
    monkeypatch.setattr(decoding, "WORKER", [sys.executable, "-c", program])


def test_a_hanging_decoder_is_ended_and_the_next_clip_is_read(clip_path, monkeypatch):
    worker_with(monkeypatch, "re.match('(a+)+b', 'a' * 99)")  # never returns, and never lets another thread run
    process, began = decoding._running_worker(), time.monotonic()
    with pytest.raises(ClipError, match="did not finish within 1 s; encode it again, or raise decode_timeout"):
        read_clip(clip_path, 8, timeout=1)
    assert time.monotonic() - began < 6 and process.returncode is not None, "the process must have ended"
    monkeypatch.undo()
    assert_readable(clip_path)


def test_a_crashing_decoder_is_a_named_error_and_the_next_clip_is_read(clip_path, monkeypatch):
    worker_with(monkeypatch, "faulthandler._sigsegv()")
    with pytest.raises(ClipError, match=f"{clip_path.name}: the decoder crashed .exit status .*; encode it again"):
        read_clip(clip_path, 8)
    monkeypatch.undo()
    assert_readable(clip_path)


def test_a_worker_that_is_interrupted_or_killed_is_replaced(clip_path):
    def interrupt(frame):
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            decoding.read_frames(clip_path, [1, 3, 5], interrupt)
        assert_readable(clip_path)
    decoding._worker.kill()  # between two clips
    decoding._worker.wait()
    assert_readable(clip_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_forked_process_uses_its_own_worker(clip_path):
    expected = decoding.read_frames(clip_path, [1, 7, 13], np.copy)

    def read() -> None:  # without torch, whose threads do not survive a fork
        np.testing.assert_array_equal(decoding.read_frames(clip_path, [1, 7, 13], np.copy), expected)

    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=read) for _ in range(3)]
    for child in children:
        child.start()
    for _ in range(20):
        assert_readable(clip_path)
    for child in children:
        child.join(60)
        assert child.exitcode == 0


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_a_worker_ends_with_its_caller(clip_path):
    """From a folder with a module of a needed name, as notebooks and scripts are started."""
    (clip_path.parent / "av.py").write_text("raise RuntimeError('the wrong av')")
    program = (f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from dvr1_lite import decoding\n"
               "decoding.probe_clip('clip.mp4'); print(decoding._worker.pid, flush=True); os.kill(os.getpid(), 9)")
    done = subprocess.run([sys.executable, "-P", "-c", program], cwd=clip_path.parent, capture_output=True, text=True)
    worker = Path("/proc") / done.stdout.strip()
    assert done.returncode == -9 and done.stdout.strip(), done.stderr
    for _ in range(100):
        if not worker.exists() or "(zombie)" in (worker / "status").read_text():
            return
        time.sleep(0.1)
    pytest.fail("the worker is still running")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_probing_a_large_clip_takes_little_memory(tmp_path, clip_path):
    def peak_mb() -> float:
        status = Path(f"/proc/{decoding._worker.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024

    write(tmp_path / "large.avi", "rawvideo", count=40, size=(1080, 1920), pix_fmt="yuv420p")
    decoding._stop_worker()
    probe_clip(clip_path)
    before = peak_mb()
    assert len(probe_clip(tmp_path / "large.avi").starts) == 40
    assert (tmp_path / "large.avi").stat().st_size > 100e6 and peak_mb() - before < 30
