"""The enumerable policy of the theory notebooks: exact sums agree with sampling; seeds are independent."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from dvr1_lite.config import ObjectiveConfig
from dvr1_lite.objectives import METHODS

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "notebooks"))
import small_world as world  # noqa: E402


@pytest.fixture(autouse=True)
def doubles():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def test_probabilities_add_up_and_the_start_is_its_own_reference():
    parameters, right = world.make_world([0, 1])
    logps = world.token_logps(parameters)
    assert logps.shape == (2, world.PROMPTS, 64, world.TOKENS) and right.shape == (2, world.PROMPTS, 64)
    assert torch.allclose(logps.sum(-1).exp().sum(-1), torch.ones(2, world.PROMPTS))
    assert world.exact_kl(logps, logps).abs().max() == 0
    assert (right.sum(-1) == 10).all()  # two or three of three words agree: 3 * 3 + 1 of the 64


def test_samples_follow_the_policy_and_picked_rows_are_the_sampled_ones():
    logps = world.token_logps(world.make_world([3])[0]).detach()
    ids = world.sample(logps, np.random.default_rng(0), group_size=20_000)
    shares = torch.nn.functional.one_hot(ids[0, 0], 64).double().mean(0)
    assert (shares - logps[0, 0].sum(-1).exp()).abs().max() < 0.02
    table = torch.arange(2 * 16 * 64 * 3).reshape(2, 16, 64, 3)
    ids = torch.randint(0, 64, (2, 16, 8), generator=torch.Generator().manual_seed(0))
    groups = world.pick(table, ids)
    assert groups.shape == (32, 8, 3) and torch.equal(groups[17, 5], table[1, 1, ids[1, 1, 5]])


@pytest.mark.parametrize("method", METHODS)
def test_seeds_trained_together_equal_seeds_trained_alone(method):
    config = ObjectiveConfig(method, beta=0.02)
    together = world.race(config, 0.1, [4, 5], batches=1)
    assert together.shape == (2, 3, 2)
    # the sampler's draws come in order of the seeds, so the first seed alone has the same ones
    assert torch.allclose(together[..., :1], world.race(config, 0.1, [4], batches=1), atol=1e-8)


def test_a_race_starts_at_its_reference_and_learns():
    rows = world.race(ObjectiveConfig("grpo", beta=0.0), 0.1, [0], batches=5)
    assert rows[0, 1] == 0 and rows[-1, 1] > 0 and rows[-1, 0] > rows[0, 0]


def test_rho_gradient_is_the_group_normalised_policy_gradient_at_the_start():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    plain = torch.tensor([-0.25, 0.25, 0.25, -0.25])
    assert torch.allclose(world.rho_gradient("grpo", torch.zeros(4), rewards), plain)
    assert torch.allclose(world.rho_gradient("reg-grpo", torch.zeros(4), rewards, predicted_eps=0.5), 4 * plain)


def test_the_band_is_the_t_interval_of_the_mean():
    figure, axes = plt.subplots()
    world.band(axes, torch.tensor([[0.0, 1, 2, 3, 4]]), color="black")
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    reach = 2.776 * 2.5**0.5 / 5**0.5  # the sample variance of 0 to 4 is 2.5
    assert axes.lines[0].get_ydata().tolist() == [2.0]
    assert heights.min() == pytest.approx(2 - reach) and heights.max() == pytest.approx(2 + reach)
    plt.close(figure)


def test_motion_is_written_as_a_gif_and_a_strip(tmp_path):
    old, curve = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    tracks = {"a": (torch.stack([old, curve[1]]), {"color": "black"})}
    world.write_motion(tracks, old, curve, tmp_path / "figures")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"simplex.gif", "simplex_strip.png"}
