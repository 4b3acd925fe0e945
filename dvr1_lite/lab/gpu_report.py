r"""A report of one GPU: what a training step at the paper's setting costs, and whether training agrees with a CPU's.

1. **The step**: Qwen2.5-VL-3B's shape with random weights, 16 frames of 252 x 252 and groups of 8, with a shared and a
   repeated prompt (see bench.py), in bfloat16 and in NF4, adapters of rank 16 in both. Floating point operations are
   those that `torch.utils.flop_counter` counts while a step of the bfloat16 model runs; NF4 makes the same products
   after dequantizing. Their share of the card's peak is also known as model FLOPs utilization.
2. **The prediction** of the same step's memory beside what PyTorch's allocator had at most.
3. **The training**: steps of the shipped tiny model on the GPU and on the CPU, in float32, from the same seed.
"""

import contextlib
import datetime
import gc
import json
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ..config import TrainConfig
from ..data import read_records
from ..errors import UserError
from ..files import data_folder, make_folder, resolve, write_atomically
from ..run import load_policy, versions
from ..training import Trainer
from .bench import PHASES, QUESTION, Kind, Meter, Repeated, Setting, Shared, build_policy, rounds
from .report import markdown
from .runner import machine

PUBLISHED = "Qwen/Qwen2.5-VL-3B-Instruct"  # whose shape "3B" is
TOLERANCE = 1e-3  # relative; float32 and float64 on a CPU differ by 2e-5 after two steps of four updates
COMPARED = ("reward", "loss", "grad_norm", "rho_std")

# Peak TFLOP/s of dense bfloat16 products with float32 sums, by a word of the card's name, the most specific first.
PEAKS = {
    "H200 NVL": (836, "NVIDIA H200 datasheet: 1,671 with sparsity, half of it without"),
    "H200": (989, "NVIDIA H200 datasheet: 1,979 with sparsity, half of it without"),
    "H100 NVL": (836, "NVIDIA H100 datasheet: 1,671 with sparsity, half of it without"),
    "H100 PCIe": (756, "NVIDIA H100 PCIe product brief: 1,513 with sparsity, half of it without"),
    "H100": (989, "NVIDIA H100 datasheet: 1,979 with sparsity, half of it without"),
    "A100": (312, "NVIDIA A100 datasheet"),
    "A10": (125, "NVIDIA A10 datasheet"),
    "L40S": (362, "NVIDIA L40S datasheet"),
    "L4": (121, "NVIDIA L4 datasheet: 242 with sparsity, half of it without"),
    "RTX 4090": (165, "NVIDIA Ada GPU architecture whitepaper, appendix A"),
    "RTX 3090": (71, "NVIDIA Ampere GA102 GPU architecture whitepaper, appendix A"),
}


def peak_of(card: str) -> tuple[float, str] | None:
    r"""Return (TFLOP/s, source) of a card by its name, or None for one that is not in the table."""
    found = [peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", card) and "Laptop" not in card]
    return found[0] if found else None


class FlopMeter(Meter):
    r"""Counts floating point operations by phase; its seconds are not those of an ordinary step."""

    def __init__(self, device: str):
        super().__init__(device)
        self.flops = dict.fromkeys(PHASES, 0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with FlopCounterMode(display=False) as counter, super().phase(name):
            yield
        for key in (name, "step"):
            self.flops[key] += counter.get_total_flops()


def measure(kind: Kind, setting: Setting, repeats: int, folder: Path) -> dict[str, Any]:
    r"""Measure the steps of one kind of model; a way that runs out of memory is left out and named.

    Returns prompt (tokens), base (bytes allocated between steps), flops and phases by way, and what was left out.
    """
    gc.collect()  # the model measured before
    policy = build_policy(kind, folder=folder)
    shared, repeated = Shared(policy, setting), Repeated(policy, setting)
    repeated.optimizer = shared.optimizer  # one set of moments, as a training has
    ways, left_out, flops, measured = {"shared": shared, "repeated": repeated}, [], {}, []
    for name in list(ways):
        try:
            meter = FlopMeter(kind.device)
            ways[name].step(meter)
            flops[name] = meter.flops
        except torch.OutOfMemoryError:
            left_out.append(name)
            del ways[name]
    base = torch.cuda.memory_allocated() if torch.device(kind.device).type == "cuda" else 0
    for entry in tqdm(rounds(ways, repeats, kind.device), total=repeats + 1, desc=f"{kind.model} {kind.quantization}"):
        measured.append(entry)
    phases = {way: {phase: [statistics.median(values) for values in zip(*(entry[way][phase] for entry in measured[1:]))]
                    for phase in PHASES} for way in ways}
    prompt = len(policy.prompt(QUESTION, policy.encode(shared.clip)).input_ids)
    return {"prompt": prompt, "base": base, "flops": flops, "phases": phases, "left_out": left_out}


def expected_memory(kind: Kind, setting: Setting, prompt: int, model: str, predict: Callable) -> dict[str, float]:
    r"""Return the predicted bytes by phase, for the shared way: `predict` is `scale.memory.predict`."""
    config = TrainConfig(
        model=model, quantization=kind.quantization, dtype=kind.dtype, device=kind.device, num_frames=setting.frames,
        frame_size=setting.size, group_size=setting.group_size, prompts_per_step=1, feature_cache_mb=1, augment="none",
        max_new_tokens=setting.completion_tokens, inner_updates=setting.inner_updates, eval_files=[])
    visual = (setting.frames + 1) // 2 * (setting.size // 28) ** 2
    found = predict(config, image=False, text_tokens=prompt - visual, on_gpu=False)
    static = sum(found.static.values())
    return {"sample": static + sum(found.phases["sample"].values()), "step": found.peak,
            "forward + backward": static + sum(found.phases["update"].values())}


def table_rows(kind: Kind, setting: Setting, found: dict, flops: dict, expected: dict,
               peak: float | None) -> list[dict]:
    r"""Return a line for each way and phase; None where something was not measured."""
    lines, tokens = [], setting.group_size * setting.completion_tokens
    for way, phases in found["phases"].items():
        for phase, (seconds, _, above) in phases.items():
            teraflop = flops[way][phase] / 1e12 if way in flops else None
            memory = found["base"] + above if above else None
            predicted = expected.get(phase) if way == "shared" else None
            lines.append({
                "model": f"{kind.model}, {kind.quantization}, {kind.dtype}", "way": way, "phase": phase,
                "seconds": round(seconds, 4), "completion tokens / s": round(tokens / seconds, 1),
                "TFLOP": teraflop and float(f"{teraflop:.3g}"),
                "% of peak": round(100 * teraflop / seconds / peak, 1) if peak and teraflop else None,
                "GB": round(memory / 2**30, 3) if memory else None,
                "predicted GB": round(predicted / 2**30, 3) if predicted else None})
    return lines


def compare_training(device: str, steps: int = 2) -> dict[str, Any]:
    r"""Make the first steps of a training of the shipped tiny model on a device and on the CPU; return both metrics and
    the largest relative difference."""
    def train(where: str) -> list[dict]:
        config = TrainConfig(device=where, quantization="none", steps=steps, eval_files=[])
        trainer = Trainer(config, read_records(resolve(config.train_file)), load_policy(config))
        return [{name: line[name] for name in COMPARED} for line in (trainer.step() for _ in range(steps))]

    exact = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # the encoder's convolution, else with 10 bits
    try:
        here, there = train(device), train("cpu")
    finally:
        torch.backends.cudnn.allow_tf32 = exact
    difference = max(abs(a[name] - b[name]) / max(abs(b[name]), 1e-6) for a, b in zip(here, there) for name in COMPARED)
    return {"device": device, "metrics": here, "metrics_cpu": there, "largest_difference": difference,
            "tolerance": TOLERANCE, "within": difference <= TOLERANCE}


def gpu_report(device: str, *, tiny: bool, predict: Callable, command: str, completion_tokens: int = 64,
               repeats: int = 5, note: str = "", json_file: Path | None = None, table_file: Path | None = None) -> str:
    r"""Make the report, write it, and return its table as Markdown.

    tiny: the shape and the frames that a CPU can try, to see that the report works; it is written only where files are
    named. predict: `scale.memory.predict`. Raises `UserError` without a GPU, unless tiny is asked for on the CPU.
    """
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and not torch.cuda.is_available() or not on_gpu and not tiny:
        raise UserError("the GPU report needs a GPU that torch sees, and there is none here: run it on a machine with "
                        "one (a CUDA build of torch), or try it with --device cpu --tiny")
    setting = Setting(4, 8, completion_tokens, 1, 56) if tiny else Setting(16, 8, completion_tokens, 1, 252)
    card = machine(device)
    peak = peak_of(card) if on_gpu else None
    result = {"date": datetime.date.today().isoformat(), "machine": card, "command": command, "versions": versions(),
              "cuda": torch.version.cuda, "note": note, "setting": vars(setting), "peak_tflops": peak, "left_out": [],
              "rows": []}
    flops: dict = {}
    for quantization in ("none", "nf4"):
        kind = Kind("tiny" if tiny else "3B", quantization, "bfloat16", device)
        with tempfile.TemporaryDirectory() as folder:
            found = measure(kind, setting, repeats, Path(folder))
            expected = expected_memory(kind, setting, found["prompt"], folder if tiny else PUBLISHED, predict)
        flops = flops or found["flops"]  # those of bfloat16, whose products are all counted
        result["rows"] += table_rows(kind, setting, found, flops, expected, peak and peak[0])
        result["left_out"] += [f"{way}, {quantization}: out of memory" for way in found["left_out"]]
    result["training"] = compare_training(device)
    text, recorded = as_table(result), data_folder() / "results" / "bench"
    json_file, table_file = (path or (None if tiny else recorded / f"gpu_report.{kind}") for path, kind in
                             ((json_file, "json"), (table_file, "md")))
    for path, content in ((json_file, json.dumps(result, indent=1) + "\n"), (table_file, text)):
        if path is not None:
            make_folder(Path(path).parent)
            write_atomically(path, content)
    return text


def as_table(result: dict) -> str:
    r"""Return the report as Markdown."""
    found, setting = ", ".join(f"{name} {version}" for name, version in result["versions"].items()), result["setting"]
    peak, training = result["peak_tflops"], result["training"]
    rows = pd.DataFrame(result["rows"]).astype(object)
    metrics = [{"step": number + 1, "on": where, **{name: round(line[name], 6) for name in COMPARED}}
               for number in range(len(training["metrics"]))
               for where, line in ((training["device"], training["metrics"][number]),
                                   ("cpu", training["metrics_cpu"][number]))]
    return "\n\n".join(filter(None, [
        "# A training step on one card", f"`{result['command']}`",
        f"{result['date']}, {result['machine']}; {found}, CUDA {result['cuda']}. {result['note']}".strip(),
        f"{setting['frames']} frames of {setting['size']} x {setting['size']}, a group of {setting['group_size']} "
        f"completions of {setting['completion_tokens']} tokens, {setting['inner_updates']} update, random weights, "
        f"adapters of rank 16; medians. GB are 2**30 bytes: the most that PyTorch's allocator held, and what "
        f"`python -m dvr1_lite memory` predicts. TFLOP: counted by torch.utils.flop_counter.",
        f"Peak: {peak[0]} TFLOP/s in dense bfloat16 ({peak[1]})." if peak else
        "Shares of the peak are left out: the card is not in the table of peaks (`lab/gpu_report.py`).",
        markdown(rows.where(rows.notna(), "-")), *(f"Left out: {text}." for text in result["left_out"]),
        "## The tiny model's training on this device and on the CPU",
        f"Largest relative difference {training['largest_difference']:.1e}, "
        f"{'within' if training['within'] else '**more than**'} the tolerance of {training['tolerance']}.",
        markdown(pd.DataFrame(metrics))]))
