"""Student projects are listed from the experiments themselves: none is forgotten, none that is recorded is offered."""

import sys
from pathlib import Path

from dvr1_lite.experiments import BEYOND, EXPERIMENTS, fingerprints, plan, read_settings, saved_config

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
from projects import LOOK_AT, alike, projects  # noqa: E402


def test_every_experiment_beyond_the_paper_says_what_to_look_at():
    assert list(LOOK_AT) == [one.name for one in BEYOND]


def test_a_project_counts_the_runs_that_are_missing(tmp_path):
    done = [one.name for one in BEYOND if one.name != "eps"]
    runs = plan(EXPERIMENTS["eps"], settings=read_settings(tmp_path))
    recorded = {f"eps/{i}.json": {"table": "eps", "seed": run.seed, "method": run.config.method,
                                  "config": saved_config(run.config), "inputs": fingerprints(run.config),
                                  "sampled_limit": run.sampled_limit, "seconds": {"process": 120.0}}
                for i, run in enumerate(runs[:4])}
    [told] = projects(tmp_path, recorded, done)
    assert told.startswith("eps: ") and "reproduce eps --jobs 2" in told
    assert f"{len(runs) - 4} runs to make, about {2 * (len(runs) - 4)} core-minutes" in told
    assert list(alike(runs[1], recorded)) == ["eps/1.json"]
