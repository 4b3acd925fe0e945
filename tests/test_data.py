"""Readers of the four data sets in their true schemas, broken records, paths that leave the root, and the check."""

import csv
import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dvr1_lite import data
from dvr1_lite.data import (
    LETTERS, PROBLEM_TYPES, Record, check_records, clamp_spans, format_report, prompt_text, read_records, read_text,
    to_video_r1, with_option, write_records,
)
from dvr1_lite.errors import RecordError
from dvr1_lite.video import write_clip

CHOICE = {
    "problem_id": 7, "problem": "Which colour does the square have first?", "data_type": "video",
    "problem_type": "multiple choice", "options": ["A. red", "B. A blue one", "C. green", "D. yellow"],
    "process": "", "solution": "<answer>B</answer>", "path": "./clips/a.mp4", "data_source": "LLaVA-Video-178K",
}
NUMBER = CHOICE | {"problem_id": 8, "problem_type": "numerical", "options": [], "solution": "<answer>3.5</answer>"}
SPAN = CHOICE | {
    "problem_id": 9, "problem_type": "grounding", "question_type": "when", "process": "<think>first red</think>",
    "solution": "<answer>A</answer><glue>[(0.5, 2.5)]</glue>",
}
SEED = {
    "sample_id": "P01_12-3", "task_goal": "store cereal", "question": "What action should I take next?",
    "choice_a": "open cupboard", "choice_b": "take bag", "choice_c": "close box", "choice_d": "wash hands",
    "golden_choice_idx": "C", "answer": "close box", "task_start_frame": 0, "current_observation_frame": 760,
    "task_progress_metadata": [{"narration_text": "take bag", "start_frame": 36, "stop_frame": 105}],
    "video_id": "P01_12", "video_source": "EpicKitchens", "video_basename": "P01_12-3.mp4",
    "current_observation_basename": "P01_12-3.png", "domain": "Daily life",
}
SEED_TRAIN = {key: value for key, value in SEED.items() if key[:7] not in ("choice_", "golden_")} | {
    "negative_answers": ["open cupboard", "take bag", "close box", "wash hands", "take bag", "fold bag", "eat"],
}
VIDEOCHAT = {
    "id": "4010069381_5", "video": "1106/4010069381.mp4", "question": "why did the boy move to the sofa?",
    "options": ["(A) share", "(B) approach", "(C) unwrap it", "(D) play", "(E) gesture"], "duration": 38.2,
    "glue": [[5.2, 10.4], [20.0, 22.5]], "type": "CW", "answer": "(C)",
}
GQA_HEADER = "video_id,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4"
GQA_ROWS = [
    '4010069381,369,640,480,why did he move?,unwrap it,6,CW,share,approach the lady,unwrap it,"play, then rest",run',
    '4010069381,369,640,480,what did he do?,"play, then rest",7,TN,share,approach,unwrap it,"play, then rest",run',
    "2345678901,900,640,480,how many dogs are there?,2,1,CH,1,2,3,4,5",
]
GSUB = {
    "4010069381": {"duration": 12.3, "location": {"6": [[-0.1, 2.5], [5.0, 14.0]], "7": [[3, 4]]}, "fps": 30.0},
}


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_one(tmp_path: Path, row: dict) -> Record:
    [record] = read_records(write_lines(tmp_path / "rows.jsonl", [row]))
    return record


def write_gqa(folder: Path, rows=GQA_ROWS, gsub=GSUB, name: str = "val") -> Path:
    (folder / f"{name}.csv").write_text("\n".join([GQA_HEADER, *rows]) + "\n", encoding="utf-8")
    if gsub is not None:
        (folder / f"gsub_{name}.json").write_text(json.dumps(gsub))
    return folder / f"{name}.csv"


# Video-R1


def test_video_r1_fields(tmp_path):
    choice, number, span = read_records(write_lines(tmp_path / "train.jsonl", [CHOICE, NUMBER, SPAN]))
    assert choice == Record(
        record_id="7", question="Which colour does the square have first?", answer="B",
        options=("red", "A blue one", "green", "yellow"), problem_type="multiple choice",
        question_type="multiple choice", clip=tmp_path / "clips/a.mp4", source="LLaVA-Video-178K",
    )
    assert (number.answer, number.options, number.problem_type) == ("3.5", (), "numerical")
    assert (span.answer, span.spans, span.question_type) == ("A", ((0.5, 2.5),), "when")
    assert span.trace == "first red"
    assert choice.clip_id == span.clip_id == str(tmp_path / "clips/a.mp4")


def test_video_r1_as_a_json_list_below_another_root(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "Video-R1-260k.json").write_text(json.dumps([CHOICE, NUMBER | {"data_type": "image", "path": "b.png"}]))
    video, image = read_records(tmp_path / "Video-R1-260k.json", root=tmp_path / "media")
    assert video.clip == tmp_path / "media/clips/a.mp4" and video.image is None
    assert image.image == tmp_path / "media/b.png" and image.clip is None
    assert image.clip_id == str(image.image)


@pytest.mark.parametrize("kind", PROBLEM_TYPES)
def test_every_problem_type_is_read(tmp_path, kind):
    row = SPAN if kind == "grounding" else CHOICE if kind == "multiple choice" else NUMBER
    assert read_one(tmp_path, row | {"problem_type": kind}).problem_type == kind
    assert read_one(tmp_path, row | {"problem_type": kind.upper()}).problem_type == kind


@pytest.mark.parametrize(
    "text, letter",
    [("B", "B"), ("(B)", "B"), (" B. ", "B"), ("B. A blue one", "B"), ("(D) yellow", "D"), ("C)", "C")],
)
def test_answers_that_are_choices(tmp_path, text, letter):
    assert read_one(tmp_path, CHOICE | {"solution": f"<answer>{text}</answer>"}).answer == letter


@pytest.mark.parametrize("text", ["Clap", "A cat", "E", "1", "AB", "b", ""])
def test_answers_that_are_no_choices(tmp_path, text):
    with pytest.raises(RecordError, match=r"line 1, field 'solution'.*none of the 4 options.*A to D"):
        read_one(tmp_path, CHOICE | {"solution": f"<answer>{text}</answer>"})


def test_option_letters_are_taken_off_only_where_they_are_labels(tmp_path):
    options = ["A. A. Milne", "(B) B", "C", "D.C. is the capital", "Ernest", "F) x"]
    row = CHOICE | {"options": options, "solution": "<answer>A</answer>"}
    assert read_one(tmp_path, row).options == ("A. Milne", "B", "C", "D.C. is the capital", "Ernest", "x")


def test_question_type_and_trace_are_optional(tmp_path):
    row = {key: value for key, value in CHOICE.items() if key != "process"}
    assert read_one(tmp_path, row | {"question_type": "colour"}).question_type == "colour"
    assert read_one(tmp_path, row).trace == ""


@pytest.mark.parametrize("glue", ["[(0.5, 2.5)]", " 0.5 2.5 ", "[[0.5, 2.5]]", "(0.5,2.5)"])
def test_spans_are_read_with_any_brackets(tmp_path, glue):
    assert read_one(tmp_path, SPAN | {"solution": f"<answer>A</answer><glue>{glue}</glue>"}).spans == ((0.5, 2.5),)


def test_several_spans_are_kept_and_cut_to_the_clip(tmp_path):
    row = SPAN | {"solution": "<answer>A</answer><glue>[(0.5, 2.5), (3, 9)]</glue>", "duration": 4}
    assert read_one(tmp_path, row).spans == ((0.5, 2.5), (3.0, 4.0))
    assert clamp_spans(((-0.5, 2.0), (3.0, 9.0)), None) == ((0.0, 2.0), (3.0, 9.0))


# SEED-Bench-R1


def test_seed_bench_validation_row(tmp_path):
    record = read_one(tmp_path, SEED)
    assert record.answer == "C" and record.options == ("open cupboard", "take bag", "close box", "wash hands")
    assert record.clip == tmp_path / "videos/EpicKitchens/P01_12-3.mp4"
    assert record.image == tmp_path / "images/EpicKitchens/P01_12-3.png"
    assert (record.problem_type, record.question_type) == ("multiple choice", "Daily life")
    assert (record.record_id, record.source) == ("P01_12-3", "SEED-Bench-R1/EpicKitchens")


def test_seed_bench_without_progress_is_an_image_question(tmp_path):
    record = read_one(tmp_path, SEED | {"task_progress_metadata": []})
    assert record.clip is None and record.image == tmp_path / "images/EpicKitchens/P01_12-3.png"


def test_seed_bench_training_rows_draw_three_wrong_answers_by_sample(tmp_path):
    rows = [SEED_TRAIN | {"sample_id": f"s{i}"} for i in range(60)]
    records = read_records(write_lines(tmp_path / "training_6k.jsonl", rows))
    for record in records:
        assert len(set(record.options)) == 4, "the doubled and the true answer must not be drawn twice"
        assert record.options[LETTERS.index(record.answer)] == "close box"
    assert {record.answer for record in records} == set("ABCD")
    assert len({record.options for record in records}) > 30
    backwards = read_records(write_lines(tmp_path / "again.jsonl", rows[::-1]))
    assert backwards[::-1] == records, "the draw belongs to the sample, not to its place in the file"
    assert records[0].options == ("wash hands", "close box", "fold bag", "open cupboard"), "the same on every machine"


def test_seed_bench_needs_enough_wrong_answers(tmp_path):
    with pytest.raises(RecordError, match="'negative_answers': 2 wrong answers; give at least 3"):
        read_one(tmp_path, SEED_TRAIN | {"negative_answers": ["close box", "a", "b", "a", " "]})


def test_seed_bench_answer_must_be_the_golden_choice(tmp_path):
    with pytest.raises(RecordError, match="golden_choice_idx"):
        read_one(tmp_path, SEED | {"golden_choice_idx": "A"})


# NExT-GQA and VideoChat-R1


def test_next_gqa_rows_with_their_spans(tmp_path):
    why, after, count = read_records(write_gqa(tmp_path))
    assert (why.record_id, why.question_type, why.answer, why.source) == ("4010069381_6", "CW", "C", "NExT-GQA")
    assert why.problem_type == "grounding" and why.duration == 12.3
    assert why.spans == ((0.0, 2.5), (5.0, 12.3)), "both segments stay, cut to the clip"
    assert (after.answer, after.options[3], after.spans) == ("D", "play, then rest", ((3.0, 4.0),))
    assert (count.answer, count.problem_type, count.spans) == ("B", "multiple choice", ())  # text 2, not position 2
    assert count.clip == tmp_path / "2345678901.mp4"


def test_next_gqa_finds_its_companion_files(tmp_path):
    path = write_gqa(tmp_path, gsub=None, name="train")  # only val and test carry spans
    assert {record.problem_type for record in read_records(path)} == {"multiple choice"}
    (tmp_path / "map_vid_vidorID.json").write_text(json.dumps({"4010069381": "1106/4010069381"}))
    root = tmp_path / "root"
    (root / "NExTVideo/1106").mkdir(parents=True)
    (root / "NExTVideo/1106/4010069381.mp4").touch()
    (tmp_path / "spans.json").write_text(json.dumps(GSUB))
    record = read_records(path, root, spans=tmp_path / "spans.json")[0]
    assert record.clip == root / "NExTVideo/1106/4010069381.mp4" and record.problem_type == "grounding"


def test_next_qa_answers_are_positions(tmp_path):
    row = "1,9,640,480,where?,3,0,DL,park,street,house,garden,room"
    assert read_records(write_gqa(tmp_path, [row]))[0].answer == "D"


def test_videochat_r1_rows(tmp_path):
    (tmp_path / "nextgqa_val.json").write_text(json.dumps([VIDEOCHAT, VIDEOCHAT | {"id": "q2", "glue": None}]))
    record, plain = read_records(tmp_path / "nextgqa_val.json")
    assert record == Record(
        record_id="4010069381_5", question="why did the boy move to the sofa?", answer="C",
        options=("share", "approach", "unwrap it", "play", "gesture"), problem_type="grounding", question_type="CW",
        clip=tmp_path / "1106/4010069381.mp4", spans=((5.2, 10.4), (20.0, 22.5)), source="VideoChat-R1", duration=38.2,
    )
    assert plain.problem_type == "multiple choice" and plain.spans == ()


# Round trips: a record written in a format and read again is the same record


texts = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=12)
words = texts.filter(lambda text: "<" not in text and not text[1:2] in ("", ".", ")", ":") and text[0] != "(")


@st.composite
def records(draw, spans=True, kinds=PROBLEM_TYPES):
    kind = draw(st.sampled_from(kinds))
    options = tuple(draw(st.lists(words, min_size=5, max_size=5, unique=True))) if kind in data.CHOICE_TYPES else ()
    ends = draw(st.lists(st.floats(0, 50), min_size=2, max_size=4, unique=True).map(sorted))
    return Record(
        record_id=draw(words), question=draw(words), options=options, problem_type=kind, question_type=draw(words),
        answer=draw(st.sampled_from(LETTERS[:5])) if options else draw(words), clip=Path("/root/clips/a.mp4"),
        spans=tuple(zip(ends[::2], ends[1::2])) if kind == "grounding" and spans else (),
        trace=draw(words), source=draw(words), duration=draw(st.sampled_from([None, 60.0])),
    )


@given(st.lists(records(), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_video_r1_round_trip(tmp_path_factory, batch):
    root = tmp_path_factory.mktemp("root")
    batch = [replace(record, clip=root / "clips/a.mp4") for record in batch]
    write_records(root / "rows.jsonl", batch)
    assert read_records(root / "rows.jsonl") == batch


def test_an_image_record_round_trips_and_a_mixed_one_is_refused(tmp_path):
    record = read_one(tmp_path, NUMBER | {"data_type": "image"})
    write_records(tmp_path / "again.jsonl", [record])
    assert read_records(tmp_path / "again.jsonl") == [record]
    with pytest.raises(ValueError, match="one clip or one image"):
        to_video_r1(read_one(tmp_path, SEED), tmp_path)


@given(records(kinds=("multiple choice",)))
@settings(max_examples=30, deadline=None)
def test_seed_bench_round_trip(tmp_path_factory, record):
    root = tmp_path_factory.mktemp("root")
    record = replace(
        record, options=record.options[:4], answer=record.answer if record.answer < "E" else "A", trace="",
        duration=None, source="SEED-Bench-R1/Ego4D", clip=root / "videos/Ego4D/a.mp4",
        image=root / "images/Ego4D/a.png",
    )
    row = {
        "sample_id": record.record_id, "question": record.question, "golden_choice_idx": record.answer,
        "answer": record.options[LETTERS.index(record.answer)], "domain": record.question_type,
        "task_progress_metadata": SEED["task_progress_metadata"], "video_source": "Ego4D", "video_basename": "a.mp4",
        "current_observation_basename": "a.png",
    } | {f"choice_{letter}": text for letter, text in zip("abcd", record.options)}
    assert read_one(root, row) == record


@given(records(kinds=data.CHOICE_TYPES))
@settings(max_examples=30, deadline=None)
def test_next_gqa_and_videochat_round_trip(tmp_path_factory, record):
    root = tmp_path_factory.mktemp("root")
    record = replace(record, record_id="12_3", clip=root / "12.mp4", trace="", source="NExT-GQA", duration=60.0)
    row = {"video_id": "12", "frame_count": 9, "width": 4, "height": 4, "question": record.question, "qid": "3",
           "answer": record.options[LETTERS.index(record.answer)], "type": record.question_type}
    with open(root / "val.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, GQA_HEADER.split(","))
        writer.writeheader()
        writer.writerow(row | {f"a{i}": text for i, text in enumerate(record.options)})
    gsub = {"12": {"duration": 60.0, "fps": 30.0, "location": {"3": record.spans} if record.spans else {}}}
    (root / "gsub_val.json").write_text(json.dumps(gsub))
    assert read_records(root / "val.csv") == [record]

    record = replace(record, source="VideoChat-R1")
    row = {"id": "12_3", "video": "12.mp4", "question": record.question, "answer": f"({record.answer})",
           "options": [f"({letter}) {text}" for letter, text in zip(LETTERS, record.options)], "duration": 60.0,
           "glue": record.spans, "type": record.question_type}
    assert read_one(root, row) == record


def test_one_reader_serves_toyvideoqa(tmp_path):
    toy = Path(__file__).resolve().parents[1] / "data" / "toyvideoqa" / "train.jsonl"
    if not toy.exists():
        pytest.skip("ToyVideoQA is not there; make it with python -m dvr1_lite data")
    records = read_records(toy)
    assert len(records) >= 4000
    write_records(tmp_path / "again.jsonl", records, root=toy.parent)
    assert read_records(tmp_path / "again.jsonl", root=toy.parent) == records


# Prompts


def test_the_answer_in_words():
    assert with_option("B", ("red", "blue")) == "B (blue)" and with_option("b ", ("red", "blue")) == "b  (blue)"
    assert [with_option(said, ("red", "blue")) for said in ("C", "blue", "", "1")] == ["C", "blue", "", "1"]
    record = Record("r", "When is it red?", ("red", "blue"), "A", "grounding", "grounding", None, spans=((1.0, 2.5),))
    assert record.answer_in_words == "A (red) from 1.0 to 2.5"


def test_prompt_text_by_hand(tmp_path):
    record = read_one(tmp_path, SPAN)
    options = "Options: A. red B. A blue one C. green D. yellow"
    assert prompt_text(record) == f"{record.question}\n{options}"
    assert prompt_text(record, hint="first _", show_answer=True, instruction="Think first.") == (
        f"{record.question}\n{options}\nHint: first _\nThe answer is A from 0.5 to 2.5.\nThink first."
    )
    number = read_one(tmp_path, NUMBER)
    assert prompt_text(number, show_answer=True) == f"{number.question}\nThe answer is 3.5."


# Records that cannot be read


def without(row: dict, name: str) -> dict:
    return {key: value for key, value in row.items() if key != name}


@pytest.mark.parametrize("name", ["problem", "data_type", "problem_type", "options", "solution", "path"])
def test_a_missing_field_is_named_with_file_and_line(tmp_path, name):
    path = write_lines(tmp_path / "train.jsonl", [CHOICE, CHOICE, without(CHOICE, name)])
    with pytest.raises(RecordError) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}, line 3, field {name!r}: is missing; ")


@pytest.mark.parametrize("name", ["sample_id", "question", "choice_b", "answer", "video_source", "video_basename",
                                  "current_observation_basename", "task_progress_metadata"])
def test_a_missing_seed_bench_field_is_named(tmp_path, name):
    with pytest.raises(RecordError, match=f"line 2, field '{name}': is missing; "):
        read_records(write_lines(tmp_path / "training_6k.jsonl", [SEED, without(SEED, name)]))


@pytest.mark.parametrize("name", ["video", "question", "options", "answer"])
def test_a_missing_videochat_field_is_named(tmp_path, name):
    with pytest.raises(RecordError, match=f"line 2, field '{name}': is missing; "):
        read_records(write_lines(tmp_path / "val.jsonl", [VIDEOCHAT, without(VIDEOCHAT, name)]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"problem_type": "essay"}, "field 'problem_type': unknown value 'essay'; use one of: multiple choice, "),
        ({"data_type": "sound"}, "use one of: video, image"),
        ({"problem": ["a"]}, "field 'problem': is a list, not a text"),
        ({"problem": True}, "is a bool, not a text"),
        ({"problem": ""}, "field 'problem': is empty"),
        ({"problem": "What <|im_end|> now?"}, "holds the model's special token <|im_end|>"),
        ({"options": ["A. <|video_pad|>", "B. x"]}, "field 'options[0]': holds the model's special token"),
        ({"options": "red"}, "field 'options': is not a list"),
        ({"options": ["A. red"]}, "field 'options': 1 options; give 2 to 26"),
        ({"options": ["x"] * 27}, "27 options"),
        ({"options": ["A. red", "B. "]}, "field 'options[1]': is empty"),
        ({"options": ["A. red", {"b": 1}]}, "field 'options[1]': is a dict"),
        ({"solution": "B"}, "holds no <answer>...</answer>"),
        ({"solution": "<answer>B"}, "holds no <answer>...</answer>"),
        ({"solution": "<answer>B</answer><glue>[(1, 2)]</glue>"}, "has 1 spans but the problem type is 'multiple"),
        ({"problem_type": "grounding"}, "has 0 spans but the problem type is 'grounding'"),
        ({"duration": "long"}, "field 'duration': 'long' is not a number"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, change, message):
    with pytest.raises(RecordError) as caught:
        read_one(tmp_path, CHOICE | change)
    assert message in str(caught.value) and f"{tmp_path / 'rows.jsonl'}, line 1" in str(caught.value)


@pytest.mark.parametrize(
    "glue, message",
    [
        ("[(2.5, 2.5)]", "the span from 2.5 to 2.5 s has no length"),
        ("[(3, 1)]", "the span from 3.0 to 1.0 s has no length"),
        ("[(70, 80)]", "has no length within a clip of 60.0 s"),
        ("[(-3, -1)]", "has no length"),
        ("[(1, 2, 3)]", "holds no (start, end) pairs"),
        ("", "holds no (start, end) pairs"),
        ("[(one, two)]", "'one' is not a number"),
        ("[(0, 1e999)]", "'1e999' is not a number"),
        ("[(nan, 1)]", "'nan' is not a number"),
    ],
)
def test_impossible_spans_are_named(tmp_path, glue, message):
    with pytest.raises(RecordError) as caught:
        read_one(tmp_path, SPAN | {"solution": f"<answer>A</answer><glue>{glue}</glue>", "duration": 60})
    assert message in str(caught.value) and "line 1, field 'solution'" in str(caught.value)


@pytest.mark.parametrize("location", [[[1, 2, 3]], [1, 2], "1-2", [[2, 1]], [["a", "b"]], [[None, 3]], {"6": 1}])
def test_impossible_next_gqa_spans_are_named(tmp_path, location):
    gsub = {"4010069381": {"duration": 12.3, "location": {"6": location}, "fps": 30.0}}
    with pytest.raises(RecordError, match="val.csv, line 2, spans of video 4010069381, field 'location'"):
        read_records(write_gqa(tmp_path, gsub=gsub))


@pytest.fixture
def root(tmp_path):
    """A data root with links that lead out of it and one that leads nowhere."""
    root = tmp_path / "root"
    for folder in (root, tmp_path / "outside"):
        (folder / "videos").mkdir(parents=True)
    try:
        for place in (root, root / "videos"):
            (place / "link").symlink_to(tmp_path / "outside")
            (place / "link.mp4").symlink_to(tmp_path / "outside/a.mp4")
            (place / "loop").symlink_to(place / "loop")
    except OSError:
        pytest.skip("links need rights on this system")
    return root


OUTSIDE = ["../secret.mp4", "clips/../../secret.mp4", "/etc/passwd", "C:/clips/a.mp4", "\\\\server\\a.mp4", "..\\a.mp4",
           "clips\\..\\..\\a.mp4", "a\0.mp4", "http://host/a.mp4", "file:///etc/passwd", "link/a.mp4", "link.mp4"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_paths_cannot_leave_the_data_root(root, path):
    for row in (CHOICE | {"path": path}, VIDEOCHAT | {"video": path}):
        with pytest.raises(RecordError, match="data root"):
            read_one(root, row)


@pytest.mark.parametrize("path", OUTSIDE + ["loop/a.mp4", "x" * 5000, "concat:a.mp4|b.mp4/../../../c"])
def test_what_is_read_lies_below_the_data_root(root, path):
    errors = []
    rows = [CHOICE | {"path": path}, SEED | {"video_source": path}, SEED | {"video_basename": path}, SEED_TRAIN
            | {"current_observation_basename": path}]
    records = [r for row in rows for r in read_records(write_lines(root / "rows.jsonl", [row]), errors=errors)]
    gqa = write_gqa(root, [f"{path},9,4,4,q?,1,0,DL,a,b,c,d,e"], gsub=None)
    records += read_records(gqa, errors=errors)
    assert len(records) + len(errors) == 5
    for place in (place for record in records for place in (record.clip, record.image) if place):
        assert ".." not in place.parts and os.path.realpath(place).startswith(os.path.realpath(root) + os.sep)


def test_links_within_the_root_are_fine(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/b.mp4").touch()
    (tmp_path / "clips/a.mp4").symlink_to("b.mp4")
    assert read_one(tmp_path, CHOICE).clip == tmp_path / "clips/a.mp4"
    (tmp_path / "other").symlink_to(tmp_path)  # the root itself may be reached through a link
    assert read_records(tmp_path / "rows.jsonl", root=tmp_path / "other")[0].clip == tmp_path / "other/clips/a.mp4"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b"", "holds no records"),
        ("a.jsonl", b"\n \n", "holds no records"),
        ("a.json", b"[]", "holds no records"),
        ("a.csv", b"", "holds no records"),
        ("a.csv", GQA_HEADER.encode(), "holds no records"),
        ("a.txt", b"{}", "unknown kind of file; give a .jsonl, .json or .csv file"),
        ("a.jsonl", json.dumps(CHOICE).encode() + b"\n{broken\n", "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", json.dumps(CHOICE).encode() + b"\n[1]\n", "a.jsonl, line 2: a list, not an object"),
        ("a.jsonl", json.dumps(CHOICE).encode() + b"\n\n\xff\xfe\n", "a.jsonl, line 3: not UTF-8"),
        ("a.json", b'[{"a": 1},\n {"b" 2}]', "a.json, line 2: not valid JSON"),
        ("a.json", b'[{"a": 1},\n\n "\xff"]', "a.json, line 3: not UTF-8"),
        ("a.json", b"{}", "not a list of records"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b"[" + b"9" * 5000 + b"]", "not valid JSON"),
        ("a.json", b"[NaN]", "NaN is no JSON value"),
        ("a.json", b"[3]", "a.json, record 1: a int, not an object"),
        ("a.jsonl", b'{"a": 1}', "no known format has these fields; use one of Video-R1: data_type"),
        ("a.csv", b"a,b\n1,2\n", "no known format has these fields"),
        ("a.csv", f"{GQA_HEADER}\n{'1,' * 20}".encode(), "a.csv, line 2: more cells than the header"),
        ("a.csv", f"{GQA_HEADER}\n1,2\n".encode(), "a.csv, line 2, field 'qid': is missing"),
        ("a.csv", f'{GQA_HEADER}\n"1'.encode(), "a.csv, line 2: not valid CSV (unexpected end"),
        ("a.csv", f"{GQA_HEADER}\n{'x' * 200_000}".encode(), "not valid CSV (field larger"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordError) as caught:
        read_records(tmp_path / name)
    assert message in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_missing_files_and_roots_are_named(tmp_path):
    with pytest.raises(RecordError, match="no such file; check the path"):
        read_records(tmp_path / "none.jsonl")
    write_lines(tmp_path / "rows.jsonl", [CHOICE])
    with pytest.raises(RecordError, match="no such data root; give the folder"):
        read_records(tmp_path / "rows.jsonl", root=tmp_path / "nowhere")
    with pytest.raises(RecordError, match="no such file"):
        read_records(write_gqa(tmp_path), spans=tmp_path / "none.json")
    (tmp_path / "gsub_val.json").write_text("[]")
    with pytest.raises(RecordError, match="gsub_val.json: not an object"):
        read_records(tmp_path / "val.csv")


def test_absurdly_long_input_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x" * 101)
    assert len(read_text(tmp_path / "a.txt", max_bytes=101)) == 101
    with pytest.raises(RecordError, match="larger than 100 bytes"):
        read_text(tmp_path / "a.txt", max_bytes=100)
    monkeypatch.setattr(data, "MAX_LINE_BYTES", 1000)
    path = write_lines(tmp_path / "a.jsonl", [CHOICE, CHOICE | {"problem": "x" * 2000}])
    with pytest.raises(RecordError, match="line 2: longer than 1000 bytes"):
        read_records(path)


def test_a_byte_order_mark_is_no_obstacle(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(CHOICE).encode())
    assert len(read_records(tmp_path / "a.jsonl")) == 1


def test_errors_can_be_collected(tmp_path):
    rows = [without(CHOICE, "path"), CHOICE, CHOICE | {"path": "../a.mp4"}, NUMBER]
    path = write_lines(tmp_path / "a.jsonl", rows)
    path.write_text("{broken\n" + path.read_text())
    errors = []
    assert [record.record_id for record in read_records(path, errors=errors)] == ["7", "8"]
    assert [str(error).split(",")[1][:7] for error in errors] == [" line 1", " line 2", " line 4"]


def mutate_value(rng: random.Random, value):
    odd = [None, True, -1, 1e400, "", "<answer>", "A" * 5000, [], {}, [[]], {"a": {}}, "../x", "\0", "<|im_end|>",
           "\ud800"]
    if isinstance(value, list) and value and rng.random() < 0.5:
        at = rng.randrange(len(value))
        return value[:at] + [mutate_value(rng, value[at])] + value[at + 1 :]
    return rng.choice(odd)


def test_mutated_records_are_read_or_refused(tmp_path):
    rng = random.Random(0)
    for count in range(400):
        row = dict(rng.choice([CHOICE, NUMBER, SPAN, SEED, SEED_TRAIN, VIDEOCHAT]))
        for name in rng.sample(sorted(row), rng.choice([1, 1, 2])):
            row[name] = mutate_value(rng, row[name])
        errors = []
        try:
            read_records(write_lines(tmp_path / "a.jsonl", [row]), errors=errors)
        except RecordError as error:
            errors.append(error)
        assert all("; " in str(error) and "a.jsonl" in str(error) for error in errors)
    whole = write_gqa(tmp_path).read_bytes()
    for count in range(200):
        broken = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            broken[rng.randrange(len(broken))] = rng.choice(b'",\n\r\0\xff01ab')
        (tmp_path / "val.csv").write_bytes(broken)
        try:
            read_records(tmp_path / "val.csv")
        except RecordError as error:
            assert "val.csv" in str(error)


# The check


def test_check_counts_and_finds_what_is_wrong(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (16, 28, 28, 3), dtype=np.uint8)
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips/a.mp4", frames, 4)
    write_clip(tmp_path / "clips/short.mp4", frames[:4], 4)
    (tmp_path / "clips/bad.mp4").write_bytes((tmp_path / "clips/a.mp4").read_bytes()[:-200])
    Image.fromarray(frames[0]).save(tmp_path / "clips/a.png")
    late = SPAN | {"solution": "<answer>A</answer><glue>[(3, 9), (1, 2)]</glue>"}
    later = SPAN | {"problem_id": "later", "solution": "<answer>A</answer><glue>[(5, 9)]</glue>"}
    rows = [CHOICE, SPAN, late, later, NUMBER | {"data_type": "image", "path": "clips/a.png"}]
    rows += [NUMBER | {"problem_id": name, "path": f"clips/{name}.mp4"} for name in ("short", "bad", "gone")]
    errors = []
    path = write_lines(tmp_path / "rows.jsonl", rows + [without(CHOICE, "problem")])
    report = check_records(read_records(path, errors=errors), 8, errors=errors)
    assert (report.records, report.clips, report.ok) == (8, 5, False)
    assert report.by_type == {"multiple choice": 1, "grounding": 3, "numerical": 4}
    assert report.by_question_type["when"] == 3
    assert [name for name, _ in report.missing] == ["gone"]
    assert [name for name, _ in report.undecodable] == ["short", "bad"]
    assert [name for name, _ in report.span_errors] == ["9", "later"]
    text = format_report(report, examples=1)
    for line in ("8 records, 5 clips", "problem type grounding: 3", "missing files: 1", "undecodable files: 2",
                 "span errors: 2", "and 1 more", "unreadable records: 1", "field 'problem': is missing"):
        assert line in text
    assert "has 4 frames but 8 are asked for" in report.undecodable[0][1]

    quick = check_records(read_records(path, errors=[]), 8, decode=False)
    assert (quick.missing, quick.span_errors) == (report.missing, report.span_errors)
    assert [name for name, _ in quick.undecodable] == ["short", "bad"]


def test_a_sound_data_set_is_ok_and_each_clip_is_opened_once(tmp_path, monkeypatch):
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips/a.mp4", np.zeros((16, 28, 28, 3), np.uint8), 4)
    opened = []
    monkeypatch.setattr(data, "read_clip", lambda *args: opened.append(args) or real(*args))
    real = data.__dict__["probe_clip"].__globals__["read_clip"]
    report = check_records(read_records(write_lines(tmp_path / "rows.jsonl", [CHOICE, NUMBER, SPAN])), 8)
    assert report.ok and len(opened) == 1
    assert "missing files: 0" in format_report(report)
    shutil.rmtree(tmp_path / "clips")
    assert len(check_records(read_records(tmp_path / "rows.jsonl"), 8).missing) == 3


def test_records_are_hashable_and_frozen(tmp_path):
    record = read_one(tmp_path, SPAN)
    assert len({record, read_one(tmp_path, SPAN)}) == 1
    with pytest.raises(AttributeError):
        record.answer = "B"
    assert not os.path.isabs(read_records(os.path.relpath(tmp_path / "rows.jsonl"))[0].clip)
