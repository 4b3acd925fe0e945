"""ToyVideoQA: the same bits from the same seed, nothing shared between splits, questions that can be answered."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest

from dvr1_lite import toy
from dvr1_lite.data import read_records
from dvr1_lite.paths import data_folder
from dvr1_lite.rewards import score
from dvr1_lite.video import read_clip

PARADE = {"kind": "parade", "objects": [{"shape": "circle", "colour": "red"}, {"shape": "ring", "colour": "blue"},
                                        {"shape": "cross", "colour": "white"}], "bounds": [0, 1, 3, 4], "flashes": [],
          "places": [[28.0, 28.0]] * 3}
JOURNEY = {"kind": "journey", "objects": [{"shape": "square", "colour": "green"}],
           "moves": ["left", "up", "left", "down"], "flashes": [], "places": [[28.0, 28.0]] * 8}
SIGNAL = {"kind": "signal", "objects": [{"shape": "diamond", "colour": "purple"}], "flashes": [2, 5, 8]}


def ask(scene, question_type):
    return toy.make_item(toy.seeded("test", question_type), scene, question_type)


@pytest.mark.parametrize("scene, question_type, trace, answer", [
    (PARADE, "order", "first circle second ring third ring fourth cross", "circle ring ring cross"),
    (PARADE, "backwards", "backwards fourth cross third ring second ring first circle", "cross ring ring circle"),
    (JOURNEY, "path", "first left second up third left fourth down", "left up left down"),
    (JOURNEY, "return", "backwards fourth down third left second up first left", "down left up left"),
    (SIGNAL, "frames", "1 dark 2 flash 3 dark 4 dark 5 flash 6 dark 7 dark 8 flash", "2 5 8"),
    (SIGNAL, "count", "1 dark 2 flash 3 dark 4 dark 5 flash 6 dark 7 dark 8 flash", "3"),
    (SIGNAL, "onset", "1 dark 2 flash", "2"),
])
def test_open_answers_by_hand(scene, question_type, trace, answer):
    item = ask(scene, question_type)
    assert (item.trace, item.answer, item.options) == (trace, answer, ())


@pytest.mark.parametrize("scene, question_type, value", [
    (PARADE, "shape", "circle"), (PARADE, "last", "cross"), (JOURNEY, "direction", "left"),
    (JOURNEY, "colour", "green"), (SIGNAL, "colour", "purple")])
def test_choices_by_hand(scene, question_type, value):
    item = ask(scene, question_type)
    assert item.options[toy.LETTERS.index(item.answer)] == value
    assert len(set(item.options)) == 4 and item.trace.split()[-2:] == [value, item.answer]


def test_grounding_span_by_hand():
    items = [toy.make_item(toy.seeded("g", i), PARADE, "grounding") for i in range(40)]
    spans = {item.trace.split(" from ")[0].split()[-1]: item.span for item in items}
    assert spans == {"circle": (0.0, 1.0), "ring": (1.0, 3.0), "cross": (3.0, 4.0)}
    ring = next(item for item in items if "ring from" in item.trace)
    assert ring.trace == "first circle second ring third ring fourth cross ring from 1.0 to 3.0 blue " + ring.answer


def test_right_letter_is_not_tied_to_its_place_or_value():
    items = [toy.make_item(toy.seeded("letters", i), SIGNAL, "colour") for i in range(400)]
    counts = Counter(item.answer for item in items)
    assert set(counts) == set("ABCD") and min(counts.values()) > 70  # 100 expected, sd 8.7


def test_journey_stays_in_the_frame_and_moves_as_told():
    for i in range(50):
        scene = toy.make_scene(toy.seeded("journey", i), "journey", "studio")
        for move, (start, end) in zip(scene["moves"], zip(scene["places"][::2], scene["places"][1::2])):
            assert [(b - a) / 14 for a, b in zip(start, end)] == list(toy.MOVES[move])
        assert all(14 <= x <= 42 for place in scene["places"] for x in place)


def test_frames_show_what_the_scene_says():
    scene = {**SIGNAL, "environment": "studio", "backdrop": "plain", "backdrop_seed": 0, "base": [10, 20, 30],
             "contrast": 0, "flash_opacity": 1.0, "opacity": 1.0, "radius": 10.0, "places": [[28.0, 28.0]]}
    scene["objects"] = [{"shape": "circle", "colour": "red", "rgb": [200, 0, 0]}]
    frames = toy.render(scene)
    assert frames.shape == (8, 56, 56, 3)
    assert [int(f[0, 0, 0]) for f in frames] == [10, 250, 10, 10, 250, 10, 10, 250]
    assert frames[0, 28, 28].tolist() == [200, 0, 0] and frames[0, 28, 45].tolist() == [10, 20, 30]
    area = (frames[0, ..., 0] > 105).sum()
    assert abs(area - np.pi * 100) < 8  # pixels of a disc of radius 10


def test_a_seed_gives_the_same_data_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "SPLITS", {"tune": toy.Split("meadow", 2, toy.TRAINED_TYPES)})
    first = toy.build_dataset(tmp_path / "a", splits=("tune",), progress=False)
    second = toy.build_dataset(tmp_path / "b", splits=("tune",), progress=False)
    other = toy.build_dataset(tmp_path / "c", seed=1, splits=("tune",), progress=False)
    assert first == second
    assert first["splits"]["tune"]["frames_sha256"] != other["splits"]["tune"]["frames_sha256"]


# ------------------------------------------------------------------------------------------- the shipped files

@pytest.fixture(scope="module")
def shipped():
    folder = data_folder() / "toyvideoqa"
    return folder, json.loads((folder / "manifest.json").read_text())


def test_manifest_counts_and_sums(shipped):
    folder, manifest = shipped
    least = {"train": 4000, "tune": 1000, "L1": 2000, "L2": 2000, "L3": 2000}
    for split, facts in manifest["splits"].items():
        text = (folder / f"{split}.jsonl").read_bytes()
        assert hashlib.sha256(text).hexdigest() == facts["records_sha256"]
        assert len(text.splitlines()) == facts["questions"] >= least[split]
        assert len(list((folder / "clips" / split).glob("*.mp4"))) == facts["clips"]
        assert sum(facts["by_type"].values()) == facts["questions"] and min(facts["by_type"].values()) >= 100


@pytest.mark.parametrize("split", ["tune"])
def test_the_generator_rebuilds_the_shipped_split(shipped, split):
    folder, manifest = shipped
    pixels, lines = hashlib.sha256(), []
    for name, scene, items in toy.split_scenes(split, manifest["seed"]):
        pixels.update(toy.render(scene).tobytes())
        lines += [json.dumps(toy.to_json(split, name, item)) for item in items]
    assert pixels.hexdigest() == manifest["splits"][split]["frames_sha256"]
    assert (folder / f"{split}.jsonl").read_text(encoding="utf-8") == "\n".join(lines) + "\n"


def test_no_scene_is_shared_between_splits():
    seen = {}
    for split in toy.SPLITS:
        for name, scene, _ in toy.split_scenes(split):
            key = json.dumps({k: v for k, v in scene.items() if k != "environment"}, sort_keys=True)
            assert seen.setdefault(key, (split, name)) == (split, name), f"{split}/{name} is also {seen[key]}"


def test_true_traces_earn_the_full_reward(shipped):
    folder, _ = shipped
    for split in ("tune", "L3"):
        for record in read_records(folder / f"{split}.jsonl")[:200]:
            glue = f"<glue>{record.spans[0][0]} {record.spans[0][1]}</glue>" if record.spans else ""
            text = f"<think>{record.trace}</think><answer>{record.answer}</answer>{glue}"
            assert score(record, text).normalised == 1.0


def test_shipped_clips_decode_to_the_rendered_moments(shipped):
    folder, manifest = shipped
    for i, (name, scene, _) in enumerate(toy.split_scenes("L2", manifest["seed"])):
        if i == 12:
            break
        clip = read_clip(folder / "clips" / "L2" / f"{name}.mp4", 8)
        decoded = clip.frames.permute(0, 2, 3, 1).numpy() * 255
        assert np.abs(decoded - toy.render(scene)).mean() < 3.0, name  # grey levels
        assert clip.fps == 2.0 and clip.duration == 4.0


def test_colour_is_never_the_only_cue():
    for question_type, wordings in toy.WORDINGS.items():
        assert all("{colour}" not in wording for wording in wordings), question_type
