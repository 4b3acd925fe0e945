r"""From an adapter to a checkpoint of its own, for tools that know no adapters: lmms-eval, vLLM, the hub.

The adapter's product is added to the base model's weights (peft's `merge_and_unload`) and everything is saved as the
hub's checkpoints are: safetensors, tokenizer with chat template, preprocessing, and a model card.

An adapter trained beside NF4 weights has learned to correct *those*; it is merged into the unquantised ones, which are
a little different, so a merged model's answers may differ in a few questions. Evaluate it again before you publish it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from .errors import ConfigError, ModelError
from .files import make_folder, write_atomically, writing
from .policy import Policy

KEPT = ("preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json", "generation_config.json")
TASKS = "videomme,mvbench,mmvu_val"  # some of the video benchmarks that lmms-eval knows


def merge(adapter: str | Path, out: str | Path, *, model: str | Path | None = None, dtype: str = "bfloat16",
          device: str = "cpu") -> Path:
    r"""Writes the base model with the adapter added to its weights into the new folder `out`, and returns it.

    model: the base model; None takes what adapter_config.json names. dtype: of the saved weights.
    Raises `ModelError` for an adapter or model that cannot be loaded, `ConfigError` for a folder that is in use.
    """
    adapter, out = Path(adapter), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty: give another --out")
    base = str(model or base_model(adapter))
    policy = Policy.load(base, adapter=adapter, dtype=dtype, device=device)
    merged = policy.model.merge_and_unload()
    make_folder(out)
    with writing(out):
        merged.save_pretrained(out, safe_serialization=True)
        policy.tokenizer.save_pretrained(out)
        for name in KEPT:
            found = _find(base, name)
            if found is not None:
                shutil.copyfile(found, out / name)
    write_atomically(out / "README.md", card(adapter, base, policy.config.model_type, dtype))
    return out


def base_model(adapter: Path) -> str:
    r"""The base model that an adapter names. Raises `ModelError` if there is no adapter."""
    try:
        return json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{adapter} holds no adapter (adapter_config.json cannot be read): give the folder adapter/ "
                         f"of a run") from error


def _find(model: str, name: str) -> str | None:
    from transformers.utils import cached_file

    return cached_file(model, name, local_files_only=True, _raise_exceptions_for_missing_entries=False,
                       _raise_exceptions_for_connection_errors=False)


def card(adapter: Path, base: str, family: str, dtype: str) -> str:
    r"""A model card: what was merged, how it was trained (the run's own card), and how to evaluate it elsewhere."""
    trained, name = adapter / "README.md", Path(base).name if Path(base).is_dir() else base  # no path of this machine
    run = trained.read_text(encoding="utf-8") if trained.is_file() else ""
    told = run.partition("\n# ")[2].partition("\n")[2].strip()
    return f"""---
base_model: {name}
library_name: transformers
pipeline_tag: video-text-to-text
---

# {Path(base).name}, trained by Reg-GRPO and merged

A LoRA adapter merged into {name} in {dtype}, by `python -m dvr1_lite merge`.

{told or 'How the adapter was trained is not recorded beside it.'}

## Evaluate it elsewhere

{lmms_eval_command(family, "THIS_FOLDER")}

Prompts there do not ask for `<think>` and `<answer>`: add the training's instruction as the task's prompt suffix, or
expect the model to answer as its base does. Frames and pixels are the task's, not the training's; say both beside a
number.
"""


def lmms_eval_command(family: str, folder: str, frames: int = 16) -> str:
    r"""The command line with which lmms-eval runs a merged checkpoint on video benchmarks."""
    return (f"    python -m lmms_eval --model {family} --model_args=pretrained={folder},max_num_frames={frames},"
            f"attn_implementation=sdpa \\\n        --tasks {TASKS} --batch_size 1 --log_samples --output_path results/")
