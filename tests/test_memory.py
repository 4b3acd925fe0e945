r"""The memory calculator against what small models really take, and the shipped configurations against their cards."""

import gc
import json
import re
from dataclasses import replace

import pytest
import torch
import transformers
from tiny import make_clip, write_model

from dvr1_lite import __main__ as cli
from dvr1_lite import memory, training
from dvr1_lite.config import (
    CONFIGS, TrainConfig, card_gb, card_settings, load_config, make_config, read_yaml, shipped_configs,
)
from dvr1_lite.errors import ConfigError, ModelError, RecordError
from dvr1_lite.memory import GB, LiveBytes, architecture_of, predict
from dvr1_lite.policy import FAMILIES, Completions, LoraSettings, Policy
from dvr1_lite.rollout import sample_groups

CARDS = (16, 24, 80)
FULL = [name for name in shipped_configs() if name != "lite"]
FRAMES, SIZE, LENGTH, RANK, TOLERANCE = 16, 112, 20, 8, 0.12


def wide_model(folder, family, vocabulary):
    r"""A random model large enough for its activations to outweigh lists and masks."""
    write_model(folder, family, hidden=128, layers=3, intermediate=384)
    said = json.loads((folder / "config.json").read_text())
    said["text_config"]["vocab_size"] = vocabulary
    (folder / "config.json").write_text(json.dumps(said))
    kind = getattr(transformers, FAMILIES[family])
    kind(transformers.AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[("qwen2_5_vl", 3000), ("qwen2_vl", 100)], ids=lambda p: f"{p[0]}-{p[1]}")
def folder(request, tmp_path_factory):
    return wide_model(tmp_path_factory.mktemp(request.param[0]), *request.param)


# --- exact: what stands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "parameters"), [  # as the hub shows them beside the checkpoints' safetensors
    ("Qwen/Qwen2-VL-2B-Instruct", 2_208_985_600), ("Qwen/Qwen2-VL-7B-Instruct", 8_291_375_616),
    ("Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976), ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656),
])
def test_the_checkpoints_have_as_many_parameters(model, parameters):
    assert architecture_of(model).parameters == parameters


def stored(parameter) -> int:
    r"""Bytes of a weight with everything that quantisation keeps beside it."""
    state = getattr(parameter, "quant_state", None)
    parts = [parameter.data]
    if state is not None:
        parts += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return sum(part.numel() * part.element_size() for part in parts)


@pytest.mark.parametrize(("quantization", "dtype"), [("none", "float32"), ("none", "bfloat16"), ("nf4", "float32"),
                                                     ("nf4", "bfloat16")])
def test_weights_and_adapter_are_exact(folder, quantization, dtype):
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    policy = Policy.load(folder, quantization=quantization, dtype=dtype, lora=LoraSettings(RANK))
    config = TrainConfig(model=str(folder), quantization=quantization, dtype=dtype, lora_rank=RANK)
    predicted = memory.standing_bytes(config, architecture_of(folder))
    parts = {"vision encoder": policy.visual, "embeddings": policy.language.embed_tokens}
    for name, module in parts.items():
        assert predicted[name] == sum(stored(p) for p in module.parameters()), name
    assert predicted["output head"] == stored(policy.core.lm_head.weight)
    layers = [p for name, p in policy.language.named_parameters() if "embed_tokens" not in name and "lora" not in name]
    assert predicted["language layers"] == sum(stored(p) for p in layers)
    assert predicted["adapter"] == predicted["gradients"] == sum(stored(p) for p in policy.trainable())


@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit"])
def test_the_optimizer_is_exact(kind):
    if kind != "adamw":
        pytest.importorskip("bitsandbytes")
    parameters = [torch.nn.Parameter(torch.ones(16, columns)) for columns in (2048, 300, 8)]
    optimizer = training.make_optimizer(TrainConfig(optimizer=kind), parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    values = [value for state in optimizer.state.values() for name, value in state.items() if "qmap" not in name]
    measured = sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))
    assert memory.optimizer_bytes([p.numel() for p in parameters], kind) == measured


def test_nf4_is_about_half_a_byte_a_weight():
    assert memory.nf4_bytes(2**24) / 2**24 == pytest.approx(0.5 + 1 / 64 + 4 / 64 / 256, rel=1e-3)


# --- within a tolerance: what comes and goes -------------------------------------------------------------------------


def test_live_bytes_by_hand():
    with LiveBytes() as live:
        first = torch.ones(1000)
        second = first * 2
        view = second.view(10, 100)
        second += 1
        assert live.now == 8000
        del first, second
        assert live.now == 4000
        third = view + 1
    assert live.peak == 8000 and third.sum() == 4000


def measure(function) -> int:
    gc.collect()
    with LiveBytes() as live:
        function()
    return live.peak


def setting(folder, dtype, checkpointing, micro_batch, prompts):
    r"""A policy, its prompts of random clips, random completions, and the prediction for just these."""
    policy = Policy.load(folder, lora=LoraSettings(RANK), dtype=dtype, gradient_checkpointing=checkpointing)
    shown = [policy.prompt("what" + " red" * i, policy.encode(make_clip(i, frames=FRAMES, size=SIZE)))
             for i in range(prompts)]
    allowed = (~policy.banned).nonzero().flatten()
    ids = allowed[torch.randint(len(allowed), (prompts, 4, LENGTH), generator=torch.Generator().manual_seed(0))]
    config = TrainConfig(model=str(folder), quantization="none", dtype=dtype, num_frames=FRAMES, frame_size=SIZE,
                         prompts_per_step=prompts, group_size=4, max_new_tokens=LENGTH, micro_batch=micro_batch,
                         gradient_checkpointing=checkpointing, lora_rank=RANK, augment="none", eval_batch=prompts)
    architecture = architecture_of(folder)
    text = len(shown[-1].input_ids) - memory.visual_tokens(config, architecture, image=False)
    prediction = predict(config, architecture, image=False, text_tokens=text)
    assert prediction.prompt == len(shown[-1].input_ids)
    return policy, shown, Completions(ids, torch.ones_like(ids, dtype=torch.bool)), prediction


def spread_loss(logp):
    return (logp.sum(-1) / 100).var(), {}


@pytest.mark.parametrize(("dtype", "checkpointing", "micro_batch", "prompts"), [
    ("float32", False, None, 1), ("float32", True, 4, 3), ("bfloat16", True, 2, 1),
])
def test_peaks_are_as_measured(folder, dtype, checkpointing, micro_batch, prompts):
    policy, shown, completions, prediction = setting(folder, dtype, checkpointing, micro_batch, prompts)
    for parameter in policy.trainable():
        parameter.grad = torch.zeros_like(parameter)  # gradients stand; they are counted apart
    measured = {
        "encode": measure(lambda: policy.encode(make_clip(9, frames=FRAMES, size=SIZE))),
        "update": measure(lambda: policy.backward(shown, completions, spread_loss, micro_batch=micro_batch)),
        "sample": measure(lambda: sample_groups(policy, shown, 4, LENGTH, generator=torch.Generator().manual_seed(0))),
        "evaluate": measure(lambda: sample_groups(policy, shown, 1, LENGTH, greedy=True)),
    }
    predicted = {name: sum(prediction.phases[name].values()) for name in measured}
    assert predicted == pytest.approx(measured, rel=TOLERANCE), {n: predicted[n] / measured[n] for n in measured}


def test_checkpointing_and_small_micro_batches_save_memory():
    config = load_config("seed_bench_r1_qwen2_5_vl_3b")
    architecture = architecture_of(config.model)
    needed = {(ck, mb): predict(replace(config, gradient_checkpointing=ck, micro_batch=mb), architecture).needed / GB
              for ck in (False, True) for mb in (1, 8)}
    assert needed[False, 8] > needed[False, 1] > 2 * needed[True, 8] >= 2 * needed[True, 1]


# --- the shipped configurations --------------------------------------------------------------------------------------

PAPER = {"num_frames": 16, "frame_size": 252, "group_size": 8, "beta": 0.1, "history_window": 100, "method": "reg-grpo",
         "augment": "both", "augment_scale": "adaptive", "difficulty_reference": "relative", "clip_eps": None}


@pytest.mark.parametrize("name", FULL)
def test_a_config_has_the_papers_values(name):
    config = load_config(name)
    assert {key: getattr(config, key) for key in PAPER} == PAPER
    assert config.model in memory.known_models() and config.out == f"runs/{name}"


@pytest.mark.parametrize("name", FULL)
def test_every_value_says_where_it_is_from(name):
    for line in shipped_configs()[name].read_text(encoding="utf-8").splitlines():
        if re.match(r"\w+:", line):
            assert re.search(r"  # (paper|not given|does not apply)", line), line


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("name", FULL)
def test_a_config_fits_its_card(name, card):
    values = read_yaml(name)
    config = make_config(values | card_settings(card, values["model"]))
    prediction = memory.check_fits(config, card_gb(card))
    assert prediction.on_gpu and prediction.needed < card_gb(card) * GB
    assert card_gb(card) < card


def test_the_table_of_the_readme_is_what_is_predicted():
    readme = (CONFIGS.parents[1] / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"(?m)^\| (Qwen2[^|]*) \| ([\d.]+ \| [\d.]+ \| [\d.]+) \|$", readme))
    names = {"Qwen2-VL-2B": ["seed_bench_r1_qwen2_vl_2b"], "Qwen2.5-VL-3B": ["seed_bench_r1_qwen2_5_vl_3b"],
             "Qwen2-VL-7B, Qwen2.5-VL-7B": ["seed_bench_r1_qwen2_vl_7b", "seed_bench_r1_qwen2_5_vl_7b"]}
    assert rows.keys() == names.keys()
    for label, shipped in names.items():
        for name in shipped:
            values = read_yaml(name)
            needed = [predict(make_config(values | card_settings(card, values["model"]))).needed / GB for card in CARDS]
            assert rows[label] == " | ".join(f"{value:.1f}" for value in needed), name


def test_models_and_data_sets_that_are_shipped():
    models = {name: load_config(name).model for name in FULL}
    assert {models[name] for name in FULL if name.startswith("seed_bench_r1")} == set(memory.known_models())
    assert {name.rsplit("_qwen", 1)[0] for name in FULL} == {"seed_bench_r1", "next_gqa", "video_r1"}
    assert "<glue>" in load_config("next_gqa_qwen2_5_vl_3b").instruction


def test_cards_change_only_what_leaves_the_numbers_alone():
    for card in CARDS:
        for model in memory.known_models():
            assert set(card_settings(card, model)) <= {"quantization", "optimizer", "gradient_checkpointing",
                                                       "micro_batch", "eval_batch", "feature_cache_mb"}
    with pytest.raises(ConfigError, match="12 GB: choose one of 16, 24, 80"):
        card_settings(12, "")


def test_configs_are_found_by_name_and_packed(tmp_path):
    assert load_config("video_r1_qwen2_5_vl_3b") == load_config(CONFIGS / "video_r1_qwen2_5_vl_3b.yaml")
    with pytest.raises(ConfigError, match="no_such_config"):
        load_config("no_such_config")


# --- what to change --------------------------------------------------------------------------------------------------


def test_advice_fits_and_has_nothing_in_vain():
    config = load_config("seed_bench_r1_qwen2_5_vl_7b", {"quantization": "none", "gradient_checkpointing": False})
    assert memory.advise(config, 10**4) == {}
    for gb in (40, 24, 12):
        changes = memory.advise(config, gb)
        assert predict(replace(config, **changes)).needed <= gb * GB
        for name in changes:
            fewer = {key: value for key, value in changes.items() if key != name}
            assert predict(replace(config, **fewer)).needed > gb * GB, name
    assert set(memory.advise(config, 40)) <= {"gradient_checkpointing", "micro_batch", "eval_batch"}  # numbers stay
    with pytest.raises(ConfigError, match="smaller model or a larger card"):
        memory.advise(config, 4)


def test_a_card_too_small_is_refused_before_anything_is_loaded(monkeypatch, tmp_path):
    config = load_config("seed_bench_r1_qwen2_5_vl_7b", {"out": str(tmp_path / "run")})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory, "device_gb", lambda device: 10.0)
    with pytest.raises(ConfigError, match="needs about 1.*there are 10.0 GB: set .*prompts_per_step: 1"):
        training.train(config)
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecordError, match="no such data root"):
        training.train(replace(config, check_memory=False))


def test_optimizers_that_cannot_be_had(monkeypatch):
    with pytest.raises(ConfigError, match="device is cpu: use optimizer: adamw-8bit or adamw"):
        training.check_machine(TrainConfig(optimizer="paged-adamw-8bit"))
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install bitsandbytes, or use optimizer: adamw"):
        training.check_machine(TrainConfig(optimizer="adamw-8bit"))
    training.check_machine(TrainConfig())


def test_an_unknown_model_folder(tmp_path):
    with pytest.raises(ModelError, match="no config.json"):
        architecture_of(tmp_path)
    with pytest.raises(ModelError, match="no model folder"):
        architecture_of(tmp_path / "none")


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_tells_parts_and_whether_it_fits(tmp_path, capsys):
    name, out = "seed_bench_r1_qwen2_5_vl_3b", tmp_path / "memory.json"
    assert cli.main(["memory", "--config", name, "--card", "24", "--json", str(out), "--lora-rank", "8"]) == 0
    told = capsys.readouterr().out
    for part in ("language layers", "vision encoder", "optimizer", "phase update", "key-value cache", "it fits"):
        assert part in told
    saved = json.loads(out.read_text())
    assert saved["needed"] == predict(make_config(read_yaml(name) | card_settings(24, "") | {"lora_rank": 8})).needed
    assert cli.main(["memory", "--config", name, "--available", "6"]) == 2
    assert "there are 6.0 GB: set " in capsys.readouterr().err
    assert cli.main(["memory", "--config", name, "--card", "7"]) == 2
    assert "choose one of 16, 24, 80" in capsys.readouterr().err


def test_training_takes_a_card_and_options_win():
    _, _, given = cli.parse_training(["--config", "seed_bench_r1_qwen2_vl_2b", "--card", "16", "--micro-batch", "1"])
    assert given["micro_batch"] == 1 and given["eval_batch"] == 16 and given["optimizer"] == "paged-adamw-8bit"
    _, _, given = cli.parse_training(["--card", "16", "--model", "Qwen/Qwen2-VL-7B-Instruct"])
    assert given["eval_batch"] == 4
