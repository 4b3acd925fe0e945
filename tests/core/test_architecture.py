r"""The structure of the package: imports go one way, the training step stays on one page, the core stays small."""

import ast
import sys
import warnings
from pathlib import Path

import pytest
import torch

import dvr1_lite
from dvr1_lite.data import read_records
from dvr1_lite.loading import LoraSettings
from dvr1_lite.policy import Policy
from dvr1_lite.rollout import sample_groups
from dvr1_lite.run import load_policy
from dvr1_lite.training import Trainer
from tests.small_run import small_config, write_world
from tests.tiny import make_clip, write_model

PACKAGE = Path(dvr1_lite.__file__).parent
CORE = ("rewards", "advantages", "objectives", "augmentation", "data", "video", "policy", "rollout", "training")
OUTER = ("toy", "lab", "scale")  # packages around the core, which do not know each other
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
MOST_FUNCTIONS, MOST_FRAMES, MOST_LINES = 60, 2, 1600


def imports_of(module: str, source: str) -> list[tuple[str, bool]]:
    r"""List the package's own modules that a module imports, as dotted names without the package, and whether inside a
    function."""
    found, package = [], module.split(".")[:-1]

    def visit(node: ast.AST, inside: bool) -> None:
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.ImportFrom):
            start = package[:len(package) - node.level + 1] if node.level else []
            name = [*start, *(node.module or "").split(".")] if node.module else start
            own = node.level > 0 or name[0] == "dvr1_lite"
            name = name[1:] if node.level == 0 else name
            for full in [[*name, alias.name] for alias in node.names if own]:  # a module, or a name in one
                found.append((".".join(full if not name or ".".join(full) in MODULES else name), inside))
        elif isinstance(node, ast.Import):
            found.extend((alias.name.removeprefix("dvr1_lite").lstrip("."), inside) for alias in node.names
                         if alias.name.split(".")[0] == "dvr1_lite")
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


@pytest.mark.parametrize(("module", "source", "expected"), [
    ("training", "from .data import Record", [("data", False)]),
    ("lab.runner", "from ..config import TrainConfig\nfrom .tables import dump", [("config", False),
                                                                                  ("lab.tables", False)]),
    ("policy", "def f():\n    from .toy import world", [("toy.world", True)]),
    ("policy", "from . import files", [("files", False)]),
    ("policy", "from dvr1_lite.lab.runner import plan\nimport dvr1_lite.toy.world", [("lab.runner", False),
                                                                                    ("toy.world", False)]),
    ("policy", "import torch\nfrom collections import abc", [])])
def test_the_search_for_imports_finds_them(module, source, expected):
    assert imports_of(module, source) == expected


def test_imports_go_one_way():
    wrong = []
    for module, path in MODULES.items():
        home = module.split(".")[0]
        for target, inside in imports_of(module, path.read_text(encoding="utf-8")):
            outer = target.split(".")[0] in OUTER
            if module != "__main__" and (target == "__main__" or outer and target.split(".")[0] != home):
                wrong.append(f"{module} imports {target}")
            if module != "__main__" and inside:
                wrong.append(f"{module} imports {target} inside a function")
    assert wrong == []


@pytest.mark.xfail(sum(len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in CORE)
                   > MOST_LINES, reason="the core is still being shortened", strict=True)
def test_the_core_can_be_read_in_one_evening():
    lines = {name: len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in CORE}
    print(lines)
    assert sum(lines.values()) <= MOST_LINES, (sum(lines.values()), lines)


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    r"""Make a training step whose clips are encoded already; the package's functions that it enters, as (file, name),
    and the number of frames between `Trainer.step` and each `.backward()`."""
    folder, entered, depths, backward = tmp_path_factory.mktemp("step"), set(), [], torch.Tensor.backward
    config = small_config(write_world(folder / "world", clips=1), folder / "run", augment="none")
    trainer = Trainer(config, read_records(config.train_file), load_policy(config))
    trainer.step()

    def spy(self, *arguments, **options):
        frame, depth = sys._getframe(1), 0
        while frame.f_code is not Trainer.step.__code__:
            frame, depth = frame.f_back, depth + 1
        depths.append(depth)
        return backward(self, *arguments, **options)

    def profile(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)) and not code.co_name.startswith("<"):
            entered.add((Path(code.co_filename).stem, code.co_qualname))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", spy)
        sys.setprofile(profile)
        trainer.step()
        sys.setprofile(None)
    return entered, depths


def test_backward_is_called_near_the_training_step(step):
    assert step[1] and max(step[1]) <= MOST_FRAMES


def test_a_training_step_enters_few_functions(step):
    entered = step[0]
    print(f"{len(entered)} functions in {len({file for file, _ in entered})} files: {sorted(entered)}")
    assert len(entered) <= MOST_FUNCTIONS


def test_the_package_uses_nothing_that_is_deprecated(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy = Policy.load(write_model(tmp_path / "model"), lora=LoraSettings(2), gradient_checkpointing=True)
        prompts = [policy.prompt("what colour", policy.encode(make_clip(1)))]
        rollout = sample_groups(policy, prompts, 3, 5, generator=torch.Generator().manual_seed(0))
        policy.logprobs(prompts, rollout.completions, micro_batch=2).sum().backward()
        policy.save_adapter(tmp_path / "adapter")
        Policy.load(tmp_path / "model", adapter=tmp_path / "adapter")
    old = [f"{w.filename}:{w.lineno}: {w.message}" for w in caught
           if issubclass(w.category, (DeprecationWarning, PendingDeprecationWarning, FutureWarning))]
    assert [text for text in old if str(PACKAGE) in text or "past_key_values" in text] == []
