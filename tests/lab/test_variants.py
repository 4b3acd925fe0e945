r"""The variants of the augmentation, on groups written by hand: what each trains on for a hard and an easy prompt."""

from types import SimpleNamespace

import pytest

from dvr1_lite.augmentation import Augmentation
from dvr1_lite.config import make_config
from dvr1_lite.errors import ConfigError
from dvr1_lite.lab.variants import VARIANTS, Kept, Mixed, OnlyVanished, Resample, Unhinted, trainer_class, vanished
from dvr1_lite.rewards import Score
from dvr1_lite.training import Group, Trainer

HINT, NOISE, NOTHING = Augmentation("hint", 0.3), Augmentation("noise", 0.1), Augmentation()


def group(prompt: str, accuracies: list[float]) -> Group:
    r"""Build a group whose completions have these accuracies; a completion's text names its prompt and place."""
    places = range(len(accuracies))
    return Group(None, prompt, [[place] for place in places], [f"{prompt} {place}" for place in places],
                 [Score(1.0, accuracy, None, 1.0 + accuracy, 2.0) for accuracy in accuracies], [True] * len(accuracies))


OWN, HINTED = group("own", [0, 0, 1, 0]), group("hinted", [1, 0, 1, 1])


@pytest.mark.parametrize(("kind", "trained"), [
    (Trainer, [("hinted", ["hinted 0", "hinted 1", "hinted 2", "hinted 3"])]),
    (Unhinted, [("own", ["hinted 0", "hinted 1", "hinted 2", "hinted 3"])]),
    (Mixed, [("own", ["hinted 0", "hinted 2", "own 2", "own 3"])]),  # half of four, incorrect ones
    (Kept, [("own", ["own 0", "own 1", "own 2", "own 3"]),
            ("hinted", ["hinted 0", "hinted 1", "hinted 2", "hinted 3"])])])
def test_what_a_hinted_group_is_trained_on(kind, trained):
    trainer = kind.__new__(kind)
    assert [(made.prompt, made.texts) for made in trainer.combine(OWN, HINTED, HINT)] == trained
    assert trainer.combine(OWN, HINTED, NOISE) == [HINTED]  # an easy prompt's group is replaced by all of them


def test_only_vanished_groups_get_a_hint(monkeypatch):
    monkeypatch.setattr(Trainer, "hinted_prompts", lambda self, sampled, plans: {
        i: sampled[i].prompt for i, plan in enumerate(plans) if plan.kind == "hint"})
    sampled, plans = [OWN, group("lost", [0, 0]), group("easy", [1, 1])], [HINT, HINT, NOISE]
    assert [vanished(one) for one in sampled] == [False, True, True]
    assert OnlyVanished.__new__(OnlyVanished).hinted_prompts(sampled, plans) == {1: "lost"}
    assert plans == [NOTHING, HINT, NOISE]  # so that the counts know


def test_the_control_samples_hard_and_easy_prompts_again_unchanged():
    trainer, plans = Resample.__new__(Resample), [HINT, NOISE, NOTHING]
    sampled = [OWN, HINTED, OWN]
    assert trainer.hinted_prompts(sampled, plans) | trainer.noisy_prompts(sampled, plans) == {0: "own", 1: "hinted"}


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_the_config_chooses_the_variant(name):
    changes = {"resample": {"augment": "resample"}, "probed": {"hint_probe": True}}.get(name, {"hint_update": name})
    assert trainer_class(make_config(changes)) is VARIANTS[name] and VARIANTS[name].variant == name


def test_keeping_both_groups_is_refused_with_several_processes(monkeypatch):
    monkeypatch.setattr(Trainer, "__init__", lambda self: setattr(self, "world", SimpleNamespace(num_processes=2)))
    with pytest.raises(ConfigError, match="use one process, or hint_update: mixed"):
        Kept()
