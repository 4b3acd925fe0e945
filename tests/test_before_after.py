"""The GIF of one question before and after training: its text is true of the record, and it moves slowly."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageSequence

from dvr1_lite.rewards import score

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "notebooks"))
import before_after  # noqa: E402

ANSWERS = json.loads((before_after.FIGURES / "before_after.json").read_text(encoding="utf-8"))
GIFS = sorted(before_after.FIGURES.glob("*.gif"))


def test_the_recorded_answers_are_scored_as_the_pictures_say():
    record = before_after.record_of(ANSWERS["record_id"])
    before, after = (score(record, ANSWERS[when]) for when in ("before", "after"))
    assert (before.accuracy, after.accuracy) == (0, 1) and before.format == after.format == 1
    assert before_after.told(record, ANSWERS["after"]).endswith("reward: 2 of 2")


def test_a_run_gives_its_first_changed_question_that_shows_in_grey(tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "config.yaml").write_text("method: grpo\nsteps: 3\nseed: 7\n")
    pale = "L1/journey_0003/path"  # a red circle on green, of the same lightness
    names = ("L1/journey_0000/path", "L1/journey_0001/path", pale, ANSWERS["record_id"])
    for when, right in (("before", (1, 0, 0, 0)), ("after", (1, 0, 1, 1))):
        rows = [{"record_id": name, "question_type": "path", "accuracy": r, "completion": f"{when} {n}"}
                for n, (name, r) in enumerate(zip(names, right))]
        (tmp_path / f"evaluation/{when}_L1.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert before_after.answers_of(tmp_path) == {"record_id": ANSWERS["record_id"], "before": "before 3",
                                                 "after": "after 3", "method": "grpo", "steps": 3, "seed": 7}


def test_the_command_draws_both_pictures(tmp_path):
    before_after.write(ANSWERS, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"before_after.gif", "before_after_strip.png"}
    stored = Image.open(before_after.FIGURES / "before_after.gif")
    drawn = Image.open(tmp_path / "before_after.gif")
    assert drawn.size == stored.size and drawn.n_frames == stored.n_frames


@pytest.mark.parametrize("path", GIFS, ids=[path.name for path in GIFS])
def test_motion_is_gentle_and_small(path):
    """No more than seven pictures a second, none of them much brighter or darker than the one before."""
    pictures = [(frame.info["duration"], frame.convert("L").resize((64, 32))) for frame in
                ImageSequence.Iterator(Image.open(path))]
    assert min(duration for duration, _ in pictures) >= 140 and path.stat().st_size < 300_000
    levels = [sum(picture.tobytes()) / (64 * 32) for _, picture in pictures]
    assert max(abs(a - b) for a, b in zip(levels, levels[1:])) < 12  # of 255; a flash changes far more
    assert path.with_name(f"{path.stem}_strip.png").exists()
