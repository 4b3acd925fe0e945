"""Rewards: Eq. 19-21 by hand, each kind of answer, and a parser that hostile text cannot fool, crash or slow down."""

import time
from types import SimpleNamespace

import pytest

from dvr1_lite.errors import RecordError
from dvr1_lite.rewards import (
    format_reward,
    iou_reward,
    parse_completion,
    parse_spans,
    rouge_f,
    score,
    temporal_iou,
    word_error_rate,
)


def record(problem_type="multiple choice", answer="A", spans=()):
    return SimpleNamespace(problem_type=problem_type, answer=answer, spans=spans, options=("red", "blue"))


def completion(answer, think="it is red", glue=None):
    text = f"<think>{think}</think><answer>{answer}</answer>"
    return text if glue is None else f"{text}<glue>{glue}</glue>"


def accuracy(problem_type, truth, answer):
    return score(record(problem_type, truth), completion(answer)).accuracy


# --- the form (Eq. 19) -----------------------------------------------------------------------------------------------


def test_a_well_formed_completion_is_split_and_stripped():
    parsed = parse_completion(" <think> first red\nthen blue </think> <answer> A </answer>\n")
    assert (parsed.think, parsed.answer, parsed.spans, parsed.well_formed) == ("first red\nthen blue", "A", None, True)


def test_a_span_section_is_read():
    assert parse_completion(completion("A", glue="[(5.2, 10.4)]")).spans == ((5.2, 10.4),)


MALFORMED = {
    "empty": "",
    "no tags": "A",
    "answer only": "<answer>A</answer>",
    "thought only": "<think>a</think>",
    "unclosed answer": "<think>a</think><answer>A",
    "unclosed thought": "<think>a<answer>A</answer>",
    "wrong order": "<answer>A</answer><think>a</think>",
    "nested": "<think>a<answer>A</answer></think>",
    "overlapping": "<think>a<answer></think>A</answer>",
    "closed before opened": "</think>a<think><answer>A</answer>",
    "repeated answer": "<think>a</think><answer>A</answer><answer>A</answer>",
    "repeated thought": "<think>a</think><think>b</think><answer>A</answer>",
    "answer opened twice": "<think>a</think><answer><answer>A</answer>",
    "thought opened twice": "<think><think>a</think><answer>A</answer>",
    "answers inside the answer": "<think>a</think><answer><answer>A</answer></answer>",
    "answer quoted in the thought": "<think>they want <answer></think><answer>A</answer>",
    "text before": "Sure! <think>a</think><answer>A</answer>",
    "text between": "<think>a</think> so <answer>A</answer>",
    "text after": "<think>a</think><answer>A</answer> A",
    "upper-case tags": "<THINK>a</THINK><ANSWER>A</ANSWER>",
    "spaces in a tag": "< think>a</ think><answer>A</answer>",
    "span first": "<glue>[(1, 2)]</glue><think>a</think><answer>A</answer>",
    "span unclosed": "<think>a</think><answer>A</answer><glue>[(1, 2)]",
    "span unreadable": "<think>a</think><answer>A</answer><glue>soon</glue>",
    "not a string": None,
    "bytes": b"<think>a</think><answer>A</answer>",
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_text_earns_nothing_on_any_part(text):
    assert not parse_completion(text).well_formed
    assert score(record(), text).total == 0.0
    grounded = score(record("grounding", "A", spans=((1.0, 2.0),)), text)
    assert (grounded.format, grounded.accuracy, grounded.iou) == (0.0, 0.0, 0.0)


def test_the_span_section_must_be_there_exactly_when_asked():
    with_span, without = completion("A", glue="[(1, 2)]"), completion("A")
    grounding = record("grounding", "A", spans=((1.0, 2.0),))
    assert score(grounding, with_span).format == 1.0 and score(record(), without).format == 1.0
    assert score(grounding, without).total == 0.0 and score(record(), with_span).total == 0.0


def test_an_empty_thought_keeps_the_format_but_an_empty_answer_is_never_right():
    assert format_reward(record(), parse_completion("<think></think><answer></answer>")) == 1.0
    assert accuracy("exact", "", "") == 0.0


def test_a_question_that_contains_tags_does_not_matter():
    # Only the completion is read; the record's own texts are never searched for tags.
    tricky = record("exact", "<answer>")
    assert score(tricky, completion("B")).accuracy == 0.0


# --- time spans (Eq. 21) ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["[(1.0, 2.5)]", "(1.0, 2.5)", "[1.0, 2.5]", "1.0 2.5", " 1.0 , 2.5 ", "[ ( 1.0 2.5 ) ]", "[[1,2.5]]", "(1,2.50)"],
)
def test_spans_are_read_with_or_without_spaces_and_punctuation(text):
    assert parse_spans(text) == ((1.0, 2.5),)


def test_several_spans_are_read_in_order():
    assert parse_spans("[(1, 2), (3.5, 4)]") == ((1.0, 2.0), (3.5, 4.0))


@pytest.mark.parametrize(
    "text",
    ["", "1.0", "1 2 3", "(1, 2", "1, 2)", "[1, 2)", "(1,, 2)", "-1 2", "1e3 2", "nan inf", "1s 2s", "[]", "\u0661 2"],
)
def test_unreadable_spans(text):
    assert parse_spans(text) is None


def test_temporal_iou_by_hand():
    assert temporal_iou((0.0, 2.0), (1.0, 3.0)) == pytest.approx(1 / 3)
    assert temporal_iou((1.0, 3.0), (1.0, 3.0)) == 1.0
    assert temporal_iou((0.0, 4.0), (1.0, 2.0)) == 0.25
    assert temporal_iou((0.0, 1.0), (1.0, 2.0)) == 0.0
    assert temporal_iou((0.0, 1.0), (5.0, 6.0)) == 0.0


def test_degenerate_spans_have_no_iou():
    for span in [(1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0), (0.0, float("inf"))]:
        assert temporal_iou(span, (0.0, 2.0)) == 0.0 and temporal_iou((0.0, 2.0), span) == 0.0


def test_iou_takes_the_best_true_span_but_only_the_first_predicted_one():
    grounding = record("grounding", "A", spans=((0.0, 1.0), (4.0, 6.0)))
    assert iou_reward(grounding, parse_completion(completion("A", glue="[(4, 5)]"))) == 0.5
    assert iou_reward(grounding, parse_completion(completion("A", glue="[(8, 9), (4, 6)]"))) == 0.0


def test_a_grounding_record_without_spans_is_named():
    with pytest.raises(RecordError, match="time spans"):
        score(record("grounding", "A"), completion("A", glue="[(4, 5)]"))


# --- the sum ---------------------------------------------------------------------------------------------------------


def test_the_maximum_is_two_or_three_with_a_span():
    plain = score(record(), completion("A"))
    assert (plain.format, plain.accuracy, plain.iou, plain.total, plain.maximum) == (1.0, 1.0, None, 2.0, 2.0)
    assert plain.normalised == 1.0 and plain.right
    grounded = score(record("grounding", "A", spans=((0.0, 2.0),)), completion("A", glue="[(1.0, 3.0)]"))
    assert grounded.total == pytest.approx(2 + 1 / 3) and grounded.maximum == 3.0
    assert grounded.normalised == pytest.approx((2 + 1 / 3) / 3)


def test_a_wrong_answer_in_the_right_form_earns_the_format_only():
    wrong = score(record(), completion("B"))
    assert (wrong.total, wrong.normalised, wrong.right) == (1.0, 0.5, False)


# --- kinds of answers (Eq. 20) ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["A", " A ", "A.", "(A)"])
def test_choices_that_are_the_letter(answer):
    assert accuracy("multiple choice", "A", answer) == 1.0
    assert accuracy("multiple choice", "(A)", answer) == 1.0


@pytest.mark.parametrize("answer", ["B", "a", "A red", "A. red", "AA", "A B", "A)", "((A))", "Apple", "\u0410"])
def test_choices_that_are_not(answer):  # the last is a Cyrillic letter
    assert accuracy("multiple choice", "A", answer) == 0.0


def test_clap_is_not_c():
    assert accuracy("multiple choice", "C", "Clap") == 0.0


@pytest.mark.parametrize(
    ("truth", "answer", "reward"),
    [
        ("1200", "1,200", 1.0),
        ("5", "5.0", 1.0),
        ("0.333", "0.33", 1.0),
        ("-3", "-3", 1.0),
        ("5", "6", 0.0),
        ("5", "five", 0.0),
        ("5", "nan", 0.0),
        ("5", "5 6", 0.0),
        ("5", "5_0", 0.0),
        ("5", "9" * 500, 0.0),
    ],
)
def test_numerical(truth, answer, reward):
    assert accuracy("numerical", truth, answer) == reward


def test_regression_is_one_minus_the_relative_difference():
    assert accuracy("regression", "10", "9") == pytest.approx(0.9)
    assert accuracy("regression", "10", "25") == 0.0
    assert accuracy("regression", "0", "0") == 1.0
    assert accuracy("regression", "10", "ten") == 0.0


def test_ocr_is_one_minus_the_word_error_rate():
    assert accuracy("OCR", "no left turn ahead", "no right turn") == pytest.approx(0.5)  # one changed, one missing
    assert accuracy("OCR", "stop", "stop") == 1.0
    assert accuracy("OCR", "stop", "go on and on and on") == 0.0  # clamped
    assert accuracy("OCR", "Stop", "stop") == 0.0


def test_word_error_rate_by_hand():
    assert word_error_rate("a b c", "a b c") == 0.0
    assert word_error_rate("a c", "a b c") == pytest.approx(1 / 3)
    assert word_error_rate("a x b c", "a b c") == pytest.approx(1 / 3)
    assert word_error_rate("", "a b") == 1.0


def test_a_huge_answer_costs_no_table_of_word_errors():
    start = time.process_time()
    assert word_error_rate("red " * 250_000, "stop " * 300) == 1.0
    assert time.process_time() - start < 5  # the table would have 75 million cells


def test_rouge_by_hand():
    # the cat sat / the cat ran: unigrams 2 of 3, bigrams 1 of 2, longest common subsequence 2 of 3
    assert rouge_f("the cat sat", "the cat ran") == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    # order: unigrams all, bigrams none, subsequence 1 of 3
    assert rouge_f("c b a", "a b c") == pytest.approx((1 + 0 + 1 / 3) / 3)
    # unequal lengths: precision 1, recall 1/2, so F = 2/3; bigrams 1 of (1, 3); subsequence as unigrams
    assert rouge_f("a b", "a b c d") == pytest.approx((2 / 3 + 2 / 4 + 2 / 3) / 3)
    assert rouge_f("The Cat!", "the cat") == 1.0
    assert rouge_f("", "a") == 0.0


def test_the_longest_common_subsequence_equals_the_table():
    from random import Random

    from dvr1_lite.rewards import _longest_common

    def by_table(a, b):
        rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                rows[i + 1][j + 1] = rows[i][j] + 1 if x == y else max(rows[i][j + 1], rows[i + 1][j])
        return rows[-1][-1]

    random = Random(0)
    for _ in range(100):
        a, b = ([random.choice("abcd") for _ in range(random.randrange(80))] for _ in range(2))
        assert _longest_common(a, b) == by_table(a, b)


def test_exact_ignores_case_and_white_space_only():
    assert accuracy("exact", "2 5 8", " 2  5\n8 ") == 1.0
    assert accuracy("exact", "Red blue", "red Blue") == 1.0
    assert accuracy("exact", "2 5 8", "2 5") == 0.0
    assert accuracy("exact", "2 5 8", "258") == 0.0


def test_each_record_has_its_own_kind_of_reward():
    text = completion("5.0")
    kinds = ["multiple choice", "numerical", "exact", "regression"]
    assert [score(record(kind, "5"), text).accuracy for kind in kinds] == [0.0, 1.0, 0.0, 1.0]


def test_an_unknown_kind_lists_those_that_exist():
    with pytest.raises(RecordError, match="'essay'.*multiple choice"):
        score(record("essay", "A"), completion("A"))


# --- hostile text ----------------------------------------------------------------------------------------------------

KINDS = {
    "multiple choice": "A",
    "numerical": "5",
    "OCR": "no left turn",
    "free-form": "a red ball rolls",
    "regression": "5",
    "exact": "2 5",
    "grounding": "A",
}

HUGE = {
    "opening tags": "<think>" * 150_000,
    "pairs of tags": "<think></think><answer></answer>" * 30_000,
    "white space": "<think>" + " " * 10**6 + "</think><answer>A</answer>",
    "digits": completion("9" * 10**6),
    "signs": completion("+" * 10**6),
    "words": completion("red " * 250_000),
    "commas in a span": completion("A", glue="1" + "," * 10**6),
    "spaces in a span": completion("A", glue="1" + " " * 10**6 + "x"),
    "brackets": completion("A", glue="[(" * 500_000),
    "many spans": completion("A", glue="[" + "(1,2)" * 200_000),
    "angle brackets": "<" * 10**6,
    "not ascii": completion("é漢\u202e" * 300_000),
}


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE.keys())
def test_a_megabyte_is_scored_in_linear_time(text):
    start = time.process_time()
    for kind, truth in KINDS.items():
        score(record(kind, truth, ((1.0, 2.0),) if kind == "grounding" else ()), text)
    assert time.process_time() - start < 20  # seven kinds; takes about a second, quadratic time would take minutes


def test_any_text_scores_without_raising_and_malformed_text_scores_zero():
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    tags = ["<think>", "</think>", "<answer>", "</answer>", "<glue>", "</glue>", "<|im_end|>"]
    pieces = st.one_of(st.sampled_from([*tags, "A", "(1, 2)", " ", "5", "\x00"]), st.text(max_size=3))
    texts = st.one_of(st.text(), st.lists(pieces).map("".join))

    @hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @hypothesis.given(text=texts, kind=st.sampled_from(sorted(KINDS)))
    def check(text, kind):
        asked = record(kind, KINDS[kind], ((1.0, 2.0),) if kind == "grounding" else ())
        result = score(asked, text)
        assert 0.0 <= result.total <= result.maximum and 0.0 <= result.normalised <= 1.0
        if result.total > 0:
            expected = ["<think>", "</think>", "<answer>", "</answer>"] + ["<glue>", "</glue>"] * (kind == "grounding")
            found = [text.index(tag) for tag in expected]
            assert found == sorted(found) and all(text.count(tag) == 1 for tag in expected)
            assert text.strip().startswith(expected[0]) and text.strip().endswith(expected[-1])

    check()


def test_free_text_inside_the_sections_keeps_the_form():
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    inner = st.text(max_size=40).filter(lambda text: "<" not in text)

    @hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @hypothesis.given(think=inner, answer=inner)
    def check(think, answer):
        parsed = parse_completion(completion(answer, think))
        assert (parsed.well_formed, parsed.think, parsed.answer) == (True, think.strip(), answer.strip())

    check()


def test_ious_are_symmetric_and_bounded():
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    span = st.tuples(st.floats(0, 1e4), st.floats(0, 1e4))

    @hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @hypothesis.given(a=span, b=span)
    def check(a, b):
        assert temporal_iou(a, b) == temporal_iou(b, a)
        assert 0.0 <= temporal_iou(a, b) <= 1.0

    check()
