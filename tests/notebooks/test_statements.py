"""Statements that notebooks and pages make: each is computed here anew, so that an incorrect one fails."""

import json
import random
import re
import sys
from functools import cache
from math import comb
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from dvr1_lite.advantages import vanish_probability
from dvr1_lite.config import ObjectiveConfig, TrainConfig
from dvr1_lite.objectives import Batch, kl_penalty, objective_loss

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
sys.path.insert(0, str(FOLDER))


@cache
def source(name: str) -> str:
    """All cells of a notebook, found by the beginning of its name."""
    path = next(FOLDER.glob(f"{name}_*.ipynb"))
    return "\n\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)


# 00 ------------------------------------------------------------------------------------------------------------------


def test_00_the_published_gains_and_the_doubled_entry():
    published = json.loads((ROOT / "data/paper_results.json").read_text(encoding="utf-8"))
    ablation, scale = published["table_4_ablation"], published["table_8_augmentation_scale"]
    gains = np.subtract(ablation["Reg-GRPO + DA-Aug"], ablation["GRPO"]).round(1)
    assert f"{gains.min()} to {gains.max()} points" in source("00")
    page = (FOLDER / "INCONSISTENCIES.md").read_text(encoding="utf-8")
    full, one, other = ablation["Reg-GRPO + DA-Aug"][2], ablation["Reg-GRPO"][2], scale["No Aug."][2]
    assert one != other and f"L3 {one} in tables 4 and 5, and {other} in tables 7 and 8" in page
    assert f"{full:.1f} - {other}" in page and f"{full:.1f} - {one} = {full - one:.1f}" in page


def test_00_one_of_six_benchmarks_falls():
    table = json.loads((ROOT / "data/paper_results.json").read_text(encoding="utf-8"))["table_2"]
    falls = [name for name, a, b in zip(table["columns"], table["Qwen2.5-VL-3B"], table["DeepVideo-R1-3B"]) if b < a]
    page = (FOLDER / "INCONSISTENCIES.md").read_text(encoding="utf-8")
    assert falls == ["Video-MME (wo sub)"] and "Video-MME falls from 54.4 to 51.1" in page


def test_00_and_05_count_the_parameters_of_the_shipped_model():
    weights = (ROOT / "data/base_model/model.safetensors").read_bytes()
    header = json.loads(weights[8:8 + int.from_bytes(weights[:8], "little")])
    million = sum(int(np.prod(entry["shape"])) for name, entry in header.items() if name != "__metadata__") / 1e6
    for name in ("00", "05"):
        stated = re.findall(r"(\d\.\d) million parameters", source(name))
        assert stated and set(stated) == {f"{million:.1f}"}, (name, stated)


def test_00_two_wordings_and_an_error_below_0():
    from dvr1_lite.toy.world import QUESTION_TYPES, wrong_step

    assert all(kind.wordings[1].startswith("Tell me ") for kind in QUESTION_TYPES.values() if not kind.chain)
    assert wrong_step({"flashes": []}, "tally", 2, 0) == 9 and "$0-1$, written 9" in source("00")


def test_00_tells_of_copies_before_its_first_prediction():
    before, _ = source("00").split('predict("00-a"')
    assert "copy_to_my.py" in before and "no stored outputs" in before


def test_00_speaks_of_measured_results_in_one_cell_only():
    path = next(FOLDER.glob("00_*.ipynb"))
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    assert len([cell for cell in cells if re.search("(same sign|opposite sign|undecided) here", cell)]) == 1


# 01 ------------------------------------------------------------------------------------------------------------------


def mean_gradients(p: float, size: int = 8) -> tuple[float, float]:
    """The mean gradient by the logit of a prompt with success rate p, centred, without and with the group's std."""
    without = with_std = 0.0
    for rewards in np.ndindex(*[2] * size):
        R = np.array(rewards, dtype=float)
        chance = np.prod(np.where(R == 1, p, 1 - p))
        gradient = np.mean((R - R.mean()) * np.where(R == 1, 1 - p, -p))
        without += chance * gradient
        with_std += chance * (gradient / R.std() if R.std() else 0.0)
    return without, with_std


def test_01_the_std_favours_the_ends_in_ratio_and_the_middle_in_size():
    (rare, rare_std), (even, even_std) = mean_gradients(0.05), mean_gradients(0.5)
    assert rare_std / rare == pytest.approx(2.83, abs=0.005) and even_std / even == pytest.approx(2.12, abs=0.005)
    assert even_std - even > rare_std - rare  # so a plot of the two gradients would show the opposite
    assert even == pytest.approx(0.25 * 7 / 8)
    assert "gradient with std / without" in source("01")


@pytest.mark.parametrize(("case", "zero"), [
    ({}, True), ({"logp_reduction": "sum"}, False), ({"clip_eps": 0.2}, True), ({"beta": 0.1}, True),
    ({"beta": 0.1, "left": 0.2}, False), ({"moved": 0.1}, False)])
def test_01_when_the_loss_is_0_and_when_not(case, zero):
    left, moved = case.pop("left", 0.0), case.pop("moved", 0.0)
    logp_old = torch.full((1, 3, 4), -1.0, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([[4, 2, 1]])[..., None]
    logp = logp_old + moved * torch.tensor([1.0, -1, -1])[:, None]
    batch = Batch(logp, logp_old, logp_old - left, mask, torch.tensor([[1.0, 0, 0]]))
    loss = objective_loss(batch, ObjectiveConfig("grpo", **{"beta": 0.0} | case))
    assert (abs(loss.item()) < 1e-9) is zero
    assert "0 whatever happens" not in source("01")


def test_01_a_live_group_costs_about_1_over_p_only_where_p_is_small():
    cost = {p: [size / (1 - vanish_probability(p, size)) for size in (2, 8, 32)] for p in (0.005, 0.5)}
    assert all(abs(one - 200) < 20 for one in cost[0.005]) and max(cost[0.5]) > 10 / 0.5
    assert abs(32 / (1 - vanish_probability(0.02, 32)) - 67) < 1, "not 1 / p = 50: G p is not small"
    assert "For small $Gp$" in source("01") and "Where $Gp$ is small, a live group costs" in source("01")


def test_01_both_kl_estimators_have_the_kl_as_their_mean_and_02_compares_them():
    near, far = [np.array([[0.5, 0.3, 0.2], [0.4, 0.3, 0.3]]), np.array([[0.98, 0.01, 0.01], [0.01, 0.01, 0.98]])]
    for pi, mu in (near, far):
        for name in ("k1", "k3"):
            assert np.sum(pi * K[name](np.log(pi / mu))) == pytest.approx(kl(pi, mu))
        assert K["k3"](np.log(pi / mu)).min() >= 0 > K["k1"](np.log(pi / mu)).min()
    assert "Both have the KL as their mean, and $k_3$ is never negative" in source("01")
    assert "section 10, compares their spread and their gradients" in source("01")
    assert re.search(r"## 10\. .*estimators of the KL", source("02"))


def test_01_the_advantage_of_the_first_prediction_is_what_its_cell_prints():
    from reader import find_answer

    assert f"1 of 8 correct: correct +{find_answer('01-a')['answer']:.2f}, incorrect -0.38" in outputs("01")


def test_01_the_centred_gradient_of_a_group_with_k_correct_completions():
    G, p = 8, 0.3
    for k in range(G + 1):
        R = (np.arange(G) < k).astype(float)
        assert np.mean((R - k / G) * (R - p)) == pytest.approx(k / G * (1 - k / G))
    assert r"\frac1G\sum_i\Big(R_i-\frac kG\Big)(R_i-p)=\frac kG\Big(1-\frac kG\Big)" in source("01")


def test_01_the_average_of_eq_01_3_over_uneven_prompts():
    # of Beta(1/2, 1/2) the mean of p^8 is the product of (k + 1/2) / (k + 1) for k = 0 to 7: C(16, 8) / 4^8
    assert 2 * comb(16, 8) / 4**8 == pytest.approx(0.39, abs=0.005)
    assert vanish_probability(0.5, 8) == pytest.approx(0.01, abs=0.005)


def test_01_the_curve_of_vanished_groups_is_that_of_its_own_runs():
    text = source("01")
    assert "main_run" not in text and "read_runs" not in text  # no recorded run, which might have an augmentation
    assert "Both panels" not in text and "(printed)" not in text
    assert re.search(r'agree = all_rewards\.amax\(2\) == all_rewards\.amin\(2\)(?s:.*)"Figure 01-E\. ', text)


# 03 ------------------------------------------------------------------------------------------------------------------

CELLS_03 = ("F2", "F3", "F4", "A2", "A3")


def phase(cell: str, variant: str, how: str = "sampled") -> list[float]:
    """Success after training of every recorded run of a cell and a variant, read from the run files themselves."""
    folder = ROOT / "data/results" / f"phase_{cell}"
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*_seed*.json"))]
    return [run[how]["cell"]["accuracy"] for run in runs if run["row"] == variant]


def learned(cell: str, variant: str) -> str:
    successes = phase(cell, variant)
    return f"{sum(value > 0.5 for value in successes)} of {len(successes)}"


def test_03_reinforcement_learning_reads_no_true_trace():
    from inspect import getsource

    from dvr1_lite import training
    from dvr1_lite.lab import variants

    assert "written with the answer shown" in source("03") and "Reinforcement learning never reads them" in source("03")
    assert not re.search(r"\.trace\b", getsource(training) + getsource(variants))


def test_03_lists_the_five_readings_before_it_computes_anything():
    from dvr1_lite.augmentation import Augmentation
    from dvr1_lite.lab.variants import VARIANTS
    from dvr1_lite.training import Trainer

    before = source("03").split("## 1. ")[0]
    assert all(f"*{name}*" in before for name in ("Hinted", "Only vanished", "Kept", "Mixed", "Unhinted"))
    assert Trainer.combine(None, "own", "hinted", Augmentation("hint", 0.3)) == ["hinted"]  # the default replaces
    assert VARIANTS["kept"].combine(None, "own", "hinted", Augmentation("hint", 0.3)) == ["own", "hinted"]


def test_03_lent_texts_are_off_policy_and_their_ratio_starts_at_1():
    from inspect import getsource

    from dvr1_lite.augmentation import Augmentation
    from dvr1_lite.lab.variants import VARIANTS
    from dvr1_lite.rewards import Score
    from dvr1_lite.training import Group, Trainer

    own, hinted = (Group(None, prompt, [[token]] * 8, [prompt] * 8, [Score(1, good, None, 1 + good, 2)] * 8, [True] * 8)
                   for prompt, token, good in (("plain", 1, 0), ("with a hint", 2, 1)))
    for name, lent in (("mixed", 4), ("unhinted", 8)):
        group, = VARIANTS[name].combine(None, own, hinted, Augmentation("hint", 0.3))
        assert group.prompt == "plain" and group.texts.count("with a hint") == lent
    assert "logp_old = logp.detach() if logp_old is None" in getsource(Trainer.step)  # the first pass, same prompts
    assert "*Mixed* and *unhinted* are **off-policy**" in source("03") and "the ratio starts at 1" in source("03")
    cells = json.loads((ROOT / "data/base_model/acceptance.json").read_text(encoding="utf-8"))["cells"]
    weights = [found["success"] / found["hint"]["4"] for name, found in cells.items() if name.endswith("-A2")]
    assert weights == pytest.approx([0.01] * 3, abs=0.005) and r"$0.010/0.955\approx0.01$" in source("03")


def test_03_only_a_relative_reference_waits_for_its_history():
    from dvr1_lite.augmentation import RewardHistory

    assert RewardHistory(100).difficulty(0.5) == 0.0 and RewardHistory(100, 1.0).difficulty(0.5) == 0.5
    assert "A fixed reference, section 2, needs no history." in source("03")


def test_03_shows_the_confounder_in_plain_sight():
    path = next(FOLDER.glob("03_*.ipynb"))
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert not any(cell.metadata.get("jupyter", {}).get("outputs_hidden") for cell in cells)
    text = source("03").split("## 7. ")[1].split("## 8. ")[0]
    assert "The control is an **empty hint**" in text and "the *presence* of a hint does everything" in text


def test_03_an_empty_hint_switches_the_habit_off_in_s_only():
    cells = json.loads((ROOT / "data/base_model/acceptance.json").read_text(encoding="utf-8"))["cells"]
    factors = {cell: [found["empty_hint"] for name, found in cells.items() if name.endswith(f"-{cell}")]
               for cell in ("F2", "A2", "S")}
    assert all(len(found) == 3 for found in factors.values())
    assert min(factors["S"]) > 20 and all(0.5 < one < 2 for cell in ("F2", "A2") for one in factors[cell])
    jumps = [found["hint"]["1"] / found["success"] for name, found in cells.items() if name.endswith("-A2")]
    assert min(jumps) > 20  # the first word is decisive


def test_03_what_a_hint_shows_gets_no_gradient_in_the_simulation():
    from hint_tools import draw_groups, pull_on_logits

    P, rng = np.full((6, 9), 0.7), np.random.default_rng(3)
    gradient = pull_on_logits(P, *draw_groups(P, np.full(6, 4), rng), 0.0)
    assert (gradient[:, :4] == 0).all() and (gradient[:, 4:] != 0).any()
    shared = pull_on_logits(P, *draw_groups(P, np.full(6, 4), rng), 1.0)
    assert (shared[:, 0] == 0).all() and (shared[:, 1:4] != 0).any()  # steps can share, the opening cannot


def test_03_the_simulated_signs_are_those_of_the_text():
    from hint_tools import simulate

    at = {"F3": (1e-3, 0), "F4": (1e-4, 0), "A2": (1e-2, 1), "A3": (1e-3, 1)}
    final = {(cell, name): simulate(name, *at[cell]).mean() for cell, name in (
        ("F4", "plain"), ("F4", "hinted"), ("A2", "plain"), ("A2", "hinted"), ("A3", "only vanished"), ("A3", "mixed"))}
    assert final["F4", "hinted"] > final["F4", "plain"] + 0.2
    recorded = json.loads((ROOT / "data/results/predictions.json").read_text(encoding="utf-8"))
    assert f"F4 hinted, {recorded['F4']['hinted']:.2f} there" in source("03")
    assert final["A2", "hinted"] < 0.05 < 0.9 < final["A2", "plain"]
    assert final["A3", "only vanished"] < 0.05 and final["A3", "mixed"] > 0.9
    ends = [simulate(name, *at["A3"], budget=budget).mean() for name in ("kept", "only vanished")
            for budget in (4800, 12_000)]  # what keeps them below plain is the price of a hard prompt
    assert max(ends[::2]) < 0.05 and min(ends[1::2]) > simulate("plain", *at["A3"]).mean() > 0.05
    sharing = {s: {cell: simulate("hinted", *at[cell], s).mean() for cell in ("F3", "A2")} for s in (0, 1)}
    assert sharing[0]["F3"] < 0.3 < 0.9 < sharing[1]["F3"] and max(sharing[s]["A2"] for s in (0, 1)) < 0.05


def test_03_what_is_said_about_the_recorded_runs():
    text = source("03").split("**What the runs say.**")[1].split("## 11.")[0]
    runs = [value for cell in CELLS_03 for name in ("plain", "resampled", "hinted", "only vanished", "kept", "mixed")
            for value in phase(cell, name)]
    assert f"{len(runs)} runs at equal rollouts" in text
    for cell in ("A2", "A3"):
        assert (learned(cell, "plain"), learned(cell, "hinted")) == ("3 of 3", "0 of 3")
    assert "plain learned in 3 of 3 runs of both, hinted in 0 of 3 of both" in text
    f4 = {name: learned("F4", name).split()[0] for name in ("plain", "hinted", "only vanished", "mixed", "kept")}
    assert (f"plain learned in {f4['plain']} of 5 runs, hinted and mixed in {f4['mixed']}, only vanished in "
            f"{f4['only vanished']}, kept in {f4['kept']} (*undecided here*)") in text and f4["hinted"] == f4["mixed"]
    names = ("plain", "hinted", "only vanished", "kept", "mixed")
    assert {learned("F3", name) for name in names} == {"5 of 5"} and {learned("F2", name) for name in names} == {"3 of 3"}
    assert f"*resampled* in F3 ({learned('F3', 'resampled')}: it pays" in text
    hinted, plain = ([value for name in group for value in phase("F4", name)] for group in (
        ("hinted", "only vanished", "kept", "mixed"), ("plain", "resampled")))
    count = [f"{sum(value > 0.5 for value in group)} of {len(group)}" for group in (hinted, plain)]
    assert f"only runs with hints learned: {count[0]}, against {count[1]}" in source("03")
    assert f"{count[0]} runs with hints learned, {count[1]} without" in (ROOT / "README.md").read_text(encoding="utf-8")
    total = {name: [value for cell in CELLS_03 for value in phase(cell, name)] for name in ("mixed", "plain")}
    count = {name: sum(value > 0.5 for value in values) for name, values in total.items()}
    assert f"**Mixed** learned in {count['mixed']} of {len(total['mixed'])} runs, plain in {count['plain']}" in text
    for cell in CELLS_03:  # "it lost nothing that plain learned"
        assert learned(cell, "mixed") >= learned(cell, "plain")
    assert {learned("A3", name) for name in ("plain", "resampled")} == {"3 of 3"}
    found = json.loads((ROOT / "data/results/phase_F4/kept_half_kl.json").read_text(encoding="utf-8"))["seeds"]
    halved, whole = [found[seed]["accuracy"] for seed in "01"], phase("F4", "kept", "accuracy")
    assert "reach {:.0f} and {:.0f} % greedily, against {:.0f} and {:.0f} %".format(
        *(100 * value for value in (*halved, *whole[:2]))) in text


def area(variant: str) -> list[float]:
    """The area under the curve of the own groups' accuracy in cell F3, in points, for seeds 0 to 4."""
    folder, areas = ROOT / "data/results/phase_F3", []
    for seed in range(5):
        path, = folder.glob(f"{variant.replace(' ', '-')}_seed{seed}_*.json")
        curve = json.loads(path.read_text(encoding="utf-8"))["curve"]
        areas.append(100 * np.dot(curve["accuracy"], np.diff([0, *curve["rollouts"]])) / curve["rollouts"][-1])
    return areas


@pytest.mark.parametrize(("variant", "sentence"), [
    ("mixed", "curve is {:.1f} points [{:.1f}, {:.1f}] and"), ("only vanished", "and {:.1f} [{:.1f}, {:.1f}] larger")])
def test_what_is_said_about_learning_sooner_in_f3(variant, sentence):
    gaps = np.subtract(area(variant), area("plain"))
    reach = 4.604095 * gaps.std(ddof=1) / 5**0.5  # t(1 - 0.05 / 5 / 2) with 4 degrees of freedom
    said = sentence.format(gaps.mean(), gaps.mean() - reach, gaps.mean() + reach)
    assert said in source("03") and said in source("05")


def test_03_speaks_of_measured_results_in_one_cell_only():
    path = next(FOLDER.glob("03_*.ipynb"))
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    assert len([cell for cell in cells if re.search("(same sign|opposite sign|undecided) here", cell)]) == 1


# 03b -----------------------------------------------------------------------------------------------------------------


def test_03b_hints_along_a_chain_follow_the_law():
    cells = json.loads((ROOT / "data/base_model/acceptance.json").read_text(encoding="utf-8"))["cells"]
    for name in (name for name in cells if "-F" in name):
        p0 = cells[name]["target"]
        for words in (0, 4, 8, 12):  # two words a value
            assert cells[name]["hint"][str(words)] == pytest.approx(p0 ** (1 - words / 16), abs=0.12)
    assert r"p(h)=s^{\,k-h}=p_0^{\,1-h/k}" in source("03b")


def test_03b_three_of_eight_values_wake_f1_and_not_f4():
    def live(p0: float, shown: int) -> float:
        p = p0 ** (1 - shown / 8)
        return 1 - p**8 - (1 - p) ** 8

    assert live(0.05, 3) > 0.6 and live(1e-4, 3) < 0.1
    assert min(h for h in range(9) if 1e-3 ** (1 - h / 8) >= 0.3) == 7  # prediction 03b-b
    assert "Three of eight values wake F1, not F4" in source("03b")


# 04 ------------------------------------------------------------------------------------------------------------------


def test_04_says_which_configuration_its_run_shows():
    cells = nbformat.read(next(FOLDER.glob("04_*.ipynb")), as_version=4).cells
    stated = [cell.source for cell in cells if "showpiece" in cell.metadata.get("tags", [])]
    line = re.search(r"(?s)\nSHOWN = (TrainConfig\(.*?\))\n", source("04"))[1]
    config = eval(line, {"TrainConfig": TrainConfig, "folder": "runs/any"})
    assert len(stated) == 1 and "05_reproducing_the_tables.ipynb" in stated[0] and "n = 1" in stated[0]
    for part in (config.method.replace("grpo", "GRPO").replace("reg-", "Reg-"), f"`augment: {config.augment}`",
                 f"`hint_update: {config.hint_update}`"):
        assert part in stated[0], f"the cell before the run does not name {part}"


@pytest.mark.parametrize("live", (0, 1, 2))
def test_04_the_loss_of_a_step_starts_at_the_share_of_groups_with_reward_spread(live):
    rewards = torch.tensor([[2.0, 1, 1, 2]] * live + [[1.0, 1, 1, 1]] * (2 - live))
    logp = torch.zeros(2, 4, 3)
    loss = objective_loss(Batch(logp, logp, logp, torch.ones(2, 4, 3), rewards), ObjectiveConfig("reg-grpo"))
    assert loss.item() == pytest.approx(live / 2, abs=1e-3)
    assert "the share of groups with reward spread" in source("04")


def test_04_a_reference_with_the_adapters_on_has_kl_0_in_the_first_update():
    logp = torch.randn(1, 4, 3)
    assert kl_penalty(Batch(logp, logp, logp, torch.ones(1, 4, 3), torch.zeros(1, 4))) == 0


# 02 ------------------------------------------------------------------------------------------------------------------

OLD6, R6 = np.array([0.40, 0.25, 0.15, 0.10, 0.05, 0.05]), np.array([0.0, 1.0, 0.0, 2.0, 1.0, 2.0])


@cache
def outputs(name: str) -> str:
    """What the cells of a notebook print."""
    path = next(FOLDER.glob(f"{name}_*.ipynb"))
    return "\n".join(output.get("text", "") for cell in nbformat.read(path, as_version=4).cells
                     for output in cell.get("outputs", []))


def page(name: str) -> str:
    return " ".join((FOLDER / name).read_text(encoding="utf-8").split())


def reg_loss(rho, rewards, eps: float) -> float:
    """Eq. 8 without its KL term, written anew: one group, no epsilon on the rewards' std."""
    A, A_hat = [(x - x.mean()) / (x.std() + e) for x, e in ((np.array(rewards), 0.0), (np.array(rho), eps))]
    return float(np.mean((A - A_hat) ** 2))


def slope(function, x, step: float = 1e-6) -> np.ndarray:
    """Gradient by central differences."""
    x, moves = np.array(x, dtype=float), step * np.eye(np.size(x)).reshape(-1, *np.shape(x))
    return np.array([(function(x + m) - function(x - m)) / (2 * step) for m in moves]).reshape(x.shape)


def softmax(logits) -> np.ndarray:
    weight = np.exp(logits - np.max(logits))
    return weight / weight.sum()


def kl(p, q) -> float:
    return float(np.sum(p * np.log(p / q)))


K = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: np.exp(-d) + d - 1}


def test_02_a_group_of_two_has_a_gradient_through_epsilon_only():
    R = [0.0, 1.0]
    assert reg_loss([0.3, 0.1], R, 0.1) == pytest.approx(2.25) and reg_loss([0.3, 0.1], R, 0.0) == pytest.approx(4)
    assert slope(lambda rho: reg_loss(rho, R, 0.1), [0.3, 0.1]) == pytest.approx([3.75, -3.75], abs=1e-4)
    assert slope(lambda rho: reg_loss(rho, R, 0.1), [0.0, 0.0], 1e-9) == pytest.approx([10, -10], abs=1e-3)
    assert np.abs(slope(lambda rho: reg_loss(rho, R, 0.0), [0.3, 0.1])).max() < 1e-6
    rng = np.random.default_rng(0)  # from every start descent raises the better one
    assert all(slope(lambda rho: reg_loss(rho, R, 0.1), 3 * rng.normal(size=2))[1] < 0 for _ in range(50))
    for text in (outputs("02"), page("teaching/HANDOUT.md"), page("solutions/QUIZ_ANSWERS.md"), page("explore.html")):
        assert "2.25" in text and "3.75" in text
    assert "$G=2$ has a gradient only through $\\epsilon_\\rho$" in source("02") and "So $G=2$ works" in source("02")
    for text in (source("02"), page("QUIZ.md"), page("solutions/QUIZ_ANSWERS.md"), page("INSTRUCTORS.md")):
        assert "useless at" not in text and "without a gradient at $G=2$" not in text


def test_02_blind_to_scale_without_epsilon_and_not_with_it():
    rng = np.random.default_rng(1)
    for _ in range(20):
        R, rho, eps = rng.integers(0, 3, 6) + np.arange(6) % 2, rng.normal(size=6), rng.uniform(0.01, 1)
        c, s = np.corrcoef(R, rho)[0, 1], rho.std()
        u = s / (s + eps)
        assert reg_loss(rho, R, eps) == pytest.approx(1 - 2 * c * u + u**2)
        assert reg_loss(7 * rho + 2, R, 0.0) == pytest.approx(reg_loss(rho, R, 0.0)) == pytest.approx(2 * (1 - c))
        if c > 0.05:
            scales = np.geomspace(1e-3, 1e3, 6001)
            best = scales[np.argmin([reg_loss(k * rho / s, R, eps) for k in scales])]
            assert best == pytest.approx(eps * c / (1 - c), rel=0.01)
    A = (R6 - R6.mean()) / R6.std()
    falling = [reg_loss(k * A, R6, 0.1) for k in (0.1, 1.0, 10.0, 100.0)]
    assert falling == pytest.approx([(0.1 / (k + 0.1)) ** 2 for k in (0.1, 1.0, 10.0, 100.0)])
    assert "no longer blind to scale" in source("02") and "1 - 2\\,c\\,u + u^2" in source("02")
    assert "The loss is blind to scale and shift." not in page("solutions/QUIZ_ANSWERS.md")


def test_02_eq_5_and_7_are_equal_at_the_best_policy_only():
    group = [0, 0, 1, 3, 4, 0, 2, 3]
    for lam in (0.3, 1.0, 3.0):
        best = softmax(np.log(OLD6) + R6 / lam)
        assert reg_loss(np.log(best / OLD6)[group], R6[group], 0.0) == pytest.approx(0, abs=1e-12)
        assert R6 - R6.mean() == pytest.approx(lam * (np.log(best / OLD6) - np.log(best / OLD6).mean()))
    other = softmax(np.log(OLD6) + np.array([0.5, 0, 1, -1, 0.3, 0]))
    assert reg_loss(np.log(other / OLD6)[group], R6[group], 0.0) > 0.5
    for tag in ("02.1", "5, 7"):
        [formula] = re.findall(rf"\$\$[^$]*\\tag{{{tag}}}\$\$", source("02"))
        assert r"\text{at } \pi_\theta=\pi^*" in formula and r"\rho^*_i" in formula
    assert r"\rho_i = \log\frac{\pi_\theta(y_i|x)}{\pi_{old}(y_i|x)} \tag{02.1}" not in source("02")


def test_02_the_minimum_of_the_regression_does_not_depend_on_who_sampled():
    lam, G = 0.5, 3
    other = softmax(np.log(OLD6) + np.array([0.5, 0, 1, -1, 0.3, 0]))
    best = softmax(np.log(OLD6) + R6 / lam)
    rng = np.random.default_rng(2)
    for mu in (OLD6, np.full(6, 1 / 6), rng.dirichlet(np.ones(6))):
        expected = {}
        for name, policy in (("other", other), ("best", best)):
            f, total = R6 / lam - np.log(policy / OLD6), 0.0
            for ids in np.ndindex(6, 6, 6):  # every group of three, with its probability
                part = f[list(ids)]
                total += np.prod(mu[list(ids)]) * np.mean((part - part.mean()) ** 2)
            variance = np.sum(mu * f**2) - np.sum(mu * f) ** 2
            assert total == pytest.approx((G - 1) / G * variance, abs=1e-12)
            expected[name] = total
        assert expected["best"] < 1e-12 < 0.1 < expected["other"]
    assert "no importance weights" in source("02") and "importance weights" in page("INSTRUCTORS.md")
    sd = 1.0  # weights e^z with z normal: the effective share is E[w]^2 / E[w^2]
    assert np.exp(sd**2 / 2) ** 2 / np.exp(2 * sd**2) == pytest.approx(np.exp(-sd**2))


def test_02_three_completions_fix_the_curve_and_two_only_the_order():
    R, rho = np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 5.0])  # increasing, not affine
    pairs = [(i, j) for i in range(3) for j in range(i)]
    assert max(reg_loss(rho[list(pair)], R[list(pair)], 0.0) for pair in pairs) < 1e-12
    assert reg_loss(rho, R, 0.0) > 0.05
    assert r"loss 0 on every group ($G\ge3$) with unequal rewards" in source("02")


def test_02_reg_grpo_starts_as_summed_grpo_with_another_kl_weight():
    rng, lengths = np.random.default_rng(3), [2, 3, 5]
    R, beta, eps = np.array([1.0, 0.0, 0.0]), 0.1, 0.05
    old, ref = ([rng.normal(size=n) for n in lengths] for _ in range(2))
    A, cut = (R - R.mean()) / R.std(), np.cumsum(lengths)[:-1]

    def penalty(parts):
        return np.mean([np.mean(K["k3"](x - y)) for x, y in zip(parts, ref)])

    def reg(logp):
        parts = np.split(logp, cut)
        rho = np.array([np.sum(x - y) for x, y in zip(parts, old)])
        return reg_loss(rho, R, eps) + beta * penalty(parts)

    def grpo(logp, weight, averaged):
        parts = np.split(logp, cut)
        terms = [np.sum(np.exp(x - y)) * a / (len(x) if averaged else 1) for x, y, a in zip(parts, old, A)]
        return -np.mean(terms) + weight * penalty(parts)

    start = np.concatenate(old)
    ours, summed = slope(reg, start, 1e-8), slope(lambda x: grpo(x, beta * eps / 2, False), start)
    assert ours == pytest.approx(2 / eps * summed, abs=1e-4)
    assert np.abs(ours - 2 / eps * slope(lambda x: grpo(x, beta, True), start)).max() > 1  # the short statement
    assert r"\nabla\,\text{GRPO}_{\text{summed}}\big(\tfrac{\beta\,\epsilon_\rho}{2}\big) \tag{02.6}" in source("02")
    assert "Reg-GRPO **is** unclipped GRPO" not in source("02")
    assert f"{0.1 * 0.05 / 2:.4f}" in page("solutions/QUIZ_ANSWERS.md")
    for length in (2, 3, 5, 8):
        assert f"{length} tokens: {2 / 0.1 * length:5.1f} times Eq. 2's gradient" in outputs("02")


def test_02_values_of_the_kl_estimators():
    for p, q in (([0.5, 0.3, 0.2], [0.45, 0.33, 0.22]), ([0.98, 0.01, 0.01], [0.01, 0.01, 0.98])):
        p, q = np.array(p), np.array(q)
        mean = {name: np.sum(p * k(np.log(p / q))) for name, k in K.items()}
        sd = {name: np.sqrt(np.sum(p * (k(np.log(p / q)) - mean[name]) ** 2)) for name, k in K.items()}
        assert mean["k1"] == pytest.approx(kl(p, q)) and mean["k3"] == pytest.approx(kl(p, q))
        assert mean["k2"] != pytest.approx(kl(p, q), rel=0.001)
        for name in K:
            assert f"{name} {mean[name]:.4f} {sd[name]:.4f}" in outputs("02")
    assert sd["k3"] > 8 * sd["k1"]  # the second pair, far from the reference
    assert "$k_1$ *and* $k_3$ are unbiased" in source("02") and "the only estimator that" not in source("02")


def test_02_gradients_of_the_kl_estimators():
    theta = np.log(OLD6) + np.array([0.2, -0.5, 0.8, 0.1, -0.3, 0.6])
    policy, d = softmax(theta), np.log(softmax(theta) / OLD6)
    log_policy = lambda x: np.log(softmax(x))
    one, two = slope(lambda x: kl(softmax(x), OLD6), theta), slope(lambda x: kl(OLD6, softmax(x)), theta)
    for name, truth in (("k1", 0 * one), ("k2", one), ("k3", two)):
        sampled = slope(lambda x: np.sum(policy * K[name](log_policy(x) - np.log(OLD6))), theta)
        assert sampled == pytest.approx(truth, abs=1e-7), name
    assert slope(lambda x: np.sum(policy * d * log_policy(x)), theta) == pytest.approx(one, abs=1e-7)
    # samples of the old policy, which is the reference: k1's mean is minus a KL, and its descent leaves the reference
    assert f"over samples of the old policy: {-kl(OLD6, policy):.3f}" in outputs("02")
    towards = np.log(OLD6) - theta
    for name, holds in (("k1", False), ("k2", True), ("k3", True)):
        push = -slope(lambda x: np.sum(OLD6 * K[name](log_policy(x) - np.log(OLD6))), theta)
        assert bool(push @ (towards - towards.mean()) > 0) is holds, name
    assert [float(x) for x in re.findall(r"per token: the gradient is off by +(\d+) %", outputs("02"))] == [3, 7]
    assert r"Subtracted from the *reward*, $k_1$ has that of $KL(\pi_\theta\|\pi_{ref})$" in source("02")


def test_02_the_printed_sign_prefers_policies_that_lost_a_completion():
    ids = np.repeat(np.arange(6), np.round(20 * OLD6).astype(int))
    best, lost = softmax(np.log(OLD6) + 2 * R6), OLD6 * np.where(R6 == 2, 1e-6, 1.0)
    lost = lost / lost.sum()
    loss = lambda policy, sign: reg_loss(np.log(policy / OLD6)[ids], R6[ids], 0.1) + sign * 0.1 * np.mean(
        K["k3"](np.log(policy / OLD6)[ids]))
    assert loss(lost, -1) < loss(best, -1) < loss(OLD6, -1) and loss(best, 1) < loss(OLD6, 1) < loss(lost, 1)
    assert lost @ R6 < OLD6 @ R6 < best @ R6
    for sign in (1, -1):
        assert f"{loss(best, sign):.2f}" in outputs("02")
    [plus], [minus] = (re.findall(rf"{name}: at the end E\[R\] (\S+), .* E\[R\] at 2 nats (\S+)", outputs("02"))
                       for name in (r"plus \(Eq. 2's sign\)", r"minus \(as printed\)"))
    assert float(plus[0]) > float(minus[0]) + 0.02 and float(plus[1]) > float(minus[1]) + 0.02  # also at equal distance
    assert "decided by chance" not in source("02")


def test_02_adam_ignores_a_constant_factor_over_a_whole_run():
    def end(scale):
        x = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam([x], lr=0.01)
        for _ in range(100):
            adam.zero_grad()
            (scale * (x.sin() - torch.tensor([0.5, 0.4, -0.3])).square().sum()).backward()
            adam.step()
        return x.detach()

    assert (end(200.0) - end(1.0)).abs().max() < 1e-3
    [ends] = re.findall(r"Adam E\[R\] after 300 updates, loss times 1, 20, 200: \[(.*)\]", outputs("02"))
    assert len(set(ends.split())) == 1
    assert "not only in its first step" in source("02") and "falls within a batch" in source("02")


def test_02_clipped_grpo_points_away_from_reward_at_24_of_91_policies():
    old, reward = np.array([0.5, 0.3, 0.2]), np.array([0.0, 0.6, 1.0])
    share = np.array([5, 3, 2]) / 10
    A = (reward - share @ reward) / np.sqrt(share @ (reward - share @ reward) ** 2)
    still = away = only_second = 0
    for i in range(1, 14):
        for j in range(1, 15 - i):
            p = np.array([i, j, 15 - i - j]) / 15
            ratio = p / old
            clipped = np.where(A > 0, ratio > 1.2, ratio < 0.8)
            push = share * np.where(clipped, 0.0, ratio * A)
            push = push - p * push.sum()  # by the logits
            change = p * (push - p @ push)
            still += np.abs(change).max() < 1e-9
            if change @ reward < -1e-12:
                away, only_second = away + 1, only_second + (clipped.tolist() == [True, False, True])
    assert (still, away, only_second) == (15, 24, 24)
    assert f"no gradient at {still} policies" in source("02") and f"at {away} others" in source("02")
    assert "to the best corner, from everywhere. Clipped GRPO: the same" not in source("02")


def test_02_the_spread_of_rho_grows_with_the_completion_length():
    from derivation import spread_after_one_update

    spread = {(T, shared): spread_after_one_update(T, shared, seeds=range(2))
              for T in (20, 200) for shared in (True, False)}
    assert all(token == pytest.approx(0.0027, rel=0.1) for _, token in spread.values())
    tied, own = (spread[200, shared][0] / spread[20, shared][0] for shared in (True, False))
    assert 10**0.5 * 0.8 < tied < 10**0.5 * 1.25 < 5 < own < 10
    assert spread[200, False][0] > 0.1 > 5 * spread[20, False][0]
    assert 0.0071 * 200**0.5 == pytest.approx(0.1, abs=0.001) and "0.0071 nats" in page("teaching/HANDOUT.md")
    assert "**Length decides what transfers**" in source("02")


def test_02_identities_of_the_relatives():
    rng, lam = np.random.default_rng(4), 0.25
    R, rho = rng.integers(0, 3, 6).astype(float), rng.normal(size=6)
    centre = lambda x: x - x.mean()
    centred = lambda x: np.mean((centre(R) / lam - centre(x)) ** 2)
    rebel = np.mean([(lam * (rho[i] - rho[j]) - (R[i] - R[j])) ** 2 for i in range(6) for j in range(i)])
    assert centred(rho) == pytest.approx(5 / 6 * rebel / (2 * lam**2))
    policy_gradient = -centre(R - lam * rho) / 6  # by rho, without a ratio
    assert slope(centred, rho) == pytest.approx(2 / lam * policy_gradient, abs=1e-6)
    assert r"\nabla\text{centred} = \frac2\lambda\,\nabla\text{policy gradient on } R-\lambda\rho" in source("02")


def test_02_stds_are_those_of_the_population():
    group = [0, 0, 1, 3, 4, 0, 2, 3]
    for lam in (0.25, 0.5, 2.0):
        rho = R6[group] / lam  # up to a constant
        assert f"std of rho {rho.std():.2f} nats" in outputs("02")
    assert f"{(R6[group] / 0.25).std(ddof=1):.2f}" not in outputs("02")


def test_02_eq_3_is_called_a_penalty():
    pages = [source("02"), page("QUIZ.md"), page("INSTRUCTORS.md"), page("teaching/HANDOUT.md"),
             (ROOT / "README.md").read_text(encoding="utf-8")]
    assert not any(re.search("KL[- ]constrain", text) for text in pages)
    assert "is a *penalty*, not a constraint" in source("02")


def test_02_the_issue_is_linked_and_dated_and_its_author_uses_no_released_code():
    text = page("INCONSISTENCIES.md")
    assert "github.com/mlvlab/DeepVideoR1/issues/2" in text and "before v5 and before the code's release" in text
    assert "someone who tried Reg-GRPO on a model of their own" in text and "stable but slow at 0.1" in text
    assert "| 10 | The KL weight is" in text and "[INCONSISTENCIES.md](INCONSISTENCIES.md), number 10" in source("02")
    assert "user of the authors' code" not in text + source("02")
    weights = [[float(x) for x in re.findall(r"(\d\.\d\d) \+-", line)] for line in outputs("02").split("\n")
               if line.startswith(("grpo, Eq. 2 (mean) ", "grpo, summed ", "reg-grpo, eps_rho 0.1 ")) and "+-" in line]
    lost = [row[0] - row[2] for row in weights]  # by beta 1 instead of 0.01
    assert len(weights) == 3 and lost[0] > 0.3 > lost[1] > lost[2] + 0.05 and lost[2] < 0.1


def test_02_every_epsilon_has_an_index_and_a_guess_is_always_the_readers():
    text = source("02")
    bare = [text[m.start() - 30:m.end() + 25] for m in re.finditer(r"\\epsilon(?!_)", text)]
    assert all("an $" in part or r"the $\epsilon$ of Eq. 1 and 2" in part for part in bare), bare
    assert not re.search(r"\\epsilon(?!_)", page("teaching/HANDOUT.md").replace(r"the $\epsilon$ of Eq. 1 and 2", ""))
    for module in ("objectives", "advantages"):
        assert not re.search(r"\\epsilon(?!_)", (ROOT / f"dvr1_lite/{module}.py").read_text(encoding="utf-8"))
    lines = [line for line in text.split("\n") if "guess" in line]
    assert lines == [f'predict("02-{letter}", None)  # replace None by your guess' for letter in "abcdefg"]
    assert not re.search(r"(?<!\{)\bclips?\b", text)  # a film is a "video" there; ratios are clipped


def test_02_unsampled_completions_get_what_the_sampled_ones_lose():
    sampled, policy = [0, 1], softmax(np.log([0.2, 0.2, 0.6]) + np.array([0.5, -1.0, 0.1]))
    rho = np.log(policy / [0.2, 0.2, 0.6])[sampled]
    formula = re.search(r"const unsampled = \(rho, mass\) => (.*);", (FOLDER / "explore.html").read_text("utf-8"))[1]
    assert formula == "1 - mass * mean(rho.map(Math.exp))"
    assert 1 - 0.4 * np.mean(np.exp(rho)) == pytest.approx(policy[2])
    assert "Log-ratios moved freely are not a policy" in page("explore.html")
    assert 'id="size" min="2" max="12"' in page("explore.html")


def test_02_the_list_of_open_points_has_the_published_numbers():
    published = json.loads((ROOT / "data/paper_results.json").read_text(encoding="utf-8"))
    one, other = published["table_4_ablation"]["Reg-GRPO"][2], published["table_8_augmentation_scale"]["No Aug."][2]
    base = published["table_1"]["Qwen2.5-VL-3B"]["base"][6], published["table_4_ablation"]["Qwen2.5-VL-3B"][2]
    rows = page("INCONSISTENCIES.md")
    assert f"L3 {one} in tables 4 and 5, and {other} in" in rows
    assert f"L3 {base[1]} in tables 4 and 5, and {base[0]} in table 1" in rows
    for place in ("Eq. 8 and 18", "Eq. 7 divides", "lambda of Eq. 3", "Eq. 2 averages", "Eq. 5 does not say",
                  "Section 3.2", "section 3.3", "Appendix C.1", "Table 2"):
        assert place in rows, place
    assert "lists the open points" in source("02") and "(INCONSISTENCIES.md)" in source("02")


# 05 ------------------------------------------------------------------------------------------------------------------

T = {(0.975, 3): 3.18245, (0.975, 6): 2.44691, (0.99375, 4): 4.31468, (0.8, 4): 0.94096}  # quantiles of Student's t


def cells_05() -> list[nbformat.NotebookNode]:
    return nbformat.read(next(FOLDER.glob("05_*.ipynb")), as_version=4).cells


def test_05_the_intervals_of_the_four_pairs_by_hand():
    a, b = np.array([78, 82, 75, 81]), np.array([76, 79, 74, 77])
    assert "a = np.array([78.0, 82, 75, 81])" in source("05") and "b = np.array([76.0, 79, 74, 77])" in source("05")
    gaps = a - b  # 2, 3, 1, 4: mean 2.5, squares about it 5
    paired = T[0.975, 3] * (5 / 3) ** 0.5 / 2
    unpaired = T[0.975, 6] * ((30 / 3 + 13 / 3) / 4) ** 0.5
    assert list(gaps) == [2, 3, 1, 4] and unpaired / paired == pytest.approx(2.25, abs=0.01)
    assert f"by hand +2.50 [{2.5 - paired:.2f}, {2.5 + paired:.2f}], n = 4" in outputs("05")
    assert f"unpaired +2.50 [{2.5 - unpaired:.2f}, {2.5 + unpaired:.2f}]" in outputs("05")


def test_05_answers_about_one_clip_are_not_independent():
    seen, chances = 0.7, np.array([0.9, 0.4])  # of a clip; of an answer, seen well or not
    mean = seen * chances[0] + (1 - seen) * chances[1]
    between = seen * (1 - seen) * (chances[0] - chances[1]) ** 2
    factor = (1 + 7 * between / (mean * (1 - mean))) ** 0.5
    assert factor == pytest.approx(1.72, abs=0.005) and "< 0.7" in source("05") and "0.9, 0.4" in source("05")
    from reader import find_answer
    stored = find_answer("05-b")
    assert abs(stored["answer"] - factor) <= stored["tolerance"] and "1.72" in stored["reason"]


def test_05_a_table_of_four_false_claims_and_the_power_of_five_seeds():
    from reader import find_answer
    assert find_answer("05-c")["answer"] == pytest.approx(100 * (1 - 0.95**4), abs=0.1)
    rng, delta = np.random.default_rng(11), (T[0.99375, 4] + T[0.8, 4]) / 5**0.5
    tries = rng.normal(delta, 1, (100_000, 5))
    found = (tries.mean(1) > T[0.99375, 4] * tries.std(1, ddof=1) / 5**0.5).mean()
    assert 0.74 < found < 0.78 and f"a difference of {delta:.2f} sd is found in {100 * found:.0f} %" in outputs("05")
    assert "for five seeds it promises a little too much" in source("05")
    best = rng.normal(0, 2, (100_000, 9)).max(1).mean()
    assert abs(find_answer("05-d")["answer"] - best) < 0.1


def test_05_the_same_two_methods_have_opposite_predicted_signs_on_two_mixtures():
    predicted = json.loads((ROOT / "data/results/predictions.json").read_text(encoding="utf-8"))
    gap = {cell: 100 * (predicted[cell]["hinted"] - predicted[cell]["plain"]) for cell in ("F3", "A2")}
    mostly, half = 0.9 * gap["F3"] + 0.1 * gap["A2"], (gap["F3"] + gap["A2"]) / 2
    assert mostly > 5 and half < -5
    assert f"hinted over plain {mostly:+.0f} points" in outputs("05")
    assert f"hinted over plain {half:+.0f} points" in outputs("05")
    assert "### Why can two fair comparisons of two methods disagree?" in source("05")
    assert "Why can two fair comparisons of two methods disagree?" in source("00")


def test_05_compares_signs_and_never_published_sizes():
    text, published = source("05"), json.loads((ROOT / "data/paper_results.json").read_text(encoding="utf-8"))
    numbers = {str(x) for name, table in published.items() if name.startswith(("table_4", "table_5", "table_7"))
               for row, values in table.items() if row != "columns" for x in values}
    assert len(numbers) > 30 and not [x for x in numbers if re.search(rf"(?<![\d.]){x}(?!\d)", text)]
    assert not re.search(r"published [^:]*\d", outputs("05"))
    assert "excluded" not in text + outputs("05") and "refuted" not in text + outputs("05")
    for pair in ("Reg-GRPO over GRPO", "Reg-GRPO + DA over Reg-GRPO"):
        assert f"{pair}: +++" in outputs("05")


def test_05_tells_what_was_measured_in_one_cell_and_names_all_that_is_recorded():
    told = [cell for cell in cells_05() if "results" in cell.metadata.get("tags", [])]
    assert len(told) == 1 and told[0].source.startswith("**What the records say.**")
    folders = [path.parent.name for path in (ROOT / "data/results").glob("*/aggregate.json")]
    main = [name for name in folders if name.startswith(("phase_", "table", "figure3"))]
    patterns = {name: re.sub(r"(?<=[a-z])(?=\d)", " ?", name.removeprefix("phase_")) for name in main}  # F3, table ?4
    missing = [name for name, pattern in patterns.items() if not re.search(rf"(?i)\b{pattern}\b", told[0].source)]
    assert missing == [], "the cell of notebook 05 that is tagged `results` does not mention these records"
    assert ("No experiment of the protocol is recorded" in told[0].source) is not any(main)
    for name in folders:
        assert not re.search(rf"(?m)^{name} +not tested", outputs("05")), "run notebooks/save_outputs.py on notebook 05"


def test_05_every_verdict_it_prints_stands_beside_a_condition():
    lines = re.sub(r"\n {4}", " ", outputs("05")).split("\n")
    judged = [line for line in lines if re.search("(same sign|opposite sign|undecided) here", line)
              and not line.startswith("Figure 05-F: ")]  # counts
    assert all(re.search(r"\((tiny model|along the chain|in the opening)", line) for line in judged), judged
    for words in ("same sign here", "opposite sign here", "undecided here", "not tested"):
        assert f"| {words} | " in source("05")


def test_05_one_comparison_in_three_tables_is_counted_once():
    assert "22 claims, 19 different comparisons" in outputs("05")
    twice = ("Reg-GRPO over GRPO", "Reg-GRPO + DA over Reg-GRPO", "Reg-GRPO + DA over Reg-GRPO")  # tables 5, 7, 8
    assert 22 - len(twice) == 19 and "stands in tables 4, 7 and 8" in source("05")


def openings(row: str) -> str:
    """In how many recorded runs of `variants` the questions of A1 to A4 are mostly correct, read from the run files."""
    first, learned = {"Say", "Show", "Name", "Report"}, []  # the verbs of A1 to A4
    used = json.loads((ROOT / "data/results/variants/aggregate.json").read_text(encoding="utf-8"))["runs"][row]
    for file in used.values():
        run, correct = json.loads((ROOT / "data/results" / file).read_text(encoding="utf-8")), []
        for split in ("L1", "L2"):
            lines = (ROOT / f"data/toyvideoqa/{split}.jsonl").read_text(encoding="utf-8").splitlines()
            asked = sorted(random.Random("evaluation").sample(range(len(lines)), 600))
            rows = [json.loads(lines[i]) for i in asked]
            correct += [answer == "1" for row, answer in zip(rows, run["answers"][split], strict=True)
                        if row["question_type"] in ("tally", "cell", "since") and row["problem"].split()[0] in first]
        learned.append(np.mean(correct) > 0.5)
    return f"{sum(learned)} of {len(learned)}"


def difference(name: str, row: str, rival: str) -> str:
    """A recorded difference with its corrected interval, such as "-2.0 [-5.8, 1.8]"."""
    found = json.loads((ROOT / f"data/results/{name}/aggregate.json").read_text(encoding="utf-8"))["differences"]
    cell = next(one["mean"] for one in found if (one["row"], one["rival"]) == (row, rival))
    return "{:+.1f} [{:.1f}, {:.1f}]".format(cell["mean"], *cell["ci_corrected"])


def test_what_is_said_about_the_openings_in_the_mixture():
    plain, hinted, mixed = (openings(f"GRPO, {name}") for name in ("plain", "hinted", "mixed"))
    assert f"learned in {plain} runs when *plain*, in {hinted} when *hinted*, in {mixed} when *mixed*" in source("05")
    assert f"learns them in {openings('GRPO, resampled')}" in source("05")
    assert f"in {plain} runs when plain, in {hinted} when hinted, in {mixed} when mixed" in source("03")
    assert (f"in {openings('Reg-GRPO, hinted')} runs when hinted, in {openings('Reg-GRPO, plain')} when plain"
            in source("04"))
    page = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"questions in {plain} runs without augmentation, in {hinted} with *hinted*, in {mixed} with *mixed*" in page


@pytest.mark.parametrize(("row", "rival"), [("GRPO + DA", "GRPO"), ("Reg-GRPO", "GRPO"), ("Reg-GRPO + DA", "Reg-GRPO")])
def test_what_is_said_about_table_4(row, rival):
    pages = [source("05"), (ROOT / "README.md").read_text(encoding="utf-8"),
             (ROOT / "data/results/PROTOCOL.md").read_text(encoding="utf-8")]
    assert all(difference("table4", row, rival).removeprefix("+") in page for page in pages)


def over_plain(folder: str, cell: str, variant: str) -> str:
    """The difference from plain at temperature 1 on a base model's results, corrected for five claims, three seeds."""
    success = {(run["row"], run["seed"]): run["sampled"]["cell"]["accuracy"] for run in (
        json.loads(path.read_text(encoding="utf-8"))
        for path in (ROOT / "data/results" / folder / f"phase_{cell}").glob("*_seed*.json"))}
    gaps = 100 * np.array([success[variant, seed] - success["plain", seed] for seed in range(3)])
    reach = 9.924843 * gaps.std(ddof=1) / 3**0.5
    return "{:+.0f} [{:.0f}, {:.0f}]".format(gaps.mean(), gaps.mean() - reach, gaps.mean() + reach)


@pytest.mark.parametrize(("folder", "cell", "variant"), [
    ("base_seed1", "A2", "hinted"), ("base_seed2", "A2", "hinted"), ("base_seed1", "F4", "mixed"),
    ("base_seed2", "F4", "mixed")])
def test_what_is_said_about_the_other_base_models(folder, cell, variant):
    pages = [source("05"), (ROOT / "README.md").read_text(encoding="utf-8"),
             (ROOT / "data/results/PROTOCOL.md").read_text(encoding="utf-8")]
    assert all(over_plain(folder, cell, variant) in page for page in pages)


def robust(method: str) -> dict[tuple[str, str], list[float]]:
    """Accuracy at temperature 1 in per cent, the mean of the splits, by (updates, rate): one value for each seed."""
    used = json.loads((ROOT / "data/results/robust/aggregate.json").read_text(encoding="utf-8"))["runs"]
    runs = {tuple(row.split("; ")[1:]): [json.loads((ROOT / "data/results" / files[seed]).read_text(encoding="utf-8"))
                                         for seed in "012"]
            for row, files in used.items() if row.split(";")[0] == method}
    return {setting: [100 * np.mean([cell["accuracy"] for cell in run["sampled"].values()]) for run in three]
            for setting, three in runs.items()}


def test_what_is_said_about_robust():
    def interval(row, rival):  # paired, three seeds
        gaps = np.subtract(row, rival)
        reach = 4.302653 * gaps.std(ddof=1) / 3 ** 0.5
        return gaps.mean(), gaps.mean() - reach, gaps.mean() + reach

    reg, grpo = robust("Reg-GRPO, eps 0.1"), robust("GRPO")
    gaps = {setting: interval(reg[setting], grpo[setting]) for setting in grpo}
    last = ("16 updates", "learning rate 0.001")
    assert len(gaps) == 9 and [setting for setting, (_, low, high) in gaps.items() if not low < 0 < high] == [last]
    pages = [source("05"), (ROOT / "README.md").read_text(encoding="utf-8")]
    assert all("{:+.0f} [{:.0f}, {:.0f}]".format(*gaps[last]) in page for page in pages)
    worst = interval(np.min(list(reg.values()), axis=0), np.min(list(grpo.values()), axis=0))
    assert all("{:.0f} points [{:.0f}, {:.0f}] above GRPO's".format(*worst) in page for page in pages)


# 06 ------------------------------------------------------------------------------------------------------------------


def test_06_counts_the_settings_that_its_stand_in_replaces():
    assert "one option change" not in source("06")
    replaced, all_fields = map(int, re.search(r"(\d+) of (\d+) settings replaced", outputs("06")).groups())
    assert all_fields == len(TrainConfig.__dataclass_fields__) and replaced >= 18


def test_06_claims_nothing_of_a_gpu_that_is_not_recorded():
    recorded = (ROOT / "data/results/bench/gpu_report.md").exists()
    assert ("0 GPU reports are recorded" in outputs("06")) is not recorded
    assert "No training at full scale was made" in source("06") and "On several GPUs it was not run" in source("06")
    assert "not with several GPUs" in page("SCALING.md")


def test_06_scaling_counts_what_a_process_sends():
    from dvr1_lite.config import load_config
    from dvr1_lite.scale.memory import predict

    for name, sent, moments in (("3b", 210, 239), ("7b", 283, 323)):
        static = predict(load_config(f"seed_bench_r1_qwen2_5_vl_{name}")).static
        assert 2 * 7 / 8 * static["adapter"] / 1e6 == pytest.approx(sent, abs=1)
        assert static["optimizer"] / 1e6 == pytest.approx(moments, abs=1)
        assert f"{sent} MB" in page("SCALING.md") and f"{moments} MB" in page("SCALING.md")


# 07 ------------------------------------------------------------------------------------------------------------------


def sick(name: str) -> dict[str, np.ndarray]:
    """The recorded metrics of a sick run, an array for each."""
    lines = (ROOT / f"data/results/sick/{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def test_07_the_gallery_shows_what_its_table_says():
    healthy, text = sick("healthy"), source("07")
    assert healthy["accuracy"][-5:].mean() > healthy["accuracy"][:2].mean() + 0.2
    collapse = sick("format_collapse")
    assert collapse["format_rate"][0] > 0.9 and collapse["format_rate"][-5:].max() < 0.1 < collapse["unfinished"][-1]
    explosion = sick("kl_explosion")
    assert explosion["kl"].max() > 1e5 > 1 > healthy["kl"].max()
    assert explosion["accuracy"][-10:].mean() > explosion["accuracy"][:2].mean() + 0.2
    assert sick("all_vanished")["vanishing_all_wrong"].mean() > 0.9
    ignored = sick("video_ignored")
    assert ignored["accuracy"][0] < 0.4 and abs(ignored["accuracy"][-10:].mean() - 36 / 60) < 0.15
    hacked = sick("reward_hacked")
    assert hacked["reward_normalised"][-5:].mean() > hacked["reward_normalised"][:2].mean() + 0.1
    assert 0.05 < hacked["accuracy"][-10:].mean() < 0.15 and "accuracy stays near 0.1" in text
    assert sick("too_slow")["kl"].max() < 0.01


def test_07_the_controls_tell_the_run_that_ignores_its_clips():
    found = json.loads((ROOT / "data/results/sick/controls.json").read_text(encoding="utf-8"))
    assert found["healthy"]["ci95"][0] > 0 > found["video_ignored"]["ci95"][0]
    assert abs(found["video_ignored"]["difference"]) < 0.1


def test_07_learning_rates_of_the_gallery_are_those_of_the_script():
    from sick_runs import COMMON, RUNS

    rate = COMMON["learning_rate"]
    times = {name: RUNS[name].changes["learning_rate"] / rate for name in ("format_collapse", "kl_explosion")}
    assert round(times["format_collapse"]) == 33 and round(times["kl_explosion"]) == 13
    assert rate / RUNS["too_slow"].changes["learning_rate"] == pytest.approx(300)
    for words in ("33 times too large", "13 times too large", "300 times too small"):
        assert words in source("07")


def test_07_a_pilot_samples_a_thousand_completions():
    from inspect import signature

    from dvr1_lite.scale.pilot import CONTROL_SAMPLES, pilot
    from reader import find_answer

    default = {name: entry.default for name, entry in signature(pilot).parameters.items()}
    assert default["prompts"] * (default["completions"] + 4 * CONTROL_SAMPLES) == find_answer("07-b")["answer"] == 1200
