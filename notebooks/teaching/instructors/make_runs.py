r"""Make the four short runs of task 6 of the assignment: python notebooks/teaching/instructors/make_runs.py

All train the enumerable policy of `small_world.py` with Reg-GRPO; one setting differs in each. `DIAGNOSIS` of grade.py
says which is which. The results are the same on every machine to about 6 digits; they are stored with 4.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[1])]

import small_world  # noqa: E402
from dvr1_lite.advantages import vanishing_ratio  # noqa: E402
from dvr1_lite.config import ObjectiveConfig  # noqa: E402

RUNS = HERE.parent / "runs.json"
STEPS, UPDATES = 24, 4
SETTINGS = {"A": {"lr": 0.001}, "B": {"lr": 0.1}, "C": {"lr": 10.0}, "D": {"lr": 0.1, "rare": True}}


def run(lr: float, rare: bool = False) -> dict[str, list[float]]:
    """Train for `STEPS` steps and return the metrics of each, measured before its updates.

    rare: a completion is correct only if all of its three words are (not two), and the policy starts so decided that
    it almost never writes one that is.
    """
    parameters, correct = small_world.make_world([0])
    if rare:
        target = torch.tensor(np.random.default_rng(3).integers(0, small_world.WORDS, (1, small_world.PROMPTS, 1, 3)))
        correct = (small_world.COMPLETIONS == target).all(dim=-1).double()
        parameters = [(10 * part).detach().requires_grad_() for part in parameters]
    reference = small_world.token_logps(parameters).detach()
    adam, rng = torch.optim.Adam(parameters, lr=lr), np.random.default_rng(7)
    metrics: dict[str, list[float]] = {"reward": [], "kl": [], "vanishing": [], "vanishing_all_correct": []}
    for _ in range(STEPS):
        old = small_world.token_logps(parameters).detach()
        ids = small_world.sample(old, rng)
        rewards = correct.gather(2, ids)[0]
        shares = vanishing_ratio(rewards, 1.0)
        now = (rewards.mean().item(), small_world.exact_kl(old, reference).item(), shares["ratio"],
               shares["all_correct"])
        for name, value in zip(metrics, now):
            metrics[name].append(round(value, 4))
        for _ in range(UPDATES):
            adam.zero_grad()
            config = ObjectiveConfig("reg-grpo", beta=0.01)
            small_world.group_loss(ids, parameters, old, reference, correct, config).backward()
            adam.step()
    return metrics


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    RUNS.write_text(json.dumps({name: run(**settings) for name, settings in SETTINGS.items()}) + "\n", encoding="utf-8")
    print(f"wrote {RUNS}")
