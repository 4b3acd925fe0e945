r"""Two processes on a CPU (gloo): the run of one process with all the prompts, written once, resumed by any number."""

import json
import os
import socket
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import small_config, write_world

from dvr1_lite import memory, parallel
from dvr1_lite.config import CONFIGS, card_settings, load_config, to_yaml
from dvr1_lite.errors import ConfigError
from dvr1_lite.training import comparable

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("parallel_worker.py")
LAUNCHES = sorted((CONFIGS / "accelerate").glob("*.yaml"))


def launch(config, folder, count, *words, divided=False) -> None:
    r"""Runs `count` processes with the environment that `accelerate launch` gives them; all must succeed."""
    file = folder / f"{Path(config.out).name}.yaml"
    file.write_text(to_yaml(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if count > 1:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
                   "ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": str(divided)}
    own = [{"RANK": str(i), "LOCAL_RANK": str(i)} if count > 1 else {} for i in range(count)]
    children = [subprocess.Popen([sys.executable, str(WORKER), str(file), *words], text=True, stderr=subprocess.PIPE,
                                 stdout=subprocess.PIPE, env=shared | mine) for mine in own]
    try:
        told = [child.communicate(timeout=240)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * count, "\n".join(told)[-4000:]


def lines(config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]


def close(one, other) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other):
        for name in a.keys() - {"seconds", "machine"}:
            same = b[name] is None if a[name] is None else b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6)
            assert same, (a["step"], name, a[name], b[name])


def adapter(config) -> torch.Tensor:
    weights = load_file(Path(config.out) / "adapter" / "adapter_model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), clips=4)


def config_for(world, out, **changes):
    return small_config(world, out, **({"prompts_per_step": 4, "quantization": "none", "steps": 3, "history_window": 8,
                                        "hint_traces": 3, "micro_batch": 3, "eval_limit": 5, "eval_batch": 2}
                                       | changes))


@pytest.fixture(scope="module")
def alone(world):
    r"""The run of one process."""
    config = config_for(world, world / "one")
    launch(config, world, 1)
    assert len(lines(config)) == 3
    return config


@pytest.fixture(scope="module")
def pair(world):
    r"""The run of two processes, each with the whole model. Of five questions one answers three, one two."""
    config = config_for(world, world / "two")
    launch(config, world, 2, "unmerged")
    return config


def test_two_processes_make_the_run_of_one(alone, pair):
    config = pair
    close(lines(alone), lines(config))
    assert any(line["augmented"] for line in lines(config)) and lines(config)[-1]["grad_norm"] > 0
    torch.testing.assert_close(adapter(config), adapter(alone), rtol=1e-3, atol=1e-5)
    one, two = (json.loads((Path(c.out) / "summary.json").read_text()) for c in (alone, config))
    for name in ("before", "after", "change", "rollouts", "updates", "step", "complete"):
        assert one[name] == two[name], name
    answers = [(Path(c.out) / "evaluation" / "after_L1.jsonl").read_text() for c in (alone, config)]
    assert answers[0] == answers[1] and answers[0].count("\n") == two["after"]["L1"]["n"]
    assert {path.name for path in (Path(config.out) / "evaluation").iterdir()} == {"before_L1.jsonl", "after_L1.jsonl"}
    assert len(list((Path(config.out) / "checkpoints").iterdir())) == config.keep_checkpoints


def test_groups_that_cannot_be_shared(world, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="prompts_per_step is 4 and there are 3 processes"):
        parallel.TeamTrainer(config_for(world, world / "never"), world / "never")


# --- divided weights -------------------------------------------------------------------------------------------------


def of_shards(config) -> list[dict]:
    return [json.loads((Path(config.out) / f"shards_{rank}.json").read_text()) for rank in range(2)]


def test_divided_weights_make_the_same_run_to_the_bit(world, pair):
    config = config_for(world, world / "divided")
    launch(config, world, 2, "unmerged", divided=True)
    assert [comparable(line) for line in lines(config)] == [comparable(line) for line in lines(pair)]
    assert torch.equal(adapter(config), adapter(pair))
    for name in ("before_L1", "after_L1"):
        one, two = ((Path(c.out) / "evaluation" / f"{name}.jsonl").read_text() for c in (config, pair))
        assert one == two and one.count("\n") == 5
    one, two = of_shards(config)
    matrices = memory.weight_bytes(memory.architecture_of(config.model), "none", "float32")["language layers"]
    assert one["bytes"] == two["bytes"] and 0.45 * matrices < one["bytes"] <= 0.5 * matrices  # norms, biases are whole
    assert one["met"] == two["met"] > max(one["wanted"], two["wanted"])  # the same collectives, and some for the other
    assert one["wanted"] != two["wanted"]  # they do not walk in step


def test_a_run_of_two_with_divided_weights_is_resumed_by_one_without(world, alone):
    config = config_for(world, world / "undivided", gradient_checkpointing=True)
    half = config_for(world, world / "undivided", gradient_checkpointing=True, steps=2, eval_files={})
    launch(half, world, 2, divided=True)
    folder = Path(config.out)
    (folder / "config.yaml").write_text(to_yaml(config))  # as if it had been stopped after its second step
    (folder / "summary.json").unlink()
    launch(config, world, 1, "resume")
    close(lines(alone), lines(config))
    torch.testing.assert_close(adapter(config), adapter(alone), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("asked", "changes", "told"), [
    ({"ACCELERATE_USE_FSDP": "true"}, {"quantization": "nf4"}, "nf4 packs weights.*ddp.yaml.*6.4 GB"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params.*false"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DEEPSPEED.*the adapter's only.*fsdp.yaml"),
])
def test_what_the_launcher_may_not_ask_for(world, monkeypatch, asked, changes, told):
    for name, value in ({"WORLD_SIZE": "2"} | asked).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=told):
        parallel.TeamTrainer(config_for(world, world / "never", **changes), world / "never")


def test_interleaving_is_the_order_of_the_records():
    assert parallel.interleave([["a", "c"], ["b", "d"]]) == ["a", "b", "c", "d"]


# --- the launcher's files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", LAUNCHES, ids=lambda file: file.stem)
def test_the_launcher_knows_every_key_of_the_shipped_files(file):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils import DistributedType

    loaded = load_config_from_file(str(file))  # an unknown key on the first level is its error
    known = vars(launch_command_parser().parse_args(["train.py"]))
    assert set(loaded.fsdp_config) <= known.keys()
    assert loaded.num_processes % loaded.num_machines == 0 and loaded.mixed_precision == "no"
    assert (loaded.distributed_type == DistributedType.FSDP) == bool(loaded.fsdp_config)


def test_the_shipped_files_are_packed():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["dvr1_lite"]
    packed = {path for pattern in patterns for path in CONFIGS.parent.glob(pattern)}
    assert packed == {path for path in CONFIGS.rglob("*") if path.is_file()}
    assert {file.stem for file in LAUNCHES} == {"ddp", "two_machines", "fsdp", "cpu_two"}


# --- the page --------------------------------------------------------------------------------------------------------


def rows_of_the_page() -> list[str]:
    r"""The rows and numbers of notebooks/SCALING.md that follow from the models' sizes."""
    models = [memory.architecture_of(f"Qwen/Qwen2.5-VL-{size}-Instruct") for size in ("3B", "7B")]
    group, length, prompt, ring, shards, passes = 8, 512, 1446, 8, 4, 512 + 2 + 2 * 4
    adapters = [memory.adapter_shapes(m, 16) for m in models]
    both = lambda text, *columns: f"| {text} | " + " | ".join(columns) + " |"
    each = lambda values, form: [form.format(value) for value in values]
    told = group * length * (3 * 4 + 1)
    gradients = [2 * (ring - 1) / ring * 4 * sum(sizes) for sizes in adapters]
    whole = [2 * m.matrix_parameters for m in models]
    received = [(shards - 1) / shards * size for size in whole]
    read = [2 * (m.matrix_parameters + (m.head or m.embeddings)) for m in models]
    cached = [2 * 2 * m.key_width * m.layers * group * (prompt + length // 2) for m in models]
    seconds = [length * (a + b) / 2.0e12 for a, b in zip(read, cached)]
    flop = [2 * (m.matrix_parameters * (prompt + group * length) + (m.head or m.embeddings) * group * length)
            for m in models]
    seven = load_config("seed_bench_r1_qwen2_5_vl_7b", card_settings(24, models[1].name) | {"prompts_per_step": 1})
    plain = replace(seven, quantization="none")
    needs = [memory.predict(plain, on_gpu=True, shards=k).needed for k in (1, 2, 4, 8)]
    needs.append(memory.predict(replace(seven, prompts_per_step=4), on_gpu=True).needed)
    means = [memory.optimizer_bytes(sizes, "adamw") / 1e6 for sizes in adapters]
    late = [f"{100 * (1 - 0.98**n):.0f} %" for n in (8, 32, 256)]
    t4 = [memory.predict(load_config(f"seed_bench_r1_{name}", card_settings(16, model) | {"dtype": "float32"}),
                         on_gpu=True).needed / memory.GB
          for name, model in (("qwen2_vl_2b", "Qwen/Qwen2-VL-2B-Instruct"), ("qwen2_5_vl_3b", models[0].name))]
    return [
        both("log-probs (new, old, reference) and mask of its group, to each other process", "an update",
             *each([told / 1e6] * 2, "{:.3f} MB")),
        both("gradient of the adapter (ring, 8 processes)", "an update",
             *each([g / 1e6 for g in gradients], "{:.0f} MB")),
        both("**together** (8 processes, two updates)", "a step",
             *each([2 * (g + 7 * told) / 1e6 for g in gradients], "{:.0f} MB")),
        both("received a pass", *each([size / 1e9 for size in received], "{:.1f} GB")),
        both("received a step", *each([passes * size / 1e12 for size in received], "{:.1f} TB")),
        both("at 300 GB/s (NVLink of an A100)", *each([passes * size / 300e9 for size in received], "{:.0f} s")),
        both("at 25 GB/s (PCIe 4, 200 Gb/s network)", *each([passes * size / 25e9 for size in received], "{:.0f} s")),
        "| | " + " | ".join(f"{need / memory.GB:.1f}" for need in needs) + " |",
        both("weights read for a token (language layers, output head)", *each([x / 1e9 for x in read], "{:.1f} GB")),
        both("the group's keys and values, completions half written", *each([x / 1e9 for x in cached], "{:.2f} GB")),
        both("at least, for 512 tokens", *each(seconds, "{:.1f} s")),
        both("at most, tokens a second", *each([round(group * length / s, -2) for s in seconds], "{:,.0f}")),
        both("arithmetic of a pass over prompt and completions", *each([x / 1e12 for x in flop], "{:.0f} TFLOP")),
        both("reference and two updates, 7 passes at 40 % of the peak",
             *each([7 * x / (0.4 * 312e12) for x in flop], "{:.1f} s")),
        "{:.0f} MB for the 3B and {:.0f} MB for the 7B".format(*means),
        "{:.0f} and {:.0f} MB more".format(*(4 * sum(sizes) / 1e6 for sizes in adapters)),
        "{:.1f} GB for the 3B and {:.1f} GB for the 7B".format(*(size / 1e9 for size in whole)),
        "in {} of steps, one of 32 in {}, one of 256 in {}".format(*late), "2B needs {:.1f}, 3B {:.1f}".format(*t4)]


def test_the_page_says_what_follows_from_the_sizes():
    page = " ".join((ROOT / "notebooks/SCALING.md").read_text(encoding="utf-8").split())
    assert [row for row in rows_of_the_page() if row not in page] == []
