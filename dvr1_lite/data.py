r"""One record type, the reader of Video-R1's files (whose fields ToyVideoQA uses too), and the prompt of a record.

`scale/datasets.py` reads the paper's other data sets into the same record.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel

from .errors import RecordError
from .fields import (LETTERS, DistinctOptions, FieldError, FullText, MediaPath, Options, Seconds, Text, between,
                     choose_letter, glue_spans, one_of, read_rows)

CHOICE_TYPES = ("multiple choice", "grounding")
PROBLEM_TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression", "exact", "grounding")


@dataclass(frozen=True)
class Record:
    r"""One question about one video, whatever data set it comes from.

    options: texts without their letters. answer: the letter where there are options to choose from, else the text.
    problem_type: one of PROBLEM_TYPES; it decides the reward. question_type: the group that accuracies are listed by;
    the problem type if the data set has none. clip: the video. image: the current observation or, without a clip, all
    there is to see. spans: true (start, end) in seconds, start < end, as annotated, so they may reach out of the clip;
    with several, the best match counts. trace: written reasoning, often "". duration: seconds, None if not given.
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
        r"""What the question is about. Records that share it are not independent samples."""
        return str(self.clip or self.image or self.record_id)

    @property
    def answer_in_words(self) -> str:
        r"""The correct answer with its option's text and first span, such as "A (red) from 0.0 to 1.0"."""
        return with_option(self.answer, self.options) + _first_span(self)


def read_records(path: str | os.PathLike, root: str | os.PathLike | None = None,
                 errors: list[RecordError] | None = None) -> list[Record]:
    r"""Read a JSON or JSONL file in Video-R1's fields into records, in the file's order.

    For your own clips a row of {"video", "question", "answer", "options"} is enough: multiple choice, or, without
    options, a free text that the model's answer must equal ("exact").
    root: folder that clip paths start from; None takes the file's own. errors: a list that collects the errors of
    single records, which are then left out; None raises the first. Clips are not opened here.
    Raises RecordError, naming file, line, field and fix, for anything that cannot be read.
    """
    return read_rows(Path(path), root, (VideoR1, OwnClips), errors)


def prompt_text(record: Record, *, hint: str = "", show_answer: bool = False, instruction: str = "") -> str:
    r"""Return the user's turn after the video: question, options, hint, answer, instruction, one line each.

    hint: the beginning of a reasoning trace (section 3.3). show_answer: for the traces that hints are cut from, the
    answer stands in the prompt. Differs from the paper: it does not print its wording.
    """
    lines = [record.question]
    if record.options:
        lines.append("Options: " + " ".join(f"{letter}. {text}" for letter, text in zip(LETTERS, record.options)))
    if hint:
        lines.append(f"Hint: {hint}")
    if show_answer:
        lines.append(f"The answer is {record.answer}{_first_span(record)}.")
    return "\n".join(lines + [instruction] * bool(instruction))


def with_option(answer: str, options: Sequence[str]) -> str:
    r"""Return an answer beside the text of the option it names: "A" becomes "A (red)". Other answers do not change."""
    place = LETTERS.find(answer.strip().upper()) if len(answer.strip()) == 1 else -1
    return f"{answer} ({options[place]})" if 0 <= place < len(options) else answer


def _first_span(record: Record) -> str:
    return f" from {record.spans[0][0]} to {record.spans[0][1]}" if record.spans else ""


class VideoR1(BaseModel):
    r"""A row of Video-R1's files. The fields that have a default here may be left out."""

    problem_id: Text = ""
    problem: FullText
    data_type: Annotated[str, one_of("video", "image")]
    problem_type: Annotated[str, one_of(*PROBLEM_TYPES)]
    options: Options = ()
    solution: FullText
    path: MediaPath
    process: Text = ""  # Video-R1-COT's <think>...</think>
    data_source: Text = ""
    question_type: Text = ""  # ours, as is duration
    duration: Seconds | None = None

    def record(self, where: str) -> Record:
        answer, spans, kind = between(self.solution, "answer"), glue_spans("solution", self.solution), self.problem_type
        if answer is None:
            raise FieldError("solution", "holds no <answer>...</answer>; write it as <answer>A</answer>")
        if bool(spans) != (kind == "grounding"):
            raise FieldError("solution", f"has {len(spans)} spans but the problem type is {kind!r}; give "
                                         f"<glue>[(start, end)]</glue> to grounding records and to no others")
        clip, image = (self.path, None) if self.data_type == "video" else (None, self.path)
        return Record(
            record_id=self.problem_id or where, question=self.problem, options=self.options,
            answer=choose_letter("solution", answer, self.options) if kind in CHOICE_TYPES else answer,
            problem_type=kind, question_type=self.question_type or kind, clip=clip, image=image, spans=spans,
            trace=between(self.process, "think") or self.process, source=self.data_source, duration=self.duration)


class OwnClips(BaseModel, extra="forbid"):
    r"""The shortest row, for your own clips."""

    video: MediaPath
    question: FullText
    answer: FullText
    options: DistinctOptions = ()

    def record(self, where: str) -> Record:
        kind = "multiple choice" if self.options else "exact"
        answer = choose_letter("answer", self.answer, self.options) if self.options else self.answer
        return Record(where, self.question, self.options, answer, kind, kind, self.video)
