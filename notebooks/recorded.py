r"""Recorded experiments as text, for notebook 05: what is recorded with n, verdicts, the paper's signs, the tuning.

An experiment counts as recorded once it has an `aggregate.json` in the results folder. Nothing here trains a model,
except `make`.
"""

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from dvr1_lite.data import read_records
from dvr1_lite.evaluation import limited
from dvr1_lite.files import resolve
from dvr1_lite.lab import report
from dvr1_lite.lab.headline import cell_table, robust_grids, robust_table
from dvr1_lite.lab.runner import reproduce
from dvr1_lite.lab.stats import mean_answers, seed_summary
from dvr1_lite.lab.tables import BEYOND, EXPERIMENTS, PAPER, PHASE, TUNING, Experiment
from dvr1_lite.toy.world import CELLS

PROTOCOL = (*TUNING, *PHASE, *PAPER, *BEYOND)  # all that is declared, student projects left out


def show(lines: Iterable[str]) -> None:
    """Print lines, long ones wrapped."""
    for line in lines:
        print(textwrap.fill(line, 110, subsequent_indent="    "))


def command(name: str) -> str:
    """Return the command that makes the runs of an experiment."""
    return f"python -m dvr1_lite reproduce {name} --jobs 2"


def make(results: Path, names: Sequence[str] = ("tune", "tune_augmented", "phase", "all")) -> None:
    """Make all runs of the protocol's main experiments in a results folder of your own; takes hours."""
    for name in names:
        for one, used in reproduce(name, results, jobs=2).used.items():
            report.save_aggregate(EXPERIMENTS[one], used, results)


def load(results: Path) -> dict[str, dict]:
    """Return the aggregate of every recorded experiment, by name."""
    paths = {one.name: Path(results) / one.name / "aggregate.json" for one in EXPERIMENTS.values()}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def inventory(tables: Mapping[str, Mapping]) -> list[str]:
    """Return one line for each declared experiment: rows and seeds recorded, or that it is not tested, and how to."""
    lines = []
    for one in PROTOCOL:
        rows = tables[one.name]["rows"] if one.name in tables else {}
        seeds = [len(row["seeds"]) for name, row in rows.items() if name != "base"]
        n = "-".join(str(k) for k in sorted({min(seeds), max(seeds)})) if seeds else ""
        lines.append(f"{one.name:15s}{len(seeds):3d} of {len(one.rows):2d} rows, n = {n} of {one.seeds}" if seeds else
                     f"{one.name:15s}not tested: {command(one.name)}")
    return lines


def phase_claims(tables: Mapping[str, Mapping]) -> list[report.Claim]:
    """Return the claims "this variant is better than plain" of the recorded cells, about success at temperature 1."""
    claims = [claim for one in PHASE if one.name in tables for claim in report.claims_of(one, tables[one.name])]
    return [claim for claim in claims if claim.effect is not None]  # a cell may have some of its rows


def phase_lines(results: Path, tables: Mapping[str, Mapping]) -> list[str]:
    """Return the recorded cells of the phase diagram as text: predicted and measured success in per cent, the area under
    the curve of own groups' accuracy in per cent, n, and how many runs learned the cell, with the exact 95 % interval
    of that share; then the cells that are not tested."""
    waiting = [f"{one.name} not tested: {command(one.name)}" for one in PHASE if one.name not in tables]
    if len(waiting) == len(PHASE):
        return waiting
    lines = ["cell  variant        predicted  measured, 95 % over seeds  area   n  learned in"]
    for row in cell_table(results).to_dict("records"):
        bounds = "[{:.0f}, {:.0f}]".format(*(100 * end for end in row["ci"])) if row["ci"] else "-"
        low, high = binomtest(int(row["learned"].split()[0]), int(row["n"])).proportion_ci()
        lines.append(f"{row['cell']:6s}{row['variant']:14s}{100 * row['predicted']:9.0f} {100 * row['mean']:10.0f}  "
                     f"{bounds:13s} {100 * row['area']:4.0f}  {row['n']:2.0f}  {row['learned']} runs "
                     f"[{100 * low:.0f} %, {100 * high:.0f} %]")
    return lines + waiting


def verdict_lines(claims: Iterable[report.Claim]) -> list[str]:
    """Return each claim of `phase_claims` on one line: condition, difference in points with its corrected interval over
    seeds, n, the smallest detectable difference, verdict."""
    lines = []
    for claim in claims:
        condition = claim.condition.removeprefix("tiny model, chain types with deficit ").replace("plain success ", "")
        evidence = f"n = {claim.seeds}, illustrative" if not claim.interval else (
            "[{:.0f}, {:.0f}], n = {}".format(*claim.interval, claim.seeds)
            + (f", detectable {claim.detectable:.0f}" if claim.detectable else ""))
        lines.append(f"{claim.paper} ({condition}), {claim.text}: {round(claim.effect):+d} {evidence}: {claim.verdict}")
    return lines


def published_sign(experiment: Experiment, claim: tuple[str, str]) -> str:
    """Return the signs of a claim's published difference on L1, L2 and L3, such as "+++"; "" if none is printed."""
    gaps = report.published_difference(experiment, claim).values()
    return "".join("+" if gap > 0 else "-" if gap < 0 else "0" for gap in gaps)


def claim_lines(tables: Mapping[str, Mapping]) -> list[str]:
    """Return the verdicts on the claims of tables 4 to 8 and figure 3, each after the signs that the paper prints on
    L1, L2 and L3; one line for each claim, or for all claims of an experiment that is not recorded."""
    lines = []
    for one in PAPER:
        name, signs = report.title(one.name), [published_sign(one, pair) or "no numbers" for pair in one.claims]
        if one.name in tables:
            lines += [f"{name}, published {sign}: {report.sentence(claim)}"
                      for sign, claim in zip(signs, report.claims_of(one, tables[one.name]))]
        else:
            lines.append(f"{name}, claims: {len(signs)}, published {' '.join(dict.fromkeys(signs))}: not tested; "
                         f"run {command(one.name)}")
    return lines


def by_cell(name: str, tables: Mapping[str, Mapping], runs: Mapping[str, Mapping]) -> pd.DataFrame:
    """Return the greedy accuracy in per cent of every run (row, seed) of an experiment on the questions of L1 and L2,
    by cell of the chain questions (their first word decides the cell); "other" holds all other types."""
    verbs, parts = {verb: cell for cell, verb in CELLS.items()}, []
    first = runs[next(file for files in tables[name]["runs"].values() for file in files.values())]
    for split in ("L1", "L2"):
        records = limited(read_records(resolve(f"data/toyvideoqa/{split}.jsonl")), first["config"]["eval_limit"])
        cells = [verbs.get(one.question.split()[0], "other") if one.question_type in ("tally", "cell", "since")
                 else "other" for one in records]
        parts += [pd.DataFrame({"row": row, "seed": int(seed), "cell": cells, "x": mean_answers([runs[file]], split)})
                  for row, files in tables[name]["runs"].items() for seed, file in files.items()]
    found = pd.concat(parts).groupby(["row", "seed", "cell"], sort=False)["x"].mean()
    return found.unstack("cell").sort_index(axis=1)


def robust_lines(results: Path) -> list[str]:
    """Return one line for each method of `robust`: over its settings, the worst and median accuracy at temperature 1 and
    how many come within three points of its best; means over seeds, in brackets the paired difference from GRPO."""
    lines, table = [], robust_table(results)
    for method, found in table.groupby("method", sort=False):
        parts = []
        for line, scale, unit in zip(found.to_dict("records"), (100, 100, 9), (" %", " %", " of 9 near its best")):
            gap = "" if method == "GRPO" or not line["over GRPO ci"] else " ({:+.0f} [{:.0f}, {:.0f}])".format(
                *(scale * value for value in (line["over GRPO"], *line["over GRPO ci"])))
            name = "" if line["figure"].startswith("near") else f"{line['figure']} "
            parts.append(f"{name}{scale * line['mean']:.0f}{unit}{gap}")
        lines.append(f"{method} (n = {found['n'].iloc[0]}): {', '.join(parts)}")
    return lines


def base_models(results: Path) -> pd.DataFrame:
    """Return the headline rows as text, a column for each recorded base model. Cells of the phase diagram: runs that
    learned, then points over plain; tables: the difference; all with the verdict's interval (`robust`: 95 % over
    seeds, not corrected)."""
    columns = {}
    for folder in (Path(results), *sorted(Path(results).glob("base_seed*"))):
        column, tables = columns.setdefault(f"base {folder.name[9:] or 0}", {}), load(folder)
        known = [one for one in PHASE if one.name in tables]
        learned = cell_table(folder).set_index(["cell", "variant"])["learned"] if known else {}
        over_plain = {(claim.paper[-2:], claim.text.split(" over ")[0]): _with_interval(claim.effect, claim.interval)
                      for claim in phase_claims(tables)}
        for key in [(cell, name) for cell in ("A2", "A3", "F4") for name in ("plain", "hinted", "mixed")]:
            if key in learned:
                column[" ".join(key)] = ", ".join(filter(None, [learned[key], over_plain.get(key)]))
        for one in tables.get("table4", {"differences": ()})["differences"]:
            column[f"table 4: {one['row']} over {one['rival']}"] = (
                f"{_with_interval(one['mean']['mean'], one['mean']['ci_corrected'])}, n = {one['mean']['n']}")
        reg, grpo = (robust_grids(folder)[name] for name in ("Reg-GRPO, eps 0.1", "GRPO"))
        at = 16, 0.001  # the setting in which they differ on base 0
        gaps = [100 * (reg[seed][at] - grpo[seed][at]) for seed in reg if at in reg[seed] and at in grpo.get(seed, ())]
        if gaps:
            gap = seed_summary(gaps)
            column["robust, 16 updates at 0.001: Reg-GRPO over GRPO"] = (
                f"{_with_interval(gap['mean'], gap['ci'])}, n = {gap['n']}")
    return pd.DataFrame(columns).fillna("-")


def _with_interval(mean: float, ends: Sequence[float] | None) -> str:
    return f"{mean:+.1f}" + (" [{:.1f}, {:.1f}]".format(*ends) if ends else "")


def tuning_lines(results: Path) -> list[str]:
    """Return the tuned rows with the number of runs, the chosen setting, its accuracy beside the worst one's, and the
    fields whose choice lies on the edge of the grid; the experiments that are not recorded with their command."""
    path = Path(results) / "tuning.json"
    tuned = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    lines = [f"{one.name} not tested: {command(one.name)}" for one in TUNING
             if not (Path(results) / one.name / "aggregate.json").exists()]
    for name, entry in tuned.items():
        chosen, grid = entry["chosen"], entry["grid"]
        found = [100 * cell["accuracy"] for cell in grid]
        edges = [field for field, value in chosen.items()
                 if value in (min(cell[field] for cell in grid), max(cell[field] for cell in grid))]
        setting = ", ".join(f"{field} {value:g}" for field, value in chosen.items())
        lines.append(f"{name}: {len(grid)} runs, {setting}; {max(found):.1f} % on tune (worst {min(found):.1f}); "
                     f"on the edge: {', '.join(edges) or 'none'}")
    return lines


def spending(name: str, tables: Mapping[str, Mapping], runs: Mapping[str, Mapping]) -> list[str]:
    """Return, for each row of an experiment, the rollouts of its runs (smallest to largest) and its mean updates."""
    lines = []
    for row, files in tables[name]["runs"].items():
        rollouts = [runs[file]["rollouts"] for file in files.values()]
        updates = np.mean([runs[file]["updates"] for file in files.values()])
        lines.append(f"{name} {row:16s} n = {len(files)}: {min(rollouts)} to {max(rollouts)} rollouts, "
                     f"{updates:.0f} updates")
    return lines
