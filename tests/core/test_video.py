r"""Clips, pictures and patches: sampling in time by hand, files that cannot be read, patches against transformers."""

import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from dvr1_lite import decoding, video
from dvr1_lite.errors import ClipError, ConfigError
from dvr1_lite.toy.clips import write_clip
from dvr1_lite.video import patchify, read_clip, read_image, resize

BACKENDS = ["pyav"] + ["decord"] * (decoding.decord is not None)


def moving_shapes(count: int = 16) -> np.ndarray:
    r"""Draw frames of 56 x 56: a red square that moves right by two pixels a frame, above a blue one."""
    frames = np.full((count, 56, 56, 3), (228, 226, 220), np.uint8)
    for t in range(count):
        frames[t, 10:24, 2 + 2 * t : 16 + 2 * t] = (220, 30, 30)
    frames[:, 30:44, 20:34] = (30, 60, 200)
    return frames


def grey_steps(count: int, size: int = 32) -> np.ndarray:
    r"""Draw flat grey frames: frame i has the value 10 + 4 i."""
    values = 10 + 4 * np.arange(count, dtype=np.uint8)
    return np.broadcast_to(values[:, None, None, None], (count, size, size, 3)).copy()


def numbers(clip) -> list[int]:
    r"""Read back which frames of `grey_steps` a clip holds."""
    return ((clip.frames.mean(dim=(1, 2, 3)) * 255 - 10) / 4).round().int().tolist()


@pytest.fixture
def clip_path(tmp_path):
    write_clip(tmp_path / "clip.mp4", moving_shapes(), 4)
    return tmp_path / "clip.mp4"


# Sampling in time


@pytest.mark.parametrize("total, num_frames, expected", [
    (16, 8, [1, 3, 5, 7, 9, 11, 13, 15]), (10, 4, [1, 3, 6, 8]), (5, 5, [0, 1, 2, 3, 4]), (7, 1, [3])])
def test_the_middle_of_each_stretch_is_sampled(tmp_path, total, num_frames, expected):
    write_clip(tmp_path / "a.mp4", grey_steps(total), 4)
    clip = read_clip(tmp_path / "a.mp4", num_frames)
    assert numbers(clip) == expected
    assert clip.seconds == pytest.approx([(k + 0.5) * total / 4 / num_frames for k in range(num_frames)])
    assert (clip.duration, clip.fps) == (pytest.approx(total / 4), pytest.approx(num_frames / (total / 4)))


def test_frames_are_sampled_in_time_when_the_frame_rate_varies(tmp_path):
    """Frames 0 to 5 pass within 0.6 s, then frame 6 stays until 9.0 s, when frame 7 appears."""
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt, stream.options = 32, 32, "yuv444p", {"bf": "0"}
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for pixels, start in zip(grey_steps(9), [0, 100, 200, 300, 400, 500, 600, 9000, 9960]):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = start, stream.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clip = read_clip(tmp_path / "a.mp4", 4)
    assert clip.duration == pytest.approx(10.0, abs=0.01)  # a frame of a clip at 25 fps lasts 0.04 s
    assert clip.seconds == pytest.approx([1.25, 3.75, 6.25, 8.75], abs=0.01)
    assert numbers(clip) == [6, 6, 6, 6]
    assert numbers(read_clip(tmp_path / "a.mp4", 9)) == [5, 6, 6, 6, 6, 6, 6, 6, 7]  # at 0.56, 1.67, ..., 8.33, 9.44 s


@pytest.mark.parametrize("backend", BACKENDS)
def test_colours_and_times_survive_the_round_trip(clip_path, backend):
    clip = read_clip(clip_path, 8, backend=backend)
    decoded = clip.frames.permute(0, 2, 3, 1).numpy() * 255
    assert clip.frames.dtype == torch.float32 and clip.frames.shape == (8, 3, 56, 56)
    assert np.abs(decoded - moving_shapes()[1::2]).mean() < 1.5
    for t, x in zip(range(8), range(4, 36, 4)):  # the middle of the red square, away from its edges
        assert np.abs(decoded[t, 13:21, x + 4 : x + 9] - (220, 30, 30)).max() <= 5
    small = read_clip(clip_path, 8, (28, 42), backend=backend)
    assert torch.allclose(small.frames, resize(clip.frames, (28, 42)), atol=1e-6) and clip.path == str(clip_path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_edit_list_cuts_frames_away(tmp_path, backend):
    """Cutting without encoding again leaves frames in the file that must not be counted or shown."""
    write_clip(tmp_path / "a.mp4", grey_steps(16, 160), 4)
    data = (tmp_path / "a.mp4").read_bytes()
    at = data.find(b"elst")  # version, flags, entries, duration (ms), media time, rate
    scale = struct.unpack(">I", data[data.find(b"mdhd") + 16 :][:4])[0]
    (tmp_path / "cut.mp4").write_bytes(data[: at + 16] + struct.pack(">i", 4 * scale // 4) + data[at + 20 :])
    assert numbers(read_clip(tmp_path / "cut.mp4", 3, backend=backend)) == [6, 10, 14]  # of the frames 4 to 15


def test_pyav_reads_every_clip_where_decord_is_missing(tmp_path, monkeypatch):
    write_clip(tmp_path / "a.mp4", grey_steps(16, 160), 4)
    monkeypatch.setattr(decoding, "decord", None)
    assert numbers(read_clip(tmp_path / "a.mp4", 8)) == [1, 3, 5, 7, 9, 11, 13, 15]
    with pytest.raises(ConfigError, match="decord is not installed"):
        read_clip(tmp_path / "a.mp4", 4, backend="decord")


def test_resize_keeps_flat_pictures_and_the_range():
    flat = torch.full((2, 3, 9, 7), 0.3)
    assert torch.allclose(resize(flat, (14, 28)), torch.tensor(0.3), atol=1e-6)
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1
    assert resize(edge, (32, 32)).aminmax() == (0.0, 1.0)
    assert resize(edge, (8, 8)) is edge


# Pictures


def test_read_image_round_trip(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    frame = read_image(tmp_path / "a.png")
    assert np.array_equal((frame[0].permute(1, 2, 0) * 255).round().numpy(), pixels)
    assert read_image(tmp_path / "a.png", (28, 56)).shape == (1, 3, 28, 56)


@pytest.mark.parametrize("flag, corner", [(1, (0, 0)), (2, (0, -1)), (3, (-1, -1)), (4, (-1, 0)), (5, (0, 0)),
                                          (6, (0, -1)), (7, (-1, -1)), (8, (-1, 0))])
def test_an_exif_flag_turns_a_picture_upright(tmp_path, flag, corner):
    """The EXIF standard says where the stored first row and column belong; `corner` is where the two meet."""
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:5, :5] = 255
    exif = Image.Exif()
    exif[0x0112] = flag
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    frame = read_image(tmp_path / "a.png")[0]
    assert frame.shape == ((3, 20, 30) if flag < 5 else (3, 30, 20))
    assert frame[:, corner[0], corner[1]].min() == 1 and frame.sum() == 3 * 25


@pytest.mark.parametrize("mode, pixel, shown", [
    ("RGBA", (200, 0, 0, 0), (255, 255, 255)), ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
    ("LA", (0, 51), (204, 204, 204)), ("P", 1, (255, 255, 255))])
def test_transparency_is_shown_on_white(tmp_path, mode, pixel, shown):
    picture = Image.new(mode, (4, 4), pixel)
    if mode == "P":
        picture.putpalette([0, 0, 0, 10, 20, 30])
    picture.save(tmp_path / "a.png", **({"transparency": 1} if mode == "P" else {}))
    assert (read_image(tmp_path / "a.png")[0, :, 0, 0] * 255).round().tolist() == list(shown)


def test_16_bit_grey_keeps_its_full_range(tmp_path):
    values = np.array([[0, 1000, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    frame = read_image(tmp_path / "a.png")
    assert torch.allclose(frame[0, :, 0], torch.tensor([0, 1000 / 65535, 32768 / 65535, 1]).expand(3, 4), atol=1e-6)


@pytest.mark.parametrize("content, message", [
    (None, "no such file"), (b"", "0 bytes"), (b"%!PS-Adobe-3.0 EPSF\n" * 9, "not a readable picture"),
    (b"\x89PNG\r\n\x1a\n" + bytes(99), "not a readable picture"), ("a", "64 x 64")])
def test_broken_pictures_are_named_errors(tmp_path, monkeypatch, content, message):
    if content == "a":  # an absurd size
        Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
        monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 1000)
    elif content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ClipError, match=message):
        read_image(tmp_path / "a.png")


# Clips that cannot be read


def sound_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def damaged(path, share: float = 1, **header: int):
    """A clip cut off after a share of its bytes, or with a number of its mp4 header replaced."""
    write_clip(path, moving_shapes(), 4)
    data = bytearray(path.read_bytes())
    for name, value in header.items():
        at = data.find(name.encode()) + 16
        data[at : at + 4] = struct.pack(">I", value)
    path.write_bytes(data[: int(len(data) * share)])


BROKEN = {
    "missing": (lambda path: None, "no such file"),
    "folder": (lambda path: path.mkdir(), "not a file"),
    "empty": (lambda path: path.touch(), "0 bytes"),
    "text": (lambda path: path.write_text("This is no video. " * 50), "not a readable video"),
    "zip": (lambda path: path.write_bytes(b"PK\3\4" + bytes(3000)), "not a readable video"),
    "jpg": (lambda path: Image.new("RGB", (64, 64)).save(path, "JPEG"), "it is a picture, not a video"),
    "webp": (lambda path: Image.new("RGB", (64, 64)).save(path, "WEBP"), "it is a picture, not a video"),
    "sound": (sound_only, "holds no video"),
    "no duration": (lambda path: damaged(path, stts=0), "no duration"),
    "one tick a frame": (lambda path: damaged(path, stts=1), "no duration"),
    "three quarters": (lambda path: damaged(path, 0.75), "truncated"),
    "last byte lost": (lambda path: damaged(path, 0.9999), "truncated"),
    "header only": (lambda path: damaged(path, 0.3), "encode it again"),
    "short": (lambda path: write_clip(path, moving_shapes(5), 4), "has 5 frames but 8 are asked for; sample at most 5"),
    "playlist": (lambda path: path.write_text("ffconcat version 1.0\nfile other.mp4\n"), "not a readable video"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_clips_are_named_errors(tmp_path, capfd, kind):
    make, message = BROKEN[kind]
    write_clip(tmp_path / "other.mp4", moving_shapes(), 4)
    path = tmp_path / "clip.mp4"
    make(path)
    with pytest.raises(ClipError) as caught:
        read_clip(path, 8)
    text = str(caught.value)
    assert text.startswith(str(path)) and message in text and "; " in text, text
    assert "\n" not in text and "Errno" not in text and "/src/" not in text
    assert capfd.readouterr().err == "", "decoders must not write to the terminal"


def test_a_video_with_an_absurd_size_is_refused(clip_path, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_FRAME_PIXELS", 1000)
    with pytest.raises(ClipError, match="56 x 56"):
        decoding._scan(str(clip_path))


def test_truncation_anywhere_is_found(clip_path, tmp_path):
    data = clip_path.read_bytes()
    short = tmp_path / "short.mp4"
    for length in range(0, len(data), 13):
        short.write_bytes(data[:length])
        with pytest.raises(ClipError):
            read_clip(short, 8)


@pytest.mark.parametrize("name", ["a\0b.mp4", "x" * 5000, "clip.mp4/inside"])
def test_names_that_are_no_file_are_named_errors(clip_path, name):
    with pytest.raises(ClipError, match="no such file"):
        read_clip(clip_path.parent / name, 4)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no colons in file names")
@pytest.mark.parametrize("name", ["Title: x.mp4", "file:clip.mp4", "http:/a.mp4", "concat:a|b.mp4", "%d.mp4", "-i.mp4"])
def test_a_path_is_never_taken_for_a_url(clip_path, monkeypatch, name):
    monkeypatch.chdir(clip_path.parent)
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    clip_path.rename(name)
    assert len(read_clip(name, 8).frames) == 8


# Patches


def test_patch_layout_by_hand():
    """Two frames of 4 x 8 pixels, patches of 2 x 2, blocks of 2 x 2 patches: a pixel's value is its address."""
    t, c, y, x = torch.meshgrid(*(torch.arange(n) for n in (2, 3, 4, 8)), indexing="ij")
    patches, grid = patchify(1000 * t + 100 * c + 10 * y + x, 2, 2, 2, mean=(0, 0, 0), std=(1, 1, 1))
    assert grid.tolist() == [1, 2, 4] and patches.shape == (8, 24)
    # within a patch: colour, then time, then row, then column
    assert patches[0].tolist() == [0, 1, 10, 11, 1000, 1001, 1010, 1011,
                                   100, 101, 110, 111, 1100, 1101, 1110, 1111,
                                   200, 201, 210, 211, 1200, 1201, 1210, 1211]
    # the first four patches are the left block (row by row), the next four the right block
    assert patches[:, 0].tolist() == [0, 2, 20, 22, 4, 6, 24, 26]


def test_the_last_frame_is_repeated_to_fill_a_temporal_patch():
    frames = torch.rand(5, 3, 28, 56)
    patches, grid = patchify(frames)
    padded, _ = patchify(torch.cat([frames, frames[-1:]]))
    assert grid.tolist() == [3, 2, 4] and torch.equal(patches, padded)
    image, image_grid = patchify(frames[:1])
    assert image_grid.tolist() == [1, 2, 4] and torch.equal(image, patchify(frames[[0, 0]])[0])
    with pytest.raises(ValueError, match="28 pixels"):
        patchify(torch.rand(2, 3, 56, 70))


@pytest.mark.parametrize("height, width", [(56, 56), (252, 252), (140, 28)])
def test_patches_equal_the_image_processor_of_transformers(height, width):
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
