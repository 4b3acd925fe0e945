r"""The GPU report, tried on the CPU with a tiny shape; what needs a card is checked by hand-made measurements."""

import functools
import json

import pytest
import torch

from dvr1_lite.__main__ import main
from dvr1_lite.lab import bench, gpu_report
from dvr1_lite.lab.bench import PHASES, Kind, Setting, Shared, build_policy
from dvr1_lite.scale.memory import architecture_of, known_models, predict
from tests.lab.test_bench import TEXT, VISION


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.SHAPES, "tiny", (TEXT, VISION))
        patch.setattr(gpu_report, "compare_training", functools.partial(gpu_report.compare_training, steps=1))
        yield


def test_the_measured_shape_is_the_published_one():
    published, base = known_models()[gpu_report.PUBLISHED], json.loads(
        (bench.data_folder() / "base_model" / "config.json").read_text())
    for part, shape in zip(("text", "vision"), bench.SHAPES["3B"]):
        merged = base[f"{part}_config"] | shape | {"out_hidden_size": bench.SHAPES["3B"][0]["hidden_size"],
                                                   "window_size": 112}  # as build_policy has them
        assert {name: merged[name] for name in published[part]} == published[part]


def test_the_report_is_tried_on_a_cpu(tmp_path, capsys):
    files = {"--json": tmp_path / "r.json", "--table": tmp_path / "r.md"}
    given = ["--completion-tokens", "3", "--repeats", "1", *(str(x) for pair in files.items() for x in pair)]
    assert main(["bench", "--gpu-report", "--device", "cpu", "--tiny", *given]) == 0
    result, table = json.loads(files["--json"].read_text()), files["--table"].read_text()
    assert capsys.readouterr().out.strip() == table.strip()
    rows = {(row["model"], row["way"], row["phase"]): row for row in result["rows"]}
    assert len(rows) == 2 * 2 * len(PHASES) == 16 and result["left_out"] == []
    step, sample = (rows["tiny, none, bfloat16", "shared", phase] for phase in ("step", "sample"))
    assert step["seconds"] > sample["seconds"] > 0 and step["TFLOP"] > sample["TFLOP"] > 0
    assert sample["completion tokens / s"] == pytest.approx(24 / sample["seconds"], rel=0.01)
    assert rows["tiny, none, bfloat16", "repeated", "step"]["TFLOP"] > step["TFLOP"]
    assert step["% of peak"] is step["GB"] is None and "not in the table of peaks" in table
    assert result["training"]["within"] and result["training"]["largest_difference"] == 0.0
    assert "--gpu-report" in result["command"] and result["versions"]["torch"] == torch.__version__


def test_counted_operations_are_those_of_the_shapes(tmp_path):
    kind, setting = Kind("tiny", "none", "float32"), Setting(4, 8, 9, 1, 56)
    way, meter = Shared(build_policy(kind, folder=tmp_path), setting), gpu_report.FlopMeter("cpu")
    way.step(meter)
    prompt = len(way.policy.prompt(bench.QUESTION, way.policy.encode(way.clip)).input_ids)
    architecture, tokens = architecture_of(tmp_path), prompt + 8 * 8  # a completion's last token is never read
    forward = 2 * architecture.matrices * tokens + 2 * architecture.embeddings * 8 * 9  # layers, output head
    assert meter.flops["log-probs"] == forward  # the adapters are off; attention is counted on a GPU only
    assert 2.0 < meter.flops["forward + backward"] / forward < 6.0  # inputs' gradients, and adapters of rank 16
    assert meter.flops["step"] == sum(meter.flops[phase] for phase in PHASES[:-1])


def test_shares_of_the_peak_and_memory_by_hand():
    phases = {phase: [2.0, 1.0, 2**30] for phase in PHASES}
    found = {"base": 3 * 2**30, "phases": {"shared": phases, "repeated": phases}}
    flops = {"shared": dict.fromkeys(PHASES, 40e12)}
    rows = gpu_report.table_rows(Kind("3B", "nf4", "bfloat16", "cuda"), Setting(16, 8, 64), found, flops,
                                 {"step": 5 * 2**30}, 200.0)
    step, other = rows[3], rows[7]
    assert step["% of peak"] == 10.0 and step["completion tokens / s"] == 256.0
    assert step["GB"] == 4.0 and step["predicted GB"] == 5.0
    assert other["way"] == "repeated" and other["TFLOP"] is other["% of peak"] is other["predicted GB"] is None


@pytest.mark.parametrize(("card", "peak"), [
    ("NVIDIA A100-SXM4-80GB, 16-core x86-64 CPU", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
    ("NVIDIA H200", 989), ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("NVIDIA GeForce RTX 4090", 165),
    ("NVIDIA A10G", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("Tesla T4", None)])
def test_a_cards_peak_is_found_by_its_name(card, peak):
    found = gpu_report.peak_of(card)
    assert (found and found[0]) == peak


def test_the_prediction_is_for_the_measured_step():
    kind, setting = Kind("3B", "nf4", "bfloat16", "cuda"), Setting(16, 8, 64)
    found = gpu_report.expected_memory(kind, setting, 700, gpu_report.PUBLISHED, predict)
    assert found["step"] == max(found.values()) and 2 < found["step"] / 2**30 < 16
    longer = gpu_report.expected_memory(kind, Setting(16, 8, 512), 700, gpu_report.PUBLISHED, predict)
    assert longer["step"] > found["step"]


@pytest.mark.parametrize("arguments", [[], ["--device", "cuda", "--tiny"], ["--device", "cpu"]])
def test_without_a_card_the_message_says_what_to_do(arguments, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--gpu-report", *arguments]) == 2
    assert "needs a GPU that torch sees" in (message := capsys.readouterr().err) and "--device cpu --tiny" in message
