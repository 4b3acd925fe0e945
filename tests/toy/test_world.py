r"""ToyVideoQA: the same bits from the same seed, nothing shared between splits, questions that can be answered."""

import hashlib
import json
from collections import Counter

import av
import numpy as np
import pytest

from dvr1_lite.data import read_records
from dvr1_lite.files import data_folder
from dvr1_lite.rewards import score
from dvr1_lite.toy import world
from dvr1_lite.toy.clips import write_clip
from dvr1_lite.toy.world import make_item, make_scene, seeded, split_scenes
from dvr1_lite.video import read_clip

PARADE = {"kind": "parade", "objects": [{"shape": "circle", "colour": "red"}, {"shape": "ring", "colour": "blue"},
                                        {"shape": "cross", "colour": "white"}], "bounds": [0, 1, 3, 4], "flashes": [],
          "places": [[28.0, 28.0]] * 3}
JOURNEY = {"kind": "journey", "objects": [{"shape": "square", "colour": "green"}],
           "moves": ["left", "up", "left", "down"], "flashes": [], "places": [[28.0, 28.0]] * 8}
WALK = {**JOURNEY, "places": [[42.0, 42.0], [28.0, 42.0], [28.0, 42.0], [28.0, 28.0], [28.0, 28.0], [14.0, 28.0],
                              [14.0, 28.0], [14.0, 42.0]]}  # the same moves on the grid, from the corner
SIGNAL = {"kind": "signal", "objects": [{"shape": "diamond", "colour": "purple"}], "flashes": [2, 5, 8]}


@pytest.mark.parametrize("scene, question_type, trace, answer", [
    (PARADE, "order", "first circle second ring third ring fourth cross", "circle ring ring cross"),
    (JOURNEY, "path", "first left second up third left fourth down", "left up left down"),
    (SIGNAL, "frames", "1 dark 2 flash 3 dark 4 dark 5 flash 6 dark 7 dark 8 flash", "2 5 8"),
    (SIGNAL, "count", "1 dark 2 flash 3 dark 4 dark 5 flash 6 dark 7 dark 8 flash", "3"),
    (SIGNAL, "onset", "1 dark 2 flash", "2"),
    (SIGNAL, "tally", "1 0 2 1 3 1 4 1 5 2 6 2 7 2 8 3", "0 1 1 1 2 2 2 3"),
    (SIGNAL, "since", "1 1 2 0 3 1 4 2 5 0 6 1 7 2 8 0", "1 0 1 2 0 1 2 0"),
    (WALK, "cell", "1 9 2 8 3 8 4 5 5 5 6 4 7 4 8 7", "9 8 8 5 5 4 4 7"),
])
def test_open_answers_by_hand(scene, question_type, trace, answer):
    item = make_item(seeded("test", question_type), scene, question_type)
    assert (item.trace, item.answer, item.options) == (trace, answer, ())


@pytest.mark.parametrize("scene, question_type, values", [
    (SIGNAL, "tally", [0, 2, 2, 2, 3, 3, 3, 4]),  # the flash at moment 2 counts twice
    (SIGNAL, "since", [1, 1, 2, 3, 0, 1, 2, 0]),  # one more, until the next flash
    (WALK, "cell", [9, 3, 3, 9, 9, 8, 8, 2])])  # 8 would follow; below and to the right of it the grid begins again at 3
def test_a_chain_goes_on_from_a_wrong_step(scene, question_type, values):
    assert world.chain_values(scene, question_type, [moment == 1 for moment in range(8)]) == values


@pytest.mark.parametrize("scene, question_type, trace", [
    (PARADE, "shape", "first circle"), (PARADE, "last", "last cross"), (JOURNEY, "direction", "first left"),
    (JOURNEY, "colour", "square green"), (SIGNAL, "colour", "diamond purple")])
def test_choices_by_hand(scene, question_type, trace):
    item = make_item(seeded("test", question_type), scene, question_type)
    assert item.trace == f"{trace} {item.answer}" and len(set(item.options)) == 4
    assert item.options["ABCD".index(item.answer)] == trace.split()[-1]


def test_the_shape_before_is_never_asked_of_the_first_shape():
    items = [make_item(seeded("before", i), PARADE, "before") for i in range(40)]
    found = {(item.question.rstrip("?.").split()[-1], item.options["ABCD".index(item.answer)]) for item in items}
    assert found == {("ring", "circle"), ("cross", "ring")}


def test_grounding_spans_by_hand():
    items = [make_item(seeded("grounding", i), PARADE, "grounding") for i in range(40)]
    spans = {item.trace.split(" from ")[0].split()[-1]: item.spans for item in items}
    assert spans == {"circle": ((0.0, 1.0),), "ring": ((1.0, 3.0),), "cross": ((3.0, 4.0),)}
    ring = next(item for item in items if "ring from" in item.trace)
    assert ring.trace == "first circle second ring third ring fourth cross ring from 1.0 to 3.0 blue " + ring.answer


def test_the_correct_letter_is_uniform():
    counts = Counter(make_item(seeded("letters", i), SIGNAL, "colour").answer for i in range(400))
    assert set(counts) == set("ABCD") and min(counts.values()) > 70  # 100 expected, standard deviation 8.7


def test_a_question_does_not_name_the_colour():
    assert not any("{colour}" in wording for kind in world.QUESTION_TYPES.values() for wording in kind.wordings)


def test_a_journey_stays_in_the_frame_and_follows_its_moves():
    steps = {"left": [-1, 0], "right": [1, 0], "up": [0, -1], "down": [0, 1]}
    for i in range(50):
        scene = make_scene(seeded("journey", i), "journey", "studio")
        for move, start, end in zip(scene["moves"], scene["places"][::2], scene["places"][1::2]):
            assert [(b - a) / 14 for a, b in zip(start, end)] == steps[move]
        assert all(14 <= x <= 42 for place in scene["places"] for x in place)


def test_frames_show_the_scene():
    scene = {**SIGNAL, "environment": "studio", "backdrop": "plain", "backdrop_seed": 0, "base": [10, 20, 30],
             "contrast": 0, "flash_opacity": 1.0, "opacity": 1.0, "radius": 10.0, "places": [[28.0, 28.0]],
             "objects": [{"shape": "circle", "colour": "red", "rgb": [200, 0, 0]}]}
    frames = world.render(scene)
    assert frames.shape == (8, 56, 56, 3)
    assert [int(frame[0, 0, 0]) for frame in frames] == [10, 250, 10, 10, 250, 10, 10, 250]
    assert frames[0, 28, 28].tolist() == [200, 0, 0] and frames[0, 28, 45].tolist() == [10, 20, 30]
    area = (frames[0, ..., 0] > 105).sum()
    assert abs(area - np.pi * 100) < 8  # pixels of a disc of radius 10


def test_a_written_clip_is_small_standard_and_always_the_same(tmp_path):
    frames = np.zeros((8, 56, 56, 3), np.uint8)
    for i, frame in enumerate(frames):
        frame[20:30, 4 * i:4 * i + 10] = (200, 60, 40)
    for name in ("first.mp4", "second.mp4"):
        write_clip(tmp_path / name, frames, 4)
    data = (tmp_path / "first.mp4").read_bytes()
    assert data == (tmp_path / "second.mp4").read_bytes() and len(data) < 5000
    assert data.find(b"moov") < data.find(b"mdat"), "the index must come first, for players that stream"
    assert len(list(tmp_path.iterdir())) == 2, "no partial file may be left"
    with av.open(str(tmp_path / "first.mp4")) as container:
        [stream] = container.streams
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, stream.frames) == ("h264", "yuv444p", 8)


@pytest.mark.parametrize("shape, dtype", [((2, 8, 8, 3), float), ((8, 8, 3), np.uint8), ((0, 8, 8, 3), np.uint8)])
def test_arrays_that_are_not_frames_are_refused(tmp_path, shape, dtype):
    with pytest.raises(ValueError, match="give uint8"):
        write_clip(tmp_path / "clip.mp4", np.zeros(shape, dtype), 4)
    assert not list(tmp_path.iterdir())


def test_a_seed_decides_every_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "SPLITS", {"tune": world.Split("meadow", 2, world.TRAINED_TYPES)})
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        world.build_dataset(tmp_path / name, seed, splits=("tune",), progress=False)
    files = {name: {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
             for name in "abc"}
    assert len(files["a"]) == 8 and files["a"] == files["b"]  # six clips, the records and the manifest
    assert files["a"].keys() == files["c"].keys()
    assert not any(files["a"][path] == files["c"][path] for path in files["a"])


@pytest.fixture(scope="module")
def shipped():
    folder = data_folder() / "toyvideoqa"
    return folder, json.loads((folder / "manifest.json").read_text())


def test_the_manifest_has_the_counts_and_sums_of_the_files(shipped):
    folder, manifest = shipped
    minimum = {"train": 4000, "tune": 1000, "L1": 2000, "L2": 2000, "L3": 1500}
    cells = ("F1", "F2", "F3", "F4", "A1", "A2", "A3", "A4", "S")
    minimum |= {f"train_{cell}": 1440 for cell in cells} | {f"test_{cell}": 672 for cell in cells}
    assert set(manifest["splits"]) == set(minimum)
    for split, facts in manifest["splits"].items():
        text = (folder / f"{split}.jsonl").read_bytes()
        assert hashlib.sha256(text).hexdigest() == facts["records_sha256"]
        assert len(text.splitlines()) == facts["questions"] >= minimum[split]
        if split in ("train", "tune", "L1", "L2", "L3"):
            assert len(list((folder / "clips" / split).glob("*.mp4"))) == facts["clips"]
        assert sum(facts["by_type"].values()) == facts["questions"] and min(facts["by_type"].values()) >= 100


def test_the_generator_rebuilds_a_shipped_split(shipped):
    folder, manifest = shipped
    pixels, lines = hashlib.sha256(), []
    for name, scene, items in split_scenes("tune", manifest["seed"]):
        pixels.update(world.render(scene).tobytes())
        lines += [json.dumps(world.to_json("tune", name, item)) for item in items]
    assert pixels.hexdigest() == manifest["splits"]["tune"]["frames_sha256"]
    assert (folder / "tune.jsonl").read_text(encoding="utf-8") == "\n".join(lines) + "\n"


@pytest.mark.parametrize("cell, opener", [("F3", "Write"), ("A1", "Say"), ("S", "Spell")])
def test_a_cell_asks_every_chain_type_in_its_own_wording_about_the_clips_of_another_split(shipped, cell, opener):
    for split, clips_of in ((f"train_{cell}", "train"), (f"test_{cell}", "L1")):
        records = read_records(shipped[0] / f"{split}.jsonl")
        assert {record.question.split()[0] for record in records} == {opener}
        assert {record.question_type for record in records} == {"tally", "cell", "since"}
        assert all(record.clip.parent.name == clips_of and record.clip.exists() for record in records[::97])


def test_no_scene_is_shared_between_splits():
    owners = {}
    for split in (name for name, spec in world.SPLITS.items() if not spec.clips_of):
        for name, scene, _ in split_scenes(split):
            key = json.dumps({field: value for field, value in scene.items() if field != "environment"}, sort_keys=True)
            assert owners.setdefault(key, (split, name)) == (split, name), f"{split}/{name} is also {owners[key]}"


def test_true_traces_earn_the_full_reward(shipped):
    for split in ("tune", "L3"):
        for record in read_records(shipped[0] / f"{split}.jsonl")[:200]:
            glue = f"<glue>{record.spans[0][0]} {record.spans[0][1]}</glue>" if record.spans else ""
            assert score(record, f"<think>{record.trace}</think><answer>{record.answer}</answer>{glue}").normalised == 1


def test_shipped_clips_decode_to_the_rendered_moments(shipped):
    folder, manifest = shipped
    for (name, scene, _), _ in zip(split_scenes("L2", manifest["seed"]), range(12)):
        clip = read_clip(folder / "clips" / "L2" / f"{name}.mp4", 8)
        decoded = clip.frames.permute(0, 2, 3, 1).numpy() * 255
        assert np.abs(decoded - world.render(scene)).mean() < 3.0, name  # grey levels
        assert clip.fps == 2.0 and clip.duration == 4.0
