r"""Runs: found again, never repeated, resumed, recorded with everything it takes to judge them, and made again."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from dvr1_lite.config import make_config
from dvr1_lite.errors import ConfigError, UserError
from dvr1_lite.files import data_folder
from dvr1_lite.lab import runner
from dvr1_lite.lab.runner import (
    Job, Run, base_key, choose_settings, fingerprints, make_runs, plan, read_settings, recorded_seeds, reproduce, rerun,
    same_config, saved_config, thin,
)
from dvr1_lite.lab.tables import EXPERIMENTS, read_runs

RESULTS = data_folder() / "results"
PRINTS = {"model": "m", "train": "t", "L1": "1"}
posix = pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")


@pytest.fixture(scope="module")
def recorded():
    return read_runs(RESULTS)


@pytest.mark.parametrize("name", ["phase_F3", "phase_F4", "phase_A3"])
def test_recorded_runs_are_found_by_todays_plan(name, recorded):
    used = json.loads((RESULTS / name / "aggregate.json").read_text(encoding="utf-8"))["runs"]
    runs = plan(EXPERIMENTS[name], 1, read_settings(RESULTS))
    prints = fingerprints(runs[0].config)
    for run in runs:
        found = {str(seed): file for seed, file in recorded_seeds(run, prints, recorded).items()}
        assert found == used[run.row] and found
        old = recorded[used[run.row]["0"]]
        assert base_key(run.config, prints, run.sampled_limit) == old["base"] and old["inputs"] == prints
        assert recorded_seeds(run, prints | {"model": "another"}, recorded) == {}


def test_recorded_runs_can_be_made_again_from_their_config_and_name_no_folder(recorded):
    assert len(recorded) >= 18
    for name, run in list(recorded.items())[::4]:
        assert same_config(run["config"], make_config(run["config"]))
        assert not re.search(r'"(/|[A-Z]:\\\\|~)', (RESULTS / name).read_text(encoding="utf-8"))


def test_a_changed_config_is_another_run_and_other_questions_are_another_base():
    config = plan(EXPERIMENTS["table4"], 1)[0].config
    saved = json.loads(json.dumps(saved_config(config)))
    assert same_config(saved, config) and same_config(saved | {"save_every": 7, "attention": "sdpa"}, config)
    for change in ({"beta": 0.9}, {"attention": "eager"}, {"no_such_field": 1}):
        assert not same_config(saved | change, config)
    older = {name: value for name, value in saved.items() if name != "noise_scale"}
    assert same_config(older, config)  # recorded before the field existed: its default
    assert not same_config(older, dataclasses.replace(config, noise_scale=1.5))
    key = base_key(config, PRINTS, 600)
    for same in ({"method": "rloo"}, {"seed": 3}, {"lora_rank": 2}):
        assert base_key(dataclasses.replace(config, **same), PRINTS, 600) == key
    for other in ({"num_frames": 4}, {"eval_limit": 7}, {"judge": "first-letter"}):
        assert base_key(dataclasses.replace(config, **other), PRINTS, 600) != key
    assert base_key(config, PRINTS, 0) != key != base_key(config, PRINTS | {"L1": "2"}, 600)


def test_settings_are_chosen_by_the_tuning_split_alone():
    def run(rate, beta, accuracy, **config):
        config = {"method": "grpo", "learning_rate": rate, "beta": beta, "augment": "none"} | config
        return {"method": "grpo", "config": config, "accuracy": {"tune": {"accuracy": accuracy}}}

    hinted = {"augment": "both", "hint_update": "hinted", "hint_max": 0.6, "noise_scale": 1.5}
    chosen = choose_settings([run(1e-3, 0.1, 0.5), run(1e-3, 0.1, 0.7), run(3e-3, 0.1, 0.6), run(1e-3, 0.4, 0.6),
                              run(1e-4, 0.4, 0.8, **hinted), run(1e-4, 0.4, 0.9, **hinted | {"hint_max": 1.0})])
    assert chosen["grpo"]["chosen"] == {"learning_rate": 1e-3, "beta": 0.4}  # all at 0.6: smaller rate, larger weight
    assert chosen["grpo"]["grid"][1] == {"learning_rate": 1e-3, "beta": 0.1, "accuracy": 0.6, "seeds": 2}
    assert chosen["grpo, hinted"]["chosen"] == {"learning_rate": 1e-4, "hint_max": 1.0, "noise_scale": 1.5}


def test_curves_are_thinned_by_hand():
    metrics = [{"step": i + 1, "rollouts": 64 * (i + 1), "reward": float(i), "kl": None if i < 2 else 0.5}
               for i in range(5)]
    assert thin(metrics, points=3) == {"step": [2, 4, 5], "rollouts": [128, 256, 320], "reward": [0.5, 2.5, 4.0],
                                       "kl": [None, 0.5, 0.5]}


# --- making runs with stand-ins for the training ---------------------------------------------------------------------

WORKER = """
import json, os, pathlib, sys, yaml
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(options.get("--resume") or options["--out"])
if "--config" in options:
    out.mkdir()
    (out / "config.yaml").write_text(pathlib.Path(options["--config"]).read_text())
config = yaml.safe_load((out / "config.yaml").read_text())
when, augmented = "after" if config["steps"] else "before", config["augment"] != "none" and config["steps"]
with open(out.parents[2] / "made.txt", "a") as file:
    file.write(f"{config['method']} {config['augment']} {sorted(options)[-1]}\\n" if config["steps"] else "base\\n")
{fail}
(out / "evaluation").mkdir()
for name in config["eval_files"]:
    row = {"index": 0, "clip": "c", "question_type": "t", "accuracy": 1.0, "format": 1.0, "iou": None}
    (out / "evaluation" / f"{when}_{name}.jsonl").write_text(json.dumps(row) + "\\n")
counts = dict.fromkeys(("hard", "easy", "hints_found", "hints_missing", "augmented"), 1)
(out / "metrics.jsonl").write_text(json.dumps(counts | {"step": 1, "rollouts": 64}) + "\\n")
(out / "summary.json").write_text(json.dumps({"complete": True, "step": 1, "rollouts": 64, "updates": 4, "seconds": {},
                                              "skipped_clips": 0, "peak_memory_gb": 1.0, "versions": {}}))
"""


@pytest.fixture
def workers(monkeypatch, tmp_path):
    r"""Stand-ins that record at once; `fail` is code that runs first. Returns the function that changes it, and `made`,
    the list of what was started."""
    def use(fail: str) -> None:
        program = WORKER.replace("{fail}", fail)
        monkeypatch.setattr(runner, "worker_command", lambda options: [sys.executable, "-c", program, *options])

    made = tmp_path / "results" / ".work" / "made.txt"
    use.made = lambda: made.read_text().split("\n")[:-1] if made.exists() else []
    monkeypatch.setattr(runner, "fingerprints", lambda config: PRINTS)
    use("")
    return use


@posix
@pytest.mark.parametrize(("fail", "reason"), [
    ("sys.exit('error: the disk is full')", "error: the disk is full"),
    ("os.kill(os.getpid(), 9)", "killed by signal 9 (SIGKILL); the same command resumes it")])
def test_finished_runs_are_never_repeated_and_failed_ones_named_and_resumed(fail, reason, workers, tmp_path, capsys):
    workers(f"if augmented and config['method'] == 'grpo': {fail}")
    results = tmp_path / "results"
    outcome = reproduce("table4", results, 1, 2)
    assert outcome.failed == ["table4: GRPO + DA, seed 0"] and outcome.results == results
    assert set(outcome.used["table4"]) == {"GRPO", "Reg-GRPO", "Reg-GRPO + DA"} and len(read_runs(results)) == 3
    assert f"failed: table4: GRPO + DA, seed 0: {reason}" in capsys.readouterr().out
    assert workers.made()[0] == "base" and len(workers.made()) == 5
    workers("")
    assert reproduce("table4", results, 1, 2).failed == []
    assert workers.made()[5:] == ["grpo both --resume"]  # only the one that failed, in the folder that it left
    reproduce("table8", results, 1)
    assert workers.made()[6:] == ["reg-grpo both --out"]  # "none" and "adaptive" are runs of table 4


def test_another_base_model_is_evaluated_and_named_in_the_command(workers, tmp_path):
    workers("assert config['model'] == 'runs/other', config['model']")
    made = reproduce("table4", tmp_path / "results", 1, rows=("GRPO + DA", "Reg-GRPO"), model="runs/other")
    assert made.failed == [] and set(made.used["table4"]) == {"GRPO + DA", "Reg-GRPO"}
    assert workers.made() == ["base", "grpo both --out", "reg-grpo none --out"]
    runs = read_runs(tmp_path / "results").values()
    assert {run["command"] for run in runs} == {
        "python -m dvr1_lite reproduce table4 --seeds 1 --rows 'GRPO + DA' Reg-GRPO --model runs/other"}
    assert {run["config"]["model"] for run in runs} == {"runs/other"}
    made = reproduce("table4", tmp_path / "results", 1, rows=("GRPO",), model="runs/other")
    assert list(made.used["table4"]) == ["GRPO", "GRPO + DA", "Reg-GRPO"]  # with the rows that were there before


def test_each_process_gets_its_config_and_one_thread(workers, tmp_path):
    workers("assert os.environ['OMP_NUM_THREADS'] == '1' == os.environ['TQDM_DISABLE'], 'threads'\n"
            "assert config['eval_before'] == (not config['steps']), 'eval_before'\n"
            "assert config['eval_sampled_limit'] == 600 and not config['figures'], 'switches'\n"
            "assert pathlib.Path(config['feature_folder']).parent.name == 'features', 'folder'\n")
    assert reproduce("table6", tmp_path / "results", 1).failed == []
    [run] = [run for run in read_runs(tmp_path / "results").values() if run["row"] == "relative"]
    assert run["answers"] == {"L1": "1", "L2": "1", "L3": "1"} and run["augmentation"]["hard"] == 1
    assert run["method"] == "reg-grpo" and run["sampled_limit"] == 600 and run["seconds"]["process"] > 0
    workers("sys.exit('error: no such model')")
    with pytest.raises(UserError, match="base model cannot be evaluated: error: no such model"):
        reproduce("table6", tmp_path / "results", quick=True)
    assert len(read_runs(tmp_path / "results" / "quick")) == 0  # the quick runs' own folder


@posix
def test_ctrl_c_lets_every_worker_save(workers, tmp_path):
    workers("if config['steps']:\n    import signal, time\n"
            "    signal.signal(signal.SIGINT, lambda *_: ((out / 'saved').write_text(''), sys.exit(130)))\n"
            "    (out / 'ready').write_text('')\n    time.sleep(60)")

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and len(list(tmp_path.rglob("ready"))) < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    try:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            reproduce("table4", tmp_path / "results", 1, 2)
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(list(tmp_path.rglob("saved"))) == 2


@posix
def test_a_worker_ends_with_the_process_that_started_it():
    child = ("from dvr1_lite.lab.runner import end_with_parent; import time; end_with_parent(); time.sleep(2.5); "
             "print('alive')")
    found = []
    for parent in ("0", str(os.getpid())):  # no process has the id 0: the parent has ended
        made = subprocess.run([sys.executable, "-c", child], env=os.environ | {runner.PARENT: parent}, text=True,
                              stdout=subprocess.PIPE, timeout=120)
        found.append((made.stdout.strip(), made.returncode))
    assert found == [("", 1), ("alive", 0)]


@pytest.mark.slow
def test_a_real_run_is_recorded_resumed_and_made_again(tmp_path, capsys):
    lines = (data_folder() / "toyvideoqa" / "L1.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    (tmp_path / "six.jsonl").write_text("\n".join(lines) + "\n")
    config = make_config({
        "model": str(data_folder() / "base_model"), "train_file": str(tmp_path / "six.jsonl"),
        "eval_files": {"L1": str(tmp_path / "six.jsonl")}, "data_root": str(data_folder() / "toyvideoqa"), "steps": 2,
        "rollout_budget": 16, "prompts_per_step": 2, "group_size": 4, "inner_updates": 1, "augment": "none",
        "figures": False, "quantization": "none", "save_every": 1})
    small = Run("table4", "Reg-GRPO", 0, config, 3)  # two steps of the shipped model, six questions
    assert make_runs([small], tmp_path / "whole", 1, "command") == []
    [(name, whole)] = read_runs(tmp_path / "whole").items()
    assert whole["rollouts"] == 16 and whole["updates"] == 2 and whole["curve"]["step"] == [1, 2]
    assert whole["accuracy"]["L1"]["n"] == 6 and len(whole["answers"]["L1"]) == 6 and whole["sampled"]["L1"]["n"] == 3
    base = json.loads((tmp_path / "whole" / "base" / f"{whole['base']}.json").read_text())
    assert base["method"] == "base" and len(base["questions"]["L1"]["clip"]) == 6 and base["sampled"]["L1"]["n"] == 3
    assert recorded_seeds(small, fingerprints(small.config), read_runs(tmp_path / "whole")) == {0: name}
    assert not list((tmp_path / "whole" / ".work").glob("table4/*"))

    job = Job(small, fingerprints(small.config), tmp_path / "killed", "command")
    job.start()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list((job.folder / "run" / "checkpoints").glob("step_*1")):
        time.sleep(0.02)
    job.process.kill()
    job.process.wait()
    assert make_runs([small], tmp_path / "killed", 1, "command") == []
    [killed] = read_runs(tmp_path / "killed").values()
    assert killed["answers"] == whole["answers"] and killed["curve"] == whole["curve"]

    assert rerun(tmp_path / "whole" / name, tmp_path / "again")
    assert "every answer is the same" in capsys.readouterr().out


def test_rerun_of_something_else_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ConfigError, match="not the JSON of a recorded run"):
        rerun(tmp_path / "x.json", tmp_path / "again")
    with pytest.raises(ConfigError, match="an evaluation of the base model"):
        rerun(next((RESULTS / "base").glob("*.json")), tmp_path / "again")
