r"""Rewards of one completion: format (Eq. 19), accuracy (Eq. 20), temporal IoU (Eq. 21), and the parser they use.

A completion is *well formed* when, apart from white space, its whole text is

    <think> ... </think> <answer> ... </answer>                          and, only where a time span is asked for,
    <think> ... </think> <answer> ... </answer> <glue> spans </glue>

with each tag exactly once and in this order. **A malformed completion earns 0 on every part**, whatever its answer, so
that writing three answers gains nothing. judges.py has what counts as
a correct answer for each kind of question, and where that departs from other judges.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import RecordError
from .judges import ACCURACY, read_letter

if TYPE_CHECKING:
    from .data import Record

Span = tuple[float, float]  # start and end in seconds


@dataclass(frozen=True)
class Completion:
    r"""The parts of a completion, None where it is malformed; `spans` also where it has no `<glue>` section."""

    think: str | None = None
    answer: str | None = None
    spans: tuple[Span, ...] | None = None
    well_formed: bool = False


@dataclass(frozen=True)
class Score:
    r"""The parts of one reward; `total` is their sum, `maximum` the largest possible: 2, or 3 with a time span."""

    format: float
    accuracy: float
    iou: float | None
    total: float
    maximum: float

    @property
    def normalised(self) -> float:
        r"""`total / maximum`, in [0, 1], so that questions with different maxima compare."""
        return self.total / self.maximum

    @property
    def correct(self) -> bool:
        r"""Whether format and answer are fully correct; the time span does not count."""
        return self.format == self.accuracy == 1.0


# --- parsing ---------------------------------------------------------------------------------------------------------

def parse_completion(text: str) -> Completion:
    r"""Split a completion into its sections by the rule above, in linear time. Never raises, whatever the text."""
    if not isinstance(text, str):
        return Completion()
    text, position, contents = text.strip(), 0, []
    has_spans = "<glue>" in text or "</glue>" in text
    for name in ("think", "answer", "glue") if has_spans else ("think", "answer"):
        opening, closing = f"<{name}>", f"</{name}>"
        start, end = text.find(opening), text.find(closing)
        once = text.count(opening) == text.count(closing) == 1
        if not once or not position <= start < end or text[position:start].strip():
            return Completion()
        contents.append(text[start + len(opening):end].strip())
        position = end + len(closing)
    spans = parse_spans(contents[2]) if has_spans else None
    if position < len(text) or (has_spans and spans is None):
        return Completion()
    return Completion(contents[0], contents[1], spans, True)


_PAIR = r"[0-9]{1,9}(?:\.[0-9]{1,9})? (?:, )?[0-9]{1,9}(?:\.[0-9]{1,9})?"
_BRACKETED = rf"(?:\( {_PAIR} \)|\[ {_PAIR} \])"
_SPANS = re.compile(rf"{_PAIR}|{_BRACKETED}|\[ {_BRACKETED}(?: (?:, )?{_BRACKETED})* \]")


def parse_spans(text: str) -> tuple[Span, ...] | None:
    r"""Read `[(1.0, 2.5), (3, 4)]`, `(1.0, 2.5)`, `[1.0, 2.5]` or `1.0 2.5` in seconds; None if unreadable.

    White space is free and commas may be missing, because a word-level tokenizer drops them.
    """
    pieces = re.findall(r"[()\[\],]|[^\s()\[\],]+", text)
    if not _SPANS.fullmatch(" ".join(pieces)):  # with single spaces the pattern has nothing to backtrack over
        return None
    numbers = [float(piece) for piece in pieces if piece not in "()[],"]
    return tuple(zip(numbers[::2], numbers[1::2]))


# --- the three rewards -----------------------------------------------------------------------------------------------

def score(record: "Record", text: str, judge: str = "strict") -> Score:
    r"""Score a completion: format + accuracy (at most 2), and + IoU where a time span is asked for (at most 3).

    No text raises; `RecordError` for a record of unknown problem type, or a grounding record without time spans.
    """
    completion = parse_completion(text)
    format_, accuracy = format_reward(record, completion), accuracy_reward(record, completion, judge)
    iou = iou_reward(record, completion) if asks_span(record) else None
    return Score(format_, accuracy, iou, format_ + accuracy + (iou or 0.0), 2.0 if iou is None else 3.0)


def asks_span(record: "Record") -> bool:
    r"""Return whether the record asks for a `<glue>` section: a grounding question, or annotated time spans."""
    return record.problem_type == "grounding" or bool(record.spans)


def format_reward(record: "Record", completion: Completion) -> float:
    r"""Return Eq. 19: 1.0 if the completion is well formed, with a time span exactly when one is asked for."""
    return float(completion.well_formed and (completion.spans is not None) == asks_span(record))


def accuracy_reward(record: "Record", completion: Completion, judge: str = "strict") -> float:
    r"""Return Eq. 20 by the record's `problem_type` (see judges.py), in [0, 1]; 0.0 for an empty answer.

    Differs from the paper: Eq. 20 as printed ignores the form; here an answer counts in a well-formed text only.
    """
    if record.problem_type not in ACCURACY:
        raise RecordError(f"problem_type {record.problem_type!r} has no reward: use one of {', '.join(ACCURACY)}")
    if not format_reward(record, completion) or not completion.answer:
        return 0.0
    compare, letter = ACCURACY[record.problem_type], read_letter(record.answer)
    if letter and record.problem_type in ("multiple choice", "exact", "grounding"):
        return float(read_letter(completion.answer, judge) == letter)
    return compare(completion.answer, record.answer)


def iou_reward(record: "Record", completion: Completion) -> float:
    r"""Return Eq. 21: the IoU of the *first* predicted span (top-1, as in Eq. 24) with the best true one, in [0, 1]."""
    if not record.spans:
        raise RecordError("a grounding record has no time spans: give at least one (start, end) in seconds")
    if not format_reward(record, completion):
        return 0.0
    return max(temporal_iou(completion.spans[0], span) for span in record.spans)


def temporal_iou(a: Span, b: Span) -> float:
    r"""Compute intersection over union of two spans in seconds, in [0, 1]; 0.0 for empty or reversed ones."""
    if not (a[1] > a[0] and b[1] > b[0]):
        return 0.0
    union = max(a[1], b[1]) - min(a[0], b[0])  # as NExT-GQA's evaluator computes it, to the last bit
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0])) / union


def temporal_iop(predicted: Span, truth: Span) -> float:
    r"""Compute intersection over the *predicted* length, in [0, 1], as NExT-GQA does: an instant inside counts 1."""
    (start, end), (low, high) = predicted, truth
    if not start < end:
        return float(low <= start == end <= high)
    return max(0.0, min(end, high) - max(start, low)) / (end - start)
