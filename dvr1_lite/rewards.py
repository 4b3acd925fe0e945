r"""Rewards of one completion: format, accuracy and temporal IoU (Eq. 19-21), and the parser they stand on.

The rule of the parser: a completion is *well formed* when, apart from white space, the whole text is

    <think> ... </think> <answer> ... </answer>                          and, only where a time span is asked,
    <think> ... </think> <answer> ... </answer> <glue> spans </glue>

with every tag exactly once and in this order. Nested, repeated, unclosed or misplaced tags, text before, between or
after the sections, and spans that cannot be read make it malformed. **A malformed completion earns 0 on every part**,
whatever its answer: a policy cannot collect accuracy by writing three answers. Tags are case-sensitive, and a thought
that quotes a tag repeats it, so it is malformed too.

Differs from the paper: Eq. 19 and 20 are separate there, so an answer in a malformed output could still earn
accuracy. Video-R1's code searches for the first `<answer>` anywhere, which can be gamed.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import RecordError

if TYPE_CHECKING:
    from .data import Record

Span = tuple[float, float]

_SECTIONS = ("think", "answer", "glue")


@dataclass(frozen=True)
class Completion:
    r"""What `parse_completion` found. `think`, `answer` and `spans` are None where the text is malformed.

    `spans` is also None when the completion is well formed and has no `<glue>` section.
    """

    think: str | None
    answer: str | None
    spans: tuple[Span, ...] | None
    well_formed: bool


@dataclass(frozen=True)
class Score:
    r"""The parts of one reward; `total` is their sum, `maximum` the largest the record allows (2, or 3 with spans)."""

    format: float
    accuracy: float
    iou: float | None
    total: float
    maximum: float

    @property
    def normalised(self) -> float:
        """`total / maximum`, in [0, 1], so that kinds of questions with different maxima compare."""
        return self.total / self.maximum

    @property
    def right(self) -> bool:
        """Format and answer both fully right; the span, if any, is not looked at."""
        return self.format == 1.0 and self.accuracy == 1.0


# --- parsing ---------------------------------------------------------------------------------------------------------

_MALFORMED = Completion(None, None, None, False)


def parse_completion(text: str) -> Completion:
    r"""Split a completion into its sections by the rule in this module's docstring.

    Never raises; anything that is not a well-formed string gives `well_formed=False`. Linear in the length of the
    text: it counts and finds fixed strings and backtracks nowhere.
    """
    if not isinstance(text, str):
        return _MALFORMED
    counts = {tag: (text.count(f"<{tag}>"), text.count(f"</{tag}>")) for tag in _SECTIONS}
    if counts["think"] != (1, 1) or counts["answer"] != (1, 1) or counts["glue"] not in ((0, 0), (1, 1)):
        return _MALFORMED
    names = _SECTIONS if counts["glue"] == (1, 1) else _SECTIONS[:2]
    contents = _split_sections(text.strip(), names)
    if contents is None:
        return _MALFORMED
    spans = parse_spans(contents[2]) if len(contents) == 3 else None
    if len(contents) == 3 and spans is None:
        return _MALFORMED
    return Completion(contents[0], contents[1], spans, True)


def _split_sections(text: str, names: Sequence[str]) -> list[str] | None:
    """The stripped contents of the sections, or None unless they follow each other and fill the text."""
    contents, position = [], 0
    for name in names:
        opening, closing = f"<{name}>", f"</{name}>"
        start, end = text.find(opening), text.find(closing)
        if text[position:start].strip() or start < position or end < start:
            return None
        contents.append(text[start + len(opening) : end].strip())
        position = end + len(closing)
    return contents if position == len(text) else None


_NUMBER = r"[0-9]{1,9}(?:\.[0-9]{1,9})?"
_PAIR = rf"{_NUMBER} (?:, )?{_NUMBER}"
_BRACKETED = rf"(?:\( {_PAIR} \)|\[ {_PAIR} \])"
_SPANS = re.compile(rf"{_PAIR}|{_BRACKETED}|\[ {_BRACKETED}(?: (?:, )?{_BRACKETED})* \]")


def parse_spans(text: str) -> tuple[Span, ...] | None:
    r"""Read `[(1.0, 2.5)]`, `(1.0, 2.5)`, `[1.0, 2.5]` or a bare `1.0 2.5`: spans in seconds, None if unreadable.

    White space is free everywhere between the numbers and the punctuation, because a word-level tokenizer decodes
    with spaces and may drop the punctuation. A list may hold several spans. Numbers are plain decimals, not negative.
    The order of start and end is not checked here: a reversed span is readable and has IoU 0.
    """
    pieces = re.findall(r"[()\[\],]|[^\s()\[\],]+", text)  # one space between pieces leaves nothing to backtrack over
    canonical = " ".join(pieces)
    if not _SPANS.fullmatch(canonical):
        return None
    numbers = [float(piece) for piece in pieces if piece not in "()[],"]
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


# --- the three rewards -----------------------------------------------------------------------------------------------


def asks_span(record: "Record") -> bool:
    """Whether the record wants a `<glue>` section: a grounding question, or any question with true spans."""
    return record.problem_type == "grounding" or bool(record.spans)


def format_reward(record: "Record", completion: Completion) -> float:
    r"""Eq. 19: 1.0 if the whole completion has the asked form, else 0.0.

    The `<glue>` section must be there exactly when the record asks a time span.
    """
    return float(completion.well_formed and (completion.spans is not None) == asks_span(record))


def accuracy_reward(record: "Record", completion: Completion) -> float:
    r"""Eq. 20, by the record's own kind of question; in [0, 1], and 0.0 for a malformed or an empty answer.

    | `problem_type` | reward |
    | --- | --- |
    | multiple choice | 1 if the letters are equal; an answer that is wholly `A.` or `(A)` counts as `A`, none else |
    | numerical | 1 if the numbers are equal to two decimals, thousands commas removed |
    | OCR | 1 - word error rate, not below 0 (case-sensitive words) |
    | free-form | mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L |
    | regression | 1 - relative difference, not below 0 |
    | exact, grounding | 1 if equal up to case and white space (for a letter: as in multiple choice) |

    The first five are Video-R1's. Differs from Video-R1: `5.0` equals `5` (there the decimal point must match);
    an exact 0 earns 1 in regression (there a guard term makes it 0); ROUGE without a stemmer; `A.` counts as `A`.
    Raises `RecordError` for an unknown `problem_type`.
    """
    kind = _ACCURACY.get(record.problem_type)
    if kind is None:
        known = ", ".join(sorted(_ACCURACY))
        raise RecordError(f"problem_type {record.problem_type!r} has no reward. Use one of: {known}.")
    if not format_reward(record, completion) or not completion.answer:
        return 0.0
    return kind(completion.answer, record.answer)


def iou_reward(record: "Record", completion: Completion) -> float:
    r"""Eq. 21: IoU of the predicted span and the true one, in [0, 1]; the best one where there are several true spans.

    Only the *first* predicted span counts (top-1, as in Eq. 24), so listing many gains nothing. 0.0 if malformed.
    Raises `RecordError` if the record asks a span and has none to compare with.
    """
    if not record.spans:
        raise RecordError("A grounding record has no time spans. Give it at least one (start, end) in seconds.")
    if not format_reward(record, completion) or not completion.spans:
        return 0.0
    return max(temporal_iou(completion.spans[0], span) for span in record.spans)


def temporal_iou(a: Span, b: Span) -> float:
    r"""Intersection over union of two spans (start, end) in seconds; 0.0 for empty, reversed or non-finite ones."""
    (start_a, end_a), (start_b, end_b) = a, b
    if not all(map(math.isfinite, (*a, *b))) or end_a <= start_a or end_b <= start_b:
        return 0.0
    intersection = max(0.0, min(end_a, end_b) - max(start_a, start_b))
    union = (end_a - start_a) + (end_b - start_b) - intersection
    return min(1.0, intersection / union)


def temporal_iop(predicted: Span, truth: Span) -> float:
    r"""Intersection over the *predicted* span's length, in [0, 1], as NExT-GQA's evaluation defines it: a predicted
    instant (start = end) counts 1 within the true span; a reversed or non-finite one counts 0."""
    (start, end), (low, high) = predicted, truth
    if not all(map(math.isfinite, (*predicted, *truth))) or end < start:
        return 0.0
    if start == end:
        return float(low <= start <= high)
    return max(0.0, min(end, high) - max(start, low)) / (end - start)


def score(record: "Record", text: str) -> Score:
    r"""Reward of a completion: format + accuracy (at most 2), and + IoU where a span is asked (at most 3).

    Appendix C: unit weights. Never raises on account of the text; a malformed text gives 0 on every part.
    """
    completion = parse_completion(text)
    format_part = format_reward(record, completion)
    accuracy = accuracy_reward(record, completion)
    iou = iou_reward(record, completion) if asks_span(record) else None
    total = format_part + accuracy + (iou or 0.0)
    return Score(format_part, accuracy, iou, total, maximum=2.0 if iou is None else 3.0)


# --- kinds of answers ------------------------------------------------------------------------------------------------


def _letter(text: str) -> str | None:
    match = re.fullmatch(r"([A-Za-z])\.?|\(([A-Za-z])\)", text.strip())
    return match and (match[1] or match[2])


def _choice(answer: str, truth: str) -> float:
    expected = _letter(truth)
    return float(answer.strip() == truth.strip() if expected is None else _letter(answer) == expected)


def _exact(answer: str, truth: str) -> float:
    if _letter(truth):
        return _choice(answer, truth)
    return float(answer.casefold().split() == truth.casefold().split())


_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")


def _number(text: str) -> float | None:
    """A finite decimal number, commas removed; None for anything else (also `nan`, `inf`, or over 64 characters)."""
    plain = text.strip()[:65].replace(",", "")
    if len(text.strip()) > 64 or not _DECIMAL.fullmatch(plain):
        return None
    value = float(plain)
    return value if math.isfinite(value) else None


def _numerical(answer: str, truth: str) -> float:
    given, expected = _number(answer), _number(truth)
    return float(given is not None and expected is not None and round(given, 2) == round(expected, 2))


def _regression(answer: str, truth: str) -> float:
    given, expected = _number(answer), _number(truth)
    if given is None or expected is None:
        return 0.0
    return 1.0 - min(1.0, abs(given - expected) / max(abs(expected), 1e-9))


def word_error_rate(hypothesis: str, reference: str) -> float:
    r"""Levenshtein distance between the words over the number of reference words; 0 is perfect, capped at 1.

    A hypothesis of more than twice the reference's words is 1 at once, so a huge answer costs no time.
    """
    given, expected = hypothesis.split(), reference.split()
    if not expected or len(given) > 2 * len(expected):
        return float(given != expected)
    row = list(range(len(given) + 1))
    for i, word in enumerate(expected, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(given, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (word != other))
    return min(1.0, row[-1] / len(expected))


def _ocr(answer: str, truth: str) -> float:
    return 1.0 - word_error_rate(answer, truth)


def rouge_f(hypothesis: str, reference: str) -> float:
    r"""Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L on lower-cased words, in [0, 1].

    ROUGE-n counts shared n-grams, ROUGE-L the longest common subsequence; each F is the harmonic mean of precision
    and recall, so `2 * overlap / (length of one + length of the other)`. No stemmer.
    """
    given, expected = (re.findall(r"\w+", text.lower()) for text in (hypothesis, reference))
    pairs_given, pairs_expected = (list(zip(words, words[1:], strict=False)) for words in (given, expected))
    return (
        _f_measure(_shared(given, expected), len(given), len(expected))
        + _f_measure(_shared(pairs_given, pairs_expected), len(pairs_given), len(pairs_expected))
        + _f_measure(_longest_common(given, expected), len(given), len(expected))
    ) / 3


def _shared(a: Iterable, b: Iterable) -> int:
    return sum((Counter(a) & Counter(b)).values())


def _f_measure(overlap: int, length_a: int, length_b: int) -> float:
    return 2 * overlap / (length_a + length_b) if overlap else 0.0


def _longest_common(given: Sequence[str], expected: Sequence[str]) -> int:
    """Length of the longest common subsequence, one big-integer step per given word (Hyyro's bit-parallel form)."""
    everything = (1 << len(expected)) - 1
    places: dict[str, int] = {}
    for i, word in enumerate(expected):
        places[word] = places.get(word, 0) | 1 << i
    unmatched = everything
    for word in given:
        hit = unmatched & places.get(word, 0)
        unmatched = ((unmatched + hit) | (unmatched - hit)) & everything
    return len(expected) - unmatched.bit_count()


_ACCURACY = {
    "multiple choice": _choice,
    "numerical": _numerical,
    "OCR": _ocr,
    "free-form": rouge_f,
    "regression": _regression,
    "exact": _exact,
    "grounding": _exact,
}
