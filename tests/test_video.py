"""Clips, frames and patches: by hand, against transformers' processors, and with broken files."""

import json
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from dvr1_lite import video
from dvr1_lite.errors import ClipError
from dvr1_lite.video import frame_indices, patchify, probe_clip, read_clip, read_image, resize, write_clip

BACKENDS = ["pyav"] + ["decord"] * (video.decord is not None)
ROOT = Path(__file__).resolve().parents[1]


def moving_shapes(count: int = 16, height: int = 56, width: int = 56) -> np.ndarray:
    frames = np.full((count, height, width, 3), (228, 226, 220), np.uint8)
    for t in range(count):
        x = 2 + (2 * t) % (width - 18)
        frames[t, 10:24, x : x + 14] = (220, 30, 30)
        frames[t, 30:44, width - 16 - x : width - 2 - x] = (30, 60, 200)
    return frames


def grey_steps(count: int, size: int = 32) -> np.ndarray:
    """Frame i is flat grey with value 10 + i: what is decoded tells which frame it was."""
    return np.broadcast_to((10 + np.arange(count, dtype=np.uint8))[:, None, None, None], (count, size, size, 3)).copy()


def encode(path, frames, codec, *, fps=25, pix_fmt="yuv420p", options=None, **kwargs):
    """A clip as other software writes it: any container and codec."""
    with av.open(str(path), "w", **kwargs) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.codec_context.thread_count = 1
        stream.options = options or {}
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def clip_path(tmp_path):
    write_clip(tmp_path / "clip.mp4", moving_shapes(), 4)
    return tmp_path / "clip.mp4"


# Sampling and writing


def test_frame_indices_by_hand():
    assert frame_indices(16, 8) == [1, 3, 5, 7, 9, 11, 13, 15]
    assert frame_indices(10, 4) == [1, 3, 6, 8]  # 1.25, 3.75, 6.25, 8.75
    assert frame_indices(5, 5) == [0, 1, 2, 3, 4]
    assert frame_indices(7, 1) == [3]


def test_frame_indices_are_ascending_and_symmetric():
    for total in range(1, 50):
        for num_frames in range(1, total + 1):
            indices = frame_indices(total, num_frames)
            assert indices == sorted(set(indices)) and len(indices) == num_frames
            assert indices[0] >= 0 and indices[-1] < total
            assert abs(indices[0] - (total - 1 - indices[-1])) <= 1


@pytest.mark.parametrize("total, num_frames", [(4, 5), (4, 0), (0, 1)])
def test_frame_indices_refuse_more_frames_than_there_are(total, num_frames):
    with pytest.raises(ValueError, match="cannot sample"):
        frame_indices(total, num_frames)


def test_write_clip_is_deterministic_small_and_standard(clip_path, tmp_path):
    write_clip(tmp_path / "again.mp4", moving_shapes(), 4)
    data = clip_path.read_bytes()
    assert data == (tmp_path / "again.mp4").read_bytes()
    assert len(data) < 5000
    assert data.find(b"moov") < data.find(b"mdat"), "the index must stand first, for players that stream"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.mp4", "clip.mp4"], "no partial file may be left"
    with av.open(str(clip_path)) as container:
        assert len(container.streams) == 1
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt, codec.width, codec.height) == ("h264", "yuv444p", 56, 56)


@pytest.mark.parametrize("shape, dtype", [((2, 8, 8, 3), float), ((8, 8, 3), np.uint8), ((0, 8, 8, 3), np.uint8)])
def test_write_clip_refuses_other_arrays(tmp_path, shape, dtype):
    frames = np.zeros(shape, dtype)
    with pytest.raises(ValueError, match="uint8"):
        write_clip(tmp_path / "clip.mp4", frames, 4)
    assert not list(tmp_path.iterdir())


# Reading


@pytest.mark.parametrize("backend", BACKENDS)
def test_colours_and_times_survive_the_round_trip(clip_path, backend):
    clip = read_clip(clip_path, 8, backend=backend)
    truth = moving_shapes()[frame_indices(16, 8)].astype(float)
    decoded = clip.frames.permute(0, 2, 3, 1).numpy() * 255
    assert clip.frames.dtype == torch.float32 and clip.frames.shape == (8, 3, 56, 56)
    assert np.abs(decoded - truth).mean() < 1.5
    for t, x in zip(range(8), range(4, 36, 4)):  # the middle of the red square, away from its edges
        assert np.abs(decoded[t, 13:21, x + 4 : x + 9] - (220, 30, 30)).max() <= 5
    assert clip.seconds == pytest.approx([0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25, 3.75])
    assert (clip.duration, clip.fps, clip.path) == (pytest.approx(4.0), pytest.approx(2.0), str(clip_path))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name, codec, options",
    [
        ("a.mp4", "libx264", {"g": "12", "bf": "3"}),  # frames stored out of order
        ("a.mp4", "libx264", {"g": "300", "bf": "0"}),  # one keyframe only
        ("a.mkv", "libx264", {"g": "30"}),
        ("a.webm", "libvpx-vp9", {"g": "30", "deadline": "realtime", "cpu-used": "8"}),
        ("a.avi", "mpeg4", {"g": "12", "qmin": "1", "qmax": "2"}),
    ],
)
def test_the_right_frames_are_decoded(tmp_path, backend, name, codec, options):
    encode(tmp_path / name, grey_steps(200), codec, options=options)
    clip = read_clip(tmp_path / name, 16, backend=backend)
    indices = frame_indices(200, 16)
    levels = clip.frames.mean(dim=(1, 2, 3)) * 255 - 10
    assert np.abs(levels.numpy() - indices).max() < 2.5
    assert clip.seconds == pytest.approx([i / 25 for i in indices], abs=2e-3)
    assert clip.duration == pytest.approx(8.0, abs=0.05)


@pytest.mark.skipif("decord" not in BACKENDS, reason="decord has no wheel for this platform")
@pytest.mark.parametrize("options", [{"bf": "0"}, {"bf": "3", "g": "7"}])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p"])
def test_decord_and_pyav_agree(tmp_path, options, pix_fmt):
    path = encode(tmp_path / "a.mp4", moving_shapes(61), "libx264", fps=29.97, pix_fmt=pix_fmt, options=options)
    one, other = (read_clip(path, 13, backend=backend) for backend in BACKENDS)
    assert (one.frames - other.frames).abs().max() <= 1.001 / 255
    assert (one.seconds, one.fps, one.duration) == (other.seconds, other.fps, other.duration)
    assert one.duration == pytest.approx(61 / 29.97, rel=1e-3)


def test_pyav_stands_in_where_decord_is_missing(clip_path, monkeypatch):
    expected = read_clip(clip_path, 4, backend="pyav")
    monkeypatch.setattr(video, "decord", None)
    monkeypatch.setattr(video, "BACKEND", "pyav")
    assert torch.equal(read_clip(clip_path, 4).frames, expected.frames)
    with pytest.raises(ValueError, match="decord is not installed"):
        read_clip(clip_path, 4, backend="decord")
    with pytest.raises(ValueError, match="known: decord, pyav"):
        read_clip(clip_path, 4, backend="opencv")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_telephones_rotation_flag_is_honoured(clip_path, tmp_path, backend):
    data = clip_path.read_bytes()
    at = data.find(b"tkhd") + 44  # the track's display matrix
    turn = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 56 * 65536, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data[:at] + turn + data[at + 36 :])
    upright = read_clip(clip_path, 4, backend=backend).frames
    turned = read_clip(tmp_path / "turned.mp4", 4, backend=backend).frames
    assert torch.equal(turned, torch.rot90(upright, -1, dims=(2, 3)))  # clockwise


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_edit_list_cuts_frames_away(tmp_path, backend):
    """Cutting without re-encoding leaves frames in the file that must not be counted or shown."""
    write_clip(tmp_path / "a.mp4", grey_steps(16), 4)
    data = (tmp_path / "a.mp4").read_bytes()
    at = data.find(b"elst")  # version, flags, entries, duration (ms), media time, rate
    scale = struct.unpack(">I", data[data.find(b"mdhd") + 16 :][:4])[0]
    edit = data[: at + 16] + struct.pack(">i", 4 * scale // 4) + data[at + 20 :]
    (tmp_path / "cut.mp4").write_bytes(edit)
    probe = probe_clip(tmp_path / "cut.mp4")
    levels = read_clip(tmp_path / "cut.mp4", 3, backend=backend).frames.mean(dim=(1, 2, 3)) * 255 - 10
    expected = [4 + i for i in frame_indices(len(probe.starts), 3)]
    assert len(probe.starts) == 12 and np.abs(levels.numpy() - expected).max() < 2.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_read_clip_resizes(clip_path, backend):
    small = read_clip(clip_path, 2, (28, 42), backend=backend)
    whole = read_clip(clip_path, 2, backend=backend)
    assert small.frames.shape == (2, 3, 28, 42)
    assert torch.allclose(small.frames, resize(whole.frames, (28, 42)), atol=1e-6)


def test_resize_keeps_flat_pictures_and_the_range():
    flat = torch.full((2, 3, 9, 7), 0.3)
    assert torch.allclose(resize(flat, (14, 28)), torch.tensor(0.3), atol=1e-6)
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1
    assert resize(edge, (32, 32)).aminmax() == (0.0, 1.0)
    assert resize(edge, (8, 8)) is edge


def test_read_image_round_trip(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    frame = read_image(tmp_path / "a.png")
    assert np.array_equal((frame[0].permute(1, 2, 0) * 255).round().numpy(), pixels)
    assert read_image(tmp_path / "a.png", (28, 56)).shape == (1, 3, 28, 56)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").shape == (1, 3, 20, 30)


# Files that cannot be read


def sound_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def without_duration(path):
    write_clip(path, moving_shapes(), 4)
    data = path.read_bytes()
    at = data.find(b"stts") + 16  # one entry: 16 frames, each so long
    path.write_bytes(data[:at] + struct.pack(">I", 0) + data[at + 4 :])


def absurdly_fast(path):
    without_duration(path)
    data = path.read_bytes()
    at = data.find(b"stts") + 16
    path.write_bytes(data[:at] + struct.pack(">I", 1) + data[at + 4 :])


def truncated(path, share):
    write_clip(path, moving_shapes(), 4)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


BROKEN = {
    "missing": (lambda path: None, "no such file"),
    "folder": (lambda path: path.mkdir(), "not a file"),
    "empty": (lambda path: path.touch(), "0 bytes"),
    "text": (lambda path: path.write_text("This is no video. " * 50), "not a readable video"),
    "binary": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "not a readable video"),
    "zip": (lambda path: path.write_bytes(b"PK\3\4" + bytes(3000)), "not a readable video"),
    "sound": (sound_only, "holds no video"),
    "no duration": (without_duration, "no duration"),
    "one tick a frame": (absurdly_fast, "no duration"),
    "three quarters": (lambda path: truncated(path, 0.75), "truncated"),
    "last byte lost": (lambda path: truncated(path, 0.9999), "truncated"),
    "header only": (lambda path: truncated(path, 0.3), "encode it again"),
    "short": (lambda path: write_clip(path, moving_shapes(5), 4), "has 5 frames but 8 are asked for; sample at most 5"),
    "playlist": (lambda path: path.write_text("ffconcat version 1.0\nfile other.mp4\n"), "not a readable video"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_clips_are_named_errors(tmp_path, capfd, backend, kind):
    make, message = BROKEN[kind]
    write_clip(tmp_path / "other.mp4", moving_shapes(), 4)
    path = tmp_path / "clip.mp4"
    make(path)
    with pytest.raises(ClipError) as caught:
        read_clip(path, 8, backend=backend)
    text = str(caught.value)
    assert text.startswith(str(path)) and message in text and "; " in text, text
    assert "\n" not in text and "Errno" not in text and "/src/" not in text
    assert capfd.readouterr().err == "", "decoders must not write to the terminal"


def test_truncation_anywhere_is_found(clip_path, tmp_path):
    data = clip_path.read_bytes()
    short = tmp_path / "short.mp4"
    for length in range(0, len(data), 13):
        short.write_bytes(data[:length])
        with pytest.raises(ClipError):
            probe_clip(short)


def test_bad_names_are_named_errors(tmp_path):
    for name in ("a\0b.mp4", "x" * 5000, "clip.mp4/inside"):
        (tmp_path / "clip.mp4").touch()
        with pytest.raises(ClipError, match="no such file"):
            read_clip(tmp_path / name, 4)


@pytest.mark.parametrize(
    "content, message",
    [(None, "no such file"), (b"", "0 bytes"), (b"%!PS-Adobe-3.0 EPSF\n" * 9, "not a readable picture"),
     (b"\x89PNG\r\n\x1a\n" + bytes(99), "not a readable picture")],
)
def test_broken_pictures_are_named_errors(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ClipError, match=message):
        read_image(tmp_path / "a.png")


def test_a_picture_with_an_absurd_size_is_refused(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 1000)
    with pytest.raises(ClipError, match="64 x 64"):
        read_image(tmp_path / "a.png")


def test_a_video_with_an_absurd_size_is_refused(clip_path, monkeypatch):
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 1000)
    with pytest.raises(ClipError, match="56 x 56"):
        read_clip(clip_path, 8)


def read_mutated(source: Path, first: int, count: int, seconds: float) -> list:
    """In a process of its own: a decoder that crashes or hangs must not take the tests with it."""
    program = ROOT / "tests" / "mutate_clips.py"
    command = [sys.executable, str(program), str(source), str(first), str(count), ",".join(BACKENDS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_mutated(results: list, count: int):
    assert len(results) == count * len(BACKENDS)
    assert {result for _, _, result, _ in results} == {"read", "refused"}
    assert max(seconds for *_, seconds in results) < 10


def test_mutated_clips_are_read_or_refused(clip_path):
    check_mutated(read_mutated(clip_path, 0, 60, 120), 60)


@pytest.mark.slow
def test_many_mutated_clips_are_read_or_refused(clip_path, tmp_path):
    encode(tmp_path / "reordered.mp4", moving_shapes(40), "libx264", options={"g": "8", "bf": "2"})
    for source in (clip_path, tmp_path / "reordered.mp4"):
        for first in range(0, 1200, 400):
            check_mutated(read_mutated(source, first, 400, 400), 400)


# Patches


def test_patch_layout_by_hand():
    """Two frames of 4 x 8 pixels, patches of 2 x 2, blocks of 2 x 2 patches: a pixel's value is its address."""
    frames = torch.zeros(2, 3, 4, 8)
    for t in range(2):
        for c in range(3):
            for y in range(4):
                for x in range(8):
                    frames[t, c, y, x] = 1000 * t + 100 * c + 10 * y + x
    patches, grid = patchify(frames, 2, 2, 2, mean=(0, 0, 0), std=(1, 1, 1))
    assert grid.tolist() == [1, 2, 4] and patches.shape == (8, 24)
    # within a patch: colour, then time, then row, then column
    assert patches[0].tolist() == [0, 1, 10, 11, 1000, 1001, 1010, 1011,
                                   100, 101, 110, 111, 1100, 1101, 1110, 1111,
                                   200, 201, 210, 211, 1200, 1201, 1210, 1211]
    # the first four patches are the left block (row by row), the next four the right block
    assert patches[:, 0].tolist() == [0, 2, 20, 22, 4, 6, 24, 26]


def test_patches_are_normalised_per_colour():
    frames = torch.tensor([0.2, 0.5, 0.8]).view(1, 3, 1, 1).expand(2, 3, 28, 28)
    patches, _ = patchify(frames, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    values = patches[0].view(3, -1)
    assert torch.allclose(values, torch.tensor([0.2, 1.2, 0.25])[:, None].expand_as(values))


def test_odd_frames_repeat_the_last_one_and_an_image_is_one_frame():
    frames = torch.rand(5, 3, 28, 56)
    patches, grid = patchify(frames)
    padded, _ = patchify(torch.cat([frames, frames[-1:]]))
    assert grid.tolist() == [3, 2, 4] and torch.equal(patches, padded)
    image, image_grid = patchify(frames[:1])
    twice, _ = patchify(frames[[0, 0]])
    assert image_grid.tolist() == [1, 2, 4] and torch.equal(image, twice)
    long, long_grid = patchify(frames, temporal_patch_size=4)
    assert long_grid.tolist() == [2, 2, 4] and long.shape == (16, 3 * 4 * 196)


def test_frames_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="28 pixels"):
        patchify(torch.rand(2, 3, 56, 70))


@pytest.mark.parametrize("height, width", [(56, 56), (252, 252), (56, 84), (140, 28)])
def test_patches_equal_transformers_image_processor(height, width):
    processing = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processor = processing.Qwen2VLImageProcessorPil(do_resize=False)
    pixels = np.random.default_rng(height).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    expected = processor(images=list(pixels), return_tensors="pt")
    frames = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    patches, grid = patchify(frames.repeat_interleave(2, dim=0))  # each picture is shown for two frames
    assert torch.equal(patches, expected["pixel_values"])
    assert expected["image_grid_thw"].tolist() == [[1, height // 14, width // 14]] * 3
    assert grid.tolist() == [3, height // 14, width // 14]
    one, one_grid = patchify(frames[:1])
    assert torch.equal(one, expected["pixel_values"][: len(one)])
    assert torch.equal(one_grid, expected["image_grid_thw"][0])


@pytest.mark.parametrize("count, height, width", [(4, 56, 56), (5, 56, 84), (16, 252, 252), (1, 56, 56)])
def test_patches_equal_transformers_video_processor(count, height, width):
    try:  # needs torchvision, which this project does not install
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"transformers' video processor cannot be imported: {error}")
    processor = Qwen2VLVideoProcessor(do_resize=False, do_sample_frames=False, cap_pixels_per_frame=False)
    pixels = np.random.default_rng(count).integers(0, 256, (count, 3, height, width), dtype=np.uint8)
    expected = processor(videos=[torch.from_numpy(pixels)], return_tensors="pt")
    patches, grid = patchify(torch.from_numpy(pixels).float() / 255)
    assert torch.equal(grid, expected["video_grid_thw"][0])
    assert torch.allclose(patches, expected["pixel_values_videos"], atol=1e-5)
