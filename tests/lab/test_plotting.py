r"""Figures: what they claim to show is in them, labels are readable, and every method has a colour of its own."""

import json

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

from dvr1_lite.config import make_config
from dvr1_lite.data import read_records
from dvr1_lite.files import data_folder
from dvr1_lite.lab import plotting
from dvr1_lite.objectives import METHODS
from dvr1_lite.video import Clip

METRICS = [{"step": step, "reward_normalised": step / 10, "accuracy": step / 20, "format_rate": 1.0, "vanishing": 0.5,
            "vanishing_after": 0.25, "vanishing_all_right": 0.2, "vanishing_all_wrong": 0.3} for step in range(1, 7)]


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_every_method_has_a_colour_of_its_own():
    assert set(METHODS) | {"base"} == set(plotting.METHOD_COLOURS)
    assert len(set(plotting.METHOD_COLOURS.values())) == len(plotting.METHOD_COLOURS)


def test_curves_hold_the_metrics_and_labels_do_not_overlap():
    assert plotting.smooth([1, 2, 6, 3], 2) == pytest.approx([1, 1.5, 4, 4.5])
    axes = plotting.reward_curve([line | {"accuracy": line["reward_normalised"]} for line in METRICS], window=1).axes[0]
    assert axes.lines[0].get_ydata() == pytest.approx([step / 10 for step in range(1, 7)])
    axes.figure.canvas.draw()
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert len(boxes) == 3 and all(low.y1 <= high.y0 for low, high in zip(boxes, boxes[1:]))
    right = plotting.vanishing_curve(METRICS, window=3).axes[1]
    assert [line.get_ydata()[-1] for line in right.lines] == pytest.approx([0.5, 0.25])


def cell(accuracy, **types):
    return {"accuracy": accuracy, "ci95": [accuracy - 0.05, accuracy + 0.05], "n": 100, "by_type": types}


def test_bars_hold_the_accuracies_also_of_types_that_one_side_lacks():
    figure = plotting.accuracy_by_type({"L1": cell(0.4)}, {"L1": cell(0.4, colour=cell(0.8))})
    assert [bar.get_height() for bar in figure.axes[0].patches] == pytest.approx([40, 0, 40, 80])


def test_strips_show_times_and_any_text_as_it_is(tmp_path):
    before, clip = dict(plt.rcParams), Clip(torch.rand(16, 3, 8, 8), [k + 0.25 for k in range(16)], 1.0, 16.0, "x.mp4")
    figure = plotting.frame_strip(clip, "title", "two\nlines")
    assert [axes.get_xlabel() for axes in figure.axes] == [f"{k}.25 s" for k in range(1, 16, 2)]
    sample = {"clip": clip, "question": "cost $x$ and $y^", "answer": "A", "before": "",
              "after": "<think> $_{ </think>" + 40 * " word"}
    plotting.save(plotting.sample_strips([sample, sample]), tmp_path / "samples.png")
    assert Image.open(tmp_path / "samples.png").size[0] > 1000 and dict(plt.rcParams) == before


def test_a_runs_figures_are_drawn_from_its_folder(tmp_path):
    records = read_records(data_folder() / "toyvideoqa" / "L1.jsonl")[:12]
    config = make_config({"out": str(tmp_path), "method": "grpo"})
    (tmp_path / "evaluation").mkdir()
    for when, accuracy in (("before", 0.0), ("after", 1.0)):
        text = "<think> red first </think> <answer> ring </answer>" if when == "after" else "guess <think>"
        rows = [{"index": i, "accuracy": accuracy, "completion": text} for i in range(12)]
        (tmp_path / f"evaluation/{when}_L1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    splits = {"L1": cell(0.4, colour=cell(0.8))}
    written = plotting.draw_run(config, {"before": splits, "after": splits}, {"L1": records})
    assert [path.name for path in written] == ["reward.png", "vanishing.png", "accuracy.png", "samples.png"]
    assert all(path.stat().st_size > 5000 for path in written)
    [first, *_] = plotting.sample_answers(config, records, "L1")
    assert first["before"] == "not in the required form (incorrect): guess <think>" and len(first["clip"].frames) == 8
    assert first["after"] == "ring (correct), reasoning: red first"
