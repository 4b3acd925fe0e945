r"""Grade submissions of ASSIGNMENT.ipynb with hidden tests; 20 points in six tasks.

    python notebooks/teaching/instructors/grade.py handed_in/*.ipynb --csv grades.csv --seed 2027

Of a submission only the cells with a line `# Task N` are run, after the cells `# Given` of the project's own
ASSIGNMENT.ipynb, each task in a process of its own with a time limit and an empty working folder. A file that is no
notebook, code that fails, ends the process, never returns or returns something else costs points, never an error here.
The inputs of the tests depend on --seed, so that stored results do not pass. This is no protection from malicious
code: grade strangers' files in a container.
"""

import argparse
import csv
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
ASSIGNMENT = HERE.parent / "ASSIGNMENT.ipynb"
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from dvr1_lite.advantages import group_advantages  # noqa: E402
from dvr1_lite.config import ObjectiveConfig  # noqa: E402
from dvr1_lite.lab.stats import paired_summary  # noqa: E402
from dvr1_lite.objectives import Batch, objective_loss  # noqa: E402

SECONDS = 60  # a task
MEMORY_GB, FILE_MB = 16, 100  # a task may use, where the operating system enforces it
TITLES = {1: "Advantages", 2: "Vanishing and difficulty", 3: "The loss of GRPO", 4: "The loss of Reg-GRPO",
          5: "A training step", 6: "Reading runs"}


@dataclass(frozen=True)
class Check:
    """One hidden test: its task, its points, what it tests, and a function of (answers, seed) that asserts."""

    task: int
    points: float
    what: str
    run: Callable[[dict[str, Any], int], None]


CHECKS: list[Check] = []


def check(task: int, points: float, what: str) -> Callable:
    """Register the decorated function as a hidden test."""
    def register(function: Callable[[dict[str, Any], int], None]) -> Callable:
        CHECKS.append(Check(task, points, what, function))
        return function

    return register


def close(mine: Any, expected: Any, tolerance: float = 1e-4) -> bool:
    """Compare numbers, lists or tensors element by element; the shapes must agree, too."""
    mine, expected = (torch.as_tensor(value, dtype=torch.float64).detach() for value in (mine, expected))
    return mine.shape == expected.shape and torch.allclose(mine, expected, rtol=tolerance, atol=tolerance)


def rewards_of(seed: int, groups: int = 6, size: int = 8) -> Tensor:
    """Rewards of 0, 1 or 2 in groups of which none vanishes, (B, G)."""
    rewards = torch.randint(0, 3, (groups, size), generator=torch.Generator().manual_seed(seed)).float()
    rewards[:, 0], rewards[:, 1] = 2.0, 0.0
    return rewards


def log_probs(seed: int, groups: int = 3, size: int = 4, tokens: int = 5, move: float = 0.1) -> tuple[Tensor, ...]:
    """Log-probs after a move of about `move` nats a token, those before it, and a mask of unequal lengths, (B, G, T)."""
    g = torch.Generator().manual_seed(seed)
    logp_old = -3 * torch.rand(groups, size, tokens, generator=g)
    logp = logp_old + move * torch.randn(groups, size, tokens, generator=g)
    lengths = torch.randint(1, tokens + 1, (groups, size, 1), generator=g)
    return logp, logp_old, (torch.arange(tokens) < lengths).float()


# --- the hidden tests ------------------------------------------------------------------------------------------------

@check(1, 1, "the advantages of one group, computed by hand")
def _(answers: dict, seed: int) -> None:
    for rewards, by_hand in (([1.0, 1, 0, 0], [1.0, 1, -1, -1]), ([2.0, 1, 1, 0], [2**0.5, 0, 0, -(2**0.5)])):
        assert close(answers["advantages"](torch.tensor([rewards]), 0.0), [by_hand]), f"rewards {rewards}"


@check(1, 1, "each group is normalised by itself, to mean 0")
def _(answers: dict, seed: int) -> None:
    rewards = rewards_of(seed)
    found = answers["advantages"](rewards, 1e-4)
    assert found.shape == rewards.shape and close(found.mean(dim=1), torch.zeros(len(rewards)))
    assert close(answers["advantages"](rewards[2:3], 1e-4), found[2:3]), "a group depends on the others"
    assert close(found[:, 0] > found[:, 1], torch.ones(len(rewards))), "the better completion needs the larger one"


@check(1, 0.5, "equal rewards give 0, with and without epsilon")
def _(answers: dict, seed: int) -> None:
    for eps in (1e-4, 0.0):
        assert close(answers["advantages"](torch.full((2, 8), 1.0), eps), torch.zeros(2, 8)), f"eps {eps}"


@check(1, 0.5, "epsilon is added to the std")
def _(answers: dict, seed: int) -> None:
    assert close(answers["advantages"](torch.tensor([[1.0, 1, 0, 0]]), 1.0), [[1 / 3, 1 / 3, -1 / 3, -1 / 3]])


@check(2, 1, "the vanishing ratio")
def _(answers: dict, seed: int) -> None:
    rewards = torch.cat([rewards_of(seed, 3), torch.full((1, 8), 2.0), torch.full((2, 8), 1.0), torch.zeros(2, 8)])
    assert close(answers["vanishing_ratio"](rewards), 5 / 8)


@check(2, 1, "the expected share of vanished groups is a mean over prompts")
def _(answers: dict, seed: int) -> None:
    rates = np.random.default_rng(seed).beta(0.5, 0.5, 40)
    for size in (2, 8):
        by_hand = sum(p**size + (1 - p) ** size for p in rates) / len(rates)
        assert close(answers["expected_vanishing"](rates.tolist(), size), by_hand), f"groups of {size}"


@check(2, 1, "difficulty by Eq. 9, over the last window of the history")
def _(answers: dict, seed: int) -> None:
    history = [1.0, 1.0, *np.random.default_rng(seed).random(10)]
    for group, window in (([0.0, 0.5, 0.5, 0.0], 10), ([1.0, 1.0, 1.0, 0.5], 4)):
        expected = float(np.mean(history[-window:])) - float(np.mean(group))
        assert close(answers["difficulty"](history, group, window), expected), f"window {window}"


def by_package(method: str, logp: Tensor, logp_old: Tensor, mask: Tensor, rewards: Tensor, **settings: Any) -> Tensor:
    """The loss of the package, without a KL term."""
    config = ObjectiveConfig(method, beta=0.0, **settings)
    return objective_loss(Batch(logp, logp_old, None, mask, rewards), config)


@check(3, 1, "the value, with padding and unequal lengths")
def _(answers: dict, seed: int) -> None:
    logp, logp_old, mask = log_probs(seed, move=0.3)
    rewards = rewards_of(seed, 3, 4)
    expected = by_package("grpo", logp, logp_old, mask, rewards, clip_eps=0.2)
    padded = torch.where(mask.bool(), logp, torch.tensor(-7.0))
    found = answers["grpo_loss"](padded, logp_old, mask, group_advantages(rewards), 0.2)
    assert close(found, expected), "is the mean over tokens, then over completions?"


@check(3, 1, "the gradient at the start")
def _(answers: dict, seed: int) -> None:
    _, logp_old, mask = log_probs(seed)
    advantages = group_advantages(rewards_of(seed, 3, 4))
    logp = logp_old.clone().requires_grad_()
    answers["grpo_loss"](logp, logp_old, mask, advantages, 0.2).backward()
    lengths = mask.sum(dim=-1, keepdim=True)
    assert close(logp.grad, -advantages[..., None] * mask / (lengths * advantages.numel()))


@check(3, 1, "clipping keeps the gradient that corrects a move in the incorrect direction")
def _(answers: dict, seed: int) -> None:
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    moved = torch.tensor([[0.5, -0.5, 0.5, -0.5]])[..., None].requires_grad_()
    answers["grpo_loss"](moved, torch.zeros(1, 4, 1), torch.ones(1, 4, 1), advantages, 0.2).backward()
    flat = (moved.grad.flatten() == 0).tolist()
    assert flat == [True, False, False, True], f"without a gradient: {flat}"


@check(4, 1, "the value")
def _(answers: dict, seed: int) -> None:
    logp, logp_old, mask = log_probs(seed, move=0.3)
    rewards = rewards_of(seed, 3, 4)
    expected = by_package("reg-grpo", logp, logp_old, mask, rewards, predicted_eps=0.05)
    assert close(answers["reg_grpo_loss"](logp, logp_old, mask, rewards, 0.05), expected)


@check(4, 1, "the gradient at the start is finite and 2/epsilon times the advantage")
def _(answers: dict, seed: int) -> None:
    _, logp_old, mask = log_probs(seed)
    rewards = rewards_of(seed, 3, 4)
    logp = logp_old.clone().requires_grad_()
    answers["reg_grpo_loss"](logp, logp_old, mask, rewards, 0.05).backward()
    assert logp.grad.isfinite().all(), "it is not finite where all log-ratios are 0"
    advantages = group_advantages(rewards)
    assert close(logp.grad, -2 / 0.05 * advantages[..., None] * mask / advantages.numel(), 1e-3)


@check(4, 1, "vanished groups have error 0 and count in the mean")
def _(answers: dict, seed: int) -> None:
    logp, logp_old, mask = log_probs(seed, groups=2, move=0.3)
    live = rewards_of(seed, 1, 4)
    alone = answers["reg_grpo_loss"](logp[:1], logp_old[:1], mask[:1], live, 0.1)
    both = answers["reg_grpo_loss"](logp, logp_old, mask, torch.cat([live, torch.ones(1, 4)]), 0.1)
    assert close(both, alone / 2), "one live group of two: half of the loss of the live one"


@check(4, 0.5, "by how much the first gradient is larger than that of GRPO")
def _(answers: dict, seed: int) -> None:
    assert close(answers["first_factor"], 2 / 0.02, 0.01)


@check(4, 0.5, "the loss of a group without epsilon, from its correlation")
def _(answers: dict, seed: int) -> None:
    assert close(answers["loss_at_three_quarters"], 2 * (1 - 0.75), 1e-3)


@check(5, 1, "groups are sampled from the policy")
def _(answers: dict, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 5, generator=g)
    actions = answers["sample_groups"](logits, 20_000, g)
    assert tuple(actions.shape) == (3, 20_000), f"the shape is {tuple(actions.shape)}, not (prompts, size)"
    shares = torch.stack([(actions == action).double().mean(dim=1) for action in range(5)], dim=1)
    assert (shares - logits.softmax(dim=-1)).abs().max() < 0.03


def reference_step(logits: Tensor, actions: Tensor, rewards: Tensor, updates: int, lr: float) -> Tensor:
    """Task 5 with the package: `updates` steps of gradient descent, old log-probs from before the first."""
    old = logits.log_softmax(dim=-1).gather(1, actions)[..., None]
    for _ in range(updates):
        logits = logits.detach().clone().requires_grad_()
        logp = logits.log_softmax(dim=-1).gather(1, actions)[..., None]
        by_package("reg-grpo", logp, old, torch.ones_like(old), rewards).backward()
        logits = logits.detach() - lr * logits.grad
    return logits


def step_inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    rewards = torch.cat([rewards_of(seed, 4), torch.ones(1, 8)])  # the last group has vanished
    return torch.randn(5, 6, generator=g), torch.randint(0, 6, (5, 8), generator=g), rewards


@check(5, 0.5, "one update")
def _(answers: dict, seed: int) -> None:
    inputs = step_inputs(seed)
    found = answers["training_step"](*(value.clone() for value in inputs), 1, 0.1)
    assert close(found, reference_step(*inputs, 1, 0.1))


@check(5, 1, "several updates on the same completions")
def _(answers: dict, seed: int) -> None:
    inputs = step_inputs(seed)
    found = answers["training_step"](*(value.clone() for value in inputs), 4, 0.1)
    assert close(found, reference_step(*inputs, 4, 0.1)), "do the old log-probs stay those before the first update?"


@check(5, 0.5, "the given logits and the prompts of vanished groups stay as they were")
def _(answers: dict, seed: int) -> None:
    logits, actions, rewards = step_inputs(seed)
    given = logits.clone()
    found = answers["training_step"](given, actions, rewards, 4, 0.1)
    assert close(given.detach(), logits, 1e-7), "the given logits were changed"
    assert close(found[-1], logits[-1], 1e-6), "the policy of a vanished group moved"
    assert not close(found[0], logits[0], 1e-3), "nothing was trained"


@check(5, 1, "training raises the reward in three new worlds")
def _(answers: dict, seed: int) -> None:
    for world in range(3):
        g = torch.Generator().manual_seed(1000 * seed + world)
        logits, table = torch.randn(12, 8, generator=g), (torch.rand(12, 8, generator=g) < 0.3).float()
        before = (logits.softmax(dim=-1) * table).sum(dim=-1).mean()
        for _ in range(40):
            actions = answers["sample_groups"](logits, 8, g)
            logits = answers["training_step"](logits, actions, table.gather(1, actions), 2, 0.5).detach()
        after = (logits.softmax(dim=-1) * table).sum(dim=-1).mean()
        assert after - before > 0.15, f"expected reward {before:.2f} before, {after:.2f} after"


DIAGNOSIS = {"A": "rate too small", "B": "healthy", "C": "collapsed", "D": "vanished"}


def diagnose(run: str) -> Callable[[dict, int], None]:
    def one(answers: dict, seed: int) -> None:
        assert str(answers["diagnosis"][run]).strip().lower() == DIAGNOSIS[run]

    return one


for name in DIAGNOSIS:
    check(6, 0.25, f"what happened in run {name}")(diagnose(name))


@check(6, 1, "a paired 95 % interval over seeds")
def _(answers: dict, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for seeds in (3, 10):
        shared = rng.normal(70, 6, seeds)
        first, second = shared + rng.normal(2, 1, seeds), shared + rng.normal(0, 1, seeds)
        found = answers["paired_interval"](first.tolist(), second.tolist())
        assert close([float(end) for end in found], paired_summary((first - second).tolist(), 1)["ci"])


@check(6, 0.5, "the smallest detectable effect, with Bonferroni's correction")
def _(answers: dict, seed: int) -> None:
    for sd, seeds, claims in ((5.0, 5, 1), (5.0, 10, 4), (2.5, 20, 7)):
        sample = np.linspace(-1, 1, seeds)
        sample *= sd / sample.std(ddof=1)
        expected = paired_summary(sample.tolist(), claims)["detectable"]
        assert close(answers["detectable"](sd, seeds, claims), expected, 1e-3), f"{seeds} seeds, {claims} claims"


@check(6, 0.5, "the verdict that an interval allows")
def _(answers: dict, seed: int) -> None:
    for interval, word in (((0.2, 3.0), "same sign here"), ((-3.0, -0.1), "opposite sign here"),
                           ((-1.0, 4.0), "undecided here"), ((-0.1, 0.1), "undecided here")):
        assert answers["verdict"](interval) == word, f"interval {interval}"


# --- running a submission --------------------------------------------------------------------------------------------

def cells_of(path: Path, mark: str) -> list[str]:
    """Return the code cells that have a line beginning with `mark`, without notebook magics; raises for no notebook."""
    cells = json.loads(Path(path).read_bytes().decode("utf-8", "replace"))["cells"]
    code = ["".join(cell.get("source", "")) for cell in cells if cell.get("cell_type") == "code"]
    marked = [source for source in code if re.search(rf"(?m)^\s*{mark}\b", source)]
    return ["\n".join(line for line in source.split("\n") if line.lstrip()[:1] not in ("%", "!")) for source in marked]


def answers_of(path: Path, task: int) -> tuple[dict[str, Any], list[str]]:
    """Run the given cells, then the submission's cells of one task; return their names and the errors of the latter."""
    names: dict[str, Any] = {"__name__": "submission"}
    for source in cells_of(ASSIGNMENT, "# Given"):
        exec(compile(source, "given", "exec"), names)
    errors = []
    for source in cells_of(path, f"# Task {task}"):
        try:
            exec(compile(source, f"task {task}", "exec"), names)
        except BaseException as error:  # SystemExit and KeyboardInterrupt, too
            errors.append(f"the cell stops with {type(error).__name__}: {error}"[:200])
    return names, errors


def limit_resources() -> None:
    """Silence the output, close the input, and bound memory and files where the system can."""
    if hasattr(os, "setsid"):
        os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_GB * 2**30,) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_MB * 2**20,) * 2)
    except (ImportError, OSError, ValueError):
        pass


def run_task(path: str, task: int, seed: int, out: str, folder: str) -> None:
    """Write one JSON line for each hidden test of a task. The target of a process that may be killed at any moment."""
    torch.set_num_threads(1)
    limit_resources()
    os.chdir(folder)
    with open(out, "w", encoding="utf-8", buffering=1) as results:
        names, errors = answers_of(Path(path), task)
        for place, one in enumerate(CHECKS):
            if one.task != task:
                continue
            passed, note = True, ""
            try:
                one.run(names, seed)
            except AssertionError as error:
                passed, note = False, str(error).split("\n")[0]
            except KeyError as error:
                passed, note = False, errors[0] if errors else f"{error} is missing"
            except BaseException as error:
                passed, note = False, f"stops with {type(error).__name__}: {error}"
            note = "not attempted" if "NoneType" in note else note
            results.write(json.dumps([place, passed, note[:200]]) + "\n")


def start(*arguments: Any) -> multiprocessing.Process:
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload(["torch", "scipy.stats", "dvr1_lite.objectives", "dvr1_lite.lab.stats"])
    process = context.Process(target=run_task, args=arguments, daemon=True)
    process.start()
    return process


def stop(process: multiprocessing.Process) -> None:
    """End a process and what it started."""
    if hasattr(os, "killpg"):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
    process.kill()
    process.join()


def grade_task(path: Path, task: int, seed: int, seconds: float) -> dict[str, Any]:
    """Return the points of one task and a note for each test that was not passed."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        out = Path(folder) / "results.jsonl"
        (Path(folder) / "work").mkdir()
        process = start(str(path), task, seed, str(out), str(Path(folder) / "work"))
        process.join(seconds)
        late = process.is_alive()
        stop(process)
        lines = out.read_text(encoding="utf-8", errors="replace").splitlines() if out.exists() else []
    found = {}
    for line in lines:
        try:
            place, passed, note = json.loads(line)
            found[int(place)] = (bool(passed), str(note))
        except (TypeError, ValueError):  # cut off when the process ended, or written by the submission
            continue
    why = f"not finished in {seconds:.0f} s" if late else "the process ended before this test"
    points, notes = 0.0, []
    for place, one in enumerate(CHECKS):
        if one.task == task:
            passed, note = found.get(place, (False, why))
            points += one.points if passed else 0.0
            notes += [] if passed else [f"{one.points:g} {one.what}: {note}" if note else f"{one.points:g} {one.what}"]
    return {"points": points, "notes": notes}


def maximum(task: int | None = None) -> float:
    """The points of a task, or of the whole assignment."""
    return sum(one.points for one in CHECKS if task in (None, one.task))


def grade(path: Path, seed: int = 0, seconds: float = SECONDS) -> dict[str, Any]:
    """Grade one submission: `total`, `tasks` (points and notes of each) and `problem`, empty for a readable notebook."""
    path = Path(path).resolve()
    try:
        cells_of(path, "# Task")
    except Exception as error:
        empty = {task: {"points": 0.0, "notes": []} for task in TITLES}
        return {"total": 0.0, "tasks": empty, "problem": f"not a readable notebook ({type(error).__name__}: {error})"[:200]}
    tasks = {task: grade_task(path, task, seed, seconds) for task in TITLES}
    return {"total": math.fsum(found["points"] for found in tasks.values()), "tasks": tasks, "problem": ""}


def report(path: Path, found: dict[str, Any]) -> str:
    """Format a grade as text for the student: points of each task, and what was not passed."""
    lines = [f"{path}: {found['total']:g} of {maximum():g} points {found['problem']}".rstrip()]
    for task, title in TITLES.items():
        lines.append(f"  Task {task}, {title}: {found['tasks'][task]['points']:g} of {maximum(task):g}")
        lines += [f"    - {note}" for note in found["tasks"][task]["notes"]]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("submissions", nargs="+", type=Path)
    parser.add_argument("--csv", type=Path, help="also write the points of all submissions to this file")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs of the tests; use one number for a class")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"time limit of a task, default {SECONDS}")
    given = parser.parse_args(arguments)
    rows = []
    for path in given.submissions:
        found = grade(path, given.seed, given.seconds)
        print(report(path, found), flush=True)
        rows.append([path.name, *(found["tasks"][task]["points"] for task in TITLES), found["total"], found["problem"]])
    if given.csv:
        with given.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["file", *(f"task {task}" for task in TITLES), "total", "problem"], *rows])


if __name__ == "__main__":
    main()
