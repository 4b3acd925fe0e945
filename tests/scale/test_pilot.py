r"""The pilot: what it measures, which verdict follows, and the config that it writes."""

import json
import math
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from dvr1_lite import __main__ as cli
from dvr1_lite import own_reward
from dvr1_lite.config import CONFIGS, TrainConfig, load_config
from dvr1_lite.data import Record, read_records
from dvr1_lite.errors import ClipError, ConfigError
from dvr1_lite.own_reward import OwnReward, OwnScore
from dvr1_lite.rewards import Score
from dvr1_lite.scale import pilot as module
from dvr1_lite.scale.pilot import (RULES, compare, describe, duration, expected_vanishing, judge, pilot,
                                   recommendation, recommended, report, succeeded)
from dvr1_lite.training import Group
from tests.small_run import small_config, train_files, write_world

FINE = {"truncated": (0.0, 0.0, 0.2), "format": (1.0, 0.8, 1.0), "success": (0.4, 0.3, 0.6), "spread": (0.5, 0.3, 0.7),
        "unsolved": (0.1, -0.1, 0.3)}  # each measured, and the ends of its interval


BROKEN = "fix or leave out the broken clips first"
READ = {"prompts": 20, "broken": [], "max_broken_share": 0.05}


def verdicts(**changes: tuple[float, float, float]) -> list[str]:
    rules = judge(READ | {name: {"rate": rate, "ci95": ends} for name, (rate, *ends) in (FINE | changes).items()})
    return [rule.verdict for rule in rules]


def group(clip: str, accuracies: list[float], form: float = 1.0, options: tuple[str, ...] = ()) -> Group:
    r"""Make a group of completions of which each has one token more than the one before; the last is cut off."""
    scores = [Score(form, form * a, None, form + form * a, 2.0) for a in accuracies]
    record = Record(clip, "q", options, "red", "exact", "exact", None if clip == "none" else clip)
    finished = [True] * (len(scores) - 1) + [False]
    return Group(record, None, [[0] * (n + 1) for n in range(len(scores))], [f"{a}" for a in accuracies], scores,
                 finished)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


# --- figures by hand -------------------------------------------------------------------------------------------------


def test_rates_spread_and_lengths_by_hand():
    groups = [group("a", [1, 1, 1, 1], options=("1", "2")), group("b", [0, 0, 0, 0], options=("1", "2", "3", "4")),
              group("c", [1, 0, 0, 0]), group("d", [0, 0, 0, 0], 0.0)]
    found = describe(groups, 2)
    assert found["format"]["rate"] == 0.75 and found["success"]["rate"] == 5 / 16
    assert found["success"]["ci95"][0] == 0.0 and found["success"]["ci95"][1] > 0.9, "four clips tell little"
    assert [found[name]["rate"] for name in ("all_correct", "all_incorrect", "spread")] == [0.25, 0.5, 0.25]
    # unsolved: -1, 1, 0, 1, so mean 0.25 and s = 0.95743; t(3) = 3.18245: 0.25 +- 1.52, cut to what is possible
    assert found["unsolved"] == {"rate": 0.25, "ci95": [-1.0, 1.0]}
    assert found["guessing"] == {"rate": 0.375, "n": 2}, "the mean of 1/2 and 1/4"
    # pairs of equal outcomes: 1, 1, C(3,2)/C(4,2) = 1/2, 1
    assert found["vanishing_expected"] == pytest.approx(3.5 / 4)
    # one of four cut off in every group: 0.25 reaches 3.18245^2 / (4 + 3.18245^2) = 0.71686 of the way to each bound
    assert found["tokens"] == 2.5 and found["truncated"]["rate"] == 0.25
    assert found["truncated"]["ci95"] == pytest.approx([0.25 * (1 - 0.71686), 0.25 + 0.75 * 0.71686], abs=1e-4)
    assert found["examples"] == {"first": "1", "malformed": "0"}


def test_the_expected_vanishing_is_unbiased():
    random, p, size = np.random.default_rng(0), np.array([0.05, 0.3, 0.9]), 4
    truth = float(np.mean(p**size + (1 - p)**size))
    draws = random.binomial(8, p, size=(20_000, 3))
    estimates = [expected_vanishing([[2.0] * k + [1.0] * (8 - k) for k in row], size) for row in draws[:4000]]
    plugged = np.mean((draws / 8)**size + (1 - draws / 8)**size)
    assert np.mean(estimates) == pytest.approx(truth, abs=0.01) and abs(plugged - truth) > 0.02
    assert expected_vanishing([[2.0] * 8, [1.0] * 8, [2.0] * 3 + [1.0] * 5], 8) == pytest.approx(2 / 3)
    assert expected_vanishing([[1.0, 2.0]], 8) is None


def test_groups_of_graded_rewards_are_counted_by_whether_their_rewards_are_equal():
    graded = [[0.9, 0.8, 0.7, 0.6], [0.3, 0.3, 0.3, 0.1], [0.9] * 4, [0.2] * 4, [0.4] * 4]
    groups = [replace(group(name, tasks), scores=[OwnScore(1.0, 0.0, None, 1 + task, 2.0, task) for task in tasks])
              for name, tasks in zip("abcde", graded)]
    found = describe(groups, 2)
    # equal rewards in three of five, of which one succeeds; the first succeeds and the second fails, but unequally
    assert [found[name]["rate"] for name in ("spread", "all_correct", "all_incorrect")] == [0.4, 0.2, 0.4]
    assert found["unsolved"]["rate"] == pytest.approx(0.2) and found["success"]["rate"] == pytest.approx(0.4)
    # pairs with equal rewards: 0, C(3,2)/C(4,2) = 1/2, 1, 1, 1
    assert found["vanishing_expected"] == pytest.approx(3.5 / 5)
    assert describe(groups, 4)["vanishing_expected"] == pytest.approx(0.6), "as many as are equal"


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
    ({"truncated": 0.25, "format": 0.49}, "fix the prompt or format first", "fewer than 50 %"),
    ({"success": 0.04, "spread": 0.1}, "SFT first", "fewer than 5 %"),
    ({"success": 0.05, "spread": 0.1}, "use easier questions", "others fail than succeed"),
    ({"spread": 0.19, "unsolved": -0.3}, "use harder questions", "as many"),
    ({"spread": 0.19, "unsolved": 0.0}, "use harder questions", "as many"),
    ({"spread": 0.2, "unsolved": -0.8}, "train", "no other rule")])
def test_the_first_rule_that_applies_is_the_verdict(changes, verdict, reason):
    known = READ | {name: {"rate": changes.get(name, rate), "ci95": [changes.get(name, rate)] * 2}
                    for name, (rate, *_) in FINE.items()}
    [rule] = judge(known)
    assert rule.verdict == verdict and reason in rule.when and rule.advice
    assert {rule.verdict for rule in RULES} == {"train", "fix the prompt or format first", "SFT first",
                                                "use easier questions", "use harder questions", BROKEN}


def test_more_unreadable_clips_than_a_run_tolerates_are_to_be_fixed_before_anything_else():
    found = READ | {name: {"rate": 0.0, "ci95": [0.0, 1.0]} for name in FINE}
    verdict = lambda prompts, broken, share=0.05: [rule.verdict for rule in judge(
        found | {"prompts": prompts, "broken": ["x"] * broken, "max_broken_share": share})]
    assert verdict(18, 2) == [BROKEN] and verdict(19, 1)[0] != BROKEN, "10 % and 5 %"
    assert BROKEN not in verdict(18, 2, 0.1) and verdict(19, 1, 0.0) == [BROKEN]


def test_a_verdict_is_undecided_where_an_interval_holds_its_threshold():
    assert verdicts() == ["train"], "no interval holds a threshold that matters"
    assert verdicts(spread=(0.25, 0.15, 0.35)) == ["train", "use easier questions"]
    assert verdicts(spread=(0.1, 0.05, 0.15)) == ["use easier questions", "use harder questions"], "unsolved holds 0"
    assert verdicts(spread=(0.1, 0.05, 0.15), unsolved=(0.4, 0.2, 0.6)) == ["use easier questions"]
    assert verdicts(success=(0.0, 0.0, 0.08)) == ["SFT first", "train"]
    assert verdicts(truncated=(0.0, 0.0, 0.3)) == ["train", "fix the prompt or format first"]
    assert verdicts(format=(0.4, 0.2, 0.6)) == ["fix the prompt or format first", "train"]


def test_the_report_says_between_what_a_pilot_is_undecided_and_what_would_decide(world, tmp_path):
    config = small_config(world, tmp_path / "run", eval_files=[])
    found = pilot(config, read_records(config.train_file), prompts=4, completions=2)
    found |= {"possible": ["train", "SFT first", "use easier questions"]}
    found |= {"verdict": "train", "rule": "R", "advice": "A"}
    assert ("verdict: undecided between train, SFT first and use easier questions, as the intervals show: raise "
            "--prompts\nthe measured shares alone say: train, because R\nnext, if you cannot: A") in report(found)
    assert "as the intervals show: ask about more clips\n" in report(found | {"prompts": 5, "broken": ["one"]})
    assert report(found | {"possible": ["train"]}).endswith("verdict: train, because R\nnext: A")


def test_a_success_no_better_than_guessing_is_noted(world, tmp_path, monkeypatch):
    config = small_config(world, tmp_path / "run", eval_files=[])  # three options each
    records = read_records(config.train_file)
    noted = lambda records, **options: module.GUESSED in pilot(config, records, completions=2, **options)["notes"]
    found = pilot(config, records, completions=2)
    assert found["guessing"] == {"rate": pytest.approx(1 / 3), "n": 6} and module.GUESSED in found["notes"]
    # no success on three clips; t(2) = 4.3027, t^2 / (3 + t^2) = 0.861
    assert "0 % [0.0, 86.1]; guessing an option: 33 % (of 6 prompts with options)" in report(found)
    assert not noted([replace(records[0], options=()), *records[1:]]), "not all have options"
    assert not noted(records, scoring=OwnReward(lambda *_: 0.0, "f.py:f")), "a success means another thing"
    describe = module.describe
    monkeypatch.setattr(module, "describe", lambda *_: describe(*_) | {"success": {"rate": 0.9, "ci95": [0.34, 1.0]}})
    assert not noted(records), "above one third with all of the interval"


@pytest.mark.parametrize(("lows", "note"), [
    ({"another clip": 0.0, "blind": -0.1}, module.NO_VIDEO), ({"another clip": 0.1, "blind": 0.1}, None),
    ({"another clip": -0.1, "one frame": 0.1, "blind": 0.2}, module.DISAGREE.format("one frame and blind"))])
def test_controls_that_disagree_about_the_video_are_named(world, tmp_path, monkeypatch, lows, note):
    config, describe = small_config(world, tmp_path / "run", eval_files=[]), module.describe
    monkeypatch.setattr(module, "controls", lambda *_: {name: (None, None) for name in lows})
    monkeypatch.setattr(module, "compare", lambda *_, rest=iter(lows.values()): {"ci95": [next(rest), 0.5]})
    monkeypatch.setattr(module, "describe", lambda *_: describe(*_) | {"success": {"rate": 0.9, "ci95": [0.5, 1.0]}})
    assert pilot(config, read_records(config.train_file), completions=2)["notes"] == ([note] if note else [])


def test_a_pilot_of_mostly_unreadable_clips_still_judges(world, tmp_path):
    config = small_config(world, tmp_path / "run", eval_files=[])
    records = read_records(config.train_file)
    lost = [replace(records[0], record_id=f"lost{k}", clip=world / f"no{k}.mp4") for k in range(40)]
    assert pilot(config, [*lost, *records], prompts=46, completions=2)["verdict"] == BROKEN


def test_an_own_reward_is_timed_and_its_success_and_the_passes_over_the_data_are_printed(world, tmp_path, monkeypatch):
    monkeypatch.setattr(own_reward, "score", lambda record, text, judge: Score(1.0, 0.0, None, 1.0, 2.0))
    config = small_config(world, tmp_path / "run", steps=30, prompts_per_step=4, augment="none")
    called = []
    reward = OwnReward(lambda *_: called.append(time.sleep(0.005)) or 0.5, "f.py:half")
    found = pilot(config, read_records(config.train_file), completions=2, scoring=reward, questions=10)
    assert len(called) == 6 * (2 + 4 * 4) + 4 * 4, "each completion of the pilot and of the step once"
    assert 0.005 < found["reward_seconds"] < 0.05 and found["success"]["rate"] == 1.0
    least = 10 * 2 * (found["seconds"]["completions"] / 12 + 0.005) / 3600
    assert least < found["hours"]["evaluation"] < 10 * least
    text = report(found)
    assert re.search(r"your reward           at least 0.5 counts as a success; 0\.0\d+ s a completion", text)
    assert "the run               30 steps of 4 prompts, 20.0 passes over 6 records" in text  # 30 * 4 / 6


# --- a whole pilot ---------------------------------------------------------------------------------------------------


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
    assert found["verdict"] == BROKEN and json.loads(json.dumps(found)) == found
    text = report(found)
    for part in ("6 prompts, 4 completions each, of model on records.jsonl", "none.mp4: no such file", "well formed  ",
                 "unreadable clips      1 of 7; a run ends above max_broken_share = 5 %\n", "different rewards; in ",
                 "Eq. 01.3", "another clip", "one training step", "memory  ", "verdict: ", "next: "):
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
    assert cli.main(["pilot", "--promts", "3"]) == 2 and "did you mean prompts?" in capsys.readouterr().err


def test_a_trained_adapter_is_piloted_with_its_runs_config(world, tmp_path, capsys, monkeypatch):
    config = small_config(world, tmp_path / "run", eval_files=[], num_frames=6, group_size=3)
    train_files(config)
    loaded, load = [], module.load_policy
    monkeypatch.setattr(module, "load_policy", lambda config, adapter: loaded.append((config.num_frames, adapter))
                        or load(config, adapter))
    folder = str(tmp_path / "run" / "adapter")
    arguments = ["pilot", "--adapter", folder, "--prompts", "2", "--completions", "2"]
    assert cli.main([*arguments, "--out", str(tmp_path / "p")]) == 0
    assert loaded == [(6, folder)] and f"of model with the adapter {folder} on records.jsonl" in capsys.readouterr().out
    assert json.loads((tmp_path / "p" / "pilot.json").read_text())["group_size"] == 3
    assert cli.main([*arguments, "--write-config", "mine.yaml"]) == 2
    assert "training cannot start from an adapter: merge the adapter" in capsys.readouterr().err
    monkeypatch.setattr(module, "judge", lambda found: [RULES[-1]])
    assert "python -m dvr1_lite merge" in pilot(config, read_records(config.train_file), prompts=2, completions=2,
                                                adapter=folder)["advice"]


def test_the_default_pilot_takes_less_than_a_minute_of_one_core(capsys):
    started = time.process_time()
    assert cli.main(["pilot"]) == 0
    assert time.process_time() - started < 60
    assert "50 prompts, 8 completions each, of base_model on train.jsonl" in capsys.readouterr().out
