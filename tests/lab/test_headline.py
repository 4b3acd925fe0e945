r"""The two headline comparisons on recorded runs that are written by hand."""

import json

import matplotlib
import pytest

matplotlib.use("Agg")

from dvr1_lite.lab import headline
from dvr1_lite.lab.tables import EXPERIMENTS


def record(results, name, runs):
    r"""Write recorded runs, (row, seed) -> content, and the aggregate.json that names them."""
    (results / name).mkdir(parents=True)
    used = {}
    for i, ((row, seed), content) in enumerate(runs.items()):
        (results / name / f"{i}.json").write_text(json.dumps(content))
        used.setdefault(row, {})[str(seed)] = f"{name}/{i}.json"
    (results / name / "aggregate.json").write_text(json.dumps({"runs": used}))


def cell_run(sampled, late=0.9):
    return {"rollouts": 4800, "curve": {"rollouts": [1600, 4800], "accuracy": [0.0, late]},
            "sampled": {"cell": {"accuracy": sampled}}, "accuracy": {"cell": {"accuracy": 1.0}}}


def test_the_phase_table_has_means_learned_runs_and_areas_by_hand(tmp_path):
    record(tmp_path, "phase_F3", {("plain", 0): cell_run(0.2), ("plain", 1): cell_run(0.6), ("mixed", 0): cell_run(0.9)})
    table = headline.cell_table(tmp_path).set_index("variant")
    assert list(table["cell"]) == ["F3", "F3"] and table.loc["plain", "mean"] == pytest.approx(0.4)
    assert table.loc["plain", "learned"] == "1 of 2" and table.loc["mixed", "learned"] == "1 of 1"
    assert table.loc["plain", "predicted"] == 0.76  # PROTOCOL.md's table
    assert table.loc["plain", "area"] == pytest.approx(0.6)  # 0 over 1,600 rollouts, 0.9 over 3,200
    assert len(headline.cell_figure(tmp_path).axes) == 1


def test_differences_in_the_area_by_hand(tmp_path):
    # gaps of 30, 15 and 0 points over 3,200 of 4,800 rollouts: 20, 10 and 0
    late = {"plain": (0.6, 0.6, 0.6), "mixed": (0.9, 0.75, 0.6), "kept": (0.9,)}
    record(tmp_path, "phase_F3", {(name, seed): cell_run(0.5, value) for name, values in late.items()
                                  for seed, value in enumerate(values)})
    [(place, line)] = headline.area_table(tmp_path).iterrows()
    assert line["mixed"] == "+10.0 [-47.3, 67.3]"  # t(0.995, 2) = 9.9248 times 10 / sqrt(3)
    assert line["kept"] == "+20.0, n = 1" and "F3" in place


def test_robustness_is_the_worst_the_median_and_the_share_near_the_best(tmp_path):
    rows = [row.name for row in EXPERIMENTS["robust"].rows if row.name.startswith("GRPO;")]
    accuracies = [0.1, 0.5, 0.6, 0.7, 0.75, 0.78, 0.79, 0.80, 0.80]
    runs = {(row, 0): {"sampled": {"L1": {"accuracy": value}, "L2": {"accuracy": value}}}
            for row, value in zip(rows, accuracies, strict=True)}
    incomplete = next(row.name for row in EXPERIMENTS["robust"].rows if row.name.startswith("Reg-GRPO, eps 0.1;"))
    record(tmp_path, "robust", runs | {(incomplete, 0): runs[rows[0], 0]})
    record(tmp_path / "partial", "robust", {(incomplete, 0): runs[rows[0], 0]})
    assert headline.robust_table(tmp_path / "partial").empty  # and the figure is drawn without its last panel
    assert len(headline.robust_figure(tmp_path / "partial").axes) == 4
    table = headline.robust_table(tmp_path).set_index("figure")
    assert set(table["method"]) == {"GRPO"} and table.loc["worst", "mean"] == 0.1
    assert table.loc["median", "mean"] == 0.75 and table.loc["near the best", "mean"] == pytest.approx(4 / 9)


def test_a_method_is_compared_with_grpo_seed_by_seed_and_its_worst_setting_has_an_interval(tmp_path):
    worst = {"GRPO": (0.1, 0.2, 0.3), "GSPO": (0.4, 0.6, 0.5)}  # of seeds 0 to 2; differences 0.3, 0.4, 0.2
    runs = {}
    for row in EXPERIMENTS["robust"].rows:
        method, inner, rate = row.name.split("; ")
        for seed in range(3) if method in worst else ():
            value = worst[method][seed] if (inner, rate) == ("16 updates", "learning rate 0.001") else 0.7
            runs[row.name, seed] = {"sampled": {"L1": {"accuracy": value - 0.1}, "L2": {"accuracy": value + 0.1}}}
    record(tmp_path, "robust", runs)
    table = headline.robust_table(tmp_path).set_index(["method", "figure"])
    found = table.loc["GSPO", "worst"]
    assert found["mean"] == pytest.approx(0.5) and found["over GRPO"] == pytest.approx(0.3)
    reach = 4.302653 * 0.1 / 3 ** 0.5  # t(0.975, 2) times the standard error
    assert found["over GRPO ci"] == pytest.approx([0.3 - reach, 0.3 + reach])
    assert table.loc["GRPO", "median"]["mean"] == pytest.approx(0.7)
    figure = headline.robust_figure(tmp_path)
    ends = [line.get_xdata()[0] for line in figure.axes[3].lines]
    assert ends == pytest.approx([20, 50]) and len(figure.axes[2].containers) == 4
