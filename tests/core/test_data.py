r"""Records: Video-R1's fields, the shortest rows, prompts, round trips, errors that name file, line, field and fix."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvr1_lite import fields
from dvr1_lite.data import CHOICE_TYPES, PROBLEM_TYPES, Record, prompt_text, read_records, with_option
from dvr1_lite.errors import RecordError
from tests.records import write_records

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
OWN = {"video": "clips/a.mp4", "question": "What is poured?", "answer": "B", "options": ["milk", "water"]}


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_one(folder: Path, row: dict) -> Record:
    [record] = read_records(write_lines(folder / "rows.jsonl", [row]))
    return record


def without(row: dict, *names: str) -> dict:
    return {key: value for key, value in row.items() if key not in names}


# --- rows ------------------------------------------------------------------------------------------------------------


def test_video_r1_fields(tmp_path):
    choice, number, span = read_records(write_lines(tmp_path / "train.jsonl", [CHOICE, NUMBER, SPAN]))
    assert choice == Record(
        record_id="7", question="Which colour does the square have first?", answer="B",
        options=("red", "A blue one", "green", "yellow"), problem_type="multiple choice",
        question_type="multiple choice", clip=tmp_path / "clips/a.mp4", source="LLaVA-Video-178K")
    assert (number.answer, number.options, number.problem_type) == ("3.5", (), "numerical")
    assert (span.answer, span.spans, span.question_type, span.trace) == ("A", ((0.5, 2.5),), "when", "first red")
    assert choice.clip_id == span.clip_id == str(tmp_path / "clips/a.mp4")


def test_a_json_list_below_another_root(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "Video-R1-260k.json").write_text(json.dumps([CHOICE, NUMBER | {"data_type": "image", "path": "b.png"}]))
    video, image = read_records(tmp_path / "Video-R1-260k.json", root=tmp_path / "media")
    assert (video.clip, video.image) == (tmp_path / "media/clips/a.mp4", None)
    assert (image.clip, image.image, image.clip_id) == (None, tmp_path / "media/b.png", str(tmp_path / "media/b.png"))


@pytest.mark.parametrize(("text", "letter"), [("B", "B"), ("(B)", "B"), (" B. ", "B"), ("B. A blue one", "B"),
                                              ("(D) yellow", "D"), ("C)", "C"), ("A blue one", "B")])
def test_answers_that_name_an_option(tmp_path, text, letter):
    row = CHOICE | {"solution": f"<answer>{text}</answer>", "problem_type": "Multiple Choice"}
    assert read_one(tmp_path, row).answer == letter


@pytest.mark.parametrize("text", ["Clap", "A cat", "E", "1", "AB", "b", ""])
def test_answers_that_name_no_option_are_refused(tmp_path, text):
    with pytest.raises(RecordError, match=r"line 1, field 'solution'.*none of the 4 options.*A to D"):
        read_one(tmp_path, CHOICE | {"solution": f"<answer>{text}</answer>"})


def test_option_letters_are_removed_only_where_they_are_labels(tmp_path):
    options = ["A. A. Milne", "(B) B", "C", "D.C. is the capital", "Ernest", "F) x"]
    row = CHOICE | {"options": options, "solution": "<answer>A</answer>"}
    assert read_one(tmp_path, row).options == ("A. Milne", "B", "C", "D.C. is the capital", "Ernest", "x")


@pytest.mark.parametrize(("glue", "spans"), [
    ("[(0.5, 2.5)]", ((0.5, 2.5),)), (" 0.5 2.5 ", ((0.5, 2.5),)), ("[[0.5, 2.5]]", ((0.5, 2.5),)),
    ("[(-0.1, 2.5), (3, 9)]", ((-0.1, 2.5), (3.0, 9.0)))])
def test_spans_are_read_with_any_brackets_and_kept_as_annotated(tmp_path, glue, spans):
    row = SPAN | {"solution": f"<answer>A</answer><glue>{glue}</glue>", "duration": 4}
    assert read_one(tmp_path, row).spans == spans


def test_own_clips_need_three_or_four_fields(tmp_path):
    choice, free = read_records(write_lines(tmp_path / "own.jsonl", [OWN, without(OWN, "options") | {"answer": "tea"}]))
    assert (choice.answer, choice.options, choice.problem_type) == ("B", ("milk", "water"), "multiple choice")
    assert (free.answer, free.options, free.problem_type) == ("tea", (), "exact")
    assert choice.clip == free.clip == tmp_path / "clips/a.mp4" and choice.record_id != free.record_id


# --- round trips and prompts -----------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=12)
words = texts.filter(lambda text: "<" not in text and not text[1:2] in ("", ".", ")", ":") and text[0] != "(")


@st.composite
def records(draw):
    kind = draw(st.sampled_from(PROBLEM_TYPES))
    options = tuple(draw(st.lists(words, min_size=5, max_size=5, unique=True))) if kind in CHOICE_TYPES else ()
    ends = draw(st.lists(st.floats(-2, 50), min_size=2, max_size=4, unique=True).map(sorted))
    return Record(
        record_id=draw(words), question=draw(words), options=options, problem_type=kind, question_type=draw(words),
        answer=draw(st.sampled_from("ABCDE")) if options else draw(words), clip=Path("/root/clips/a.mp4"),
        spans=tuple(zip(ends[::2], ends[1::2])) if kind == "grounding" else (),
        trace=draw(words), source=draw(words), duration=draw(st.sampled_from([None, 60.0])))


@given(st.lists(records(), min_size=1, max_size=4), st.sampled_from(["clip", "image"]))
@settings(max_examples=60, deadline=None)
def test_written_records_are_read_back_unchanged(tmp_path_factory, batch, kind):
    root = tmp_path_factory.mktemp("root")
    batch = [replace(record, **{"clip": None, kind: root / "clips/a.mp4"}) for record in batch]
    write_records(root / "rows.jsonl", batch)
    assert read_records(root / "rows.jsonl") == batch


def test_prompts_and_answers_by_hand(tmp_path):
    record, number = read_one(tmp_path, SPAN), read_one(tmp_path, NUMBER)
    options = "Options: A. red B. A blue one C. green D. yellow"
    assert prompt_text(record) == f"{record.question}\n{options}"
    assert prompt_text(record, hint="first _", show_answer=True, instruction="Think first.") == (
        f"{record.question}\n{options}\nHint: first _\nThe answer is A from 0.5 to 2.5.\nThink first.")
    assert prompt_text(number, show_answer=True) == f"{number.question}\nThe answer is 3.5."
    assert record.answer_in_words == "A (red) from 0.5 to 2.5"
    assert [with_option(said, ("red", "blue")) for said in ("B", "C", "blue", "")] == ["B (blue)", "C", "blue", ""]


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "message"), [
    *((without(CHOICE, name), f"field {name!r}: is missing; add it")
      for name in ("problem", "data_type", "problem_type", "solution", "path")),
    (CHOICE | {"problem_type": "essay"}, "field 'problem_type': unknown value 'essay'; use one of: multiple choice, "),
    (CHOICE | {"data_type": "sound"}, "use one of: video, image"),
    (CHOICE | {"problem": ["a"]}, "field 'problem': \"['a']\" does not fit"),
    (CHOICE | {"problem": True}, "field 'problem': 'True' does not fit"),
    (CHOICE | {"problem": " "}, "field 'problem': is empty; add it"),
    (CHOICE | {"problem": None}, "field 'problem': is missing"),
    (CHOICE | {"problem": "What <|im_end|> now?"}, "holds the model's special token <|im_end|>"),
    (CHOICE | {"problem": "half \ud800"}, "not valid JSON"),
    (CHOICE | {"options": ["A. <|video_pad|>", "B. x"]}, "field 'options[0]': holds the model's special token"),
    (CHOICE | {"options": "red"}, "field 'options': 'red' does not fit"),
    (OWN | {"options": ["A. red", "red", "blue"]}, "field 'options': holds 'red' 2 times; make the options different"),
    (CHOICE | {"options": None}, "field 'options': 0 options; give 2 to 26"),
    (CHOICE | {"options": ["A. red"]}, "field 'options': 1 options; give 2 to 26"),
    (CHOICE | {"options": ["x"] * 27}, "27 options"),
    (CHOICE | {"options": ["A. red", "B. "]}, "field 'options': 2 options, 1 of them empty"),
    (CHOICE | {"options": ["A. red", {"b": 1}]}, "field 'options[1]': \"{'b': 1}\" does not fit"),
    (CHOICE | {"solution": "<answer>B"}, "holds no <answer>...</answer>"),
    (CHOICE | {"solution": "<answer>B</answer><glue>[(1, 2)]</glue>"}, "has 1 spans but the problem type is 'multiple"),
    (CHOICE | {"problem_type": "grounding"}, "has 0 spans but the problem type is 'grounding'"),
    (CHOICE | {"duration": "long"}, "field 'duration': 'long' does not fit"),
    (without(OWN, "answer"), "field 'answer': is missing; add it"),
    (OWN | {"answer": "C"}, "field 'answer': 'C' is none of the 2 options"),
    (OWN | {"option": ["a", "b"]}, "field 'option': is not a field of this format; remove it or correct its name"),
    *((SPAN | {"solution": f"<answer>A</answer><glue>{glue}</glue>"}, f"field 'solution': {message}")
      for glue, message in {"[(2.5, 2.5)]": "the span from 2.5 to 2.5 s has no length", "": "<glue> holds no (start",
                            "[(3, 1)]": "the span from 3.0 to 1.0 s has no length", "[(one, 2)]": "'one' does not fit",
                            "[(1, 2, 3)]": "<glue> holds no (start, end) pairs", "[(0, 1e999)]": "'1e999' does not fit",
                            "[(nan, 1)]": "'nan' does not fit"}.items()),
])
def test_an_impossible_field_is_named_with_file_line_and_fix(tmp_path, row, message):
    path = write_lines(tmp_path / "rows.jsonl", [OWN if "video" in row else CHOICE, row])
    with pytest.raises(RecordError) as caught:
        read_records(path)
    assert message in str(caught.value) and f"{path}, line 2" in str(caught.value) and "; " in str(caught.value)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("none.jsonl", None, "no such file; check the path"),
    ("a\0.jsonl", None, "no such file; check the path"),
    ("a.jsonl", b"\n \n", "holds no records"),
    ("a.json", b"[]", "holds no records"),
    ("a.txt", b"{}", "unknown kind of file; give a .jsonl or .json file"),
    ("a.jsonl", json.dumps(CHOICE).encode() + b"\n{broken\n", "a.jsonl, line 2: not valid JSON"),
    ("a.jsonl", json.dumps(CHOICE).encode() + b"\n[1]\n", "a.jsonl, line 2: a list, not an object"),
    ("a.jsonl", json.dumps(CHOICE).encode() + b"\n\n\xff\xfe\n", "a.jsonl, line 3: not UTF-8"),
    ("a.json", b'[{"a": 1},\n {"b" 2}]', "a.json, line 2 column 7: not valid JSON"),
    ("a.json", b"{}", "not a list of records"),
    ("a.json", b"[" * 100_000, "not valid JSON (recursion"),
    ("a.json", b"[" + b"9" * 5000 + b"]", "not valid JSON"),
    ("a.json", b"[NaN]", "not valid JSON"),
    ("a.json", b"[3]", "a.json, record 1: a int, not an object"),
    ("a.jsonl", b'{"a": 1}', "no known format has these fields; use one of VideoR1: problem_id"),
    ("a.jsonl", b" " * 2**16, "larger than 65535 bytes; split the file"),
])
def test_unreadable_files_are_named(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(fields, "MAX_FILE_BYTES", 2**16 - 1 if content and len(content) == 2**16 else 2**30)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordError) as caught:
        read_records(tmp_path / name)
    assert message in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_errors_of_single_rows_can_be_collected(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [without(CHOICE, "path"), CHOICE, CHOICE | {"path": "../a.mp4"}, NUMBER])
    path.write_text("\ufeff{broken\n" + path.read_text(), encoding="utf-8")  # a byte order mark is ignored
    errors = []
    assert [record.record_id for record in read_records(path, errors=errors)] == ["7", "8"]
    assert [str(error).split(",")[1][:7] for error in errors] == [" line 1", " line 2", " line 4"]
    with pytest.raises(RecordError, match="no such data root; give the folder"):
        read_records(path, root=tmp_path / "nowhere", errors=errors)


# --- paths stay below the data root ----------------------------------------------------------------------------------

OUTSIDE = ["../secret.mp4", "clips/../../secret.mp4", "/etc/passwd", "C:/clips/a.mp4", "C:a.mp4", "\\\\server\\a.mp4",
           "..\\a.mp4", "clips\\..\\..\\a.mp4", "a\0.mp4", "http://host/a.mp4", "file:///etc/passwd",
           "file:/etc/passwd", "File:\\a.mp4", "link/a.mp4", "link.mp4", "loop/a.mp4", ""]


@pytest.fixture
def root(tmp_path):
    r"""A data root with links that lead out of it, one that leads nowhere, and two that stay within."""
    root = tmp_path / "root"
    for folder in (root, tmp_path / "outside"):
        folder.mkdir()
    try:
        for name, target in {"link": "../outside", "link.mp4": "../outside/a.mp4", "loop": "loop", "in.mp4": "a.mp4",
                             "self": "../root"}.items():
            (root / name).symlink_to(target)
    except OSError:
        pytest.skip("links need rights on this system")
    return root


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("row", [CHOICE, OWN], ids=["Video-R1", "own"])
def test_paths_cannot_leave_the_data_root(root, row, path):
    with pytest.raises(RecordError, match="field '(path|video)': .*data root"):
        read_one(root, row | {"path" if "path" in row else "video": path})


@pytest.mark.parametrize("name", ["Title: x.mp4", "12:30.mp4", "file:x.mp4", "a?b=1.mp4", "50%.mp4", "in.mp4"])
def test_names_with_a_colon_and_links_within_the_root_are_plain_file_names(root, name):
    assert read_one(root, CHOICE | {"path": name}).clip == root / name
    path = root / "rows.jsonl"  # the root itself may be reached through a link, or by a relative path
    assert read_records(path, root=root / "self")[0].clip == root / "self" / name
    assert not read_records(os.path.relpath(path))[0].clip.is_absolute()
