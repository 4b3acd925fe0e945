r"""Make and record the runs of an experiment: each is the ordinary `train` command in a process of its own.

A run ends as one JSON file in the results folder, written atomically, and is never repeated, whichever experiment made
it. Until then it lives in `.work/` there; a killed run resumes from its checkpoint. The base model is evaluated once
(`train` with steps: 0), and encoded clips are shared between the runs.
"""

import datetime
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import WITHDRAWN, TrainConfig, make_config, to_yaml
from ..errors import ConfigError, UserError, check_name
from ..evaluation import summarise
from ..files import data_folder, make_folder, read_lines, resolve, write_atomically
from .tables import (
    Experiment, Settings, dump, find_experiments, pack, read_runs, row_config, tuned_as, weight_of,
)

SAMPLED_LIMIT = 600  # questions of each file answered at temperature 1 besides all of them greedily
POINTS = 30  # of a recorded curve
PARENT = "DVR1_PARENT"  # environment variable with the process id of the one that started a worker
SWITCHES = ("eval_before", "eval_sampled_limit", "feature_folder")  # set by the runner for each process
NEUTRAL = ("out", "save_every", "keep_checkpoints", "figures", "tracker", "feature_cache_mb", "decode_timeout",
           *SWITCHES)  # config fields that change no number
BASE_FIELDS = ("model", "quantization", "dtype", "device", "after_video", "num_frames", "frame_size", "instruction",
               "max_new_tokens", "eval_files", "eval_limit", "eval_temperature", "eval_samples", "eval_batch",
               "data_root", "train_file", "merge_mb")  # that an evaluation of the base model depends on
BASE_NEWER = ("judge", "video_backend")  # as BASE_FIELDS, named only where they are not the default
CURVES = ("reward", "reward_normalised", "reward_after", "accuracy", "format_rate", "vanishing", "vanishing_all_right",
          "vanishing_all_wrong", "vanishing_after", "vanishing_after_all_right", "vanishing_after_all_wrong",
          "history_mean", "loss", "kl", "rho_std", "grad_norm", "completion_tokens", "unfinished")
COUNTS = ("hard", "easy", "hints_found", "hints_missing", "augmented")


# --- planning and finding --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    r"""A row of an experiment with a seed, and its config. The base model's evaluation is the row "base"."""

    experiment: str
    row: str
    seed: int
    config: TrainConfig
    sampled_limit: int


class Outcome(NamedTuple):
    r"""What `reproduce` returns: the results folder, the files of the recorded runs, and the runs that failed."""

    results: Path
    used: dict[str, dict[str, dict[int, str]]]  # experiment -> row -> seed -> file
    failed: list[str]


def plan(experiment: Experiment, seeds: int | None = None, settings: Settings | None = None, quick: bool = False,
         rows: Sequence[str] = (), model: str | None = None) -> list[Run]:
    r"""List the runs of an experiment, seed by seed, so that an interrupted table has complete pairs.

    rows: names of the rows, none for all. model: folder of another base model than the config's. Raises `ConfigError`
    for a row that does not exist, and if the rows do not have the same number of what the experiment holds equal.
    """
    for name in rows:
        check_name("row", name, [row.name for row in experiment.rows])
    count, extra = seeds or (1 if quick else experiment.seeds), {"model": model} if model else {}
    limit = 0 if quick or experiment.name.startswith("tune") else SAMPLED_LIMIT
    runs = [Run(experiment.name, row.name, seed, row_config(experiment, row, seed, settings or {}, quick, extra), limit)
            for seed in range(experiment.first_seed, experiment.first_seed + count) for row in experiment.rows
            if not rows or row.name in rows]
    first = runs[0].config
    for run in runs:
        config, budget = run.config, run.config.rollout_budget
        sampled = config.steps * config.prompts_per_step * config.group_size
        if experiment.equal == "rollouts":  # one budget, and enough steps to spend it without augmentation
            fair = budget is not None and budget == first.rollout_budget and sampled >= budget
        else:  # one number of steps, and no budget that ends a run before
            fair = config.steps == first.steps and (budget is None or budget >= sampled and config.augment == "none")
        if not fair:
            raise ConfigError(f"{experiment.name}, {run.row}: not at equal {experiment.equal} with {runs[0].row} "
                              f"(steps {config.steps}, rollout_budget {budget}): give all rows the same")
    return runs


def read_settings(results: Path) -> Settings:
    r"""Read the tuned config fields by method: `tuning.json` in the results folder, else the shipped one, else none."""
    for path in (Path(results) / "tuning.json", data_folder() / "results" / "tuning.json"):
        if path.exists():
            return {name: entry["chosen"] for name, entry in json.loads(path.read_text(encoding="utf-8")).items()}
    return {}


def choose_settings(recorded: Sequence[Mapping]) -> dict[str, dict]:
    r"""Choose the setting of each method, and of each method with a variant of the augmentation (`tuned_as`): the
    highest mean accuracy on the tuning split; of equals the smaller learning rate, then the larger KL weight or the
    smaller amounts. Returns name -> `chosen` and the whole `grid`; accuracies in [0, 1]."""
    found = defaultdict(lambda: defaultdict(list))
    for run in recorded:
        config, weight = run["config"], weight_of(run["method"])
        fields = ("learning_rate", weight) if config["augment"] == "none" else (
            "learning_rate", "hint_max", "noise_scale")
        found[tuned_as(config)][tuple((field, config[field]) for field in fields)].append(
            run["accuracy"]["tune"]["accuracy"])
    chosen = {}
    for name, grid in found.items():
        mean = {setting: sum(values) / len(values) for setting, values in grid.items()}

        def order(setting: tuple) -> tuple:  # the best first
            return -mean[setting], *(-value if field in ("beta", "dpo_beta") else value for field, value in setting)

        ranked = sorted(mean, key=order)
        chosen[name] = {"chosen": dict(ranked[0]), "grid": [
            dict(s) | {"accuracy": round(mean[s], 5), "seeds": len(grid[s])} for s in ranked]}
    return chosen


def fingerprints(config: TrainConfig) -> dict[str, str]:
    r"""Return 12 digits of the sha256 of the weights and of each records file; a hub id stands for itself.

    Line ends do not count, so that a checkout on Windows is the same data. Raises `ConfigError` for a missing file.
    """
    def digest(*paths: Path) -> str:
        sha = hashlib.sha256()
        for path in paths:
            try:
                data = path.read_bytes()
            except OSError as error:
                raise ConfigError(f"{path} cannot be read ({error.strerror}): check the path") from error
            sha.update(data if path.suffix == ".safetensors" else data.replace(b"\r\n", b"\n"))
        return sha.hexdigest()[:12]

    weights = sorted(resolve(config.model).glob("*.safetensors"))
    files = {"train": config.train_file, **config.eval_paths()}
    return {"model": digest(*weights) if weights else config.model} | {
        name: digest(resolve(path)) for name, path in files.items()}


def saved_config(config: TrainConfig) -> dict[str, Any]:
    r"""Return what a run's JSON keeps of a config: everything but folders and the runner's switches."""
    return {name: value for name, value in asdict(config).items() if name not in ("out", *SWITCHES)}


def same_config(saved: Mapping[str, Any], config: TrainConfig) -> bool:
    r"""Return whether a recorded config gives the same numbers, seed apart; newer fields count as their defaults."""
    now = asdict(config)
    old = asdict(TrainConfig()) | {name: value for name, value in saved.items() if WITHDRAWN.get(name, name) != value}
    return old.keys() == now.keys() and all(old[name] == now[name] for name in now if name not in (*NEUTRAL, "seed"))


def recorded_seeds(run: Run, prints: Mapping[str, str], recorded: Mapping[str, dict]) -> dict[int, str]:
    r"""Return seed -> file of the recorded runs of this run's row, made by whichever experiment."""
    found = {old["seed"]: name for name, old in reversed(recorded.items())
             if old["method"] == run.config.method and old["inputs"] == dict(prints)
             and old["sampled_limit"] == run.sampled_limit and same_config(old["config"], run.config)}
    return dict(sorted(found.items()))


def base_key(config: TrainConfig, prints: Mapping[str, str], sampled_limit: int) -> str:
    r"""Name an evaluation of the base model: the same for all configs that ask it the same questions the same way."""
    seen = WITHDRAWN | {name: getattr(config, name) for name in BASE_FIELDS}
    seen |= {name: getattr(config, name) for name in BASE_NEWER if getattr(config, name) != getattr(TrainConfig, name)}
    return _digest(seen, prints, sampled_limit)[:10]


def _digest(*content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# --- making runs -----------------------------------------------------------------------------------------------------


class Job:
    r"""A run to be made in a process of its own, or the evaluation of the base model that it is compared with.

    `result`: its JSON file in the results folder; `folder`: where it is made; `base`: key of the base's evaluation;
    `prints`: the fingerprints of its inputs; `command`: what the user called.
    """

    def __init__(self, run: Run, prints: Mapping[str, str], results: Path, command: str):
        self.run, self.prints, self.command = run, dict(prints), command
        self.base = base_key(run.config, prints, run.sampled_limit)
        name, self.label = f"base/{self.base}", f"base model ({self.base})"
        if run.row != "base":
            slug = re.sub(r"[^a-z0-9.]+", "-", run.row.lower()).strip("-")
            digest = _digest(saved_config(run.config), self.prints, run.sampled_limit)[:8]
            name = f"{run.experiment}/{slug}_seed{run.seed}_{digest}"
            self.label = f"{run.experiment}: {run.row}, seed {run.seed}"
        work = results.resolve() / ".work"
        self.result, self.folder, self.features = results / f"{name}.json", work / name, work / "features" / self.base

    def start(self) -> None:
        r"""Start the training process, or resume what an earlier one left."""
        is_base, out = self.run.row == "base", self.folder / "run"
        make_folder(self.folder)
        config = replace(self.run.config, out=str(out), figures=False, eval_before=is_base,
                         eval_sampled_limit=self.run.sampled_limit, feature_folder=str(self.features))
        options = ["--resume", str(out)]
        if not (out / "config.yaml").exists():
            write_atomically(self.folder / "config.yaml", to_yaml(replace(config, steps=0) if is_base else config))
            options = ["--config", str(self.folder / "config.yaml"), "--out", str(out)]
        with open(self.folder / "log.txt", "wb") as log:
            self.process = subprocess.Popen(worker_command(options), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            env=worker_environment(), start_new_session=True)  # no Ctrl-C but ours
        self.started = time.monotonic()

    def finish(self) -> str | None:
        r"""Record the run of a process that has ended and remove its folder; return the reason if it failed."""
        path, status = self.folder / "run" / "summary.json", self.process.returncode
        if status == 0 and path.exists() and json.loads(path.read_text(encoding="utf-8"))["complete"]:
            make_folder(self.result.parent)
            found = record(self, time.monotonic() - self.started)
            write_atomically(self.result, dump(found, lambda value: float(f"{value:.6g}")))
            shutil.rmtree(self.folder, ignore_errors=True)
            return None
        lines = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        reason = next((line for line in reversed(lines) if line.strip()), "no message")
        if status < 0:
            reason = f"killed by signal {-status} ({signal.Signals(-status).name}); the same command resumes it"
        return f"{reason} ({self.folder / 'log.txt'})"


def worker_command(options: Sequence[str]) -> list[str]:
    r"""Return the command of one training process."""
    return [sys.executable, "-m", "dvr1_lite", "train", *options]


def worker_environment() -> dict[str, str]:
    r"""Return this environment with one thread a process (two of two threads on two cores run 5x slower)."""
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return os.environ | single | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1",
                                  PARENT: str(os.getpid())}


def end_with_parent() -> None:
    r"""End this process as soon as the one that started it has ended, so that no two ever share a folder."""
    parent = int(os.environ[PARENT]) if os.name == "posix" else os.getppid()  # it may have ended during the imports

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def reproduce(name: str, out: str | Path, seeds: int | None = None, jobs: int = 1, quick: bool = False,
              rows: Sequence[str] = (), model: str | None = None) -> Outcome:
    r"""Make all runs of an experiment (or of `all`, `phase`, `projects`) that are not recorded yet.

    out: the results folder; quick runs go to `quick/` in it. seeds: how many, none for the experiment's own. jobs:
    processes at a time. rows: names of those to make, none for all. model: folder of another base model, whose runs
    belong in a results folder of their own. A run that fails stops no other. Raises `ConfigError` for an unknown name,
    `UserError` if the base model cannot be evaluated.
    """
    results, settings = Path(out) / "quick" if quick else Path(out), read_settings(Path(out))
    command = shlex.join(["python", "-m", "dvr1_lite", "reproduce", name, *(["--seeds", str(seeds)] if seeds else []),
                          *["--quick"] * quick, *(["--rows", *rows] if rows else []),
                          *(["--model", model] if model else [])])
    plans = [(one, plan(one, seeds, settings, quick, rows, model)) for one in find_experiments(name)]
    failed = make_runs([run for _, runs in plans for run in runs], results, jobs, command)
    recorded, used = read_runs(results), {}
    for one, runs in plans:
        prints = fingerprints(runs[0].config)
        found = {run.row: recorded_seeds(run, prints, recorded)  # of any seed, and rows that earlier calls made
                 for run in plan(one, 1, settings, quick, model=model)}
        used[one.name] = {row: files for row, files in found.items() if files}
    tuning = [recorded[file] for one, _ in plans if one.name.startswith("tune")
              for files in used.get(one.name, {}).values() for file in files.values()]
    if tuning:
        path = results / "tuning.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        write_atomically(path, json.dumps(known | choose_settings(tuning), indent=1) + "\n")
    return Outcome(results, used, failed)


def make_runs(runs: Sequence[Run], results: Path, jobs: int, command: str) -> list[str]:
    r"""Make those runs that no file in the results folder holds; return the labels of those that failed."""
    make_folder(results / ".work")
    write_atomically(results / ".work" / ".gitignore", "*\n")
    prints, recorded, todo, bases = {}, read_runs(results), {}, {}
    for run in runs:
        key = (run.config.model, run.config.train_file, *run.config.eval_files)
        prints[key] = prints.get(key) or fingerprints(run.config)
        base, job = (Job(one, prints[key], results, command) for one in (replace(
            run, row="base", seed=0, config=replace(run.config, seed=0)), run))
        if run.seed not in recorded_seeds(run, prints[key], recorded):
            todo.setdefault(job.result, job)
        if not base.result.exists():
            bases[base.result] = base
    print(f"{len(todo)} runs to make, {len(runs) - len(todo)} recorded or shared")
    failed = run_jobs(list(bases.values()), jobs)
    if failed:
        raise UserError(f"the base model cannot be evaluated: {'; '.join(failed.values())}")
    failed = run_jobs(list(todo.values()), jobs)
    for label, reason in failed.items():
        print(f"failed: {label}: {reason}")
    return list(failed)


def run_jobs(todo: Sequence[Job], jobs: int) -> dict[str, str]:
    r"""Run jobs, `jobs` at a time; return label and reason of those that failed.

    Ctrl-C lets every process finish its step and save; the next call resumes there.
    """
    waiting, active, failed, began = list(todo), [], {}, time.monotonic()
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                waiting[0].start()
                active.append(waiting.pop(0))
            time.sleep(0.1)
            for job in [job for job in active if job.process.poll() is not None]:
                active.remove(job)
                if reason := job.finish():
                    failed[job.label] = reason
                done = len(todo) - len(waiting) - len(active)
                left = (time.monotonic() - began) / done * (len(todo) - done) / 60
                print(f"[{done}/{len(todo)}] {job.label}: {'failed' if reason else accuracies(job.result)} in "
                      f"{time.monotonic() - job.started:.0f} s; about {left:.0f} min left", flush=True)
    except KeyboardInterrupt:
        for job in active:
            if os.name == "posix":  # elsewhere the console has interrupted it already
                job.process.send_signal(signal.SIGINT)
        for job in active:
            job.process.wait()
        raise
    finally:
        for job in active:
            job.process.terminate()
    return failed


def accuracies(path: Path) -> str:
    r"""Return the accuracies of a recorded run in per cent, on one line."""
    run = json.loads(path.read_text(encoding="utf-8"))
    return ", ".join(f"{name} {100 * cell['accuracy']:.1f} %" for name, cell in run["accuracy"].items())


def rerun(path: str | Path, folder: str | Path) -> bool:
    r"""Make a recorded run again from its JSON alone, in `folder`; return whether every answer is the same."""
    path, folder = Path(path), Path(folder)
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        run = Run(old["table"], old["row"], old["seed"], make_config(old["config"]), old["sampled_limit"])
        if run.row == "base":
            raise ValueError("an evaluation of the base model")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not the JSON of a recorded run ({error}): give one below data/results") from error
    command = f"python -m dvr1_lite reproduce --rerun {path.name}"
    target = Job(run, fingerprints(run.config), folder, command).result
    target.unlink(missing_ok=True)
    if make_runs([run], folder, 1, command):
        return False
    same = json.loads(target.read_text(encoding="utf-8"))["answers"] == old["answers"]
    print(f"recorded: {accuracies(path)}\nnow:      {accuracies(target)}\n" + (
        "every answer is the same" if same else "answers differ: another machine, version, model or data?"))
    return same


# --- recording -------------------------------------------------------------------------------------------------------


def record(job: Job, seconds: float) -> dict:
    r"""Collect what a finished run's folder holds into the content of its JSON file. seconds: of its last process."""
    run, out, is_base = job.run, job.folder / "run", job.run.row == "base"
    when = "before" if is_base else "after"
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    answers, sampled = ({name: list(read_lines(out / f"evaluation/{when}_{kind}{name}.jsonl"))
                         for name in run.config.eval_paths()} for kind in ("", "sampled_"))
    found = {
        "table": run.experiment, "row": run.row, "method": "base" if is_base else run.config.method,
        "seed": run.seed, "config": saved_config(run.config), "inputs": job.prints, "base": job.base,
        "accuracy": {name: summarise(rows) for name, rows in answers.items()},
        "answers": {name: pack(rows) for name, rows in answers.items()},
        "sampled": {name: summarise(rows) for name, rows in sampled.items() if rows},
        "sampled_limit": run.sampled_limit, "seconds": summary["seconds"] | {"process": seconds},
        "peak_memory_gb": summary["peak_memory_gb"], "versions": summary["versions"], "commit": commit(),
        "command": job.command, "machine": machine(run.config.device),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat()}
    if is_base:
        return found | {"questions": {name: question_groups(rows) for name, rows in answers.items()}}
    metrics = list(read_lines(out / "metrics.jsonl"))
    return found | {"steps": summary["step"]} | {
        name: summary[name] for name in ("rollouts", "updates", "skipped_clips")} | {
        "augmentation": {name: sum(line[name] for line in metrics) for name in COUNTS}, "curve": thin(metrics)}


def question_groups(rows: Sequence[Mapping]) -> dict[str, list]:
    r"""Return, in the order of the records file, the number of each question's clip and the name of its type."""
    first = {row["index"]: row for row in rows}
    ordered, numbers = [first[index] for index in sorted(first)], {}
    return {"clip": [numbers.setdefault(row["clip"], len(numbers)) for row in ordered],
            "type": [row["question_type"] for row in ordered]}


def thin(metrics: Sequence[Mapping], points: int = POINTS) -> dict[str, list]:
    r"""Average curves over at most `points` stretches of equally many steps; `step` and `rollouts` at their ends."""
    size = max(1, -(-len(metrics) // points))
    parts = [metrics[start:start + size] for start in range(0, len(metrics), size)]
    curve = {name: [part[-1][name] for part in parts] for name in ("step", "rollouts")}
    for name in (name for name in CURVES if any(name in line for line in metrics)):
        known = [[line[name] for line in part if line.get(name) is not None] for part in parts]
        curve[name] = [round(sum(values) / len(values), 5) if values else None for values in known]
    return curve


def machine(device: str) -> str:
    r"""Name the kind of machine: "2-core x86-64 CPU", after the GPU's model if one is used."""
    cpu = f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU"
    return cpu if torch.device(device).type == "cpu" else f"{torch.cuda.get_device_name(device)}, {cpu}"


def commit() -> str:
    r"""Name the commit of this code, with "+changes" if the package differs from it; "unknown" outside a repository."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).resolve().parents[1]), *words], capture_output=True,
                              text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
