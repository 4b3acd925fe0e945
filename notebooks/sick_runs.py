r"""Make the sick runs of notebook 07: trainings of the tiny model with one fault each, and a healthy one.

    python notebooks/sick_runs.py          all of them, about two minutes on one core
    python notebooks/sick_runs.py blind    one or several

Each is 30 steps of GRPO with the settings of `COMMON`, seed 0, on questions about flashes. `data/results/sick/` gets
NAME.jsonl, the run's metrics.jsonl with the values of `KEPT` alone, and controls.json: whether the trained model's
success depends on the clip. Most records of `counting` have one answer, as in many real data sets.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dvr1_lite.config import TrainConfig  # noqa: E402
from dvr1_lite.data import Record, read_records  # noqa: E402
from dvr1_lite.files import data_folder, make_folder, resolve, write_atomically  # noqa: E402
from dvr1_lite.loading import quiet_libraries  # noqa: E402
from dvr1_lite.own_reward import OwnReward  # noqa: E402
from dvr1_lite.rewards import parse_completion  # noqa: E402
from dvr1_lite.run import load_policy  # noqa: E402
from dvr1_lite.scale.pilot import ask, compare, controls  # noqa: E402
from dvr1_lite.toy.clips import write_clip  # noqa: E402
from dvr1_lite.training import Trainer  # noqa: E402

STEPS = 30
COMMON = {"method": "grpo", "augment": "none", "quantization": "none", "learning_rate": 3e-4, "beta": 0.01,
          "inner_updates": 2, "prompts_per_step": 8, "group_size": 8, "eval_files": []}
KEPT = ("step", "reward_normalised", "format_rate", "accuracy", "vanishing", "vanishing_all_right",
        "vanishing_all_wrong", "kl", "rho_std", "grad_norm", "unfinished", "completion_tokens")


def mentioned(record: Record, completion: str) -> float:
    r"""Return the share of the true moments that the answer mentions. More moments never cost anything."""
    said, true = parse_completion(completion).answer.split(), record.answer.split()
    return sum(moment in said for moment in true) / len(true)


@dataclass(frozen=True)
class Sick:
    r"""A run: the records that it trains on, what differs from `COMMON`, and its fault."""

    records: str
    changes: dict = field(default_factory=dict)
    own_reward: bool = False
    black_clips: bool = False


RUNS = {"healthy": Sick("counting"),
        "format_collapse": Sick("counting", {"learning_rate": 1e-2, "beta": 0.0}),
        "kl_explosion": Sick("counting", {"learning_rate": 4e-3, "beta": 0.0}),
        "all_vanished": Sick("too hard"),
        "video_ignored": Sick("counting", black_clips=True),
        "reward_hacked": Sick("moments", {"learning_rate": 1e-3}, own_reward=True),
        "too_slow": Sick("counting", {"learning_rate": 1e-6})}


def choose_records(name: str) -> list[Record]:
    r"""Return the records of a run: 60 on the number of flashes, of which 36 have the answer 2; 60 on their moments;
    or 60 of the hardest wording, F4."""
    if name == "too hard":
        return [r for r in read_records(resolve("data/toyvideoqa/train_F4.jsonl")) if r.question_type == "tally"][:60]
    records = read_records(resolve("data/toyvideoqa/train.jsonl"))
    if name == "moments":
        return [r for r in records if r.question_type == "frames" and r.question.startswith("Tell")][:60]
    two, other = ([r for r in records if r.question_type == "count" and (r.answer == "2") == same]
                  for same in (True, False))
    return two[:36] + other[:24]


def blacken(records: Sequence[Record], folder: Path) -> list[Record]:
    r"""Return the records with clips that show nothing, a file for each clip."""
    write_clip(folder / "black.mp4", np.zeros((16, 56, 56, 3), np.uint8), 4)
    return [replace(record, clip=Path(shutil.copyfile(folder / "black.mp4", folder / record.clip.name)))
            for record in records]


def make_run(name: str, folder: Path) -> tuple[list[dict], dict]:
    r"""Train; return the kept metrics of every step, and the success with the own clip beside that with another."""
    run = RUNS[name]
    records = choose_records(run.records)
    if run.black_clips:
        records = blacken(records, folder)
    scoring = OwnReward(mentioned, "sick_runs.py:mentioned") if run.own_reward else None
    config = TrainConfig(**COMMON | run.changes)
    trainer = Trainer(config, records, load_policy(config), scoring)
    lines = [{key: round(line[key], 5) for key in KEPT} for line in (trainer.step() for _ in range(STEPS))]
    shown, change = controls(records, seed=0)["another clip"]
    own, other = ask(trainer, "own clip", records, 4)[0], ask(trainer, "another clip", records, 4, shown, change)[0]
    return lines, compare(own, other)


def main(names: Sequence[str]) -> None:
    quiet_libraries()
    torch.set_num_threads(1)
    out = data_folder() / "results" / "sick"
    make_folder(out)
    file = out / "controls.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in names or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            lines, found[name] = make_run(name, Path(folder))
        write_atomically(out / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        write_atomically(file, json.dumps(found, indent=1) + "\n")
        print(name, lines[-1], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
