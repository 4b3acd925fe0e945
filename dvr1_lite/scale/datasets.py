r"""Readers of the data sets that the paper trains and tests on (appendix E), into the same `Record` as `data.py`.

Each format is a pydantic model of its rows; `read_any` picks the model by the file's field names.
"""

import csv
import os
import random
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ValidationInfo, field_validator

from ..data import OwnClips, Record, VideoR1
from ..errors import RecordError
from ..fields import (LETTERS, FieldError, FullText, MediaPath, Options, Seconds, Spans, Text, choose_letter,
                      parse_json, path_below, read_rows, read_text)

SOURCES = {  # where to get each format
    "Video-R1": "https://huggingface.co/datasets/Video-R1/Video-R1-data (JSON, images and videos)",
    "SEED-Bench-R1": "https://huggingface.co/datasets/TencentARC/SEED-Bench-R1 (training_6k.jsonl, "
                     "validation_L1|L2|L3.jsonl; videos from EPIC-KITCHENS-100 and Ego4D, under their own licences)",
    "NExT-GQA": "https://github.com/doc-doc/NExT-GQA (val.csv, test.csv, gsub_val.json, gsub_test.json, "
                "map_vid_vidorID.json; videos from NExT-QA)",
    "VideoChat-R1": "https://github.com/OpenGVLab/VideoChat-R1 (NExT-GQA's questions as JSON with <glue> spans)",
    "your own clips": 'JSONL with a row of {"video", "question", "answer", "options"} for each question',
}


def read_any(path: str | os.PathLike, root: str | os.PathLike | None = None, *, spans: str | os.PathLike | None = None,
             errors: list[RecordError] | None = None) -> list[Record]:
    r"""Read a file of any format in SOURCES into records, in the file's order.

    root, errors: as in `data.read_records`. spans: NExT-GQA's gsub JSON; None takes `gsub_NAME.json` beside `NAME.csv`
    if there is one. Spans are kept as annotated, also where they reach out of the clip: NExT-GQA's own evaluation
    compares with those. Raises RecordError, naming file, line, field and fix.
    """
    path = Path(path)
    if path.suffix == ".csv":
        return read_rows(path, root, (NextGQA,), errors, _next_gqa_rows(path, Path(root or path.parent), spans))
    if spans is not None:
        raise RecordError(f"{spans}: spans in a file of their own belong to NExT-GQA's CSV; leave them out for {path}")
    return read_rows(path, root, (VideoR1, OwnClips, SeedBenchR1, VideoChatR1), errors)


class SeedBenchR1(BaseModel):
    r"""A row of training_6k.jsonl (with negative_answers) or of a validation file (with four choices)."""

    sample_id: FullText
    question: FullText
    answer: FullText
    choice_a: Text = ""
    choice_b: Text = ""
    choice_c: Text = ""
    choice_d: Text = ""
    golden_choice_idx: Text = ""
    negative_answers: tuple[Text, ...] = ()
    task_progress_metadata: list
    video_source: FullText
    video_basename: Text = ""
    current_observation_basename: FullText
    domain: Text = ""

    @field_validator("video_basename", "current_observation_basename")
    @classmethod
    def _below_its_source(cls, name: str, info: ValidationInfo) -> Path | None:
        folder = "videos" if info.field_name == "video_basename" else "images"
        return path_below(f"{folder}/{info.data.get('video_source')}/{name}", info) if name else None

    def record(self, where: str) -> Record:
        if self.golden_choice_idx:
            options = (self.choice_a, self.choice_b, self.choice_c, self.choice_d)
            if "" in options:
                raise FieldError(f"choice_{'abcd'[options.index('')]}", "is missing; add it")
            letter = choose_letter("golden_choice_idx", self.golden_choice_idx, options)
            if options[LETTERS.index(letter)] != self.answer:
                raise FieldError("golden_choice_idx", f"points to another text than {self.answer!r}; correct one")
        else:
            options = self._draw()
            letter = LETTERS[options.index(self.answer)]
        clip = self.video_basename if self.task_progress_metadata else None  # else only the observation is shown
        if self.task_progress_metadata and not clip:
            raise FieldError("video_basename", "is missing; add it")
        return Record(self.sample_id, self.question, options, letter, "multiple choice",
                      self.domain or "multiple choice", clip, self.current_observation_basename,
                      source=f"SEED-Bench-R1/{self.video_source}")

    def _draw(self) -> tuple[str, ...]:
        r"""Draw three incorrect answers; a sample has the same ones in every run."""
        incorrect = [text for text in dict.fromkeys(self.negative_answers) if text and text != self.answer]
        if len(incorrect) < 3:
            raise FieldError("negative_answers", f"{len(incorrect)} incorrect answers; give at least 3 different ones")
        generator = random.Random(self.sample_id)
        options = generator.sample(incorrect, 3) + [self.answer]
        generator.shuffle(options)
        return tuple(options)


class VideoChatR1(BaseModel):
    r"""A row of VideoChat-R1's version of NExT-GQA."""

    id: Text = ""
    video: MediaPath
    question: FullText
    options: Options
    duration: Seconds | None = None
    glue: Spans = ()
    type: Text = ""
    answer: FullText

    def record(self, where: str) -> Record:
        kind = "grounding" if self.glue else "multiple choice"
        return Record(self.id or where, self.question, self.options,
                      choose_letter("answer", self.answer, self.options), kind, self.type or kind, self.video,
                      spans=self.glue, source="VideoChat-R1", duration=self.duration)


class NextGQA(BaseModel):
    r"""A row of NExT-GQA's CSV, joined with its clip's path, and its spans and duration from gsub_NAME.json."""

    video_id: FullText
    question: FullText
    qid: FullText
    type: FullText
    a0: FullText
    a1: FullText
    a2: FullText
    a3: FullText
    a4: FullText
    answer: FullText
    path: MediaPath
    location: Spans = ()
    duration: Seconds | None = None

    def record(self, where: str) -> Record:
        options = (self.a0, self.a1, self.a2, self.a3, self.a4)
        if self.answer in options:  # the text in NExT-GQA, a number from 0 to 4 in NExT-QA
            letter = LETTERS[options.index(self.answer)]
        else:
            position = self.answer in list("01234")
            letter = choose_letter("answer", LETTERS[int(self.answer)] if position else self.answer, options)
        return Record(f"{self.video_id}_{self.qid}", self.question, options, letter,
                      "grounding" if self.location else "multiple choice", self.type, self.path, spans=self.location,
                      source="NExT-GQA", duration=self.duration)


def _next_gqa_rows(path: Path, root: Path, spans: str | os.PathLike | None) -> Iterator[tuple[str, dict]]:
    r"""Yield (place, row) for each line of the CSV, with the clip's path, spans and duration from the JSON files."""
    located = _json_object(Path(spans or path.with_name(f"gsub_{path.stem}.json")), required=spans is not None)
    names = _json_object(path.with_name("map_vid_vidorID.json"), required=False)
    reader = csv.DictReader(read_text(path).splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            if None in row:
                raise RecordError(f"{path}, line {reader.line_num}: more cells than the header; quote texts with "
                                  f"commas")
            video = row.get("video_id") or ""
            entry = located.get(video) or {}
            location = entry.get("location", {}) if isinstance(entry, dict) else entry
            files = [f"{folder}{name}.mp4" for name in (names.get(video), video) if name
                     for folder in ("", "NExTVideo/", "videos/")]
            yield f"{path}, line {reader.line_num}", row | {
                "path": next((file for file in files if os.path.exists(root / file)), files[0] if files else None),
                "location": location.get(row.get("qid"), []) if isinstance(location, dict) else location,
                "duration": entry.get("duration") if isinstance(entry, dict) else None}
    except csv.Error as error:
        raise RecordError(f"{path}, line {reader.line_num + 1}: not valid CSV ({error}); correct it") from error


def _json_object(path: Path, required: bool) -> dict:
    if not required and not path.exists():
        return {}
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, dict):
        raise RecordError(f"{path}: not an object that maps video ids; take the file as published")
    return value
