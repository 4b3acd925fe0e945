r"""The configuration: every field with unit, range and paper value; YAML as people write it; mistakes are named."""

import re
from dataclasses import fields

import pytest

from dvr1_lite.config import CONFIGS, PARTS, TrainConfig, load_config, make_config, read_yaml, shipped_configs, to_yaml
from dvr1_lite.errors import ConfigError


def test_lite_yaml_has_the_defaults_and_every_help_text():
    assert load_config(CONFIGS / "lite.yaml") == load_config("lite") == TrainConfig()
    assert (CONFIGS / "lite.yaml").read_text(encoding="utf-8") == to_yaml(TrainConfig())


def test_every_field_has_its_unit_and_the_papers_value_and_is_declared_once():
    for field in fields(TrainConfig):
        assert re.search(r"\. \[.+; paper: .+\]$", field.metadata["help"]), field.name
    listed = [field.name for part in PARTS.values() for field in fields(part)]
    assert sorted(listed) == sorted(field.name for field in fields(TrainConfig))


def test_the_defaults_are_the_papers_settings_where_they_are_known():
    config = TrainConfig()
    assert (config.method, config.group_size, config.history_window, config.beta) == ("reg-grpo", 8, 100, 0.1)
    assert config.clip_eps is None and config.augment == "both" and config.augment_scale == "adaptive"
    assert load_config("seed_bench_r1_qwen2_5_vl_3b").frame_size == 252


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configs_can_be_loaded(name):
    assert load_config(name).out.startswith("runs/")


@pytest.mark.parametrize(("changes", "expected"), [
    ({"group_size": 1, "method": "grpo"}, "group_size is 1, too small for grpo: give at least 2"),
    ({"group_size": 0, "method": "reinforce"}, "group_size is 0"),
    ({"group_size": 10**9}, "group_size is 1000000000"),
    ({"prompts_per_step": 10**9}, "prompts_per_step is 1000000000"),
    ({"history_window": 0}, "history_window is 0"),
    ({"predicted_eps": -0.1}, "predicted_eps is -0.1: give a number above 0"),
    ({"advantage_eps": -1e-4}, "advantage_eps"),
    ({"clip_eps": -0.2}, "clip_eps"),
    ({"beta": -0.1}, "beta is -0.1: give a number at least 0"),
    ({"learning_rate": -1e-3}, "learning_rate is -0.001"),
    ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ({"learning_rate": float("inf")}, "learning_rate is inf"),
    ({"temperature": 0}, "temperature is 0"),
    ({"steps": -1}, "steps is -1"),
    ({"steps": 1.5}, "steps is 1.5: give a whole number"),
    ({"steps": True}, "steps is True"),
    ({"micro_batch": 0}, "micro_batch is 0"),
    ({"micro_batch": "two"}, "micro_batch is 'two': give a whole number or none"),
    ({"figures": "maybe"}, "figures is 'maybe': give true or false"),
    ({"method": "ppo"}, "method is 'ppo': choose one of grpo, reg-grpo"),
    ({"augment": "all"}, "augment is 'all'"),
    ({"hint_max": 2.0}, "hint_max is 2.0"),
    ({"hint_min": 0.7, "hint_max": 0.5}, "hint_min is 0.7"),
    ({"dead_zone": 1.0}, "dead_zone is 1.0"),
    ({"absolute_reward": 2.0, "difficulty_reference": "absolute"}, "absolute_reward is 2.0"),
    ({"max_broken_share": 1.0}, "max_broken_share is 1.0"),
    ({"eval_files": ["L1.jsonl"]}, "NAME=FILE"),
    ({"eval_files": ["a=x", "a=y"]}, "names of their own"),
    ({"eval_files": ["../a=x"]}, "NAME=FILE"),
    ({"eval_files": "a=x"}, "a list of texts")])
def test_impossible_values_are_refused(changes, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        make_config(changes)


@pytest.mark.parametrize(("name", "near"), [("lr", "learning_rate"), ("group_sizes", "group_size"),
                                            ("learn_rate", "learning_rate"), ("xyzzy", "train --help")])
def test_unknown_keys_name_near_ones(name, near):
    with pytest.raises(ConfigError, match=f"unknown config key '{name}'.*{near}"):
        make_config({name: 1})


def test_yaml_is_read_as_people_write_it(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 1e-4\nbeta: 1\nclip_eps: none\nmicro_batch: null\nsteps: 0\n"
                                     "eval_files:\n  val: data/x.jsonl\n")
    config = load_config(tmp_path / "a.yaml", {"beta": 0.5, "group_size": 7})
    assert config.learning_rate == 1e-4 and config.beta == 0.5 and config.group_size == 7 and config.steps == 0
    assert config.clip_eps is None and config.eval_paths() == {"val": "data/x.jsonl"}
    (tmp_path / "b.yaml").write_text("eval_files:\n")
    assert load_config(tmp_path / "b.yaml").eval_paths() == {}


def test_a_config_survives_its_file(tmp_path):
    config = make_config({"steps": 3, "instruction": "Think: # 'first'\n", "eval_files": ["a=b=c"], "rollout_budget": 9,
                          "adam_eps": 1e-300, "learning_rate": 0.1 + 0.2})
    (tmp_path / "c.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "c.yaml") == config


def test_a_file_of_the_first_version_is_still_valid(tmp_path):
    (tmp_path / "old.yaml").write_text("model: data/base_model\nattention: sdpa\nsteps: 5\n")
    assert load_config(tmp_path / "old.yaml") == make_config({"steps": 5})
    (tmp_path / "old.yaml").write_text("attention: eager\n")
    with pytest.raises(ConfigError, match="'attention' is withdrawn.*'sdpa': leave it out"):
        load_config(tmp_path / "old.yaml")


@pytest.mark.parametrize(("text", "expected"), [
    ("", "is empty"), ("# only a comment\n", "is empty"), ("- a\n", "holds a list"), ("a: [", "not valid YAML"),
    ("!!python/object/apply:os.getcwd []", "not valid YAML"), ("a: " + "[" * 1000, "nested 21 levels deep"),
    ("model: [&a [x], *a, *a]\n", "has an alias"), ("stepz: 3\n", "bad.yaml: unknown config key 'stepz': did you mean "
                                                    "steps")])
def test_bad_yaml_is_refused_with_its_name(tmp_path, text, expected):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"bad.yaml.*{expected}|{expected}"):
        load_config(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="none.yaml cannot be read"):
        read_yaml(tmp_path / "none.yaml")


def test_a_file_can_extend_a_shipped_one(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: seed_bench_r1_qwen2_vl_2b\nbeta: 0.5\n")
    config = load_config(tmp_path / "a.yaml", {"steps": 2})
    assert (config.model, config.beta, config.steps) == ("Qwen/Qwen2-VL-2B-Instruct", 0.5, 2)
    assert (config.group_size, config.dtype, list(config.eval_paths())) == (8, "bfloat16", ["L1", "L2", "L3"])
    for other in ("a.yaml", "[x]", "cards", "../lite"):
        (tmp_path / "b.yaml").write_text(f"extends: {other}\n")
        with pytest.raises(ConfigError, match="b.yaml extends .*: name one of full_scale, lite"):
            load_config(tmp_path / "b.yaml")


def test_a_config_of_gigabytes_is_refused_unread(tmp_path):
    with open(tmp_path / "huge.yaml", "wb") as file:
        file.truncate(2**33)
    with pytest.raises(ConfigError, match="larger than"):
        load_config(tmp_path / "huge.yaml")
