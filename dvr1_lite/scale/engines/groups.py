r"""Difficulty-aware augmentation on an engine's samples: what `Trainer.augment` and its variants do, between the
engine's scoring and its updates.

| `hint_update` | what a hard prompt's update uses |
| --- | --- |
| hinted | the hinted group instead of the prompt's own |
| unhinted | the hinted completions, on the prompt without the hint |
| mixed | the own group, up to half of it, incorrect ones, replaced by correct hinted ones |
| only-vanished | the hinted group, and only where the own group vanished |
| kept | both groups, the own and the hinted one |
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor

from ...advantages import vanished
from ...augmentation import (Augmentation, RewardHistory, add_noise, augmentation_seed, best_trace, cut_hint,
                             mask_frames, plan_augmentation)
from ...config import TrainConfig
from ...data import Record
from ...errors import ConfigError
from ...rewards import Score, score
from .rows import content

VARIANTS = ("hinted", "unhinted", "mixed", "only-vanished", "kept")


class Engine(Protocol):
    r"""What the augmentation needs of an engine. A sample is its object of one prompt and one completion."""

    def record(self, sample: Any) -> Record: ...

    def text(self, sample: Any) -> str: ...

    def with_prompt(self, sample: Any, text: str) -> Any: ...

    def with_frames(self, sample: Any, change: Callable[[Tensor], Tensor]) -> Any: ...

    def with_completion(self, sample: Any, other: Any) -> Any: ...

    def generate(self, samples: list[Any]) -> list[Any]: ...

    def gather(self, value: Any) -> list[Any]: ...


@dataclass(frozen=True)
class SampleGroup:
    r"""The samples of one prompt, with their texts and the project's scores against the record."""

    record: Record
    samples: list[Any]
    texts: list[str]
    scores: list[Score]

    @property
    def mean(self) -> float:
        r"""The mean reward as a share of the largest possible one."""
        return fmean(score.normalised for score in self.scores)


class Augmenter:
    r"""Replaces the groups of hard and easy prompts, or completions in them. Raises `ConfigError` for a variant that
    needs the project's own trainer."""

    def __init__(self, config: TrainConfig, engine: Engine):
        if config.variant not in VARIANTS:
            raise ConfigError(f"an engine does not make the augmentation {config.variant!r}: use one of "
                              f"{', '.join(VARIANTS)}, or the project's own trainer")
        self.config, self.engine = config, engine
        absolute = config.difficulty_reference == "absolute"
        self.history = RewardHistory(config.history_window, config.absolute_reward if absolute else None)

    def grouped(self, samples: Sequence[Any], size: int) -> list[SampleGroup]:
        r"""Divide samples into groups of `size` that follow one another, and score them."""
        groups = []
        for at in range(0, len(samples), size):
            own, record = list(samples[at:at + size]), self.engine.record(samples[at])
            texts = [self.engine.text(sample) for sample in own]
            groups.append(SampleGroup(record, own, texts, [score(record, text, self.config.judge) for text in texts]))
        return groups

    def augment(self, samples: Sequence[Any], step: int) -> tuple[list[Any], dict[str, int]]:
        r"""Return the samples to train on, and counts of hard and easy prompts and of augmented groups.

        samples: this process's, whole groups of `group_size`. Every process must call it at the same time.
        """
        config = self.config
        groups = self.grouped(samples, config.group_size)
        plans = [plan_augmentation(self.history.difficulty(group.mean), config) for group in groups]
        for means in self.engine.gather([group.mean for group in groups]):
            for mean in means:
                self.history.push(mean)
        if config.variant == "only-vanished":
            plans = [Augmentation() if plan.kind == "hint" and not has_vanished(group) else plan
                     for group, plan in zip(groups, plans)]
        prompts = dict(sorted((self.hinted(groups, plans) | self.changed(groups, plans, step)).items()))
        again = self.generate(list(prompts.values()), config.group_size, groups)
        new = dict(zip(prompts, again))
        kinds = [plan.kind for plan in plans]
        counts = {"hard": kinds.count("hint"), "easy": len(kinds) - kinds.count("hint") - kinds.count("none"),
                  "augmented": len(new)}
        return [sample for i, own in enumerate(groups)
                for group in (self.combine(own, new[i], plans[i]) if i in new else [own])
                for sample in group.samples], counts

    def generate(self, prompts: list[Any], size: int, groups: list[SampleGroup]) -> list[SampleGroup]:
        r"""Sample `size` completions of each prompt. All processes take part, because an engine may wait for all: one
        without a prompt writes a completion that is dropped."""
        wanted = [copy.deepcopy(prompt) for prompt in prompts for _ in range(size)]
        if not any(self.engine.gather(len(wanted))):
            return []
        spare = [] if wanted else [copy.deepcopy(groups[0].samples[0])]
        return self.grouped(self.engine.generate(wanted + spare)[:len(wanted)], size)

    def hinted(self, groups: list[SampleGroup], plans: list[Augmentation]) -> dict[int, Any]:
        r"""Build prompts with a hint for the hard ones: the beginning of the best trace written with the answer."""
        def prompt(i: int, **extra) -> Any:
            record = groups[i].record
            return self.engine.with_prompt(groups[i].samples[0], content(record, self.config.instruction, **extra))

        hard = [i for i, plan in enumerate(plans) if plan.kind == "hint"]
        written = self.generate([prompt(i, show_answer=True) for i in hard], self.config.hint_traces, groups)
        traces = {i: best_trace(zip(group.texts, group.scores)) for i, group in zip(hard, written)}
        return {i: prompt(i, hint=cut_hint(trace, plans[i].amount)) for i, trace in traces.items() if trace is not None}

    def changed(self, groups: list[SampleGroup], plans: list[Augmentation], step: int) -> dict[int, Any]:
        r"""Build prompts with noise or masked frames for the easy ones that have a clip."""
        prompts = {}
        for i, (group, plan) in enumerate(zip(groups, plans)):
            if plan.kind in ("noise", "mask") and group.record.clip is not None:
                seed = augmentation_seed(self.config.seed, group.record.record_id, step)
                change = add_noise if plan.kind == "noise" else mask_frames
                prompts[i] = self.engine.with_frames(
                    group.samples[0], lambda frames, change=change, amount=plan.amount, seed=seed:
                    change(frames, amount, seed))
        return prompts

    def combine(self, own: SampleGroup, new: SampleGroup, plan: Augmentation) -> list[SampleGroup]:
        r"""Choose what is trained on for an augmented prompt, by the variant; see this module's table."""
        variant = self.config.variant
        if plan.kind != "hint" or variant in ("hinted", "only-vanished"):
            return [new]
        if variant == "kept":
            return [own, new]
        places, others = range(len(own.samples)), range(len(new.samples))
        if variant == "mixed":
            places = [g for g in places if not own.scores[g].correct][:len(own.scores) // 2]
            others = [g for g in others if new.scores[g].correct]
        samples = list(own.samples)
        for place, other in zip(places, others):
            samples[place] = self.engine.with_completion(own.samples[place], new.samples[other])
        return [replace(own, samples=samples)]


def has_vanished(group: SampleGroup) -> bool:
    r"""Tell whether all rewards of a group agree."""
    return bool(vanished(torch.tensor([[score.total for score in group.scores]], dtype=torch.float64)))
