r"""The configuration, the loop, and runs that are killed, interrupted, fed broken clips or full disks."""

import errno
import json
import os
import pickle
import re
import signal
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small_run import coin_score, reward_by_coin, small_config, write_world

from dvr1_lite import checkpoints, training
from dvr1_lite.checkpoints import checkpoint_folders, load_newest, read_checkpoint, save_checkpoint
from dvr1_lite.config import TrainConfig, load_config, make_config, read_yaml, to_yaml
from dvr1_lite.errors import ClipError, ConfigError, ModelError, NumericsError, RecordError, UserError
from dvr1_lite.files import read_lines
from dvr1_lite.objectives import METHODS
from dvr1_lite.policy import Completions, Policy
from dvr1_lite.rewards import Score
from dvr1_lite.training import Groups, Order, Trainer, comparable, limited, stop_request, train

LITE = Path(training.__file__).parent / "configs" / "lite.yaml"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def lines_of(out) -> list[dict]:
    return [comparable(line) for line in read_lines(Path(out) / "metrics.jsonl")]


def adapter_of(out) -> bytes:
    return (Path(out) / "adapter" / "adapter_model.safetensors").read_bytes()


# --- the configuration -----------------------------------------------------------------------------------------------


def test_lite_yaml_has_the_defaults_and_every_help_text():
    assert load_config(LITE) == TrainConfig()
    assert LITE.read_text(encoding="utf-8") == to_yaml(TrainConfig())


def test_every_field_says_its_unit_and_the_papers_value():
    for field in fields(TrainConfig):
        assert re.search(r"\. \[.+; paper: .+\]$", field.metadata["help"]), field.name


def test_the_papers_settings_that_are_known():
    config = TrainConfig()
    assert (config.method, config.group_size, config.history_window, config.beta) == ("reg-grpo", 8, 100, 0.1)
    assert config.clip_eps is None and config.augment == "both" and config.augment_scale == "adaptive"


@pytest.mark.parametrize(("changes", "told"), [
    ({"group_size": 1, "method": "grpo"}, "group_size is 1"),
    ({"group_size": 2}, "group_size is 2"),
    ({"history_window": 0}, "history window is 0"),
    ({"predicted_eps": -0.1}, "predicted_eps"),
    ({"advantage_eps": -1e-4}, "advantage_eps"),
    ({"clip_eps": -0.2}, "clip_eps"),
    ({"beta": -0.1}, "beta"),
    ({"learning_rate": -1e-3}, "learning_rate is -0.001"),
    ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ({"temperature": 0}, "temperature"),
    ({"steps": 0}, "steps is 0"),
    ({"steps": 1.5}, "steps is 1.5: give a whole number"),
    ({"steps": True}, "steps is True"),
    ({"figures": "maybe"}, "figures is 'maybe'"),
    ({"method": "ppo"}, "method is 'ppo': choose one of grpo, reg-grpo"),
    ({"augment": "all"}, "augment is 'all'"),
    ({"hint_max": 2.0}, "hint_max"),
    ({"dead_zone": 1.0}, "dead_zone"),
    ({"absolute_reward": 2.0, "difficulty_reference": "absolute"}, "reference is 2.0"),
    ({"max_broken_share": 1.0}, "max_broken_share"),
    ({"eval_files": ["L1.jsonl"]}, "NAME=FILE"),
    ({"eval_files": ["a=x", "a=y"]}, "names of their own"),
    ({"eval_files": "a=x"}, "a list of texts"),
])
def test_impossible_values(changes, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        make_config(changes)


@pytest.mark.parametrize(("name", "near"), [("lr", "learning_rate"), ("group_sizes", "group_size"),
                                            ("learn_rate", "learning_rate"), ("xyzzy", "train --help")])
def test_unknown_keys_name_near_ones(name, near):
    with pytest.raises(ConfigError, match=f"unknown config key '{name}'.*{near}"):
        make_config({name: 1})


def test_yaml_reads_what_people_write(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 1e-4\nbeta: 1\nclip_eps: none\nmicro_batch: null\n"
                                     "eval_files:\n  val: data/x.jsonl\n")
    config = load_config(tmp_path / "a.yaml", {"beta": 0.5, "steps": 7})
    assert config.learning_rate == 1e-4 and config.beta == 0.5 and config.steps == 7
    assert config.clip_eps is None and config.eval_paths() == {"val": "data/x.jsonl"}
    (tmp_path / "b.yaml").write_text("eval_files:\n")
    assert load_config(tmp_path / "b.yaml").eval_paths() == {}


def test_a_config_survives_its_file(tmp_path):
    config = make_config({"steps": 3, "instruction": "Think: # 'first'", "eval_files": ["a=b=c"], "rollout_budget": 9})
    (tmp_path / "c.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(("text", "told"), [("- a\n", "holds a list"), ("a: [", "not valid YAML"), ("", "NoneType"),
                                            ("!!python/object/apply:os.getcwd []", "not valid YAML")])
def test_bad_yaml(tmp_path, text, told):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        load_config(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")


def test_an_unknown_key_in_a_file_names_the_file(tmp_path):
    (tmp_path / "d.yaml").write_text("stepz: 3\n")
    with pytest.raises(ConfigError, match="d.yaml: unknown config key 'stepz': did you mean steps"):
        load_config(tmp_path / "d.yaml")


# --- parts of the loop -----------------------------------------------------------------------------------------------


def test_each_epoch_is_a_shuffle_of_its_own():
    order = Order(5, seed=3)
    epochs = [[order[5 * e + i] for i in range(5)] for e in range(4)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    assert [Order(5, 3)[p] for p in (17, 2, 9)] == [order[p] for p in (17, 2, 9)]
    assert [Order(50, 3)[p] for p in range(50)] != [Order(50, 4)[p] for p in range(50)]


def test_a_part_of_an_evaluation_is_the_same_in_every_run():
    assert limited(list("abcdefgh"), 3) == limited(list("abcdefgh"), 3)
    assert limited(list("abc"), 0) == limited(list("abc"), 9) == list("abc")
    part = limited(list("abcdefgh"), 3)
    assert part == sorted(part) and len(part) == 3


def groups(ids, scores=(), prompts=("p", "q")):
    ids = torch.tensor(ids)
    return Groups(["r", "s"][:len(ids)], list(prompts), Completions(ids, ids > 0), [["t"]] * len(ids), list(scores),
                  torch.zeros(ids.shape[:2], dtype=torch.bool))


def test_augmented_groups_take_their_places_whatever_their_length():
    old = groups([[[1, 2], [3, 0]], [[4, 5], [6, 0]]], scores=["a", "b"])
    new = groups([[[7, 8, 9], [7, 0, 0]]], scores=["c"], prompts=["hinted"])
    mixed = old.replaced([1], new)
    assert mixed.completions.ids.tolist() == [[[1, 2, 0], [3, 0, 0]], [[7, 8, 9], [7, 0, 0]]]
    assert mixed.completions.mask.tolist() == [[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [1, 0, 0]]]
    assert mixed.prompts == ["p", "hinted"] and mixed.scores == ["a", "c"] and mixed.records == ["r", "s"]
    assert old.prompts == ["p", "q"] and old.completions.ids.shape == (2, 2, 2)
    longer = new.replaced([0], groups([[[1], [2]]], scores=["d"], prompts=["short"]))
    assert longer.completions.mask.tolist() == [[[1, 0, 0], [1, 0, 0]]]


def test_half_of_a_group_at_most_gives_way_to_successes():
    right, wrong = Score(1.0, 1.0, None, 2.0, 2.0), Score(1.0, 0.0, None, 1.0, 2.0)
    own = groups([[[1, 0], [2, 0], [3, 0], [4, 5]]], scores=[[right, wrong, wrong, wrong]], prompts=["plain"])
    hinted = groups([[[6, 6, 6], [7, 7, 7], [8, 0, 0], [9, 0, 0]]], scores=[[wrong, right, right, right]],
                    prompts=["with a hint"])
    own, hinted = replace(own, texts=[list("abcd")]), replace(hinted, texts=[list("efgh")])
    mixed = own.with_successes(hinted)
    assert mixed.completions.ids.tolist() == [[[1, 0, 0], [7, 7, 7], [8, 0, 0], [4, 5, 0]]]
    assert mixed.completions.mask.tolist() == [[[1, 0, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]]
    assert mixed.texts == [["a", "f", "g", "d"]] and mixed.prompts == ["plain"]
    assert [score.right for score in mixed.scores[0]] == [True, True, True, False]
    assert own.texts == [list("abcd")] and hinted.texts == [list("efgh")] and own.scores[0][1] is wrong
    nothing = own.with_successes(replace(hinted, scores=[[wrong] * 4]))
    assert nothing.completions.ids.tolist() == [[[1, 0, 0], [2, 0, 0], [3, 0, 0], [4, 5, 0]]]


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    r"""One uninterrupted run with mixed rewards, to compare others with; its folder and summary."""
    patch = pytest.MonkeyPatch()
    reward_by_coin(patch)
    out = tmp_path_factory.mktemp("runs") / "whole"
    summary = train(small_config(world, out, figures=True), progress=False)
    yield out, summary
    patch.undo()


@pytest.fixture
def coin(monkeypatch):
    reward_by_coin(monkeypatch)
    return monkeypatch


def test_a_run_leaves_everything_it_promises(finished, world):
    out, summary = finished
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "adapter/adapter_config.json",
                 "adapter/adapter_model.safetensors", "evaluation/before_L1.jsonl", "evaluation/after_L1.jsonl",
                 "figures/reward.png", "figures/vanishing.png", "figures/accuracy.png", "figures/samples.png"):
        assert (out / name).stat().st_size > 0, name
    assert json.loads((out / "summary.json").read_text()) == summary
    assert load_config(out / "config.yaml").out == str(out)
    assert summary["complete"] and summary["step"] == 3 and summary["updates"] == 6
    for when in ("before", "after"):
        cell = summary[when]["L1"]
        assert cell["n"] == 6 and cell["ci95"][0] <= cell["accuracy"] <= cell["ci95"][1]
        assert set(cell["by_type"]) == {"colour", "order"}
    assert summary["change"]["L1"]["clips"] == 3 and {"torch", "python"} <= summary["versions"].keys()
    assert 0.05 < summary["peak_memory_gb"] < 8 and summary["seconds"]["total"] > 0


def test_a_line_of_the_metrics_for_every_step(finished):
    lines = list(read_lines(finished[0] / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert 0 <= line["vanishing"] <= 1 and line["format_rate"] == 1.0 and line["kl"] >= 0
        assert line["vanishing"] == pytest.approx(line["vanishing_all_right"] + line["vanishing_all_wrong"])
        assert line["reward"] == pytest.approx(1 + line["accuracy"]) == pytest.approx(2 * line["reward_normalised"])
        assert line["hints_found"] + line["hints_missing"] == line["hard"]
        assert line["augmented"] == line["hints_found"] + line["easy"]
        assert {"loss", "grad_norm", "completion_tokens", "reward_after"} <= line.keys()
        assert {"encode", "sample", "reference", "update", "total"} <= line["seconds"].keys()
        assert line["machine"]["feature_cache_bytes"] > 0
    assert lines[0]["hard"] == lines[0]["easy"] == 0  # the history is empty
    assert sum(line["augmented"] for line in lines) > 0 and lines[-1]["grad_norm"] > 0


def test_rollouts_count_originals_traces_and_augmented_groups(finished):
    before = 0
    for line in read_lines(finished[0] / "metrics.jsonl"):
        assert line["rollouts"] - before == 2 * 4 + line["hard"] * 2 + line["augmented"] * 4
        before = line["rollouts"]
    assert finished[1]["rollouts"] == before


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished, world, tmp_path, coin):
    train(small_config(world, tmp_path / "again", figures=False), progress=False)
    assert lines_of(tmp_path / "again") == lines_of(finished[0])
    assert adapter_of(tmp_path / "again") == adapter_of(finished[0])
    train(small_config(world, tmp_path / "other", seed=1, eval_files=[]), progress=False)
    assert lines_of(tmp_path / "other") != lines_of(finished[0])


def test_global_random_states_do_not_matter(finished, world, tmp_path, coin):
    torch.manual_seed(123)
    np.random.seed(5)
    train(small_config(world, tmp_path / "run", eval_files=[], steps=1), progress=False)
    assert lines_of(tmp_path / "run") == lines_of(finished[0])[:1]


def test_the_adapter_loads_again_and_has_learned(finished, world):
    policy = Policy.load(world / "model", quantization="nf4", adapter=finished[0] / "adapter")
    assert any("lora_B" in name and p.abs().sum() > 0 for name, p in policy.model.named_parameters())
    card = (finished[0] / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "reg-grpo" in card and "3 of 3 steps" in card and "config.yaml" in card


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method, world, tmp_path, coin):
    config = small_config(world, tmp_path / "run", method=method, steps=1, eval_files=[], quantization="none",
                          augment="none")
    seen = []
    sample = training.sample_groups
    coin.setattr(training, "sample_groups", lambda *a, **k: seen.append(k["reference"]) or sample(*a, **k))
    summary = train(config, progress=False)
    line = lines_of(tmp_path / "run")[0]
    assert summary["updates"] == 2 and line["grad_norm"] > 0 and line["kl"] > 0
    assert seen == [method == "dpo"]
    assert summary["before"] == summary["after"] == summary["change"] == {}


def test_old_log_probs_are_those_of_the_first_pass(world, tmp_path, coin):
    config = small_config(world, tmp_path / "run", steps=1, eval_files=[], inner_updates=3)
    seen, regress = [], METHODS["reg-grpo"]

    def spy(logp, old, ref, *rest):
        seen.append(((logp - old).abs().max().item(), (logp - ref).abs().max().item()))
        return regress(logp, old, ref, *rest)

    coin.setitem(METHODS, "reg-grpo", spy)
    train(config, progress=False)
    assert seen[0] == (0.0, pytest.approx(0.0, abs=1e-5))  # policy, old and reference agree at the start
    assert 0 < seen[1][0] != seen[2][0]


@pytest.mark.parametrize("augment", ["hard", "easy", "none", "resample"])
def test_directions_of_the_augmentation_and_the_control(augment, world, tmp_path, coin):
    config = small_config(world, tmp_path / "run", augment=augment, eval_files=[], easy_kind="mask", steps=6)
    train(config, progress=False)
    lines = lines_of(tmp_path / "run")
    total = {name: sum(line[name] for line in lines) for name in ("hard", "easy", "hints_found", "augmented")}
    assert (total["hard"] > 0) == (augment in ("hard", "resample"))
    assert (total["easy"] > 0) == (augment in ("easy", "resample"))
    if augment == "resample":
        assert total["hints_found"] == 0 and total["augmented"] == total["hard"] + total["easy"]
        assert lines[-1]["rollouts"] == 6 * 2 * 4 + total["augmented"] * 4


@pytest.mark.parametrize("where", ["hinted", "unhinted", "mixed"])
def test_the_prompt_that_the_update_of_a_hinted_group_stands_on(where, world, tmp_path, coin):
    config = small_config(world, tmp_path / "run", augment="hard", hint_update=where, eval_files=[], steps=6)
    seen, update = [], Trainer._update
    coin.setattr(Trainer, "_update", lambda self, groups: seen.append(groups) or update(self, groups))
    train(config, progress=False)
    lines = lines_of(tmp_path / "run")
    assert sum(line["hints_found"] for line in lines) > 0
    hinted = sum("Hint:" in prompt.text for groups in seen for prompt in groups.prompts)
    assert hinted == (sum(line["hints_found"] for line in lines) if where == "hinted" else 0)
    for groups in seen:
        told = [[coin_score(record, text) for text in texts] for record, texts in zip(groups.records, groups.texts)]
        assert told == groups.scores
        assert groups.completions.mask.any(-1).all()


def test_a_probed_hint_counts_what_it_samples(world, tmp_path, coin):
    config = small_config(world, tmp_path / "run", augment="hard", hint_probe=True, eval_files=[], steps=6)
    probes, sample = [], Trainer._sample
    coin.setattr(Trainer, "_sample", lambda self, records, prompts, size, phase:
                 probes.append((phase, len(prompts) * size)) or sample(self, records, prompts, size, phase))
    train(config, progress=False)
    found = sum(line["hints_found"] for line in lines_of(tmp_path / "run"))
    tried = [count for phase, count in probes if phase == "sample_probes"]
    assert 2 * found <= sum(tried) <= 3 * 2 * found and all(count % 2 == 0 for count in tried)
    assert len(tried) <= 3 * 6  # at most three passes a step, however many prompts
    assert lines_of(tmp_path / "run")[-1]["rollouts"] == sum(count for _, count in probes)


def test_a_budget_of_rollouts_ends_the_run(world, tmp_path, coin):
    config = small_config(world, tmp_path / "run", rollout_budget=9, augment="none", steps=50, eval_files=[])
    summary = train(config, progress=False)
    assert summary["complete"] and summary["step"] == 2 and summary["rollouts"] == 16


def test_learning_rate_warms_up(world, tmp_path, coin):
    rates, set_rate = [], Trainer._set_learning_rate
    coin.setattr(Trainer, "_set_learning_rate",
                 lambda self: set_rate(self) or rates.append(self.optimizer.param_groups[0]["lr"]))
    train(small_config(world, tmp_path / "run", warmup_steps=2, learning_rate=0.1, eval_files=[]), progress=False)
    assert rates == pytest.approx([0.05, 0.1, 0.1])


def test_tensorboard_files_are_written(world, tmp_path, coin):
    pytest.importorskip("tensorboard")
    train(small_config(world, tmp_path / "run", tracker="tensorboard", steps=1, eval_files=[]), progress=False)
    assert list((tmp_path / "run" / "tensorboard").rglob("events*"))


# --- going on --------------------------------------------------------------------------------------------------------


def crash(monkeypatch, method: str, step: int, error: BaseException) -> None:
    r"""Lets a method of the trainer fail when `step` steps are done."""
    original = getattr(Trainer, method)

    def fail(self, *args):
        if self.step == step:
            raise error
        return original(self, *args)

    monkeypatch.setattr(Trainer, method, fail)


@pytest.mark.parametrize(("method", "step"), [("_sample_batch", 0), ("_sample_batch", 1), ("_update", 2), ("save", 2),
                                              ("_inner_update", 1), ("_export_adapter", 3)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(method, step, finished, world, tmp_path, coin):
    config = small_config(world, tmp_path / "run")
    with coin.context() as patch, pytest.raises(OSError, match="killed"):
        crash(patch, method, step, OSError("killed"))
        train(config, progress=False)
    summary = train(config, progress=False, resume=True)
    assert summary["complete"] and lines_of(tmp_path / "run") == lines_of(finished[0])
    assert adapter_of(tmp_path / "run") == adapter_of(finished[0])
    for when in ("before", "after", "change"):
        assert summary[when] == finished[1][when]


def test_a_run_killed_before_its_first_checkpoint_begins_again(finished, world, tmp_path, coin):
    config = small_config(world, tmp_path / "run", save_every=50, eval_files=[])
    with coin.context() as patch, pytest.raises(OSError):
        crash(patch, "_update", 2, OSError("killed"))
        train(config, progress=False)
    assert len(lines_of(tmp_path / "run")) == 2
    train(config, progress=False, resume=True)
    assert lines_of(tmp_path / "run") == lines_of(finished[0])


def test_the_evaluation_before_is_not_repeated(finished, world, tmp_path, coin):
    config = small_config(world, tmp_path / "run")
    with coin.context() as patch, pytest.raises(OSError):
        crash(patch, "_update", 1, OSError("killed"))
        train(config, progress=False)
    written = (tmp_path / "run" / "evaluation" / "before_L1.jsonl").read_text()
    coin.setattr("dvr1_lite.evaluation.sample_groups", lambda *_, **__: pytest.fail("asked again"))
    coin.setattr(Trainer, "run", lambda self, progress: True)
    train(config, progress=False, resume=True)
    assert (tmp_path / "run" / "evaluation" / "before_L1.jsonl").read_text() == written


def test_a_folder_with_a_run_is_refused_and_a_finished_run_is_not_repeated(finished, world, monkeypatch):
    out, summary = finished
    config = small_config(world, out, figures=True)
    with pytest.raises(ConfigError, match=r"already holds a run .* --resume .* another --out"):
        train(config, progress=False)
    monkeypatch.setattr(training, "Trainer", None)
    assert train(config, progress=False, resume=True) == summary


def test_a_run_is_not_resumed_with_another_config(finished, world):
    with pytest.raises(ConfigError, match="beta was 0.1, now 0.5"):
        train(small_config(world, finished[0], figures=True, beta=0.5), progress=False, resume=True)


def test_a_failed_start_does_not_take_the_folder(world, tmp_path):
    with pytest.raises(RecordError):
        train(small_config(world, tmp_path / "run", train_file=str(tmp_path / "none.jsonl")), progress=False)
    with pytest.raises(ModelError):
        train(small_config(world, tmp_path / "run", model=str(tmp_path)), progress=False)
    with pytest.raises(ConfigError, match="multiple such as 56"):
        train(small_config(world, tmp_path / "run", frame_size=60), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_to(world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train(small_config(world, tmp_path / "file" / "run", eval_files=[]), progress=False)


# --- the shipped model on the shipped data ---------------------------------------------------------------------------


def test_the_shipped_model_trains_with_hints_and_noise_and_resumes_exactly(tmp_path, monkeypatch):
    config = make_config({"steps": 3, "history_window": 8, "eval_limit": 24, "save_every": 1, "figures": False,
                          "inner_updates": 2, "out": str(tmp_path / "whole")})
    summary = train(config, progress=False)
    lines = lines_of(tmp_path / "whole")
    assert all(line["format_rate"] > 0.9 and 0 < line["accuracy"] < 1 for line in lines)
    assert lines[-1]["hints_found"] > 0 and lines[-1]["easy"] > 0 and lines[-1]["kl"] > 0
    assert {"L1", "L2", "L3"} == set(summary["before"]) == set(summary["change"])
    assert summary["before"]["L1"]["n"] == 24 and "mean_iou" in summary["before"]["L1"]
    again = replace(config, out=str(tmp_path / "again"))
    with monkeypatch.context() as patch, pytest.raises(OSError):
        crash(patch, "_update", 1, OSError("killed"))
        train(again, progress=False)
    resumed = train(again, progress=False, resume=True)
    assert lines_of(tmp_path / "again") == lines and adapter_of(tmp_path / "again") == adapter_of(tmp_path / "whole")
    assert resumed["after"] == summary["after"] and resumed["before"] == summary["before"]


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_finishes_the_step_and_the_run_goes_on_later(finished, world, tmp_path, coin, capsys):
    config, update = small_config(world, tmp_path / "run", save_every=50), Trainer._update

    def interrupted(self, groups):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, groups)

    handler = signal.getsignal(signal.SIGINT)
    with coin.context() as patch:
        patch.setattr(Trainer, "_update", interrupted)
        summary = train(config, progress=False)
    assert not summary["complete"] and summary["step"] == 2 and summary["after"] == {} and summary["before"]["L1"]
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and f"--resume {tmp_path / 'run'}" in told and "step 2 of 3" in told
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert train(config, progress=False, resume=True)["complete"]
    assert lines_of(tmp_path / "run") == lines_of(finished[0])
    assert signal.getsignal(signal.SIGINT) is handler  # whatever it was: a job in the background ignores Ctrl-C


def test_a_second_ctrl_c_stops_at_once(finished, world, tmp_path, coin, capsys):
    config = small_config(world, tmp_path / "run")
    with coin.context() as patch:
        crash(patch, "_update", 1, KeyboardInterrupt())
        summary = train(config, progress=False)
    assert not summary["complete"] and "step 1 of 3" in capsys.readouterr().out
    train(config, progress=False, resume=True)
    assert lines_of(tmp_path / "run") == lines_of(finished[0])


def test_stop_request_gives_the_handler_back():
    before = signal.getsignal(signal.SIGINT)
    with stop_request() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            stop.wait(1)
    assert signal.getsignal(signal.SIGINT) is before


# --- faults ----------------------------------------------------------------------------------------------------------


def test_a_broken_clip_is_skipped_with_its_question_and_counted(tmp_path, coin):
    world = write_world(tmp_path / "world")
    (world / "1.mp4").write_bytes((world / "1.mp4").read_bytes()[:300])
    trained, update = [], Trainer._update
    coin.setattr(Trainer, "_update", lambda self, g: trained.extend(r.record_id for r in g.records) or update(self, g))
    summary = train(small_config(world, tmp_path / "run", eval_files=[]), progress=False)
    assert len(trained) == 6 and not any(name.endswith("1") for name in trained)
    assert summary["skipped_clips"] == lines_of(tmp_path / "run")[-1]["skipped_clips"] > 0
    assert "1.mp4" in summary["skipped_examples"][0]


def test_too_many_broken_clips_end_the_run(tmp_path):
    world = write_world(tmp_path / "world")
    for path in world.glob("*.mp4"):
        path.write_bytes(b"")
    with pytest.raises(ClipError, match=r"6 of the 6 records tried .* max_broken_share = 0.05"):
        train(small_config(world, tmp_path / "run", eval_files=[]), progress=False)


def test_a_clip_deleted_in_the_middle_of_a_run_is_not_augmented(tmp_path, coin):
    world = write_world(tmp_path / "world")
    sample = Trainer._sample_batch

    def delete(self):
        groups = sample(self)
        for path in world.glob("*.mp4"):
            path.unlink(missing_ok=True)  # their features are cached, their frames are not
        return groups

    coin.setattr(Trainer, "_sample_batch", delete)
    train(small_config(world, tmp_path / "run", eval_files=[], augment="easy", prompts_per_step=6,
                       max_broken_share=0.9), progress=False)
    lines = lines_of(tmp_path / "run")
    assert sum(line["easy"] for line in lines) == lines[-1]["skipped_clips"] > 0
    assert all(line["augmented"] == 0 for line in lines)


def test_a_log_prob_that_is_not_finite_names_step_and_record(finished, world, tmp_path, coin):
    update = Trainer._update

    def poison(self, groups):
        if self.step == 2:
            for parameter in self.policy.trainable():
                parameter.data.fill_(float("nan"))
        return update(self, groups)

    coin.setattr(Trainer, "_update", poison)
    with pytest.raises(NumericsError, match=r"step 3, records (colour|order)\d.* not finite"):
        train(small_config(world, tmp_path / "run", eval_files=[]), progress=False)
    assert lines_of(tmp_path / "run") == lines_of(finished[0])[:2]
    assert load_newest(tmp_path / "run").state["step"] == 2


def test_a_reward_that_is_not_finite_names_the_record(world, tmp_path, coin):
    from dvr1_lite.rewards import Score

    coin.setattr(training, "score", lambda record, text: Score(1.0, float("nan"), None, float("nan"), 2.0))
    with pytest.raises(NumericsError, match=r"reward of record '(colour|order)\d'"):
        train(small_config(world, tmp_path / "run", eval_files=[]), progress=False)


def test_out_of_memory_says_what_to_change(world, tmp_path, coin):
    crash(coin, "_update", 1, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(UserError, match="step 2 ran out of memory: give a smaller micro_batch"):
        train(small_config(world, tmp_path / "run", eval_files=[]), progress=False)
    assert len(lines_of(tmp_path / "run")) == 1


def test_a_full_disk_leaves_the_last_checkpoint(finished, world, tmp_path, coin):
    config, write = small_config(world, tmp_path / "run"), torch.save

    def full(value, path):
        if "step_000002" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(value, path)

    with coin.context() as patch, pytest.raises(UserError, match=r"cannot be written \(.*No space left.*--resume"):
        patch.setattr(checkpoints.torch, "save", full)
        train(config, progress=False)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000001"]
    train(config, progress=False, resume=True)
    assert lines_of(tmp_path / "run") == lines_of(finished[0])


# --- checkpoints -----------------------------------------------------------------------------------------------------


def write_checkpoint(run: Path, step: int, keep: int = 2) -> Path:
    def adapter(folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir()
        save_file({"w": torch.ones(1)}, folder / "adapter_model.safetensors")

    return save_checkpoint(run, step, {"position": step}, {"lr": torch.tensor(0.5)}, {"g": torch.Generator()}, adapter,
                           keep)


def test_only_the_newest_checkpoints_are_kept_and_nothing_unfinished(tmp_path):
    (tmp_path / "checkpoints" / ".unfinished-step_000001").mkdir(parents=True)
    for step in (1, 2, 10):
        write_checkpoint(tmp_path, step)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step_000002", "step_000010"]
    assert load_newest(tmp_path).state["step"] == 10 and load_newest(tmp_path / "none") is None


def test_random_states_come_back(tmp_path):
    generator = torch.Generator().manual_seed(5)
    torch.rand(3, generator=generator)
    import random

    folder = save_checkpoint(tmp_path, 1, {}, {}, {"g": generator}, lambda f: write_adapter(f), 1)
    expected = [torch.rand(2, generator=generator).tolist(), torch.rand(2).tolist(), np.random.rand(2).tolist(),
                random.random()]
    fresh = torch.Generator()
    checkpoints.restore_random(read_checkpoint(folder), {"g": fresh})
    assert expected == [torch.rand(2, generator=fresh).tolist(), torch.rand(2).tolist(), np.random.rand(2).tolist(),
                        random.random()]


def write_adapter(folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({"w": torch.ones(1)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["state.json", "optimizer.pt", "rng.pt", "adapter/adapter_model.safetensors"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, name):
    write_checkpoint(tmp_path, 1)
    newest = write_checkpoint(tmp_path, 2)
    (newest / name).write_bytes((newest / name).read_bytes()[:20])
    assert load_newest(tmp_path).state["step"] == 1
    with pytest.raises(ModelError, match=f"step_000002: {name} cannot be read"):
        read_checkpoint(newest)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(Bomb.target),)


def test_a_malicious_checkpoint_runs_nothing(tmp_path):
    Bomb.target = tmp_path / "exploded"
    folder = write_checkpoint(tmp_path, 1)
    torch.save({"x": Bomb()}, folder / "optimizer.pt")
    with pytest.raises(ModelError, match="optimizer.pt"):
        read_checkpoint(folder)
    (folder / "optimizer.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError, match="no checkpoint can be read"):
        load_newest(tmp_path)
    assert not Bomb.target.exists() and checkpoint_folders(tmp_path) == [folder]


def test_yaml_of_a_run_is_plain(finished):
    assert yaml.safe_load((finished[0] / "config.yaml").read_text())["method"] == "reg-grpo"
