r"""What is compared: equal budgets, the paper's rows and figures, shared runs, and how answers are stored."""

from collections import Counter
from dataclasses import asdict, replace

import pytest

from dvr1_lite.errors import ConfigError
from dvr1_lite.files import data_folder
from dvr1_lite.lab.report import published_rows
from dvr1_lite.lab.runner import plan
from dvr1_lite.lab.tables import (
    EXPERIMENTS, GROUPS, ROLLOUTS, Experiment, Row, dump, find_experiments, pack, tuned_as, unpack,
)
from dvr1_lite.objectives import METHODS

SETTINGS = {"grpo": {"learning_rate": 3e-4, "beta": 0.04}, "reg-grpo": {"learning_rate": 1e-3, "beta": 0.4}}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_plans_at_equal_budgets(name):
    experiment = EXPERIMENTS[name]
    runs = plan(experiment, seeds=1, settings=SETTINGS)
    assert len(runs) == len(experiment.rows) == len({run.row for run in runs})
    assert {row for claim in experiment.claims for row in claim} <= {run.row for run in runs}
    budgets = {run.config.rollout_budget for run in runs}
    if experiment.equal == "rollouts":
        assert budgets == {2400 if name == "robust" else 4800} and ROLLOUTS == 4800
    else:
        assert len({run.config.steps * run.config.inner_updates for run in runs}) == 1
    for config in (run.config for run in runs):
        assert config.steps * config.prompts_per_step * config.group_size >= (config.rollout_budget or 0)


@pytest.mark.parametrize(("changes", "equal", "message"), [
    ([{}, {"rollout_budget": 64}], "rollouts", "b: not at equal rollouts"),
    ([{"steps": 10}], "rollouts", "a: not at equal rollouts"),  # too few steps to spend the budget
    ([{"augment": "both"}], "updates", "a: not at equal updates"),  # its budget ends it before its last step
    ([{}, {"steps": 76}], "updates", "b: not at equal updates")])
def test_unequal_rows_are_refused(changes, equal, message):
    rows = tuple(Row(name, {"method": "grpo"} | change) for name, change in zip("ab", changes))
    with pytest.raises(ConfigError, match=message):
        plan(Experiment("x", "?", rows, (), equal=equal), seeds=1)


def test_table4_has_the_rows_and_the_published_figures_of_the_paper():
    experiment = EXPERIMENTS["table4"]
    published = published_rows(experiment)
    assert [row.name for row in experiment.rows] == ["GRPO", "GRPO + DA", "Reg-GRPO", "Reg-GRPO + DA"]
    assert published["Qwen2.5-VL-3B"] == {"L1": 31.3, "L2": 32.7, "L3": 27.0}
    assert published[experiment.rows[3].published] == {"L1": 48.1, "L2": 51.1, "L3": 44.0}
    assert [run.config.augment for run in plan(experiment, 1)] == ["none", "both", "none", "both"]
    assert len(plan(experiment)) == 40 and [run.seed for run in plan(experiment, 2)] == [0] * 4 + [1] * 4
    for one in (one for one in EXPERIMENTS.values() if one.published):
        assert {row.published for row in one.rows} <= set(published_rows(one))


def test_some_rows_are_planned_and_with_another_base_model_everything_else_stays():
    experiment = EXPERIMENTS["phase_A2"]
    shipped = [run for run in plan(experiment, 2, SETTINGS) if run.row in ("plain", "hinted")]
    other = plan(experiment, 2, SETTINGS, rows=("plain", "hinted"), model="runs/base_seed1")
    assert [(run.row, run.seed) for run in other] == [("plain", 0), ("hinted", 0), ("plain", 1), ("hinted", 1)]
    assert [replace(run, config=replace(run.config, model="data/base_model")) for run in other] == shipped
    with pytest.raises(ConfigError, match="unknown row 'hintd': did you mean hinted"):
        plan(experiment, rows=("hintd",))


def test_same_rows_of_different_tables_are_one_run():
    def config(table, row):
        return next(run.config for run in plan(EXPERIMENTS[table], 1, SETTINGS) if run.row == row)

    reg, both = config("table4", "Reg-GRPO"), config("table4", "Reg-GRPO + DA")
    assert reg == config("table5", "Reg-GRPO") == config("table7", "none") == config("table8", "none")
    assert both == config("table6", "relative") == config("table7", "increasing + decreasing")
    assert both == config("table8", "adaptive")
    assert both == config("variants", "Reg-GRPO, hinted") and reg == config("variants", "Reg-GRPO, plain")
    assert config("figure3", "Reg-GRPO + DA").rollout_budget is None
    assert config("figure3", "GRPO") == config("table4", "GRPO")


def test_tuned_settings_reach_the_rows_and_a_rows_own_changes_win():
    rows = {run.row: run.config for run in plan(EXPERIMENTS["kl"], 1, SETTINGS)}
    assert rows["Reg-GRPO, beta 0.02"].beta == 0.02 and rows["Reg-GRPO, beta 0.02"].learning_rate == 1e-3
    scale = {run.row: run.config for run in plan(EXPERIMENTS["scale"], 1, SETTINGS)}
    assert scale["GRPO, matched KL"].beta == pytest.approx(0.4 * 0.1 / 2) and scale["GRPO, sum"].beta == 0.04


def test_augmented_rows_take_the_setting_of_their_variant():
    tuned = {"reg-grpo": {"learning_rate": 1e-3, "beta": 0.4}, "reg-grpo, hinted": {"learning_rate": 3e-4, "hint_max": 1.0},
             "reg-grpo, mixed": {"learning_rate": 1e-4, "hint_max": 0.3}}
    found = {run.row: run.config for run in plan(EXPERIMENTS["variants"], 1, tuned)}
    for variant, rate, hint in (("plain", 1e-3, 0.6), ("resampled", 1e-3, 0.6), ("hinted", 3e-4, 1.0),
                                ("kept", 3e-4, 1.0), ("only vanished", 3e-4, 1.0), ("mixed", 1e-4, 0.3)):
        config = found[f"Reg-GRPO, {variant}"]
        assert (config.learning_rate, config.hint_max, config.beta) == (rate, hint, 0.4)


def test_rivals_are_tuned_with_equally_many_runs_on_the_tuning_split():
    runs = [run for name in ("tune", "tune_augmented", "tune_rivals") for run in plan(EXPERIMENTS[name], 1)]
    counts = Counter(tuned_as(asdict(run.config)) for run in runs)
    assert {counts.pop(method) for method in METHODS} == {12} and set(counts.values()) == {9}
    assert set(counts) == {f"{method}, {variant}" for method in ("grpo", "reg-grpo")
                                          for variant in ("hinted", "mixed")}
    assert {run.seed for run in runs} == {1000} and {run.config.rollout_budget for run in runs} == {4800}
    assert {tuple(run.config.eval_paths()) for run in runs} == {("tune",)}


@pytest.mark.parametrize("name", GROUPS["phase"])
def test_a_phase_diagram_trains_and_tests_one_cell_with_one_setting_for_all_variants(name):
    cell, runs = name.removeprefix("phase_"), plan(EXPERIMENTS[name], 1, SETTINGS)
    assert len({run.config.variant for run in runs}) == 5 and {run.config.augment for run in runs} == {
        "none", "both", "resample"}  # hinted and resampled differ in what is augmented, not in the update
    for config in (run.config for run in runs):
        assert (config.learning_rate, config.beta, config.absolute_reward) == (3e-4, 0.1, 1.0)
        assert config.train_file.endswith(f"train_{cell}.jsonl") and config.eval_files == [
            f"cell=data/toyvideoqa/test_{cell}.jsonl"]


def test_every_experiment_has_a_name_that_the_protocol_declares():
    assert [e.name for e in find_experiments("all")] == ["table4", "table5", "table6", "table7", "table8", "figure3"]
    with pytest.raises(ConfigError, match="unknown experiment 'table9': did you mean table8"):
        find_experiments("table9")
    protocol = (data_folder() / "results" / "PROTOCOL.md").read_text(encoding="utf-8")
    assert [name for name in [*EXPERIMENTS, *GROUPS] if f"`{name}`" not in protocol] == []


def test_answers_are_packed_in_the_order_of_the_records_and_floats_are_rounded():
    rows = [{"index": 1, "accuracy": 0.0}, {"index": 0, "accuracy": 1.0}, {"index": 2, "error": "unreadable"}]
    assert pack(rows) == "10x" and unpack("10x") == [1.0, 0.0, None]
    assert pack([{"index": 0, "accuracy": 0.25}, {"index": 1, "error": ""}]) == [0.25, None] == unpack([0.25, None])
    assert pack([{"index": 0, "accuracy": 0.0}, {"index": 0, "accuracy": 1.0}]) == [0.5]  # two samples
    assert dump({"a": [1, 0.123456, float("nan")], "b": None}, lambda x: round(x, 2)) == (
        '{\n"a": [1, 0.12, null],\n"b": null\n}\n')
