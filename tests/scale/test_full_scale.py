r"""The shipped full-scale configuration trains on stand-ins: SEED-Bench-R1's files and both model families, small."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dvr1_lite.config import load_config
from dvr1_lite.errors import ClipError
from dvr1_lite.families import FAMILIES
from dvr1_lite.run import comparable, train
from dvr1_lite.scale.datasets import read_any
from dvr1_lite.toy.clips import write_clip
from dvr1_lite.training import Trainer
from tests.small_run import reward_by_coin
from tests.tiny import write_model

SMALL = {"num_frames": 4, "frame_size": 56, "steps": 2, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 6,
         "inner_updates": 2, "hint_traces": 2, "history_window": 4, "save_every": 1, "lora_rank": 4, "device": "cpu",
         "micro_batch": 3, "eval_batch": 4, "figures": False, "instruction": "what colour", "optimizer": "adamw-8bit"}


@pytest.fixture(scope="module")
def seed_bench(tmp_path_factory):
    r"""SEED-Bench-R1's folders annotations/, videos/SOURCE/ and images/SOURCE/ with 4 questions, one without clip."""
    folder, random, rows = tmp_path_factory.mktemp("seed-bench-r1"), np.random.RandomState(0), []
    for name in ("annotations", "videos/EpicKitchens", "images/EpicKitchens"):
        (folder / name).mkdir(parents=True)
    for i in range(4):
        frames = random.randint(0, 255, (8, 56, 56, 3), dtype=np.uint8)
        write_clip(folder / f"videos/EpicKitchens/P{i}.mp4", frames, 4)
        Image.fromarray(frames[-1]).save(folder / f"images/EpicKitchens/P{i}.png")
        steps = [{"narration_text": "take bag", "start_frame": 0, "stop_frame": 6}] if i else []
        rows.append({"sample_id": f"P{i}", "task_goal": "store cereal", "question": "what comes then", "answer": "red",
                     "task_progress_metadata": steps, "video_source": "EpicKitchens", "video_basename": f"P{i}.mp4",
                     "current_observation_basename": f"P{i}.png", "domain": "Daily life"})
    choices = {f"choice_{letter}": text for letter, text in zip("abcd", ("green", "red", "blue", "first"))}
    drawn = {"negative_answers": ["green", "blue", "first", "then"]}
    for name, extra in {"training_6k": drawn, "validation_L1": choices | {"golden_choice_idx": "B"}}.items():
        (folder / f"annotations/{name}.jsonl").write_text("".join(json.dumps(row | extra) + "\n" for row in rows))
    return folder


def run(seed_bench, model, out, monkeypatch, *, resume=False, **changes):
    r"""Train the shipped configuration, shrunk: bfloat16, NF4, checkpointing, 8-bit AdamW, clips with observations."""
    pytest.importorskip("bitsandbytes")
    reward_by_coin(monkeypatch)
    files = {name: str(seed_bench / f"annotations/{name}.jsonl") for name in ("training_6k", "validation_L1")}
    config = load_config("seed_bench_r1_qwen2_5_vl_3b", {
        "model": str(model), "train_file": files["training_6k"], "data_root": str(seed_bench),
        "eval_files": {"L1": files["validation_L1"]}, "out": str(out)} | SMALL | changes)
    assert (config.dtype, config.quantization, config.gradient_checkpointing) == ("bfloat16", "nf4", True)
    evaluations = {name: read_any(path, seed_bench) for name, path in config.eval_paths().items()}
    summary = train(config, read_any(config.train_file, seed_bench), evaluations, progress=False, resume=resume)
    return summary, [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shipped_configuration_trains(family, seed_bench, tmp_path, monkeypatch):
    summary, lines = run(seed_bench, write_model(tmp_path / "model", family), tmp_path / "run", monkeypatch)
    assert summary["complete"] and summary["step"] == 2 and summary["updates"] == 4
    assert summary["after"]["L1"]["n"] == 4 and all(line["grad_norm"] > 0 for line in lines)


def test_an_8_bit_run_resumes_with_the_same_numbers(seed_bench, tmp_path, monkeypatch):
    model = write_model(tmp_path / "model", "qwen2_vl")
    _, whole = run(seed_bench, model, tmp_path / "whole", monkeypatch, eval_files={})
    step = Trainer.step

    def interrupted(trainer):
        if trainer.steps == 1:
            raise KeyboardInterrupt
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        run(seed_bench, model, tmp_path / "stopped", monkeypatch, eval_files={})
    _, resumed = run(seed_bench, model, tmp_path / "stopped", monkeypatch, eval_files={}, resume=True)
    assert [comparable(line) for line in resumed] == [comparable(line) for line in whole]


def test_clips_that_are_all_missing_stop_the_run(seed_bench, tmp_path, monkeypatch):
    (tmp_path / "videos/EpicKitchens").mkdir(parents=True)
    model, records = write_model(tmp_path / "model"), seed_bench / "annotations/validation_L1.jsonl"
    config = load_config("seed_bench_r1_qwen2_5_vl_3b", {"model": str(model), "quantization": "none", "eval_files": {},
                                                         "out": str(tmp_path / "run")} | SMALL | {"optimizer": "adamw"})
    with pytest.raises(ClipError, match="no such file|cannot be read"):
        train(config, read_any(records, tmp_path), progress=False)
