r"""The pilot: what it measures, which verdict follows, and the config that it writes."""

import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from dvr1_lite import __main__ as cli
from dvr1_lite.config import CONFIGS, TrainConfig, load_config
from dvr1_lite.data import Record, read_records
from dvr1_lite.errors import ClipError, ConfigError
from dvr1_lite.own_reward import OwnScore
from dvr1_lite.rewards import Score
from dvr1_lite.scale import pilot as module
from dvr1_lite.scale.pilot import (RULES, compare, describe, duration, expected_vanishing, judge, pilot,
                                   recommendation, recommended, report, succeeded)
from dvr1_lite.training import Group
from tests.small_run import small_config, write_world

FINE = {"truncated": 0.0, "format": {"rate": 1.0}, "success": {"rate": 0.4, "ci95": [0.3, 0.6]}, "spread": 0.5,
        "all_correct": 0.2, "all_incorrect": 0.3}


def group(clip: str, accuracies: list[float], form: float = 1.0) -> Group:
    r"""Make a group of completions of which each has one token more than the one before; the last is cut off."""
    scores = [Score(form, form * a, None, form + form * a, 2.0) for a in accuracies]
    record = Record(clip, "q", (), "red", "exact", "exact", None if clip == "none" else clip)
    finished = [True] * (len(scores) - 1) + [False]
    return Group(record, None, [[0] * (n + 1) for n in range(len(scores))], [f"{a}" for a in accuracies], scores,
                 finished)


# --- figures by hand -------------------------------------------------------------------------------------------------


def test_rates_spread_and_lengths_by_hand():
    groups = [group("a", [1, 1, 1, 1]), group("b", [0, 0, 0, 0]), group("c", [1, 0, 0, 0]),
              group("d", [0, 0, 0, 0], 0.0)]
    found = describe(groups, 2)
    assert found["format"]["rate"] == 0.75 and found["success"]["rate"] == 5 / 16
    assert found["success"]["ci95"][0] == 0.0 and found["success"]["ci95"][1] > 0.9, "four clips tell little"
    assert (found["all_correct"], found["all_incorrect"], found["spread"]) == (0.25, 0.5, 0.25)
    # pairs of equal outcomes: 1, 1, C(3,2)/C(4,2) = 1/2, 1
    assert found["vanishing_expected"] == pytest.approx(3.5 / 4)
    assert found["vanishing_if_equal"] == pytest.approx((5 / 16) ** 2 + (11 / 16) ** 2)
    assert (found["tokens"], found["truncated"]) == (2.5, 0.25)
    assert found["examples"] == {"first": "1", "malformed": "0"}


def test_the_expected_vanishing_is_unbiased():
    random, p, size = np.random.default_rng(0), np.array([0.05, 0.3, 0.9]), 4
    truth = float(np.mean(p**size + (1 - p)**size))
    draws = random.binomial(8, p, size=(20_000, 3))
    estimates = [expected_vanishing(row.tolist(), 8, size) for row in draws[:4000]]
    plugged = np.mean((draws / 8)**size + (1 - draws / 8)**size)
    assert np.mean(estimates) == pytest.approx(truth, abs=0.01) and abs(plugged - truth) > 0.02
    assert expected_vanishing([8, 0, 3], 8, 8) == pytest.approx(2 / 3) and expected_vanishing([1], 2, 8) is None


def test_a_success_is_well_formed_and_at_least_half_of_the_task():
    assert succeeded(Score(1.0, 0.5, None, 1.5, 2.0)) and not succeeded(Score(1.0, 0.49, None, 1.49, 2.0))
    assert not succeeded(Score(0.0, 0.0, None, 0.0, 2.0))
    assert succeeded(OwnScore(1.0, 0.0, None, 1.6, 2.0, 0.6)) and not succeeded(OwnScore(1.0, 1.0, None, 1.4, 2.0, 0.4))


def test_the_own_clip_is_compared_prompt_by_prompt():
    own = [group(name, [1, 1, 0, 0]) for name in "abcde"]
    changed = [group(name, [1, 0]) if name < "c" else group(name, [0, 0]) for name in "abcde"]
    found = compare(own, changed)  # differences 0, 0, .5, .5, .5: mean 0.3, s = 0.27386, t(4) = 2.77645
    assert (found["success"], found["difference"], found["n"]) == (pytest.approx(0.2), pytest.approx(0.3), 5)
    reach = 2.77645 * 0.27386 / math.sqrt(5)
    assert found["ci95"] == [pytest.approx(0.3 - reach, abs=1e-4), pytest.approx(0.3 + reach, abs=1e-4)]


# --- the verdict -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "verdict", "reason"), [
    ({}, "train", "at least 20 % of the groups"),
    ({"truncated": 0.26}, "fix the prompt or format first", "reach max_new_tokens"),
    ({"truncated": 0.25, "format": {"rate": 0.49}}, "fix the prompt or format first", "fewer than 50 %"),
    ({"success": {"rate": 0.01, "ci95": [0.0, 0.04]}, "spread": 0.1}, "SFT first", "below 5 %"),
    ({"success": {"rate": 0.0, "ci95": [0.0, 0.08]}, "spread": 0.0}, "SFT first", "nothing succeeds"),
    ({"success": {"rate": 0.03, "ci95": [0.0, 0.06]}, "spread": 0.1}, "use easier questions", "all incorrect than all correct"),
    ({"spread": 0.19, "all_correct": 0.6}, "use harder questions", "as many"),
    ({"spread": 0.2, "all_correct": 0.8, "all_incorrect": 0.0}, "train", "no other rule")])
def test_the_first_rule_that_applies_is_the_verdict(changes, verdict, reason):
    rule = judge(FINE | changes)
    assert rule.verdict == verdict and reason in rule.when and rule.advice
    assert {rule.verdict for rule in RULES} == {"train", "fix the prompt or format first", "SFT first",
                                                "use easier questions", "use harder questions"}


# --- a whole pilot ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def test_a_pilot_measures_everything_and_its_report_says_so(world, tmp_path, monkeypatch):
    seen, encode = [], module.encode_record
    monkeypatch.setattr(module, "encode_record", lambda policy, record, config, change: seen.append(
        (record.clip.name, change is not None)) or encode(policy, record, config, change))
    config = small_config(world, tmp_path / "run", eval_before=True)
    records = read_records(config.train_file)
    records.append(replace(records[0], record_id="lost", clip=world / "none.mp4"))
    found = pilot(config, records, prompts=50, completions=4, questions=30)
    assert (found["prompts"], found["completions"], len(found["broken"])) == (6, 4, 1)
    assert list(found["video"]) == ["another clip", "one frame", "shuffled frames", "blind"]
    own = [name for name, _ in seen[:7] if name != "none.mp4"]
    following = {"0.mp4": "1.mp4", "1.mp4": "2.mp4", "2.mp4": "0.mp4"}
    assert seen[7:13] == [(following[name], False) for name in own], "another clip"
    assert seen[13:] == [(name, True) for name in own * 3], "one frame, another order, and grey"
    assert set(found["seconds"]) >= {"clips", "completions", *found["video"]}
    total = found["step"]["seconds"]["total"]
    assert found["hours"]["steps"] == pytest.approx(3 * total / 3600) and total > 0
    assert found["hours"]["evaluation"] == pytest.approx(30 * 2 * found["seconds"]["completions"] / 24 / 3600)
    assert found["memory_gb"]["measured"] > 0.1 and 0 < found["memory_gb"]["predicted"] < 1
    assert found["verdict"] in {rule.verdict for rule in RULES} and json.loads(json.dumps(found)) == found
    text = report(found)
    for part in ("6 prompts, 4 completions each, of model on records.jsonl", "none.mp4: no such file", "well formed  ",
                 "all incorrect;", "Eq. 01.3", "another clip", "one training step", "memory  ", "verdict: ", "next: "):
        assert part in text, part
    assert not (tmp_path / "run").exists(), "a pilot writes nothing"


def test_what_augmentation_costs_is_in_the_measured_step(world, tmp_path):
    config = small_config(world, tmp_path / "run", eval_files=[], history_window=100, dead_zone=0.0)
    made = module.Trainer(config, read_records(config.train_file), module.load_policy(config))
    groups, _ = module.ask(made, "completions", made.records, 4)
    groups = [replace(one, scores=[Score(1.0, 1.0, None, 2.0, 2.0)] * 4) for one in groups]  # the history is high
    found = module.measure_step(made, groups, questions=0)
    assert len(made.history) == 100 and found["hours"]["evaluation"] == 0.0
    assert "sample_traces" in found["step"]["seconds"], "random completions are hard: hints were sought"


def test_mistakes_are_named(world, tmp_path):
    config = small_config(world, tmp_path / "run")
    with pytest.raises(ConfigError, match="a pilot of 0 prompts with 8 completions: give at least 1 and 2"):
        pilot(config, read_records(config.train_file), prompts=0)
    lost = [replace(record, clip=world / "none.mp4") for record in read_records(config.train_file)[:1]]
    with pytest.raises(ClipError, match="no clip of 1 record can be read. The first error: .*none.mp4"):
        pilot(config, lost)


def test_durations_are_readable():
    assert [duration(seconds / 3600) for seconds in (40, 100, 5000, 9000)] == ["40 s", "2 min", "83 min", "2.5 h"]


# --- the recommendation and the command ------------------------------------------------------------------------------


def test_the_recommendation_is_complete_and_every_field_is_a_config_field():
    entries = yaml.safe_load((CONFIGS / "recommendation.yaml").read_text(encoding="utf-8"))
    assert {"method", "augment", "hint_update", "learning_rate", "beta", "inner_updates", "group_size"} <= set(entries)
    for name, entry in entries.items():
        assert hasattr(TrainConfig(), name) and entry["reason"], name
        assert entry["status"] in ("measured", "provisional", "published"), name
    small, large = recommendation(), recommendation(large=True)
    assert small["learning_rate"]["value"] == entries["learning_rate"]["value"]
    assert large["learning_rate"]["value"] == entries["learning_rate"]["large"] < small["learning_rate"]["value"]
    config, advice = recommended(load_config("video_r1_qwen2_5_vl_3b"))
    assert config.learning_rate == large["learning_rate"]["value"] and advice == large


def test_the_readme_shows_the_recommendation():
    entries = yaml.safe_load((CONFIGS / "recommendation.yaml").read_text(encoding="utf-8"))
    cells = [f"{entry['value']}" + (f" ({entry['large']})" if "large" in entry else "") for entry in entries.values()]
    readme = (CONFIGS.parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"| {' | '.join(entries)} |\n" in readme and f"| {' | '.join(cells)} |\n" in readme


def test_the_command_writes_a_config_that_follows_the_recommendation(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"video": f"{number}.mp4", "question": "what colour", "answer": "A", "options": ["red", "green"]}
            for number in range(3)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["pilot", "--model", str(world / "model"), "--data", "own.jsonl", "--data-root", str(world),
                 "--prompts", "3", "--completions", "2", "--quantization", "none", "--num-frames", "4",
                 "--max-new-tokens", "5", "--prompts-per-step", "2", "--write-config", "mine.yaml", "--out", "p"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "verdict: " in printed and printed.endswith("config: python -m dvr1_lite train --config mine.yaml\n")
    config = load_config("mine.yaml")
    for name, entry in recommendation().items():
        assert getattr(config, name) == entry["value"] and f"# {name}: {entry['value']} (" in open("mine.yaml").read()
    assert (config.train_file, config.data_root, config.out) == ("own.jsonl", str(world), "runs/mine")
    assert config.eval_files == []
    assert json.loads((tmp_path / "p" / "pilot.json").read_text())["group_size"] == config.group_size
    assert cli.main(arguments) == 2 and "mine.yaml exists: give another name" in capsys.readouterr().err
    nowhere = [str(tmp_path / "no" / "mine.yaml") if one.endswith("mine.yaml") else one for one in arguments]
    assert cli.main(nowhere) == 2 and "make its folder first" in capsys.readouterr().err
    assert cli.main(["pilot", "--resume", "x"]) == 2 and "leave --resume to train" in capsys.readouterr().err
    assert cli.main(["pilot", "--promts", "3"]) == 2 and "promts" in capsys.readouterr().err


def test_the_default_pilot_takes_less_than_a_minute_of_one_core(capsys):
    started = time.process_time()
    assert cli.main(["pilot"]) == 0
    assert time.process_time() - started < 60
    assert "50 prompts, 8 completions each, of base_model on train.jsonl" in capsys.readouterr().out
