r"""The check of a data set: what it counts, what it finds, and how large frames become."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dvr1_lite import __main__ as cli
from dvr1_lite.config import TrainConfig
from dvr1_lite.data import read_records
from dvr1_lite.scale import check
from dvr1_lite.scale.check import Media, check_records, examples, format_report, show_record
from dvr1_lite.scale.datasets import read_any
from dvr1_lite.toy.clips import write_clip
from tests.core.test_data import CHOICE, NUMBER, OWN, SPAN, without, write_lines
from tests.scale.test_datasets import write_gqa


@pytest.fixture
def folder(tmp_path):
    r"""A clip of 4 s, one with 4 frames, one cut off, a picture; and `none.mp4`, which does not exist."""
    frames = np.random.default_rng(0).integers(0, 255, (16, 64, 96, 3), dtype=np.uint8)
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips/a.mp4", frames, 4)
    write_clip(tmp_path / "clips/short.mp4", frames[:4], 4)
    write_clip(tmp_path / "clips/one.mp4", frames[:1], 4)
    (tmp_path / "clips/bad.mp4").write_bytes((tmp_path / "clips/a.mp4").read_bytes()[:-200])
    Image.fromarray(frames[0]).save(tmp_path / "clips/a.png")
    return tmp_path


def span(record_id: str, start: float, end: float) -> dict:
    return SPAN | {"problem_id": record_id, "solution": f"<answer>A</answer><glue>[({start}, {end})]</glue>"}


@pytest.mark.parametrize("decode", [True, False])
def test_the_check_counts_and_finds_what_is_incorrect(folder, decode):
    rows = [CHOICE, span("inside", 1, 2), span("before", -0.1, 2), span("after", 3, 4.2), span("rounded", 3, 4.04),
            span("outside", 5, 9), NUMBER | {"data_type": "image", "path": "clips/a.png"}]
    rows += [NUMBER | {"problem_id": name, "path": f"clips/{name}.mp4"} for name in ("short", "bad", "none")]
    errors = []
    path = write_lines(folder / "rows.jsonl", rows + [without(CHOICE, "problem")])
    report = check_records(read_records(path, errors=errors), 8, 56, decode=decode, errors=errors)
    assert (len(report.records), report.ok) == (10, False)
    assert {path.name: media[:2] for path, media in report.media.items()} == {"a.mp4": (96, 64), "a.png": (96, 64)}
    assert report.media[folder / "clips/a.mp4"].duration == pytest.approx(4.0)
    found = {name: [record_id for record_id, _ in getattr(report, name)]
             for name in ("missing", "undecodable", "span_errors", "spans_outside")}
    assert found == {"missing": ["none"], "undecodable": ["short", "bad"], "span_errors": ["outside"],
                     "spans_outside": ["before", "after"]}
    text = format_report(report, examples=1)
    for line in ("10 records, 2 readable", "problem type grounding: 5", "question type when: 5",
                 "missing files: 1, used by 1 record\n", "undecodable files: 2, used by 2 records\n",
                 "reach out of their clip (kept as annotated): 2", "and 1 more", "unreadable records: 1",
                 "field 'problem': is missing", "4 frames but 8 are asked for",
                 "2 of 96 x 64 pixels are shown as 56 x 56, aspect ratio 1.50 squeezed to 1",
                 "clips of 4.0 s: 8 frames, one every 0.5 s"):
        assert line in text, line
    limit = "\n30 % of the records have files that cannot be read, and a run ends above max_broken_share = 29 %: fix"
    assert limit in format_report(report, 1, 0.29) and "max_broken_share" not in format_report(report, 1, 0.3)


def test_counts_of_one_and_short_intervals_are_worded(folder):
    report = check_records(read_records(write_lines(folder / "rows.jsonl", [OWN])), 8, 56)
    report.media = {Path(f"{k}"): Media(10 + k, 10, 0.2 + k) for k in range(6)}
    text = format_report(report)
    assert "  and 1 other size shown as 56 x 56\n" in text and "1 record, line 1; they have options" in text
    assert "  clips of 0.2 to 5.2 s: 8 frames, one every 0.03 to 0.7 s\n" in text  # 0.2 / 8 = 0.025, 5.2 / 8 = 0.65
    one = check_records(read_records(write_lines(folder / "rows.jsonl", [OWN | {"video": "clips/one.mp4"}])), 8, 56)
    assert "the clip has 1 frame but 8 are asked for; sample at most 1 or leave" in format_report(one)


def test_an_answer_with_words_that_the_model_cannot_write_is_noted(folder, capsys):
    rows = [OWN | {"question": "what happens", "options": [], "answer": "flambéed zucchini"}]
    check.print_notes(read_records(write_lines(folder / "rows.jsonl", rows)), TrainConfig())
    assert re.search("note: the model has never seen (.*, )?flambéed, zucchini;", capsys.readouterr().err)


def test_a_sound_data_set_is_ok_and_each_clip_is_opened_once(folder, monkeypatch):
    opened, read_clip = [], check.read_clip
    monkeypatch.setattr(check, "read_clip", lambda *args: opened.append(args) or read_clip(*args))
    path = write_lines(folder / "rows.jsonl", [CHOICE, NUMBER, span("reaches out", -0.1, 2)])
    report = check_records(read_records(path), 8, 56)
    assert report.ok and [args[1:] for args in opened] == [(8, (56, 56))], "frames are kept at their final size"
    assert "missing files: 0" in format_report(report) and len(report.spans_outside) == 1
    check_records(read_records(path), 8, 56, decode=False)
    assert len(opened) == 1, "headers only"
    (folder / "clips/a.mp4").unlink()
    assert len(check_records(read_records(path), 8).missing) == 3


def test_a_missing_file_is_counted_once_with_its_records(folder):
    rows = [NUMBER | {"problem_id": name, "path": path} for name, path in
            (("a", "none.mp4"), ("b", "none.mp4"), ("c", "lost.mp4"), ("d", "clips/a.mp4"))]
    text = format_report(check_records(read_records(write_lines(folder / "rows.jsonl", rows)), 8, 56))
    assert "missing files: 2, used by 3 records\n" in text and "undecodable files: 0\n" in text


def test_clips_that_two_files_share_are_named(folder, capsys):
    (folder / "clips/b.mp4").write_bytes((folder / "clips/a.mp4").read_bytes())
    (folder / "again").symlink_to(folder / "clips")
    files = [str(write_lines(folder / f"{name}.jsonl", [NUMBER | {"path": f"{path}.mp4"} for path in paths]))
             for name, paths in (("train", ["clips/a"]), ("held_out", ["again/a", "clips/b"]), ("other", ["clips/b"]))]
    assert cli.main(["check", "--fast", "--out", str(folder / "frames"), "--data", *files]) == 0
    printed = capsys.readouterr().out
    for name, count in zip(files, ("1 record,", "2 records,", "1 record,")):
        assert f"{name}: {count}" in printed
    shared = [line for line in printed.splitlines() if line.startswith("note: ")]
    a, b, rest = folder / "clips/a.mp4", folder / "clips/b.mp4", ": split by clip, or the accuracy means little"
    assert shared == [f"note: {files[0]} and {files[1]} share 1 clip, such as {a}{rest}",
                      f"note: {files[0]} and {files[2]} share 1 clip, such as {a} (its copy is {b}){rest}",
                      f"note: {files[1]} and {files[2]} share 1 clip, such as {a} (its copy is {b}){rest}"]
    assert sorted(path.name for path in (folder / "frames").iterdir()) == [f"record_{k}.png" for k in (1, 2, 3, 4)]
    (folder / "clips/b.mp4").unlink()
    assert cli.main(["check", "--fast", "--data", *files]) == 1, "one file of three has a problem"
    capsys.readouterr()
    assert cli.main(["check", "--fast", "--data", files[0]]) == 0 and "note: " not in capsys.readouterr().out


def test_spans_of_missing_clips_are_compared_with_the_annotated_duration(tmp_path):
    report = check_records(read_any(write_gqa(tmp_path)), 4)
    assert len(report.missing) == 3
    assert [name for name, _ in report.spans_outside] == ["4010069381_6"] * 2  # [-0.1, 2.5] and [5.0, 14.0] of 12.3 s


def test_examples_are_readable_records_of_different_types_first(folder):
    rows = [CHOICE | {"problem_id": "unreadable", "path": "clips/bad.mp4"}, CHOICE | {"problem_id": "c1"},
            CHOICE | {"problem_id": "c2"}, SPAN, NUMBER | {"data_type": "image", "path": "clips/a.png"}]
    records = read_records(write_lines(folder / "rows.jsonl", rows))
    found = examples(records, 8, 56, count=3)
    assert [record.record_id for record, _ in found] == ["9", "8", "c1"]
    assert [tuple(clip.frames.shape) for _, clip in found] == [(8, 3, 56, 56), (1, 3, 56, 56), (8, 3, 56, 56)]
    shown = show_record(found[1][0])
    for text in ("record:   8 (numerical; numerical)", "prompt:   Which colour", "answer:   3.5", "picture:  "):
        assert text in shown and "clip:" not in shown
