r"""Figures: what they show is in them, and every method has a colour of its own."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from dvr1_lite import plotting
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


def test_augmented_methods_keep_their_colour_and_are_dashed():
    plain, augmented = plotting.method_look("GRPO"), plotting.method_look("grpo + DA")
    assert plain["color"] == augmented["color"] and plain["linestyle"] != augmented["linestyle"]
    with pytest.raises(KeyError):
        plotting.method_look("ppo")


def test_smoothing_by_hand():
    assert plotting.smooth([1, 2, 6, 3], 2) == pytest.approx([1, 1.5, 4, 4.5])
    assert plotting.smooth([1, 2, 6], 99) == pytest.approx([1, 1.5, 3])
    assert plotting.smooth([], 3).size == 0


def test_curves_hold_the_metrics():
    axes = plotting.reward_curve(METRICS, window=1).axes[0]
    assert axes.lines[0].get_ydata() == pytest.approx([step / 10 for step in range(1, 7)])
    assert "step" in axes.get_xlabel() and axes.get_title()
    right = plotting.vanishing_curve(METRICS, window=3).axes[1]
    assert [line.get_ydata()[-1] for line in right.lines] == pytest.approx([0.5, 0.25])


def cell(accuracy, n=100):
    return {"accuracy": accuracy, "ci95": [accuracy - 0.05, accuracy + 0.05], "n": n}


def test_bars_hold_the_accuracies_and_their_intervals():
    splits = {name: cell(0.4) | {"by_type": {"colour": cell(0.8), "path": cell(0.1)}} for name in ("L1", "L2")}
    figure = plotting.accuracy_by_type(splits, splits)
    assert len(figure.axes) == 2 and "n = 100" in figure.axes[0].get_title()
    assert [bar.get_height() for bar in figure.axes[0].patches] == pytest.approx([40, 80, 10] * 2)


def test_types_that_only_one_side_has_are_drawn():
    before = {"L1": cell(0.4) | {"by_type": {}}}
    after = {"L1": cell(0.4) | {"by_type": {"colour": cell(0.8)}}}
    assert len(plotting.accuracy_by_type(before, after).axes[0].patches) == 4


@pytest.mark.parametrize("frames", [torch.rand(5, 3, 8, 6), np.random.rand(5, 8, 6, 3),
                                    np.full((5, 8, 6, 3), 255, dtype=np.uint8)])
def test_strips_take_frames_of_any_layout(frames):
    figure = plotting.frame_strip(frames, "title", "two\nlines", max_frames=4)
    assert len(figure.axes) == 4 and figure.axes[0].images[0].get_array().shape == (8, 6, 3)
    assert figure.axes[0].images[0].get_array().max() <= 1


def test_a_clips_strip_tells_the_time_of_each_frame():
    clip = Clip(torch.rand(2, 3, 8, 8), [0.25, 1.25], 1.0, 2.0, "x.mp4")
    assert [axes.get_xlabel() for axes in plotting.frame_strip(clip).axes] == ["0.25 s", "1.25 s"]


def test_samples_show_text_as_it_is(tmp_path):
    sample = {"clip": torch.rand(3, 3, 8, 8), "question": "cost $x$ and $y^", "answer": "A", "before": "",
              "after": "<think> $_{ </think>" + 40 * " word"}
    plotting.save(plotting.sample_strips([sample, sample]), tmp_path / "samples.png")
    assert Image.open(tmp_path / "samples.png").size[0] > 1000 and not plt.get_fignums()


def test_the_style_is_not_left_behind():
    before = dict(plt.rcParams)
    plotting.reward_curve(METRICS)
    assert dict(plt.rcParams) == before
