r"""Experiments: what is declared, how runs are recorded and resumed, and what they amount to, by hand."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from small_run import write_world

from dvr1_lite import experiments, report
from dvr1_lite.config import make_config
from dvr1_lite.errors import ConfigError, UserError
from dvr1_lite.experiments import (
    EXPERIMENTS, GROUPS, ROLLOUTS, Experiment, Row, Run, base_job, check_equal, choose_settings, file_name,
    find_experiments, find_recorded, make_runs, pack, perform, plan, question_groups, read_runs, read_settings,
    reproduce, rerun, run_job, same_config, saved_config, thin, unpack, work,
)
from dvr1_lite.paths import data_folder

RESULTS = Path(__file__).resolve().parents[1] / "data"
PRINTS = {"model": "m", "train": "t", "L1": "1", "L2": "2", "L3": "3"}
SETTINGS = {"grpo": {"learning_rate": 3e-4, "beta": 0.04}, "reg-grpo": {"learning_rate": 1e-3, "beta": 0.4}}
GROUPS_OF_QUESTIONS = {"L1": {"clip": [0, 0, 1, 1, 2, 2], "type": ["a", "b"] * 3}}


# --- what is declared ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_plans_at_equal_budgets(name):
    experiment = EXPERIMENTS[name]
    runs = plan(experiment, seeds=1, settings=SETTINGS)
    assert len(runs) == len(experiment.rows) == len({run.row for run in runs})
    assert {row for claim in experiment.claims for row in claim} <= {run.row for run in runs}
    if experiment.equal == "rollouts" and name != "tune":
        assert {run.config.rollout_budget for run in runs} == {ROLLOUTS} == {9600}
    if experiment.equal == "updates":
        assert len({run.config.steps * run.config.inner_updates for run in runs}) == 1
    for run in runs:
        config = run.config
        assert config.steps * config.prompts_per_step * config.group_size >= (config.rollout_budget or 0)


def test_unequal_rows_are_refused():
    rows = (Row("a", {"method": "grpo"}), Row("b", {"method": "grpo", "rollout_budget": 64}))
    with pytest.raises(ConfigError, match="b: not at equal rollouts"):
        plan(Experiment("x", "?", rows, ()), seeds=1)
    few_steps = (Row("a", {"method": "grpo", "steps": 10}),)
    with pytest.raises(ConfigError, match="not at equal rollouts"):
        plan(Experiment("x", "?", few_steps, ()), seeds=1)
    stops_early = (Row("a", {"method": "grpo", "augment": "both"}),)
    with pytest.raises(ConfigError, match="not at equal updates"):
        plan(Experiment("x", "?", stops_early, (), equal="updates"), seeds=1)
    check_equal(Experiment("x", "?", (), ()), [])


def test_table4_has_the_rows_and_the_published_figures_of_the_paper():
    experiment = EXPERIMENTS["table4"]
    published = report.published_rows(experiment)
    assert [row.name for row in experiment.rows] == ["GRPO", "GRPO + DA", "Reg-GRPO", "Reg-GRPO + DA"]
    assert published[experiment.base_name] == {"L1": 31.3, "L2": 32.7, "L3": 27.0}
    assert published[experiment.rows[3].published] == {"L1": 48.1, "L2": 51.1, "L3": 44.0}
    assert [run.config.augment for run in plan(experiment, 1)] == ["none", "both", "none", "both"]
    assert len(plan(experiment)) == 40 and [r.seed for r in plan(experiment, 2)] == [0] * 4 + [1] * 4


@pytest.mark.parametrize("name", [e.name for e in EXPERIMENTS.values() if e.published])
def test_every_published_name_exists(name):
    published = report.published_rows(EXPERIMENTS[name])
    assert {row.published for row in EXPERIMENTS[name].rows} <= set(published)


def test_same_rows_of_different_tables_are_one_run():
    def config(table, row):
        return next(run.config for run in plan(EXPERIMENTS[table], 1, SETTINGS) if run.row == row)

    reg, both = config("table4", "Reg-GRPO"), config("table4", "Reg-GRPO + DA")
    assert reg == config("table5", "Reg-GRPO") == config("table7", "none") == config("table8", "none")
    assert both == config("table6", "relative") == config("table7", "increasing + decreasing")
    assert both == config("table8", "adaptive") and reg == config("updates", "Reg-GRPO")
    assert config("figure3", "Reg-GRPO + DA").rollout_budget is None
    assert config("figure3", "GRPO") == config("table4", "GRPO")


def test_tuned_settings_reach_the_rows_and_rows_come_before_them():
    rows = {run.row: run.config for run in plan(EXPERIMENTS["kl"], 1, SETTINGS)}
    assert rows["Reg-GRPO, beta 0.02"].beta == 0.02 and rows["Reg-GRPO, beta 0.02"].learning_rate == 1e-3
    scale = {run.row: run.config for run in plan(EXPERIMENTS["scale"], 1, SETTINGS)}
    assert scale["GRPO, matched KL"].beta == pytest.approx(0.4 * 0.1 / 2) and scale["GRPO, sum"].beta == 0.04


def test_tuning_gives_every_method_the_same_grid_and_seeds_of_its_own():
    runs = plan(EXPERIMENTS["tune"], 1)
    per_method = {m: sum(run.config.method == m for run in runs) for m in experiments.TUNED_METHODS}
    assert set(per_method.values()) == {12} and {run.seed for run in runs} == {1000}
    assert {tuple(run.config.eval_paths()) for run in runs} == {("tune",)}


def test_groups_and_unknown_names():
    assert [e.name for e in find_experiments("all")] == ["table4", "table5", "table6", "table7", "table8", "figure3"]
    assert "tune" not in GROUPS["ablations"] and "updates" in GROUPS["ablations"]
    with pytest.raises(ConfigError, match="table4"):
        find_experiments("table9")


def test_the_protocol_names_every_experiment():
    text = (RESULTS / "results" / "PROTOCOL.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in [*EXPERIMENTS, *GROUPS])


# --- what a file says ------------------------------------------------------------------------------------------------


def test_answers_are_packed_and_unpacked():
    rows = [{"index": 1, "accuracy": 0.0}, {"index": 0, "accuracy": 1.0}, {"index": 2, "error": "gone"}]
    assert pack(rows) == "10x" and unpack("10x") == [1.0, 0.0, None]
    assert pack([{"index": 0, "accuracy": 0.25}, {"index": 1, "error": ""}]) == [0.25, None] == unpack([0.25, None])


def test_questions_are_grouped_by_clip_and_type():
    rows = [{"index": 1, "clip": "b", "question_type": "x"}, {"index": 0, "clip": "a", "question_type": "y"},
            {"index": 2, "clip": "a", "question_type": "x"}]
    assert question_groups(rows) == {"clip": [0, 1, 0], "type": ["y", "x", "x"]}


def test_curves_are_thinned_by_hand():
    metrics = [{"step": i + 1, "rollouts": 64 * (i + 1), "reward": float(i), "kl": None if i < 2 else 0.5}
               for i in range(5)]
    assert thin(metrics, points=3) == {"step": [2, 4, 5], "rollouts": [128, 256, 320], "reward": [0.5, 2.5, 4.0],
                                       "kl": [None, 0.5, 0.5]}


def test_a_recorded_config_is_found_again_and_a_changed_one_is_not():
    run = plan(EXPERIMENTS["table4"], 1, SETTINGS)[0]
    saved = json.loads(json.dumps(saved_config(run.config)))
    assert make_config(saved | {"out": "runs/reproduce"}) == run.config and "out" not in saved
    assert same_config(saved, run.config) and same_config(saved | {"save_every": 7}, run.config)
    assert not same_config(saved | {"beta": 0.9}, run.config)
    without = {name: value for name, value in saved.items() if name != "noise_scale"}
    assert same_config(without, run.config)  # recorded before the field existed
    assert not same_config(saved | {"no_such_field": 1}, run.config)


def test_another_model_or_seed_is_another_run():
    run = plan(EXPERIMENTS["table4"], 1, SETTINGS)[0]
    recorded = {"table5/x.json": fake_run(run, [1, 1, 1, 0, 0, 0])}
    assert find_recorded(run, PRINTS, recorded) == "table5/x.json"
    assert find_recorded(run, PRINTS | {"model": "other"}, recorded) is None
    assert find_recorded(dataclasses.replace(run, seed=1), PRINTS, recorded) is None
    assert file_name(run, PRINTS) != file_name(run, PRINTS | {"model": "other"})


def test_settings_are_chosen_by_the_tuning_split_alone():
    def run(rate, beta, accuracy):
        return {"method": "grpo", "config": {"learning_rate": rate, "beta": beta},
                "accuracy": {"tune": {"accuracy": accuracy}}}

    chosen = choose_settings([run(1e-3, 0.1, 0.5), run(1e-3, 0.1, 0.7), run(3e-3, 0.1, 0.6), run(1e-3, 0.4, 0.6)])
    assert chosen["grpo"]["chosen"] == {"learning_rate": 1e-3, "beta": 0.4}  # all at 0.6: smaller rate, larger weight
    assert chosen["grpo"]["grid"][0] == {"learning_rate": 1e-3, "beta": 0.1, "accuracy": 0.6, "seeds": 2}


def test_settings_are_read_from_the_results_folder(tmp_path):
    (tmp_path / "tuning.json").write_text(json.dumps({"grpo": {"chosen": {"beta": 0.3}, "grid": []}}))
    assert read_settings(tmp_path) == {"grpo": {"beta": 0.3}}


def test_recorded_files_name_no_folder_and_no_host():
    import platform
    import re

    for path in sorted((RESULTS / "results").glob("*/*.json")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r'"(/|[A-Z]:\\\\|~)', text) and f'"{platform.node()}"' not in text, path


def test_every_recorded_run_can_be_made_again_from_its_config():
    for name, run in read_runs(RESULTS / "results").items():
        assert same_config(run["config"], make_config(run["config"])), name


# --- statistics by hand ----------------------------------------------------------------------------------------------


def test_interval_over_seeds_by_hand():
    found = report.seed_summary([1.0, 2.0, 3.0, 4.0, 5.0])  # sd 1.5811, t(4) = 2.7764, 1.5811 / sqrt 5 = 0.7071
    assert found["mean"] == 3.0 and found["sd"] == pytest.approx(1.5811388) and found["n"] == 5
    assert found["ci"] == pytest.approx([3 - 1.9632, 3 + 1.9632], abs=1e-4)
    assert report.seed_summary([4.0]) == {"mean": 4.0, "sd": None, "ci": None, "n": 1}


def test_paired_difference_by_hand():
    found = report.paired_summary([1.0, 2.0, 3.0], family=2)  # sd 1, error 0.57735, t(2): 4.3027, 6.2053, 1.0607
    assert found["ci"] == pytest.approx([2 - 2.4841, 2 + 2.4841], abs=1e-3)
    assert found["ci_corrected"] == pytest.approx([2 - 3.5826, 2 + 3.5826], abs=1e-3)
    assert found["detectable"] == pytest.approx((6.2053 + 1.0607) * 0.57735, abs=1e-3)
    assert report.paired_summary([1.0], 4)["detectable"] is None


def test_interval_by_clip_by_hand():
    # clips a, b, c with differences 0 1 | 1 0 | 0 -1: error 1/3 (see test_evaluation), t(2) = 4.3027
    one = ([0.0, 1.0, 1.0, 0.0, 0.0, -1.0], [0, 0, 1, 1, 2, 2])
    low, high = report.clip_interval([one])
    assert (low, high) == (pytest.approx(1 / 6 - 1.434218), pytest.approx(1 / 6 + 1.434218))
    low, high = report.clip_interval([one, one])  # error sqrt(2)/3 / 2, t(4) = 2.7764
    assert (low, high) == (pytest.approx(1 / 6 - 0.65441, abs=1e-4), pytest.approx(1 / 6 + 0.65441, abs=1e-4))
    assert report.clip_interval([([0.0, None, 1.0], [0, 1, 2])])[0] < 0.5


@pytest.mark.parametrize(("seeds", "clips", "expected"), [
    ([0.5, 3.0], [0.1, 3.0], "reproduced"), ([0.5, 3.0], [-0.1, 3.0], "inconclusive"),
    ([-3.0, -0.5], [-3.0, -0.1], "contradicted"), ([-1.0, 3.0], [0.5, 2.0], "inconclusive"),
    (None, [0.5, 2.0], "n = 1, illustrative")])
def test_verdicts(seeds, clips, expected):
    assert report.verdict({"ci_corrected": seeds, "ci_clips": clips}) == expected


# --- aggregates of made-up runs --------------------------------------------------------------------------------------


def fake_run(run: Run, right: list[int], seed: int | None = None) -> dict:
    r"""What a worker would have recorded for six questions on three clips."""
    share = sum(right) / len(right)
    cell = {"accuracy": share, "ci95": [0.0, 1.0], "n": 6, "by_type": {
        kind: {"accuracy": sum(right[i::2]) / 3, "ci95": [0.0, 1.0], "n": 3} for i, kind in enumerate("ab")}}
    curve = {"step": [1, 2], "rollouts": [64, 128]} | dict.fromkeys(report.DRAWN_CURVES, [0.25, 0.5])
    seed = run.seed if seed is None else seed
    return {"table": run.experiment, "row": run.row, "method": run.config.method, "seed": seed,
            "config": saved_config(dataclasses.replace(run.config, seed=seed)), "inputs": PRINTS, "base": "basekey",
            "accuracy": {"L1": cell}, "answers": {"L1": "".join(map(str, right))}, "sampled": {},
            "sampled_limit": run.sampled_limit, "rollouts": 9600, "updates": 600, "steps": 150,
            "augmentation": dict.fromkeys(experiments.COUNTS, 0), "curve": curve, "seconds": {"process": 90.0}}


def fake_results(monkeypatch, shelf: Path) -> list[Run]:
    r"""Two rows of table 4 with three seeds each, on disk."""
    monkeypatch.setattr(report, "fingerprints", lambda config: PRINTS)
    answers = {"GRPO": ["100000", "110000", "100000"], "Reg-GRPO": ["111000", "111000", "111100"]}
    runs = [run for run in plan(EXPERIMENTS["table4"], 3, SETTINGS) if run.row in answers]
    for run in runs:
        path = shelf / file_name(run, PRINTS)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(experiments.dump(fake_run(run, [int(c) for c in answers[run.row][run.seed]])))
    base = fake_run(runs[0], [1, 0, 0, 0, 0, 0], 0) | {
        "row": "base", "method": "base", "questions": GROUPS_OF_QUESTIONS}
    (shelf / "base").mkdir()
    (shelf / "base" / "basekey.json").write_text(json.dumps(base))
    return runs


def test_aggregate_by_hand(monkeypatch, tmp_path):
    runs = fake_results(monkeypatch, tmp_path)
    table = report.write_aggregate(EXPERIMENTS["table4"], runs, tmp_path)
    found = json.loads((tmp_path / "table4" / "aggregate.json").read_text())
    grpo, reg = found["rows"]["GRPO"], found["rows"]["Reg-GRPO"]
    assert grpo["splits"]["L1"]["values"] == pytest.approx([100 / 6, 200 / 6, 100 / 6], abs=1e-3)
    assert grpo["mean"]["mean"] == pytest.approx(400 / 18, abs=1e-3) and grpo["seeds"] == [0, 1, 2]
    assert reg["by_type"]["L1"]["a"]["mean"] == pytest.approx(200 / 3, abs=1e-3)  # questions 0, 2 of 0, 2, 4
    assert reg["published"]["L1"] == 44.2 and found["rows"]["base"]["published"]["L1"] == 31.3
    assert found["rows"]["base"]["splits"]["L1"]["ci"] is None and grpo["rollouts"]["mean"] == 9600
    [difference] = found["differences"]  # the other claims have no runs
    gaps = [200 / 6, 100 / 6, 300 / 6]  # mean 33.333, sd 16.667, error 9.6225; t(2) = 4.3027; of four claims 8.8602
    assert difference["mean"]["mean"] == pytest.approx(sum(gaps) / 3, abs=1e-3)
    assert difference["mean"]["ci"][0] == pytest.approx(33.3333 - 4.302653 * 9.6225, abs=1e-2)
    assert difference["mean"]["ci_corrected"][0] == pytest.approx(33.3333 - 8.8602 * 9.6225, abs=1e-2)
    assert difference["verdict"] == "inconclusive" and difference["published"]["L1"] == pytest.approx(4.6)
    assert "| Reg-GRPO over GRPO | +33.3 |" in table and "(44.2)" in table


def test_report_draws_from_recorded_files_alone(monkeypatch, tmp_path):
    runs = fake_results(monkeypatch, tmp_path)
    report.write_aggregate(EXPERIMENTS["table4"], runs, tmp_path)
    monkeypatch.setattr(report, "fingerprints", lambda config: pytest.fail("report needs no model and no data"))
    told = []
    written = report.report([], tmp_path, told.append)
    assert {path.name for path in written} == {"accuracy.png", "curves.png", "differences.png", "claims.png"}
    assert "Table 4 | Reg-GRPO over GRPO | inconclusive" in (tmp_path / "claims.md").read_text()
    assert all(path.stat().st_size > 5000 for path in written) and "## table4" in told[0]
    figure = report.accuracy_figure(json.loads((tmp_path / "table4" / "aggregate.json").read_text()))
    drawn = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_fillstyle() == "none"]
    assert drawn == [31.3, 39.6, 44.2]  # published: hollow


def test_scoreboard_has_every_claim_and_says_what_is_missing(monkeypatch, tmp_path):
    runs = fake_results(monkeypatch, tmp_path)
    report.write_aggregate(EXPERIMENTS["table4"], runs, tmp_path)
    board = report.scoreboard(tmp_path)
    assert len(board) == 3 + sum(len(experiment.claims) for experiment in experiments.PAPER)
    assert {claim.paper for claim in board} == {*(f"Table {n}" for n in range(1, 9)), "Figure 3"}
    [known] = [claim for claim in board if claim.effect is not None]
    told = report.sentence(known)
    assert told.startswith("Reg-GRPO over GRPO: inconclusive, +33.3 points [-") and "over 3 seeds" in told
    assert told.endswith("published +4.0, which is not excluded")  # the mean of 4.6, 3.2 and 4.1
    missing = next(claim for claim in board if claim.paper == "Table 5")
    assert report.sentence(missing).endswith("not recorded yet: python -m dvr1_lite reproduce table5")
    figure = report.claims_figure(board)
    assert [text.get_text() for text in figure.axes[0].texts].count("not recorded yet") == len(board) - 4


def test_a_claim_of_less_points_to_the_right_when_it_is_less():
    less = {"row": "GRPO + DA", "rival": "GRPO", "verdict": "reproduced", "training": {"vanishing_after": {
        "mean": -0.1, "ci_corrected": [-0.15, -0.05], "detectable": 0.02, "n": 5}}}
    claim = report.claims_of(EXPERIMENTS["figure3"], {"differences": [less]})[0]
    assert claim.effect == pytest.approx(10.0) and claim.interval == pytest.approx([5.0, 15.0])
    assert claim.detectable == pytest.approx(2.0) and claim.by_clip is None and claim.published is None
    assert "lower vanishing ratio: reproduced, +10.0 points [5.0, 15.0] over 5 seeds" in report.sentence(claim)


def test_report_without_results_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="reproduce NAME"):
        report.report([], tmp_path)
    with pytest.raises(ConfigError, match="reproduce table5"):
        report.report(["table5"], tmp_path)


# --- making runs -----------------------------------------------------------------------------------------------------

FAKE_WORKER = """
import json, pathlib, sys
spec = json.loads(pathlib.Path(sys.argv[1]).read_text())
folder = pathlib.Path(sys.argv[1]).parent
with open(folder.parents[2] / "made.txt", "a") as file:
    file.write(spec["row"] + "\\n")
if spec["row"] == "GRPO + DA":
    sys.exit("error: out of luck")
(folder / "features.safetensors").write_text("")
result = {name: spec[name] for name in ("table", "row", "seed", "config", "inputs", "sampled_limit", "base")}
result |= {"method": spec["config"]["method"], "accuracy": {"L1": {"accuracy": 0.5}}, "answers": {"L1": "10"}}
path = pathlib.Path(spec["result"])
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(json.dumps(result))
"""


@pytest.fixture
def fake_workers(monkeypatch, tmp_path):
    r"""Workers that write a result at once, or fail on one row; the file of rows that were made."""
    program = [sys.executable, "-S", "-c", FAKE_WORKER]
    monkeypatch.setattr(experiments, "worker_command", lambda spec: [*program, str(spec)])
    monkeypatch.setattr(experiments, "fingerprints", lambda config: PRINTS)
    made = tmp_path / "made.txt"
    return lambda: made.read_text().split("\n")[:-1] if made.exists() else []


def test_finished_runs_are_never_repeated_and_failures_stop_nobody(fake_workers, tmp_path):
    runs, told = plan(EXPERIMENTS["table4"], 1, SETTINGS), []
    assert make_runs(runs, tmp_path, 2, "command", told.append) == ["table4: GRPO + DA, seed 0"]
    assert fake_workers()[0] == "base" and sorted(fake_workers()[1:]) == sorted(run.row for run in runs)
    assert len(read_runs(tmp_path)) == 3 and any("out of luck" in line for line in told)
    assert told[0].startswith("4 runs to make, 0 recorded") and any("left" in line for line in told)
    make_runs(plan(EXPERIMENTS["table4"], 1, SETTINGS), tmp_path, 2, "command", told.append)
    assert fake_workers()[5:] == ["GRPO + DA"]  # only the one that failed, and the base is kept
    make_runs(plan(EXPERIMENTS["table8"], 1, SETTINGS), tmp_path, 1, "command", told.append)
    assert fake_workers()[6:] == ["fixed"]  # "none" and "adaptive" are runs of table 4


def test_without_a_base_there_are_no_runs(fake_workers, monkeypatch, tmp_path):
    runs = plan(EXPERIMENTS["table4"], 1, SETTINGS)
    program = [sys.executable, "-S", "-c", "raise SystemExit('no')"]
    monkeypatch.setattr(experiments, "worker_command", lambda spec: program)
    with pytest.raises(UserError, match="base model cannot be evaluated"):
        make_runs(runs, tmp_path, 1, "command", lambda line: None)


def test_quick_runs_have_a_folder_of_their_own(fake_workers, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "write_aggregate", lambda experiment, runs, shelf: f"{experiment.name} {len(runs)}")
    told = []
    reproduce("table4", tmp_path, quick=True, tell=told.append)
    assert told[-2] == "table4 4" and told[-1].endswith(f"report table4 --out {tmp_path / 'quick'}")
    assert read_runs(tmp_path) == {} and len(read_runs(tmp_path / "quick")) == 3


# --- one real run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def tiny_run(world: Path, method: str = "reg-grpo", seed: int = 0) -> Run:
    records = str(world / "records.jsonl")
    config = make_config({"model": str(world / "model"), "train_file": records, "eval_files": {"L1": records},
                          "num_frames": 4, "steps": 2, "rollout_budget": 16, "prompts_per_step": 2, "group_size": 4,
                          "max_new_tokens": 6, "inner_updates": 2, "lora_rank": 4, "augment": "none", "seed": seed,
                          "figures": False, "method": method, "quantization": "none"})
    return Run("table4", "Reg-GRPO", seed, config, 3)


def in_process(run: Run, shelf: Path) -> dict:
    r"""The base's evaluation and the run, without processes of their own."""
    prints = experiments.fingerprints(run.config)
    base = base_job(run, prints, shelf, "command")
    job = run_job(run, prints, shelf, "command", base)
    for one in (base, job):
        one.folder.mkdir(parents=True)
        (one.folder / "spec.json").write_text(json.dumps(one.spec))
        assert perform(one.folder / "spec.json") == 0
    assert not job.folder.exists() and (base.folder / "features.safetensors").exists()
    return json.loads(job.result.read_text())


def test_a_real_run_is_recorded_with_everything_that_it_takes_to_judge_it(world, tmp_path, monkeypatch):
    hits = []
    load = experiments.load_features
    monkeypatch.setattr(experiments, "load_features", lambda policy, folder: (load(policy, folder),
                                                                             hits.append(len(policy.features))))
    run = tiny_run(world)
    result = in_process(run, tmp_path)
    assert hits == [3]  # the clips came encoded
    assert result["rollouts"] == 16 and result["updates"] == 4 and result["curve"]["step"] == [1, 2]
    assert result["accuracy"]["L1"]["n"] == 6 and len(result["answers"]["L1"]) == 6
    assert result["sampled"]["L1"]["n"] == 3 and set(result["accuracy"]["L1"]["by_type"]) == {"colour", "order"}
    assert {"table", "row", "method", "seed", "config", "seconds", "versions", "commit", "command", "machine",
            "date"} <= set(result)
    assert str(tmp_path) not in json.dumps(result)
    base = report.read_base(tmp_path, result["base"])
    assert base["questions"]["L1"] == {"clip": [0, 0, 1, 1, 2, 2], "type": ["colour", "order"] * 3}
    assert find_recorded(run, experiments.fingerprints(run.config), read_runs(tmp_path)) is not None
    again = in_process(run, tmp_path / "again")
    assert again["answers"] == result["answers"] and again["curve"] == result["curve"]


def test_a_killed_run_goes_on_from_its_checkpoint(world, tmp_path, monkeypatch):
    from dvr1_lite.training import Trainer

    run = tiny_run(world)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, save_every=1))
    whole, step, steps = in_process(run, tmp_path / "whole"), Trainer._step, []

    def dying_step(trainer):
        if steps == [0]:
            raise RuntimeError("killed")
        steps.append(trainer.step)
        return step(trainer)

    monkeypatch.setattr(Trainer, "_step", dying_step)
    with pytest.raises(RuntimeError):
        in_process(run, tmp_path / "killed")
    assert read_runs(tmp_path / "killed") == {}
    monkeypatch.setattr(Trainer, "_step", lambda trainer: (steps.append(trainer.step), step(trainer))[1])
    [spec] = (tmp_path / "killed" / ".work" / "table4").glob("*/spec.json")
    assert perform(spec) == 0 and steps == [0, 1]
    [resumed] = read_runs(tmp_path / "killed").values()
    assert resumed["answers"] == whole["answers"] and resumed["curve"] == whole["curve"]


@pytest.mark.slow
def test_a_recorded_run_is_the_same_again_from_its_json(world, tmp_path):
    result = in_process(tiny_run(world), tmp_path)
    [name] = read_runs(tmp_path)
    told = []
    assert rerun(tmp_path / name, tmp_path / "again", told.append) and "every answer is the same" in told[-1]
    assert result["row"] == "Reg-GRPO"


def test_rerun_of_something_else_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ConfigError, match="not the JSON of a recorded run"):
        rerun(tmp_path / "x.json", tmp_path / "again")


# --- the command line ------------------------------------------------------------------------------------------------


def test_commands_pass_their_options_on(monkeypatch, capsys):
    from dvr1_lite import __main__ as cli

    asked = []
    monkeypatch.setattr(experiments, "reproduce", lambda *given: asked.append(given) or ["x"] * (given[0] == "table5"))
    assert cli.main(["reproduce", "table4", "--seeds", "3", "--jobs", "2", "--quick", "--out", "there"]) == 0
    assert asked == [("table4", "there", 3, 2, True)]
    assert cli.main(["reproduce", "table5"]) == 1  # a run failed
    for wrong in (["table4", "--seeds", "0"], ["table4", "--jobs", "-1"], [], ["table4", "--rerun", "x.json"]):
        assert cli.main(["reproduce", *wrong]) == 2
    monkeypatch.setattr(report, "report", lambda names, out: [Path("a.png")] if names == ["table4"] else [])
    assert cli.main(["report", "table4", "--out", "there"]) == 0
    assert "a.png" in capsys.readouterr().out
