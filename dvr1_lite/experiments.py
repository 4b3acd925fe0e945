r"""The paper's tables and figure 3 as experiments with seeds: what is compared, and how its runs are made and recorded.

An `Experiment` is a list of rows, each a few changes to one common config; a run is a row with a seed. Every run is a
process of its own with one thread, and ends as one JSON file, written whole or not at all. A run whose JSON exists is
never repeated, by whichever experiment it was made; a run that was killed goes on from its checkpoint. The base model
is evaluated, and the clips are encoded, once for all runs. What the files amount to is `report.py`'s business; what
would count as reproduced stands in `data/results/PROTOCOL.md`.
"""

import contextlib
import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .config import TrainConfig, make_config
from .errors import ConfigError, UserError
from .evaluation import evaluate, see, summarise
from .files import make_folder, read_lines, write_atomically, writing
from .paths import data_folder, resolve

STEPS, PROMPTS, GROUP = 150, 8, 8
ROLLOUTS = STEPS * PROMPTS * GROUP  # 9,600 completions a run, traces and second samplings counted
TUNE_ROLLOUTS = ROLLOUTS // 2
TUNE_SEED = 1000  # the first seed of tuning; no reported run has it
SAMPLED_LIMIT = 600  # questions a split that are answered at temperature 1 besides all of them greedily
POINTS = 30  # of a recorded curve
FAIR_ABSOLUTE = 0.7  # the base model's mean reward: at 0.5, what a wrong answer in the right form earns, none is hard
PARENT = "DVR1_PARENT"  # environment variable with the number of the process that started a worker
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
KL_WEIGHTS = (0.001, 0.01, 0.1, 1.0)  # the gradients that they stand against differ 400-fold between methods
TUNED_METHODS = ("grpo", "reg-grpo", "reinforce", "rloo", "rebel", "reward-regression", "dpo", "online-dpo",
                 "centred-regression")
COMMON = {"steps": STEPS, "rollout_budget": ROLLOUTS, "prompts_per_step": PROMPTS, "group_size": GROUP,
          "learning_rate": 1e-3,  # of a method that is not tuned; `tuning.json` decides for the others
          "augment": "none", "figures": False, "save_every": 50, "keep_checkpoints": 1}
QUICK = {"steps": 6, "rollout_budget": 6 * PROMPTS * GROUP, "eval_limit": 60}
NEUTRAL = ("out", "save_every", "keep_checkpoints", "figures", "tracker", "feature_cache_mb",
           "decode_timeout")  # change no number
SEEING = ("model", "quantization", "dtype", "device", "attention", "after_video", "num_frames", "frame_size",
          "instruction", "max_new_tokens", "eval_files", "eval_limit", "eval_temperature", "eval_samples", "eval_batch",
          "data_root", "train_file", "merge_mb")  # the fields that an evaluation of the base model depends on
CURVES = ("reward", "reward_normalised", "reward_after", "accuracy", "format_rate", "vanishing", "vanishing_all_right",
          "vanishing_all_wrong", "vanishing_after", "vanishing_after_all_right", "vanishing_after_all_wrong",
          "history_mean", "loss", "kl", "rho_std", "grad_norm", "completion_tokens", "unfinished")
COUNTS = ("hard", "easy", "hints_found", "hints_missing", "augmented")
Settings = Mapping[str, Mapping[str, float]]  # method to its tuned config fields


# --- what is compared ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    r"""A row of a table: what it changes in the common config (a value, or a function of the tuned settings), and
    under which name the paper prints it, if it does."""

    name: str
    changes: Mapping[str, Any | Callable[[Settings], Any]]
    published: str | None = None


@dataclass(frozen=True)
class Experiment:
    r"""Rows under one protocol. `claims`: pairs (row, rival), each "row is better than rival", corrected for as one
    family. `equal`: what all rows have the same number of, "rollouts" or "updates". `published`: table of
    `paper_results.json`; `base_name`: the base model's row there. `seeds`: how many are run unless told otherwise.
    `outcomes`: for claims that are not about accuracy, the curve whose end they are about, and 1 if more is better,
    -1 if less is."""

    name: str
    question: str
    rows: tuple[Row, ...]
    claims: tuple[tuple[str, str], ...]
    seeds: int = 5
    first_seed: int = 0
    equal: str = "rollouts"
    published: str | None = None
    base_name: str | None = None
    outcomes: Mapping[tuple[str, str], tuple[str, int]] = field(default_factory=dict)
    common: Mapping[str, Any] = field(default_factory=dict)


def _row(name: str, published: str | None = None, **changes) -> Row:
    return Row(name, changes, published)


def _against(row: str, *rivals: str) -> tuple[tuple[str, str], ...]:
    return tuple((row, rival) for rival in rivals)


GRPO, REG = _row("GRPO", "GRPO", method="grpo"), _row("Reg-GRPO", "Reg-GRPO", method="reg-grpo")
GRPO_DA = _row("GRPO + DA", "GRPO + DA-Aug", method="grpo", augment="both")
REG_DA = _row("Reg-GRPO + DA", "Reg-GRPO + DA-Aug", method="reg-grpo", augment="both")
TABLE4 = (GRPO, GRPO_DA, REG, REG_DA)
TABLE4_CLAIMS = (("Reg-GRPO", "GRPO"), ("GRPO + DA", "GRPO"), ("Reg-GRPO + DA", "Reg-GRPO"), ("Reg-GRPO + DA", "GRPO"))
RIVALS = (_row("DPO", "DPO", method="dpo"), _row("Online DPO", "Online DPO", method="online-dpo"),
          _row("REINFORCE", "REINFORCE", method="reinforce"), _row("RLOO", "RLOO", method="rloo"),
          _row("REBEL", "REBEL", method="rebel"),
          _row("Reward-Regression", "Reward-Regression", method="reward-regression"), GRPO)


def _reg_da(name: str, published: str | None, **changes) -> Row:
    return Row(name, {"method": "reg-grpo", "augment": "both"} | changes, published)


def _unlimited(row: Row) -> Row:
    r"""The row at equal updates: augmentation does not pay for its rollouts. Others stop at both limits anyway."""
    pays = row.changes.get("augment", "none") != "none"
    return Row(row.name, dict(row.changes) | ({"rollout_budget": None} if pays else {}), row.published)


PAPER = (
    Experiment("table4", "Do the regression and the augmentation each help, and together?", TABLE4, TABLE4_CLAIMS, 10,
               published="table_4_ablation", base_name="Qwen2.5-VL-3B"),
    Experiment("table5", "Is Reg-GRPO better than each other objective?", (*RIVALS, REG),
               _against("Reg-GRPO", *(row.name for row in RIVALS)), 10, published="table_5_rl_methods",
               base_name="Qwen2.5-VL-3B"),
    Experiment("table6", "Is difficulty better measured against recent rewards than against a fixed one?",
               (_reg_da("absolute", "Absolute", difficulty_reference="absolute", absolute_reward=FAIR_ABSOLUTE),
                _reg_da("relative", "Relative")),
               _against("relative", "absolute"), published="table_6_difficulty_reference"),
    Experiment("table7", "Does each direction of the augmentation help, and both more than one?",
               (_reg_da("none", "none", augment="none"),
                _reg_da("increasing only", "increasing only", augment="easy"),
                _reg_da("decreasing only", "decreasing only", augment="hard"),
                _reg_da("increasing + decreasing", "increasing + decreasing")),
               (*_against("increasing + decreasing", "none", "increasing only", "decreasing only"),
                ("increasing only", "none"), ("decreasing only", "none")), published="table_7_augmentation_types"),
    Experiment("table8", "Does the amount have to grow with the difficulty?",
               (_reg_da("none", "No Aug.", augment="none"), _reg_da("fixed", "Fixed", augment_scale="fixed"),
                _reg_da("adaptive", "Adaptive")),
               (("adaptive", "fixed"), ("adaptive", "none"), ("fixed", "none")),
               published="table_8_augmentation_scale"),
    Experiment("figure3", "Does the augmentation lower the share of vanishing groups, and is the reward higher?",
               tuple(_unlimited(row) for row in (GRPO, GRPO_DA, REG_DA)),
               (("GRPO + DA", "GRPO"), ("Reg-GRPO + DA", "GRPO")), equal="updates",
               outcomes={("GRPO + DA", "GRPO"): ("vanishing_after", -1),
                         ("Reg-GRPO + DA", "GRPO"): ("reward_normalised", 1)}),
)


def _scale_of_reg_grpo(settings: Settings) -> float:
    r"""Reg-GRPO's first gradient is 2/eps times the policy gradient: its KL weight in GRPO's units."""
    chosen = settings.get("reg-grpo", {})
    return chosen.get("beta", TrainConfig.beta) * TrainConfig.predicted_eps / 2


def _several(name: str, question: str, key: str, values: Iterable[Any], default: Any, methods=("reg-grpo",),
             label: str | None = None, **fixed) -> Experiment:
    r"""One field at several values, each against its default, for one or two methods."""
    shown = {"grpo": "GRPO", "reg-grpo": "Reg-GRPO"}
    rows, claims = [], []
    for method in methods:
        named = {value: f"{shown[method]}, {label or key.replace('_', ' ')} {value}" for value in values}
        rows += [Row(named[value], {"method": method, key: value} | fixed) for value in named]
        claims += [(named[default], named[value]) for value in named if value != default]
    return Experiment(name, question, tuple(rows), tuple(claims))


BEYOND = (
    Experiment("updates", "What does the augmentation bring at equal updates, where its rollouts are free?",
               tuple(_unlimited(row) for row in TABLE4), TABLE4_CLAIMS, equal="updates"),
    Experiment("control", "Does the augmentation beat sampling the same groups again, unchanged?",
               (GRPO_DA, _row("GRPO + resampling", method="grpo", augment="resample"), REG_DA,
                _row("Reg-GRPO + resampling", method="reg-grpo", augment="resample")),
               (("GRPO + DA", "GRPO + resampling"), ("Reg-GRPO + DA", "Reg-GRPO + resampling"))),
    Experiment("centred", "Does the regression profit from a trust region?",
               (REG, _row("Centred regression", method="centred-regression"), GRPO),
               (("Centred regression", "Reg-GRPO"), ("Centred regression", "GRPO"))),
    Experiment("scale", "Is Reg-GRPO more than GRPO with another KL weight and another sum over tokens?",
               (REG, _row("GRPO, sum", method="grpo", logp_reduction="sum"),
                _row("GRPO, matched KL", method="grpo", beta=_scale_of_reg_grpo),
                _row("GRPO, sum, matched KL", method="grpo", logp_reduction="sum", beta=_scale_of_reg_grpo)),
               _against("Reg-GRPO", "GRPO, sum", "GRPO, matched KL", "GRPO, sum, matched KL")),
    _several("eps", "How much does the epsilon of Eq. 7 matter?", "predicted_eps", (0.01, 0.1, 1.0), 0.1, label="eps"),
    _several("inner", "Does Reg-GRPO become its own method with more inner updates?", "inner_updates", (1, 2, 4, 8), 4,
             ("reg-grpo", "grpo")),
    _several("kl", "Does Reg-GRPO need a larger KL weight than GRPO?", "beta", (0.0, 0.002, 0.02, 0.1, 1.0), 0.1,
             ("reg-grpo", "grpo")),
    _several("clip", "What does clipping bring to GRPO?", "clip_eps", (0.2, None), 0.2, ("grpo",)),
    _several("window", "How long should the reward history be?", "history_window", (25, 100, 400), 100, label="W",
             augment="both"),
    Experiment("group", "How large should a group be, at the same number of rollouts?",
               tuple(_row(f"{shown}, G {size}", method=method, group_size=size, prompts_per_step=64 // size)
                     for method, shown in (("reg-grpo", "Reg-GRPO"), ("grpo", "GRPO")) for size in (4, 8, 16)),
               tuple((f"{shown}, G 8", f"{shown}, G {size}") for shown in ("Reg-GRPO", "GRPO") for size in (4, 16))),
    _several("easy", "Noise or masked frames for easy prompts?", "easy_kind", ("noise", "mask"), "noise",
             augment="easy"),
    Experiment("hint", "How much of a trace should a hint reveal?",
               (*(_reg_da(f"at most {share}", None, augment="hard", hint_max=share) for share in (0.3, 0.6, 1.0)),
                _reg_da("fixed, 0.32", None, augment="hard", augment_scale="fixed"),
                _reg_da("probed", None, augment="hard", hint_probe=True)),
               _against("at most 0.6", "at most 0.3", "at most 1.0", "fixed, 0.32", "probed")),
    Experiment("hint_update", "What should the update of a hinted group stand on?",
               (_reg_da("hinted prompt", None, augment="hard"),
                _reg_da("prompt without the hint", None, augment="hard", hint_update="unhinted"),
                _reg_da("successes mixed into the own group", None, augment="hard", hint_update="mixed")),
               _against("hinted prompt", "prompt without the hint", "successes mixed into the own group")),
    _several("std", "Does the convention of the standard deviation matter?", "advantage_std",
             ("population", "sample", "none"), "population", ("reg-grpo", "grpo")),
    _several("reduction", "Sum or mean of the log-probs over tokens?", "logp_reduction", ("sum", "mean"), "sum"),
    _several("masking", "Should groups without reward spread stay in the regression?", "mask_vanished", (True, False),
             True),
)


def _tuning_rows() -> tuple[Row, ...]:
    return tuple(Row(f"{method}, {weight_of(method)} {weight:g}, learning rate {rate:g}",
                     {"method": method, "learning_rate": rate, weight_of(method): weight})
                 for method in TUNED_METHODS for weight in KL_WEIGHTS for rate in LEARNING_RATES)


def weight_of(method: str) -> str:
    r"""The config field that is a method's KL strength."""
    return "dpo_beta" if method in ("dpo", "online-dpo") else "beta"


TUNE = Experiment("tune", "Which learning rate and KL weight does each method get?", _tuning_rows(), (), 1, TUNE_SEED,
                  common={"eval_files": ["tune=data/toyvideoqa/tune.jsonl"], "steps": STEPS // 2,
                          "rollout_budget": TUNE_ROLLOUTS})
EXPERIMENTS = {experiment.name: experiment for experiment in (*PAPER, *BEYOND, TUNE)}
GROUPS = {"all": tuple(e.name for e in PAPER), "ablations": tuple(e.name for e in BEYOND)}


def find_experiments(name: str) -> list[Experiment]:
    r"""The experiment of that name, or those of `all` or `ablations`. Raises `ConfigError` listing the names."""
    if name not in EXPERIMENTS and name not in GROUPS:
        raise ConfigError(f"no experiment is called {name!r}: use one of {', '.join([*EXPERIMENTS, *GROUPS])}")
    return [EXPERIMENTS[one] for one in GROUPS.get(name, (name,))]


# --- from an experiment to configs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    r"""A row of an experiment with a seed, and the config that follows."""

    experiment: str
    row: str
    seed: int
    config: TrainConfig
    sampled_limit: int


def row_config(experiment: Experiment, row: Row, seed: int, settings: Settings, quick: bool = False,
               extra: Mapping[str, Any] | None = None) -> TrainConfig:
    r"""The common config, changed by the tuned settings of the row's method, by the row, and by `--quick` and `extra`.

    A row without a budget keeps none; `quick` then limits its steps alone.
    """
    changes = {key: value(settings) if callable(value) else value for key, value in row.changes.items()}
    values = COMMON | dict(experiment.common) | dict(settings.get(changes["method"], {})) | changes
    if quick:
        values |= QUICK if values["rollout_budget"] else QUICK | {"rollout_budget": None}
    return make_config(values | dict(extra or {}) | {"seed": seed, "out": "runs/reproduce"})


def plan(experiment: Experiment, seeds: int | None = None, settings: Settings | None = None, quick: bool = False,
         extra: Mapping[str, Any] | None = None) -> list[Run]:
    r"""All runs of an experiment, seed by seed, so that an interrupted table has whole pairs.

    extra: config fields for every row (another model, other data). Raises `ConfigError` if the rows do not have equal
    budgets.
    """
    count = seeds or (1 if quick else experiment.seeds)
    runs = [Run(experiment.name, row.name, seed, row_config(experiment, row, seed, settings or {}, quick, extra),
                0 if quick or experiment.name == "tune" else SAMPLED_LIMIT)
            for seed in range(experiment.first_seed, experiment.first_seed + count) for row in experiment.rows]
    check_equal(experiment, runs)
    return runs


def check_equal(experiment: Experiment, runs: Sequence[Run]) -> None:
    r"""Raises `ConfigError` unless the configs make all rows equal in what the experiment holds equal.

    Rollouts: one budget, and enough steps to spend it without augmentation. Updates: one number of steps, and no budget
    that ends a run before.
    """
    for run in runs:
        config = run.config
        sampled = config.steps * config.prompts_per_step * config.group_size  # without augmentation
        budget = config.rollout_budget
        if experiment.equal == "rollouts":
            fair = budget == runs[0].config.rollout_budget and budget is not None and sampled >= budget
        else:
            fair = config.steps == runs[0].config.steps and (
                budget is None or (budget >= sampled and config.augment == "none"))
        if not fair:
            raise ConfigError(f"{experiment.name}, {run.row}: not at equal {experiment.equal} with {runs[0].row} "
                              f"(steps {config.steps}, rollout_budget {budget}): give all rows the same")


def read_settings(out: Path) -> Settings:
    r"""Tuned config fields by method: `tuning.json` in the results folder, else the one that is shipped, else none."""
    places = [out / "tuning.json"]
    with contextlib.suppress(ConfigError):
        places.append(data_folder() / "results" / "tuning.json")
    for path in places:
        if path.exists():
            return {name: entry["chosen"] for name, entry in json.loads(path.read_text(encoding="utf-8")).items()}
    return {}


def choose_settings(recorded: Sequence[Mapping]) -> dict[str, dict]:
    r"""For each method the setting with the highest mean accuracy on the tuning split; of equals the smaller learning
    rate, then the larger KL weight. Also the whole grid, as evidence. Shares in [0, 1]."""
    found: dict[str, dict[tuple, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in recorded:
        config, method = run["config"], run["method"]
        setting = (config["learning_rate"], config[weight_of(method)])
        found[method][setting].append(run["accuracy"]["tune"]["accuracy"])
    chosen = {}
    for method, grid in found.items():
        mean = {setting: sum(values) / len(values) for setting, values in grid.items()}
        best = min(mean, key=lambda s: (-mean[s], s[0], -s[1]))
        name = lambda s: {"learning_rate": s[0], weight_of(method): s[1]}
        chosen[method] = {"chosen": name(best), "grid": [
            name(s) | {"accuracy": round(mean[s], 5), "seeds": len(grid[s])} for s in sorted(mean)]}
    return chosen


# --- what has been recorded ------------------------------------------------------------------------------------------


def fingerprints(config: TrainConfig) -> dict[str, str]:
    r"""The first 12 digits of the sha256 of the weights and of each records file; an id on the hub stands for itself.

    Line ends do not count, so that a checkout on Windows is the same data.
    """
    files = {"train": config.train_file, **config.eval_paths()}
    prints = {name: _sha256([resolve(path)]) for name, path in files.items()}
    weights = sorted(resolve(config.model).glob("*.safetensors")) if resolve(config.model).is_dir() else []
    return {"model": _sha256(weights) if weights else config.model} | prints


def _sha256(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}): check the path") from error
        digest.update(data if path.suffix == ".safetensors" else data.replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:12]


def saved_config(config: TrainConfig) -> dict[str, Any]:
    r"""What a run's JSON keeps of a config: everything but the folder."""
    return {name: value for name, value in asdict(config).items() if name != "out"}


def same_config(saved: Mapping[str, Any], config: TrainConfig) -> bool:
    r"""Whether a recorded config gives the same numbers. A field newer than the record counts as its default."""
    try:
        old = make_config(saved)
    except ConfigError:
        return False
    return all(value == getattr(config, name) for name, value in asdict(old).items() if name not in NEUTRAL)


def base_key(config: TrainConfig, prints: Mapping[str, str], sampled_limit: int) -> str:
    r"""Names an evaluation of the base model: the same for all configs that show it the same questions the same way."""
    seen = {name: getattr(config, name) for name in SEEING}
    text = json.dumps([seen, prints, sampled_limit], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def read_runs(out: Path) -> dict[str, dict]:
    r"""All recorded runs below the results folder, by their path in it. Files of quick runs count only in their own."""
    found = {}
    for path in sorted(out.glob("*/*_seed*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        found[path.relative_to(out).as_posix()] = run
    return found


def find_recorded(run: Run, prints: Mapping[str, str], recorded: Mapping[str, dict]) -> str | None:
    r"""The file that already holds this run, made by whichever experiment."""
    for name, old in recorded.items():
        if (old["seed"] == run.seed and old["method"] == run.config.method and old["inputs"] == dict(prints)
                and old["sampled_limit"] == run.sampled_limit and same_config(old["config"], run.config)):
            return name
    return None


def file_name(run: Run, prints: Mapping[str, str]) -> str:
    r"""`EXPERIMENT/row_seedN_DIGEST.json`; the digest keeps apart runs of a row under two configs."""
    text = json.dumps([saved_config(run.config), prints, run.sampled_limit], sort_keys=True)
    slug = re.sub(r"[^a-z0-9.]+", "-", run.row.lower()).strip("-")
    return f"{run.experiment}/{slug}_seed{run.seed}_{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"


# --- making all runs -------------------------------------------------------------------------------------------------


@dataclass
class Job:
    r"""One worker process: what it makes, as the spec that it reads, where its result goes, and how it fared."""

    label: str
    spec: dict
    folder: Path
    result: Path
    process: subprocess.Popen | None = None
    started: float = 0.0

    def start(self) -> None:
        make_folder(self.folder)
        write_atomically(self.folder / "spec.json", json.dumps(self.spec, indent=1))
        with open(self.folder / "log.txt", "wb") as log:
            self.process = subprocess.Popen(worker_command(self.folder / "spec.json"), stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=log, env=worker_environment(),
                                            start_new_session=True)  # Ctrl-C comes to it through `interrupt`
        self.started = time.monotonic()

    def interrupt(self) -> None:
        r"""Asks the worker to finish its step and save, and waits for it."""
        if os.name == "posix":  # elsewhere the console has told it already
            self.process.send_signal(signal.SIGINT)
        self.process.wait()

    def last_words(self) -> str:
        r"""How the worker ended: the signal that killed it, or the last line of its log; and where the log stands."""
        lines = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no message")
        if (status := self.process.returncode) < 0:
            last = f"killed by signal {-status} ({signal.Signals(-status).name}): the same command goes on with it"
        return f"{last} ({self.folder / 'log.txt'})"


def worker_command(spec: Path) -> list[str]:
    r"""The command of one worker process."""
    return [sys.executable, "-m", "dvr1_lite.experiments", str(spec)]


def worker_environment() -> dict[str, str]:
    r"""This process's environment with one thread a worker (two workers of two threads on two cores run 5x slower)."""
    here = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(part for part in (here, os.environ.get("PYTHONPATH", "")) if part)
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return os.environ | single | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1",
                                  PARENT: str(os.getpid())}


def reproduce(name: str, out: str | Path, seeds: int | None = None, jobs: int = 1, quick: bool = False,
              extra: Mapping[str, Any] | None = None, tell: Callable[[str], None] = print) -> list[str]:
    r"""Makes all runs of an experiment (or of `all`, `ablations`) that are not recorded yet, then its aggregates.

    out: the results folder; quick runs go to `quick/` in it. seeds: how many, none for the experiment's own. jobs:
    processes at a time. extra: config fields for every run. tell: takes the lines of progress.
    Returns the labels of runs that failed; the others are not stopped by them. Raises `ConfigError` for an unknown
    name, `UserError` if the base model cannot be evaluated.
    """
    from . import report

    experiments = find_experiments(name)
    shelf = Path(out) / "quick" if quick else Path(out)
    command = f"python -m dvr1_lite reproduce {name}" + (f" --seeds {seeds}" if seeds else "") + " --quick" * quick
    settings = read_settings(Path(out))
    runs = [run for experiment in experiments for run in plan(experiment, seeds, settings, quick, extra)]
    failed = make_runs(runs, shelf, jobs, command, tell)
    for experiment in experiments:
        if experiment.name == "tune":
            write_tuning(shelf, runs)
        tell(report.write_aggregate(experiment, runs, shelf))
    names = " ".join(experiment.name for experiment in experiments)
    tell(f"recorded in {shelf}; to draw figures: python -m dvr1_lite report {names} --out {shelf}")
    return failed


def make_runs(runs: Sequence[Run], shelf: Path, jobs: int, command: str, tell: Callable[[str], None]) -> list[str]:
    r"""Makes those runs that no file in the results folder `shelf` holds; returns the labels of those that failed."""
    prints, recorded, todo, bases = {}, read_runs(shelf), {}, {}
    for run in runs:
        key = (run.config.model, run.config.train_file, *run.config.eval_files)
        prints[key] = prints.get(key) or fingerprints(run.config)
        base = base_job(run, prints[key], shelf, command)
        if find_recorded(run, prints[key], recorded) is None:
            job = run_job(run, prints[key], shelf, command, base)
            todo.setdefault(str(job.result), job)
            bases[base.label] = base
        elif not base.result.exists():
            bases[base.label] = base
    tell(f"{len(todo)} runs to make, {len(runs) - len(todo)} recorded or shared")
    prepared = work(base_jobs_to_do(bases.values(), bool(todo)), jobs, tell)
    if prepared:
        raise UserError(f"the base model cannot be evaluated: {'; '.join(prepared.values())}")
    failed = work(list(todo.values()), jobs, tell)
    for label, reason in failed.items():
        tell(f"failed: {label}: {reason}")
    return list(failed)


def base_jobs_to_do(bases: Iterable[Job], runs_follow: bool) -> list[Job]:
    r"""Evaluations of the base that are missing, or whose encoded clips are missing although runs need them."""
    return [job for job in bases
            if not job.result.exists() or (runs_follow and not (job.folder / "features.safetensors").exists())]


def base_job(run: Run, prints: Mapping[str, str], shelf: Path, command: str) -> Job:
    r"""The evaluation of the base model that a run is compared with."""
    key = base_key(run.config, prints, run.sampled_limit)
    config = saved_config(run.config) | {"seed": 0}
    spec = {"kind": "base", "table": run.experiment, "row": "base", "seed": 0, "config": config, "inputs": dict(prints),
            "sampled_limit": run.sampled_limit, "base": key, "command": command}
    return _job(f"base model ({key})", spec, shelf, f"base/{key}.json")


def run_job(run: Run, prints: Mapping[str, str], shelf: Path, command: str, base: Job) -> Job:
    r"""The training run, which takes the encoded clips from the base's folder."""
    spec = {"kind": "run", "table": run.experiment, "row": run.row, "seed": run.seed,
            "config": saved_config(run.config), "inputs": dict(prints), "sampled_limit": run.sampled_limit,
            "base": base.spec["base"], "command": command, "features": str(base.folder.resolve())}
    return _job(f"{run.experiment}: {run.row}, seed {run.seed}", spec, shelf, file_name(run, prints))


def _job(label: str, spec: dict, shelf: Path, name: str) -> Job:
    folder = work_folder(shelf) / name.removesuffix(".json")
    return Job(label, spec | {"result": str((shelf / name).resolve())}, folder, shelf / name)


def work_folder(shelf: Path) -> Path:
    r"""Where runs stand while they are made; git leaves it alone."""
    folder = shelf / ".work"
    make_folder(folder)
    with writing(folder):
        (folder / ".gitignore").write_text("*\n")
    return folder


def work(todo: Sequence[Job], jobs: int, tell: Callable[[str], None]) -> dict[str, str]:
    r"""Runs jobs, `jobs` at a time, to their ends; returns label and reason of those that failed.

    Ctrl-C lets every worker finish its step and save; the next call goes on there.
    """
    waiting, active, failed, began = list(todo), [], {}, time.monotonic()
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                active.append(waiting.pop(0))
                active[-1].start()
            time.sleep(0.1)
            for job in [job for job in active if job.process.poll() is not None]:
                active.remove(job)
                if job.process.returncode != 0 or not job.result.exists():
                    failed[job.label] = job.last_words()
                done = len(todo) - len(waiting) - len(active)
                tell(_progress(job, done, len(todo), time.monotonic() - began, job.label in failed))
    except KeyboardInterrupt:
        for job in active:
            job.interrupt()
        raise
    finally:
        for job in active:
            job.process.terminate()
    return failed


def _progress(job: Job, done: int, total: int, seconds: float, failed: bool) -> str:
    left = seconds / done * (total - done)
    left_text = f"; about {left / 60:.0f} min left" if left >= 60 else f"; about {left:.0f} s left" if left else ""
    figures = "failed" if failed else short_figures(json.loads(job.result.read_text(encoding="utf-8")))
    return f"[{done}/{total}] {job.label}: {figures} in {time.monotonic() - job.started:.0f} s{left_text}"


def short_figures(run: Mapping) -> str:
    r"""Accuracies in per cent, on one line."""
    return ", ".join(f"{name} {100 * cell['accuracy']:.1f} %" for name, cell in run["accuracy"].items())


def write_tuning(shelf: Path, runs: Sequence[Run]) -> None:
    r"""Writes `tuning.json` from the recorded runs of the tuning grid."""
    recorded, prints = read_runs(shelf), fingerprints(runs[0].config)
    names = [find_recorded(run, prints, recorded) for run in runs]
    chosen = choose_settings([recorded[name] for name in names if name is not None])
    if chosen:
        write_atomically(shelf / "tuning.json", json.dumps(chosen, indent=1) + "\n")


def rerun(path: str | Path, folder: str | Path, tell: Callable[[str], None] = print) -> bool:
    r"""Makes a recorded run again from its JSON alone, in `folder`; returns whether every answer is the same."""
    path = Path(path)
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        run = Run(old["table"], old["row"], old["seed"], make_config(old["config"]), old["sampled_limit"])
        if old["method"] == "base":
            raise ValueError("an evaluation of the base model")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not the JSON of a recorded run ({error}): give one below data/results") from error
    target = Path(folder) / file_name(run, fingerprints(run.config))
    target.unlink(missing_ok=True)
    if make_runs([run], Path(folder), 1, f"python -m dvr1_lite reproduce --rerun {path.name}", tell):
        return False
    new = json.loads(target.read_text(encoding="utf-8"))
    same = new["answers"] == old["answers"]
    tell(f"recorded: {short_figures(old)}\nnow:      {short_figures(new)}\n"
         + ("every answer is the same" if same else "answers differ: another machine, version, model or data?"))
    return same


# --- one run, in a process of its own --------------------------------------------------------------------------------


def perform(spec_path: Path) -> int:
    r"""Makes the run or base evaluation that a spec describes and writes its JSON; returns the exit status."""
    from .checkpoints import load_newest
    from .training import Trainer, quiet_libraries

    spec = json.loads(spec_path.read_text(encoding="utf-8"))
    folder, started = spec_path.parent, time.perf_counter()
    quiet_libraries()
    out = folder / "run"
    trainer = Trainer(make_config(spec["config"] | {"out": str(out)}), out, load_newest(out))
    try:
        trainer.begin()
        if spec["kind"] == "base" and Path(spec["result"]).exists():  # only the encoded clips are missing
            save_features(trainer, folder)
            return 0
        if spec["kind"] == "base":
            result = _base(trainer, spec, folder)
        else:
            load_features(trainer.policy, Path(spec["features"]))
            if trainer.run(progress=False):
                return 130
            result = _finished(trainer, spec)
    finally:
        trainer.close()
    result["seconds"]["process"] = round(time.perf_counter() - started, 1)
    target = Path(spec["result"])
    make_folder(target.parent)
    write_atomically(target, dump(result))
    shutil.rmtree(folder if spec["kind"] == "run" else out, ignore_errors=True)
    return 0


def _base(trainer, spec: dict, folder: Path) -> dict:
    r"""The base model's answers, what the questions are, and the encoded clips for the runs to come."""
    save_features(trainer, folder)
    trainer.evaluate("before", False)
    with trainer.policy.reference():
        sampled = _sampled(trainer, spec["sampled_limit"])
    return _record(trainer, spec, trainer.predictions["before"], sampled) | {
        "questions": {name: question_groups(rows) for name, rows in trainer.predictions["before"].items()}}


def _finished(trainer, spec: dict) -> dict:
    r"""A trained policy's answers, with the curves and counts of its training."""
    trainer.evaluate("after", False)
    sampled = _sampled(trainer, spec["sampled_limit"])
    metrics = list(read_lines(trainer.out / "metrics.jsonl"))
    return _record(trainer, spec, trainer.predictions["after"], sampled) | {
        "steps": trainer.step, "rollouts": trainer.rollouts, "updates": trainer.updates,
        "skipped_clips": trainer.skipped, "augmentation": {name: sum(m[name] for m in metrics) for name in COUNTS},
        "curve": thin(metrics)}


def _sampled(trainer, limit: int) -> dict[str, dict]:
    r"""Figures of answers at temperature 1 to `limit` questions of each split; none for 0."""
    from .training import limited

    if limit == 0:
        return {}
    config, started, found = trainer.config, time.perf_counter(), {}
    for name, records in trainer.evaluations.items():
        rows = evaluate(trainer.policy, limited(records, limit), view=trainer.view, batch=config.eval_batch,
                        max_new_tokens=config.max_new_tokens, temperature=1.0, seed=config.seed,
                        out=trainer.out / "evaluation" / f"sampled_{name}.jsonl")
        found[name] = summarise(rows)
    trainer.spent["evaluation_sampled"] += time.perf_counter() - started
    return found


def _record(trainer, spec: dict, predictions: Mapping[str, list[dict]], sampled: dict) -> dict:
    from .training import peak_memory_gb, versions

    method = trainer.config.method if spec["kind"] == "run" else "base"
    return {
        "table": spec["table"], "row": spec["row"], "method": method, "seed": spec["seed"], "config": spec["config"],
        "inputs": spec["inputs"], "base": spec["base"],
        "accuracy": {name: summarise(rows) for name, rows in predictions.items()},
        "answers": {name: pack(rows) for name, rows in predictions.items()},
        "sampled": sampled, "sampled_limit": spec["sampled_limit"],
        "seconds": {name: round(seconds, 1) for name, seconds in trainer.spent.items()},
        "peak_memory_gb": round(peak_memory_gb(), 2), "versions": versions(), "commit": commit(),
        "command": spec["command"], "machine": machine(trainer.config.device),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat()}


def pack(rows: Sequence[dict]) -> str | list[float | None]:
    r"""Accuracy of each question in the file's order: one digit each if all are 0 or 1, "x" for a clip that could not
    be read; else a list."""
    values: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        values[row["index"]] += [row["accuracy"]] if "error" not in row else []
    means = [sum(v) / len(v) if v else None for _, v in sorted(values.items())]
    if all(mean in (0.0, 1.0, None) for mean in means):
        return "".join("x" if mean is None else str(int(mean)) for mean in means)
    return [None if mean is None else round(mean, 4) for mean in means]


def unpack(answers: str | Sequence[float | None]) -> list[float | None]:
    r"""Accuracy of each question, None where the clip could not be read."""
    if isinstance(answers, str):
        return [None if mark == "x" else float(mark) for mark in answers]
    return list(answers)


def question_groups(rows: Sequence[dict]) -> dict[str, list]:
    r"""Of each question in the file's order: the number of its clip (counted as they come) and its type's name."""
    first = {row["index"]: row for row in rows}
    numbers: dict[str, int] = {}
    ordered = [first[index] for index in sorted(first)]
    return {"clip": [numbers.setdefault(row["clip"], len(numbers)) for row in ordered],
            "type": [row["question_type"] for row in ordered]}


def thin(metrics: Sequence[dict], points: int = POINTS) -> dict[str, list]:
    r"""Curves as means over at most `points` stretches of equally many steps; `step` and `rollouts` at their ends."""
    size = max(1, -(-len(metrics) // points))
    parts = [metrics[start:start + size] for start in range(0, len(metrics), size)]
    curve = {name: [part[-1][name] for part in parts] for name in ("step", "rollouts")}
    for name in CURVES:
        if any(name in line for line in metrics):
            curve[name] = [_mean_or_none([line.get(name) for line in part]) for part in parts]
    return curve


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 5) if known else None


def dump(result: Mapping) -> str:
    r"""A run's JSON: one line for each entry, so that files stay short and differences readable."""
    lines = [f"{json.dumps(name)}: {json.dumps(_rounded(value), allow_nan=False)}" for name, value in result.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _rounded(value: Any, digits: int = 6) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {name: _rounded(entry) for name, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def machine(device: str) -> str:
    r"""The kind of machine, no name of it: "2-core x86-64 CPU", with the GPU's model if one is used."""
    cpu = f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU"
    if device == "cpu":
        return cpu
    import torch

    return f"{torch.cuda.get_device_name(device)}, {cpu}"


def commit() -> str:
    r"""The commit of this code, with "+changes" if the module differs from it; "unknown" outside a repository."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True,
                              check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# --- clips encoded once for all runs ---------------------------------------------------------------------------------


def save_features(trainer, folder: Path) -> None:
    r"""Writes the encoded clips of the evaluations, and of the training records if the runs will see most of them.

    What does not fit the feature cache is left out: the runs encode it themselves. The encoder is frozen and never
    quantised, so that every run sees these very numbers.
    """
    from safetensors.torch import save_file

    config, policy = trainer.config, trainer.policy
    wanted = [record for records in trainer.evaluations.values() for record in records]
    if 2 * config.steps * config.prompts_per_step >= len({record.clip for record in trainer.records}):
        wanted += trainer.records
    tensors, index, seen = {}, [], set()
    for record in wanted:
        key = (record.clip, record.image, config.num_frames, (config.frame_size, config.frame_size))
        if key in seen or len(tensors) and policy.features.nbytes > policy.features.max_bytes // 2:
            continue
        seen.add(key)
        with contextlib.suppress(UserError):  # a broken clip is the run's business
            parts = see(policy, record, trainer.view).parts
            tensors |= {f"{len(index)}.{i}": part.embeds.cpu().contiguous() for i, part in enumerate(parts)}
            index.append([str(record.clip or ""), str(record.image or ""), [
                [part.kind, list(part.grid), part.seconds_per_grid] for part in parts]])
    part_file = folder / "features.part"
    with writing(part_file):
        save_file(tensors, part_file, {"index": json.dumps(index)})
        os.replace(part_file, folder / "features.safetensors")


def load_features(policy, folder: Path) -> None:
    r"""Puts the encoded clips of `save_features` into the policy's feature cache."""
    from safetensors import safe_open

    from .policy import Features, VisualPart

    path = folder / "features.safetensors"
    if not path.exists():
        return
    config = json.loads((folder / "spec.json").read_text(encoding="utf-8"))["config"]
    view = (config["num_frames"], (config["frame_size"], config["frame_size"]))
    with safe_open(path, "pt", device=str(policy.device)) as file:
        for number, (clip, image, parts) in enumerate(json.loads(file.metadata()["index"])):
            built = [VisualPart(kind, file.get_tensor(f"{number}.{i}"), tuple(grid), seconds)
                     for i, (kind, grid, seconds) in enumerate(parts)]
            key = (Path(clip) if clip else None, Path(image) if image else None, *view)
            policy.features.get(key, lambda: Features(tuple(built)))


def _end_with_parent() -> None:
    r"""Ends this process when the one that started it is gone, so that no two ever share a folder."""
    parent = os.getppid()
    if os.name == "posix":  # it may be gone already: imports take seconds
        parent = int(os.environ.get(PARENT, parent))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: Sequence[str]) -> int:
    r"""The worker's entry: one argument, the spec."""
    _end_with_parent()
    try:
        return perform(Path(arguments[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
