r"""The predicted memory against what small models take, and the shipped configurations against their cards."""

import gc
import json
import re
import weakref

import pytest
import torch
import transformers
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dvr1_lite import __main__ as cli
from dvr1_lite.config import (CONFIGS, TrainConfig, card_gb, card_settings, load_config, make_config, read_yaml,
                              shipped_configs)
from dvr1_lite.errors import ConfigError, ModelError
from dvr1_lite.families import FAMILIES
from dvr1_lite.loading import check_hardware, has_bfloat16
from dvr1_lite.policy import Completions, LoraSettings, Policy
from dvr1_lite.rollout import sample_groups
from dvr1_lite.scale import memory
from dvr1_lite.scale.memory import GB, architecture_of, predict
from tests.tiny import make_clip, write_model

CARDS = (16, 24, 80)
FIT_A_T4 = {"seed_bench_r1_qwen2_vl_2b", "seed_bench_r1_qwen2_5_vl_3b", "next_gqa_qwen2_5_vl_3b",
            "video_r1_qwen2_5_vl_3b", "seed_bench_r1_qwen3_vl_2b", "seed_bench_r1_qwen3_vl_4b"}
FULL = [name for name in shipped_configs() if name != "lite"]
FRAMES, SIZE, LENGTH, RANK, TOLERANCE = 16, 112, 20, 8, 0.20


@pytest.fixture(scope="module", params=[("qwen2_5_vl", 3000), ("qwen2_vl", 100), ("qwen3_vl", 100)],
                ids=lambda p: f"{p[0]}-{p[1]}")
def folder(request, tmp_path_factory):
    r"""A random model large enough for its activations to outweigh lists and masks, with either vocabulary size."""
    family, vocabulary = request.param
    folder = write_model(tmp_path_factory.mktemp(family), family, hidden=128, layers=3, intermediate=384)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = vocabulary
    (folder / "config.json").write_text(json.dumps(config))
    kind = getattr(transformers, FAMILIES[family].model_class)
    kind(transformers.AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


# --- exact: what is there all the time -------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "parameters"), [  # as the hub shows them beside the checkpoints' safetensors
    ("Qwen/Qwen2-VL-2B-Instruct", 2_208_985_600), ("Qwen/Qwen2-VL-7B-Instruct", 8_291_375_616),
    ("Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976), ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656),
    ("Qwen/Qwen3-VL-2B-Instruct", 2_127_532_032), ("Qwen/Qwen3-VL-4B-Instruct", 4_437_815_808),
    ("Qwen/Qwen3-VL-8B-Instruct", 8_767_123_696),
])
def test_the_checkpoints_have_as_many_parameters(model, parameters):
    m = architecture_of(model)
    assert m.matrices + m.language_rest + m.embeddings + m.head + m.vision == parameters


def stored(parameter) -> int:
    r"""Bytes of a weight with everything that quantization keeps beside it."""
    state = getattr(parameter, "quant_state", None)
    parts = [parameter.data]
    if state is not None:
        parts += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return sum(part.numel() * part.element_size() for part in parts)


@pytest.mark.parametrize(("quantization", "dtype"), [("none", "float32"), ("none", "bfloat16"), ("nf4", "float32")])
def test_weights_and_adapter_are_counted_exactly(folder, quantization, dtype):
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    policy = Policy.load(folder, quantization=quantization, dtype=dtype, lora=LoraSettings(RANK))
    config = TrainConfig(model=str(folder), quantization=quantization, dtype=dtype, lora_rank=RANK)
    predicted = memory.static_bytes(config, architecture_of(folder))
    layers = [p for name, p in policy.language.named_parameters() if "embed_tokens" not in name and "lora" not in name]
    expected = {"vision encoder": policy.visual.parameters(), "embeddings": policy.language.embed_tokens.parameters(),
                "output head": [policy.core.lm_head.weight], "language layers": layers, "adapter": policy.trainable()}
    assert {name: predicted[name] for name in expected} == {
        name: sum(stored(p) for p in parameters) for name, parameters in expected.items()}
    assert predicted["gradients"] == predicted["adapter"]


@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit"])
def test_the_optimizer_is_counted_exactly(kind):
    parameters = [torch.nn.Parameter(torch.ones(16, columns)) for columns in (2048, 300, 8)]
    make = torch.optim.AdamW if kind == "adamw" else pytest.importorskip("bitsandbytes").optim.AdamW8bit
    optimizer = make(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    values = [value for state in optimizer.state.values() for name, value in state.items() if "qmap" not in name]
    measured = sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))
    assert memory.optimizer_bytes([p.numel() for p in parameters], kind) == measured


# --- within 20 %: what a phase adds ----------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    r"""Count the bytes of all tensors that are made within it and still alive: `now`, and their `peak`.

    Tensors made before are not counted; scratch space inside a kernel is not seen.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, function, kinds, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        given = {id(x.untyped_storage()) for x in tree_leaves((arguments, keywords)) if isinstance(x, torch.Tensor)}
        for leaf in tree_leaves(result):
            key = id(leaf.untyped_storage()) if isinstance(leaf, torch.Tensor) else None
            if key is None or key in self._known or key in given:  # a view, or in place
                continue
            self._known[key] = leaf.untyped_storage().nbytes()
            self.now += self._known[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(leaf.untyped_storage(), self._forget, key).atexit = False
        return result

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key)


def measure(function) -> int:
    gc.collect()
    with LiveBytes() as live:
        function()
    return live.peak


@pytest.mark.parametrize(("dtype", "checkpointing", "micro_batch", "prompts"), [
    ("float32", False, None, 1), ("float32", True, 4, 3), ("bfloat16", True, 2, 1),
])
def test_each_phase_takes_what_is_predicted(folder, dtype, checkpointing, micro_batch, prompts):
    policy = Policy.load(folder, lora=LoraSettings(RANK), dtype=dtype, gradient_checkpointing=checkpointing)
    shown = [policy.prompt("what" + " red" * i, policy.encode(make_clip(i, frames=FRAMES, size=SIZE)))
             for i in range(prompts)]
    allowed = (~policy.banned).nonzero().flatten()
    ids = allowed[torch.randint(len(allowed), (prompts, 4, LENGTH), generator=torch.Generator().manual_seed(0))]
    completions = Completions(ids, torch.ones_like(ids, dtype=torch.bool))
    config = TrainConfig(model=str(folder), quantization="none", dtype=dtype, num_frames=FRAMES, frame_size=SIZE,
                         prompts_per_step=prompts, group_size=4, max_new_tokens=LENGTH, micro_batch=micro_batch,
                         gradient_checkpointing=checkpointing, lora_rank=RANK, augment="none", eval_batch=prompts)
    longest = len(shown[-1].input_ids)
    text = longest - sum(len(part.embeds) for part in shown[-1].features.parts)
    text -= architecture_of(folder).words_per_grid * FRAMES // 2  # counted apart
    prediction = predict(config, image=False, text_tokens=text)
    assert prediction.prompt == longest
    for parameter in policy.trainable():
        parameter.grad = torch.zeros_like(parameter)  # counted among the static parts

    def update():
        (policy.logprobs(shown, completions, micro_batch=micro_batch).sum(-1) / 100).var().backward()

    generator = torch.Generator().manual_seed(0)
    measured = {
        "encode": measure(lambda: policy.encode(make_clip(9, frames=FRAMES, size=SIZE))), "update": measure(update),
        "sample": measure(lambda: sample_groups(policy, shown, 4, LENGTH, generator=generator)),
        "evaluate": measure(lambda: sample_groups(policy, shown, 1, LENGTH, greedy=True)),
    }
    predicted = {name: sum(prediction.phases[name].values()) for name in measured}
    assert predicted == pytest.approx(measured, rel=TOLERANCE), {n: predicted[n] / measured[n] for n in measured}


# --- the shipped configurations, and too much ------------------------------------------------------------------------

PAPER = {"num_frames": 16, "group_size": 8, "beta": 0.1, "history_window": 100, "method": "reg-grpo",
         "augment": "both", "augment_scale": "adaptive", "difficulty_reference": "relative", "clip_eps": None}
SAME_NUMBERS = {"quantization", "optimizer", "gradient_checkpointing", "micro_batch", "sample_batch", "eval_batch",
                "feature_cache_mb"}
OWN = {"extends", "model", "train_file", "eval_files", "data_root", "instruction", "steps", "out"}  # of each config


@pytest.mark.parametrize("name", FULL)
def test_a_config_has_the_papers_values_fits_its_cards_and_says_where_each_value_comes_from(name):
    config, values = load_config(name), read_yaml(name)
    assert {key: getattr(config, key) for key in PAPER} == PAPER
    assert config.frame_size == (256 if "qwen3" in name else 252)
    assert config.model in memory.known_models() and config.out == f"runs/{name}"
    for card in CARDS:
        settings = card_settings(card, values["model"])
        assert set(settings) <= SAME_NUMBERS, "a card changes only what leaves the experiment alone"
        prediction = memory.check_fits(make_config(values | settings), card_gb(card))
        assert prediction.on_gpu and prediction.needed < card_gb(card) * GB < card * GB
    own = shipped_configs()[name].read_text(encoding="utf-8")
    lines = [line for line in own.splitlines() if re.match(r"(?!extends)\w+:", line)]
    assert {line.partition(":")[0] for line in lines} <= OWN | ({"frame_size"} if "qwen3" in name else set())
    for line in [*lines, *re.findall(r"^\w+:.*", (CONFIGS / "full_scale.yaml").read_text("utf-8"), re.MULTILINE)]:
        assert re.search(r"  # (paper|not given|does not apply)", line), line


def test_a_local_folder_gets_the_settings_of_the_model_of_its_name():
    known = card_settings(16, "Qwen/Qwen3-VL-4B-Instruct")
    assert card_settings(16, "./models/Qwen3-VL-4B-Instruct") == known != card_settings(16, "./models/other")


def test_the_full_scale_configs_have_the_values_recommended_for_large_models():
    known = yaml.safe_load((CONFIGS / "recommendation.yaml").read_text(encoding="utf-8"))
    shared = read_yaml(CONFIGS / "full_scale.yaml")
    for key in ("method", "learning_rate", "beta", "inner_updates", "group_size"):
        assert shared[key] == known[key].get("large", known[key]["value"]), key


@pytest.mark.parametrize("name", FULL)
def test_a_t4_needs_float32_and_fits_what_it_fits(name):
    values = read_yaml(name)
    settings = card_settings(16, values["model"], bfloat16=False)
    assert settings == card_settings(15, values["model"]) and settings["dtype"] == "float32"
    assert settings["quantization"] == "nf4" and card_gb(16, bfloat16=False) == card_gb(15) == 14.6
    assert set(settings) <= SAME_NUMBERS | {"dtype"}
    config = make_config(values | settings)
    if name in FIT_A_T4:
        assert memory.check_fits(config, 14.6).needed < 14.6 * GB
    else:
        with pytest.raises(ConfigError, match="phase update.*lower prompts_per_step"):
            memory.check_fits(config, 14.6)


@pytest.mark.parametrize(("capability", "dtype", "memory_gb"), [((7, 5), "float32", 14.6), ((8, 0), "bfloat16", 15.5)])
def test_card_16_finds_out_by_itself_whether_the_gpu_has_bfloat16(capability, dtype, memory_gb, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    arguments = ["--config", "seed_bench_r1_qwen3_vl_2b", "--card", "16"]
    file, _, given = cli.parse_training(arguments)
    config = load_config(file, given)
    assert config.dtype == dtype and has_bfloat16("cuda") == (dtype == "bfloat16") and has_bfloat16("cpu")
    note = capsys.readouterr().err
    assert ("no bfloat16: computing in float32" in note) == (dtype == "float32") and note.count("\n") <= 1
    assert check_hardware(config.quantization, config.dtype, config.device).type == "cuda"
    assert cli.main(["memory", *arguments]) == 0 and f"{memory_gb:.2f} GB: it fits" in capsys.readouterr().out
    if dtype == "float32":
        with pytest.raises(ModelError, match="Tesla T4 has no bfloat16: use dtype: float32, which --card 16"):
            check_hardware("nf4", "bfloat16", "cuda:0")
        assert load_config(*cli.parse_training([*arguments, "--dtype", "float16"])[::2]).dtype == "float16"


@pytest.mark.parametrize(("changes", "gb", "advice"), [
    ({"gradient_checkpointing": False, "micro_batch": 32}, 24, "phase update.*set gradient_checkpointing: true"),
    ({"eval_batch": 256}, 24, "phase evaluate.*lower eval_batch or num_frames"),
    ({"prompts_per_step": 32}, 24, "phase sample.*lower sample_batch, max_new_tokens or num_frames"),
    ({"quantization": "none"}, 16, "quantization: nf4 or optimizer: paged-adamw-8bit, or choose a smaller model"),
])
def test_a_card_too_small_is_refused_with_the_fields_to_change(changes, gb, advice):
    config = load_config("seed_bench_r1_qwen2_5_vl_7b", changes)
    with pytest.raises(ConfigError, match=rf"needs about [\d.]+ GB .*there are {gb}.0 GB: .*check_memory") as caught:
        memory.check_fits(config, gb)
    assert re.search(advice, str(caught.value)), caught.value
    assert memory.check_fits(config, 10**4).needed > gb * GB


def test_an_unknown_model_folder_is_refused(tmp_path):
    for folder, problem in ((tmp_path, "no config.json"), (tmp_path / "none", "no model folder")):
        with pytest.raises(ModelError, match=problem):
            architecture_of(folder)
    known = (tmp_path, "Qwen/Qwen2-VL-2B-Instruct", "someone/else")
    assert [memory.is_known(model) for model in known] == [True, True, False]


def test_the_prediction_adds_up():
    saved = json.loads(json.dumps(memory.as_dict(predict(load_config("seed_bench_r1_qwen2_5_vl_3b")))))
    assert saved["needed"] == int(1.05 * saved["peak"]) + int(0.6 * GB)
    assert saved["peak"] == sum(saved["static"].values()) + max(sum(p.values()) for p in saved["phases"].values())
