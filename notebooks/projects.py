"""Experiments without recorded runs as student projects: question, command, cost, and which numbers to look at.

Names and questions are those of `dvr1_lite.lab.tables.PROJECTS`; notebook 05 prints the list.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from dvr1_lite.lab.runner import NEUTRAL, Run, fingerprints, plan, read_settings, recorded_seeds, saved_config
from dvr1_lite.lab.tables import PROJECTS

LOOK_AT = {
    "centred": "accuracy, and kl at the end of training: is the same accuracy reached at less distance from the base?",
    "scale": "the KL weight and the sum over tokens separately: which of them accounts for the difference?",
    "eps": "rho_std beside eps: from which step on is the loss no longer a policy gradient?",
    "inner": "both methods at 1 update (nearly equal in theory) and at 8",
    "kl": "the best KL weight of each method, and the weight at which training collapses",
    "clip": "loss and kl: the first update of a step is never clipped, later ones may be",
    "window": "the number of hard and easy prompts in the first steps, while the history is short",
    "group": "the vanishing ratio by group size, at the same number of rollouts",
    "easy": "vanishing_after_all_wrong: do masked frames make groups all incorrect?",
    "hint": "vanishing_after_all_right and vanishing_after_all_wrong: hints that are too long or too short",
    "std": "prompts on which one completion in eight is correct",
    "reduction": "question types with long completions beside those with short ones",
    "masking": "the last steps, when most groups have vanished",
}


def projects(results: Path, recorded: Mapping[str, dict], done: Collection[str]) -> list[str]:
    """Return a paragraph for each project that is not in `done`.

    recorded: all recorded runs (`read_runs(results)`); runs that another experiment has made already cost nothing. The
    cost is the number of missing runs times the mean time of a recorded run that is not part of the tuning.
    """
    seconds = [run["seconds"]["process"] for run in recorded.values() if not run["table"].startswith("tune")]
    minutes, settings = np.mean(seconds) / 60 if seconds else float("nan"), read_settings(results)
    inputs, paragraphs = None, []
    for experiment in PROJECTS:
        if experiment.name in done:
            continue
        planned = plan(experiment, settings=settings)
        inputs = inputs or fingerprints(planned[0].config)
        missing = sum(run.seed not in recorded_seeds(run, inputs, alike(run, recorded)) for run in planned)
        cost = f", about {minutes * missing:.0f} core-minutes" if seconds else ""
        paragraphs.append(f"{experiment.name}: {experiment.question}\n"
                          f"    python -m dvr1_lite reproduce {experiment.name} --jobs 2\n"
                          f"    {missing} runs to make{cost}\n"
                          f"    look at {LOOK_AT[experiment.name]}")
    return paragraphs


def alike(run: Run, recorded: Mapping[str, dict]) -> dict[str, dict]:
    """Return the recorded runs whose config, seed included, reads like this run's; a quick filter for `recorded_seeds`."""
    config = json.loads(json.dumps(saved_config(run.config)))
    compared = {name: value for name, value in config.items() if name not in NEUTRAL}
    return {file: old for file, old in recorded.items()
            if all(old["config"].get(name, value) == value for name, value in compared.items())}
