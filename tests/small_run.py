r"""Data and a config small enough to train on in a second: a tiny random model, three clips, six records."""

import zlib
from pathlib import Path

import numpy as np

from dvr1_lite import training
from dvr1_lite.config import TrainConfig, make_config
from dvr1_lite.data import Record, read_records
from dvr1_lite.lab.variants import trainer_class
from dvr1_lite.rewards import Score
from dvr1_lite.run import train
from dvr1_lite.toy.clips import write_clip
from tests.records import write_records
from tests.tiny import write_model


def write_world(folder: Path, clips: int = 3) -> Path:
    r"""Write `model/`, clips `0.mp4` ... and `records.jsonl`, two questions of different types for each clip."""
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
    r"""Make a config of three steps of two groups of four with all phases on, which takes a second or two."""
    records = str(world / "records.jsonl")
    values = {"model": str(world / "model"), "train_file": records, "eval_files": {"L1": records}, "num_frames": 4,
              "steps": 3, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 6, "inner_updates": 2,
              "hint_traces": 2, "history_window": 4, "dead_zone": 0.01, "save_every": 1, "figures": False,
              "lora_rank": 4, "quantization": "none", "out": str(out)}
    return make_config(values | changes)


def train_files(config: TrainConfig, **options) -> dict:
    r"""Train on the files that a config names, as the command does; return the summary."""
    evaluations = {name: read_records(path) for name, path in config.eval_paths().items()}
    options = {"trainer": trainer_class(config), "progress": False} | options
    return train(config, read_records(config.train_file), evaluations, **options)


def coin_score(record: Record, text: str, judge: str = "strict") -> Score:
    r"""Score a completion by a checksum of its text, so that a random model earns different rewards."""
    correct = float(zlib.crc32(text.encode()) % 3 == 0)
    return Score(1.0, correct, None, 1.0 + correct, 2.0)


def reward_by_coin(monkeypatch) -> None:
    r"""Score by `coin_score` in training, and take any correct text for a trace, so that every branch is run."""
    monkeypatch.setattr(training, "score", coin_score)
    monkeypatch.setattr(training, "best_trace", lambda scored: next((t for t, s in scored if s.correct and t), None))
