r"""The paper's data sets in their published schemas, and errors in them."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings

from dvr1_lite.data import Record, read_records
from dvr1_lite.errors import RecordError
from dvr1_lite.fields import LETTERS
from dvr1_lite.scale.datasets import SOURCES, read_any
from tests.core.test_data import CHOICE, NUMBER, OUTSIDE, OWN, SPAN, records, root, without, write_lines

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


def read_one(folder: Path, row: dict) -> Record:
    [record] = read_any(write_lines(folder / "rows.jsonl", [row]))
    return record


def write_gqa(folder: Path, rows=GQA_ROWS, gsub=GSUB, name: str = "val") -> Path:
    (folder / f"{name}.csv").write_text("\n".join([GQA_HEADER, *rows]) + "\n", encoding="utf-8")
    if gsub is not None:
        (folder / f"gsub_{name}.json").write_text(json.dumps(gsub))
    return folder / f"{name}.csv"


def test_rows_in_the_fields_of_data_are_read_as_data_reads_them(tmp_path):
    for rows in ([CHOICE, NUMBER, SPAN], [OWN, without(OWN, "options")]):
        path = write_lines(tmp_path / "rows.jsonl", rows)
        assert read_any(path) == read_records(path)
    assert {"Video-R1", "SEED-Bench-R1", "NExT-GQA", "VideoChat-R1"} < SOURCES.keys()


# --- SEED-Bench-R1 ---------------------------------------------------------------------------------------------------


def test_a_validation_row_of_seed_bench_r1(tmp_path):
    record = read_one(tmp_path, SEED)
    assert record.answer == "C" and record.options == ("open cupboard", "take bag", "close box", "wash hands")
    assert record.clip == tmp_path / "videos/EpicKitchens/P01_12-3.mp4"
    assert record.image == tmp_path / "images/EpicKitchens/P01_12-3.png"
    assert (record.problem_type, record.question_type) == ("multiple choice", "Daily life")
    assert (record.record_id, record.source) == ("P01_12-3", "SEED-Bench-R1/EpicKitchens")


@pytest.mark.parametrize("basename", ["P01_12-3.mp4", "", None])
def test_a_row_without_progress_is_a_question_about_the_image(tmp_path, basename):
    record = read_one(tmp_path, SEED | {"task_progress_metadata": [], "video_basename": basename})
    assert record.clip is None and record.image == tmp_path / "images/EpicKitchens/P01_12-3.png"


def test_training_rows_draw_three_incorrect_answers_that_depend_on_the_sample_alone(tmp_path):
    rows = [SEED_TRAIN | {"sample_id": f"s{i}"} for i in range(60)]
    records = read_any(write_lines(tmp_path / "training_6k.jsonl", rows))
    for record in records:
        assert len(set(record.options)) == 4, "the doubled and the correct answer must not be drawn twice"
        assert record.options[LETTERS.index(record.answer)] == "close box"
    assert {record.answer for record in records} == set("ABCD")
    assert len({record.options for record in records}) > 30
    assert read_any(write_lines(tmp_path / "reversed.jsonl", rows[::-1]))[::-1] == records
    assert records[0].options == ("wash hands", "close box", "fold bag", "open cupboard"), "the same on every machine"


@pytest.mark.parametrize(("row", "message"), [
    *((without(SEED, name), f"field '{name}': is missing; ")
      for name in ("sample_id", "question", "choice_b", "answer", "video_source", "video_basename",
                   "current_observation_basename", "task_progress_metadata")),
    (SEED | {"golden_choice_idx": "A"}, "field 'golden_choice_idx': points to another text than 'close box'"),
    (SEED | {"golden_choice_idx": "E"}, "field 'golden_choice_idx': 'E' is none of the 4 options"),
    (SEED_TRAIN | {"negative_answers": ["close box", "a", "b", "a", " "]},
     "field 'negative_answers': 2 incorrect answers; give at least 3 different ones"),
    (SEED_TRAIN | {"negative_answers": "a"}, "field 'negative_answers': 'a' does not fit"),
    *((without(VIDEOCHAT, name), f"field '{name}': is missing; ")
      for name in ("video", "question", "options", "answer")),
])
def test_impossible_fields_are_named(tmp_path, row, message):
    with pytest.raises(RecordError) as caught:
        read_any(write_lines(tmp_path / "rows.jsonl", [VIDEOCHAT if "video" in row or "glue" in row else SEED, row]))
    assert f"rows.jsonl, line 2, {message}" in str(caught.value)


# --- NExT-GQA and VideoChat-R1 ---------------------------------------------------------------------------------------


def test_next_gqa_rows_with_their_spans_as_annotated(tmp_path):
    why, after, count = read_any(write_gqa(tmp_path))
    assert (why.record_id, why.question_type, why.answer, why.source) == ("4010069381_6", "CW", "C", "NExT-GQA")
    assert why.problem_type == "grounding" and why.duration == 12.3
    assert why.spans == ((-0.1, 2.5), (5.0, 14.0)), "the official evaluation does not cut spans to the clip"
    assert (after.answer, after.options[3], after.spans) == ("D", "play, then rest", ((3.0, 4.0),))
    assert (count.answer, count.problem_type, count.spans) == ("B", "multiple choice", ())  # the text 2, not position 2
    assert count.clip == tmp_path / "2345678901.mp4"
    row = "1,9,640,480,where?,3,0,DL,park,street,house,garden,room"  # as in NExT-QA: the answer is a position
    assert read_any(write_gqa(tmp_path, [row]))[0].answer == "D"


def test_next_gqa_finds_its_companion_files(tmp_path):
    path = write_gqa(tmp_path, gsub=None, name="train")  # only val and test carry spans
    assert {record.problem_type for record in read_any(path)} == {"multiple choice"}
    (tmp_path / "map_vid_vidorID.json").write_text(json.dumps({"4010069381": "1106/4010069381"}))
    folder = tmp_path / "root"
    (folder / "NExTVideo/1106").mkdir(parents=True)
    (folder / "NExTVideo/1106/4010069381.mp4").touch()
    (tmp_path / "spans.json").write_text(json.dumps(GSUB))
    record = read_any(path, folder, spans=tmp_path / "spans.json")[0]
    assert record.clip == folder / "NExTVideo/1106/4010069381.mp4" and record.problem_type == "grounding"


def test_videochat_r1_rows(tmp_path):
    (tmp_path / "nextgqa_val.json").write_text(json.dumps([VIDEOCHAT, VIDEOCHAT | {"id": "q2", "glue": None}]))
    record, plain = read_any(tmp_path / "nextgqa_val.json")
    assert record == Record(
        record_id="4010069381_5", question="why did the boy move to the sofa?", answer="C",
        options=("share", "approach", "unwrap it", "play", "gesture"), problem_type="grounding", question_type="CW",
        clip=tmp_path / "1106/4010069381.mp4", spans=((5.2, 10.4), (20.0, 22.5)), source="VideoChat-R1", duration=38.2)
    assert plain.problem_type == "multiple choice" and plain.spans == ()


@pytest.mark.parametrize("location", [[[1, 2, 3]], [1, 2], "1-2", [[2, 1]], [["a", "b"]], [[None, 3]], {"6": 1}])
def test_impossible_next_gqa_spans_are_named(tmp_path, location):
    gsub = {"4010069381": {"duration": 12.3, "location": {"6": location}, "fps": 30.0}}
    with pytest.raises(RecordError, match="val.csv, line 2, field 'location"):
        read_any(write_gqa(tmp_path, gsub=gsub))


@pytest.mark.parametrize(("content", "message"), [
    (GQA_HEADER.encode(), "holds no records"),
    (b"a,b\n1,2\n", "a.csv, line 2, field 'video_id': is missing"),
    (f"{GQA_HEADER}\n{'1,' * 20}".encode(), "a.csv, line 2: more cells than the header"),
    (f"{GQA_HEADER}\n1,2\n".encode(), "a.csv, line 2, field 'question': is missing"),
    (f'{GQA_HEADER}\n"1'.encode(), "a.csv, line 2: not valid CSV (unexpected end"),
    (f"{GQA_HEADER}\n{'x' * 200_000}".encode(), "not valid CSV (field larger"),
])
def test_unreadable_csv_files_are_named(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(RecordError) as caught:
        read_any(tmp_path / "a.csv")
    assert message in str(caught.value) and str(tmp_path / "a.csv") in str(caught.value)


def test_span_files_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(RecordError, match="none.json: no such file"):
        read_any(write_gqa(tmp_path), spans=tmp_path / "none.json")
    (tmp_path / "gsub_val.json").write_text("[]")
    with pytest.raises(RecordError, match="gsub_val.json: not an object"):
        read_any(tmp_path / "val.csv")
    with pytest.raises(RecordError, match="belong to NExT-GQA's CSV"):
        read_any(write_lines(tmp_path / "rows.jsonl", [VIDEOCHAT]), spans=tmp_path / "gsub_val.json")


# --- all formats -----------------------------------------------------------------------------------------------------


@given(records().filter(lambda record: record.options))
@settings(max_examples=40, deadline=None)
def test_round_trips_through_the_published_schemas(tmp_path_factory, record):
    root = tmp_path_factory.mktemp("root")
    record = replace(record, record_id="12_3", clip=root / "12.mp4", trace="", source="NExT-GQA", duration=60.0)
    with open(root / "val.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([GQA_HEADER.split(","), [
            "12", 9, 4, 4, record.question, record.options[LETTERS.index(record.answer)], "3", record.question_type,
            *record.options]])
    gsub = {"12": {"duration": 60.0, "fps": 30.0, "location": {"3": record.spans} if record.spans else {}}}
    (root / "gsub_val.json").write_text(json.dumps(gsub))
    assert read_any(root / "val.csv") == [record]
    row = {"id": "12_3", "video": "12.mp4", "question": record.question, "answer": f"({record.answer})",
           "options": [f"({letter}) {text}" for letter, text in zip(LETTERS, record.options)], "duration": 60.0,
           "glue": record.spans, "type": record.question_type}
    assert read_one(root, row) == replace(record, source="VideoChat-R1")
    row = SEED | {"question": record.question, "golden_choice_idx": "A", "answer": record.options[0]}
    row |= {f"choice_{letter}": text for letter, text in zip("abcd", record.options)}
    assert read_one(root, row).options == record.options[:4]


@pytest.mark.parametrize("path", OUTSIDE)
def test_every_file_that_is_read_lies_below_the_data_root(root, path):
    errors = []
    rows = [VIDEOCHAT | {"video": path}, SEED | {"video_source": path}, SEED | {"video_basename": path},
            SEED_TRAIN | {"current_observation_basename": path}]
    found = [r for row in rows for r in read_any(write_lines(root / "rows.jsonl", [row]), errors=errors)]
    found += read_any(write_gqa(root, [f"{path},9,4,4,q?,1,0,DL,a,b,c,d,e"], gsub=None), errors=errors)
    assert len(found) + len(errors) == 5
    for place in (place for record in found for place in (record.clip, record.image) if place):
        assert ".." not in place.parts and os.path.realpath(place).startswith(os.path.realpath(root) + os.sep)
