"""The shipped base model does what the benchmark needs: both ends of vanishing, hints read, the video looked at."""

import json

import pytest

from dvr1_lite.acceptance import Examiner, accuracy, as_table, examine, group_facts
from dvr1_lite.data import read_records
from dvr1_lite.paths import data_folder
from dvr1_lite.policy import Policy
from dvr1_lite.rewards import Score

FOLDER = "base_model"


@pytest.fixture(scope="module")
def recorded():
    return json.loads((data_folder() / FOLDER / "acceptance.json").read_text())


def test_recorded_figures_meet_the_acceptance(recorded):
    """Measured by `python -m dvr1_lite pretrain` on 200 prompts a type, groups of 8."""
    overall, types = recorded["overall"], recorded["types"]
    assert recorded["prompts_per_type"] == 200 and len(types) == 9
    assert overall["format"] >= 0.99
    assert 0.25 <= overall["sampled"] <= 0.55
    assert 0.40 <= overall["zero_spread"] <= 0.65
    assert overall["all_right"] >= 0.15 and overall["all_wrong"] >= 0.15
    assert min(f["sampled"] for f in types.values()) < 0.15 and max(f["sampled"] for f in types.values()) > 0.80
    assert overall["hint"]["1.0"] >= 0.85 and overall["trace_found"] >= 0.60
    noise = list(overall["noise"].values())
    assert all(b <= a + 0.02 for a, b in zip(noise, noise[1:])) and noise[-1] < noise[0] - 0.1
    assert overall["swapped_clip"] < overall["sampled"] - 0.15


def test_a_small_examination_agrees_with_the_recorded_one(recorded):
    """24 prompts a type; the bounds are about four standard errors wide."""
    policy = Policy.load(data_folder() / FOLDER)
    records = read_records(data_folder() / "toyvideoqa" / "train.jsonl")
    chosen = [[r for r in records if r.question_type == t][:24] for t in recorded["types"]]
    import torch
    examiner = Examiner(policy, 8, 28, torch.Generator().manual_seed(1))
    groups = [examiner.ask(rows, 8) for rows in chosen]
    sampled = sum(map(accuracy, groups)) / len(groups)
    assert abs(sampled - recorded["overall"]["sampled"]) < 0.10
    zero = sum(group_facts(g)["zero_spread"] for g in groups) / len(groups)
    assert abs(zero - recorded["overall"]["zero_spread"]) < 0.14
    swapped = sum(accuracy(examiner.ask(rows, 4, swap=True)) for rows in chosen) / len(chosen)
    assert swapped < sampled - 0.10


def test_the_model_is_small_enough():
    size = sum(p.stat().st_size for p in (data_folder() / FOLDER).iterdir())
    assert size <= 12e6
    assert sum(p.stat().st_size for p in data_folder().rglob("*") if p.is_file()) <= 40e6


def scores(*totals):
    return [Score(format=1.0, accuracy=t - 1.0, iou=None, total=t, maximum=2.0) for t in totals]


def test_group_facts_by_hand():
    groups = [scores(2, 2, 2), scores(1, 1, 1), scores(2, 1, 2), scores(1, 1, 2)]
    assert group_facts(groups) == {"zero_spread": 0.5, "all_right": 0.25, "all_wrong": 0.25}


def test_the_table_names_every_type(recorded):
    table = as_table(recorded)
    assert all(f"| {name} |" in table for name in recorded["types"])
    assert callable(examine)
