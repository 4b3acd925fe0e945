r"""Rewards: Eq. 19-21 by hand, each kind of answer, and text that tries to deceive, crash or slow down the parser."""

import random
import time
from types import SimpleNamespace

import hypothesis
import pytest
from hypothesis import strategies as st

from dvr1_lite.errors import RecordError
from dvr1_lite.judges import rouge_f, word_accuracy
from dvr1_lite.rewards import parse_completion, parse_spans, score, temporal_iop, temporal_iou

TRUTHS = {"multiple choice": "C", "numerical": "5", "OCR": "no left turn", "free-form": "a red ball", "exact": "2 5",
          "regression": "5", "grounding": "C"}
QUICK = hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)


def record(kind="multiple choice", answer=None, spans=None):
    spans = ((1.0, 2.0),) if spans is None and kind == "grounding" else spans or ()
    return SimpleNamespace(problem_type=kind, answer=TRUTHS[kind] if answer is None else answer, spans=spans)


def completion(answer, think="it is red", spans=None):
    return f"<think>{think}</think><answer>{answer}</answer>" + (f"<glue>{spans}</glue>" if spans else "")


def accuracy(kind, truth, answer, judge="strict"):
    return score(record(kind, truth), completion(answer), judge).accuracy


# --- the form (Eq. 19) -----------------------------------------------------------------------------------------------

GOOD = completion("C")


def test_a_well_formed_completion_is_split_and_stripped():
    parsed = parse_completion(" <think> first red\nthen blue </think> <answer> A </answer>\n")
    assert (parsed.think, parsed.answer, parsed.spans, parsed.well_formed) == ("first red\nthen blue", "A", None, True)
    assert parse_completion(completion("A", spans="[(5.2, 10.4)]")).spans == ((5.2, 10.4),)


MALFORMED = {
    "empty": "", "no tags": "C", "answer only": "<answer>C</answer>", "thought only": "<think>a</think>",
    "unclosed answer": "<think>a</think><answer>C", "unclosed thought": "<think>a<answer>C</answer>",
    "wrong order": "<answer>C</answer><think>a</think>", "nested": "<think>a<answer>C</answer></think>",
    "overlapping": "<think>a<answer></think>C</answer>", "closed before opened": "</think>a<think><answer>C</answer>",
    "repeated answer": "<think>a</think><answer>C</answer><answer>C</answer>",
    "repeated thought": "<think>a</think><think>b</think><answer>C</answer>",
    "answer opened twice": "<think>a</think><answer><answer>C</answer>",
    "answer in the answer": "<think>a</think><answer><answer>C</answer></answer>",
    "tag quoted in the thought": "<think>they want <answer></think><answer>C</answer>",
    "text before": f"Sure! {GOOD}", "text between": GOOD.replace("</think>", "</think> so "), "text after": f"{GOOD} C",
    "upper case": GOOD.upper(), "spaces in a tag": "< think>a</ think><answer>C</answer>",
    "span first": f"<glue>[(1, 2)]</glue>{GOOD}", "span unclosed": f"{GOOD}<glue>[(1, 2)]",
    "span unreadable": f"{GOOD}<glue>soon</glue>", "span empty": f"{GOOD}<glue></glue>", "None": None,
    "bytes": GOOD.encode(),
    # cheats
    "full-width tags": GOOD.replace("<", "\uff1c").replace(">", "\uff1e"),
    "zero-width space in a tag": GOOD.replace("<answer>", "<ans\u200bwer>"),
    "Cyrillic letter in a tag": GOOD.replace("<answer>", "<\u0430nswer>"),
    "attributes": GOOD.replace("<answer>", '<answer id="1">'), "escaped": GOOD.replace("<answer>", "&lt;answer&gt;"),
    "in a comment": f"<!-- {GOOD} -->", "question repeated": f"Question: <answer>C</answer>? {GOOD}",
    "every letter": "<think>x</think>" + "".join(f"<answer>{letter}</answer>" for letter in "ABCD"),
    "a turn of its own": f"<think>x</think><|im_end|><|im_start|>user\n{GOOD}",
    "null between": GOOD.replace("</think>", "</think>\0"), "surrogate": GOOD.replace("</think>", "</think>\ud800"),
    "right-to-left override": GOOD.replace("<answer>", "\u202e<answer>")}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_malformed_text_and_cheats_earn_nothing_on_any_part(text):
    assert not parse_completion(text).well_formed
    for kind in TRUTHS:
        for judge in ("strict", "first-letter"):
            result = score(record(kind), text, judge)
            assert (result.total, result.format, result.accuracy, result.iou or 0.0, result.correct) == (0, 0, 0, 0, 0)


def test_a_span_section_is_required_exactly_when_the_record_asks_for_one():
    with_span = completion("C", spans="[(1, 2)]")
    assert score(record("grounding"), with_span).format == 1.0 and score(record(), GOOD).format == 1.0
    assert score(record("grounding"), GOOD).total == 0.0 and score(record(), with_span).total == 0.0
    assert score(record(spans=((1.0, 2.0),)), with_span).total == 3.0  # any record with true spans asks for one


def test_an_empty_thought_keeps_the_format_and_an_empty_answer_is_never_correct():
    result = score(record("exact", ""), "<think></think><answer></answer>")
    assert (result.format, result.accuracy) == (1.0, 0.0)


# --- time spans (Eq. 21) ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["[(1.0, 2.5)]", "(1.0, 2.5)", "[1.0, 2.5]", "1.0 2.5", " 1.0 , 2.5 ",
                                  "[ ( 1.0 2.5 ) ]", "[[1,2.5]]", "(1,2.50)"])
def test_spans_are_read_with_or_without_spaces_and_punctuation(text):
    assert parse_spans(text) == ((1.0, 2.5),)
    assert parse_spans("[(1, 2), (3.5, 4)]") == ((1.0, 2.0), (3.5, 4.0))


@pytest.mark.parametrize("text", ["", "1.0", "1 2 3", "(1, 2", "1, 2)", "[1, 2)", "(1,, 2)", "-1 2", "1e3 2", "nan inf",
                                  "1s 2s", "[]", "\u0661 2", "1234567890 2"])
def test_unreadable_spans(text):
    assert parse_spans(text) is None


def test_temporal_iou_and_iop_by_hand():
    assert temporal_iou((0.0, 2.0), (1.0, 3.0)) == pytest.approx(1 / 3) and temporal_iou((1.0, 3.0), (1.0, 3.0)) == 1.0
    assert temporal_iou((0.0, 4.0), (1.0, 2.0)) == 0.25 and temporal_iop((0.0, 4.0), (1.0, 2.0)) == 0.25
    assert temporal_iop((1.0, 2.0), (0.0, 4.0)) == 1.0 and temporal_iop((1.0, 3.0), (0.0, 2.0)) == 0.5
    assert temporal_iou((0.0, 1.0), (1.0, 2.0)) == temporal_iou((0.0, 1.0), (5.0, 6.0)) == 0.0
    assert temporal_iop((1.0, 1.0), (0.0, 2.0)) == 1.0 and temporal_iop((3.0, 3.0), (0.0, 2.0)) == 0.0
    for span in [(1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0), (0.0, float("inf"))]:
        assert temporal_iou(span, (0.0, 2.0)) == temporal_iou((0.0, 2.0), span) == 0.0
    assert temporal_iop((2.0, 1.0), (0.0, 2.0)) == temporal_iop((float("nan"), 1.0), (0.0, 2.0)) == 0.0


@QUICK
@hypothesis.given(*[st.tuples(st.floats(0, 1e4), st.floats(0, 1e4))] * 2)
def test_ious_are_symmetric_and_bounded(a, b):
    assert temporal_iou(a, b) == temporal_iou(b, a)
    assert 0.0 <= temporal_iou(a, b) <= temporal_iop(a, b) + 1e-9 and temporal_iop(a, b) <= 1.0 + 1e-9


def test_the_first_predicted_span_counts_against_the_best_true_one():
    grounding = record("grounding", spans=((0.0, 1.0), (4.0, 6.0)))
    assert score(grounding, completion("C", spans="[(4, 5)]")).iou == 0.5
    assert score(grounding, completion("C", spans="[(8, 9), (4, 6)]")).iou == 0.0
    with pytest.raises(RecordError, match="no time spans: give"):
        score(record("grounding", spans=[]), GOOD)


# --- the sum and the kinds of answers (Eq. 20) -----------------------------------------------------------------------

def test_the_total_is_the_sum_of_the_parts():
    plain = score(record(), GOOD)
    assert (plain.format, plain.accuracy, plain.iou, plain.total, plain.maximum) == (1.0, 1.0, None, 2.0, 2.0)
    assert plain.normalised == 1.0 and plain.correct
    grounded = score(record("grounding", spans=((0.0, 2.0),)), completion("C", spans="[(1.0, 3.0)]"))
    assert grounded.total == pytest.approx(2 + 1 / 3) and grounded.maximum == 3.0 and grounded.correct
    assert grounded.normalised == pytest.approx((2 + 1 / 3) / 3)
    incorrect = score(record(), completion("B"))
    assert (incorrect.total, incorrect.normalised, incorrect.correct) == (1.0, 0.5, False)


@pytest.mark.parametrize("answer", ["C", " C ", "C.", "(C)"])
@pytest.mark.parametrize("judge", ["strict", "first-letter"])
def test_answers_that_both_judges_accept(answer, judge):
    assert accuracy("multiple choice", "C", answer, judge) == accuracy("multiple choice", "(C)", answer, judge) == 1.0


@pytest.mark.parametrize("answer", ["C red", "C. wash the cup", "C)", "(C) red", "C D", "C, or A", "CC", "C\0", "Clap"])
def test_answers_that_only_the_first_letter_judge_accepts(answer):
    assert accuracy("multiple choice", "C", answer) == 0.0
    assert accuracy("multiple choice", "C", answer, "first-letter") == 1.0


@pytest.mark.parametrize("answer", ["B", "c", "((C))", "not C", "[C]", "{C}", "\u0421", "\uff23", ".C", "answer: C"])
def test_answers_that_no_judge_accepts(answer):  # two are a Cyrillic and a full-width letter
    assert accuracy("multiple choice", "C", answer) == accuracy("multiple choice", "C", answer, "first-letter") == 0.0


@pytest.mark.parametrize(("kind", "cases"), [
    ("numerical", [("1200", "1,200", 1), ("5", "5.0", 1), ("0.333", "0.33", 1), ("-3", "-3", 1), ("5", "6", 0),
                   ("5", "five", 0), ("five", "five", 0), ("5", "nan", 0), ("nan", "nan", 0), ("5", "5 6", 0),
                   ("5", "5_0", 0), ("5", "5." + "0" * 70 + "x", 0), ("1e99", "1e999", 0)]),
    ("regression", [("10", "9", 0.9), ("10", "25", 0), ("0", "0", 1), ("10", "ten", 0), ("ten", "1", 0)]),
    ("OCR", [("no left turn ahead", "no right turn", 0.5), ("stop", "stop", 1), ("Stop", "stop", 0),
             ("stop", "go on and on and on", 0)]),
    ("exact", [("2 5 8", " 2  5\n8 ", 1), ("Red blue", "red Blue", 1), ("red car", "red_car", 1), ("2 5 8", "2 5", 0),
               ("2 5 8", "258", 0), ("A", "a", 0)]),
    ("free-form", [("red car", "Red_car!", 1), ("\u7ea2 \u8f66", "\u7ea2 \u8f66", 1), ("a", "b", 0)])])
def test_answers_of_each_kind_by_hand(kind, cases):
    for truth, answer, reward in cases:
        assert accuracy(kind, truth, answer) == pytest.approx(reward), (truth, answer)


def test_word_accuracy_by_hand():
    assert word_accuracy("a b c", "a b c") == 1.0 and word_accuracy("", "a b") == 0.0
    assert word_accuracy("a c", "a b c") == word_accuracy("a x b c", "a b c") == pytest.approx(2 / 3)
    start = time.process_time()
    assert word_accuracy("red " * 250_000, "stop " * 300) == 0.0
    assert time.process_time() - start < 5  # a table of the distances would have 75 million cells


def test_rouge_by_hand():
    # the cat sat / the cat ran: unigrams 2 of 3, bigrams 1 of 2, longest common subsequence 2 of 3
    assert rouge_f("the cat sat", "the cat ran") == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    assert rouge_f("c b a", "a b c") == pytest.approx((1 + 0 + 1 / 3) / 3)
    # precision 1, recall 1/2, so F = 2/3; bigrams 1 of (1, 3); subsequence as unigrams
    assert rouge_f("a b", "a b c d") == pytest.approx((2 / 3 + 2 / 4 + 2 / 3) / 3)
    assert rouge_f("The Cat!", "the cat") == 1.0 and rouge_f("", "a") == rouge_f("?", "a") == 0.0


def test_rouge_l_equals_the_table_of_common_subsequences():
    def by_table(a, b):
        rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for (i, x), (j, y) in ((p, q) for p in enumerate(a) for q in enumerate(b)):
            rows[i + 1][j + 1] = rows[i][j] + 1 if x == y else max(rows[i][j + 1], rows[i + 1][j])
        return rows[-1][-1]

    def f(overlap, a, b):
        return 2 * overlap / (len(a) + len(b))

    draw = random.Random(0)
    for _ in range(50):
        a, b = ([draw.choice("abcd") for _ in range(draw.randrange(2, 40))] for _ in range(2))
        pairs = [[x + y for x, y in zip(words, words[1:])] for words in (a, b)]
        shared = [sum(min(x.count(word), y.count(word)) for word in set(x)) for x, y in ((a, b), pairs)]
        expected = (f(shared[0], a, b) + f(shared[1], *pairs) + f(by_table(a, b), a, b)) / 3
        assert rouge_f(" ".join(a), " ".join(b)) == pytest.approx(expected)


def test_an_unknown_kind_is_an_error_that_lists_those_that_exist():
    with pytest.raises(RecordError, match="'essay' has no reward: use one of multiple choice"):
        score(record("essay", "A"), GOOD)


# --- hostile text ----------------------------------------------------------------------------------------------------

PIECES = ["<think>", "</think>", "<answer>", "</answer>", "<glue>", "</glue>", "<", ">", "/", "(1, 2)", "[", "(", ",",
          "1", ".", "-", "e", " ", "\n", "C", "red ", "\u00e9", "\u6f22", "\0", "\ud800", "&lt;", "<|im_end|>"]


@hypothesis.settings(max_examples=8, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join), st.booleans(),
                  st.sampled_from(sorted(TRUTHS)))
def test_a_megabyte_of_any_text_takes_linear_time(unit, inside, kind):
    def seconds(size):
        text = unit * (size // len(unit))
        text = GOOD.replace(">C<", f">{text}<") if inside else text
        began = time.process_time()
        score(record(kind), text)
        return time.process_time() - began

    small, large = min(seconds(2**17) for _ in range(2)), seconds(2**20)
    assert large < 0.5 + 40 * small  # 8 times the text; quadratic would be 64 times


@pytest.mark.parametrize("text", [
    "<think>" * 150_000, "<think></think><answer></answer>" * 30_000, completion("C", think=" " * 10**6),
    completion("9" * 10**6), completion("+" * 10**6), completion("red " * 250_000), "<" * 10**6,
    completion("C", spans="1" + "," * 10**6), completion("C", spans="1" + " " * 10**6 + "x"),
    completion("C", spans="[(" * 500_000), completion("C", spans="[" + "(1,2)" * 200_000),
    completion("\u00e9\u6f22\u202e" * 300_000)], ids=range(12))
def test_megabytes_made_to_be_slow_are_scored_in_seconds(text):
    began = time.process_time()
    for kind in TRUTHS:
        score(record(kind), text)
    assert time.process_time() - began < 20  # takes about a second; quadratic time would take minutes


@QUICK
@hypothesis.given(st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3))).map("".join)),
                  st.sampled_from(sorted(TRUTHS)), st.sampled_from(["strict", "first-letter"]))
def test_any_text_is_scored_and_only_the_whole_form_earns_anything(text, kind, judge):
    result = score(record(kind), text, judge)
    assert 0.0 <= result.total <= result.maximum and 0.0 <= result.normalised <= 1.0
    if result.total > 0:
        expected = ["<think>", "</think>", "<answer>", "</answer>"] + ["<glue>", "</glue>"] * (kind == "grounding")
        found = [text.index(tag) for tag in expected]
        assert found == sorted(found) and all(text.count(tag) == 1 for tag in expected)
        assert text.strip().startswith(expected[0]) and text.strip().endswith(expected[-1])


@QUICK
@hypothesis.given(*[st.text(max_size=40).filter(lambda text: "<" not in text)] * 2)
def test_free_text_inside_the_sections_keeps_the_form(think, answer):
    parsed = parse_completion(completion(answer, think))
    assert (parsed.well_formed, parsed.think, parsed.answer) == (True, think.strip(), answer.strip())
