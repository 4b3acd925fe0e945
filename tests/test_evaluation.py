r"""Accuracy, intervals, pairing and recall by hand; evaluations that stop and go on."""

import json
import math
import statistics

import pytest
from small_run import write_world

from dvr1_lite.data import read_records
from dvr1_lite.errors import ClipError, ConfigError, RecordError
from dvr1_lite.evaluation import (
    View,
    cluster_standard_error,
    evaluate,
    grounding,
    mean_interval,
    paired_change,
    share_interval,
    summarise,
    t_quantile,
)
from dvr1_lite.files import append_lines, read_lines
from dvr1_lite.policy import Policy


def row(index, accuracy, clip="a", kind="colour", iou=None, sample=0):
    return {"index": index, "record_id": f"r{index}", "clip": clip, "question_type": kind, "sample": sample,
            "completion": "", "format": 1.0, "accuracy": accuracy, "iou": iou, "total": 1 + accuracy, "maximum": 2.0}


# --- intervals by hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("degrees", "expected"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_t_quantiles_of_the_tables(degrees, expected):
    assert t_quantile(0.975, degrees) == pytest.approx(expected, abs=5e-4)


def test_t_quantile_goes_to_the_normal_one():
    assert t_quantile(0.975, 5000) == pytest.approx(statistics.NormalDist().inv_cdf(0.975), abs=1e-3)
    assert t_quantile(0.5, 3) == pytest.approx(0.0, abs=1e-12)


def test_standard_error_of_two_clusters_by_hand():
    # mean 0.75; residuals sum to -0.5 in a and +0.5 in b; 2/1 * (0.25 + 0.25) = 1, over n^2 = 16
    assert cluster_standard_error([1, 0, 1, 1], list("aabb")) == pytest.approx(0.25)


def test_clusters_of_one_give_the_usual_standard_error():
    values = [0.2, 0.9, 0.4, 0.7, 0.1]
    assert cluster_standard_error(values, list("abcde")) == pytest.approx(statistics.stdev(values) / math.sqrt(5))


def test_equal_answers_about_a_clip_count_once():
    assert cluster_standard_error([1, 0, 1], list("abc")) == pytest.approx(
        cluster_standard_error([1] * 4 + [0] * 4 + [1] * 4, list("aaaabbbbcccc")))


def test_interval_by_hand():
    values, clusters = [1, 0, 1, 1, 0, 1], list("abcdef")  # mean 2/3, s = 0.5164, se = 0.2108, t(5) = 2.5706
    low, high = mean_interval(values, clusters, -9, 9)
    assert (low, high) == (pytest.approx(0.1248, abs=1e-4), pytest.approx(1.2086, abs=1e-4))
    assert share_interval(values, clusters) == (pytest.approx(low), 1.0)


def test_one_clip_and_no_clip_tell_nothing():
    assert share_interval([1, 0], list("aa")) == (0.0, 1.0)
    assert share_interval([], []) == (0.0, 1.0)
    assert mean_interval([0.5], ["a"], -1, 1) == (-1, 1)


def test_all_right_is_not_certainty():
    square = 2.262157**2  # t(9)
    assert share_interval([0.0] * 10, list("abcdefghij")) == (0.0, pytest.approx(square / (10 + square)))
    assert share_interval([1.0] * 10, list("abcdefghij")) == (pytest.approx(10 / (10 + square)), 1.0)


# --- figures by hand -------------------------------------------------------------------------------------------------


def test_summary_by_hand():
    rows = [row(0, 1.0, "a"), row(1, 0.0, "a", "order"), row(2, 1.0, "b"), row(3, 1.0, "b", "order"),
            {"index": 4, "record_id": "r4", "clip": "c", "question_type": "order", "sample": 0, "error": "gone"}]
    summary = summarise(rows)
    assert summary["accuracy"] == 0.75 and summary["n"] == 4 and summary["clips"] == 2 and summary["broken"] == 1
    assert summary["ci95"] == [0.0, 1.0]  # 0.75 +- 12.7 * 0.25
    assert summary["by_type"]["colour"]["accuracy"] == 1.0 and summary["by_type"]["order"]["accuracy"] == 0.5
    assert summary["by_type"]["order"]["n"] == 2 and summary["format_rate"] == 1.0
    assert "mean_iou" not in summary


def test_recall_by_hand():
    figures = grounding([0.5, 0.3, 0.7, 0.0])
    assert figures == {"mean_iou": pytest.approx(0.375), "recall": {"0.3": 0.75, "0.5": 0.5, "0.7": 0.25}}


def test_grounding_figures_are_those_of_grounding_questions():
    summary = summarise([row(0, 1.0, "a", iou=0.6), row(1, 1.0, "b", iou=0.2), row(2, 1.0, "c")])
    assert summary["mean_iou"] == pytest.approx(0.4) and summary["recall"]["0.5"] == 0.5


def test_several_answers_are_one_question():
    summary = summarise([row(0, 1.0, "a"), row(0, 0.0, "a", sample=1), row(1, 1.0, "b"), row(1, 1.0, "b", sample=1)])
    assert summary["accuracy"] == 0.75 and summary["n"] == 2 and summary["answers"] == 4


def test_paired_change_by_hand():
    clips = ["a", "a", "b", "b", "c", "c"]
    before = [row(i, float(v), clips[i]) for i, v in enumerate([1, 0, 0, 0, 1, 1])]
    after = [row(i, float(v), clips[i]) for i, v in enumerate([1, 1, 1, 0, 1, 0])]
    change = paired_change(before, list(reversed(after)))
    # differences 0 1 1 0 0 -1: mean 1/6; clusters' sums of residuals 2/3, 2/3, -4/3; 3/2 * 24/9 = 4, over 36 = 1/9
    assert change["change"] == pytest.approx(1 / 6) and change["n"] == 6 and change["clips"] == 3
    assert change["ci95"] == [-1.0, 1.0]  # cut from 1/6 +- 4.3027 / 3
    assert mean_interval([0, 1, 1, 0, 0, -1], clips, -9, 9) == pytest.approx((1 / 6 - 1.434218, 1 / 6 + 1.434218))
    assert change["unpaired"] == 0 and change["by_type"]["colour"]["n"] == 6


def test_pairing_is_narrower_than_two_intervals_and_skips_what_only_one_answered():
    before = [row(i, float(i % 2), f"clip{i}") for i in range(40)]
    after = [row(i, 1.0 if i == 0 else float(i % 2), f"clip{i}") for i in range(40)] + [row(40, 1.0, "new")]
    change = paired_change(before, after)
    assert change["change"] == pytest.approx(1 / 40) and change["unpaired"] == 1
    assert change["ci95"][1] - change["ci95"][0] < 0.12


# --- evaluations -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def policy(world):
    return Policy.load(world / "model")


@pytest.fixture
def records(world):
    return read_records(world / "records.jsonl")


def answers(policy, records, **changes):
    options = {"view": View(4, 56), "max_new_tokens": 5, "batch": 4, "temperature": 1.0, "seed": 0, **changes}
    return evaluate(policy, records, **options)


def test_a_row_for_every_question(policy, records):
    rows = answers(policy, records)
    assert sorted(row["record_id"] for row in rows) == sorted(record.record_id for record in records)
    assert {"completion", "format", "accuracy", "iou", "clip", "question_type"} <= rows[0].keys()
    assert rows == answers(policy, records) and rows != answers(policy, records, seed=1)
    assert [row["completion"] for row in answers(policy, records, samples=3)] != [r["completion"] for r in rows]


def test_greedy_answers_do_not_depend_on_the_batch(policy, records):
    by_index = [{row["index"]: row["completion"] for row in answers(policy, records, temperature=0.0, batch=size)}
                for size in (1, 4, 100)]
    assert by_index[0] == by_index[1] == by_index[2]


def test_each_clip_is_encoded_once(world, records):
    policy = Policy.load(world / "model")
    answers(policy, records)
    answers(policy, records)
    assert policy.features.misses == 3 and len(records) == 6


def test_an_evaluation_goes_on_with_the_same_answers_and_counts_all(policy, records, tmp_path):
    whole = answers(policy, records, out=tmp_path / "whole.jsonl", batch=2)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[:3]) + lines[3][:20])  # killed in the middle of the second batch
    resumed = answers(policy, records, out=tmp_path / "cut.jsonl", batch=2)
    assert resumed == whole and list(read_lines(tmp_path / "cut.jsonl")) == whole
    assert summarise(resumed) == summarise(whole) and summarise(resumed)["n"] == 6


def test_a_finished_evaluation_asks_nothing(policy, records, tmp_path, monkeypatch):
    first = answers(policy, records, out=tmp_path / "done.jsonl")
    monkeypatch.setattr("dvr1_lite.evaluation.sample_groups", lambda *_, **__: pytest.fail("asked again"))
    assert answers(policy, records, out=tmp_path / "done.jsonl") == first


def test_answers_to_other_records_are_refused(policy, records, tmp_path):
    answers(policy, records, out=tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="other records"):
        answers(policy, records[1:], out=tmp_path / "a.jsonl")


def test_many_answers_at_temperature_0_are_refused(policy, records):
    with pytest.raises(ConfigError, match="all the same"):
        answers(policy, records, samples=2, temperature=0.0)


def test_a_broken_clip_is_counted_and_none_at_all_is_an_error(tmp_path):
    world = write_world(tmp_path)
    policy, records = Policy.load(world / "model"), read_records(world / "records.jsonl")
    (world / "0.mp4").write_bytes(b"")
    summary = summarise(answers(policy, records))
    assert summary["broken"] == 2 and summary["n"] == 4 and summary["clips"] == 2
    (world / "1.mp4").unlink()
    (world / "2.mp4").write_text("no video")
    with pytest.raises(ClipError, match="no clip of the 6 records"):
        answers(Policy.load(world / "model"), records)


# --- files -----------------------------------------------------------------------------------------------------------


def test_lines_round_trip_and_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "x.jsonl"
    append_lines(path, [{"a": 1.5}, {"a": "é\n"}])
    assert list(read_lines(path)) == [{"a": 1.5}, {"a": "é\n"}]
    path.write_text(path.read_text() + json.dumps({"a": 3})[:4])
    assert len(list(read_lines(path))) == 2
    path.write_text("{broken\n{}\n")
    with pytest.raises(RecordError, match="line 1"):
        list(read_lines(path))
    assert list(read_lines(tmp_path / "none.jsonl")) == []


def test_a_value_that_is_not_json_is_not_written(tmp_path):
    with pytest.raises(ValueError):
        append_lines(tmp_path / "x.jsonl", [{"a": math.nan}])
    assert not (tmp_path / "x.jsonl").exists()
