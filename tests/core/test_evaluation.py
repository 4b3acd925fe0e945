r"""Accuracy, intervals, pairing and recall by hand; evaluations that are interrupted and resumed."""

import json
import math
import statistics

import pytest
import torch

from dvr1_lite.config import TrainConfig
from dvr1_lite.data import Record, read_records
from dvr1_lite.errors import ClipError, ConfigError, RecordError
from dvr1_lite.evaluation import (
    cluster_standard_error,
    controls,
    evaluate,
    grounding,
    limited,
    mean_interval,
    paired_change,
    summarise,
)
from dvr1_lite.files import append_lines, read_lines
from dvr1_lite.policy import Policy
from tests.small_run import write_world


def row(index, accuracy, clip="a", kind="colour", iou=None, sample=0):
    return {"index": index, "record_id": f"r{index}", "clip": clip, "question_type": kind, "sample": sample,
            "completion": "", "format": 1.0, "accuracy": accuracy, "iou": iou, "total": 1 + accuracy, "maximum": 2.0}


# --- intervals by hand -----------------------------------------------------------------------------------------------


def test_standard_errors_by_hand():
    # mean 0.75; residuals sum to -0.5 in a and +0.5 in b; 2/1 * (0.25 + 0.25) = 1, over n^2 = 16
    assert cluster_standard_error([1, 0, 1, 1], list("aabb")) == pytest.approx(0.25)
    values = [0.2, 0.9, 0.4, 0.7, 0.1]  # clusters of one
    assert cluster_standard_error(values, list("abcde")) == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    # equal answers about a clip count once
    assert cluster_standard_error([1, 0, 1], list("abc")) == pytest.approx(
        cluster_standard_error([1] * 4 + [0] * 4 + [1] * 4, list("aaaabbbbcccc")))


def test_the_interval_by_hand():
    values, clusters = [1, 0, 1, 1, 0, 1], list("abcdef")  # mean 2/3, s = 0.5164, se = 0.2108, t(5) = 2.5706
    low, high = mean_interval(values, clusters, -9, 9)
    assert (low, high) == (pytest.approx(0.1248, abs=1e-4), pytest.approx(1.2086, abs=1e-4))
    assert mean_interval(values, clusters) == (pytest.approx(low), 1.0)


@pytest.mark.parametrize(("values", "clusters", "expected"), [
    ([1, 0], "aa", (0.0, 1.0)), ([], "", (0.0, 1.0)), ([1.0], "a", (0.0, 1.0)),
    # t(1) = 12.7062, t^2 = 161.45: Wilson's interval for 2 of 2 is [2 / (2 + 161.45), 1]
    ([1, 1, 1, 1], "aabb", (0.012236, 1.0)), ([0, 0], "ab", (0.0, 0.987764)),
    # t(9) = 2.262157, t^2 = 5.11735
    ([0.0] * 10, "abcdefghij", (0.0, 0.338509)), ([1.0] * 10, "abcdefghij", (0.661491, 1.0)),
    # a constant 0.5 reaches 0.338509 of the way to each bound
    ([0.5] * 10, "abcdefghij", (0.330746, 0.669254)),
    ([1, 0] * 10, "aabbccddeeffgghhiijj", (0.330746, 0.669254))])  # clips that all agree on one of two
def test_few_clips_or_constant_values_are_no_certainty(values, clusters, expected):
    assert mean_interval(values, list(clusters)) == pytest.approx(expected, abs=2e-6)
    if len(set(clusters)) < 2:
        assert mean_interval(values, list(clusters), -1, 1) == (-1, 1)


def test_an_unchanged_accuracy_has_an_interval_around_zero():
    rows = [row(i, float(i % 2), f"clip{i}") for i in range(10)]
    assert paired_change(rows, rows)["ci95"] == pytest.approx([-0.338509, 0.338509], abs=2e-6)


# --- figures by hand -------------------------------------------------------------------------------------------------


def test_the_summary_by_hand():
    rows = [row(0, 1.0, "a"), row(1, 0.0, "a", "order"), row(2, 1.0, "b"), row(3, 1.0, "b", "order"),
            {"index": 4, "record_id": "r4", "clip": "c", "question_type": "order", "sample": 0, "error": "missing"}]
    summary = summarise(rows)
    assert summary["accuracy"] == 0.75 and summary["n"] == 4 and summary["clips"] == 2 and summary["broken"] == 1
    assert summary["ci95"] == [0.0, 1.0]  # 0.75 +- 12.7 * 0.25
    assert summary["by_type"]["colour"]["accuracy"] == 1.0 and summary["by_type"]["order"]["accuracy"] == 0.5
    assert summary["by_type"]["order"]["n"] == 2 and summary["by_type"]["order"]["clips"] == 2
    assert summary["format_rate"] == 1.0 and "mean_iou" not in summary


def test_recall_by_hand():
    assert grounding([0.5, 0.3, 0.7, 0.0]) == {"mean_iou": pytest.approx(0.375),
                                               "recall": {"0.3": 0.75, "0.5": 0.5, "0.7": 0.25}}
    summary = summarise([row(0, 1.0, "a", iou=0.6), row(1, 1.0, "b", iou=0.2), row(2, 1.0, "c")])
    assert summary["mean_iou"] == pytest.approx(0.4) and summary["recall"]["0.5"] == 0.5  # questions that ask a span


def test_grounded_answers_by_hand():
    rows = [row(i, accuracy, clip, iou=iou) | {"iop": iop} for i, (accuracy, clip, iou, iop) in enumerate(
        [(1.0, "a", 0.4, 0.5), (1.0, "b", 0.2, 0.4), (0.0, "c", 0.9, 1.0), (1.0, "d", 0.1, 0.9)])]
    summary = summarise(rows)
    assert summary["mean_iop"] == pytest.approx(0.7) and summary["iop_at"] == {"0.3": 1.0, "0.5": 0.75}
    assert summary["acc_gqa"] == 0.5  # correct and IoP >= 0.5: the first and the last
    assert summary["acc_gqa_ci95"] == [0.0, 1.0]  # 0.5 +- t(3) = 3.182 * sqrt(4/3 * 1) / 4 = 0.919


def test_several_answers_are_one_question():
    summary = summarise([row(0, 1.0, "a"), row(0, 0.0, "a", sample=1), row(1, 1.0, "b"), row(1, 1.0, "b", sample=1)])
    assert summary["accuracy"] == 0.75 and summary["n"] == 2 and summary["answers"] == 4


def test_the_paired_change_by_hand():
    clips = ["a", "a", "b", "b", "c", "c"]
    before = [row(i, float(v), clips[i]) for i, v in enumerate([1, 0, 0, 0, 1, 1])]
    after = [row(i, float(v), clips[i]) for i, v in enumerate([1, 1, 1, 0, 1, 0])]
    change = paired_change(before, list(reversed(after)))
    # differences 0 1 1 0 0 -1: mean 1/6; clusters' sums of residuals 2/3, 2/3, -4/3; 3/2 * 24/9 = 4, over 36 = 1/9
    assert change["change"] == pytest.approx(1 / 6) and change["n"] == 6 and change["clips"] == 3
    assert change["ci95"] == [-1.0, 1.0]  # cut from 1/6 +- 4.3027 / 3
    assert mean_interval([0, 1, 1, 0, 0, -1], clips, -9, 9) == pytest.approx((1 / 6 - 1.434218, 1 / 6 + 1.434218))
    assert change["unpaired"] == 0 and change["by_type"]["colour"]["n"] == 6


def test_pairing_narrows_the_interval_and_leaves_out_what_only_one_answered():
    before = [row(i, float(i % 2), f"clip{i}") for i in range(40)]
    after = [row(i, 1.0 if i == 0 else float(i % 2), f"clip{i}") for i in range(40)] + [row(40, 1.0, "new")]
    change = paired_change(before, after)
    assert change["change"] == pytest.approx(1 / 40) and change["unpaired"] == 1
    assert change["ci95"][1] - change["ci95"][0] < 0.12


def test_a_limited_evaluation_draws_the_same_records_in_the_files_order():
    part = limited(list("abcdefgh"), 3)
    assert part == limited(list("abcdefgh"), 3) == sorted(part) and len(part) == 3
    assert limited(list("abc"), 0) == limited(list("abc"), 9) == list("abc")


# --- evaluations -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def policy(world):
    return Policy.load(world / "model")


@pytest.fixture(scope="module")
def records(world):
    return read_records(world / "records.jsonl")


def answers(policy, records, batch=4, seed=0, temperature=1.0, **options):
    config = TrainConfig(num_frames=4, frame_size=56, max_new_tokens=5, eval_batch=batch, seed=seed,
                         eval_temperature=temperature)
    return evaluate(policy, records, config, **options)


def test_a_row_for_every_question(policy, records):
    rows = answers(policy, records)
    assert sorted(row["record_id"] for row in rows) == sorted(record.record_id for record in records)
    assert {"completion", "format", "accuracy", "iou", "clip", "question_type"} <= rows[0].keys()
    assert rows == answers(policy, records) and rows != answers(policy, records, seed=1)
    assert [row["sample"] for row in answers(policy, records, samples=3)] == [0, 1, 2] * 6


def test_greedy_answers_do_not_depend_on_the_batch(policy, records):
    by_index = [{row["index"]: row["completion"] for row in answers(policy, records, size, temperature=0.0)}
                for size in (1, 4, 100)]
    assert by_index[0] == by_index[1] == by_index[2]


def test_an_evaluation_is_resumed_with_the_same_answers_and_counts_all(policy, records, tmp_path, monkeypatch):
    whole = answers(policy, records, 2, out=tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[:3]) + lines[3][:20])  # killed in the middle of the second batch
    resumed = answers(policy, records, 2, out=tmp_path / "cut.jsonl")
    assert resumed == whole and list(read_lines(tmp_path / "cut.jsonl")) == whole
    assert summarise(resumed) == summarise(whole) and summarise(resumed)["n"] == 6
    monkeypatch.setattr("dvr1_lite.evaluation.sample_groups", lambda *_, **__: pytest.fail("answered twice"))
    assert answers(policy, records, 2, out=tmp_path / "whole.jsonl") == whole
    with pytest.raises(ConfigError, match="other records"):
        answers(policy, records[1:], out=tmp_path / "whole.jsonl")


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


def test_the_controls_show_another_clip_one_frame_and_another_order():
    records = [Record(str(k), "q", (), "a", "exact", "exact", clip) for k, clip in enumerate(["a", "a", "b", "c"])]
    found, frames = controls(records, seed=0), torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 2, 2)
    assert [record.clip for record in found["another clip"][0]] == ["b", "b", "c", "a"]
    assert found["another clip"][1] is None and [r.clip for r in found["one frame"][0]] == ["a", "a", "b", "c"]
    assert found["one frame"][1](frames)[:, 0, 0, 0].tolist() == [3.0] * 6
    shuffled = found["shuffled frames"][1](frames)[:, 0, 0, 0].tolist()
    assert sorted(shuffled) == [0, 1, 2, 3, 4, 5] != shuffled
    assert found["blind"][1](frames).unique().tolist() == [0.5]
    assert list(controls(records[:2], 0)) == ["one frame", "shuffled frames", "blind"], "of one clip there is no other"


def test_a_control_shows_other_frames_and_asks_the_same_questions(policy, records, monkeypatch):
    seen, encode = [], policy.encode
    monkeypatch.setattr(policy, "encode", lambda clip, image: seen.append(clip.frames) or encode(clip, image))
    own = answers(policy, records)
    shown, change = controls(records, 0)["blind"]
    rows = answers(policy, records, shown=shown, change=change)
    assert all((frames == 0.5).all() for frames in seen[-len(records):])
    assert [(row["record_id"], row["clip"]) for row in rows] == [(row["record_id"], row["clip"]) for row in own]


# --- files -----------------------------------------------------------------------------------------------------------


def test_lines_round_trip_and_a_cut_last_line_is_left_out(tmp_path):
    path = tmp_path / "x.jsonl"
    append_lines(path, [{"a": 1.5}, {"a": "é\n"}])
    assert list(read_lines(path)) == [{"a": 1.5}, {"a": "é\n"}] and list(read_lines(tmp_path / "none.jsonl")) == []
    path.write_text(path.read_text() + json.dumps({"a": 3})[:4])
    assert len(list(read_lines(path))) == 2
    path.write_text("{broken\n{}\n")
    with pytest.raises(RecordError, match="line 1"):
        list(read_lines(path))
    with pytest.raises(ValueError):
        append_lines(tmp_path / "nan.jsonl", [{"a": math.nan}])
    assert not (tmp_path / "nan.jsonl").exists()
