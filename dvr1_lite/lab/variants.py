r"""Variants of the augmentation beyond the paper's: subclasses of `Trainer` that change one choice each.

| name | what a hard prompt's update uses | chosen by |
| --- | --- | --- |
| hinted | the hinted group instead of the prompt's own (our reading of figure 2) | `hint_update: hinted` |
| unhinted | the hinted completions, on the prompt without the hint | `hint_update: unhinted` |
| mixed | the own group, up to half of it, incorrect ones, replaced by correct hinted ones | `hint_update: mixed` |
| only-vanished | the hinted group, and only where the own group vanished | `hint_update: only-vanished` |
| kept | both groups, the own and the hinted one | `hint_update: kept` |
| probed | the hinted group, its hint just long enough to succeed sometimes | `hint_probe: true` |
| resample | the control: the same prompt, sampled again | `augment: resample` |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean

from ..augmentation import Augmentation
from ..config import TrainConfig
from ..errors import ConfigError
from ..policy import Prompt
from ..training import Group, Trainer

HINT_PROBES = (0.15, 0.3, 0.45, 0.6)  # shares that are tried, the smallest first
PROBE_SUCCESS = 0.3  # the share of correct answers at which a probe stops: neither hopeless nor given away


class Unhinted(Trainer):
    r"""Train on what was written with the hint as if it had been written without."""

    variant = "unhinted"

    def combine(self, own: Group, augmented: Group, plan: Augmentation) -> list[Group]:
        return [replace(augmented, prompt=own.prompt) if plan.kind == "hint" else augmented]


class Mixed(Trainer):
    r"""Keep the own group; correct completions written with the hint replace incorrect ones, at most half of it."""

    variant = "mixed"

    def combine(self, own: Group, augmented: Group, plan: Augmentation) -> list[Group]:
        return [with_successes(own, augmented) if plan.kind == "hint" else augmented]


class OnlyVanished(Trainer):
    r"""Give hints only to prompts whose own group vanished; a group with a lucky success is kept."""

    variant = "only-vanished"

    def hinted_prompts(self, sampled: list[Group], plans: list[Augmentation]) -> dict[int, Prompt]:
        plans[:] = [Augmentation() if plan.kind == "hint" and not vanished(group) else plan
                    for group, plan in zip(sampled, plans)]
        return super().hinted_prompts(sampled, plans)


class Kept(Trainer):
    r"""Train on the own group of a hard prompt too, not only on the hinted one."""

    variant = "kept"

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        if self.world.num_processes > 1:  # the mean of their gradients would weigh groups differently
            raise ConfigError("hint_update: kept gives processes different numbers of groups: use one process, or "
                              "hint_update: mixed")

    def combine(self, own: Group, augmented: Group, plan: Augmentation) -> list[Group]:
        return [own, augmented] if plan.kind == "hint" else [augmented]


class Probed(Trainer):
    r"""Choose the hint's length by trying: the smallest share with which enough completions are correct."""

    variant = "probed"

    def hint_shares(self, hard: Mapping[int, Group], traces: Mapping[int, str],
                    plans: list[Augmentation]) -> dict[int, float]:
        shares, waiting = dict.fromkeys(traces, HINT_PROBES[-1]), list(traces)
        for share in HINT_PROBES[:-1]:
            if not waiting:
                break
            prompts = [self.hinted_prompt(hard[i], traces[i], share) for i in waiting]
            probes = self.sample([hard[i].record for i in waiting], prompts, self.config.hint_traces, "sample_probes")
            enough = [i for i, probe in zip(waiting, probes)
                      if fmean(score.correct for score in probe.scores) >= PROBE_SUCCESS]
            shares |= dict.fromkeys(enough, share)
            waiting = [i for i in waiting if i not in enough]
        return shares


class Resample(Trainer):
    r"""The control: sample hard and easy prompts again as they are, so that only the second draw remains."""

    variant = "resample"

    def hinted_prompts(self, sampled: list[Group], plans: list[Augmentation]) -> dict[int, Prompt]:
        return {i: sampled[i].prompt for i, plan in enumerate(plans) if plan.kind == "hint"}

    def noisy_prompts(self, sampled: list[Group], plans: list[Augmentation]) -> dict[int, Prompt]:
        return {i: sampled[i].prompt for i, plan in enumerate(plans) if plan.kind in ("noise", "mask")}

    def augment(self, sampled: list[Group], difficulties: list[float]) -> tuple[list[Group], dict[str, int]]:
        groups, counts = super().augment(sampled, difficulties)
        return groups, counts | {"hints_found": 0, "hints_missing": 0}


VARIANTS = {kind.variant: kind for kind in (Trainer, Unhinted, Mixed, OnlyVanished, Kept, Probed, Resample)}


def trainer_class(config: TrainConfig) -> type[Trainer]:
    r"""Return the trainer that makes the augmentation which the config asks for."""
    return VARIANTS[config.variant]


def vanished(group: Group) -> bool:
    r"""Tell whether all rewards of a group agree, so that every advantage is 0."""
    totals = [score.total for score in group.scores]
    return max(totals) - min(totals) <= 1e-6


def with_successes(own: Group, hinted: Group) -> Group:
    r"""Replace up to half of a group's completions, incorrect ones, by correct ones of the hinted group."""
    places = [g for g, score in enumerate(own.scores) if not score.correct][:len(own.scores) // 2]
    successes = [g for g, score in enumerate(hinted.scores) if score.correct]
    parts = {name: list(getattr(own, name)) for name in ("tokens", "texts", "scores", "finished")}
    for place, success in zip(places, successes):
        for name, values in parts.items():
            values[place] = getattr(hinted, name)[success]
    return replace(own, **parts)
