r"""A whole training in one folder: evaluate, train, evaluate again, and resume after any interruption.

The folder holds `config.yaml`, `records.json` (what the records are recognised by), `metrics.jsonl` (one line a step),
`checkpoints/`, `evaluation/` (the answers before and after), `adapter/` (peft's format), `summary.json` and, with a
reward of your own, `reward.json`. Killed at any moment, the run resumes from its newest checkpoint with the same
numbers as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .checkpoint import Checkpoint, checkpoint_folders, remove_unfinished, restore_newest, save_checkpoint
from .config import TrainConfig, load_config, to_yaml
from .data import Record
from .distributed import gather, on_main
from .errors import ClipError, ConfigError, ModelError, within_memory
from .evaluation import evaluate, limited, paired_change, summarise
from .files import append_lines, make_folder, read_lines, resolve, sync, write_atomically, writing
from .loading import LoraSettings
from .own_reward import OwnReward, check_same_reward, save_reward
from .policy import Policy
from .prefix_check import check_shared_prefix
from .training import Trainer

RUN_CONFIG = "dvr1_config.yaml"  # in a merged model: the config of the run that trained it

VERSIONS = ("dvr1-lite", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "numpy", "decord", "av")


def train(config: TrainConfig, records: Sequence[Record], evaluations: Mapping[str, Sequence[Record]] | None = None, *,
          trainer: type[Trainer] = Trainer, scoring: OwnReward | None = None, progress: bool = True,
          resume: bool = False) -> dict:
    r"""Train on records and return the run's summary, the content of `summary.json`.

    evaluations: records by name, answered before and after (`eval_limit` of each). trainer: the class that makes the
    steps, such as a variant of the augmentation. scoring: the reward that `config.reward` names, loaded by
    `own_reward.load_reward`, which runs its file. progress: show live bars. resume: continue what is in `config.out` if
    there is something (with the same records and the same config, apart from `out` and `max_broken_share`), else begin;
    without it a folder that holds a run is refused.
    `before` and `after` map each evaluation's name to accuracy, ci95, n and by_type; `change` holds their paired
    difference. Ctrl-C finishes the step, saves, and returns the summary so far with `complete` false; a second Ctrl-C
    stops at once, and the newest checkpoint counts. Either way the same call with `resume` continues.
    Raises `UserError` for what a user can fix: see errors.py.
    """
    out = Path(config.out)
    check_folder(config, out, resume, scoring)
    finished = finished_run(out)
    if finished:
        return finished
    known = out / "records.json"
    if known.exists() and json.loads(known.read_text(encoding="utf-8"))["sha256"] != fingerprint(records):
        raise ConfigError(f"the records in {config.train_file} have changed since {out} began: put the file back, or "
                          f"give another --out")
    run = Run(config, trainer(config, records, load_policy(config), scoring), evaluations or {}, progress, scoring)
    try:
        run.begin()
        if config.eval_before or not config.steps:
            run.evaluate("before")
        stopped = run.run()
        if config.steps and not stopped:
            run.evaluate("after")
    except KeyboardInterrupt:
        stopped = True
        on_main(run.export_adapter)
    summary = gather(run.summary(complete=not stopped))[0]
    on_main(lambda: write_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n"))
    if stopped and run.main:
        when = (f"after step {run.saved} of {config.steps}, which is saved" if run.saved else
                f"before the first of {config.steps} steps was saved")
        print(f"Stopped {when}. To resume: {resuming(config)}, or in Python train(..., resume=True)")
    return summary


def resuming(config: TrainConfig) -> str:
    r"""Return the command that resumes a run."""
    return f"python -m dvr1_lite train --resume {config.out}" + (f" --reward {config.reward}" if config.reward else "")


def fingerprint(records: Sequence[Record]) -> str:
    r"""Return the SHA-256 of what records ask, what is correct, and their clips' names; folders may be moved."""
    facts = [(one.question, one.options, one.answer, one.problem_type, one.spans, Path(one.clip_id).name)
             for one in records]
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogatepass")).hexdigest()


def finished_run(out: Path) -> dict:
    r"""Return the summary of the complete run in a folder, and say that nothing is left to do; {} if there is none."""
    path = out / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not summary.get("complete"):
        return {}
    print(f"The run in {out} is complete, all {summary['step']} steps; nothing was done. For a longer one, start anew "
          f"with more --steps and another --out.")
    return summary


def load_policy(config: TrainConfig, adapter: str | Path | None = None) -> Policy:
    r"""Load a training config's model with new adapters, or with those in the folder `adapter`.

    Raises `ModelError` if one cannot be loaded or computes other log-probs with a shared prefix than by its own
    forward, `ConfigError` if the frames do not fit the model.
    """
    model = resolve(config.model)
    policy = Policy.load(
        model if model.exists() else config.model, quantization=config.quantization, dtype=config.dtype,
        device=config.device, lora=LoraSettings(config.lora_rank, config.lora_alpha, config.seed), adapter=adapter,
        local_files_only=config.local_files_only, gradient_checkpointing=config.gradient_checkpointing,
        max_feature_bytes=config.feature_cache_mb * 2**20, feature_folder=config.feature_folder,
        merge_bytes=config.merge_mb * 2**20, after_video=config.after_video)
    block = policy.preprocessing["patch_size"] * policy.preprocessing["merge_size"]
    if config.frame_size % block:
        near = max(1, round(config.frame_size / block)) * block
        raise ConfigError(f"frame_size is {config.frame_size}, but {config.model} divides frames into blocks of "
                          f"{block} pixels: give a multiple such as {near}")
    check_shared_prefix(policy)
    return policy


def policy_config(options: Any, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    r"""Load the config that applies to `options.adapter`, or to the model, changed by options and overrides: the run's
    own for an adapter and for a model that `merge` wrote, else the defaults.

    options: has `config`, `adapter`, `model` and `device`, each None if not given. A reward that the config names is
    not loaded. Raises `ConfigError`.
    """
    file = options.config or config_of(options.adapter, options.model)
    given = {name: getattr(options, name) for name in ("model", "device") if getattr(options, name) is not None}
    return load_config(file, given | {name: value for name, value in (overrides or {}).items() if value is not None})


def config_of(adapter: str | None, model: str | None = None) -> Path | None:
    r"""Find the config of the run that an adapter, or a model that `merge` wrote, is from; None if there is none."""
    places = [resolve(model) / RUN_CONFIG] if model else []
    if adapter is not None:
        folder = Path(adapter).resolve()
        places = [above / "config.yaml" for above in [folder, *folder.parents][:4]]
    return next((path for path in places if path.is_file()), None)


def check_folder(config: TrainConfig, out: Path, resume: bool, scoring: OwnReward | None = None) -> None:
    r"""Refuse a folder that holds a run, unless it is the one to be resumed, or that cannot be written."""
    taken = [name for name in ("config.yaml", "metrics.jsonl", "summary.json", "checkpoints") if (out / name).exists()]
    if taken and not resume:
        raise ConfigError(f"{out} already holds a run ({', '.join(taken)}): continue it with --resume {out}, or give "
                          f"another --out")
    check_same_reward(scoring, config.reward, out)
    if (out / "config.yaml").exists():
        saved = load_config(out / "config.yaml")
        names = {field.name for field in fields(TrainConfig)} - {"out", "reward", "max_broken_share"}
        changed = sorted(name for name in names if getattr(config, name) != getattr(saved, name))
        if changed:
            values = ", ".join(f"{n} was {getattr(saved, n)!r}, now {getattr(config, n)!r}" for n in changed[:3])
            raise ConfigError(f"{out} holds a run with another config ({values}): resume it unchanged, or give another "
                              f"--out")
    make_folder(out)
    with writing(out):
        probe = out / ".write-test"
        probe.write_text("")
        probe.unlink(missing_ok=True)  # several processes test at once


class Run:
    r"""A trainer in its folder: metrics, checkpoints, answers, adapter and summary. The main process writes."""

    def __init__(self, config: TrainConfig, trainer: Trainer, evaluations: Mapping[str, Sequence[Record]],
                 progress: bool, scoring: OwnReward | None = None):
        self.config, self.trainer, self.out, self.scoring = config, trainer, Path(config.out), scoring
        self.evaluations = {name: limited(records, config.eval_limit) for name, records in evaluations.items()}
        self.main = trainer.world.is_main_process
        self.progress = progress and self.main
        self.spent: dict[str, float] = defaultdict(float)
        self.answers: dict[str, dict[str, list[dict]]] = defaultdict(dict)
        self.saved = restore_newest(self.out, self._restore)
        if not self.saved and next(read_lines(self.out / "metrics.jsonl"), None) and self.main:
            print(f"note: {self.out} has no checkpoint yet (save_every is {config.save_every}): it starts at step 0")
        self.tracker = _tracker(config, self.out) if self.main else None

    # --- steps -------------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        r"""Make the steps that are left, with a final checkpoint and adapter. Return whether Ctrl-C stopped them."""
        trainer, config = self.trainer, self.config
        if self.scoring is not None:
            self.scoring.failed = 0  # those of the evaluation before are in its rows
        with stop_request() as stop, tqdm(total=config.steps, initial=trainer.steps, desc=config.method,
                                          **({} if self.progress else {"disable": True})) as bar:
            while not (trainer.done or any(gather(stop.is_set()))):
                try:
                    with within_memory(f"step {trainer.steps + 1}", f"give a smaller micro_batch or "
                                       f"gradient_checkpointing: true in {self.out / 'config.yaml'}, then continue "
                                       f"with --resume {self.out}"):
                        line = trainer.step()
                except ClipError as error:
                    raise ClipError(f"{error}. Fix the clips, or raise it: {resuming(config)} --max-broken-share "
                                    f"{min(0.99, 2 * config.max_broken_share + 0.1):.2g}; to leave clips out of "
                                    f"{config.train_file}, begin with another --out") from error
                self._record(line)
                bar.update()
                bar.set_postfix(reward=f"{line['reward']:.2f}", vanishing=f"{line['vanishing']:.2f}")
                if trainer.steps % config.save_every == 0:
                    self.save()
            if self.saved != trainer.steps:
                self.save()
            if trainer.steps:
                on_main(self.export_adapter)
            return stop.is_set() and not trainer.done

    def _record(self, line: dict) -> None:
        if self.scoring is not None:  # those of this step
            line["reward_errors"], self.scoring.failed = sum(gather(self.scoring.failed)), 0
        for phase, seconds in line["seconds"].items():
            self.spent[phase] += seconds
        line |= {"machine": {"feature_cache_bytes": self.trainer.policy.features.nbytes,
                             "memory_gb": round(peak_memory_gb(), 3)}}
        if self.main:
            append_lines(self.out / "metrics.jsonl", [line])
        for name, value in line.items() if self.tracker else ():
            for key, number in value.items() if isinstance(value, dict) else [("", value)]:
                if number is not None:
                    self.tracker.add_scalar(f"{name}/{key}" if key else name, number, line["step"])

    # --- answers -----------------------------------------------------------------------------------------------------

    def evaluate(self, when: str) -> None:
        r"""Answer every evaluation "before" (adapter off) or "after"; answers already on disk are kept.

        Where the config asks for it, some questions are answered at temperature 1 too (`when` + "_sampled").
        """
        config = self.config
        with self.trainer.policy.reference() if when == "before" else contextlib.nullcontext():
            for name, records in self.evaluations.items():
                self.answers[when][name] = self._answers(when, name, records, config.eval_temperature,
                                                         config.eval_samples)
                if config.eval_sampled_limit:
                    self.answers[f"{when}_sampled"][name] = self._answers(
                        f"{when}_sampled", name, limited(records, config.eval_sampled_limit), 1.0, 1)

    def _answers(self, when: str, name: str, records: Sequence[Record], temperature: float, samples: int) -> list[dict]:
        r"""Answer this process's share of the records; the main process merges the shares into one file."""
        started, world = time.perf_counter(), self.trainer.world
        whole = self.out / "evaluation" / f"{when}_{name}.jsonl"
        options = {"temperature": temperature, "samples": samples, "label": f"{name} {when}", "scoring": self.scoring}
        if world.num_processes > 1 and not gather(whole.exists())[0]:
            part = whole.with_name(f".{whole.stem}_{world.process_index}_of_{world.num_processes}.jsonl")
            with contextlib.suppress(ClipError):  # no readable clip in this share; the main process judges the whole
                evaluate(self.trainer.policy, records[world.process_index::world.num_processes], self.config, out=part,
                         progress=self.progress, **options)
            rows = [row | {"index": row["index"] * world.num_processes + place}
                    for place, share in enumerate(gather(list(read_lines(part)))) for row in share]
            on_main(lambda: write_atomically(whole, "".join(json.dumps(row) + "\n" for row in rows)))
            part.unlink(missing_ok=True)
        rows: list[dict] = []
        on_main(lambda: rows.extend(evaluate(self.trainer.policy, records, self.config, out=whole,
                                             progress=self.progress, **options)))
        self.spent["evaluation_sampled" if when.endswith("sampled") else f"evaluation_{when}"] += (
            time.perf_counter() - started)
        return rows

    # --- the folder --------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        r"""Write `config.yaml` and cut the metrics off after the step from which the run continues."""
        def write() -> None:
            remove_unfinished(self.out)
            save_reward(self.scoring, self.out)
            digest = fingerprint(self.trainer.records)
            write_atomically(self.out / "records.json", json.dumps({"sha256": digest}) + "\n")
            write_atomically(self.out / "config.yaml", to_yaml(self.config))
            lines = [json.dumps(line) + "\n" for line in read_lines(self.out / "metrics.jsonl")][:self.saved]
            if len(lines) != self.saved:
                raise ModelError(f"{self.out}/metrics.jsonl has {len(lines)} lines, its checkpoint is of step "
                                 f"{self.saved}: put the file back, or start again with another --out")
            write_atomically(self.out / "metrics.jsonl", "".join(lines))

        on_main(write)

    def save(self) -> None:
        r"""Write a checkpoint of the state after the last step."""
        started, trainer = time.perf_counter(), self.trainer
        state = {"history": trainer.history.state_dict(), "position": trainer.position, "rollouts": trainer.rollouts,
                 "updates": trainer.updates, "skipped": trainer.skipped, "skips": trainer.skips, "spent": self.spent}

        def write() -> None:
            with writing(self.out):
                sync(self.out / "metrics.jsonl")
            save_checkpoint(self.out, trainer.steps, state, trainer.optimizer.state_dict(), trainer.generator,
                            trainer.policy.save_adapter, self.config.keep_checkpoints)

        on_main(write)
        self.saved = trainer.steps
        self.spent["checkpoints"] += time.perf_counter() - started

    def _restore(self, checkpoint: Checkpoint) -> None:
        r"""Load what a checkpoint holds into the trainer. Raises whatever a damaged state raises."""
        from peft import set_peft_model_state_dict  # imports bitsandbytes, whose notices are silenced by then

        trainer, state = self.trainer, checkpoint.state
        parameters = trainer.policy.trainable()
        shapes = [tuple(entry["exp_avg"].shape) for entry in checkpoint.optimizer["state"].values()
                  if "exp_avg" in entry]
        if shapes and shapes != [tuple(parameter.shape) for parameter in parameters]:
            raise ModelError(f"checkpoint {checkpoint.folder}: optimizer.pt does not fit the adapter's parameters")
        result = set_peft_model_state_dict(trainer.policy.model, checkpoint.adapter)
        if result.unexpected_keys:
            raise ModelError(f"checkpoint {checkpoint.folder}: the adapter does not fit the model")
        trainer.optimizer.load_state_dict(checkpoint.optimizer)
        trainer.history.load_state_dict(state["history"])
        trainer.generator.set_state(checkpoint.rng["sampling"])
        trainer.steps, trainer.position, trainer.rollouts = state["step"], state["position"], state["rollouts"]
        trainer.updates, trainer.skipped, trainer.skips = state["updates"], state["skipped"], state["skips"]
        self.spent.update(state["spent"])

    def export_adapter(self) -> None:
        r"""Make `adapter/` that of the newest checkpoint, with a card that says how it was made."""
        folders = checkpoint_folders(self.out)
        if not folders:
            return
        folder, part = self.out / "adapter", self.out / ".adapter-part"
        shutil.rmtree(part, ignore_errors=True)
        with writing(folder):
            shutil.copytree(folders[-1] / "adapter", part)
            write_atomically(part / "README.md", self._model_card())
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(part, folder)

    def _model_card(self) -> str:
        config, base = self.config, Path(self.config.model).name
        return (f"---\nbase_model: {config.model}\nlibrary_name: peft\n---\n\n# LoRA adapter for {base}\n\n"
                f"Trained by `python -m dvr1_lite train` with {config.method}, augmentation {config.augment}, seed "
                f"{config.seed}: {self.saved} of {config.steps} steps, {self.trainer.rollouts} completions sampled. "
                f"Every setting is in `config.yaml` and every accuracy in `summary.json`, in the folder above this "
                f"one.\n\nAsk it about a clip:\n\n    python -m dvr1_lite ask --adapter THIS_FOLDER --clip FILE.mp4 "
                f"--question \"...\"\n\nor load it with peft: `PeftModel.from_pretrained(base_model, THIS_FOLDER)`. "
                f"Written with " + ", ".join(f"{name} {version}" for name, version in versions().items()) + ".\n")

    def summary(self, complete: bool) -> dict:
        r"""Build what `summary.json` holds."""
        config, trainer = self.config, self.trainer
        found = {when: {name: summarise(rows) for name, rows in answers.items()}
                 for when, answers in self.answers.items()}
        before, after = self.answers["before"], self.answers["after"]
        return {"complete": complete, "method": config.method, "augment": config.augment, "seed": config.seed,
                "before": {}, "after": {}, **found,
                "change": {name: paired_change(before[name], rows) for name, rows in after.items() if name in before},
                **self._reward_change(),
                "step": trainer.steps, "rollouts": trainer.rollouts, "updates": trainer.updates,
                "skipped_clips": trainer.skipped, "skipped_examples": trainer.skips,
                "seconds": {k: round(v, 2) for k, v in self.spent.items()},
                "peak_memory_gb": round(peak_memory_gb(), 2), "threads": torch.get_num_threads(),
                "feature_cache_bytes": trainer.policy.features.nbytes, "versions": versions(),
                "platform": platform.platform()}

    def _reward_change(self) -> dict:
        r"""Return, for a reward of your own, its paired change and for how many completions in training it failed."""
        if self.scoring is None:
            return {}
        before, after = self.answers["before"], self.answers["after"]
        lines = read_lines(self.out / "metrics.jsonl")
        return {"reward_change": {name: paired_change(before[name], rows, "task_reward")
                                  for name, rows in after.items() if name in before},
                "reward_errors": sum(line["reward_errors"] for line in lines)}


@contextlib.contextmanager
def stop_request() -> Iterator[threading.Event]:
    r"""Yield an event that the first Ctrl-C sets instead of raising; the second raises KeyboardInterrupt as usual.

    Outside the main thread, where signals cannot be caught, the event is never set.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def request(signum, frame):
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        print("\nStopping: this step is finished and saved first. Press Ctrl-C again to stop at once.", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, request)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def _tracker(config: TrainConfig, out: Path):
    if config.tracker == "none":
        return None
    if importlib.util.find_spec("tensorboard") is None:
        raise ModelError("tracker: tensorboard needs the package tensorboard: pip install tensorboard, or use "
                         "tracker: none")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"))


def comparable(line: dict) -> dict:
    r"""Leave out of a line of metrics.jsonl what may differ between two runs of one config: seconds and machine."""
    return {key: value for key, value in line.items() if key not in ("seconds", "machine")}


def versions() -> dict[str, str]:
    r"""Find the versions of python and of the installed packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def peak_memory_gb() -> float:
    r"""Measure the largest memory this process has held, in 2**30 bytes; that of the GPU if it is larger."""
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:  # Windows
        import psutil

        peak = psutil.Process().memory_info().peak_wset
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak = max(peak, torch.cuda.max_memory_allocated())
    return peak / 2**30
