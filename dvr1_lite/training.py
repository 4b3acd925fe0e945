r"""The training loop: sample groups, score them, augment by difficulty, regress, and write everything down.

One step:  records -> prompts -> groups -> rewards -> difficulty -> (augment, sample again) -> inner updates -> metrics
The objective sees log-probs only; the model sees each clip once (cached features) and each prompt once a pass.

A run lives in one folder: `config.yaml`, `metrics.jsonl` (one line a step), `checkpoints/`, `evaluation/` (the answers
before and after), `adapter/` (peft's format), `figures/` and `summary.json`. Killed at any moment, it continues from
its newest checkpoint with the same numbers as if it had never stopped.
"""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import platform
import random
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from . import memory
from .advantages import vanishing_ratio
from .augmentation import (
    Augmentation,
    add_noise,
    augmentation_seed,
    best_trace,
    cut_hint,
    mask_frames,
    plan_augmentation,
    probed_shares,
)
from .checkpoints import (
    Checkpoint,
    checkpoint_folders,
    load_newest,
    remove_unfinished,
    restore_random,
    save_checkpoint,
)
from .config import TrainConfig, load_config, to_yaml
from .data import Record, prompt_text, read_records
from .errors import ClipError, ConfigError, ModelError, NumericsError, within_memory
from .evaluation import evaluate, paired_change, see, summarise
from .files import append_lines, make_folder, read_lines, sync, write_atomically, writing
from .objectives import check_finite, get_objective, samples_from_reference
from .paths import resolve
from .policy import Completions, LoraSettings, Policy, Prompt, torch_device
from .rewards import Score, score
from .rollout import sample_groups

log = logging.getLogger(__name__)

LEAST_TRIES = 100  # a share of broken clips is judged against at least this many records tried
NAMED_SKIPS = 20  # broken clips that the summary names
PATIENCE = datetime.timedelta(hours=24)  # of several processes, the others wait while the first one evaluates
VERSIONS = ("dvr1-lite", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "numpy", "decord", "av")
AVERAGED = ("objective", "loss", "grad_norm")  # means over the inner updates; other stats are the last update's


def train(config: TrainConfig, progress: bool = True, resume: bool = False) -> dict:
    r"""Runs a training run from its config and returns its summary, the content of `summary.json`.

    progress: show live bars. resume: continue what is in `config.out` if there is something (the same config, `out`
    apart), else begin; without it a folder that already holds a run is refused.
    `before` and `after` map each evaluation's name to accuracy, ci95, n and by_type; `change` holds their paired
    difference. Ctrl-C finishes the step, saves, says so in one line, and returns the summary so far with
    `complete` false; a second Ctrl-C stops at once, and the newest checkpoint counts. Either way `adapter/` is that of
    the newest checkpoint, and the same call with `resume` goes on.
    Raises `UserError` for what a user can mend: see errors.py.
    """
    out = Path(config.out)
    _check_folder(config, out, resume)
    done = _read_summary(out)
    if done.get("complete"):
        print(f"The run in {out} is complete, all {done['step']} steps; nothing was done. For a longer one, start anew "
              f"with more --steps and another --out.")
        return done
    trainer = _trainer()(config, out, load_newest(out) if resume else None)
    try:
        trainer.begin()
        trainer.evaluate("before", progress)
        stopped = trainer.run(progress)
        if not stopped:
            trainer.evaluate("after", progress)
    except KeyboardInterrupt:
        stopped = True
        trainer.export_saved_adapter()
    finally:
        trainer.close()
    summary = trainer.summary(complete=not stopped)
    if not trainer.main:
        return summary
    if config.figures and not stopped:  # before the summary: what it calls complete has its figures
        draw_figures(config, out, summary)
    write_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    if stopped:
        when = (f"after step {trainer.saved_step} of {config.steps}, which is saved" if trainer.saved_step else
                f"before the first of {config.steps} steps was saved")
        print(f"Stopped {when}. To go on: python -m dvr1_lite train --resume {out}, or in Python "
              f"train(config, resume=True)")
    return summary


def _trainer() -> type["Trainer"]:
    from . import parallel  # which builds on this module

    return parallel.TeamTrainer if parallel.processes() > 1 else Trainer


# --- the run's folder ------------------------------------------------------------------------------------------------


def _check_folder(config: TrainConfig, out: Path, resume: bool) -> None:
    r"""Refuses a folder that holds a run, unless it is the one to be resumed."""
    taken = [name for name in ("config.yaml", "metrics.jsonl", "summary.json", "checkpoints") if (out / name).exists()]
    if taken and not resume:
        raise ConfigError(f"{out} already holds a run ({', '.join(taken)}): continue it with --resume {out}, or give "
                          f"another --out")
    if (out / "config.yaml").exists():
        _check_same(config, load_config(out / "config.yaml"), out)


def _check_same(config: TrainConfig, saved: TrainConfig, out: Path) -> None:
    names = [field.name for field in fields(TrainConfig) if field.name != "out"]
    changed = [name for name in names if getattr(config, name) != getattr(saved, name)]
    if changed:
        told = ", ".join(f"{n} was {getattr(saved, n)!r}, now {getattr(config, n)!r}" for n in changed[:3])
        raise ConfigError(f"{out} holds a run with another config ({told}): resume it unchanged, or give another --out")


def _read_summary(out: Path) -> dict:
    path = out / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def comparable(line: dict) -> dict:
    r"""A line of metrics.jsonl without what may differ between two runs of one config: `seconds` and `machine`."""
    return {key: value for key, value in line.items() if key not in ("seconds", "machine")}


# --- groups ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Groups:
    r"""B prompts with G scored completions each: records, prompts (B); completions (B, G, T); texts, scores (B x G).

    `rewards` is (B, G), the total rewards; `maxima` (B,) the largest each record allows; `unfinished` (B, G) marks
    completions without an end token.
    """

    records: list[Record]
    prompts: list[Prompt]
    completions: Completions
    texts: list[list[str]]
    scores: list[list[Score]]
    unfinished: torch.Tensor

    @property
    def rewards(self) -> torch.Tensor:
        return torch.tensor([[s.total for s in group] for group in self.scores])

    @property
    def maxima(self) -> torch.Tensor:
        return torch.tensor([group[0].maximum for group in self.scores])

    def means(self) -> list[float]:
        r"""Each group's mean reward as a share of the largest (B)."""
        return [mean_of([s.normalised for s in group]) for group in self.scores]

    def replaced(self, places: Sequence[int], new: "Groups") -> "Groups":
        r"""These groups with those at `places` exchanged for the groups of `new`, in order."""
        length = max(self.completions.ids.shape[-1], new.completions.ids.shape[-1])
        pad = lambda x: F.pad(x, (0, length - x.shape[-1]))
        ids, mask, unfinished = pad(self.completions.ids), pad(self.completions.mask), self.unfinished.clone()
        where = torch.tensor(places, device=ids.device)
        ids[where], mask[where] = pad(new.completions.ids), pad(new.completions.mask)
        unfinished[where] = new.unfinished
        lists = {"prompts": list(self.prompts), "texts": list(self.texts), "scores": list(self.scores)}
        for name, values in lists.items():
            for place, value in zip(places, getattr(new, name), strict=True):
                values[place] = value
        return replace(self, completions=Completions(ids, mask), unfinished=unfinished, **lists)

    def chosen(self, places: Sequence[int]) -> "Groups":
        r"""The groups at `places` alone, in that order."""
        where = torch.tensor(places, device=self.completions.ids.device)
        completions = Completions(self.completions.ids[where], self.completions.mask[where])
        lists = {name: [getattr(self, name)[i] for i in places] for name in ("records", "prompts", "texts", "scores")}
        return Groups(**lists, completions=completions, unfinished=self.unfinished[where.to(self.unfinished.device)])

    def with_successes(self, new: "Groups") -> "Groups":
        r"""These groups, on their own prompts, with up to half of each, wrong completions, exchanged for right ones of
        the group of `new` at the same place."""
        everyone = range(len(self.records))
        source, mixed = self.replaced(everyone, new), new.replaced(everyone, self)  # padded to one length
        for b, (scores, others) in enumerate(zip(self.scores, new.scores)):
            wrong = [g for g, score in enumerate(scores) if not score.right][:len(scores) // 2]
            right = [g for g, score in enumerate(others) if score.right]
            mixed.texts[b], mixed.scores[b] = list(self.texts[b]), list(scores)
            for to, fro in zip(wrong, right):
                for part in ("ids", "mask"):
                    getattr(mixed.completions, part)[b, to] = getattr(source.completions, part)[b, fro]
                mixed.unfinished[b, to] = source.unfinished[b, fro]
                mixed.texts[b][to], mixed.scores[b][to] = source.texts[b][fro], source.scores[b][fro]
        return mixed


def mean_of(values: Sequence[float]) -> float:
    r"""The mean, summed without rounding errors; 0 for none."""
    return math.fsum(values) / len(values) if values else 0.0


def score_groups(records: Sequence[Record], texts: Sequence[Sequence[str]]) -> list[list[Score]]:
    r"""Scores of B groups of completions. Raises `NumericsError`, naming the record, if one is not finite."""
    scores = [[score(record, text) for text in group] for record, group in zip(records, texts, strict=True)]
    for record, group in zip(records, scores):
        if not all(math.isfinite(s.total) for s in group):
            raise NumericsError(f"the reward of record {record.record_id!r} is not finite: check its answer")
    return scores


# --- the trainer -----------------------------------------------------------------------------------------------------


class Trainer:
    r"""The state of a run: policy, optimizer, reward history, place in the data, random states and counters."""

    def __init__(self, config: TrainConfig, out: Path, checkpoint: Checkpoint | None = None):
        self.config, self.out = config, out
        self._check_machine()
        self.records = read_records(resolve(config.train_file), config.data_root)
        self.evaluations = {name: _read_evaluation(config, path) for name, path in config.eval_paths().items()}
        self.view = config.view()
        self.policy = self._load_policy(checkpoint and checkpoint.adapter)
        self.accelerator = _make_accelerator(config, out)
        self.optimizer = self.accelerator.prepare(make_optimizer(config, self.policy.trainable()))
        self.objective, self.augmentation = config.objective(), config.augmentation()
        self.history, self.generator = config.history(), torch.Generator().manual_seed(config.seed)
        self.order = Order(len(self.records), config.seed)
        self.share, self.stride, self.main = config.prompts_per_step, 1, True  # one process; see parallel.py
        self.step = self.saved_step = self.position = self.rollouts = self.updates = self.skipped = 0
        self.skips: list[str] = []
        self.spent: dict[str, float] = defaultdict(float)
        self.seconds: dict[str, float] = {}
        self.predictions: dict[str, dict[str, list[dict]]] = {"before": {}, "after": {}}
        self._restore(checkpoint)

    def _check_machine(self) -> None:
        check_machine(self.config)

    def _load_policy(self, adapter: Path | None) -> Policy:
        return load_policy(self.config, adapter)

    # ------------------------------------------------------------------------------------------------- the whole run

    def run(self, progress: bool) -> bool:
        r"""All steps that are left, with a final checkpoint and adapter. Returns whether Ctrl-C stopped it."""
        config = self.config
        disabled = {} if progress else {"disable": True}
        with stop_request() as stop, tqdm(total=config.steps, initial=self.step, desc=config.method, **disabled) as bar:
            while not (self.finished or self._agreed(stop.is_set())):
                line = self._guarded_step()
                self._record(line)
                bar.update()
                bar.set_postfix(reward=f"{line['reward']:.2f}", vanishing=f"{line['vanishing']:.2f}")
                if self.step % config.save_every == 0:
                    self.save()
            if self.saved_step != self.step:
                self.save()
            self._export_adapter(self.policy.save_adapter)
            return stop.is_set() and not self.finished

    def _record(self, line: dict) -> None:
        append_lines(self.out / "metrics.jsonl", [line])
        self.accelerator.log(_flat(line), step=self.step)

    def _agreed(self, stop: bool) -> bool:
        return stop

    @property
    def finished(self) -> bool:
        r"""All steps are done, or the budget of rollouts is spent."""
        budget = self.config.rollout_budget
        return self.step >= self.config.steps or (budget is not None and self.rollouts >= budget)

    def evaluate(self, when: str, progress: bool) -> None:
        r"""Answers every evaluation file "before" (adapter off) or "after"; answers already on disk are kept."""
        started = time.perf_counter()
        for name, records in self.evaluations.items():
            path = self.out / "evaluation" / f"{when}_{name}.jsonl"
            self.predictions[when][name] = self._answers(when, records, path, f"{name} {when}", progress)
        self.spent[f"evaluation_{when}"] += time.perf_counter() - started

    def _answers(self, when: str, records: list[Record], path: Path, label: str, progress: bool) -> list[dict]:
        config = self.config
        adapter_off = self.policy.reference() if when == "before" else contextlib.nullcontext()
        with adapter_off:
            return evaluate(self.policy, records, view=self.view, max_new_tokens=config.max_new_tokens,
                            batch=config.eval_batch, temperature=config.eval_temperature, seed=config.seed,
                            samples=config.eval_samples, out=path, label=label, progress=progress)

    def close(self) -> None:
        r"""Ends trackers."""
        self.accelerator.end_training()

    # ---------------------------------------------------------------------------------------------------- one step

    def _guarded_step(self) -> dict:
        r"""A step whose failures name what to change; everything on disk stays as it was."""
        with within_memory(f"step {self.step + 1}", "give a smaller micro_batch or gradient_checkpointing: true in "
                           f"{self.out / 'config.yaml'}, then continue with --resume {self.out}"):
            return self._step()

    def _step(self) -> dict:
        self.seconds, started = defaultdict(float), time.perf_counter()
        sampled = self._sample_batch()
        difficulties = [self.history.difficulty(mean) for mean in sampled.means()]
        reference_reward = self.history.mean if len(self.history) else None
        everyone = self._whole(sampled)
        for mean in everyone.means():
            self.history.push(mean)
        trained, counts = self._augment(sampled, difficulties)
        stats = self._update(trained)
        after = self._whole(trained)
        self.step += 1
        self.seconds["total"] = time.perf_counter() - started
        for phase, seconds in self.seconds.items():
            self.spent[phase] += seconds
        return {
            "step": self.step, **reward_figures(everyone), "history_mean": reference_reward,
            **{f"vanishing{name}": value for name, value in _vanishing(everyone)},
            **{f"vanishing_after{name}": value for name, value in _vanishing(after)},
            "reward_after": mean_of(after.means()), **stats, **counts, "rollouts": self.rollouts,
            "updates": self.updates, "records_tried": self.position, "skipped_clips": self.skipped,
            "seconds": {phase: round(seconds, 4) for phase, seconds in self.seconds.items()},
            "machine": {"feature_cache_bytes": self.policy.features.nbytes, "memory_gb": round(peak_memory_gb(), 3)},
        }

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started

    def _whole(self, groups: Groups) -> Groups:
        r"""The groups with the scores of those in all processes."""
        return groups

    def _sample_batch(self) -> Groups:
        with self._timed("encode"):
            shown = [self._next_record() for _ in range(self.share)]
            prompts = [self._prompt(record, features) for record, features in shown]
        return self._sample([record for record, _ in shown], prompts, self.config.group_size, "sample")

    def _prompt(self, record: Record, features, **extra) -> Prompt:
        return self.policy.prompt(prompt_text(record, instruction=self.view.instruction, **extra), features)

    def _next_record(self) -> tuple[Record, object]:
        r"""The next record whose clip can be read, with its features. A broken one is skipped with its question."""
        while True:
            record = self.records[self.order[self.position]]
            self.position += self.stride
            try:
                return record, see(self.policy, record, self.view)
            except ClipError as error:
                self._skip(error)

    def _skip(self, error: ClipError) -> None:
        self.skipped += 1
        if str(error) not in self.skips and len(self.skips) < NAMED_SKIPS:
            self.skips.append(str(error))
            log.warning("skipped: %s", error)
        share = self.config.max_broken_share
        if self.skipped > share * max(self.position, LEAST_TRIES):
            raise ClipError(f"{self.skipped} of the {self.position} records tried have clips that cannot be read, more "
                            f"than max_broken_share = {share}. Mend or leave out the clips, or raise it. The last: "
                            f"{error}")

    def _sample(self, records: list[Record], prompts: list[Prompt], size: int, phase: str) -> Groups:
        with self._timed(phase):
            rollout = sample_groups(self.policy, prompts, size, self.config.max_new_tokens, generator=self.generator,
                                    temperature=self.config.temperature,
                                    reference=samples_from_reference(self.config.method))
        self.rollouts += len(prompts) * size
        with self._timed("reward"):
            scores = score_groups(records, rollout.texts)
        return Groups(records, prompts, rollout.completions, rollout.texts, scores, ~rollout.finished)

    # ------------------------------------------------------------------------------------------------ augmentation

    def _augment(self, sampled: Groups, difficulties: list[float]) -> tuple[Groups, dict[str, int]]:
        r"""The groups to train on, and counts: hard and easy prompts, hints found and missing, groups sampled again."""
        plans = [plan_augmentation(difficulty, self.augmentation) for difficulty in difficulties]
        hard = [i for i, plan in enumerate(plans) if plan.kind == "hint"]
        easy = [i for i, plan in enumerate(plans) if plan.kind in ("noise", "mask")]
        if self.config.augment == "resample":
            changed = {i: sampled.prompts[i] for i in sorted(hard + easy)}
            hints = {}
        else:
            hints = self._hinted_prompts(sampled, hard, plans)
            changed = dict(sorted((hints | self._noisy_prompts(sampled, easy, plans)).items()))
        counts = {"hard": len(hard), "easy": len(easy), "hints_found": len(hints), "augmented": len(changed),
                  "hints_missing": 0 if self.config.augment == "resample" else len(hard) - len(hints)}
        if not changed:
            return sampled, counts
        records = [sampled.records[i] for i in changed]
        again = self._sample(records, list(changed.values()), self.config.group_size, "sample_augmented")
        hinted = [row for row, i in enumerate(changed) if i in hints]
        if hinted and self.config.hint_update != "hinted":
            again = again.replaced(hinted, self._without_hint(sampled.chosen(list(hints)), again.chosen(hinted)))
        return sampled.replaced(list(changed), again), counts

    def _without_hint(self, own: Groups, hinted: Groups) -> Groups:
        r"""What the update of hinted groups stands on if not on the hinted prompt: completions on the plain prompts."""
        if self.config.hint_update == "mixed":
            return own.with_successes(hinted)
        return replace(hinted, prompts=own.prompts)

    def _hinted_prompts(self, sampled: Groups, hard: list[int], plans: list[Augmentation]) -> dict[int, Prompt]:
        r"""Prompts with a hint for those hard ones whose answer the policy can explain when it is shown."""
        if not hard:
            return {}
        records = [sampled.records[i] for i in hard]
        shown = [self._prompt(sampled.records[i], sampled.prompts[i].features, show_answer=True) for i in hard]
        traces = self._sample(records, shown, self.config.hint_traces, "sample_traces")
        best = {i: best_trace(zip(*pair)) for i, *pair in zip(hard, traces.texts, traces.scores)}
        found = {i: trace for i, trace in best.items() if trace is not None}
        places = list(found)

        def hinted(i: int, share: float) -> Prompt:
            return self._prompt(sampled.records[i], sampled.prompts[i].features, hint=cut_hint(found[i], share))

        def success(numbers: list[int], share: float) -> list[float]:
            tried = [places[number] for number in numbers]
            groups = self._sample([sampled.records[i] for i in tried], [hinted(i, share) for i in tried],
                                  self.config.hint_traces, "sample_probes")
            return [mean_of([score.right for score in scores]) for scores in groups.scores]

        shares = probed_shares(len(places), success) if self.config.hint_probe else [plans[i].amount for i in places]
        return {i: hinted(i, share) for i, share in zip(places, shares)}

    def _noisy_prompts(self, sampled: Groups, easy: list[int], plans: list[Augmentation]) -> dict[int, Prompt]:
        r"""Prompts with noise or masked frames; a clip that has become unreadable is counted and stays as it was."""
        prompts = {}
        with self._timed("encode_augmented"):
            for i in easy:
                record, plan = sampled.records[i], plans[i]
                seed = augmentation_seed(self.config.seed, record.record_id, self.step)
                change = add_noise if plan.kind == "noise" else mask_frames
                try:
                    features = see(self.policy, record, self.view, lambda frames: change(frames, plan.amount, seed))
                except ClipError as error:
                    self._skip(error)
                    continue
                prompts[i] = self._prompt(record, features)
        return prompts

    # ------------------------------------------------------------------------------------------------------ update

    def _update(self, groups: Groups) -> dict[str, float | None]:
        r"""The inner updates on one batch of groups; returns the objective's stats and the gradient's norm.

        The log-probs of the first pass, detached, are the old ones of all; the reference's are computed once.
        """
        config, names = self.config, [record.record_id for record in groups.records]
        rewards = groups.rewards.to(self.policy.device)
        with self._timed("reference"):
            reference = self.policy.logprobs(groups.prompts, groups.completions, reference=True,
                                             temperature=config.temperature, micro_batch=config.micro_batch)
        old, history = None, []
        mask = groups.completions.mask.to(self.policy.device)

        def objective(logp: torch.Tensor):
            before = logp.detach() if old is None else old
            check_finite(logp, before, reference, mask, rewards, names)
            return self._objective(logp, before, reference, mask, rewards)

        with self._timed("update"):
            self._set_learning_rate()
            for _ in range(config.inner_updates):
                stats, logp = self._inner_update(groups, objective, names)
                old = logp if old is None else old
                history.append(stats)
        means = {name: mean_of([stats[name] for stats in history]) for name in AVERAGED}
        last = {name: value if math.isfinite(value) else None for name, value in history[-1].items()}
        return last | means | {"completion_tokens": float(mask.sum()) / rewards.numel(),
                                      "unfinished": groups.unfinished.float().mean().item()}

    def _objective(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        return get_objective(self.config.method)(*tensors, self.objective)

    def _share_gradients(self) -> None:
        r"""Where several processes add up their gradients."""

    def _inner_update(self, groups: Groups, objective, names: list[str]) -> tuple[dict[str, float], torch.Tensor]:
        self.optimizer.zero_grad()
        try:
            _, stats, logp = self.policy.backward(groups.prompts, groups.completions, objective,
                                                  micro_batch=self.config.micro_batch,
                                                  temperature=self.config.temperature)
            self._share_gradients()
            norm = float(self.accelerator.clip_grad_norm_(self.policy.trainable(), self.config.max_grad_norm))
            if not math.isfinite(norm):
                raise NumericsError(f"the gradient's norm is {norm}: lower the learning rate")
        except NumericsError as error:
            raise NumericsError(f"step {self.step + 1}, records {', '.join(names)}: {error} Earlier steps are saved "
                                f"in {self.out}.") from error
        self.optimizer.step()
        self.updates += 1
        return {name: value for name, value in stats.items() if name not in ("length", "vanished")} | {
            "grad_norm": norm}, logp

    def _set_learning_rate(self) -> None:
        warmup = self.config.warmup_steps
        share = min(1.0, (self.step + 1) / warmup) if warmup else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * share

    # ------------------------------------------------------------------------------------------------ saving, summary

    def save(self) -> None:
        r"""Writes a checkpoint of the state after the last step."""
        started = time.perf_counter()
        with writing(self.out):
            sync(self.out / "metrics.jsonl")
        state = {"history": self.history.state_dict(), "position": self.position, "rollouts": self.rollouts,
                 "updates": self.updates, "skipped": self.skipped, "skips": self.skips, "spent": self.spent}
        save_checkpoint(self.out, self.step, state, self.optimizer.state_dict(), {"sampling": self.generator},
                        self.policy.save_adapter, self.config.keep_checkpoints)
        self.saved_step = self.step
        self.spent["checkpoints"] += time.perf_counter() - started

    def _restore(self, checkpoint: Checkpoint | None) -> None:
        r"""Takes up the state that a checkpoint holds."""
        if checkpoint is None:
            return
        state = checkpoint.state
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.history.load_state_dict(state["history"])
        self.step = self.saved_step = state["step"]
        self.position, self.rollouts, self.updates = state["position"], state["rollouts"], state["updates"]
        self.skipped, self.skips = state["skipped"], state["skips"]
        self.spent.update(state["spent"])
        restore_random(checkpoint, {"sampling": self.generator})

    def begin(self) -> None:
        r"""Takes the folder: writes `config.yaml`, cuts the metrics off after the step that the run goes on from."""
        make_folder(self.out)
        remove_unfinished(self.out)
        write_atomically(self.out / "config.yaml", to_yaml(self.config))
        lines = list(read_lines(self.out / "metrics.jsonl"))
        kept = [json.dumps(line) + "\n" for line in lines[:self.step]]
        if len(kept) != self.step:
            raise ModelError(f"{self.out}/metrics.jsonl has {len(kept)} lines, its checkpoint is of step {self.step}: "
                             f"put the file back, or start again with another --out")
        write_atomically(self.out / "metrics.jsonl", "".join(kept))

    def export_saved_adapter(self) -> None:
        r"""Makes `adapter/` that of the newest checkpoint, for a run that ends in the middle of a step."""
        if folders := checkpoint_folders(self.out):
            self._export_adapter(lambda part: shutil.copytree(folders[-1] / "adapter", part))

    def _export_adapter(self, save: Callable[[Path], object]) -> None:
        folder, part = self.out / "adapter", self.out / ".adapter-part"
        shutil.rmtree(part, ignore_errors=True)
        with writing(folder):
            save(part)
            write_atomically(part / "README.md", self._model_card())
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(part, folder)

    def _model_card(self) -> str:
        r"""What someone who finds the adapter alone needs to know: how it was made and how it is loaded."""
        config, base = self.config, Path(self.config.model).name
        return (f"---\nbase_model: {config.model}\nlibrary_name: peft\n---\n\n# LoRA adapter for {base}\n\n"
                f"Trained by `python -m dvr1_lite train` with {config.method}, augmentation {config.augment}, seed "
                f"{config.seed}: {self.saved_step} of {config.steps} steps, {self.rollouts} completions sampled. Every "
                f"setting is in `config.yaml` and every accuracy in `summary.json`, in the folder above this one.\n\n"
                f"Ask it about a clip:\n\n    python -m dvr1_lite ask --adapter THIS_FOLDER --clip FILE.mp4 --question "
                f"\"...\"\n\nor load it with peft: `PeftModel.from_pretrained(base_model, THIS_FOLDER)`. Written with "
                + ", ".join(f"{name} {version}" for name, version in versions().items() if version) + ".\n")

    def summary(self, complete: bool) -> dict:
        r"""What `summary.json` holds."""
        before, after = ({name: summarise(rows) for name, rows in self.predictions[when].items()}
                         for when in ("before", "after"))
        change = {name: paired_change(self.predictions["before"][name], rows)
                  for name, rows in self.predictions["after"].items()}
        return {"complete": complete, "method": self.config.method, "augment": self.config.augment,
                "seed": self.config.seed, "before": before, "after": after, "change": change, "step": self.step,
                "rollouts": self.rollouts, "updates": self.updates, "skipped_clips": self.skipped,
                "skipped_examples": self.skips, "seconds": {k: round(v, 2) for k, v in self.spent.items()},
                "peak_memory_gb": round(peak_memory_gb(), 2), "feature_cache_bytes": self.policy.features.nbytes,
                "versions": versions(), "platform": platform.platform()}


class Order:
    r"""The order in which records come: a shuffle of its own for each epoch, a function of seed and epoch alone."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self._epoch, self._indices = count, seed, None, []

    def __getitem__(self, position: int) -> int:
        r"""Index of the record at a position counted from the run's start."""
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            self._epoch, self._indices = epoch, list(range(self.count))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._indices)
        return self._indices[place]


@contextlib.contextmanager
def stop_request() -> Iterator[threading.Event]:
    r"""An event that the first Ctrl-C sets instead of raising; the second raises KeyboardInterrupt as usual.

    Outside the main thread, where signals cannot be caught, the event is never set.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def ask(signum, frame):
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


# --- figures of a step -----------------------------------------------------------------------------------------------


def reward_figures(groups: Groups) -> dict[str, float | None]:
    r"""Means over all completions: total reward, its parts (IoU over those that asked a span), share of the largest."""
    scores = [s for group in groups.scores for s in group]
    ious = [s.iou for s in scores if s.iou is not None]
    return {"reward": mean_of([s.total for s in scores]), "reward_normalised": mean_of([s.normalised for s in scores]),
            "format_rate": mean_of([s.format for s in scores]), "accuracy": mean_of([s.accuracy for s in scores]),
            "iou": mean_of(ious) if ious else None}


def _vanishing(groups: Groups) -> Iterator[tuple[str, float]]:
    for name, value in vanishing_ratio(groups.rewards, groups.maxima).items():
        yield "" if name == "ratio" else f"_{name}", value


def _flat(line: dict) -> dict[str, float]:
    r"""The numbers of a metrics line, nested ones as "seconds/total", for a tracker."""
    flat = {}
    for name, value in line.items():
        for key, number in value.items() if isinstance(value, dict) else [("", value)]:
            if number is not None:
                flat[f"{name}/{key}" if key else name] = number
    return flat


# --- what a run is made of -------------------------------------------------------------------------------------------


def load_policy(config: TrainConfig, adapter: str | Path | None = None, divide: Callable | None = None) -> Policy:
    r"""The config's model with new adapters, or with those in the folder `adapter`. divide: see `Policy.load`.

    Raises `ModelError` if one cannot be loaded, `ConfigError` if the frames do not fit the model.
    """
    model = resolve(config.model)
    policy = Policy.load(
        model if model.exists() else config.model, quantization=config.quantization, dtype=config.dtype,
        device=config.device, lora=LoraSettings(config.lora_rank, config.lora_alpha, config.seed), adapter=adapter,
        attention=config.attention, gradient_checkpointing=config.gradient_checkpointing,
        max_feature_bytes=config.feature_cache_mb * 2**20, merge_bytes=config.merge_mb * 2**20,
        local_files_only=config.local_files_only, after_video=config.after_video, divide=divide)
    block = policy.preprocessing["patch_size"] * policy.preprocessing["merge_size"]
    if config.frame_size % block:
        near = max(1, round(config.frame_size / block)) * block
        raise ConfigError(f"frame_size is {config.frame_size}, but {config.model} divides frames into blocks of "
                          f"{block} pixels: give a multiple such as {near}")
    return policy


def make_optimizer(config: TrainConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    r"""AdamW over the adapter's parameters, of the kind that `optimizer` names."""
    kind = torch.optim.AdamW
    if config.optimizer != "adamw":
        import bitsandbytes

        kind = getattr(bitsandbytes.optim, {"adamw-8bit": "AdamW8bit", "paged-adamw-8bit": "PagedAdamW8bit"}[
            config.optimizer])
    return kind(parameters, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps,
                weight_decay=config.weight_decay)


def check_machine(config: TrainConfig, shards: int = 1) -> None:
    r"""Whether this machine can run the config, asked before anything large is loaded. shards: see `memory.predict`.

    Raises `ConfigError` for a GPU with too little memory, naming what to lower, and `ConfigError` or `ModelError` for
    an optimizer that cannot be had here.
    """
    on_gpu = torch_device(config.device).type == "cuda"
    if config.optimizer != "adamw" and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"optimizer: {config.optimizer} needs bitsandbytes, which is not installed: pip install "
                         f"bitsandbytes, or use optimizer: adamw")
    if config.optimizer == "paged-adamw-8bit" and not on_gpu:
        raise ConfigError(f"optimizer: paged-adamw-8bit moves its means between a GPU and the computer's memory, and "
                          f"device is {config.device}: use optimizer: adamw-8bit or adamw, or device: cuda")
    if on_gpu and torch.cuda.is_available() and config.check_memory and memory.is_known(config.model):
        memory.check_fits(config, memory.device_gb(config.device), shards=shards)


def _read_evaluation(config: TrainConfig, path: str) -> list[Record]:
    r"""The records of an evaluation file, or the part of them that `eval_limit` asks for, the same in every run."""
    return limited(read_records(resolve(path), config.data_root), config.eval_limit)


def limited(records: list[Record], limit: int) -> list[Record]:
    r"""`limit` records drawn once and for all, in the file's order; all of them for 0."""
    if not 0 < limit < len(records):
        return records
    return [records[i] for i in sorted(random.Random("evaluation").sample(range(len(records)), limit))]


def _make_accelerator(config: TrainConfig, out: Path):
    from accelerate import Accelerator, InitProcessGroupKwargs

    if config.tracker == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise ModelError("tracker: tensorboard needs the package tensorboard: pip install tensorboard, or use "
                         "tracker: none")
    try:
        accelerator = Accelerator(cpu=torch.device(config.device).type == "cpu", project_dir=str(out),
                                  kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
                                  log_with=None if config.tracker == "none" else config.tracker)
    except ValueError as error:  # accelerate keeps one device for the life of a process
        raise ConfigError(f"device is {config.device}, but this process has trained on another one: restart "
                          f"it") from error
    accelerator.init_trackers("tensorboard")
    return accelerator


def versions() -> dict[str, str]:
    r"""Versions of python and of the packages that numbers depend on, those that are installed."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def peak_memory_gb() -> float:
    r"""Largest memory this process has held, in 2**30 bytes; on a GPU that of the GPU if it is larger."""
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:  # Windows
        import psutil

        peak = psutil.Process().memory_info().peak_wset
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak = max(peak, torch.cuda.max_memory_allocated())
    return peak / 2**30


def quiet_libraries() -> None:
    r"""Silences progress bars and notices of transformers, peft and bitsandbytes; errors still show."""
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("bitsandbytes", "peft", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def draw_figures(config: TrainConfig, out: Path, summary: dict) -> None:
    r"""Writes `figures/`: reward curve, vanishing ratio, accuracy by type, and sample clips with two completions."""
    from . import plotting

    folder = out / "figures"
    make_folder(folder)
    metrics = list(read_lines(out / "metrics.jsonl"))
    plotting.save(plotting.reward_curve(metrics, config.method), folder / "reward.png")
    plotting.save(plotting.vanishing_curve(metrics), folder / "vanishing.png")
    if summary["after"]:
        plotting.save(plotting.accuracy_by_type(summary["before"], summary["after"]), folder / "accuracy.png")
        samples = sample_answers(config, out)
        if samples:
            plotting.save(plotting.sample_strips(samples), folder / "samples.png")


def sample_answers(config: TrainConfig, out: Path, count: int = 4) -> list[dict]:
    r"""Up to `count` questions of different types of the first evaluation, with clip and answers before and after.

    Of each type the first question whose answer changed is taken, else the first. Clips are read again here.
    """
    from .video import read_clip

    name, path = next(iter(config.eval_paths().items()))
    records = _read_evaluation(config, path)
    before, after = ({row["index"]: row for row in read_lines(out / "evaluation" / f"{when}_{name}.jsonl")
                      if "error" not in row} for when in ("before", "after"))
    by_type = defaultdict(list)
    for index in sorted(before.keys() & after.keys()):
        if records[index].clip is not None:
            by_type[records[index].question_type].append(index)
    samples = []
    for indices in list(by_type.values())[:count]:
        changed = [i for i in indices if before[i]["accuracy"] != after[i]["accuracy"]]
        index = (changed or indices)[0]
        record = records[index]
        with contextlib.suppress(ClipError):
            clip = read_clip(record.clip, config.num_frames, (config.frame_size, config.frame_size),
                             timeout=config.decode_timeout)
            samples.append({"clip": clip, "question": prompt_text(record), "answer": record.answer_in_words,
                            "before": before[index]["completion"], "after": after[index]["completion"]})
    return samples
