r"""Measure the time of a training step, on a GPU also its memory, with a shared and a repeated prompt.

A group is one prompt of P tokens, nearly all of them the video's, with G completions of T tokens.

- **shared**: this project. The frozen encoder runs once a clip, the prompt is prefilled once a pass: P + G T tokens.
- **repeated**: the same model by transformers alone. `generate(num_return_sequences=G)` with its cache, then forwards
  of G whole sequences with pixel values, reference and updates alike: G (P + T) tokens, and G clips in the encoder.

Both force completions of the same length, make the same updates with AdamW, and take turns within one process, so that
other programs slow both alike. The weights are random, so hardly any two completions are equal, and what the project
saves on equal ones does not count. The encoder's work is in no token ratio.
"""

import contextlib
import datetime
import itertools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from tqdm import tqdm
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ..errors import ConfigError, within_memory
from ..files import data_folder, make_folder, write_atomically
from ..loading import DTYPES, LoraSettings
from ..objectives import Batch, ObjectiveConfig, objective_loss
from ..policy import Policy
from ..rollout import sample_groups
from ..run import versions
from ..video import Clip, patchify
from .report import markdown
from .runner import machine

WAYS = ("shared", "repeated")
PHASES = ("sample", "log-probs", "forward + backward", "step")
QUESTION = "what colour comes first"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json")

# Text and vision sizes of a Qwen2.5-VL: "tiny" has the 3B's with every width divided by 16 and four layers each.
SHAPES = {
    "tiny": ({"hidden_size": 128, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4,
              "vocab_size": 1024, "mrope_section": [4, 6, 6]},
             {"hidden_size": 80, "intermediate_size": 216, "depth": 4, "num_heads": 4, "fullatt_block_indexes": [3]}),
    "3B": ({"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
            "vocab_size": 151936, "mrope_section": [16, 24, 24]},
           {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16,
            "fullatt_block_indexes": [7, 15, 23, 31]}),
}


class Kind(NamedTuple):
    r"""A model to measure: a key of SHAPES, how its frozen weights are kept, its number type, and where it runs."""

    model: str = "tiny"
    quantization: str = "none"
    dtype: str = "float32"
    device: str = "cpu"


def kinds(device: str, model: str | None = None) -> list[Kind]:
    r"""List what is measured on a device: a CPU the tiny model in float32; a GPU the 3B in bfloat16 and in NF4."""
    if torch.device(device).type == "cpu":
        return [Kind(model or "tiny")]
    return [Kind(model or "3B", quantization, "bfloat16", device) for quantization in ("none", "nf4")]


@dataclass(frozen=True)
class Setting:
    r"""One setting: frames of size x size pixels, G completions of T tokens, updates a step. Raises `ConfigError`."""

    frames: int = 16
    group_size: int = 8
    completion_tokens: int = 64
    inner_updates: int = 1
    size: int = 252

    def __post_init__(self) -> None:
        # Reg-GRPO needs groups of 3; a completion a first and a later token
        for name, least in (("frames", 1), ("group_size", 3), ("completion_tokens", 2), ("inner_updates", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}: give {least} or more")
        if self.size < 28 or self.size % 28:
            raise ConfigError(f"size is {self.size}: give a multiple of 28 pixels, Qwen2.5-VL's block")


def settings(frames: Sequence[int], group_sizes: Sequence[int], completion_tokens: int = 64,
             inner_updates: Sequence[int] = (1, 4), size: int = 252) -> list[Setting]:
    r"""List the grid of frames and group sizes at the first number of updates, and its middle at the others."""
    middle = tuple(sorted(values)[len(values) // 2] for values in (frames, group_sizes))
    grid = [(*pair, inner_updates[0]) for pair in itertools.product(frames, group_sizes)]
    grid += [(*middle, count) for count in inner_updates[1:]]
    return [Setting(f, g, completion_tokens, count, size) for f, g, count in grid]


def build_policy(kind: Kind, seed: int = 0, folder: Path | None = None) -> Policy:
    r"""Build a policy of the kind's shape with random weights, new adapters, and the tokenizer of `data/base_model`.

    Tokens that would end a completion are banned, so that every completion has its full length. folder: where the
    checkpoint is written; none: one that is removed. Raises `ModelError` for hardware or packages that the kind needs
    and this machine lacks.
    """
    source, (text, vision) = data_folder() / "base_model", SHAPES[kind.model]
    sizes = json.loads((source / "config.json").read_text(encoding="utf-8"))
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": text["mrope_section"]}
    sizes["text_config"] |= text | {"rope_parameters": rope, "max_position_embeddings": 32768, "layer_types": None}
    sizes["vision_config"] |= vision | {"out_hidden_size": text["hidden_size"], "window_size": 112}
    kept = contextlib.nullcontext(folder) if folder else tempfile.TemporaryDirectory()
    with kept as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen2_5_VLForConditionalGeneration._from_config(
            Qwen2_5_VLConfig(**sizes), dtype=DTYPES[kind.dtype]).save_pretrained(folder)
        for name in TOKENIZER:
            shutil.copy(source / name, folder)
        policy = Policy.load(folder, quantization=kind.quantization, dtype=kind.dtype, device=kind.device,
                             lora=LoraSettings())
    policy.banned[[policy.end_id, policy.pad_id]] = True
    return policy


class Shared:
    r"""This project's step of Reg-GRPO, on a clip of random pixels that no cache holds yet."""

    def __init__(self, policy: Policy, setting: Setting, micro_batch: int | None = None):
        self.policy, self.setting, self.micro_batch = policy, setting, micro_batch
        pixels = torch.rand((setting.frames, 3, setting.size, setting.size), generator=torch.Generator().manual_seed(0))
        self.clip = Clip(frames=pixels, seconds=[(i + 0.5) / 2 for i in range(setting.frames)], fps=2.0,
                         duration=setting.frames / 2, path="random")
        self.optimizer = torch.optim.AdamW(policy.trainable(), lr=1e-3, weight_decay=0.0)
        self.rewards = torch.tensor([[2.0 * (i % 2) for i in range(setting.group_size)]], device=policy.device)

    def sample(self) -> tuple:
        r"""Sample a group; return what `logprobs` takes."""
        prompts = [self.policy.prompt(QUESTION, self.policy.encode(self.clip))]
        return prompts, sample_groups(self.policy, prompts, self.setting.group_size,
                                      self.setting.completion_tokens).completions

    def logprobs(self, prompts, completions) -> torch.Tensor:
        r"""Compute the log-probs (1, G, T) of a sampled group."""
        return self.policy.logprobs(prompts, completions, micro_batch=self.micro_batch)

    def loss(self, logp: torch.Tensor, old: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(logp, dtype=torch.bool)
        return objective_loss(Batch(logp, old, reference, mask, self.rewards), ObjectiveConfig())

    def step(self, meter: "Meter") -> None:
        r"""Sample, compute the reference's log-probs, and update the weights; the meter times the phases."""
        with meter.phase("sample"):
            sampled = self.sample()
        with meter.phase("log-probs"), torch.no_grad(), self.policy.reference():
            reference = self.logprobs(*sampled)
        old = None
        for _ in range(self.setting.inner_updates):
            with meter.phase("forward + backward"):
                logp = self.logprobs(*sampled)
                old = logp.detach() if old is None else old  # of the first pass
                self.loss(logp, old, reference).backward()
                torch.nn.utils.clip_grad_norm_(self.policy.trainable(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()


class Repeated(Shared):
    r"""The same step by transformers' `generate` and forward; every completion has its own prompt and pixels.

    Written for speed: a cache in generation, logits at the completion's places only, pixel values made once, no
    gradient through the frozen encoder. The adapters stay beside the weights in generation, as other libraries do it.
    """

    def inputs(self, ids: torch.Tensor, pixels: torch.Tensor, grid: torch.Tensor) -> dict:
        r"""Return the arguments of transformers' forward for token ids (N, L) that all begin with the prompt."""
        rows, seconds = len(ids), self.policy.preprocessing["temporal_patch_size"] / self.clip.fps
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": 2 * (ids == self.policy.config.video_token_id).long(),
                "pixel_values_videos": pixels.repeat(rows, 1), "video_grid_thw": grid.repeat(rows, 1),
                "second_per_grid_ts": torch.full((rows,), seconds)}

    @torch.no_grad()
    def sample(self) -> tuple:
        policy, length = self.policy, self.setting.completion_tokens
        ids = policy.prompt(QUESTION, policy.encode(self.clip)).input_ids[None]
        pixels, grid = patchify(self.clip.frames, **policy.preprocessing)
        video = pixels.to(policy.device, policy.visual.patch_embed.proj.weight.dtype), grid[None].to(policy.device)
        written = policy.model.generate(
            **self.inputs(ids, *video), num_return_sequences=self.setting.group_size, do_sample=True, top_k=0,
            top_p=1.0, temperature=1.0, min_new_tokens=length, max_new_tokens=length, use_cache=True,
            suppress_tokens=policy.banned.nonzero().flatten().tolist())
        return written, *video  # (G, P + T)

    def logprobs(self, ids: torch.Tensor, pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        length = self.setting.completion_tokens
        logits = self.policy.model(**self.inputs(ids, pixels, grid), logits_to_keep=length + 1, use_cache=False).logits
        logits = logits[:, :-1].float().masked_fill(self.policy.banned, -torch.inf)
        return torch.log_softmax(logits, dim=-1).gather(-1, ids[:, -length:, None]).squeeze(-1)[None]


class Meter:
    r"""Seconds and processor seconds of all threads by phase of one step, and on a GPU peak bytes above what was
    allocated before; "step" is the whole."""

    def __init__(self, device: str):
        self.cuda = torch.device(device).type == "cuda"
        if self.cuda:
            torch.cuda.empty_cache()  # what the other way has freed
        self.start = torch.cuda.memory_allocated() if self.cuda else 0
        self.phases = dict.fromkeys(PHASES, (0.0, 0.0, 0))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began, busy = time.perf_counter(), time.process_time()
        yield
        if self.cuda:
            torch.cuda.synchronize()
        seconds, processor = time.perf_counter() - began, time.process_time() - busy
        peak = torch.cuda.max_memory_allocated() - self.start if self.cuda else 0
        for key in (name, "step"):
            before = self.phases[key]
            self.phases[key] = before[0] + seconds, before[1] + processor, max(before[2], peak)


def rounds(ways: dict[str, Shared], repeats: int, device: str) -> Iterator[dict]:
    r"""Make one warm-up and `repeats` rounds; in each every way makes a step, and another one begins each time.

    Yields way -> phase -> (seconds, processor seconds, bytes). Raises `UserError` if memory runs out.
    """
    for number in range(repeats + 1):
        entry = {}
        for name in list(ways)[::1 if number % 2 else -1]:
            meter = Meter(device)
            with within_memory(f"the {name} way", "give fewer --frames, a smaller --group-size, --ways shared or a "
                               "--micro-batch; settings measured before are kept"):
                ways[name].step(meter)
            entry[name] = meter.phases
        yield entry


def summary(kind: Kind, setting: Setting, prompt_tokens: int, measured: list[dict]) -> list[dict]:
    r"""Return a table line for each phase: medians over the rounds, and repeated / shared if both were measured."""
    group, length, lines = setting.group_size, setting.completion_tokens, []
    for phase in PHASES:
        line = {"model": f"{kind.model}, {kind.quantization}, {kind.dtype}", "frames": setting.frames, "G": group,
                "updates": setting.inner_updates, "prompt tokens": prompt_tokens, "n": len(measured), "phase": phase}
        share = setting.inner_updates if phase == "forward + backward" else 1
        found = {way: [statistics.median(values) for values in zip(*(entry[way][phase] for entry in measured))]
                 for way in WAYS if way in measured[0]}
        for way, (seconds, _, peak) in found.items():
            line |= {f"{way}, s": round(seconds / share, 3)} | ({f"{way}, MB": round(peak / 2**20)} if peak else {})
        if "repeated" in found:
            line["repeated / shared"] = round(found["repeated"][0] / found["shared"][0], 1)
            line["by processor time"] = round(found["repeated"][1] / found["shared"][1], 1)
        ratio = group * (prompt_tokens + length) / (prompt_tokens + group * length)
        lines.append(line | {"token ratio": round(ratio, 1)})
    return lines


def bench(kinds: Sequence[Kind], grid: Sequence[Setting], *, command: str, repeats: int = 5,
          ways: Sequence[str] = WAYS, micro_batch: int | None = None, json_file: Path | None = None,
          table_file: Path | None = None, note: str = "") -> tuple[dict, bool]:
    r"""Measure every setting for each kind of model; return the result and whether Ctrl-C stopped it.

    json_file, table_file: written anew after every setting. micro_batch: completions in one pass of the shared way.
    note: a line for the table, such as what else the machine was doing.
    """
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats}: give 1 or more")
    result = {"date": datetime.date.today().isoformat(), "machine": machine(kinds[0].device), "command": command,
              "threads": torch.get_num_threads(), "versions": versions(), "note": note, "settings": []}
    bar = tqdm(total=len(kinds) * len(grid) * (repeats + 1))
    with contextlib.suppress(KeyboardInterrupt):
        for kind in kinds:
            policy = build_policy(kind)
            for setting in grid:
                shared = Shared(policy, setting, micro_batch)
                made = {"shared": shared} | ({"repeated": Repeated(policy, setting)} if "repeated" in ways else {})
                measured = []
                for entry in rounds(made, repeats, kind.device):
                    measured.append(entry)
                    bar.update()
                tokens = len(policy.prompt(QUESTION, policy.encode(shared.clip)).input_ids)
                result["settings"] += summary(kind, setting, tokens, measured[1:])  # the first warms up
                for path, text in ((json_file, json.dumps(result, indent=1) + "\n"), (table_file, as_table(result))):
                    if path is not None:
                        make_folder(Path(path).parent)
                        write_atomically(path, text)
        return result, False
    return result, True


def as_table(result: dict) -> str:
    r"""Return the result as Markdown, a line for each setting and phase."""
    found = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n\n".join([
        "# Seconds and memory of a training step", f"`{result['command']}`",
        f"{result['date']}, {result['machine']}, {result['threads']} threads; {found}. {result['note']}".strip(),
        "Random weights, adapters of rank 16; medians of n rounds in which the ways take turns. Forward + backward is "
        "that of one update. Processor time is that of all threads. MB: the peak of 2**20 bytes above what was "
        "allocated before, so without the weights.",
        markdown(pd.DataFrame(result["settings"])) if result["settings"] else "Nothing was measured."])
