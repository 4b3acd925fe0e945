r"""One record type and a reader for each data set that the paper trains on (appendix E).

`read_records` picks the reader by the file's fields: Video-R1 (ToyVideoQA uses its fields too), SEED-Bench-R1,
NExT-GQA (CSV and spans), VideoChat-R1. `prompt_text` turns a record into the words that follow the video.
`check_records` looks for missing clips and impossible spans before a night of training is lost on them.
"""

import contextlib
import csv
import json
import math
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

from dvr1_lite.errors import ClipError, RecordError
from dvr1_lite.video import Clip, probe_clip, read_clip, read_image

CHOICE_TYPES = ("multiple choice", "grounding")
PROBLEM_TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression", "exact", "grounding")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_FILE_BYTES = 2**30  # Video-R1-260k.json has about 0.2 GB
MAX_LINE_BYTES = 2**22
REQUIRED = object()
SPECIAL_TOKEN = re.compile(r"<\|\w{1,40}\|>")  # in a question it would end the turn or stand for a frame
CHOICE = re.compile(r"\s*\(?([A-Z])(?:[.):]+(?:\s.*)?)?\s*", re.DOTALL)  # A, A., (A), "(A) red", but not "A cat"


@dataclass(frozen=True)
class Record:
    r"""One question about one video, whatever data set it is from.

    options: texts without their letters. answer: the letter where there are options to choose from, else the text.
    problem_type: one of PROBLEM_TYPES; it decides the reward. question_type: the group that accuracies are listed by;
    the problem type if the data set has none. clip: the video; image: the current observation or, without a clip,
    all there is to see. spans: true (start, end) in seconds, 0 <= start < end; several may be right.
    trace: written reasoning, often "". duration: seconds, None where the file does not say.
    """

    record_id: str
    question: str
    options: tuple[str, ...]
    answer: str
    problem_type: str
    question_type: str
    clip: Path | None
    image: Path | None = None
    spans: tuple[tuple[float, float], ...] = ()
    trace: str = ""
    source: str = ""
    duration: float | None = None

    @property
    def clip_id(self) -> str:
        """What the question is about: records that share it are not independent samples."""
        return str(self.clip or self.image or self.record_id)

    @property
    def answer_in_words(self) -> str:
        """The right answer for a reader: with its option's text and first span, such as "A (red) from 0.0 to 1.0"."""
        span = f" from {self.spans[0][0]} to {self.spans[0][1]}" if self.spans else ""
        return with_option(self.answer, self.options) + span


def read_records(
    path: str | os.PathLike,
    root: str | os.PathLike | None = None,
    *,
    spans: str | os.PathLike | None = None,
    errors: list[RecordError] | None = None,
) -> list[Record]:
    r"""Reads a data set's file into records, in the file's order.

    root: folder that clip paths are relative to; None takes the file's own. spans: NExT-GQA's gsub JSON; None takes
    `gsub_<name>.json` beside `<name>.csv` if it is there. errors: a list that collects the errors of single
    records, which are then left out; None raises the first. Clips are not opened here: see `check_records`.
    Raises RecordError, naming file, line and field, for anything that cannot be read.
    """
    path = Path(path)
    root = path.parent if root is None else Path(root)
    if not root.is_dir():
        raise RecordError(f"{root}: no such data root; give the folder that the clips' paths start from")
    records, failed, reader = [], 0, None
    for where, value in _rows(path):
        try:
            row = _Row(_fields(value, where), where, root)
            reader = reader or _pick_reader(row, path, spans)
            records.append(reader(row))
        except RecordError as error:
            if errors is None:
                raise
            errors.append(error)
            failed += 1
    if not records and not failed:
        raise RecordError(f"{path}: the file holds no records; give a file with at least one")
    return records


def prompt_text(record: Record, *, hint: str = "", show_answer: bool = False, instruction: str = "") -> str:
    r"""The words of the user's turn after the video: question, options, hint, answer, instruction, one line each.

    hint: the beginning of a reasoning trace (section 3.3). show_answer: for the traces that hints are cut from, the
    answer stands in the prompt. Differs from the paper: it does not print its wording.
    """
    lines = [record.question]
    if record.options:
        lines.append("Options: " + " ".join(f"{letter}. {text}" for letter, text in zip(LETTERS, record.options)))
    if hint:
        lines.append(f"Hint: {hint}")
    if show_answer:
        span = f" from {record.spans[0][0]} to {record.spans[0][1]}" if record.spans else ""
        lines.append(f"The answer is {record.answer}{span}.")
    return "\n".join(lines + [instruction] * bool(instruction))


def with_option(answer: str, options: Sequence[str]) -> str:
    r"""An answer beside the text of the option that it names: "A" becomes "A (red)". Other answers stay as they are."""
    place = LETTERS.find(answer.strip().upper()) if len(answer.strip()) == 1 else -1
    return f"{answer} ({options[place]})" if 0 <= place < len(options) else answer


# One reader a format. Each takes a row and returns a record.


def _read_video_r1(row: "_Row") -> Record:
    kind = row.problem_type("problem_type")
    solution = row.text("solution")
    options = row.options("options", required=kind in CHOICE_TYPES)
    answer = _between(solution, "<answer>", "</answer>")
    if answer is None:
        raise row.error("solution", "holds no <answer>...</answer>", "write it as <answer>A</answer>")
    duration = row.number("duration", None)
    spans = row.glue("solution", solution, duration)
    if bool(spans) != (kind == "grounding"):
        raise row.error("solution", f"has {len(spans)} spans but the problem type is {kind!r}",
                        "give <glue>[(start, end)]</glue> to grounding records and to no others")
    media = row.path("path", row.text("path"))
    is_video = row.one_of("data_type", ("video", "image")) == "video"
    trace = row.text("process", "")
    return Record(
        record_id=row.text("problem_id", row.where), question=row.text("problem"), options=options,
        answer=row.letter("solution", answer, options) if kind in CHOICE_TYPES else row.clean("solution", answer),
        problem_type=kind, question_type=row.text("question_type", "") or kind,
        clip=media if is_video else None, image=None if is_video else media, spans=spans,
        trace=_between(trace, "<think>", "</think>") or trace, source=row.text("data_source", ""), duration=duration,
    )


def _read_seed_bench_r1(row: "_Row") -> Record:
    sample, answer = row.text("sample_id"), row.text("answer")
    if "golden_choice_idx" in row.fields:
        options = tuple(row.text(f"choice_{letter}") for letter in "abcd")
        letter = row.letter("golden_choice_idx", row.text("golden_choice_idx"), options)
    else:  # training rows: three wrong answers are drawn, the same ones for a sample in every run
        options = row.draw_options(sample, answer, 3)
        letter = LETTERS[options.index(answer)]
    if options[LETTERS.index(letter)] != answer:
        raise row.error("golden_choice_idx", f"points to another text than the answer {answer!r}", "correct one")
    source = row.text("video_source")
    clip = None
    if row.items("task_progress_metadata"):  # without progress there is only the observation to see
        clip = row.path("video_basename", f"videos/{source}/{row.text('video_basename')}")
    image = row.path("current_observation_basename", f"images/{source}/{row.text('current_observation_basename')}")
    return Record(
        record_id=sample, question=row.text("question"), options=options, answer=letter,
        problem_type="multiple choice", question_type=row.text("domain", "") or "multiple choice", clip=clip,
        image=image, source=f"SEED-Bench-R1/{source}",
    )


class _NextGQA:
    """NExT-GQA's CSV rows, joined with the spans of gsub_*.json and the file names of map_vid_vidorID.json."""

    def __init__(self, csv_path: Path, spans: str | os.PathLike | None):
        beside = csv_path.with_name(f"gsub_{csv_path.stem}.json")
        self.spans = _json_object(Path(spans or beside), required=spans is not None)
        self.names = _json_object(csv_path.with_name("map_vid_vidorID.json"), required=False)

    def __call__(self, row: "_Row") -> Record:
        video, question_id = row.text("video_id"), row.text("qid")
        options = tuple(row.text(f"a{i}") for i in range(5))
        duration, spans = self._located(row, video, question_id)
        return Record(
            record_id=f"{video}_{question_id}", question=row.text("question"), options=options,
            answer=self._letter(row, options), problem_type="grounding" if spans else "multiple choice",
            question_type=row.text("type"), clip=self._clip(row, video), spans=spans, source="NExT-GQA",
            duration=duration,
        )

    def _letter(self, row: "_Row", options: tuple[str, ...]) -> str:
        answer = row.text("answer")  # the text in NExT-GQA, a number from 0 to 4 in NExT-QA
        if answer in options:
            return LETTERS[options.index(answer)]
        return row.letter("answer", LETTERS[int(answer)] if answer in list("01234") else answer, options)

    def _located(self, row: "_Row", video: str, question_id: str):
        entry = _Row(self.spans.get(video, {}), f"{row.where}, spans of video {video}", row.root)
        if not isinstance(entry.fields, dict):
            raise entry.error("location", "is not an object", "take gsub_val.json or gsub_test.json as published")
        duration = entry.number("duration", None)
        located = entry.fields.get("location", {})
        pairs = located.get(question_id, []) if isinstance(located, dict) else located
        return duration, entry.pairs("location", pairs, duration)

    def _clip(self, row: "_Row", video: str) -> Path:
        names = [str(name) for name in (self.names.get(video), video) if name]
        folders = ("", "NExTVideo/", "videos/")
        paths = [row.path("video_id", f"{folder}{name}.mp4") for name in names for folder in folders]
        return next((path for path in paths if os.path.exists(path)), paths[0])


def _read_videochat_r1(row: "_Row") -> Record:
    options = row.options("options", required=True)
    duration = row.number("duration", None)
    spans = row.pairs("glue", row.fields.get("glue") or [], duration)
    kind = "grounding" if spans else "multiple choice"
    return Record(
        record_id=row.text("id", row.where), question=row.text("question"), options=options,
        answer=row.letter("answer", row.text("answer"), options), problem_type=kind,
        question_type=row.text("type", "") or kind, clip=row.path("video", row.text("video")), spans=spans,
        source="VideoChat-R1", duration=duration,
    )


FORMATS = {  # name: fields that tell it from the others, reader
    "Video-R1": ({"problem_id", "problem", "data_type", "problem_type", "solution", "path"}, _read_video_r1),
    "SEED-Bench-R1": ({"sample_id", "task_progress_metadata", "video_source", "video_basename",
                       "current_observation_basename"}, _read_seed_bench_r1),
    "VideoChat-R1": ({"video", "options", "glue", "duration", "answer", "question"}, _read_videochat_r1),
    "NExT-GQA": ({"video_id", "qid", "a0", "a1", "a2", "a3", "a4"}, None),
}


def _pick_reader(row: "_Row", path: Path, spans: str | os.PathLike | None):
    shared = {name: len(keys & row.fields.keys()) for name, (keys, _) in FORMATS.items()}
    name = max(shared, key=shared.get)
    if shared[name] < 3:
        known = "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, (keys, _) in FORMATS.items())
        raise RecordError(f"{row.where}: no known format has these fields; use one of {known}")
    return _NextGQA(path, spans) if name == "NExT-GQA" else FORMATS[name][1]


class _Row:
    """The fields of one record; every getter raises a RecordError that names file, line and field."""

    def __init__(self, fields: dict, where: str, root: Path):
        self.fields, self.where, self.root = fields, where, root

    def error(self, name: str, problem: str, remedy: str) -> RecordError:
        return RecordError(f"{self.where}, field {name!r}: {problem}; {remedy}")

    def text(self, name: str, default=REQUIRED) -> str:
        value = self.fields.get(name)
        if value is None or (value == "" and default is REQUIRED):
            if default is REQUIRED:
                raise self.error(name, "is missing" if value is None else "is empty", "add it")
            return default
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise self.error(name, f"is a {type(value).__name__}, not a text", "write it as a text")
        return self.clean(name, str(value))

    def clean(self, name: str, text: str) -> str:
        if token := SPECIAL_TOKEN.search(text):
            raise self.error(name, f"holds the model's special token {token[0]}", "remove it from the text")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can write "\ud800", which no tokenizer or file takes
            raise self.error(name, "holds half of a two-part character", "write the whole character") from error
        return text.strip()

    def number(self, name: str, default: float | None) -> float | None:
        value = self.fields.get(name)
        return default if value is None else self._finite(name, value)

    def _finite(self, name: str, value: object) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise self.error(name, f"{str(value)[:40]!r} is not a number", "give seconds such as 2.5")
        return number

    def items(self, name: str) -> list:
        value = self.fields.get(name)
        if not isinstance(value, list):
            raise self.error(name, "is missing" if value is None else "is not a list", "write it as a list")
        return value

    def one_of(self, name: str, known: tuple[str, ...]) -> str:
        value = self.text(name)
        found = {k.lower(): k for k in known}.get(value.lower())
        if found is None:
            raise self.error(name, f"unknown value {value[:40]!r}", f"use one of: {', '.join(known)}")
        return found

    def problem_type(self, name: str) -> str:
        return self.one_of(name, PROBLEM_TYPES)

    def options(self, name: str, required: bool) -> tuple[str, ...]:
        values = self.items(name) if required or self.fields.get(name) is not None else []
        if (required and len(values) < 2) or len(values) > len(LETTERS):
            raise self.error(name, f"{len(values)} options", f"give 2 to {len(LETTERS)}")
        return tuple(self._option(f"{name}[{i}]", value, LETTERS[i]) for i, value in enumerate(values))

    def _option(self, name: str, value: object, letter: str) -> str:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise self.error(name, f"is a {type(value).__name__}, not a text", "write it as a text")
        text = self.clean(name, re.sub(rf"\A\s*\(?{letter}[.):]+\s+", "", f"{value} "))
        if not text:
            raise self.error(name, "is empty", "give the option a text")
        return text

    def letter(self, name: str, value: str, options: tuple[str, ...]) -> str:
        """The letter of the right option, from "C", "(C)", "C." or "C. red"."""
        match = CHOICE.fullmatch(value)
        letter = match[1] if match else value.strip()
        if len(letter) != 1 or letter not in LETTERS[: len(options)]:
            raise self.error(name, f"{value[:40]!r} is none of the {len(options)} options",
                             f"give a letter from A to {LETTERS[len(options) - 1]}")
        return letter

    def draw_options(self, seed: str, answer: str, count: int) -> tuple[str, ...]:
        texts = [self.clean("negative_answers", str(text)) for text in self.items("negative_answers")]
        wrong = [text for text in dict.fromkeys(texts) if text and text != answer]
        if len(wrong) < count:
            raise self.error("negative_answers", f"{len(wrong)} wrong answers", f"give at least {count} different ones")
        generator = random.Random(seed)
        options = generator.sample(wrong, count) + [answer]
        generator.shuffle(options)
        return tuple(options)

    def glue(self, name: str, text: str, duration: float | None) -> tuple[tuple[float, float], ...]:
        inside = _between(text, "<glue>", "</glue>")
        if inside is None:
            return ()
        numbers = inside.translate(str.maketrans("[](),;", "      ")).split()
        if len(numbers) % 2 or not numbers:
            raise self.error(name, "<glue> holds no (start, end) pairs", "write it as <glue>[(1.0, 2.5)]</glue>")
        return self.pairs(name, list(zip(numbers[::2], numbers[1::2])), duration)

    def pairs(self, name: str, pairs: object, duration: float | None) -> tuple[tuple[float, float], ...]:
        """Spans in seconds. Annotators' rounding leaves some a little outside the clip: those are cut to it."""
        if not isinstance(pairs, list) or any(not isinstance(p, (list, tuple)) or len(p) != 2 for p in pairs):
            raise self.error(name, "is not a list of [start, end] pairs", "write it as [[1.0, 2.5]]")
        spans = tuple((self._finite(name, start), self._finite(name, end)) for start, end in pairs)
        cut = clamp_spans(spans, duration)
        for (start, end), (low, high) in zip(spans, cut):
            if low >= high:
                within = "" if duration is None else f" within a clip of {duration} s"
                raise self.error(name, f"the span from {start} to {end} s has no length{within}",
                                 "give a start before the end")
        return cut

    def path(self, name: str, text: str) -> Path:
        r"""`text` below the data root, checked not to leave it: no absolute path, no `..`, no link that leads out."""
        windows = PureWindowsPath(text)  # knows / and \ and drive letters alike
        if windows.drive or windows.root or ".." in windows.parts or "\0" in text or "://" in text:
            raise self.error(name, f"{text[:80]!r} leaves the data root", "give a path relative to the data root")
        path = self.root / text
        try:
            inside = path.resolve().is_relative_to(self.root.resolve())
        except (OSError, RuntimeError):  # a name too long, a loop of links
            inside = False
        if not inside:
            raise self.error(name, f"{text[:80]!r} leads out of the data root {self.root} through a link",
                             "copy the clips below it, or give the folder they really are in as the data root")
        return path


def clamp_spans(
    spans: tuple[tuple[float, float], ...], duration: float | None
) -> tuple[tuple[float, float], ...]:
    """Spans cut to [0, duration] seconds; a duration of None leaves their ends alone."""
    end_of_clip = math.inf if duration is None else duration
    return tuple((max(start, 0.0), min(end, end_of_clip)) for start, end in spans)


def _between(text: str, opening: str, closing: str) -> str | None:
    start = text.find(opening)
    end = text.find(closing, start + len(opening)) if start >= 0 else -1
    return text[start + len(opening):end].strip() if end >= 0 else None


# Files


def read_text(path: str | os.PathLike, max_bytes: int = MAX_FILE_BYTES) -> str:
    """A whole UTF-8 text file; RecordError if it is missing, larger than `max_bytes` or not UTF-8."""
    path = Path(path)
    try:
        with _open_bytes(path) as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if len(data) > max_bytes:
        raise RecordError(f"{path}: larger than {max_bytes} bytes; split the file")
    return _decode(data, str(path))


def _open_bytes(path: Path):
    if not path.is_file():  # a pipe or a device would block
        raise RecordError(f"{path}: no such file; check the path")
    return path.open("rb")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start)
        place = where if ", line " in where else f"{where}, line {line + 1}"
        raise RecordError(f"{place}: not UTF-8 text; save the file as UTF-8") from error


def _parse(text: str, where: str) -> object:
    def refuse(constant: str):
        raise ValueError(f"{constant} is no JSON value")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        place = where if ", line " in where else f"{where}, line {error.lineno}"
        raise RecordError(f"{place}: not valid JSON ({error.msg}); correct the line") from error
    except (ValueError, RecursionError) as error:  # a number too long, lists nested too deeply
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:80]
        raise RecordError(f"{where}: not valid JSON ({reason}); correct it") from error


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    """(place, row) pairs; a row is a parsed value or, in a JSONL file, the bytes of a line."""
    readers = {".jsonl": _json_lines, ".json": _json_array, ".csv": _csv_rows}
    if path.suffix not in readers:
        raise RecordError(f"{path}: unknown kind of file; give a .jsonl, .json or .csv file")
    return readers[path.suffix](path)


def _fields(value: object, where: str) -> dict:
    if isinstance(value, bytes):
        value = _parse(_decode(value, where), where)
    if not isinstance(value, dict):
        raise RecordError(f"{where}: a {type(value).__name__}, not an object; write a record as {{...}}")
    return value


def _json_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    with _open_bytes(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise RecordError(f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes; write one record a line")
            if line.strip():
                yield f"{path}, line {number}", line


def _json_array(path: Path) -> Iterator[tuple[str, object]]:
    values = _parse(read_text(path), str(path))
    if not isinstance(values, list):
        raise RecordError(f"{path}: not a list of records; write [{{...}}, ...], or, for NExT-GQA, give the CSV file")
    for number, value in enumerate(values, 1):
        yield f"{path}, record {number}", value


def _json_object(path: Path, required: bool) -> dict:
    if not required and not path.exists():
        return {}
    value = _parse(read_text(path), str(path))
    if not isinstance(value, dict):
        raise RecordError(f"{path}: not an object that maps video ids; take the file as published")
    return value


def _csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    reader = csv.DictReader(read_text(path).splitlines(keepends=True), strict=True)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            where = f"{path}, line {reader.line_num + 1}"
            raise RecordError(f"{where}: not valid CSV ({error}); correct the line") from error
        if row is None:
            return
        if None in row:
            raise RecordError(f"{path}, line {reader.line_num}: more cells than the header; quote texts with commas")
        yield f"{path}, line {reader.line_num}", row


def write_records(path: str | os.PathLike, records: Iterable[Record], root: str | os.PathLike | None = None) -> None:
    """Writes records as JSONL in Video-R1's fields, clips relative to `root` (the file's folder if None)."""
    root = Path(path).parent if root is None else Path(root)
    lines = [json.dumps(to_video_r1(record, root), ensure_ascii=False) + "\n" for record in records]
    part = Path(f"{path}.part")
    part.write_text("".join(lines), encoding="utf-8", newline="\n")
    part.replace(path)


def to_video_r1(record: Record, root: str | os.PathLike) -> dict:
    r"""A record in Video-R1's fields, plus ours: question_type, process (Video-R1-COT's) and duration.

    Raises ValueError for a record with both a clip and an image, which Video-R1 has no field for.
    """
    if bool(record.clip) == bool(record.image):
        raise ValueError(f"record {record.record_id}: Video-R1's fields hold one clip or one image")
    glue = f"<glue>{[tuple(span) for span in record.spans]}</glue>" if record.spans else ""
    fields = {
        "problem_id": record.record_id, "problem": record.question,
        "data_type": "video" if record.clip else "image", "problem_type": record.problem_type,
        "options": [f"{letter}. {text}" for letter, text in zip(LETTERS, record.options)],
        "process": f"<think>{record.trace}</think>" if record.trace else "",
        "solution": f"<answer>{record.answer}</answer>{glue}",
        "path": (record.clip or record.image).relative_to(root).as_posix(), "data_source": record.source,
        "question_type": record.question_type,
    }
    return fields if record.duration is None else fields | {"duration": record.duration}


# Checking a data set


@dataclass
class Report:
    """What `check_records` found. Each problem is a (record id, message) pair."""

    records: int = 0
    clips: int = 0  # distinct clips and pictures
    by_type: Counter = field(default_factory=Counter)
    by_question_type: Counter = field(default_factory=Counter)
    missing: list[tuple[str, str]] = field(default_factory=list)
    undecodable: list[tuple[str, str]] = field(default_factory=list)
    span_errors: list[tuple[str, str]] = field(default_factory=list)
    record_errors: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not (self.missing or self.undecodable or self.span_errors or self.record_errors)


def check_records(
    records: Iterable[Record], num_frames: int = 1, *, decode: bool = True, errors: Iterable[RecordError] = ()
) -> Report:
    r"""Opens every clip and picture once, and holds the spans against the clips' true durations.

    num_frames: as in training; a clip with fewer counts as undecodable. decode: False reads only the headers and
    packets, which finds missing and truncated files but not broken pictures. errors: what `read_records` collected.
    """
    report, seen = Report(record_errors=[str(error) for error in errors]), {}
    for record in records:
        report.records += 1
        report.by_type[record.problem_type] += 1
        report.by_question_type[record.question_type] += 1
        for path in (record.clip, record.image):
            if path is not None and path not in seen:
                seen[path] = _check_media(path, path == record.clip, num_frames, decode)
            if path is not None and isinstance(seen[path], str):
                (report.undecodable if os.path.exists(path) else report.missing).append((record.record_id, seen[path]))
        duration = seen.get(record.clip)
        if record.spans and isinstance(duration, float):
            report.span_errors += [(record.record_id, text) for text in _span_problems(record, duration)]
    report.clips = len(seen)
    return report


def examples(records: Sequence[Record], num_frames: int, count: int = 3) -> list[tuple[Record, Clip]]:
    r"""Up to `count` records that can be seen, of different types first, each with its frames (a picture is one)."""
    firsts = {record.question_type: record for record in reversed(records)}
    order = [*reversed(firsts.values()), *(record for record in records if record is not firsts[record.question_type])]
    found = []
    for record in order:
        if len(found) == count:
            break
        with contextlib.suppress(ClipError):
            found.append((record, _frames(record, num_frames)))
    return found


def _frames(record: Record, num_frames: int) -> Clip:
    if record.clip is not None:
        return read_clip(record.clip, num_frames)
    return Clip(frames=read_image(record.image), seconds=[0.0], fps=1.0, duration=0.0, path=str(record.image))


def show_record(record: Record) -> str:
    r"""A record as a reader wants to see it: the prompt's words, the right answer, and the files."""
    lines = [f"record:   {record.record_id} ({record.problem_type}; {record.question_type})",
             *(f"prompt:   {line}" for line in prompt_text(record).splitlines()), f"answer:   {record.answer_in_words}"]
    files = [("clip", record.clip), ("picture", record.image)]
    return "\n".join(lines + [f"{name + ':':<10}{path}" for name, path in files if path is not None])


def _check_media(path: Path, is_clip: bool, num_frames: int, decode: bool) -> float | str:
    """The duration in seconds, or what is wrong with the file."""
    try:
        if not is_clip:
            read_image(path)
            return 0.0
        if decode:
            return read_clip(path, num_frames).duration
        probe = probe_clip(path)
        few = f"{path}: the clip has {len(probe.starts)} frames but {num_frames} are asked for; sample fewer frames"
        return probe.duration if len(probe.starts) >= num_frames else few
    except ClipError as error:
        return str(error)


def _span_problems(record: Record, duration: float) -> Iterator[str]:
    for start, end in record.spans:
        if start >= duration:
            yield f"{record.clip}: the span from {start} to {end} s starts after the clip's end at {duration:.2f} s"
        elif end > duration + 0.05:  # annotations are rounded to a tenth of a second
            yield f"{record.clip}: the span from {start} to {end} s ends after the clip does, at {duration:.2f} s"


def format_report(report: Report, examples: int = 3) -> str:
    """The report as text: counts per type, then each kind of problem with its first `examples` cases."""
    lines = [f"{report.records} records, {report.clips} clips and pictures"]
    for title, counts in (("problem type", report.by_type), ("question type", report.by_question_type)):
        lines += [f"  {title} {name}: {count}" for name, count in sorted(counts.items())]
    problems = {
        "unreadable records": [("", message) for message in report.record_errors],
        "missing files": report.missing, "undecodable files": report.undecodable, "span errors": report.span_errors,
    }
    for title, found in problems.items():
        lines.append(f"{title}: {len(found)}")
        lines += [f"  {name}: {message}" if name else f"  {message}" for name, message in found[:examples]]
        lines += [f"  and {len(found) - examples} more"] * (len(found) > examples)
    return "\n".join(lines)
