r"""Results in words, as commands and figures show them: counts, completions, tables of accuracy."""

import math
from collections.abc import Iterable, Mapping, Sequence

from scipy.stats import t as student_t

from .data import with_option
from .rewards import parse_completion


def plural(count: int, noun: str) -> str:
    r"""Return a count with its noun: "1 clip", "2 clips"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def ranges(numbers: Iterable[int]) -> str:
    r"""Return whole numbers in ascending order with runs joined: "1-3, 7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def completion_in_words(text: str, options: Sequence[str] = ()) -> tuple[str, str] | None:
    r"""Return a completion's reasoning and its answer, with its option's text and its time spans; None if malformed."""
    found = parse_completion(text)
    if not found.well_formed:
        return None
    spans = "".join(f", from {start} to {end} s" for start, end in found.spans or ())
    return found.think, with_option(found.answer, options) + spans


# --- tables ----------------------------------------------------------------------------------------------------------


def accuracy_table(summary: Mapping) -> str:
    r"""List accuracy in per cent with its interval, for all questions and by type, and what else was measured."""
    rows = [("all", summary), *summary["by_type"].items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {100 * cell['accuracy']:5.1f} % {in_per_cent(cell['ci95'])}  n = {cell['n']} on "
             f"{plural(cell['clips'], 'clip')}" for name, cell in rows]
    lines.append(f"format {100 * summary['format_rate']:.1f} %, {plural(summary['broken'], 'question')} with a broken "
                 f"clip")
    if "task_reward" in summary:
        lines.append(f"your reward {100 * summary['task_reward']:.1f} % {in_per_cent(summary['task_reward_ci95'])}, it "
                     f"failed for {plural(summary['reward_errors'], 'answer')}")
    if "mean_iou" in summary:
        recall = ", ".join(f"R@{m} {100 * share:.1f} %" for m, share in summary["recall"].items())
        lines.append(f"mean IoU {summary['mean_iou']:.3f}, {recall}")
    if "acc_gqa" in summary:
        lines.append(f"correct and grounded (Acc@GQA, IoP >= 0.5) {100 * summary['acc_gqa']:.1f} % "
                     f"{in_per_cent(summary['acc_gqa_ci95'])}, mean IoP {summary['mean_iop']:.3f}")
    return "\n".join(lines)


def run_in_words(summary: Mapping, out: str, figures: Sequence = ()) -> str:
    r"""Return what a complete training ends with: changes, costs, files, and the command to try next."""
    seconds = sum(summary["seconds"].get(name, 0) for name in ("total", "evaluation_before", "evaluation_after"))
    lines = [changes_table(summary),
             f"{plural(summary['rollouts'], 'rollout')}, {plural(summary['updates'], 'update')}, {seconds:.0f} s, peak "
             f"memory {summary['peak_memory_gb']:.1f} GB; everything is in {out}"]
    if summary.get("reward_errors"):
        lines.append(f"your reward failed for {plural(summary['reward_errors'], 'completion')} of the training, which "
                     f"got 0 for it")
    if summary["skipped_clips"]:
        lines.append(f"{plural(summary['skipped_clips'], 'prompt')} skipped, as the clip cannot be read; the first: "
                     f"{summary['skipped_examples'][0]}")
    if figures:
        lines.append("figures: " + ", ".join(map(str, figures)))
    if summary["step"]:
        lines.append(f"next: python -m dvr1_lite ask --adapter {out} --clip FILE.mp4 --question \"...\"")
    return "\n".join(lines)


def changes_table(summary: Mapping) -> str:
    r"""List accuracy before and after for each evaluation of a run, with the paired change, all in per cent."""
    lines = []
    for name, after in (summary["after"] or summary["before"]).items():
        if name not in summary["change"]:
            asked = f"n = {after['n']}, {plural(after['clips'], 'clip')}"
            lines.append(f"{name}: {100 * after['accuracy']:.1f} % ({asked})")
            continue
        lines.append(f"{name}: {change_in_words(summary['before'][name], after, summary['change'][name])}")
        own = summary.get("reward_change", {}).get(name)
        lines += [f"{name}, {line}" for line in reward_in_words(summary["before"][name], after, own)]
    return "\n".join(lines) or "no evaluation files: nothing was evaluated"


def change_in_words(before: Mapping, after: Mapping, change: Mapping) -> str:
    r"""Return accuracies before and after with their paired change, in per cent, and the rate of the format after."""
    return (f"{100 * before['accuracy']:.1f} -> {100 * after['accuracy']:.1f} %, change {100 * change['change']:+.1f} "
            f"{in_per_cent(change['ci95'], '+')} points (95 %, paired, by clip; n = {change['n']} on "
            f"{plural(change['clips'], 'clip')}), format {100 * after['format_rate']:.1f} %")


def reward_in_words(before: Mapping, after: Mapping, change: Mapping | None) -> list[str]:
    r"""Return a line with your reward before and after and its paired change, in per cent; [] without a change."""
    return [] if change is None else [
        f"your reward: {100 * before['task_reward']:.1f} -> {100 * after['task_reward']:.1f} %, change "
        f"{100 * change['change']:+.1f} {in_per_cent(change['ci95'], '+')} points"]


def in_per_cent(interval: Sequence[float], sign: str = "") -> str:
    r"""Return an interval of shares in per cent, "[12.0, 15.5]"; with sign "+", each end signed."""
    low, high = (100 * bound for bound in interval)
    return f"[{low:{sign}.1f}, {high:{sign}.1f}]"


def clips_needed(interval: Sequence[float], clips: int, reaches: Sequence[float] = (0.05, 0.02)) -> str:
    r"""Say about how many clips, with as many questions each, intervals of +- each of `reaches` (shares) would need.

    interval: at 95 %, from so many clips. The standard error falls with the root of their number.
    """
    if clips < 5:
        return f"{plural(clips, 'clip')} cannot tell how many are needed: evaluate on at least 20"
    reach = (interval[1] - interval[0]) / 2
    error = reach / float(student_t.ppf(0.975, clips - 1))
    counts = {goal: math.ceil(clips * (1.96 * error / goal) ** 2) for goal in reaches}
    needed = ", ".join(f"+-{100 * goal:.0f} points about {plural(count, 'clip')}" for goal, count in counts.items())
    return f"now +-{100 * reach:.1f} points on {clips} clips; with as many questions a clip, {needed}"
