r"""Two processes on a CPU (gloo): the run of one process with as many prompts, written once, resumed by any number."""

import json
import socket
import tomllib
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dvr1_lite import distributed, training
from dvr1_lite.config import CONFIGS, ObjectiveConfig, to_yaml
from dvr1_lite.errors import ConfigError, UserError
from dvr1_lite.metrics import statistics
from dvr1_lite.objectives import METHODS, Batch
from dvr1_lite.run import comparable
from tests.reliability.killable import ROOT, needs_fork, start
from tests.reliability.parallel_worker import work
from tests.small_run import small_config, write_world

LAUNCHES = sorted((CONFIGS / "accelerate").glob("*.yaml"))


def launch(config, count, resume=False) -> list:
    r"""Train with `count` processes; what each returned or raised, or the negative number of its signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [start(work, config, rank, count, port, resume) for rank in range(count)]
    return [child.answer() for child in children]


def succeed(config, count, resume=False) -> None:
    for answer in launch(config, count, resume):
        assert isinstance(answer, dict) and answer["complete"], answer


def assert_same_run(config, other) -> None:
    r"""Compare metrics and adapter of two runs, but for rounding."""
    one, two = ([json.loads(line) for line in (Path(c.out) / "metrics.jsonl").read_text().splitlines()]
                for c in (config, other))
    assert len(one) == len(two) == 3 and sum(line["augmented"] for line in one) > 0 and one[-1]["grad_norm"] > 0
    for a, b in zip(one, two):
        a, b = ({name: -99 if value is None else value for name, value in comparable(line).items()} for line in (a, b))
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
    weights = [load_file(Path(c.out) / "adapter" / "adapter_model.safetensors") for c in (config, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, values in weights[0].items():
        torch.testing.assert_close(values, weights[1][name], rtol=1e-3, atol=1e-5)


def config_for(world, out, **changes):
    return small_config(world, out, **({"prompts_per_step": 4, "history_window": 8, "hint_traces": 3, "micro_batch": 3,
                                        "eval_limit": 5, "eval_batch": 2} | changes))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), clips=4)


@pytest.fixture(scope="module")
def alone(world):
    config = config_for(world, world / "one")
    succeed(config, 1)
    return config


@needs_fork
def test_two_processes_make_the_run_of_one(alone, world):
    config = config_for(world, world / "two")  # of five questions one process answers three, the other two
    succeed(config, 2)
    assert_same_run(alone, config)
    one, two = (json.loads((Path(c.out) / "summary.json").read_text()) for c in (alone, config))
    for name in ("before", "after", "change", "rollouts", "updates", "step", "complete"):
        assert one[name] == two[name], name
    answers = [(Path(c.out) / "evaluation" / "after_L1.jsonl").read_text() for c in (alone, config)]
    assert answers[0] == answers[1] and answers[0].count("\n") == two["after"]["L1"]["n"] == 5
    assert {path.name for path in (Path(config.out) / "evaluation").iterdir()} == {"before_L1.jsonl", "after_L1.jsonl"}
    assert len(list((Path(config.out) / "checkpoints").iterdir())) == config.keep_checkpoints


@needs_fork
def test_a_run_of_two_processes_is_resumed_by_one(alone, world):
    config, half = (config_for(world, world / "half", **changes) for changes in ({}, {"steps": 2, "eval_before": False,
                                                                                     "eval_files": {}}))
    succeed(half, 2)
    folder = Path(config.out)
    (folder / "config.yaml").write_text(to_yaml(config))  # as if it had been stopped after its second step
    (folder / "summary.json").unlink()
    succeed(config, 1, resume=True)
    assert_same_run(alone, config)


@needs_fork
def test_an_error_in_the_main_process_ends_all(world):
    config = config_for(world, world / "blocked", eval_files={})
    (world / "blocked").mkdir()
    (world / "blocked" / "config.yaml.part").mkdir()  # only the main process writes the config
    for answer in launch(config, 2, resume=True):
        assert isinstance(answer, UserError) and "config.yaml: cannot be written" in str(answer), answer


def test_groups_that_cannot_be_shared_are_refused(world, monkeypatch):
    monkeypatch.setattr(training, "processes", lambda device: SimpleNamespace(num_processes=3))
    with pytest.raises(ConfigError, match="prompts_per_step is 4 and there are 3 processes: give a multiple"):
        training.Trainer(config_for(world, world / "never"), [], None)


@pytest.mark.parametrize("method", METHODS)
def test_the_mean_of_the_processes_statistics_is_that_of_all_groups(method):
    generator, shape = torch.Generator().manual_seed(0), (2, 4, 6)
    old = -torch.rand(shape, generator=generator)
    logp = old + 0.3 * torch.randn(shape, generator=generator)
    lengths = torch.tensor([[6, 5, 6, 6], [1, 2, 1, 2]])  # the second process has far fewer tokens
    whole = Batch(logp, old, old - 0.1, torch.arange(6) < lengths[..., None],
                  torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 1.0, 2.0]]))
    parts = [Batch(*(getattr(whole, field.name)[at:at + 1] for field in fields(Batch))) for at in (0, 1)]
    config = ObjectiveConfig(method=method, clip_eps=0.05)
    expected, shares = statistics(whole, config), [statistics(part, config) for part in parts]
    for name in expected.keys() - {"correlation", "margin"}:  # which step_metrics weighs by groups with a spread
        assert expected[name] == pytest.approx(sum(share[name] for share in shares) / 2, abs=1e-6), name
    assert method not in ("grpo", "rloo") or 0 < expected["clip_fraction"] < 1


def test_an_error_of_the_main_process_is_the_others_error_too(monkeypatch):
    monkeypatch.setattr(distributed, "PartialState", lambda: SimpleNamespace(is_main_process=False, num_processes=2))
    monkeypatch.setattr(distributed, "gather", lambda value: ["OSError: disk full", value])
    with pytest.raises(UserError, match="the main process failed .OSError: disk full"):
        distributed.on_main(lambda: pytest.fail("not the main process"))


# --- the launcher's files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", LAUNCHES, ids=lambda file: file.stem)
def test_the_launcher_knows_every_key_of_the_shipped_files(file):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(file))  # an unknown key on the first level is its error
    assert loaded.num_processes % loaded.num_machines == 0 and loaded.mixed_precision == "no"


def test_the_shipped_files_are_packed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packed = {path for pattern in project["package-data"]["dvr1_lite"] for path in CONFIGS.parent.glob(pattern)}
    assert packed == {path for path in CONFIGS.rglob("*") if path.is_file()} and LAUNCHES
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "dvr1_lite").rglob("__init__.py")}
    assert folders == set(project["packages"])
