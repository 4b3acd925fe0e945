r"""Load a checkpoint of a video language model, its adapter and optimizer: safetensors only, no remote code."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .config import TrainConfig
from .errors import ConfigError, ModelError
from .families import FAMILIES

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The language model's linear layers only: the encoder also has modules called gate_proj, up_proj and down_proj.
LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


@dataclass(frozen=True)
class LoraSettings:
    r"""Low-rank adapters on q, k, v, o, gate, up and down of every language layer.

    rank r >= 1; alpha: the update is scaled by alpha / r; seed of A's initial values (B starts at zero). There is no
    dropout: sampling, old and training log-probs must come from one and the same model.
    """

    rank: int = 16
    alpha: float = 32.0
    seed: int = 0


def load_model(path: str | Path, quantization: str, dtype: str, device: str, lora: LoraSettings | None,
               adapter: str | Path | None, local_files_only: bool) -> tuple[torch.nn.Module, object, dict]:
    r"""Load (model with adapter, tokenizer, preprocessing) of a checkpoint of a supported family.

    Raises `ModelError` or `ConfigError` naming what cannot be loaded and the fix.
    """
    check_hardware(quantization, dtype, device)
    local_files_only = is_folder(path) or local_files_only  # a local folder never waits for the network
    config = load_architecture(path, local_files_only)
    if is_folder(path) and not any(Path(path).glob("*.safetensors")):
        raise ModelError(f"model folder {path} holds no weights (*.safetensors): download the checkpoint again, "
                         f"or convert pickled weights to safetensors")
    config.text_config.attention_dropout = 0.0
    model = _load_weights(path, config, quantization, dtype, device, local_files_only)
    tokenizer = load_tokenizer(path, local_files_only)
    preprocessing = _load_preprocessing(path, config, local_files_only)
    model.requires_grad_(False)
    if adapter is not None:
        model = _load_adapter(model, Path(adapter))
    elif lora is not None:
        model = new_adapter(model, lora, str(path))
    return model, tokenizer, preprocessing


def check_hardware(quantization: str, dtype: str, device: str) -> torch.device:
    r"""Check that this machine has the device and what a number type and NF4 need. Raises ModelError or ConfigError."""
    for name, value, known in (("quantization", quantization, ("none", "nf4")), ("dtype", dtype, tuple(DTYPES))):
        if value not in known:
            raise ConfigError(f"{name} is {value!r}: choose one of {', '.join(known)}")
    if quantization == "nf4" and dtype == "float64":
        raise ModelError("nf4 with float64 gives wrong numbers without a warning (bitsandbytes on CPU): use "
                         "dtype: float32, or quantization: none")
    if quantization == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("quantization: nf4 needs bitsandbytes, which is not installed (some platforms have no "
                         "wheel): pip install bitsandbytes, or run with quantization: none")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device is {device!r}: give cpu, cuda or cuda:N") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {where} was asked for, but torch sees no GPU: use device: cpu, or install a CUDA "
                         f"build of torch")
    if dtype == "bfloat16" and not has_bfloat16(device):
        raise ModelError(f"{torch.cuda.get_device_name(where)} has no bfloat16: use dtype: float32, which --card 16 "
                         f"chooses by itself")
    return where


def has_bfloat16(device: str) -> bool:
    r"""Tell whether a device computes in bfloat16 itself; a GPU of compute capability below 8, such as a T4, does not
    (PyTorch would emulate it). True where there is no such device."""
    if not device.startswith("cuda") or not torch.cuda.is_available() or torch.version.hip:
        return True
    return torch.cuda.get_device_capability(torch.device(device)) >= (8, 0)


def is_folder(path: str | Path) -> bool:
    r"""Tell whether `path` is a local folder; a name like "owner/model" that is no folder is taken for a hub id."""
    folder, text = Path(path), str(path)
    if folder.is_dir():
        return True
    if folder.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1:
        raise ModelError(f"there is no model folder {text}: give a folder with config.json and *.safetensors, or a "
                         f"hub id such as Qwen/Qwen2.5-VL-3B-Instruct")
    return False


def load_architecture(path: str | Path, local_files_only: bool = False):
    r"""Read the transformers config of a checkpoint, without its weights. Raises `ModelError`."""
    from transformers import AutoConfig

    if is_folder(path) and not (Path(path) / "config.json").is_file():
        raise ModelError(f"model folder {path} has no config.json: give the folder of a whole checkpoint (an "
                         f"adapter folder goes into `adapter`)")
    with load_errors(path):
        config = AutoConfig.from_pretrained(path, local_files_only=local_files_only, trust_remote_code=False)
    if config.model_type not in FAMILIES:
        raise ModelError(f"model {path} is a {config.model_type}, which is not supported: choose a model of one of the "
                         f"families {', '.join(FAMILIES)}")
    if getattr(config.text_config, "use_sliding_window", False):
        raise ModelError(f"model {path} has sliding-window attention, which a shared prefix does not keep: set "
                         f"use_sliding_window to false in its config.json")
    return config


@contextlib.contextmanager
def load_errors(path: str | Path) -> Iterator[None]:
    r"""Turn what a missing, gated, unreachable or broken checkpoint raises into one `ModelError` with its fix."""
    try:
        yield
    except Exception as error:  # torch, safetensors, transformers and the hub's client each have their own
        raise ModelError(f"model {path} {_load_problem(error)}") from error


def _load_problem(error: BaseException) -> str:
    chain, current = "", error
    while current is not None:  # transformers wraps what the hub's client raised
        chain += f" {type(current).__name__} {current}".lower()
        current = current.__cause__ or current.__context__
    if "gatedrepo" in chain or "gated repo" in chain:
        return "is gated: accept its terms on the hub and log in with `hf auth login`, or give a local folder"
    if "repositorynotfound" in chain or "not a valid model identifier" in chain:
        return "is neither a local folder nor on the hub: check the name, or log in if it is private"
    if any(word in chain for word in ("connect", "offline", "localentrynotfound", "timed out", "timeout")):
        return "is no local folder, and the hub is out of reach: download it elsewhere and give its folder instead"
    if "does not recognize this architecture" in chain or "trust_remote_code" in chain:
        return f"is of no supported family: choose a model of one of {', '.join(FAMILIES)}"
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return f"cannot be loaded ({first}): download or write it again, complete with tokenizer and safetensors"


def _load_weights(path, config, quantization, dtype, device, local_files_only) -> torch.nn.Module:
    import transformers

    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional kernel is missing
    options = {"config": config, "dtype": DTYPES[dtype], "attn_implementation": "sdpa", "use_safetensors": True,
               "local_files_only": local_files_only, "trust_remote_code": False}
    if quantization == "nf4":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[dtype], llm_int8_skip_modules=["model.visual", "visual", "lm_head"])
        options["device_map"] = {"": device}
    hf_logging = transformers.utils.logging
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        with load_errors(path):
            model = getattr(transformers, FAMILIES[config.model_type].model_class).from_pretrained(path, **options)
    finally:
        if shown:
            hf_logging.enable_progress_bar()
    return model if quantization == "nf4" else model.to(device)


def load_tokenizer(path: str | Path, local_files_only: bool):
    r"""Load a checkpoint's tokenizer with the chat template that knows videos. Raises `ModelError`."""
    from transformers import AutoTokenizer

    with load_errors(path):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=local_files_only, trust_remote_code=False)
    template = _read_json(path, "chat_template.json", local_files_only).get("chat_template")
    if template:  # a processor's template knows videos; the tokenizer's own may not
        tokenizer.chat_template = template
    if not tokenizer.chat_template:
        raise ModelError(f"the tokenizer of {path} has no chat template: add chat_template.jinja to the folder")
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise ModelError(f"the tokenizer of {path} has no eos_token or no pad_token: name both in "
                         f"tokenizer_config.json")
    return tokenizer


def unknown_words(tokenizer, *texts: str) -> list[str]:
    r"""List the words, each once, for which the tokenizer has no token (only word-level tokenizers lack any)."""
    words = dict.fromkeys(word.strip(".,;:!?\"'()") for text in texts for word in text.split())
    unknown = tokenizer.unk_token_id
    return [word for word in words if word and unknown is not None
            and unknown in tokenizer(word, add_special_tokens=False)["input_ids"]]


def _load_preprocessing(path: str | Path, config, local_files_only: bool) -> dict:
    r"""patch_size, temporal_patch_size, merge_size, mean and std; the config's and the family's where not given."""
    given, vision = _read_json(path, "preprocessor_config.json", local_files_only), config.vision_config
    family = FAMILIES[config.model_type]
    return {
        "patch_size": int(given.get("patch_size") or vision.patch_size),
        "temporal_patch_size": int(given.get("temporal_patch_size") or vision.temporal_patch_size),
        "merge_size": int(given.get("merge_size") or vision.spatial_merge_size),
        "mean": tuple(given.get("image_mean") or family.mean),
        "std": tuple(given.get("image_std") or family.std),
    }


def _read_json(path: str | Path, name: str, local_files_only: bool) -> dict:
    from transformers.utils import cached_file

    with load_errors(path):
        found = cached_file(str(path), name, local_files_only=local_files_only,
                            _raise_exceptions_for_missing_entries=False,
                            _raise_exceptions_for_connection_errors=False)
        return json.loads(Path(found).read_text(encoding="utf-8")) if found else {}


def new_adapter(model: torch.nn.Module, settings: LoraSettings, path: str) -> torch.nn.Module:
    r"""Add a fresh LoRA adapter to the language model's linear layers; the same values for the same seed."""
    from peft import LoraConfig, get_peft_model

    if settings.rank < 1:
        raise ConfigError(f"lora rank is {settings.rank}: give 1 or more")
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, bias="none",
                        target_modules=LORA_TARGETS, task_type="CAUSAL_LM", base_model_name_or_path=path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return get_peft_model(model, config)


def _load_adapter(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    from peft import PeftModel

    if not (folder / "adapter_config.json").is_file() and (folder / "adapter" / "adapter_config.json").is_file():
        folder = folder / "adapter"  # the folder of a run
    if not folder.is_dir():
        raise ModelError(f"there is no adapter folder {folder}: give the --out folder of a finished training, or train "
                         f"first with `python -m dvr1_lite train`")
    if (folder / "model.safetensors").is_file() and not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} holds a whole model, not an adapter: give it as --model")
    newest = max([*folder.glob("step_*"), *folder.glob("checkpoints/step_*")], default=None)  # a run that was killed
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(f"adapter folder {folder} has no {name}: " + (
                f"give the newest checkpoint, {newest}, or resume the run first" if newest else
                "give a folder that training wrote, in peft's format with safetensors"))
    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except Exception as error:  # torch, peft and safetensors each have their own
        raise ModelError(f"adapter {folder} does not fit the model or is broken: load it on the base model that its "
                         f"adapter_config.json names ({str(error).splitlines()[0]})") from error


@contextlib.contextmanager
def merged(model: torch.nn.Module, max_bytes: int) -> Iterator[None]:
    r"""Within it, the language model's linear layers use a dense copy of their weights with the adapter added.

    Decoding reads every weight once per token; dequantizing it and adding the adapter's two products each time would
    cost more than the product itself. Copies are made only without gradients, where they fit `max_bytes` and rounding
    loses nothing (float32 or float64); the model stays as it is.
    """
    outer = [module for module in model.modules() if hasattr(module, "get_base_layer")]
    inner = {module.get_base_layer() for module in outer}
    linears = outer + [module for module in model.modules() if hasattr(module, "quant_state") and module not in inner]
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    size = sum(linear.in_features * linear.out_features for linear in linears) * dtype.itemsize
    if torch.is_grad_enabled() or dtype not in (torch.float32, torch.float64) or size > max_bytes:
        linears = []
    try:
        for linear in linears:
            adapted = hasattr(linear, "get_base_layer")
            weight = (linear.get_base_layer() if adapted else linear).weight
            if getattr(weight, "quant_state", None) is not None:
                weight = _dequantize(weight)
            if adapted and not linear.disable_adapters:
                weight = weight + sum(linear.get_delta_weight(name) for name in linear.active_adapters)
            linear.forward = functools.partial(torch.nn.functional.linear, weight=weight, bias=linear.bias)
        yield
    finally:
        for linear in linears:
            del linear.forward


def _dequantize(weight: torch.nn.Parameter) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def make_optimizer(config: TrainConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    r"""Create AdamW over the adapter's parameters, of the kind that `optimizer` names."""
    kind = torch.optim.AdamW
    if config.optimizer != "adamw":
        import bitsandbytes

        kind = getattr(bitsandbytes.optim, {"adamw-8bit": "AdamW8bit", "paged-adamw-8bit": "PagedAdamW8bit"}[
            config.optimizer])
    return kind(parameters, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps,
                weight_decay=config.weight_decay)


def quiet_libraries() -> None:
    r"""Silence progress bars and notices of transformers, peft and bitsandbytes; errors still show."""
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft uses a name that will go
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("bitsandbytes", "peft", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
