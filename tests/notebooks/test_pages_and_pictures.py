"""explore.html computes the numbers of dvr1_lite and needs nothing from outside; pictures are true and readable."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image, ImageSequence

from dvr1_lite.rewards import score

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "notebooks"))
import before_after  # noqa: E402
import explore  # noqa: E402
import figures  # noqa: E402

PAGE = explore.PAGE.read_text(encoding="utf-8")
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="Node.js is not installed; the page checks itself")
ANSWERS = json.loads((before_after.FIGURES / "before_after.json").read_text(encoding="utf-8"))
GIFS = sorted(before_after.FIGURES.glob("*.gif"))


def close(mine, right) -> bool:
    if isinstance(right, dict):
        return all(close(mine[key], value) for key, value in right.items())
    if isinstance(right, list):
        return len(mine) == len(right) and all(map(close, mine, right))
    return mine == pytest.approx(right, rel=1e-6, abs=1e-8)


def in_javascript(formulas: str, asked: list[dict]) -> list[dict]:
    script = formulas + """
const read = JSON.parse(require("fs").readFileSync(0, "utf8"));
console.log(JSON.stringify(read.map(c => group(c.rewards, c.rho, c.settings))));"""
    run = subprocess.run([NODE, "-e", script], input=json.dumps(asked), capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_cases_in_the_page_are_those_of_the_package():
    """Without a browser or Node.js this checks the page, which shows how many of these cases its formulas meet."""
    embedded, right = explore.embedded(PAGE), explore.cases()
    assert len(embedded) == len(right) == 12 and close(embedded, right), "run python notebooks/explore.py"


@needs_node
def test_the_formulas_of_the_page_give_the_numbers_of_the_package():
    asked = explore.inputs(200, seed=1)
    for case, mine in zip(asked, in_javascript(explore.FORMULAS.search(PAGE)[1], asked), strict=True):
        assert close(mine, explore.expected(**case)), case


@needs_node
def test_the_comparison_detects_an_incorrect_formula():
    changed = explore.FORMULAS.search(PAGE)[1].replace("spread(rho) + eps", "spread(rho) + 1.1 * eps")
    case = explore.inputs(5, seed=2)[4]
    assert not close(in_javascript(changed, [case])[0], explore.expected(**case))


def test_the_page_is_one_file_without_addresses():
    assert "default-src 'none'" in PAGE
    addresses = set(re.findall(r"https?://[^\"'\s<)]+", PAGE)) - {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert addresses == set() and not re.search(r"\b(src|href|@import|fetch|XMLHttpRequest)\b\s*[=(]", PAGE)
    assert len(PAGE.encode()) < 60_000


def test_every_control_has_a_name_and_can_be_reached_by_keyboard():
    outside_labels = re.sub(r"<label\b.*?</label>", "", PAGE, flags=re.S)
    inputs = re.findall(r"<input\b[^>]*>", outside_labels)
    assert [tag for tag in inputs if "aria-label" not in tag] == [] and "<input" in PAGE
    assert not re.search(r"<(div|span)\b[^>]*\bonclick", PAGE)
    assert 'lang="en"' in PAGE and 'name="viewport"' in PAGE


def test_the_recorded_answers_are_scored_as_the_pictures_say():
    record = before_after.record_of(ANSWERS["record_id"])
    before, after = (score(record, ANSWERS[when]) for when in ("before", "after"))
    assert (before.accuracy, after.accuracy) == (0, 1) and before.format == after.format == 1
    assert before_after.told(record, ANSWERS["after"]).endswith("reward: 2 of 2")


def test_a_run_gives_its_first_changed_question_that_is_readable_in_grey(tmp_path):
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
    stored, drawn = (Image.open(folder / "before_after.gif") for folder in (before_after.FIGURES, tmp_path))
    assert drawn.size == stored.size and drawn.n_frames == stored.n_frames


@pytest.mark.parametrize("path", GIFS, ids=[path.name for path in GIFS])
def test_motion_is_slow_small_and_does_not_flash(path):
    pictures = [(frame.info["duration"], frame.convert("L").resize((64, 32))) for frame in
                ImageSequence.Iterator(Image.open(path))]
    assert min(duration for duration, _ in pictures) >= 140 and path.stat().st_size < 300_000  # 7 pictures a second
    levels = [sum(picture.tobytes()) / (64 * 32) for _, picture in pictures]
    assert max(abs(a - b) for a, b in zip(levels, levels[1:])) < 12  # of 255; a flash changes far more
    assert path.with_name(f"{path.stem}_strip.png").exists()


@pytest.mark.parametrize("lit", [(), ("advantages",), ("group", "rewards"), ("update", "reg-grpo"), ("augmentation",)])
def test_the_drawing_of_the_method_lights_what_is_asked_for_and_its_texts_do_not_touch(lit):
    figure = figures.draw_method(lit, title="Figure 00-A. A title of about the length that a notebook gives to it")
    axes = figure.axes[0]
    yellow = [patch for patch in axes.patches if patch.get_facecolor() == plt.matplotlib.colors.to_rgba(figures.LIT)]
    assert len(yellow) == len(lit)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert min(text.get_fontsize() for text in axes.texts) >= 8
    assert all(0 <= box.x0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height for box in boxes)
    touching = [(a.get_text(), b.get_text()) for i, (a, one) in enumerate(zip(axes.texts, boxes))
                for b, other in zip(axes.texts[i + 1:], boxes[i + 1:]) if one.overlaps(other)]
    plt.close(figure)
    assert touching == []


def test_every_type_of_question_has_its_name_at_the_end_of_a_line_from_its_dot():
    places = {"cell": (0.018, 0.8125), "tally": (0.0156, 0.875), "since": (0.0156, 0.875), "frames": (0.008, 0.9375),
              "order": (0.148, 0.5625), "shape": (0.914, 0.8125), "colour": (0.968, 0.8125)}
    types = {name: tuple(map(np.float64, place)) for name, place in places.items()}
    figure = figures.vanishing_by_rate((2, 8), types, 8, "A title")
    names = {text.get_text(): text for text in figure.axes[0].texts}
    assert set(names) == {"tally, since", *types} - {"tally", "since"}
    assert all(text.xy == types[name.split(", ")[0]] for name, text in names.items())
    heights = sorted((text.xyann[1] for text in names.values() if text.xyann[0] < 0.5), reverse=True)
    plt.close(figure)
    assert all(a - b > 0.07 for a, b in zip(heights, heights[1:]))  # no two on the same side overlap


def test_the_drawing_names_its_parts_when_asked_for_another():
    with pytest.raises(KeyError, match="advantages, update, reg-grpo, augmentation"):
        figures.draw_method("loss")
