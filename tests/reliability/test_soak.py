r"""A long training run: memory, open files and threads do not grow. `pytest -m slow -k soak`, or for longer

    DVR1_SOAK_STEPS=10000 DVR1_SOAK_RECORD=soak.json python -m pytest -m slow -k soak

The shipped model on the shipped clips, nothing replaced: hints, noise, checkpoints, and a feature cache that is too
small for the clips, so that they are decoded and encoded again and again.
"""

import json
import os
import statistics
import threading
import time
from pathlib import Path

import psutil
import pytest

from dvr1_lite.config import make_config
from dvr1_lite.files import read_lines
from tests.small_run import train_files

STEPS = int(os.environ.get("DVR1_SOAK_STEPS", "1000"))
SMALL = {"prompts_per_step": 2, "group_size": 3, "inner_updates": 1, "hint_traces": 2, "history_window": 8,
         "save_every": 100, "feature_cache_mb": 1, "eval_limit": 12, "figures": False}
MOST_GROWTH = 24  # MB between the second and the last quarter; a leak of one clip's frames (0.3 MB) shows in 80 steps


def watch(samples: list[dict], stop: threading.Event) -> None:
    r"""Measure memory, open files and threads of this process and its decoder every second."""
    began, process = time.monotonic(), psutil.Process()
    while not stop.wait(1.0):
        family = [process, *process.children()]
        files = sum(one.num_fds() if hasattr(one, "num_fds") else len(one.open_files()) for one in family)
        samples.append({"seconds": round(time.monotonic() - began), "files": files,
                        "memory_mb": sum(one.memory_info().rss for one in family) / 2**20,
                        "threads": sum(one.num_threads() for one in family)})


def growth(samples: list[dict], name: str) -> float:
    r"""Compute the median of the last quarter of the samples less that of the second; the first quarter warms up."""
    quarter, values = len(samples) // 4, [sample[name] for sample in samples]
    return statistics.median(values[-quarter:]) - statistics.median(values[quarter:2 * quarter])


def test_growth_is_found():
    flat = [{"x": 50.0 + i % 3} for i in range(40)]
    assert growth(flat, "x") == 0 and growth([{"x": 2.0 * i} for i in range(40)], "x") == 40.0
    assert growth([{"x": 300.0 if i < 10 else 400.0} for i in range(40)], "x") == 0  # warming up


@pytest.mark.slow
def test_soak(tmp_path):
    samples, stop, began = [], threading.Event(), time.monotonic()
    watcher = threading.Thread(target=watch, args=(samples, stop), daemon=True)
    watcher.start()
    try:
        summary = train_files(make_config(SMALL | {"steps": STEPS, "out": str(tmp_path / "run")}))
    finally:
        stop.set()
    watcher.join()
    lines = list(read_lines(tmp_path / "run" / "metrics.jsonl"))
    found = {"steps": summary["step"], "minutes": round((time.monotonic() - began) / 60, 1),
             "rollouts": summary["rollouts"], "checkpoints": STEPS // SMALL["save_every"],
             "augmented": sum(line["augmented"] for line in lines)}
    found |= {f"growth_{name}": round(growth(samples, name), 2) for name in ("memory_mb", "files", "threads")}
    curve = samples[::max(1, len(samples) // 40)]
    found["curve"] = {name: [round(sample[name]) for sample in curve] for name in samples[0]}
    if target := os.environ.get("DVR1_SOAK_RECORD"):
        Path(target).write_text(json.dumps(found) + "\n")
    assert summary["step"] == STEPS and found["augmented"] > STEPS // 50
    assert len(samples) > 20 and found["growth_memory_mb"] < MOST_GROWTH, found
    assert found["growth_files"] <= 0 and found["growth_threads"] <= 0, found
