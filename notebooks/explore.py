r"""Writes into explore.html the cases by which the page checks its own formulas: python notebooks/explore.py

Each case is one group of 2 to 12: rewards, log-ratios, settings, and what `dvr1_lite` makes of them. A test computes
them again, and runs the page's formulas on many more where Node.js is installed.
"""

import json
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
from dvr1_lite.advantages import group_advantages, predicted_advantages  # noqa: E402
from dvr1_lite.config import ObjectiveConfig  # noqa: E402
from dvr1_lite.objectives import Batch, objective_loss  # noqa: E402

PAGE = FOLDER / "explore.html"
SLOT = re.compile(r'(<script type="application/json" id="cases">)(.*?)(</script>)', re.S)
FORMULAS = re.compile(r'<script id="formulas">(.*?)</script>', re.S)
CLIP = 0.2


def loss_and_push(rho: Tensor, rewards: Tensor, config: ObjectiveConfig) -> dict:
    """Return an objective's value for one group (1, G) of completions of one token, and minus its gradient by rho."""
    logp = rho[..., None].clone().requires_grad_()
    loss = objective_loss(Batch(logp, torch.zeros_like(logp), None, torch.ones_like(logp), rewards), config)
    return {"loss": loss.item(), "push": (-torch.autograd.grad(loss, logp)[0]).flatten().tolist()}


def expected(rewards: list[float], rho: list[float], settings: dict) -> dict:
    """Return what the page must show for a group, computed by the module in float64."""
    reward, ratio = (torch.tensor([row], dtype=torch.float64) for row in (rewards, rho))
    loss = lambda method, **extra: loss_and_push(ratio, reward, ObjectiveConfig(method, beta=0.0, **extra))
    return {
        "A": group_advantages(reward)[0].tolist(),
        "Ahat": predicted_advantages(ratio, settings["eps"])[0].tolist(),
        "grpo": loss("grpo"),
        "clipped": loss("grpo", clip_eps=CLIP),
        "reg": loss("reg-grpo", predicted_eps=settings["eps"], mask_vanished=settings["mask"]),
        "centred": loss("centred-regression", reward_lambda=settings["lambda"]),
        "unsampled": 1 - (settings["mass"] / len(rho) * ratio.exp()).sum().item(),
    }


def inputs(count: int, seed: int) -> list[dict]:
    """Return groups as a reader makes them: rewards of 0 and 1, log-ratios from -2 to 2; the first are special ones."""
    g = torch.Generator().manual_seed(seed)
    rewards = [[1.0, 0, 0, 1, 0, 0, 1, 0], [1.0] + 7 * [0.0], 8 * [0.0], 8 * [1.0], [0.0, 1.0]]
    rho = [8 * [0.0], 8 * [0.0], None, None, [0.3, 0.1]]
    sizes = torch.randint(2, 13, (max(count - 5, 0),), generator=g).tolist()
    rewards += [torch.randint(0, 2, (size,), generator=g).double().tolist() for size in sizes]
    rho += [None] * len(sizes)
    random = ((torch.rand(12, generator=g, dtype=torch.float64) - 0.5) * 4 for _ in rho)
    rho = [p or [round(x, 3) for x in more[:len(r)].tolist()] for r, p, more in zip(rewards, rho, random)]
    names, masses = ("eps", "lambda", "mask"), (0.3, 0.01, 0.9, 0.1)
    choices = [(eps, lam, mask) for mask in (True, False) for lam in (0.25, 0.5, 1.0, 2.0) for eps in (0.01, 0.1, 1.0)]
    return [{"rewards": r, "rho": p, "settings": dict(zip(names, choices[7 * k % len(choices)], strict=True)) | {
        "mass": masses[k % 4]}} for k, (r, p) in enumerate(zip(rewards, rho, strict=True))]


def rounded(value):
    """Round to nine digits after the point, in nested lists and dictionaries."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else round(value, 9) + 0.0


def cases() -> list[dict]:
    """Return the cases that the page holds."""
    return [case | {"expected": rounded(expected(**case))} for case in inputs(12, seed=0)]


def embedded(page: str) -> list[dict]:
    """Return the cases in the text of the page."""
    return json.loads(SLOT.search(page)[2])


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    lines = "[\n" + ",\n".join(json.dumps(case) for case in cases()) + "\n]"
    PAGE.write_text(SLOT.sub(lambda found: found[1] + lines + found[3], page), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
