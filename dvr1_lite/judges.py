r"""What counts as a correct answer for each kind of question (Eq. 20), each a function (answer, truth) -> [0, 1].

Departures from the published judges of SEED-Bench-R1 (S) and Video-R1 (V):

| | published | here |
| --- | --- | --- |
| answer | S, V: the first `<answer>` anywhere | only from a well-formed completion |
| format | S: the text begins with the form; V: tags may repeat | the whole text, each tag once |
| choice | V: equal texts; S: equal first characters, or math_verify agrees | equal letters, see `RewardConfig` |
| numerical | V: a decimal point in both or in neither | `5.0` equals `5` |
| free-form | V: ROUGE with a stemmer, words of a-z and 0-9 | no stemmer, letters of every script |
| regression | V: predicting 0 where 0 is true earns 0 | it earns 1 |
"""

import math
import re
from collections import Counter

_LETTER = {"strict": re.compile(r"([A-Za-z])\.?\Z|\(([A-Za-z])\)\Z"), "first-letter": re.compile(r"\(?([A-Za-z])")}
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,2})?")


def read_letter(answer: str, judge: str = "strict") -> str | None:
    r"""Read the letter that an answer names by the judge's rule (see `RewardConfig`), or None."""
    match = _LETTER[judge].match(answer.strip())
    return match and match[match.lastindex]


def _exact(answer: str, truth: str) -> float:
    first, second = (text.casefold().replace("_", " ").split() for text in (answer, truth))
    return float(first == second)


def _number(text: str) -> float:
    r"""Read a decimal number of at most 64 characters, commas removed; NaN, equal to nothing, for any other text."""
    plain = text.strip()[:65].replace(",", "")
    return float(plain) if len(text.strip()) <= 64 and _DECIMAL.fullmatch(plain) else math.nan


def _regression(answer: str, truth: str) -> float:
    error = abs(_number(answer) - _number(truth)) / max(abs(_number(truth)), 1e-9)
    return 1.0 - error if error < 1.0 else 0.0


def _edit_distance(a: list[str], b: list[str], substitution: int) -> int:
    r"""Count the insertions, deletions and substitutions (each of the given cost) that turn the words a into b."""
    row = list(range(len(b) + 1))
    for i, word in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + substitution * (word != other))
    return row[-1]


def word_accuracy(hypothesis: str, reference: str) -> float:
    r"""Compute 1 - word error rate, not below 0; 0 at once for more than twice the reference's words."""
    given, expected = hypothesis.split(), reference.split()
    if not expected or len(given) > 2 * len(expected):
        return float(given == expected)
    return 1.0 - min(1.0, _edit_distance(given, expected, 1) / len(expected))


def rouge_f(hypothesis: str, reference: str) -> float:
    r"""Average the F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, each 2 * overlap / (length + length), in [0, 1]."""
    words = [re.findall(r"[^\W_]+", text.lower()) for text in (hypothesis, reference)]  # `red_car` equals `red car`
    pairs = [list(zip(sequence, sequence[1:])) for sequence in words]
    overlaps = [(sum((Counter(a) & Counter(b)).values()), a, b) for a, b in (words, pairs)]
    longest_common = (len(words[0]) + len(words[1]) - _edit_distance(*words, 2)) // 2  # insertions, deletions
    overlaps.append((longest_common, *words))
    return sum(2 * overlap / (len(a) + len(b)) for overlap, a, b in overlaps if overlap) / 3


ACCURACY = {  # problem_type: (answer, truth) -> accuracy. The first five are Video-R1's.
    "multiple choice": _exact,  # the letters are equal, see RewardConfig
    "numerical": lambda a, b: float(round(_number(a), 2) == round(_number(b), 2)),  # equal to two decimals
    "OCR": word_accuracy,  # 1 - word error rate
    "free-form": rouge_f,  # mean F-measure of ROUGE-1, ROUGE-2, ROUGE-L
    "regression": _regression,  # 1 - relative difference
    "exact": _exact,  # equal but for case, white space and underscores; a letter as in multiple choice
    "grounding": _exact}
