r"""A pilot before a training: a few completions for some prompts tell whether the run can learn, how long it takes, and
what should be changed first.

`pilot` measures and judges by `RULES`, `report` puts it in words, `recommended` applies `configs/recommendation.yaml`.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
import yaml
from tqdm import tqdm

from ..config import CONFIGS, TrainConfig, to_yaml
from ..data import Record
from ..errors import ClipError, ConfigError
from ..evaluation import controls, limited, mean_interval
from ..files import write_atomically
from ..own_reward import OwnReward, OwnScore
from ..policy import encode_record
from ..rewards import Score
from ..run import load_policy, peak_memory_gb
from ..training import Group, Trainer
from ..words import in_per_cent, plural
from . import memory

CONTROL_SAMPLES = 4  # completions of a prompt with a changed clip
LARGE = 100e6  # parameters from which the values for large models apply
# The thresholds of the verdict, as shares; judgements, not measurements: below them a run spends most of its time on
# groups from which nothing is learned.
TRUNCATED, FORMAT, SUCCESS, SPREAD = 0.25, 0.5, 0.05, 0.2
DECIDING = ("truncated", "format", "success", "spread", "unsolved")  # the shares that rules look at


# --- the verdict -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    r"""A verdict, when it applies (in words and as a function of the deciding shares), and what to do then."""

    verdict: str
    when: str
    applies: Callable[[Mapping[str, float]], bool]
    advice: str


FEW = f"fewer than {100 * SPREAD:.0f} % of the groups have different rewards, and"
RULES = (  # the first that applies is the verdict
    Rule("fix or leave out the broken clips first", "a larger share of the clips than max_broken_share, which ends a "
         "run, cannot be read", lambda share: share["broken"] > share["max_broken_share"],
         "python -m dvr1_lite check --data FILE names all of them"),
    Rule("fix the prompt or format first", f"more than {100 * TRUNCATED:.0f} % of the completions reach max_new_tokens",
         lambda share: share["truncated"] > TRUNCATED,
         "raise --max-new-tokens, or ask for shorter reasoning in --instruction"),
    Rule("fix the prompt or format first", f"fewer than {100 * FORMAT:.0f} % of the completions are well formed",
         lambda share: share["format"] < FORMAT,
         "describe the form <think>...</think><answer>...</answer> in --instruction; if that is not enough, fine-tune "
         "the model on a few hundred examples of the form (SFT)"),
    Rule("SFT first", f"fewer than {100 * SUCCESS:.0f} % of the completions succeed",
         lambda share: share["success"] < SUCCESS,
         "fine-tune the model on solved examples, or ask questions that it can sometimes answer"),
    Rule("use easier questions", f"{FEW} more of the others fail than succeed",
         lambda share: share["spread"] < SPREAD and share["unsolved"] > 0,
         "give options, divide the questions into parts, or raise --group-size"),
    Rule("use harder questions", f"{FEW} at least as many of the others succeed as fail",
         lambda share: share["spread"] < SPREAD,
         "leave out the questions that every completion answers, or ask them without options"),
    Rule("train", f"at least {100 * SPREAD:.0f} % of the groups have different rewards, and no other rule applies",
         lambda share: True, "python -m dvr1_lite train with this config"))
NO_VIDEO = ("the answers do not measurably depend on the video (the interval with another clip holds 0): look whether "
            "your questions can be answered without it")
DISAGREE = ("the controls disagree: the interval with another clip holds 0, but the own clip is better than {}; raise "
            "--prompts, and look whether your clips resemble each other")
GUESSED = ("the success is not measurably above that of guessing an option: look whether the frames show what you ask "
           "(check --out DIR)")
MERGE_FIRST = "merge the adapter (python -m dvr1_lite merge), then give the merged folder as --model"


def judge(found: Mapping) -> list[Rule]:
    r"""Return the first rule that applies to the measured shares, then those that apply with one of `DECIDING` at an
    end of its 95 % interval; if their verdicts differ, the pilot was too small to decide."""
    measured = {name: found[name]["rate"] for name in DECIDING} | {
        "broken": len(found["broken"]) / (len(found["broken"]) + found["prompts"]),
        "max_broken_share": found["max_broken_share"]}
    moved = [measured | {name: end} for name in DECIDING for end in found[name]["ci95"]]
    return list(dict.fromkeys(next(rule for rule in RULES if rule.applies(share)) for share in [measured, *moved]))


# --- what is measured ------------------------------------------------------------------------------------------------


def succeeded(one: Score) -> bool:
    r"""Tell whether a completion counts as a success: well formed, and accuracy (or your reward) at least one half."""
    return one.format == 1.0 and (one.task if isinstance(one, OwnScore) else one.accuracy) >= 0.5


def expected_vanishing(rewards: Sequence[Sequence[float]], group_size: int) -> float | None:
    r"""Estimate the probability that a group of G has equal rewards, the mean over prompts, from n rewards of each.

    $\sum_v \binom{k_v}{G} / \binom{n}{G}$, with $k_v$ rewards of the value v, is an unbiased estimate of
    $\sum_v p_v^G$; for two values that is $p^G + (1-p)^G$ (Eq. 01.3). None where G > n.
    """
    if group_size > len(rewards[0]):
        return None
    return fmean(sum(math.comb(k, group_size) for k in Counter(values).values()) / math.comb(len(values), group_size)
                 for values in rewards)


def ask(trainer: Trainer, name: str, records: Sequence[Record], size: int, shown: Sequence[Record] | None = None,
        change: Callable | None = None, progress: bool = False) -> tuple[list[Group], list[str]]:
    r"""Sample `size` completions of each record's question, batch by batch; return the groups, and the errors of clips
    that cannot be read.

    shown: whose clips are shown instead. change: what is done to their frames. The trainer counts the seconds.
    """
    groups, broken, batch = [], [], trainer.config.prompts_per_step
    pairs = list(zip(records, shown or records))
    for at in tqdm(range(0, len(pairs), batch), desc=name, unit="batch", **({} if progress else {"disable": True})):
        asked, prompts = [], []
        with trainer.timed("clips"):
            for record, seen in pairs[at:at + batch]:
                try:
                    features = encode_record(trainer.policy, seen, trainer.config, change)
                    prompts.append(trainer.prompt(record, features))
                    asked.append(record)
                except ClipError as error:
                    broken.append(str(error))
        groups += trainer.sample(asked, prompts, size, name) if prompts else []
    if not groups:
        raise ClipError(f"no clip of {plural(len(pairs), 'record')} can be read. The first error: {broken[0]}")
    return groups, broken


def pilot(config: TrainConfig, records: Sequence[Record], *, prompts: int = 50, completions: int = 8,
          trainer: type[Trainer] = Trainer, scoring: OwnReward | None = None, questions: int = 0,
          adapter: str | None = None, progress: bool = False) -> dict:
    r"""Measure what a training with this config would meet, and judge it by `RULES`; return JSON values.

    prompts: how many records are drawn. completions: of each. trainer: the class that makes the measured step.
    questions: of all evaluations, for the hours. adapter: the folder of trained ones; None: new ones, which change
    nothing. Intervals are at 95 %, clustered by clip. Raises `UserError`.
    """
    def timed_reward(*arguments):
        with made.timed("reward"):
            return scoring(*arguments)

    if prompts < 1 or completions < 2:
        raise ConfigError(f"a pilot of {prompts} prompts with {completions} completions: give at least 1 and 2")
    tolerant = replace(config, max_broken_share=0.999)  # broken clips end a run, not its pilot
    made = trainer(tolerant, records, load_policy(config, adapter), timed_reward if scoring else None)
    groups, broken = ask(made, "completions", limited(records, prompts), completions, progress=progress)
    found = {"model": config.model, "adapter": adapter, "data": config.train_file, "records": len(records),
             "prompts": len(groups), "broken": broken, "completions": completions, "video": {},
             "reward": scoring.name if scoring else "", "max_broken_share": config.max_broken_share,
             **{name: getattr(config, name) for name in ("group_size", "steps", "prompts_per_step")}}
    found |= describe(groups, config.group_size)
    filmed = [group for group in groups if group.record.clip is not None]
    asked = [group.record for group in filmed]
    for name, (shown, change) in controls(asked, config.seed).items() if asked else ():
        changed, _ = ask(made, name, asked, CONTROL_SAMPLES, shown, change, progress)
        found["video"][name] = compare(filmed, changed)
    found["seconds"] = dict(made.seconds)
    found |= measure_step(made, groups, questions)
    rules, another, least = judge(found), found["video"].get("another clip"), found["success"]["ci95"][0]
    chosen = found["guessing"]["n"] == len(groups) and not scoring
    better = " and ".join(name for name, facts in found["video"].items() if facts["ci95"][0] > 0)
    notes = {DISAGREE.format(better) if better else NO_VIDEO: another is not None and another["ci95"][0] <= 0 < least,
             GUESSED: chosen and least <= found["guessing"]["rate"]}
    advice = MERGE_FIRST if adapter and rules[0] is RULES[-1] else rules[0].advice
    return found | {"notes": [note for note, holds in notes.items() if holds], "advice": advice, "rule": rules[0].when,
                    "verdict": rules[0].verdict, "possible": list(dict.fromkeys(rule.verdict for rule in rules))}


def measure_step(trainer: Trainer, groups: Sequence[Group], questions: int) -> dict:
    r"""Make one training step; return its seconds, the hours of the run, and memory measured and predicted.

    The reward history is filled with the pilot's groups first, so that the step augments as one within the run does.
    """
    config, answered = trainer.config, sum(len(group.texts) for group in groups)
    reward = trainer.seconds.get("reward", 0.0) / trainer.rollouts  # seconds of one completion
    answer = trainer.seconds["completions"] / answered + reward
    for group in itertools.islice(itertools.cycle(groups), config.history_window):
        trainer.history.push(group.mean)
    step = trainer.step()
    text = max(len(group.prompt.input_ids) - sum(len(part.embeds) for part in group.prompt.features.parts)
               for group in groups)
    predicted = memory.predict(config, image=any(group.record.image for group in groups), text_tokens=text)
    measured = torch.cuda.max_memory_allocated() / memory.GB if predicted.on_gpu else peak_memory_gb()
    answers = questions * config.eval_samples * (1 + config.eval_before)
    return {"step": {name: step[name] for name in ("seconds", "augmented")}, "reward_seconds": reward,
            "hours": {"steps": config.steps * step["seconds"]["total"] / 3600, "evaluation": answers * answer / 3600},
            "memory_gb": {"measured": measured, "predicted": predicted.peak / memory.GB, "on_gpu": predicted.on_gpu}}


def describe(groups: Sequence[Group], group_size: int) -> dict:
    r"""Compute what groups of n completions tell: rates with intervals, spread of rewards, lengths, two completions."""
    clips, count = [group.record.clip_id for group in groups], len(groups[0].scores)
    successes = [sum(map(succeeded, group.scores)) for group in groups]
    rewards = [[round(one.total, 6) for one in group.scores] for group in groups]
    spread = [float(len(set(values)) > 1) for values in rewards]
    solved = [float(k == count) * (1 - different) for k, different in zip(successes, spread)]
    failed = [1 - different - one for different, one in zip(spread, solved)]
    shares = {"format": [fmean(one.format for one in group.scores) for group in groups],
              "success": [k / count for k in successes],
              "truncated": [1 - fmean(group.finished) for group in groups],
              "spread": spread, "all_correct": solved, "all_incorrect": failed,
              "unsolved": [no - yes for yes, no in zip(solved, failed)]}
    rates = {name: {"rate": fmean(values), "ci95": list(mean_interval(values, clips, -(name == "unsolved"), 1.0))}
             for name, values in shares.items()}
    options = [len(group.record.options) for group in groups if group.record.options]
    malformed = next((text for group in groups for text, one in zip(group.texts, group.scores) if not one.format), None)
    return rates | {
        "vanishing_expected": expected_vanishing(rewards, group_size),
        "tokens": fmean(len(tokens) for group in groups for tokens in group.tokens),
        "guessing": {"rate": fmean(1 / k for k in options) if options else 0.0, "n": len(options)},
        "examples": {"first": groups[0].texts[0], "malformed": malformed}}


def compare(own: Sequence[Group], changed: Sequence[Group]) -> dict:
    r"""Compute the success with a changed clip, and the paired difference by which the own clip is better."""
    means = [[fmean(map(succeeded, group.scores)) for group in groups] for groups in (own, changed)]
    differences = [a - b for a, b in zip(*means)]
    clips = [group.record.clip_id for group in own]
    return {"success": fmean(means[1]), "difference": fmean(differences),
            "ci95": list(mean_interval(differences, clips, -1.0, 1.0)), "n": len(own)}


# --- in words --------------------------------------------------------------------------------------------------------


def report(found: Mapping) -> str:
    r"""Return what a pilot found as text, with the verdict last."""
    share = lambda value: f"{100 * value:.0f} %"
    rate = lambda name: f"{share(found[name]['rate'])} {in_per_cent(found[name]['ci95'])}"
    expected = ("not estimated: --completions is below the group size" if found["vanishing_expected"] is None else
                f"{share(found['vanishing_expected'])} expected from the prompts' rewards")
    chosen, hours, memory_gb = found["guessing"], found["hours"], found["memory_gb"]
    guessing = f"; guessing an option: {share(chosen['rate'])} (of {plural(chosen['n'], 'prompt')} with options)"
    phases = found["seconds"] | {"one training step": found["step"]["seconds"]["total"]}
    rows = {"well formed": rate("format"), "success": rate("success") + guessing * (chosen["n"] > 0),
            "groups": f"{rate('spread')} have different rewards; in {share(found['all_correct']['rate'])} they are "
                      f"equal and all succeed, in {share(found['all_incorrect']['rate'])} equal and all fail",
            f"vanishing, G = {found['group_size']}": f"{expected} (Eq. 01.3)",
            "length": f"{found['tokens']:.0f} tokens, {rate('truncated')} reach the limit"}
    if found["broken"]:
        rows["unreadable clips"] = (f"{len(found['broken'])} of {found['prompts'] + len(found['broken'])}; a run ends "
                                    f"above max_broken_share = {share(found['max_broken_share'])}")
    rows |= {name: f"{share(facts['success'])} success; the own clip adds {100 * facts['difference']:+.0f} points "
                   f"{in_per_cent(facts['ci95'], '+')}" for name, facts in found["video"].items()}
    if found["reward"]:
        rows["your reward"] = f"at least 0.5 counts as a success; {found['reward_seconds']:.3f} s a completion"
    rows |= {"seconds": ", ".join(f"{name} {value:.1f}" for name, value in phases.items()),
             "the run": f"{plural(found['steps'], 'step')} of {plural(found['prompts_per_step'], 'prompt')}, "
                        f"{found['steps'] * found['prompts_per_step'] / found['records']:.1f} passes over "
                        f"{plural(found['records'], 'record')}",
             "time": f"{duration(hours['steps'])} of steps and {duration(hours['evaluation'])} of evaluation; from one "
                     f"step, in which {plural(found['step']['augmented'], 'prompt')} got a hint or noise",
             "memory": f"{memory_gb['measured']:.1f} GB of "
                       + ("tensors on the GPU" if memory_gb["on_gpu"] else "the process, libraries included")
                       + f"; predicted {memory_gb['predicted']:.1f} GB of tensors"}
    adapter = f" with the adapter {found['adapter']}" if found["adapter"] else ""
    return "\n".join([f"{plural(found['prompts'], 'prompt')}, {plural(found['completions'], 'completion')} each, of "
                      f"{Path(found['model']).name}{adapter} on {Path(found['data']).name}",
                      *(f"  left out: {error}" for error in found["broken"][:5]),
                      *(f"{name:<22}{text}" for name, text in rows.items()),
                      *(f"a completion, {name}: {' '.join(text.split())[:300]!r}"
                        for name, text in found["examples"].items() if text is not None),
                      *(f"note: {note}" for note in found["notes"]), verdict(found)])


def verdict(found: Mapping) -> str:
    r"""Return the verdict with its reason and what to do next, or between which verdicts a pilot has not decided."""
    if len(found["possible"]) == 1:
        return f"verdict: {found['verdict']}, because {found['rule']}\nnext: {found['advice']}"
    *others, last = found["possible"]
    more = "raise --prompts" if found["prompts"] + len(found["broken"]) < found["records"] else "ask about more clips"
    return (f"verdict: undecided between {', '.join(others)} and {last}, as the intervals show: {more}\nthe measured "
            f"shares alone say: {found['verdict']}, because {found['rule']}\nnext, if you cannot: {found['advice']}")


def duration(hours: float) -> str:
    r"""Return a time as "40 s", "12 min" or "3.5 h"."""
    seconds = 3600 * hours
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{hours:.1f} h"


# --- the recommendation ----------------------------------------------------------------------------------------------


def recommendation(large: bool = False) -> dict[str, dict]:
    r"""Return `configs/recommendation.yaml`: for each field its `value` (that for large models), `status`, `reason`."""
    entries = yaml.safe_load((CONFIGS / "recommendation.yaml").read_text(encoding="utf-8"))
    return {name: {"value": entry.get("large", entry["value"]) if large else entry["value"],
                   "status": entry["status"], "reason": entry["reason"]} for name, entry in entries.items()}


def recommended(config: TrainConfig) -> tuple[TrainConfig, dict[str, dict]]:
    r"""Return the config with the recommended settings for its model, and the recommendation."""
    shape = memory.architecture_of(config.model)
    advice = recommendation(shape.matrices + shape.embeddings + shape.vision > LARGE)
    return replace(config, **{name: entry["value"] for name, entry in advice.items()}), advice


def write_config(path: Path, config: TrainConfig, advice: Mapping[str, Mapping]) -> str:
    r"""Write a config with the reason for each recommended setting at its top; return the command that trains with it.
    It saves at least five checkpoints.

    Raises `UserError` if it cannot be written.
    """
    often = max(1, min(config.save_every, config.steps // 5))
    head = [f"# {name}: {entry['value']} ({entry['status']}): {entry['reason']}\n" for name, entry in advice.items()]
    write_atomically(path, "# Written by `python -m dvr1_lite pilot`; the settings that it recommends, and why:\n"
                     + "".join(head) + "\n" + to_yaml(replace(config, out=f"runs/{path.stem}", save_every=often)))
    return f"python -m dvr1_lite train --config {path}" + (f" --reward {config.reward}" if config.reward else "")
