r"""A world small enough to train on in a second: a tiny random model, three clips, three records."""

import zlib
from pathlib import Path

import numpy as np
from tiny import write_model

from dvr1_lite import training
from dvr1_lite.config import TrainConfig, make_config
from dvr1_lite.data import Record, write_records
from dvr1_lite.rewards import Score
from dvr1_lite.video import write_clip


def write_world(folder: Path, clips: int = 3) -> Path:
    r"""Writes `model/`, clips `0.mp4` ... and `records.jsonl`, two questions of different types a clip."""
    write_model(folder / "model")
    random, records = np.random.RandomState(0), []
    for number in range(clips):
        path = folder / f"{number}.mp4"
        write_clip(path, random.randint(0, 255, (8, 56, 56, 3), dtype=np.uint8), 4)
        for kind, question in (("colour", "what colour comes first"), ("order", "what comes then")):
            records.append(Record(f"{kind}{number}", question, ("red", "green", "blue"), "ABC"[number % 3],
                                  "multiple choice", kind, path))
    write_records(folder / "records.jsonl", records)
    return folder


def small_config(world: Path, out: Path, **changes) -> TrainConfig:
    r"""Three steps of two groups of four, all phases on, seconds long."""
    records = str(world / "records.jsonl")
    values = {"model": str(world / "model"), "train_file": records, "eval_files": {"L1": records}, "num_frames": 4,
              "steps": 3, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 6, "inner_updates": 2,
              "hint_traces": 2, "history_window": 4, "dead_zone": 0.01, "save_every": 1, "figures": False,
              "lora_rank": 4, "out": str(out)}
    return make_config(values | changes)


def coin_score(record: Record, text: str) -> Score:
    r"""A reward that a random model's words can earn: right or wrong by a checksum of the text."""
    right = float(zlib.crc32(text.encode()) % 3 == 0)
    return Score(1.0, right, None, 1.0 + right, 2.0)


def reward_by_coin(monkeypatch) -> None:
    r"""Makes training score by `coin_score`, and take any right text for a trace, so that every branch is run."""
    monkeypatch.setattr(training, "score", coin_score)
    monkeypatch.setattr(training, "best_trace", lambda scored: next((t for t, s in scored if s.right and t), None))
