r"""What recorded runs amount to: means over seeds with intervals, paired differences, verdicts, tables and figures.

Two intervals stand beside each mean, and each answers another question. *Over seeds*: Student's t over the runs' own
figures, on these very questions; would other seeds say the same? *By clip*: each question's mean over the seeds, the
standard error clustered by clip; would other questions say the same? All figures are in per cent or points of it.
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConfigError
from .evaluation import cluster_standard_error, t_quantile
from .experiments import EXPERIMENTS, PAPER, Experiment, Run, find_recorded, fingerprints, read_runs, unpack
from .files import make_folder, write_atomically
from .paths import data_folder

POWER = 0.8
MOST_ROWS = 30  # that are drawn in one figure
LAST = 0.2  # the share of a run, at its end, whose mean stands for "in the end"
DRAWN_CURVES = {"vanishing_after": "share of vanishing groups, as trained on",
                "vanishing": "share of vanishing groups, as sampled",
                "reward_normalised": "reward, share of the largest, as sampled"}
SHORT_CURVES = {"vanishing_after": "vanishing ratio", "vanishing": "vanishing ratio, as sampled",
                "reward_normalised": "reward"}
Answers = Sequence[float | None]  # a figure for each question, None where its clip could not be read
NOT_RECORDED, NOT_HERE, TOO_FEW = "not recorded yet", "cannot be tested here", "n = 1, illustrative"
ELSEWHERE = (("Table 1", "DeepVideo-R1 over SFT and GRPO: 2 to 7 billion weights, real video"),
             ("Table 2", "DeepVideo-R1 over its base on other benchmarks of real video"),
             ("Table 3", "DeepVideo-R1 over VideoChat-R1 on NExT-GQA"))
VERDICT_LOOK = {"reproduced": ("#117733", ">"), "contradicted": ("#882255", "<"), "inconclusive": ("#555555", "o"),
                TOO_FEW: ("#777777", "."), NOT_RECORDED: ("#777777", ""), NOT_HERE: ("#777777", "")}


# --- statistics ------------------------------------------------------------------------------------------------------


def seed_summary(values: Sequence[float], level: float = 0.95) -> dict:
    r"""`mean`, `sd` (Bessel) and `ci` = mean +- t(n - 1) sd / sqrt(n) over n seeds; `sd` and `ci` None for one."""
    mean, n = math.fsum(values) / len(values), len(values)
    if n < 2:
        return {"mean": mean, "sd": None, "ci": None, "n": n}
    sd = statistics.stdev(values)
    reach = t_quantile(0.5 + level / 2, n - 1) * sd / math.sqrt(n)
    return {"mean": mean, "sd": sd, "ci": [mean - reach, mean + reach], "n": n}


def paired_summary(differences: Sequence[float], family: int) -> dict:
    r"""A paired difference over n seeds: `seed_summary`, `ci_corrected` and the smallest `detectable` effect.

    ci_corrected: the interval at level 1 - 0.05 / family (Bonferroni over the family of claims). detectable: the
    difference that a two-sided test at that level would find in 80 % of repetitions, with the standard deviation seen:
    (t(1 - 0.025 / family) + t(0.8)) sd / sqrt(n).
    """
    found = seed_summary(differences)
    if found["sd"] is None:
        return found | {"ci_corrected": None, "detectable": None}
    n, error = found["n"], found["sd"] / math.sqrt(found["n"])
    critical = t_quantile(1 - 0.025 / family, n - 1)
    mean = found["mean"]
    return found | {"ci_corrected": [mean - critical * error, mean + critical * error],
                    "detectable": (critical + t_quantile(POWER, n - 1)) * error}


def clip_interval(per_split: Sequence[tuple[Answers, Sequence[int]]], level: float = 0.95) -> list[float]:
    r"""Interval by clip of the equally weighted mean over splits of values per question, each with its clip's number.

    The splits share no clip, so their squared standard errors add; degrees of freedom: clips less splits.
    """
    means, variance, degrees = [], 0.0, 0
    for values, clips in per_split:
        known = [(value, clip) for value, clip in zip(values, clips, strict=True) if value is not None]
        numbers = [value for value, _ in known]
        groups = [str(clip) for _, clip in known]
        means.append(math.fsum(numbers) / len(numbers))
        variance += cluster_standard_error(numbers, groups) ** 2
        degrees += len(set(groups)) - 1
    mean, error = math.fsum(means) / len(means), math.sqrt(variance) / len(means)
    if math.isnan(error):
        return [-math.inf, math.inf]
    reach = t_quantile(0.5 + level / 2, degrees) * error
    return [mean - reach, mean + reach]


def mean_answers(runs: Sequence[Mapping], split: str) -> Answers:
    r"""Mean accuracy of each question over runs, in per cent; None where one of them could not read the clip."""
    columns = zip(*(unpack(run["answers"][split]) for run in runs), strict=True)
    return [None if None in column else 100 * math.fsum(column) / len(column) for column in columns]


def subtract(a: Answers, b: Answers) -> Answers:
    r"""Differences of two lists of answers, None where either is."""
    return [None if x is None or y is None else x - y for x, y in zip(a, b, strict=True)]


def verdict(difference: Mapping) -> str:
    r"""What a claim "row is better than rival" came to: reproduced, contradicted, inconclusive, or too few seeds.

    Reproduced: the corrected interval over seeds and the interval by clip both lie above 0; contradicted: both below.
    """
    if difference["ci_corrected"] is None:
        return TOO_FEW
    lows, highs = zip(difference["ci_corrected"], difference["ci_clips"])
    if min(lows) > 0:
        return "reproduced"
    return "contradicted" if max(highs) < 0 else "inconclusive"


def curve_verdict(difference: Mapping, sign: int) -> str:
    r"""The verdict on a claim about the end of a curve, which has no questions and so no interval by clip."""
    bounds = difference["ci_corrected"]
    signed = bounds and sorted(sign * bound for bound in bounds)
    return verdict({"ci_corrected": signed, "ci_clips": signed})


# --- aggregates ------------------------------------------------------------------------------------------------------


def write_aggregate(experiment: Experiment, runs: Sequence[Run], shelf: Path) -> str:
    r"""Writes `NAME/aggregate.json` and `NAME/table.md` from the recorded runs of an experiment's rows, all seeds that
    there are; returns the table."""
    recorded, prints, used = read_runs(shelf), {}, defaultdict(dict)
    own = [run for run in runs if run.experiment == experiment.name]
    for run in own[:len(experiment.rows)]:  # the first seed: one of each row
        key = (run.config.model, run.config.train_file, *run.config.eval_files)
        prints[key] = prints.get(key) or fingerprints(run.config)
        for seed, name in _all_seeds(run, prints[key], recorded).items():
            used[run.row][str(seed)] = name
    return save_aggregate(experiment, used, recorded, shelf)


def _all_seeds(run: Run, prints: Mapping, recorded: Mapping[str, dict]) -> dict[int, str]:
    r"""Files of this run's row with any seed."""
    found = {}
    for seed in sorted({old["seed"] for old in recorded.values()}):
        name = find_recorded(replace(run, seed=seed, config=replace(run.config, seed=seed)), prints, recorded)
        if name is not None:
            found[seed] = name
    return found


def save_aggregate(experiment: Experiment, used: Mapping[str, Mapping[str, str]], recorded: Mapping[str, dict],
                   shelf: Path) -> str:
    r"""Aggregates the named runs, writes the two files and returns the table."""
    folder = shelf / experiment.name
    make_folder(folder)
    if not used:
        return f"{experiment.name}: no finished runs"
    rows = {row: {int(seed): recorded[name] for seed, name in files.items()} for row, files in used.items()}
    base = read_base(shelf, next(iter(next(iter(rows.values())).values()))["base"])
    found = aggregate(experiment, rows, base) | {"runs": {row: dict(files) for row, files in used.items()}}
    write_atomically(folder / "aggregate.json", _lines(found))
    table = as_table(found)
    write_atomically(folder / "table.md", table)
    return table


def read_base(shelf: Path, key: str) -> dict:
    r"""The base model's evaluation that a run is compared with. Raises `ConfigError` if it is missing."""
    path = shelf / "base" / f"{key}.json"
    if not path.exists():
        raise ConfigError(f"{path} is missing: `reproduce` writes it, or restore it")
    return json.loads(path.read_text(encoding="utf-8"))


def aggregate(experiment: Experiment, rows: Mapping[str, Mapping[int, Mapping]], base: Mapping) -> dict:
    r"""Everything a table's figure needs.

    rows: row name to seed to recorded run. base: the evaluation of the base model.
    `rows` holds for the base and each row its splits (and "mean", their equally weighted mean) with `mean`, `ci` over
    seeds, `ci_clips`, `values` by seed; types, sampled accuracy, vanishing ratios, rollouts. `differences` holds each
    claim with both intervals, the corrected one, the smallest detectable effect and a verdict.
    """
    groups, published = base["questions"], published_rows(experiment)
    names = {row.name: row.published for row in experiment.rows}
    table = {"base": _row_figures({0: base}, groups) | {
        "method": "base", "published": published.get(experiment.base_name)}}
    for row, runs in rows.items():
        table[row] = _row_figures(runs, groups) | _training_figures(runs) | {"published": published.get(names.get(row))}
    family = max(1, len(experiment.claims))
    differences = [_difference(experiment, claim, rows, groups, table) for claim in experiment.claims
                   if all(row in rows and set(rows[claim[0]]) & set(rows[row]) for row in claim)]
    return {"table": experiment.name, "question": experiment.question, "equal": experiment.equal, "unit": "per cent",
            "interval": "ci: 95 %, Student's t over seeds; ci_clips: 95 %, questions clustered by clip",
            "correction": f"Bonferroni over {family} claims, on the mean of the splits", "rows": table,
            "differences": differences, "curves": {row: _curves(list(runs.values())) for row, runs in rows.items()}}


def _row_figures(runs: Mapping[int, Mapping], groups: Mapping) -> dict:
    many, splits = list(runs.values()), list(groups)
    figures = {"seeds": sorted(runs), "splits": {}, "by_type": {}, "sampled": {}}
    answers = {split: mean_answers(many, split) for split in splits}
    for split in splits:
        values = [100 * run["accuracy"][split]["accuracy"] for run in many]
        figures["splits"][split] = seed_summary(values) | {
            "ci_clips": clip_interval([(answers[split], groups[split]["clip"])]), "values": values,
            "questions": many[0]["accuracy"][split]["n"]}
        figures["by_type"][split] = {kind: seed_summary([100 * run["accuracy"][split]["by_type"][kind]["accuracy"]
                                                         for run in many])
                                     for kind in many[0]["accuracy"][split]["by_type"]}
        if many[0]["sampled"]:
            figures["sampled"][split] = seed_summary([100 * run["sampled"][split]["accuracy"] for run in many])
        if all("mean_iou" in run["accuracy"][split] for run in many):
            figures["splits"][split]["mean_iou"] = seed_summary([run["accuracy"][split]["mean_iou"] for run in many])
    over = [[100 * run["accuracy"][split]["accuracy"] for split in splits] for run in many]
    figures["mean"] = seed_summary([sum(v) / len(v) for v in over]) | {
        "ci_clips": clip_interval([(answers[split], groups[split]["clip"]) for split in splits])}
    return figures


def _training_figures(runs: Mapping[int, Mapping]) -> dict:
    many = list(runs.values())
    found = {name: seed_summary([run[name] for run in many]) for name in ("rollouts", "updates", "steps")}
    found["seconds"] = seed_summary([run["seconds"]["process"] for run in many])
    for name in ("vanishing", "vanishing_after", "reward_normalised", "kl"):
        ends = [_end(run["curve"].get(name, [])) for run in many]
        if None not in ends:
            found[f"{name}_in_the_end"] = seed_summary(ends)
    found["augmentation"] = {name: seed_summary([run["augmentation"][name] for run in many])["mean"]
                             for name in many[0]["augmentation"]}
    return found | {"method": many[0]["method"], "augment": many[0]["config"]["augment"]}


def _end(curve: Sequence[float | None]) -> float | None:
    r"""Mean over the last fifth of a curve."""
    last = [value for value in curve[-max(1, round(LAST * len(curve))):] if value is not None] if curve else []
    return math.fsum(last) / len(last) if last else None


def _difference(experiment: Experiment, claim: tuple[str, str], rows: Mapping, groups: Mapping, table: Mapping) -> dict:
    r"""One claim, over the seeds that both rows have: accuracy, and the ends of the curves in `training`."""
    (row, rival), family = claim, len(experiment.claims)
    seeds, splits = sorted(set(rows[row]) & set(rows[rival])), list(groups)
    mine, theirs = [rows[row][seed] for seed in seeds], [rows[rival][seed] for seed in seeds]
    gaps = {split: [100 * (a["accuracy"][split]["accuracy"] - b["accuracy"][split]["accuracy"])
                    for a, b in zip(mine, theirs)] for split in splits}
    questions = {split: (subtract(mean_answers(mine, split), mean_answers(theirs, split)), groups[split]["clip"])
                 for split in splits}
    found = {"row": row, "rival": rival, "seeds": seeds, "splits": {
        split: paired_summary(gaps[split], family) | {"ci_clips": clip_interval([questions[split]])}
        for split in splits}}
    mean = paired_summary([sum(values) / len(values) for values in zip(*gaps.values())], family)
    found["mean"] = mean | {"ci_clips": clip_interval(list(questions.values()))}
    known = [table[name]["published"] for name in claim]
    if all(known):
        found["published"] = {split: round(known[0][split] - known[1][split], 1) for split in known[0]}
    found["training"] = {name: paired_summary([_end(a["curve"][name]) - _end(b["curve"][name])
                                               for a, b in zip(mine, theirs)], family) for name in DRAWN_CURVES}
    if claim not in experiment.outcomes:
        return found | {"outcome": "accuracy", "verdict": verdict(found["mean"])}
    name, sign = experiment.outcomes[claim]
    return found | {"outcome": f"{'higher' if sign > 0 else 'lower'} {DRAWN_CURVES[name]}, in the end",
                    "outcome_key": name, "verdict": curve_verdict(found["training"][name], sign)}


def _curves(runs: Sequence[Mapping]) -> dict:
    r"""Mean over seeds with the interval over seeds, at the points that all runs have."""
    found = {}
    length = min(len(run["curve"]["step"]) for run in runs)
    for name in ("step", "rollouts"):
        found[name] = [sum(run["curve"][name][i] for run in runs) / len(runs) for i in range(length)]
    for name in DRAWN_CURVES:
        points = [seed_summary([run["curve"][name][i] for run in runs]) for i in range(length)]
        found[name] = {"mean": [p["mean"] for p in points], "ci": [p["ci"] for p in points]}
    return found


def published_rows(experiment: Experiment) -> dict[str | None, dict[str, float]]:
    r"""The paper's figures for an experiment, row to split to per cent; empty if it prints none."""
    if experiment.published is None:
        return {}
    table = read_published()[experiment.published]
    return {name: dict(zip(table["columns"], values)) for name, values in table.items() if name != "columns"}


def read_published() -> dict:
    r"""`data/paper_results.json`, every figure that the paper prints, with the citation."""
    return json.loads((data_folder() / "paper_results.json").read_text(encoding="utf-8"))


# --- the paper's claims ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    r"""A claim and what became of it. Figures in points (of accuracy, of the largest reward, of groups), above 0 in
    favour of the claim; None where there are none. `interval`: over seeds, corrected; `published`: mean of splits."""

    paper: str
    text: str
    verdict: str
    command: str = ""
    effect: float | None = None
    interval: Sequence[float] | None = None
    by_clip: Sequence[float] | None = None
    detectable: float | None = None
    seeds: int = 0
    published: float | None = None


def scoreboard(shelf: Path) -> list[Claim]:
    r"""Every claim of the paper's tables and figure 3, from the aggregates below `shelf` as far as there are any."""
    board = [Claim(paper, text, NOT_HERE) for paper, text in ELSEWHERE]
    for experiment in PAPER:
        path = shelf / experiment.name / "aggregate.json"
        board += claims_of(experiment, json.loads(path.read_text(encoding="utf-8")) if path.exists() else None)
    return board


def claims_of(experiment: Experiment, found: Mapping | None) -> list[Claim]:
    r"""The claims of an experiment with what its aggregate says of them; without one, they are not recorded."""
    known = {(d["row"], d["rival"]): d for d in (found or {"differences": ()})["differences"]}
    return [_claim(experiment, pair, known.get(pair)) for pair in experiment.claims]


def _claim(experiment: Experiment, pair: tuple[str, str], difference: Mapping | None) -> Claim:
    name, text = title(experiment.name), f"{pair[0]} over {pair[1]}"
    key, sign = experiment.outcomes.get(pair, (None, 1))
    if key:
        text += f": {'higher' if sign > 0 else 'lower'} {SHORT_CURVES[key]}"
    if difference is None:
        return Claim(name, text, NOT_RECORDED, f"python -m dvr1_lite reproduce {experiment.name}")
    cell, scale = (difference["training"][key], 100 * sign) if key else (difference["mean"], 1)
    bounds = lambda ends: ends and sorted(scale * end for end in ends)
    paper = difference.get("published")
    return Claim(name, text, difference["verdict"], f"python -m dvr1_lite report {experiment.name}",
                 scale * cell["mean"], bounds(cell["ci_corrected"]), bounds(cell.get("ci_clips")),
                 cell["detectable"] and abs(scale) * cell["detectable"], cell["n"],
                 sum(paper.values()) / len(paper) if paper and not key else None)


def sentence(claim: Claim) -> str:
    r"""What became of a claim, with the evidence, in one sentence."""
    if claim.effect is None:
        return f"{claim.text}: {claim.verdict}" + (f": {claim.command}" if claim.command else "")
    parts = [f"{claim.text}: {claim.verdict}, {claim.effect:+.1f} points"]
    if claim.interval:
        parts[0] += f" {_interval(claim.interval)} over {claim.seeds} seeds"
    if claim.by_clip:
        parts.append(f"{_interval(claim.by_clip)} by clip")
    if claim.detectable is not None:
        parts.append(f"a difference of {claim.detectable:.1f} could have been found")
    if claim.published is not None:
        parts.append(f"published {claim.published:+.1f}" + (
            f", which is {'not ' if _inside(claim) else ''}excluded" if claim.verdict == "inconclusive" else ""))
    return "; ".join(parts)


def _inside(claim: Claim) -> bool:
    return claim.interval[0] <= claim.published <= claim.interval[1]


def claims_table(board: Sequence[Claim]) -> str:
    r"""The scoreboard as Markdown."""
    lines = ["| paper | claim | verdict | difference | over seeds, corrected | by clip | detectable | seeds | "
             "published |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    number = lambda value, form: "-" if value is None else f"{value:{form}}"
    interval = lambda bounds: _interval(bounds) if bounds else "-"
    lines += [f"| {c.paper} | {c.text} | {c.verdict} | {number(c.effect, '+.1f')} | {interval(c.interval)} | "
              f"{interval(c.by_clip)} | {number(c.detectable, '.1f')} | {c.seeds or '-'} | "
              f"{number(c.published, '+.1f')} |" for c in board]
    head = "## What became of the paper's claims\n\nIn points, above 0 in favour of the claim; 95 %; see PROTOCOL.md."
    return "\n".join([head, "", *lines]) + "\n"


# --- as text ---------------------------------------------------------------------------------------------------------


def as_table(found: Mapping) -> str:
    r"""The aggregate as Markdown: rows with intervals over seeds, the published figures, then the claims."""
    splits = list(found["rows"]["base"]["splits"])
    lines = [f"## {found['table']}: {found['question']}", "",
             f"Equal {found['equal']}; per cent; [95 % interval over seeds; for the base by clip]; (published).", "",
             "| row | " + " | ".join(splits) + " | mean | seeds | rollouts |", "| --- |" + " --- |" * (len(splits) + 3)]
    for name, row in found["rows"].items():
        cells = [_cell(row["splits"][split], name == "base", (row["published"] or {}).get(split)) for split in splits]
        rollouts = f"{row['rollouts']['mean']:.0f}" if "rollouts" in row else "-"
        seeds = "-" if name == "base" else str(len(row["seeds"]))
        lines.append(f"| {name} | {' | '.join(cells)} | {_cell(row['mean'], name == 'base')} | {seeds} | {rollouts} |")
    if found["differences"]:
        lines += ["", f"Differences, mean of the splits, in points ({found['correction']}):", "",
                  "| claim | difference | corrected interval | by clip | detectable | seeds | verdict |",
                  "| --- | --- | --- | --- | --- | --- | --- |"]
        lines += [_claim_line(difference) for difference in found["differences"]]
    return "\n".join(lines) + "\n"


def _cell(figures: Mapping, by_clip: bool, published: float | None = None) -> str:
    interval = figures["ci_clips"] if by_clip else figures["ci"]
    text = f"{figures['mean']:.1f}" + (f" {_interval(interval)}" if interval else "")
    return text if published is None else f"{text} ({published:.1f})"


def _interval(bounds: Sequence[float]) -> str:
    return f"[{bounds[0]:.1f}, {bounds[1]:.1f}]"


def _claim_line(difference: Mapping) -> str:
    claim = f"{difference['row']} over {difference['rival']}"
    if "outcome_key" in difference:
        end = difference["training"][difference["outcome_key"]]
        cells = [f"{bound:+.3f}" for bound in end["ci_corrected"] or []]
        detectable = f"{end['detectable']:.3f}" if end["detectable"] is not None else "-"
        return (f"| {claim}: {difference['outcome']} | {end['mean']:+.3f} | [{', '.join(cells)}] | - | {detectable} | "
                f"{end['n']} | {difference['verdict']} |")
    mean = difference["mean"]
    corrected = _interval(mean["ci_corrected"]) if mean["ci_corrected"] else "-"
    detectable = f"{mean['detectable']:.1f}" if mean["detectable"] is not None else "-"
    return (f"| {claim} | {mean['mean']:+.1f} | {corrected} | "
            f"{_interval(mean['ci_clips'])} | {detectable} | {mean['n']} | {difference['verdict']} |")


def _lines(found: Mapping) -> str:
    r"""JSON with a line for each row and difference."""
    def value(entry):
        if isinstance(entry, float):
            return round(entry, 4) if math.isfinite(entry) else None
        if isinstance(entry, Mapping):
            return {key: value(one) for key, one in entry.items()}
        return [value(one) for one in entry] if isinstance(entry, (list, tuple)) else entry

    parts = []
    for name, entry in value(found).items():
        if isinstance(entry, dict):
            inner = ",\n".join(f" {json.dumps(key)}: {json.dumps(one)}" for key, one in entry.items())
            parts.append(f"{json.dumps(name)}: {{\n{inner}\n}}")
        elif isinstance(entry, list):
            inner = ",\n".join(" " + json.dumps(one) for one in entry)
            parts.append(f"{json.dumps(name)}: [\n{inner}\n]")
        else:
            parts.append(f"{json.dumps(name)}: {json.dumps(entry)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


# --- figures ---------------------------------------------------------------------------------------------------------


def report(names: Sequence[str], out: str | Path, tell=print) -> list[Path]:
    r"""Aggregates recorded runs anew and draws each experiment's figures; returns the figures that it wrote.

    names: experiments; none for all that have an aggregate below `out`, and the paper's claims (`claims.md` and
    `claims.png`). Nothing is trained: the runs are those that `reproduce` named. Raises `ConfigError` if an experiment
    has no recorded runs.
    """
    shelf, written, everything = Path(out), [], not names
    names = list(names) or [name for name in EXPERIMENTS if (shelf / name / "aggregate.json").exists()]
    if not names:
        raise ConfigError(f"{shelf} holds no results: run `python -m dvr1_lite reproduce NAME --out {shelf}` first")
    recorded = read_runs(shelf)
    for name in names:
        path = shelf / name / "aggregate.json"
        if name not in EXPERIMENTS or not path.exists():
            raise ConfigError(f"{path} is missing: run `python -m dvr1_lite reproduce {name} --out {shelf}` first")
        used = json.loads(path.read_text(encoding="utf-8"))["runs"]
        tell(save_aggregate(EXPERIMENTS[name], used, recorded, shelf))
        written += draw(json.loads(path.read_text(encoding="utf-8")), shelf / name)
    return written + (draw_claims(shelf) if everything else [])


def draw_claims(shelf: Path) -> list[Path]:
    r"""Writes the scoreboard as `claims.md` and `claims.png`; returns the figure."""
    from . import plotting

    board = scoreboard(shelf)
    write_atomically(shelf / "claims.md", claims_table(board))
    plotting.save(claims_figure(board), shelf / "claims.png")
    return [shelf / "claims.png"]


def draw(found: Mapping, folder: Path) -> list[Path]:
    r"""Writes the figures of one aggregate as PNG files; none for a grid of more rows than can be read."""
    from . import plotting

    if len(found["rows"]) > MOST_ROWS:
        return []
    figures = {"accuracy": accuracy_figure(found), "curves": curves_figure(found)}
    if found["differences"]:
        figures["differences"] = differences_figure(found)
    paths = [folder / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values()):
        plotting.save(figure, path)
    return paths


def look(row: Mapping) -> dict:
    r"""Colour and marker of a row: the method's colour, a square where prompts were augmented."""
    from .plotting import METHOD_COLOURS

    augmented = row.get("augment", "none") != "none"
    return {"color": METHOD_COLOURS[row["method"]], "marker": "s" if augmented else "o"}


def accuracy_figure(found: Mapping):
    r"""Accuracy of each row and split with its 95 % interval; hollow diamonds: the paper's figures, on other data."""
    import matplotlib.pyplot as plt

    from .plotting import STYLE

    rows, splits = found["rows"], list(found["rows"]["base"]["splits"])
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(splits), figsize=(3.2 * len(splits) + 1.6, 0.42 * len(rows) + 1.6),
                                      sharex=True, sharey=True, squeeze=False)
        for axes, split in zip(panels[0], splits):
            for place, (name, row) in enumerate(rows.items()):
                _point(axes, place, row["splits"][split], "ci_clips" if name == "base" else "ci", look(row))
                published = (row["published"] or {}).get(split)
                if published is not None:
                    axes.plot(published, place, marker="D", markersize=6, fillstyle="none",
                              color="#222222", linestyle="none", zorder=3)
            axes.axvline(rows["base"]["splits"][split]["mean"], color="#7F7F7F", linewidth=0.8, linestyle=":")
            axes.set(title=f"{split} (n = {rows['base']['splits'][split]['questions']})", xlabel="accuracy in %")
        _name_rows(panels[0, 0], [f"{name} ({len(row['seeds'])})" if name != "base" else name
                                  for name, row in rows.items()])
        figure.suptitle(f"{_heading(found)}\nFilled: measured here (number of seeds), 95 % intervals over seeds "
                        f"(base: by clip). Hollow: as published, for another model and other data.", fontsize=9)
    return figure


def differences_figure(found: Mapping):
    r"""Each claim's difference: thick, the corrected interval over seeds; thin, by clip; hollow: the paper's."""
    import matplotlib.pyplot as plt

    from .plotting import STYLE

    splits = ["mean", *found["rows"]["base"]["splits"]]
    claims = found["differences"]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(splits), figsize=(2.7 * len(splits) + 2.6, 0.45 * len(claims) + 1.6),
                                      sharex=True, sharey=True, squeeze=False)
        for axes, split in zip(panels[0], splits):
            for place, claim in enumerate(claims):
                cell = claim["mean"] if split == "mean" else claim["splits"][split]
                style = look(found["rows"][claim["row"]])
                _point(axes, place, cell, "ci_corrected", style)
                axes.plot(cell["ci_clips"], [place + 0.2] * 2, color=style["color"], linewidth=0.8)
                paper = claim.get("published", {})
                value = sum(paper.values()) / len(paper) if split == "mean" and paper else paper.get(split)
                if value is not None:
                    axes.plot(value, place, marker="D", markersize=6, fillstyle="none", color="#222222", zorder=3)
            axes.axvline(0, color="#222222", linewidth=0.8)
            axes.set(title="mean of the splits" if split == "mean" else split, xlabel="difference in points")
        _name_rows(panels[0, 0], [f"{claim['row']}\nover {claim['rival']}" for claim in claims])
        figure.suptitle(f"{_heading(found)}\nThick: 95 % over seeds, {found['correction']}. Thin: 95 % by clip. "
                        f"Hollow: as published, for another model and other data.", fontsize=9)
    return figure


def _heading(found: Mapping) -> str:
    r"""Such as "Table 4, at equal rollouts: ...?" """
    return f"{title(found['table'])}, at equal {found['equal']}. {found['question']}"


def title(name: str) -> str:
    r"""An experiment's name as a heading: "Table 4" for table4, "Hint update" for hint_update."""
    words = name.rstrip("0123456789").replace("_", " ").capitalize()
    return f"{words} {name[len(words):]}".strip()


def _point(axes, place: float, cell: Mapping, interval: str, style: Mapping) -> None:
    bounds = cell[interval]
    reach = None if not bounds else np.array([[cell["mean"] - bounds[0]], [bounds[1] - cell["mean"]]]).clip(min=0)
    axes.errorbar(cell["mean"], place, xerr=reach, markersize=6, capsize=3, linewidth=2, **style)


def _name_rows(axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)


def curves_figure(found: Mapping):
    r"""Vanishing ratio and reward while training (figure 3), mean over seeds with the 95 % interval over seeds."""
    import matplotlib.pyplot as plt

    from .plotting import STYLE

    along = "step" if found["equal"] == "updates" else "rollouts"
    dashes = _dashes(found["rows"])
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(DRAWN_CURVES), figsize=(4.2 * len(DRAWN_CURVES), 3.6))
        for axes, (key, label) in zip(panels, DRAWN_CURVES.items()):
            for name, curve in found["curves"].items():
                colour = look(found["rows"][name])["color"]
                axes.plot(curve[along], curve[key]["mean"], color=colour, linestyle=dashes[name], label=name)
                if curve[key]["ci"][0] is not None:
                    low, high = zip(*curve[key]["ci"])
                    axes.fill_between(curve[along], low, high, color=colour, alpha=0.15, linewidth=0)
            axes.set(title=label, xlabel=along, ylim=(0, 1))
        panels[0].set_ylabel("mean over seeds, band: 95 % interval")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center",
                      ncols=min(5, len(found["curves"])), fontsize=8)
    return figure


def _dashes(rows: Mapping[str, Mapping]) -> dict[str, Any]:
    r"""A dash of its own for each row of a method, solid for the first that is not augmented."""
    kinds = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3))]
    found, used = {}, defaultdict(int)
    for name, row in sorted(rows.items(), key=lambda item: item[1].get("augment", "none") != "none"):
        found[name] = kinds[used[row["method"]] % len(kinds)]
        used[row["method"]] += 1
    return found


def claims_figure(board: Sequence[Claim]):
    r"""Figure 5: every claim's difference with its corrected interval over seeds (thick) and by clip (thin), the
    verdict in words beside it; hollow: as published. Right of 0 speaks for the claim."""
    import matplotlib.pyplot as plt

    from .plotting import STYLE

    ends = [abs(end) for claim in board for end in (*(claim.interval or ()), claim.published or 0)]
    reach = min(40, 5 + max(ends, default=0))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(10.5, 0.27 * len(board) + 1.6))
        for place, claim in enumerate(board):
            _draw_claim(axes, place, claim)
        axes.axvline(0, color="#222222", linewidth=0.8)
        axes.set(xlim=(-reach, reach), xlabel="against the claim    <    difference in points    >    for the claim")
        _name_rows(axes, [f"{claim.paper}: {claim.text}" for claim in board])
        for place in [i for i, (a, b) in enumerate(zip(board, board[1:])) if a.paper != b.paper]:
            axes.axhline(place + 0.5, color="#BBBBBB", linewidth=0.6)
        axes.grid(axis="y", visible=False)
        figure.suptitle("Claims of the paper, and what became of them here. Thick: 95 % over seeds, corrected. Thin: "
                        "by clip. Hollow:\nas published, for other models and data. A bar that leaves the picture "
                        "goes on.", fontsize=9)
    return figure


def _draw_claim(axes, place: int, claim: Claim) -> None:
    colour, marker = VERDICT_LOOK[claim.verdict]
    told = claim.verdict
    if claim.effect is not None:
        _point(axes, place, {"mean": claim.effect, "ci": claim.interval}, "ci", {"color": colour, "marker": marker})
        if claim.by_clip:
            axes.plot(claim.by_clip, [place + 0.22] * 2, color=colour, linewidth=0.8)
        told += f" (n = {claim.seeds}, detects {claim.detectable:.1f})" if claim.detectable is not None else ""
    if claim.published is not None:
        axes.plot(claim.published, place, marker="D", markersize=5, fillstyle="none", color="#222222", zorder=3)
    axes.annotate(told, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, color=colour,
                  weight="bold" if claim.verdict in ("reproduced", "contradicted") else "normal",
                  annotation_clip=False)
