r"""Intervals and verdicts by hand, the recorded results recomputed, and what tables and figures hold."""

import json
import math
import shutil

import matplotlib

matplotlib.use("Agg")

import pytest

from dvr1_lite.errors import ConfigError
from dvr1_lite.files import data_folder
from dvr1_lite.lab import report, stats
from dvr1_lite.lab.tables import EXPERIMENTS, PAPER

RESULTS = data_folder() / "results"
QUESTIONS = {"L1": {"clip": [0, 0, 1, 1, 2, 2], "type": ["a", "b"] * 3}}
ANSWERS = {"GRPO": ["100000", "110000", "100000"], "Reg-GRPO": ["111000", "111000", "111100"]}


def test_intervals_over_seeds_by_hand():
    found = stats.paired_summary([1.0, 2.0, 3.0], family=2)  # sd 1, error 0.57735, t(2): 4.3027, 6.2053, 1.0607
    assert (found["mean"], found["sd"], found["n"]) == pytest.approx((2, 1, 3))
    assert found["ci"] == pytest.approx([2 - 2.4841, 2 + 2.4841], abs=1e-3)
    assert found["ci_corrected"] == pytest.approx([2 - 3.5826, 2 + 3.5826], abs=1e-3)
    assert found["detectable"] == pytest.approx((6.2053 + 1.0607) * 0.57735, abs=1e-3)
    for few in ([4.0], [3.0, 5.0]):  # two runs that learn or do not learn would often have a narrow interval by chance
        found = stats.paired_summary(few, 4)
        assert found["mean"] == 4 and found["ci"] is found["ci_corrected"] is found["detectable"] is None
    assert stats.paired_summary([0.0, 0.0, 0.0], 4)["detectable"] is None, "equal failures detect nothing"


def test_interval_by_clip_by_hand():
    # clips a, b, c with 0 1 | 1 0 | 0 -1, mean 1/6: sums of residuals 2/3, 2/3, -4/3; error sqrt(3/2 * 24/9) / 6 = 1/3
    one = ([0.0, 1.0, 1.0, 0.0, 0.0, -1.0], [0, 0, 1, 1, 2, 2])
    assert stats.clip_interval([one]) == pytest.approx([1 / 6 - 1.434218, 1 / 6 + 1.434218])  # t(2) = 4.3027
    # two splits: error sqrt(2)/3 / 2, t(4) = 2.7764
    assert stats.clip_interval([one, one]) == pytest.approx([1 / 6 - 0.65441, 1 / 6 + 0.65441], abs=1e-4)
    unreadable = ([*one[0], math.nan], [*one[1], 3])
    assert stats.clip_interval([unreadable]) == pytest.approx(stats.clip_interval([one]))
    assert math.isnan(stats.mean_answers([{"answers": {"L1": "1x"}}, {"answers": {"L1": "11"}}], "L1")[1])
    assert stats.clip_interval([([0.0, 1.0], [5, 5])]) == [-math.inf, math.inf]


@pytest.mark.parametrize(("seeds", "clips", "expected"), [
    ([0.5, 3.0], [0.1, 3.0], "same sign here"), ([0.5, 3.0], [-0.1, 3.0], "undecided here"),
    ([-3.0, -0.5], [-3.0, -0.1], "opposite sign here"), ([-1.0, 3.0], [0.5, 2.0], "undecided here"),
    ([0.5, 3.0], None, "same sign here"), (None, [0.5, 2.0], "undecided here")])
def test_verdicts_need_both_intervals_on_one_side(seeds, clips, expected):
    assert stats.verdict(seeds, clips) == expected


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    for path in [*RESULTS.glob("*/*.json"), *RESULTS.glob("*.json")]:
        target = folder / path.relative_to(RESULTS)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    return folder


def numbers(entry, path=""):
    r"""Every number of a JSON content with its path; words such as verdicts are left out."""
    if isinstance(entry, dict):
        return [found for key, one in entry.items() for found in numbers(one, f"{path}/{key}")]
    if isinstance(entry, list):
        return [found for i, one in enumerate(entry) for found in numbers(one, f"{path}/{i}")]
    return [(path, entry)] if isinstance(entry, (int, float)) or entry is None else []


@pytest.mark.parametrize("name", sorted(path.parent.name for path in RESULTS.glob("*/aggregate.json")))
def test_recorded_aggregates_are_recomputed_from_their_runs(name, copy):
    recorded = json.loads((RESULTS / name / "aggregate.json").read_text(encoding="utf-8"))
    report.save_aggregate(EXPERIMENTS[name], recorded["runs"], copy)
    found = json.loads((copy / name / "aggregate.json").read_text(encoding="utf-8"))
    old, new = dict(numbers(recorded)), dict(numbers(found))
    assert old.keys() == new.keys() and len(old) > 500 and found["runs"] == recorded["runs"]
    assert [path for path in old if old[path] != new[path] and abs(old[path] - new[path]) > 1e-9] == []


def test_report_writes_tables_figures_and_claims_from_recorded_files_alone(copy, capsys):
    for name in [path.parent.name for path in copy.glob("*/aggregate.json")]:
        if name not in ("phase_F3", "phase_A3"):
            (copy / name / "aggregate.json").unlink()
    written = report.report([], copy)
    assert {path.relative_to(copy).as_posix() for path in written} == {
        "when_hints_help.png", *(f"{name}/{kind}.png" for name in ("phase_F3", "phase_A3")
                                 for kind in ("accuracy", "differences"))}
    assert all(path.stat().st_size > 5000 for path in written) and capsys.readouterr().out.startswith("## phase_F3")
    assert "| Table 4 | GRPO + DA over GRPO | not tested |" in (copy / "claims.md").read_text()
    with pytest.raises(ConfigError, match="reproduce table5"):
        report.report(["table5"], copy)


def made_up(method: str, correct: str) -> dict:
    r"""What would be recorded of answers to six questions of two types on three clips."""
    marks = [int(mark) for mark in correct]
    cell = {"accuracy": sum(marks) / 6, "n": 6, "by_type": {
        kind: {"accuracy": sum(marks[i::2]) / 3} for i, kind in enumerate("ab")}}
    curve = {"step": [1, 2], "rollouts": [64, 128]} | dict.fromkeys(report.CURVES, [0.25, 0.5])
    return {"method": method, "config": {"augment": "none"}, "accuracy": {"L1": cell}, "answers": {"L1": correct},
            "sampled": {}, "rollouts": 9600, "updates": 600, "steps": 150, "augmentation": {"hard": 0}, "curve": curve,
            "seconds": {"process": 90.0}}


@pytest.fixture
def found():
    r"""The aggregate of two rows of table 4 with three seeds each."""
    rows = {row: dict(enumerate(made_up(row.lower(), text) for text in texts)) for row, texts in ANSWERS.items()}
    return report.aggregate(EXPERIMENTS["table4"], rows, made_up("base", "100000") | {"questions": QUESTIONS})


def test_aggregate_by_hand(found):
    grpo, reg = found["rows"]["GRPO"], found["rows"]["Reg-GRPO"]
    assert grpo["splits"]["L1"]["values"] == pytest.approx([100 / 6, 200 / 6, 100 / 6])
    assert grpo["mean"]["mean"] == pytest.approx(400 / 18) and grpo["seeds"] == [0, 1, 2]
    assert reg["by_type"]["L1"]["a"]["mean"] == pytest.approx(200 / 3)  # questions 0, 2 of 0, 2, 4
    assert reg["published"]["L1"] == 44.2 and found["rows"]["base"]["published"]["L1"] == 31.3
    assert found["rows"]["base"]["splits"]["L1"]["ci"] is None and grpo["rollouts"]["mean"] == 9600
    [difference] = found["differences"]  # the other claims have no runs
    assert difference["mean"]["mean"] == pytest.approx(600 / 18)  # gaps 200/6, 100/6, 300/6: error 9.6225
    assert difference["mean"]["ci"][0] == pytest.approx(33.3333 - 4.302653 * 9.6225, abs=1e-2)
    assert difference["mean"]["ci_corrected"][0] == pytest.approx(33.3333 - 8.8602 * 9.6225, abs=1e-2)  # of four claims
    assert report.published_difference(EXPERIMENTS["table4"], ("Reg-GRPO", "GRPO"))["L1"] == pytest.approx(4.6)


def test_claims_of_the_phase_diagram_are_judged_at_temperature_1():
    rows = {row: {seed: made_up("grpo", "111111" if row == "mixed" else "000000")
                  | {"sampled": {"L1": {"accuracy": (0.2 if row == "mixed" else 0.3) + seed / 100}}}
                  for seed in range(3)} for row in ("plain", "mixed")}
    found = report.aggregate(EXPERIMENTS["phase_F2"], rows, made_up("base", "000000") | {"questions": QUESTIONS})
    claim = report.claims_of(EXPERIMENTS["phase_F2"], found)[-1]
    assert (claim.text, claim.effect, claim.by_clip) == ("mixed over plain", pytest.approx(-10), None)
    assert claim.verdict == "opposite sign here" and "| 21.0 [18.5, 23.5] |" in report.as_table(found)


def test_tables_figures_and_sentences_show_the_numbers(found):
    table = report.as_table(found)
    assert "| Reg-GRPO over GRPO | undecided here | +33.3 |" in table and "| 42.6 |" in table
    points = [line.get_xdata()[0] for line in report.accuracy_figure(found).axes[0].lines if line.get_marker() == "o"]
    assert points == pytest.approx([100 / 6, 400 / 18, 1000 / 18])  # base, GRPO, Reg-GRPO; none is published
    assert [t.get_text() for t in report.differences_figure(found).axes[0].texts] == ["undecided here (n = 3)"]
    known, missing, *_ = report.claims_of(EXPERIMENTS["table4"], found)
    text = report.sentence(known)
    assert text.startswith(f"Reg-GRPO over GRPO: undecided here ({known.condition}), +33.3 points [-")
    assert "over 3 seeds" in text and known.condition
    assert report.sentence(missing) == "GRPO + DA over GRPO: not tested; run python -m dvr1_lite reproduce table4"


def test_every_claim_is_on_the_board_and_a_shared_comparison_is_drawn_once():
    board = report.scoreboard(RESULTS)
    assert len(board) == 3 + sum(len(experiment.claims) for experiment in PAPER)
    assert {claim.paper for claim in board} == {*(f"Table {n}" for n in range(1, 9)), "Figure 3"}
    repeats = {(claim.paper, claim.text): claim.repeats for claim in board if claim.repeats}
    assert repeats == {("Table 5", "Reg-GRPO over GRPO"): "Table 4",
                       ("Table 7", "increasing + decreasing over none"): "Table 4",
                       ("Table 8", "adaptive over none"): "Table 4"}
    assert [c.published > 0 for c in board if c.paper == "Table 5"] == [True] * 7  # printed, though not tested here
    drawn = [label.get_text() for label in report.claims_figure(board).axes[0].get_yticklabels()]
    assert len(drawn) == len(set(drawn)) == sum(c.effect is not None and not c.repeats for c in board)


def test_a_claim_of_the_phase_diagram_repeats_no_table_and_its_title_keeps_the_cell():
    claims = report.claims_of(EXPERIMENTS["phase_F3"], None)  # GRPO against GRPO + DA, as in table 4, on other questions
    assert [claim.paper for claim in claims] == ["Phase F3"] * 5 and not any(claim.repeats for claim in claims)


def test_a_difference_of_90_points_lies_inside_the_figure():
    claims = [report.Claim("Phase F3", "mixed over plain", "undecided here", effect=90.0, interval=(-700.0, 880.0), seeds=2)]
    axes = report.claims_figure(claims).axes[0]
    assert axes.get_xlim() == pytest.approx((-110, 110))
    cut = [line.get_xdata()[0] for line in axes.lines if line.get_marker() in "<>" and len(line.get_xdata()) == 1]
    assert cut == pytest.approx([-110, 110])  # arrowheads say that the interval goes on


def test_a_claim_of_less_is_positive_when_it_is_less():
    less = {"row": "GRPO + DA", "rival": "GRPO", "training": {"vanishing_after": {
        "mean": -0.1, "ci_corrected": [-0.15, -0.05], "detectable": 0.02, "n": 5}}}
    claim = report.claims_of(EXPERIMENTS["figure3"], {"differences": [less]})[0]
    assert claim.verdict == "same sign here" and claim.effect == pytest.approx(10.0)
    assert claim.interval == pytest.approx([5.0, 15.0]) and claim.detectable == pytest.approx(2.0)
