r"""Turn recorded runs into means with intervals, paired differences, verdicts, tables and figures.

`aggregate.json` and `table.md` of an experiment, `claims.md` over all of the paper's claims. Accuracies are in per
cent, differences in points. What the intervals mean: `stats.py`; what a verdict needs: `data/results/PROTOCOL.md`.
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..config import TrainConfig
from ..errors import ConfigError
from ..files import data_folder, make_folder, write_atomically
from .headline import cell_figure, robust_figure
from .plotting import METHOD_COLOURS, STYLE, label_ends, save
from .stats import (
    NOT_TESTED, OPPOSITE, SAME, UNDECIDED, clip_interval, mean_answers, paired_summary, seed_summary, verdict,
)
from .tables import COMMON, EXPERIMENTS, PAPER, Experiment, dump

MOST_ROWS = 30  # a figure shows; a grid of more has none
BASE = "Qwen2.5-VL-3B"  # the base model's name in the paper's tables
ENDS = ("vanishing", "vanishing_after", "reward_normalised", "kl")
CURVES = {"vanishing_after": "share of vanishing groups, as trained on",
          "vanishing": "share of vanishing groups, as sampled",
          "reward_normalised": "reward, share of the largest, as sampled"}
OUTCOMES = {"vanishing_after": "vanishing ratio", "reward_normalised": "reward"}
ELSEWHERE = (("Table 1", "DeepVideo-R1 over SFT and GRPO: 2 to 7 billion weights, real video"),
             ("Table 2", "DeepVideo-R1 over its base on other benchmarks of real video"),
             ("Table 3", "DeepVideo-R1 over VideoChat-R1 on NExT-GQA"))
VERDICT_LOOK = {SAME: ("#117733", ">"), OPPOSITE: ("#882255", "<"), UNDECIDED: ("#555555", "o")}


# --- aggregates ------------------------------------------------------------------------------------------------------


def save_aggregate(experiment: Experiment, used: Mapping[str, Mapping[Any, str]], results: Path) -> str:
    r"""Write `NAME/aggregate.json` and `NAME/table.md` in the results folder and return the table as Markdown.

    used: row -> seed -> file of the recorded run, as `runner.reproduce` returns and aggregate.json keeps it. Raises
    `ConfigError` if the base model's evaluation is missing.
    """
    if not used:
        return f"{experiment.name}: no finished runs"
    rows = {row: {int(seed): json.loads((results / name).read_text(encoding="utf-8")) for seed, name in files.items()}
            for row, files in used.items()}
    base = read_base(results, next(run for runs in rows.values() for run in runs.values())["base"])
    found = aggregate(experiment, rows, base) | {"runs": used}
    make_folder(results / experiment.name)
    write_atomically(results / experiment.name / "aggregate.json", dump(found, lambda value: round(value, 4)))
    write_atomically(results / experiment.name / "table.md", as_table(found))
    return as_table(found)


def read_base(results: str | Path, key: str) -> dict:
    r"""Read the base model's evaluation that a run is compared with. Raises `ConfigError` if it is missing."""
    path = Path(results) / "base" / f"{key}.json"
    if not path.exists():
        raise ConfigError(f"{path} is missing: run `reproduce`, which writes it, or restore it")
    return json.loads(path.read_text(encoding="utf-8"))


def aggregate(experiment: Experiment, rows: Mapping[str, Mapping[int, Mapping]], base: Mapping) -> dict:
    r"""Compute everything that a table and its figures need.

    rows: row -> seed -> recorded run. base: the evaluation of the base model. Returns `rows`: the base's and each row's
    splits and "mean" (equally weighted) with both intervals, types, sampled accuracy, training; `differences`: each
    claim with its intervals and the smallest detectable effect; `curves`: means over seeds.
    """
    groups, published = base["questions"], published_rows(experiment)
    table = {"base": _accuracies({0: base}, groups) | {"method": "base", "published": published.get(BASE)}}
    names = {row.name: row.published for row in experiment.rows}
    table |= {row: _accuracies(runs, groups) | _training(list(runs.values())) | {
        "published": published.get(names.get(row))} for row, runs in rows.items()}
    family = max(1, len(experiment.claims))
    differences = [_difference((row, rival), family, rows, groups) for row, rival in experiment.claims
                   if set(rows.get(row, ())) & set(rows.get(rival, ()))]
    return {"table": experiment.name, "question": experiment.question, "equal": experiment.equal, "unit": "per cent",
            "interval": "ci: 95 %, Student's t over seeds; ci_clips: 95 %, questions clustered by clip",
            "correction": f"Bonferroni over {family} claims, on the mean of the splits", "rows": table,
            "differences": differences, "curves": {row: _curves(list(runs.values())) for row, runs in rows.items()}}


def _accuracies(runs: Mapping[int, Mapping], groups: Mapping) -> dict:
    r"""Summarise a row's accuracy by split and type, greedy and sampled. groups: the base model's `questions`."""
    many, splits, by_type, sampled = list(runs.values()), {}, {}, {}
    questions = {split: (mean_answers(many, split), groups[split]["clip"]) for split in groups}
    for split in groups:
        cells = [run["accuracy"][split] for run in many]
        values = [100 * cell["accuracy"] for cell in cells]
        splits[split] = seed_summary(values) | {"ci_clips": clip_interval([questions[split]]), "values": values,
                                                "questions": cells[0]["n"]}
        by_type[split] = {kind: seed_summary([100 * cell["by_type"][kind]["accuracy"] for cell in cells])
                          for kind in cells[0]["by_type"]}
        if many[0]["sampled"]:
            sampled[split] = seed_summary([100 * run["sampled"][split]["accuracy"] for run in many])
        if all("mean_iou" in cell for cell in cells):
            splits[split]["mean_iou"] = seed_summary([cell["mean_iou"] for cell in cells])
    mean = seed_summary(list(np.mean([splits[split]["values"] for split in groups], axis=0)))
    if sampled:
        sampled["mean"] = seed_summary([100 * float(np.mean([run["sampled"][split]["accuracy"] for split in groups]))
                                        for run in many])
    return {"seeds": sorted(runs), "splits": splits, "by_type": by_type, "sampled": sampled,
            "mean": mean | {"ci_clips": clip_interval(list(questions.values()))}}


def _training(runs: Sequence[Mapping]) -> dict:
    found = {name: seed_summary([run[name] for run in runs]) for name in ("rollouts", "updates", "steps")}
    found["seconds"] = seed_summary([run["seconds"]["process"] for run in runs])
    for name in ENDS:
        ends = [_end(run["curve"].get(name, [])) for run in runs]
        if None not in ends:
            found[f"{name}_in_the_end"] = seed_summary(ends)
    found["augmentation"] = {name: seed_summary([run["augmentation"][name] for run in runs])["mean"]
                             for name in runs[0]["augmentation"]}
    return found | {"method": runs[0]["method"], "augment": runs[0]["config"]["augment"]}


def _end(curve: Sequence[float | None]) -> float | None:
    r"""Return the mean over the last fifth of a curve."""
    last = [value for value in curve[-max(1, round(0.2 * len(curve))):] if value is not None]
    return math.fsum(last) / len(last) if last else None


def _difference(claim: tuple[str, str], family: int, rows: Mapping, groups: Mapping) -> dict:
    r"""Compare the two rows of a claim over the seeds that both have: accuracy, and the ends of the curves."""
    seeds = sorted(set(rows[claim[0]]) & set(rows[claim[1]]))
    mine, theirs = ([rows[row][seed] for seed in seeds] for row in claim)
    gaps = {split: [100 * (a["accuracy"][split]["accuracy"] - b["accuracy"][split]["accuracy"])
                    for a, b in zip(mine, theirs)] for split in groups}
    questions = {split: (mean_answers(mine, split) - mean_answers(theirs, split), groups[split]["clip"])
                 for split in groups}
    found = {"row": claim[0], "rival": claim[1], "seeds": seeds, "splits": {
        split: paired_summary(gaps[split], family) | {"ci_clips": clip_interval([questions[split]])}
        for split in groups}}
    found["mean"] = paired_summary(list(np.mean(list(gaps.values()), axis=0)), family) | {
        "ci_clips": clip_interval(list(questions.values()))}
    if all(run["sampled"] for run in (*mine, *theirs)):
        found["sampled"] = paired_summary([100 * float(np.mean([
            a["sampled"][split]["accuracy"] - b["sampled"][split]["accuracy"] for split in groups]))
            for a, b in zip(mine, theirs)], family)
    return found | {"training": {name: paired_summary([
        _end(a["curve"][name]) - _end(b["curve"][name]) for a, b in zip(mine, theirs)], family) for name in CURVES}}


def _curves(runs: Sequence[Mapping]) -> dict:
    r"""Average the curves over seeds, with the interval over seeds, at the points that all runs have."""
    length = min(len(run["curve"]["step"]) for run in runs)
    found = {name: [sum(run["curve"][name][i] for run in runs) / len(runs) for i in range(length)]
             for name in ("step", "rollouts")}
    for name in CURVES:
        points = [seed_summary([run["curve"][name][i] for run in runs]) for i in range(length)]
        found[name] = {"mean": [p["mean"] for p in points], "ci": [p["ci"] for p in points]}
    return found


def published_rows(experiment: Experiment) -> dict[str | None, dict[str, float]]:
    r"""Return the paper's accuracies for an experiment, row -> split -> per cent; empty if it prints none."""
    if experiment.published is None:
        return {}
    table = json.loads((data_folder() / "paper_results.json").read_text(encoding="utf-8"))[experiment.published]
    return {name: dict(zip(table["columns"], values)) for name, values in table.items() if name != "columns"}


def published_difference(experiment: Experiment, claim: tuple[str, str]) -> dict[str, float]:
    r"""Return the paper's difference of a claim's two rows, split -> points; empty if it prints none."""
    rows, names = published_rows(experiment), {row.name: row.published for row in experiment.rows}
    row, rival = (rows.get(names[name]) for name in claim)
    return {split: row[split] - rival[split] for split in row} if row and rival else {}


# --- the paper's claims ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    r"""A claim of the paper and its verdict here. Numbers are points (of accuracy, of the largest reward, of groups),
    above 0 in favour of the claim. command: what tests an untested claim. published: mean of the splits, only its sign
    is compared; None without printed numbers, and for tables that cannot be tested here. repeats: the table that
    compares the same two rows. sampled: the second figure, accuracy at temperature 1, with its corrected interval over
    seeds; None where it is the first. Its single answers are not recorded, so it has no interval by clip."""

    paper: str
    text: str
    verdict: str
    command: str = ""
    effect: float | None = None
    interval: Sequence[float] | None = None  # over seeds, corrected
    by_clip: Sequence[float] | None = None
    detectable: float | None = None
    seeds: int = 0
    published: float | None = None
    condition: str = ""
    repeats: str = ""
    sampled: Mapping | None = None


def scoreboard(results: str | Path) -> list[Claim]:
    r"""Collect every claim of the paper's tables and figure 3, from the aggregates in the results folder."""
    board = [Claim(paper, text, NOT_TESTED) for paper, text in ELSEWHERE]
    for experiment in PAPER:
        path = Path(results) / experiment.name / "aggregate.json"
        board += claims_of(experiment, json.loads(path.read_text(encoding="utf-8")) if path.exists() else None)
    return board


def claims_of(experiment: Experiment, found: Mapping | None) -> list[Claim]:
    r"""Return the claims of an experiment with their verdicts from its aggregate; without one they are not tested."""
    claims, name = [], title(experiment.name)
    known = {(d["row"], d["rival"]): d for d in found["differences"]} if found else {}
    for pair in experiment.claims:
        key, sign = experiment.outcomes.get(pair, (None, 1))
        text = f"{pair[0]} over {pair[1]}" + (f": {'higher' if sign > 0 else 'lower'} {OUTCOMES[key]}" if key else "")
        printed = published_difference(experiment, pair)
        published = sum(printed.values()) / len(printed) if printed and not key else None
        if pair not in known:
            claims.append(Claim(name, text, NOT_TESTED, f"python -m dvr1_lite reproduce {experiment.name}",
                                published=published, repeats=_first_table(experiment, pair)))
            continue
        sampled, first = known[pair].get("sampled"), experiment.primary == "sampled"
        cell = known[pair]["training"][key] if key else sampled if first else known[pair]["mean"]
        scale = 100 * sign if key else 1
        interval, by_clip = (ends and sorted(scale * end for end in ends)
                             for ends in (cell["ci_corrected"], cell.get("ci_clips")))
        claims.append(Claim(
            name, text, verdict(interval, by_clip), effect=scale * cell["mean"], interval=interval, by_clip=by_clip,
            detectable=cell["detectable"] and abs(scale) * cell["detectable"], seeds=cell["n"],
            published=published, condition=experiment.condition,
            repeats=_first_table(experiment, pair), sampled=None if key or first else sampled))
    return claims


def _first_table(experiment: Experiment, pair: tuple[str, str]) -> str:
    r"""Return the title of the paper's first table that compares the same two rows; "" if it is this one or none."""
    def compared(one: Experiment, names: tuple[str, str]) -> tuple:
        changes = {row.name: {key: value for key, value in {**one.common, **row.changes}.items() if value != COMMON.get(
            key, getattr(TrainConfig, key, None))} for row in one.rows}
        return *(changes[name] for name in names), one.outcomes.get(names)

    mine = compared(experiment, pair)
    first = next((one for one in PAPER if any(compared(one, names) == mine for names in one.claims)), experiment)
    return "" if first.name == experiment.name else title(first.name)


def sentence(claim: Claim) -> str:
    r"""State a claim's verdict with its condition and evidence in one sentence."""
    if claim.effect is None:
        return f"{claim.text}: {claim.verdict}" + (f"; run {claim.command}" if claim.command else "")
    seeds = (f" {_interval(claim.interval)} over {claim.seeds} seeds" if claim.interval else
             f", n = {claim.seeds}, illustrative")
    parts = [f"{claim.text}: {claim.verdict} ({claim.condition}), {claim.effect:+.1f} points{seeds}"]
    if claim.by_clip:
        parts.append(f"{_interval(claim.by_clip)} by clip")
    if claim.sampled:
        bounds = claim.sampled["ci_corrected"]
        parts.append(f"at temperature 1 {claim.sampled['mean']:+.1f} {_interval(bounds)}: {verdict(bounds)}")
    if claim.detectable is not None:
        parts.append(f"smallest detectable difference {claim.detectable:.1f}")
    if claim.repeats:
        parts.append(f"the same comparison as in {claim.repeats}")
    return "; ".join(parts)


# --- as text ---------------------------------------------------------------------------------------------------------


def title(name: str) -> str:
    r"""Return an experiment's name as a heading: "Table 4" for table4, "Phase F3" for phase_F3."""
    words = re.sub(r"(?<=[a-z])(?=\d)", " ", name).replace("_", " ")
    return words[:1].upper() + words[1:]


def as_table(found: Mapping) -> str:
    r"""Return an aggregate as Markdown: rows with intervals over seeds, then the claims."""
    lines = []
    for name, row in found["rows"].items():
        interval, published = "ci_clips" if name == "base" else "ci", list((row["published"] or {}).values())
        cells = {split: f"{cell['mean']:.1f} {_interval(cell[interval])}".removesuffix(" -")
                 for split, cell in (row["splits"] | {"mean": row["mean"]}).items()}
        sampled = row["sampled"].get("mean")
        lines.append({"row": name} | cells | {
            "mean at temperature 1": f"{sampled['mean']:.1f} {_interval(sampled['ci'])}" if sampled else "-",
            "seeds": "-" if name == "base" else len(row["seeds"]),
            "rollouts": f"{row['rollouts']['mean']:.0f}" if "rollouts" in row else "-",
            "published mean": f"{np.mean(published):.1f}" if published else "-"})
    text = (f"## {found['table']}: {found['question']}\n\nEqual {found['equal']}; greedy accuracy in per cent [95 % "
            "interval over seeds, of three or more; for the base by clip]. Published: another model, other data; only "
            "signs are compared.\n\n"
            + markdown(pd.DataFrame(lines)))
    tested = [claim for claim in claims_of(EXPERIMENTS[found["table"]], found) if claim.effect is not None]
    if tested:
        first = EXPERIMENTS[found["table"]].primary.replace("sampled", "at temperature 1")
        text += (f"\nClaims, in points of accuracy ({first}), above 0 in favour of the claim "
                 f"({found['correction']}). Rows use all their seeds, a difference those that both rows have:\n\n"
                 + markdown(claims_frame(tested).drop(columns="paper")))
    return text


def claims_frame(claims: Sequence[Claim]) -> pd.DataFrame:
    r"""Return claims as text cells, one line each."""
    return pd.DataFrame([{
        "paper": c.paper, "claim": c.text, "verdict": c.verdict + (c.repeats and (
            f" ({'as' if c.effect is not None else 'but see the same comparison'} in {c.repeats})")),
        "difference": "-" if c.effect is None else f"{c.effect:+.1f}", "over seeds, corrected": _interval(c.interval),
        "by clip": _interval(c.by_clip), "at temperature 1": f"{c.sampled['mean']:+.1f} "
        f"{_interval(c.sampled['ci_corrected'])}" if c.sampled else "-",
        "detectable": "-" if c.detectable is None else f"{c.detectable:.1f}",
        "seeds": c.seeds or "-", "published": "-" if c.published is None else f"{c.published:+.1f}"[0],
        "condition": c.condition or "-"} for c in claims])


def markdown(frame: pd.DataFrame) -> str:
    r"""Return a frame of text cells as a Markdown table."""
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.astype(str).values.tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _interval(bounds: Sequence[float] | None) -> str:
    return f"[{bounds[0]:.1f}, {bounds[1]:.1f}]" if bounds else "-"


# --- figures ---------------------------------------------------------------------------------------------------------


def report(names: Sequence[str], out: str | Path) -> list[Path]:
    r"""Aggregate recorded runs anew, write each experiment's tables and figures, and return the figures' paths.

    names: experiments; none for all that have an aggregate in the results folder `out`, and the paper's claims
    (`claims.md`, `claims.png`) and the headline figures. Nothing is trained: the runs are those that aggregate.json
    names. Curves are drawn for experiments with claims about them. Raises `ConfigError` if an experiment has no
    recorded runs.
    """
    results, figures = Path(out), {}
    chosen = list(names) or [name for name in EXPERIMENTS if (results / name / "aggregate.json").exists()]
    for name in chosen or ["NAME"]:
        path = results / name / "aggregate.json"
        if not path.exists():
            raise ConfigError(f"{path} is missing: run `python -m dvr1_lite reproduce {name} --out {results}` first")
        print(save_aggregate(EXPERIMENTS[name], json.loads(path.read_text(encoding="utf-8"))["runs"], results))
        found = json.loads(path.read_text(encoding="utf-8"))
        if len(found["rows"]) <= MOST_ROWS:
            figures[path.with_name("accuracy.png")] = accuracy_figure(found)
        if found["differences"]:
            figures[path.with_name("differences.png")] = differences_figure(found)
        if EXPERIMENTS[name].outcomes:
            figures[path.with_name("curves.png")] = curves_figure(found)
    if not names:
        board = scoreboard(results)
        head = "## The paper's claims\n\nIn points, above 0 in favour of the claim; 95 %; see PROTOCOL.md.\n\n"
        write_atomically(results / "claims.md", head + markdown(claims_frame(board)))
        if any(claim.effect is not None for claim in board):
            figures[results / "claims.png"] = claims_figure(board, "The paper's claims, tested here")
        if any(name.startswith("phase") for name in chosen):
            figures[results / "when_hints_help.png"] = cell_figure(results)
        if "robust" in chosen:
            figures[results / "when_reg_grpo_differs.png"] = robust_figure(results)
    for path, figure in figures.items():
        save(figure, path)
    return list(figures)


def look(row: Mapping) -> dict:
    r"""Return colour and marker of a row: the method's colour, a square where prompts were augmented."""
    return {"color": METHOD_COLOURS[row["method"]], "marker": "s" if row.get("augment", "none") != "none" else "o"}


def accuracy_figure(found: Mapping) -> Figure:
    r"""Draw the accuracy of each row, a panel for each split, with 95 % intervals over seeds (base: by clip)."""
    rows, splits = found["rows"], found["rows"]["base"]["splits"]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(splits), figsize=(3 * len(splits) + 1.6, 0.34 * len(rows) + 1.5),
                                      sharex=True, sharey=True, squeeze=False)
        for axes, (split, base) in zip(panels[0], splits.items()):
            for place, (name, row) in enumerate(rows.items()):
                cell = row["splits"][split]
                _point(axes, place, cell["mean"], cell["ci_clips" if name == "base" else "ci"], look(row))
            axes.axvline(base["mean"], color="#7F7F7F", linewidth=0.8, linestyle=":")
            axes.set(title=f"{split} ({base['questions']} questions)", xlabel="accuracy in %")
        _name_rows(panels[0, 0], [name if name == "base" else f"{name} (n = {len(row['seeds'])})"
                                  for name, row in rows.items()])
        figure.suptitle(f"{title(found['table'])}, at equal {found['equal']}: 95 % intervals over seeds", fontsize=10)
    return figure


def differences_figure(found: Mapping) -> Figure:
    r"""Draw the claims of one aggregate, as `claims_figure` does."""
    return claims_figure(claims_of(EXPERIMENTS[found["table"]], found),
                         f"{title(found['table'])}, at equal {found['equal']}")


def claims_figure(claims: Sequence[Claim], heading: str = "") -> Figure:
    r"""Draw the difference of every tested claim, each comparison once, with its verdict: thick, the corrected interval
    over seeds; thin, by clip. Right of 0: in favour of the claim."""
    drawn = [c for c in claims if c.effect is not None and not (c.repeats and c.repeats in {d.paper for d in claims})]
    ends = [abs(end) for c in drawn for end in (*(c.interval or ()), c.effect)]
    limit = 36 if all(abs(c.effect) <= 36 for c in drawn) else 100  # intervals of few seeds may be wider
    reach = 1.1 * min(limit, max(ends, default=0)) or 1
    several, papers = len({c.paper for c in drawn}) > 1, defaultdict(dict)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9.5, 0.3 * len(drawn) + 1.8))
        for place, claim in enumerate(drawn):
            colour, marker = VERDICT_LOOK[claim.verdict]
            _point(axes, place, claim.effect, claim.interval, {"color": colour, "marker": marker})
            for end in (end for end in claim.interval or () if abs(end) > reach):  # it goes on outside the figure
                axes.plot(math.copysign(reach, end), place, ">" if end > 0 else "<", color=colour, clip_on=False)
            if claim.by_clip:
                axes.plot(claim.by_clip, [place + 0.22] * 2, color=colour, linewidth=0.8)
            axes.annotate(f"{claim.verdict} (n = {claim.seeds})", (1.02, place), va="center", fontsize=9, color=colour,
                          xycoords=("axes fraction", "data"), annotation_clip=False)
            if place and claim.paper != drawn[place - 1].paper:
                axes.axhline(place - 0.5, color="#BBBBBB", linewidth=0.6)
            papers[claim.condition][claim.paper] = None
        axes.axvline(0, color="#222222", linewidth=0.8)
        axes.set(xlim=(-reach, reach), xlabel="against the claim    <    difference in points    >    for the claim")
        _name_rows(axes, [f"{c.paper}: {c.text}" if several else c.text for c in drawn])
        axes.grid(axis="y", visible=False)
        thin = "; thin: by clip" if any(claim.by_clip for claim in drawn) else ""
        figure.suptitle(f"{heading}\nthick: 95 % over seeds, corrected{thin}", fontsize=10)
        figure.supxlabel("\n".join(f"{', '.join(names)}: {condition}" for condition, names in papers.items()),
                         fontsize=8.5)
    return figure


def _point(axes, place: float, mean: float, bounds: Sequence[float] | None, style: Mapping) -> None:
    reach = np.abs(np.array(bounds)[:, None] - mean) if bounds else None
    axes.errorbar(mean, place, xerr=reach, markersize=6, capsize=3, linewidth=2, **style)


def _name_rows(axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)


def curves_figure(found: Mapping, keys: Sequence[str] = ("vanishing_after", "reward_normalised")) -> Figure:
    r"""Draw training curves (figure 3): means over seeds with bands, the 95 % interval."""
    along, dashes = "step" if found["equal"] == "updates" else "rollouts", ("-", "--", "-.", ":")
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(keys), squeeze=False, figsize=(5.6 * len(keys), 3.3))
        for key, axes in zip(keys, panels[0]):
            ends, used = [], Counter()
            for name, curve in found["curves"].items():
                method = found["rows"][name]["method"]
                colour, dash = METHOD_COLOURS[method], dashes[used[method] % len(dashes)]
                used[method] += 1
                axes.plot(curve[along], curve[key]["mean"], color=colour, linestyle=dash)
                if curve[key]["ci"][0] is not None:
                    axes.fill_between(curve[along], *zip(*curve[key]["ci"]), color=colour, alpha=0.15, linewidth=0)
                ends.append((name, curve[key]["mean"][-1], colour))
            axes.set(title=CURVES[key], ylim=(0, 1), xlabel=along)
            label_ends(axes, ends)
        figure.suptitle(f"{title(found['table'])}: mean over seeds, band: 95 % interval", fontsize=10)
    return figure
