r"""The full-scale path on stand-ins: the paper's data formats and both model families, small and random."""

import json
import logging

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from small_run import reward_by_coin
from tiny import write_model

from dvr1_lite import __main__ as cli
from dvr1_lite import export, training
from dvr1_lite.config import load_config, make_config
from dvr1_lite.data import read_records
from dvr1_lite.errors import ConfigError, ModelError, RecordError
from dvr1_lite.evaluation import grounded_answers, prediction, summarise
from dvr1_lite.policy import FAMILIES, Policy
from dvr1_lite.rewards import temporal_iop
from dvr1_lite.video import write_clip

SMALL = {"num_frames": 4, "frame_size": 56, "steps": 2, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 6,
         "inner_updates": 2, "hint_traces": 2, "history_window": 4, "save_every": 1, "lora_rank": 4, "device": "cpu",
         "micro_batch": 3, "eval_batch": 4, "figures": False, "instruction": "what colour", "optimizer": "adamw-8bit"}


def write_seed_bench(folder, questions=4):
    r"""SEED-Bench-R1's folders: annotations/, videos/SOURCE/, images/SOURCE/, its fields; one row has no video."""
    random = np.random.RandomState(0)
    for name in ("annotations", "videos/EpicKitchens", "images/EpicKitchens"):
        (folder / name).mkdir(parents=True)
    rows = []
    for i in range(questions):
        frames = random.randint(0, 255, (8, 56, 56, 3), dtype=np.uint8)
        write_clip(folder / f"videos/EpicKitchens/P{i}.mp4", frames, 4)
        Image.fromarray(frames[-1]).save(folder / f"images/EpicKitchens/P{i}.png")
        steps = [{"narration_text": "take bag", "start_frame": 0, "stop_frame": 6}] if i else []
        rows.append({"sample_id": f"P{i}", "task_goal": "store cereal", "question": "what comes then", "answer": "red",
                     "negative_answers": ["green", "blue", "first", "then"], "task_progress_metadata": steps,
                     "video_source": "EpicKitchens", "video_basename": f"P{i}.mp4", "domain": "Daily life",
                     "current_observation_basename": f"P{i}.png"})
    asked = [{key: value for key, value in row.items() if key != "negative_answers"} |
             {"choice_a": "green", "choice_b": "red", "choice_c": "blue", "choice_d": "first", "golden_choice_idx": "B"}
             for row in rows]
    for name, lines in {"training_6k": rows, **{f"validation_L{level}": asked for level in (1, 2, 3)}}.items():
        (folder / f"annotations/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def seed_bench(tmp_path_factory):
    return write_seed_bench(tmp_path_factory.mktemp("seed-bench-r1"))


def shipped(seed_bench, model, out, **changes):
    r"""The shipped SEED-Bench-R1 configuration, shrunk to a stand-in; its data files keep their names."""
    config = load_config("seed_bench_r1_qwen2_5_vl_3b")
    move = lambda path: path.replace(config.data_root, str(seed_bench))
    files = {name: move(path) for name, path in config.eval_paths().items()}
    return load_config("seed_bench_r1_qwen2_5_vl_3b", {
        "model": str(model), "train_file": move(config.train_file), "data_root": str(seed_bench), "eval_files": files,
        "out": str(out)} | SMALL | changes)


# --- training and after ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def run(request, seed_bench, tmp_path_factory):
    r"""A run of the shipped configuration: bfloat16, NF4, checkpointing, 8-bit AdamW, videos with observations."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp(request.param)
    config = shipped(seed_bench, write_model(folder / "model", request.param), folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        reward_by_coin(patch)
        return config, training.train(config, progress=False)


def test_the_shipped_configuration_trains(run):
    config, summary = run
    assert summary["complete"] and summary["step"] == 2 and summary["updates"] == 4
    assert (config.dtype, config.quantization, config.gradient_checkpointing) == ("bfloat16", "nf4", True)
    assert set(summary["after"]) == {"L1", "L2", "L3"} and summary["after"]["L1"]["n"] == 4
    lines = (training.Path(config.out) / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["grad_norm"] > 0 for line in lines)


def test_the_adapter_goes_into_plain_peft_and_merges(run, tmp_path):
    from peft import PeftModel

    config, _ = run
    adapter = training.Path(config.out) / "adapter"
    said = json.loads((training.Path(config.model) / "config.json").read_text())
    kind = getattr(transformers, FAMILIES[said["model_type"]])
    plain = PeftModel.from_pretrained(kind.from_pretrained(config.model, dtype=torch.float32), adapter)
    merged = plain.merge_and_unload()
    out = export.merge(adapter, tmp_path / "merged", dtype="float32")
    ours = kind.from_pretrained(out, dtype=torch.float32)
    for (name, expected), (same, found) in zip(merged.named_parameters(), ours.named_parameters(), strict=True):
        assert name == same and torch.equal(expected, found), name
    Policy.load(out).prompt("what colour")  # with tokenizer, template and preprocessing
    assert Policy.load(out).preprocessing == Policy.load(config.model).preprocessing
    card = (out / "README.md").read_text()
    assert f"--model {said['model_type']} --model_args=pretrained=" in card and "reg-grpo" in card


def test_merge_by_command_and_its_mistakes(run, tmp_path, capsys):
    config, _ = run
    adapter = str(training.Path(config.out) / "adapter")
    assert cli.main(["merge", "--adapter", adapter, "--out", str(tmp_path / "m")]) == 0
    assert "model card" in capsys.readouterr().out
    saved = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "bfloat16" in json.dumps(saved)
    assert cli.main(["merge", "--adapter", adapter, "--out", str(tmp_path / "m")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert cli.main(["merge", "--adapter", str(tmp_path), "--out", str(tmp_path / "n")]) == 2
    assert "holds no adapter" in capsys.readouterr().err


def test_an_8_bit_run_resumes_with_the_same_numbers(seed_bench, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    reward_by_coin(monkeypatch)
    model = write_model(tmp_path / "model", "qwen2_vl")
    whole = shipped(seed_bench, model, tmp_path / "whole", eval_files={})
    training.train(whole, progress=False)
    stop, real = tmp_path / "stop", training.Trainer._step

    def interrupted(trainer):
        if trainer.step == 1:
            raise KeyboardInterrupt
        return real(trainer)

    monkeypatch.setattr(training.Trainer, "_step", interrupted)
    config = shipped(seed_bench, model, stop, eval_files={})
    training.train(config, progress=False)
    monkeypatch.setattr(training.Trainer, "_step", real)
    training.train(config, progress=False, resume=True)
    read = lambda folder: [training.comparable(json.loads(line))
                           for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert read(stop) == read(tmp_path / "whole")


# --- what NExT-GQA counts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("predicted", "truth", "iop"), [
    ((2, 4), (1, 5), 1.0), ((0, 4), (2, 10), 0.5), ((0, 2), (3, 4), 0.0), ((4, 2), (1, 5), 0.0),
    ((3, 3), (1, 5), 1.0), ((6, 6), (1, 5), 0.0), ((1, float("inf")), (1, 5), 0.0),
])
def test_intersection_over_prediction_by_hand(predicted, truth, iop):
    assert temporal_iop(predicted, truth) == iop


def write_next_gqa(folder):
    header = "video_id,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
    rows = [f"77,80,56,56,when is it red,red,{qid},TN,red,green,blue,first,then\n" for qid in (1, 2, 3)]
    (folder / "test.csv").write_text(header + "".join(rows))
    located = {"1": [[0.0, 1.0], [4.0, 6.0]], "2": [[2.0, 4.0]], "3": [[2.0, 4.0]]}
    (folder / "gsub_test.json").write_text(json.dumps({"77": {"duration": 8.0, "location": located, "fps": 10}}))
    return folder / "test.csv"


def test_grounded_answers_by_hand(tmp_path):
    records = read_records(write_next_gqa(tmp_path))
    said = ["<think>x</think><answer>A</answer><glue>[(4.0, 7.0)]</glue>",  # best segment: IoU 2/3, IoP 2/3; right
            "<think>x</think><answer>B</answer><glue>[(2.0, 4.0)]</glue>",  # wrong, perfectly placed
            "<think>x</think><answer>A</answer><glue>[(0.0, 4.5)]</glue>"]  # right, IoU 2/4.5, IoP 2/4.5
    rows = [prediction(index, record, text) for index, (record, text) in enumerate(zip(records, said))]
    assert [row["iop"] for row in rows] == pytest.approx([2 / 3, 1, 2 / 4.5])
    summary = summarise(rows)
    assert summary["mean_iou"] == pytest.approx((2 / 3 + 1 + 2 / 4.5) / 3)
    assert summary["mean_iop"] == summary["mean_iou"] and summary["recall"] == {"0.3": 1.0, "0.5": 2 / 3, "0.7": 1 / 3}
    assert summary["iop_at"] == {"0.3": 1.0, "0.5": 2 / 3}
    assert summary["acc_gqa"] == pytest.approx(1 / 3) and summary["accuracy"] == pytest.approx(2 / 3)
    assert len(summary["acc_gqa_ci95"]) == len(summary["mean_iou_ci95"]) == 2
    assert "Acc@GQA" in cli.accuracy_table(summary)
    broken = prediction(0, records[0], "<answer>A</answer>")
    assert broken["iop"] == broken["iou"] == broken["accuracy"] == 0.0
    assert grounded_answers([{"accuracy": 1.0, "clip": "a", "iou": None}]) == {}


# --- looking a data set over -----------------------------------------------------------------------------------------


def test_check_counts_shows_and_draws(seed_bench, tmp_path, capsys):
    data = ["check", "--data", str(seed_bench / "annotations/training_6k.jsonl"), "--root", str(seed_bench)]
    assert cli.main([*data, "--num-frames", "8", "--out", str(tmp_path / "strips")]) == 0
    told = capsys.readouterr().out
    for text in ("4 records, 7 clips and pictures", "problem type multiple choice: 4", "missing files: 0",
                 "prompt:   Options: A.", "(red)", "clip:     ", "picture:  "):
        assert text in told
    assert told.count("record:   ") == 3
    assert [path.name for path in sorted((tmp_path / "strips").iterdir())] == [f"record_{i}.png" for i in (1, 2, 3)]


def test_check_finds_missing_and_broken_files_and_late_spans(tmp_path, capsys):
    data = write_next_gqa(tmp_path)
    command = ["check", "--data", str(data), "--num-frames", "4"]
    assert cli.main(command) == 1
    assert "missing files: 3" in (told := capsys.readouterr().out) and "record:" not in told
    write_clip(tmp_path / "77.mp4", np.zeros((12, 56, 56, 3), np.uint8), 4)  # 3 seconds, not 8
    assert cli.main(command) == 1
    told = capsys.readouterr().out
    assert "span errors: 3" in told and "starts after the clip's end at 3.00 s" in told and told.count("record:") == 3
    (tmp_path / "77.mp4").write_bytes(b"nothing")
    assert cli.main([*command, "--limit", "1"]) == 1
    assert "undecodable files: 1" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "told"), [
    (["--root", "nowhere"], "nowhere: no such data root"), (["--num-frames", "0"], "1 or more frames"),
    (["--limit", "-1"], "limit of 0 or more"),
])
def test_mistakes_of_check(tmp_path, capsys, arguments, told):
    assert cli.main(["check", "--data", str(write_next_gqa(tmp_path)), *arguments]) == 2
    assert told in capsys.readouterr().err


# --- bad input, before the first step --------------------------------------------------------------------------------


def fails(config, error, told, monkeypatch):
    monkeypatch.setattr(training.Trainer, "_step", lambda trainer: pytest.fail("a step was made"))
    with pytest.raises(error, match=told):
        training.train(config, progress=False)


def test_a_hub_that_cannot_be_reached(seed_bench, tmp_path, monkeypatch):
    config = shipped(seed_bench, "Qwen/Qwen2.5-VL-3B-Instruct", tmp_path / "run", local_files_only=True)
    fails(config, ModelError, "hub is out of reach: download it elsewhere and give its folder", monkeypatch)


def test_a_gated_model(seed_bench, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("You are trying to access a gated repo.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    fails(shipped(seed_bench, "someone/gated-model", tmp_path / "run"), ModelError,
          "gated: accept its terms.*hf auth login", monkeypatch)


def test_a_wrong_data_root(seed_bench, tmp_path, monkeypatch):
    config = shipped(seed_bench, tmp_path, tmp_path / "run", data_root=str(tmp_path / "none"))
    fails(config, RecordError, "no such data root; give the folder that the clips' paths start from", monkeypatch)


def test_a_type_that_the_gpu_lacks(seed_bench, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    config = shipped(seed_bench, write_model(tmp_path / "model"), tmp_path / "run", device="cuda", check_memory=False)
    fails(config, ModelError, "Tesla T4 has no bfloat16: use dtype: float16 or float32", monkeypatch)


def test_no_gpu_and_no_such_device(seed_bench, tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    model = write_model(tmp_path / "model")
    fails(shipped(seed_bench, model, tmp_path / "run", device="cuda"), ModelError, "torch sees no GPU: use device: cpu",
          monkeypatch)
    fails(shipped(seed_bench, model, tmp_path / "run", device="gpu"), ConfigError, "'gpu': give cpu, cuda or cuda:N",
          monkeypatch)


def test_clips_that_are_all_missing_stop_the_run(tmp_path, monkeypatch):
    data = write_next_gqa(tmp_path)
    config = make_config(SMALL | {"model": str(write_model(tmp_path / "model")), "train_file": str(data),
                                  "eval_files": {}, "out": str(tmp_path / "run"), "optimizer": "adamw"})
    logging.getLogger("dvr1_lite").setLevel(logging.ERROR)
    with pytest.raises(Exception, match="no such file|cannot be read"):
        training.train(config, progress=False)
