r"""The shipped base model: its groups vanish at both ends, it reads hints, and it looks at the video."""

import json

import pytest
import torch

from dvr1_lite.data import read_records
from dvr1_lite.files import data_folder
from dvr1_lite.policy import Policy
from dvr1_lite.rewards import Score
from dvr1_lite.toy.examination import Examiner, accuracy, as_table, examine, group_facts, judge, write

FOLDER = "base_model"
NOISE = "noise of 0.3 costs the easy types 20 to 50 points"
ENCODER = "encoder at least 95 % correct in every environment"
MISSED = {NOISE, ENCODER}


@pytest.fixture(scope="module")
def recorded():
    return json.loads((data_folder() / FOLDER / "acceptance.json").read_text())


@pytest.fixture(scope="module")
def policy():
    return Policy.load(data_folder() / FOLDER)


@pytest.fixture(scope="module")
def records():
    return read_records(data_folder() / "toyvideoqa" / "train.jsonl")


def test_recorded_figures_meet_the_acceptance(recorded):
    """Measured by `python -m dvr1_lite pretrain` on 200 prompts a type and a cell."""
    overall, types, cells = recorded["overall"], recorded["types"], recorded["cells"]
    assert recorded["prompts_per_type"] == 200 and len(types) == 11 and len(cells) == 27
    assert {cell["prompts"] for cell in cells.values()} == {200}
    assert overall["format"] >= 0.99 and 0.15 <= overall["sampled"] <= 0.55
    sampled = [facts["sampled"] for facts in types.values()]
    assert min(sampled) < 0.15 and max(sampled) > 0.80
    assert overall["swapped_clip"] < overall["sampled"] - 0.1
    verdicts = judge(recorded)
    missed = {text for text, holds in verdicts.items() if not holds}
    assert missed == MISSED, "ACCEPTANCE.md and the datasheet name what the world does not meet"


@pytest.mark.parametrize(("seed", "missing", "cells"), [(1, {NOISE}, set()), (2, {
    NOISE, ENCODER, "plain success of every cell within a factor 2 of its target",
    "an empty hint changes success by less than a fifth (F and A; in S it is meant to)",
    "blind, one frame or shuffled: at most a fifth of the success (F1 and A1)"}, {"cell"})])
def test_the_other_base_models_meet_what_the_protocol_says(seed, missing, cells):
    folder = data_folder() / "results" / f"base_seed{seed}"
    facts = json.loads((folder / "acceptance.json").read_text())
    assert {text for text, holds in judge(facts).items() if not holds} == missing
    assert {name.split("-")[0] for name, cell in facts["cells"].items() if not 0.5 <= cell["factor"] <= 2} == cells
    recipe = json.loads((folder / "recipe.json").read_text())
    shipped = json.loads((data_folder() / FOLDER / "recipe.json").read_text())
    assert recipe["recipe"] == shipped["recipe"] | {"seed": seed}
    assert len(recipe["losses"]["letters"]) == seed + 1  # cycles of the letter exercises; seed 0 needs one


def test_judging_by_hand():
    cell = {"factor": 1.9, "hint_error": 0.1, "empty_hint": 0.81, "controls": {"blind": 0.2}}
    facts = {"cells": {"tally-F1": cell}, "encoder": {"meadow": {"shape": 0.95}},
             "types": {"colour": {"noise": {"0.0": 0.9, "0.3": 0.6}}}}
    assert all(judge(facts).values()) and len(judge(facts)) == 6
    worse = {"cells": {"tally-F1": {"factor": 2.1, "hint_error": 0.11, "empty_hint": 1.21, "controls": {"blind": 0.21}}},
             "encoder": {"meadow": {"shape": 0.949}}, "types": {"colour": {"noise": {"0.0": 0.9, "0.3": 0.8}}}}
    assert not any(judge(worse).values())


def test_a_small_examination_agrees_with_the_recorded_one(recorded, policy, records):
    """24 prompts a type; the bounds are about four standard errors wide."""
    examiner = Examiner(policy, 8, 32, torch.Generator().manual_seed(1))
    chosen = [[record for record in records if record.question_type == name][:24] for name in recorded["types"]]
    groups = [examiner.ask(rows, 8) for rows in chosen]
    sampled = sum(map(accuracy, groups)) / len(groups)
    assert abs(sampled - recorded["overall"]["sampled"]) < 0.10
    zero_spread = sum(group_facts(group)["zero_spread"] for group in groups) / len(groups)
    assert abs(zero_spread - recorded["overall"]["zero_spread"]) < 0.14
    swapped = sum(accuracy(examiner.ask(rows, 4, swap=True)) for rows in chosen) / len(chosen)
    assert swapped < sampled - 0.10


def test_an_examination_has_the_keys_of_the_recorded_one(recorded, policy, records, tmp_path):
    shape = [record for record in records if record.question_type == "shape"]
    tally = [record for record in records if record.question_type == "tally"]
    found = examine(policy, shape[:4] + tally[:4], num_frames=8, max_new_tokens=32, prompts_per_type=2,
                    progress=False)
    write(found, tmp_path)
    written = json.loads((tmp_path / "acceptance.json").read_text())
    assert written["overall"].keys() == recorded["overall"].keys()
    assert written["types"]["tally"].keys() == recorded["types"]["tally"].keys()
    for key in ("noise", "hint"):
        assert written["overall"][key].keys() == recorded["overall"][key].keys()
    assert [facts["prompts"] for facts in written["types"].values()] == [2, 2]
    assert (tmp_path / "ACCEPTANCE.md").read_text().endswith(as_table(found))


def scores(*totals):
    return [Score(format=1.0, accuracy=total - 1.0, iou=None, total=total, maximum=2.0) for total in totals]


def test_group_facts_by_hand():
    groups = [scores(2, 2, 2), scores(1, 1, 1), scores(2, 1, 2), scores(1, 1, 2)]
    assert group_facts(groups) == {"zero_spread": 0.5, "all_right": 0.25, "all_wrong": 0.25}


def test_the_table_has_a_row_for_each_type(recorded):
    lines = as_table(recorded).splitlines()
    for name, facts in recorded["types"].items():
        row = next(line for line in lines if line.startswith(f"| {name} |"))
        assert f"{100 * facts['sampled']:.0f}" == row.split(" | ")[2]


def test_model_and_data_are_small_enough():
    assert sum(path.stat().st_size for path in (data_folder() / FOLDER).iterdir()) <= 12e6
    assert sum(path.stat().st_size for path in (data_folder() / "toyvideoqa").rglob("*") if path.is_file()) <= 30e6
    assert sum(path.stat().st_size for path in data_folder().rglob("*") if path.is_file()) <= 45e6  # with the records
