"""Experiments without recorded runs as student projects: question, command, price, and what to look at.

Names and questions are those of `dvr1_lite.lab.tables.BEYOND`; notebook 05 prints the list.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from dvr1_lite.lab.runner import NEUTRAL, Run, fingerprints, plan, read_settings, recorded_seeds, saved_config
from dvr1_lite.lab.tables import BEYOND

LOOK_AT = {
    "updates": "the rows with DA, beside table 4 at equal rollouts",
    "control": "vanishing ratio and accuracy: what is left above a second draw",
    "centred": "kl in the end: the same accuracy at less distance from the base?",
    "scale": "which of the two nuisances alone closes the gap",
    "eps": "rho_std beside eps: when does the loss stop being a policy gradient?",
    "inner": "the two methods at 1 update (in theory nearly equal), and at 8",
    "kl": "each method's best weight, and where it collapses",
    "clip": "loss and kl: the first update of a step is never clipped, the later ones may be",
    "window": "how many are called hard or easy in the first steps, when the history is short",
    "group": "vanishing ratio by group size, at the same rollouts",
    "easy": "vanishing_after_all_wrong: do masked groups fall through?",
    "hint": "vanishing_after_all_right and _all_wrong: too long, too short",
    "hint_update": "backwards: does the policy learn to try?",
    "std": "hard prompts, where one completion in eight is right",
    "reduction": "types with long answers (frames, path) beside short ones",
    "masking": "the last steps, when most groups vanish",
}


def projects(shelf: Path, recorded: Mapping[str, dict], done: Collection[str]) -> list[str]:
    """A paragraph for each experiment beyond the paper that is not in `done`.

    recorded: all recorded runs (`read_runs(shelf)`); runs that another table has made already cost nothing. The price
    is the number of runs to make times the mean time of a recorded run that is not part of the tuning.
    """
    seconds = [run["seconds"]["process"] for run in recorded.values() if run["table"] != "tune"]
    minutes, settings, prints, told = np.mean(seconds) / 60 if seconds else float("nan"), read_settings(shelf), None, []
    for one in BEYOND:
        if one.name in done:
            continue
        planned = plan(one, settings=settings)
        prints = prints or fingerprints(planned[0].config)
        missing = sum(run.seed not in recorded_seeds(run, prints, alike(run, recorded)) for run in planned)
        told.append(f"{one.name}: {one.question}\n"
                    f"    python -m dvr1_lite reproduce {one.name} --jobs 2\n"
                    f"    {missing} runs to make, about {minutes * missing:.0f} core-minutes\n"
                    f"    look at {LOOK_AT[one.name]}")
    return told


def alike(run: Run, recorded: Mapping[str, dict]) -> dict[str, dict]:
    """The recorded runs whose config reads like this run's: `recorded_seeds` takes long over many."""
    config = json.loads(json.dumps(saved_config(run.config)))
    matter = {name: value for name, value in config.items() if name not in NEUTRAL}
    return {file: old for file, old in recorded.items()
            if all(old["config"].get(name, value) == value for name, value in matter.items())}
