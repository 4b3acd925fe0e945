r"""Training: sample groups, score them, augment by difficulty, and update the adapter. `Trainer.step` is the method.

    records -> prompts -> groups -> rewards -> difficulty -> (augment, sample again) -> several updates -> metrics

A batch is a list of `Group`, stacked once. The clip is encoded once per record and augmentation, and the prompt is
prefilled once per group and pass. run.py runs a complete training in one folder.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from .augmentation import (Augmentation, RewardHistory, add_noise, augmentation_seed, best_trace, cut_hint, mask_frames,
                           plan_augmentation)
from .config import TrainConfig
from .data import Record, prompt_text
from .distributed import Order, average_gradients, gather, processes
from .errors import ClipError, ConfigError, NumericsError
from .loading import make_optimizer
from .metrics import statistics, step_metrics
from .objectives import Batch, objective_loss
from .policy import Completions, Features, Policy, Prompt, encode_record
from .rewards import Score, score
from .rollout import sample_groups

log = logging.getLogger(__name__)

LEAST_TRIES = 100  # a share of broken clips is judged against at least this many records tried
NAMED_SKIPS = 20  # broken clips that the summary names


@dataclass(frozen=True)
class Group:
    r"""G scored completions of one prompt: their token ids (lists of different lengths), texts, scores, and whether
    each ended before the limit. The prompt may be augmented; rewards are judged against the record."""

    record: Record
    prompt: Prompt
    tokens: list[list[int]]
    texts: list[str]
    scores: list[Score]
    finished: list[bool]

    @property
    def mean(self) -> float:
        r"""The mean reward as a share of the largest possible one."""
        return fmean(score.total / score.maximum for score in self.scores)


def stack(groups: Sequence[Group], pad_id: int) -> tuple[list[Prompt], Completions, torch.Tensor]:
    r"""Stack B groups into their prompts, completions (B, G, T) and total rewards (B, G)."""
    rewards = torch.tensor([[score.total for score in group.scores] for group in groups])
    completions = Completions.from_lists([group.tokens for group in groups], pad_id)
    return [group.prompt for group in groups], completions, rewards


class Trainer:
    r"""Policy, optimizer, reward history, place in the data and random state of a training; `step` advances it.

    With several processes (`accelerate launch`) each trains on whole groups of its own, and gradients are averaged.
    A variant of the augmentation is a subclass that overrides `hinted_prompts`, `hint_shares` or `combine`
    (lab/variants.py). scoring: scores a completion; None is `rewards.score`, own_reward.py has rewards of your own.
    Raises `ConfigError` if the prompts cannot be shared evenly between processes.
    """

    variant = "hinted"  # which augmentation this class makes; the config must ask for it

    def __init__(self, config: TrainConfig, records: Sequence[Record], policy: Policy, scoring: Callable | None = None):
        self.world = processes(config.device)
        if config.prompts_per_step % self.world.num_processes:
            raise ConfigError(f"prompts_per_step is {config.prompts_per_step} and there are "
                              f"{self.world.num_processes} processes: give a multiple, so that each has equally many "
                              f"whole groups")
        if config.variant != self.variant:
            raise ConfigError(f"the config asks for the augmentation {config.variant!r}, and {type(self).__name__} "
                              f"makes {self.variant!r}: use lab.variants.trainer_class(config)")
        self.config, self.records, self.policy, self.scoring = config, records, policy, scoring or score
        self.parameters = self.policy.trainable()
        self.optimizer = make_optimizer(config, self.parameters)
        absolute = config.difficulty_reference == "absolute"
        self.history = RewardHistory(config.history_window, config.absolute_reward if absolute else None)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.order = Order(len(records), config.seed)
        self.steps = self.position = self.rollouts = self.updates = self.skipped = 0
        self.skips: list[str] = []
        self.seconds: dict[str, float] = defaultdict(float)

    # --- the method --------------------------------------------------------------------------------------------------

    def step(self) -> dict:
        r"""Make one training step of `config.method` with difficulty-aware augmentation; return its metrics.

        1. Sample a group for each prompt and score it. 2. Measure each prompt's difficulty against the recent rewards
        (Eq. 9). 3. Replace the groups of hard and easy prompts by groups of augmented prompts, where one can be made.
        4. Update the weights several times on the same rollouts (Eq. 8): the first pass gives the old log-probs, the
        model without its adapter the reference's. Raises `NumericsError` naming the record.
        """
        config, started, counted = self.config, time.perf_counter(), (self.rollouts, self.skipped)
        self.seconds.clear()
        records, prompts = self.next_prompts()
        sampled = self.sample(records, prompts, config.group_size, "sample")                       # 1

        difficulties = [self.history.difficulty(group.mean) for group in sampled]                 # 2
        history_mean = None if math.isnan(self.history.mean) else self.history.mean
        for means in zip(*gather([group.mean for group in sampled])):  # of all processes, in the records' order
            for mean in means:
                self.history.push(mean)

        trained, counts = self.augment(sampled, difficulties)                                      # 3

        prompts, completions, rewards = stack(trained, self.policy.pad_id)                         # 4
        names = [group.record.record_id for group in trained]
        options = {"temperature": config.temperature, "micro_batch": config.micro_batch}
        with self.timed("reference"), torch.no_grad(), self.policy.reference():
            logp_ref = self.policy.logprobs(prompts, completions, **options)  # (B, G, T)
        logp_old, updates = None, []
        with self.timed("update"):
            for _ in range(config.inner_updates):
                logp = self.policy.logprobs(prompts, completions, **options)
                logp_old = logp.detach() if logp_old is None else logp_old
                batch = Batch(logp, logp_old, logp_ref, completions.mask.to(logp.device), rewards)
                loss = objective_loss(batch, config, names)
                loss.backward()
                norm = self.update_weights(names)
                updates.append(statistics(batch, config) | {"grad_norm": norm})
        self.steps += 1
        self.rollouts, self.skipped = (before + sum(gather(now - before)) for before, now in
                                       zip(counted, (self.rollouts, self.skipped)))
        self.seconds["total"] = time.perf_counter() - started
        return {"step": self.steps, "history_mean": history_mean, **step_metrics(sampled, trained, updates, counts),
                "rollouts": self.rollouts, "updates": self.updates, "records_tried": self.position,
                "skipped_clips": self.skipped,
                "seconds": {phase: round(seconds, 4) for phase, seconds in self.seconds.items()}}

    def update_weights(self, names: list[str]) -> float:
        r"""Clip the averaged gradient, take one optimizer step at the warm-up's rate, and return the norm before."""
        if self.world.num_processes > 1:
            average_gradients(self.parameters)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm))
        if not math.isfinite(norm):
            raise NumericsError(f"the gradient's norm is {norm} (records {', '.join(names)}): lower the learning rate")
        warmup = self.config.warmup_steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * (min(1.0, (self.steps + 1) / warmup) if warmup else 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        return norm

    def sample(self, records: Sequence[Record], prompts: Sequence[Prompt], size: int, phase: str) -> list[Group]:
        r"""Sample `size` completions of every prompt (for "dpo" from the reference) and score them by its record."""
        fixed = self.policy.reference() if self.config.method == "dpo" else contextlib.nullcontext()
        groups, batch = [], self.config.sample_batch or len(prompts)
        with self.timed(phase), fixed:
            rollouts = [sample_groups(self.policy, list(prompts[at:at + batch]), size, self.config.max_new_tokens,
                                      temperature=self.config.temperature, generator=self.generator)
                        for at in range(0, len(prompts), batch)]
        self.rollouts += len(prompts) * size
        places = [(rollout, b) for rollout in rollouts for b in range(len(rollout.texts))]
        for record, prompt, (rollout, b) in zip(records, prompts, places, strict=True):
            scores = [self.scoring(record, text, self.config.judge) for text in rollout.texts[b]]
            if not all(math.isfinite(s.total) for s in scores):
                raise NumericsError(f"the reward of record {record.record_id!r} is not finite: check its answer")
            tokens = [ids[mask].tolist() for ids, mask in zip(rollout.completions.ids[b], rollout.completions.mask[b])]
            groups.append(Group(record, prompt, tokens, rollout.texts[b], scores, rollout.finished[b].tolist()))
        return groups

    def augment(self, sampled: list[Group], difficulties: list[float]) -> tuple[list[Group], dict[str, int]]:
        r"""Return the groups to train on, and counts: hard and easy prompts, hints found, groups sampled again."""
        plans = [plan_augmentation(difficulty, self.config) for difficulty in difficulties]
        if all(plan.kind == "none" for plan in plans):
            return sampled, dict.fromkeys(("hard", "easy", "hints_found", "hints_missing", "augmented"), 0)
        prompts = dict(sorted((self.hinted_prompts(sampled, plans) | self.noisy_prompts(sampled, plans)).items()))
        hard = [i for i, plan in enumerate(plans) if plan.kind == "hint"]
        found = sum(i in prompts for i in hard)
        counts = {"hard": len(hard), "easy": len([plan for plan in plans if plan.kind in ("noise", "mask")]),
                  "hints_found": found, "hints_missing": len(hard) - found, "augmented": len(prompts)}
        again = self.sample([sampled[i].record for i in prompts], list(prompts.values()), self.config.group_size,
                            "sample_augmented") if prompts else []
        new = dict(zip(prompts, again))
        return [kept for i, own in enumerate(sampled)
                for kept in (self.combine(own, new[i], plans[i]) if i in new else [own])], counts

    def combine(self, own: Group, augmented: Group, plan: Augmentation) -> list[Group]:
        r"""Choose what is trained on for an augmented prompt: here the augmented group instead of the prompt's own."""
        return [augmented]

    def hinted_prompts(self, sampled: list[Group], plans: list[Augmentation]) -> dict[int, Prompt]:
        r"""Build prompts with a hint for those hard ones whose answer the policy can explain when it is shown.

        The hint is the beginning of the best trace that the policy itself writes with the answer in the prompt.
        """
        hard = {i: sampled[i] for i, plan in enumerate(plans) if plan.kind == "hint"}
        if not hard:
            return {}
        shown = [self.prompt(group.record, group.prompt.features, show_answer=True) for group in hard.values()]
        written = self.sample([group.record for group in hard.values()], shown, self.config.hint_traces,
                              "sample_traces")
        best = {i: best_trace(zip(group.texts, group.scores)) for i, group in zip(hard, written)}
        traces = {i: trace for i, trace in best.items() if trace is not None}
        shares = self.hint_shares(hard, traces, plans)
        return {i: self.hinted_prompt(hard[i], trace, shares[i]) for i, trace in traces.items()}

    def hinted_prompt(self, group: Group, trace: str, share: float) -> Prompt:
        r"""Build a group's prompt with the first `share` of the trace's words as a hint."""
        return self.prompt(group.record, group.prompt.features, hint=cut_hint(trace, share))

    def hint_shares(self, hard: Mapping[int, Group], traces: Mapping[int, str],
                    plans: list[Augmentation]) -> dict[int, float]:
        r"""Choose how much of each trace its hint reveals: here what the difficulty says."""
        return {i: plans[i].amount for i in traces}

    def noisy_prompts(self, sampled: list[Group], plans: list[Augmentation]) -> dict[int, Prompt]:
        r"""Build prompts with noise or masked frames for easy ones; a clip that has become unreadable is left out."""
        prompts = {}
        with self.timed("encode_augmented"):
            for i, plan in enumerate(plans):
                record, change = sampled[i].record, add_noise if plan.kind == "noise" else mask_frames
                if plan.kind not in ("noise", "mask") or (plan.kind == "mask" and record.clip is None):
                    continue  # of a picture no frame can be masked
                seed = augmentation_seed(self.config.seed, record.record_id, self.steps)
                try:
                    features = encode_record(self.policy, record, self.config,
                                             lambda frames: change(frames, plan.amount, seed))
                except ClipError as error:
                    self.skip(error)
                    continue
                prompts[i] = self.prompt(record, features)
        return prompts

    # --- records and clips -------------------------------------------------------------------------------------------

    def prompt(self, record: Record, features: Features, **extra) -> Prompt:
        r"""Build a record's prompt around what it shows; extra: hint or show_answer of `prompt_text`."""
        return self.policy.prompt(prompt_text(record, instruction=self.config.instruction, **extra), features)

    def next_prompts(self) -> tuple[list[Record], list[Prompt]]:
        r"""Take this process's next records and build their prompts. A broken clip is skipped with its question."""
        count, rank = self.world.num_processes, self.world.process_index
        if count > 1:
            self.generator.manual_seed(random.Random(f"{self.config.seed}/{self.steps}/{rank}").getrandbits(63))
        records, prompts, position = [], [], self.position + rank
        with self.timed("encode"):
            while len(records) < self.config.prompts_per_step // count:
                record = self.records[self.order[position]]
                position += count
                try:
                    prompts.append(self.prompt(record, encode_record(self.policy, record, self.config)))
                    records.append(record)
                except ClipError as error:
                    self.skip(error, position)
        self.position = max(gather(position - rank))
        return records, prompts

    def skip(self, error: ClipError, tried: int | None = None) -> None:
        r"""Count a broken clip. Raises `ClipError` once they are more than the share that the config tolerates."""
        self.skipped += 1
        if str(error) not in self.skips and len(self.skips) < NAMED_SKIPS:
            self.skips.append(str(error))
            log.warning("skipped: %s", error)
        share, tried = self.config.max_broken_share, tried or self.position
        if self.skipped > share * max(tried, LEAST_TRIES):
            raise ClipError(f"{self.skipped} of the {tried} records tried have clips that cannot be read, more than "
                            f"max_broken_share = {share}. The last: {error}")

    @property
    def done(self) -> bool:
        r"""Whether all steps are made, or the budget of rollouts is spent."""
        budget = self.config.rollout_budget
        return self.steps >= self.config.steps or (budget is not None and self.rollouts >= budget)

    # --- bookkeeping -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        r"""Add the seconds spent within it to a phase of this step."""
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started
