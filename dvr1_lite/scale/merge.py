r"""Merge an adapter into its base model: a checkpoint for tools without adapters, such as lmms-eval, vLLM or the hub.

An adapter trained beside NF4 weights has learned to correct *those*. It is merged into the unquantized weights, which
differ a little, so a few answers may change: evaluate the merged model before you publish it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

from transformers.utils import cached_file

from ..config import read_yaml
from ..data import prompt_text
from ..errors import ConfigError, ModelError, UserError
from ..files import make_folder, resolve, write_atomically, writing
from ..policy import Policy
from ..run import RUN_CONFIG
from .datasets import read_any

# Everything of the base model but its weights and config.json is copied as it is.
COPIED = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
          "added_tokens.json", "chat_template.json", "chat_template.jinja", "preprocessor_config.json",
          "video_preprocessor_config.json", "generation_config.json")
TASKS = "videomme,mvbench,mmvu_val"  # some of lmms-eval's video benchmarks


def merge(adapter: str | Path, out: str | Path, *, model: str | Path | None = None, dtype: str = "bfloat16",
          device: str = "cpu") -> Path:
    r"""Write the base model with the adapter added to its weights into the new folder `out`, and return it.

    adapter: a run's folder or its adapter. model: the base model; None takes the one that adapter_config.json names,
    also when called from another folder.
    dtype: number type of the saved weights. The result loads in transformers 4.57 and later.
    Raises `ModelError` for an adapter or model that cannot be loaded, `ConfigError` for a folder that is in use.
    """
    adapter, out = Path(adapter), Path(out)
    adapter = adapter / "adapter" if (adapter / "adapter" / "adapter_config.json").is_file() else adapter
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty: give another --out")
    base = str(model or base_model(adapter))
    policy = Policy.load(base, adapter=adapter, dtype=dtype, device=device)
    make_folder(out)
    with writing(out):
        policy.model.merge_and_unload().save_pretrained(out, safe_serialization=True)
        for name in COPIED:
            found = cached_file(base, name, local_files_only=True, _raise_exceptions_for_missing_entries=False,
                                _raise_exceptions_for_connection_errors=False)
            if found is not None:
                shutil.copyfile(found, out / name)
        if (adapter.resolve().parent / "config.yaml").is_file():
            shutil.copyfile(adapter.resolve().parent / "config.yaml", out / RUN_CONFIG)
    add_older_fields(out)
    write_atomically(out / "README.md", model_card(adapter, base, policy.config.model_type, dtype))
    return out


def base_model(adapter: Path) -> str:
    r"""Return the base model that an adapter names: a hub id, or a folder found from here, the adapter's own place or
    the data folder. Raises `ModelError` if there is no adapter."""
    try:
        name = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{adapter} holds no adapter (adapter_config.json cannot be read): give the folder of a "
                         f"run or its adapter") from error
    places = [resolve(name), *(parent / name for parent in adapter.resolve().parents)]
    return str(next((place for place in places if (place / "config.json").is_file()), name))


def add_older_fields(folder: Path) -> None:
    r"""Add what transformers 4.57 reads beside what 5 writes; without the text's tie_word_embeddings, it would fill a
    tied output head with random numbers and only warn."""
    config, tokenizer = (json.loads((folder / name).read_text(encoding="utf-8")) for name in
                         ("config.json", "tokenizer_config.json"))
    text = config.get("text_config", config)
    text["tie_word_embeddings"] = config["tie_word_embeddings"]
    rope = text.get("rope_parameters") or {}
    if "mrope_section" in rope:
        text["rope_theta"] = rope["rope_theta"]
        mrope = {name: value for name, value in rope.items() if name.startswith("mrope_")}
        text["rope_scaling"] = {"type": "default", "rope_type": "default", **mrope}
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name of the same class
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    for name, values in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        write_atomically(folder / name, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def model_card(adapter: Path, base: str, family: str, dtype: str) -> str:
    r"""Return a model card: what was merged, how it was trained (from the run's config.yaml), and how to use it."""
    file = adapter.resolve().parent / "config.yaml"
    run = read_yaml(file) if file.is_file() else {}
    name = Path(base).name if Path(base).is_dir() else base  # no path of this machine
    frames, side = run.get("num_frames", 16), run.get("frame_size", 252)
    trained = "How the adapter was trained is not recorded beside it."
    if run:
        trained = (f"Trained with {run['method']} for {run['steps']} steps on {Path(run['train_file']).name}, {frames} "
                   f"frames of {side} x {side} pixels, text positions `after_video: {run['after_video']}` (grid: as in "
                   f"transformers 5.3 and later; max: as before, and in Qwen's own code).")
    question = example_question(run)
    return f"""---
base_model: {name}
library_name: transformers
pipeline_tag: video-text-to-text
---

# {Path(base).name}, trained by reinforcement and merged

A LoRA adapter merged into {name} in {dtype} by `python -m dvr1_lite merge`. {trained}

## Ask it

Needs transformers 4.57 or later, torchvision and av (`pip install torchvision av`). In this folder, about a file
clip.mp4 (`python -m dvr1_lite ask --model THIS_FOLDER --clip FILE --question "..."` needs no torchvision):

```python
{python_snippet(question, frames, side, run.get("max_new_tokens", 768))}
```

## Evaluate it with lmms-eval

```
{lmms_eval_command(family, ".", frames, side)}
```

lmms-eval asks for no `<think>` and `<answer>`: give the training's instruction as the task's prompt suffix. It keeps a
frame's aspect ratio, which training did not; state frames and pixels beside a number.
"""


def example_question(run: dict) -> str:
    r"""Return the prompt of the first record that a run's config trained on, or a placeholder if it cannot be read."""
    question, instruction = "YOUR QUESTION", run.get("instruction", "")
    with contextlib.suppress(UserError, KeyError):
        records = read_any(resolve(run["train_file"]), run.get("data_root"), errors=[])
        return prompt_text(records[0], instruction=instruction) if records else question
    return f"{question}\n{instruction}" if instruction else question


def python_snippet(question: str, frames: int, side: int, max_new_tokens: int) -> str:
    r"""Return Python code that asks the model in the current folder about clip.mp4 with plain transformers: the frames
    and times of training, for the processors of transformers 4.57 (which reads fps) and 5 (which reads the times)."""
    return f"""import av
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(".", dtype="auto")
processor = AutoProcessor.from_pretrained(".")
with av.open("clip.mp4") as clip:
    pictures = [frame.to_image().rotate(frame.rotation, expand=1).resize(({side}, {side}))
                for frame in clip.decode(video=0)]
    seconds = len(pictures) / float(clip.streams.video[0].average_rate)
frames = [pictures[int((k + 0.5) * len(pictures) / {frames})] for k in range({frames})]
times = {{"fps": 2 * {frames} / seconds, "total_num_frames": 2 * {frames}, "duration": seconds,
         "frames_indices": list(range(1, 2 * {frames}, 2))}}  # frame k is shown at (k + 1/2) / {frames} of the clip
content = [{{"type": "video"}}, {{"type": "text", "text": {json.dumps(question)}}}]
text = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True)
inputs = processor(text=[text], videos=[frames], video_metadata=[times], fps={frames} / seconds,
                   do_sample_frames=False, do_resize=False, return_tensors="pt")
answer = model.generate(**inputs.to(model.device), max_new_tokens={max_new_tokens}, do_sample=False)
print(processor.batch_decode(answer[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)[0])"""


def lmms_eval_command(family: str, folder: str, frames: int = 16, side: int = 252) -> str:
    r"""Return the command with which lmms-eval runs a merged checkpoint on video benchmarks."""
    return (f"python -m lmms_eval --model {family} \\\n    --model_args=pretrained={folder},max_num_frames={frames},"
            f"min_pixels={side**2},max_pixels={side**2} \\\n"
            f"    --tasks {TASKS} --batch_size 1 --log_samples --output_path results/")
