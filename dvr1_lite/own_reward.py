r"""A reward of your own: a function in a file, in place of the built-in accuracy (Eq. 20) and IoU (Eq. 21).

    from dvr1_lite.rewards import parse_completion

    def close_enough(record, completion):  # a data.Record and the completion's text; returns 0.0 to 1.0
        answer = parse_completion(completion).answer
        return 1.0 if record.answer.lower() in answer.lower() else 0.0

The total reward is the built-in format reward (Eq. 19) plus this value, at most 2, so that difficulties compare with
those of built-in rewards. A malformed completion earns 0 on every part, and the function is not called for it. The
`accuracy` in metrics and evaluations stays that of the built-in judge: where the reward rises and the accuracy does
not, look for completions that exploit the reward. Hints are still cut from completions that the built-in judge calls
correct.

The file is code and runs with the rights of whoever starts it. Only a command line (`--reward FILE.py:function`) or a
call in Python can name it: a config file, a run's folder, a checkpoint or a data set that names one makes nothing run.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.util
import inspect
import json
import logging
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .data import Record
from .errors import ConfigError, RewardError
from .fields import LETTERS
from .files import write_atomically
from .rewards import Score, asks_span, score

log = logging.getLogger(__name__)

NAMED_ERRORS = 20  # failures that are logged
SAVED = "reward.json"  # in a run's folder: the function, its file's digest and its text
LONG_WORDS = 20_000  # of the very long completion that a reward is tried on


@dataclass(frozen=True)
class OwnScore(Score):
    r"""A score by a reward of your own: `task` is its value in [0, 1], `error` what went wrong ("": nothing).

    accuracy and iou are the built-in judge's; they are not part of the total.
    """

    task: float = 0.0
    error: str = ""


class OwnReward:
    r"""Scores completions with a function of your own; called like `rewards.score`.

    name: the function as FILE.py:function. digest: SHA-256 of the file as it was loaded. errors: "stop" raises
    `RewardError` where the function fails or returns no number in [0, 1]; "skip" gives that completion the task reward
    0, logs it and counts it in `failed`.
    """

    def __init__(self, function: Callable[[Record, str], float], name: str, source: bytes = b"", errors: str = "stop"):
        self.function, self.name, self.errors, self.failed = function, name, errors, 0
        self.text, self.digest = source.decode("utf-8", "replace"), hashlib.sha256(source).hexdigest()
        self._logged = 0

    def __call__(self, record: Record, text: str, judge: str = "strict") -> OwnScore:
        r"""Score a completion: format + your function's value, at most 2. Raises `RewardError` if errors is "stop"."""
        found = self.try_on(record, text, judge)
        if found.error:
            shown = text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"
            message = f"reward {self.name}, record {record.record_id!r}, completion {shown!r}: {found.error}"
            if self.errors == "stop":
                raise RewardError(f"{message}; correct the function, or set reward_errors: skip, which gives such "
                                  f"completions 0 and counts them")
            self.failed, self._logged = self.failed + 1, self._logged + 1
            if self._logged <= NAMED_ERRORS:
                log.warning("scored 0: %s", message)
        return found

    def try_on(self, record: Record, text: str, judge: str = "strict") -> OwnScore:
        r"""Score a completion; what goes wrong is in the score's `error`."""
        built_in, value, error = score(record, text, judge), 0.0, ""
        if built_in.format:
            try:
                value, error = checked(self.function(record, text))
            except (Exception, SystemExit) as problem:
                error = f"it raised {describe(problem)}"
                if isinstance(problem, (AttributeError, TypeError)):
                    error += "; its arguments are (record, completion), a Record and a text, in this order"
        return OwnScore(**asdict(built_in) | {"total": built_in.format + value, "maximum": 2.0, "task": value,
                                              "error": error})


def checked(returned: object) -> tuple[float, str]:
    r"""Return what a function returned as a number in [0, 1], or 0.0 and what is wrong with it."""
    try:
        value = math.nan if isinstance(returned, str) else float(returned)
    except (TypeError, ValueError, RuntimeError):  # the last from a tensor of several numbers
        value = math.nan
    if not 0.0 <= value <= 1.0:
        return 0.0, f"it returned {repr(returned)[:80]}, which is no number from 0 to 1"
    return value, ""


def describe(error: BaseException) -> str:
    r"""Return an exception in one line, with the line of the innermost file that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200] + place


# --- loading ---------------------------------------------------------------------------------------------------------


class SourceText(importlib.abc.SourceLoader):
    r"""Loads a module from exactly these bytes; cached bytecode, which could be of an earlier text, is not used."""

    def __init__(self, path: Path, source: bytes):
        self.path, self.source = path, source

    def get_filename(self, name: str) -> str:
        return str(self.path)

    def get_data(self, path: str) -> bytes:
        return self.source


def load_reward(name: str, errors: str = "stop") -> OwnReward:
    r"""Load the reward "FILE.py:function". This runs the file; its folder is added to the import path.

    Raises `ConfigError` for a missing file or function, one that cannot be called with (record, completion), or a file
    that fails while it is loaded.
    """
    file, _, function_name = name.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not function_name.isidentifier():
        raise ConfigError(f"reward is {name!r}: write it as FILE.py:function, such as my_rewards.py:close_enough")
    if not path.is_file():
        raise ConfigError(f"reward {name}: there is no file {file}; check the path, which starts from the current "
                          f"folder")
    source, folder = path.read_bytes(), str(path.resolve().parent)
    spec = importlib.util.spec_from_loader(f"own_reward_{path.stem}", SourceText(path, source))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that nothing of the environment is hidden
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"reward {name}: the file cannot be loaded ({describe(error)}); correct it") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items()
                 if inspect.isfunction(value) and value.__module__ == module.__name__]
        raise ConfigError(f"reward {name}: {file} has no function {function_name}; it has "
                          f"{', '.join(known) or 'none'}")
    try:
        if inspect.signature(function).bind("record", "completion").arguments.get("completion") == "record":
            raise TypeError("the arguments are swapped")
    except TypeError as error:
        raise ConfigError(f"reward {name}: it takes {inspect.signature(function)}; define it as def "
                          f"{function_name}(record, completion)") from error
    return OwnReward(function, name, source, errors)


def reward_for(config_name: str, named: str | None, errors: str, records: Sequence[Record]) -> OwnReward | None:
    r"""Load the reward of a config if the command line names it too, and try it on a correct completion of a record.

    config_name: the config's field `reward`; named: what the command line gives. None for the built-in rewards. Raises
    `ConfigError` for a reward that only a file names, `RewardError` if the function fails on that completion.
    """
    if not config_name and not named:
        return None
    if not named:
        raise ConfigError(f"the config file asks for the reward {config_name}, which is code: read it, then name it on "
                          f"the command line too, --reward {config_name}")
    loaded = load_reward(named, errors)
    for record in records[:1]:
        error = loaded.try_on(record, trial_completions(record, records)["correct"]).error
        if error:
            raise RewardError(f"reward {named} fails for a correct completion of record {record.record_id!r}: {error}; "
                              f"correct it, `python -m dvr1_lite reward` tries it on more")
    return loaded


# --- the reward of a run ---------------------------------------------------------------------------------------------


def save_reward(reward: OwnReward | None, run: Path) -> None:
    r"""Record in a run's folder which function scores it, with its file's digest and text."""
    if reward is not None:
        facts = {"reward": reward.name, "sha256": reward.digest, "text": reward.text}
        write_atomically(run / SAVED, json.dumps(facts, indent=1) + "\n")


def check_same_reward(reward: OwnReward | None, named: str, run: Path) -> None:
    r"""Raise `ConfigError` if a reward is not the one that the config names, or a run's folder records another one."""
    if (reward.name if reward else "") != named:
        raise ConfigError(f"reward is {named!r} in the config, and scoring is {reward.name if reward else None!r}: "
                          f"pass scoring=load_reward(config.reward), which runs that file, or leave both out")
    if not (run / "config.yaml").exists():
        return
    path = run / SAVED
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    now, before = reward.name.rpartition(":")[2] if reward else "", saved.get("reward", "").rpartition(":")[2]
    if now != before:
        raise ConfigError(f"{run} holds a run with the reward {saved.get('reward', 'built in')!r}, not "
                          f"{reward.name if reward else 'built in'!r}: resume it with the same one, or give another "
                          f"--out")
    if reward is not None and saved["sha256"] != reward.digest:
        raise ConfigError(f"{reward.name.rpartition(':')[0]} has changed since {run} began: put the file back (its "
                          f"text is in {path}), or give another --out")


# --- a trial ---------------------------------------------------------------------------------------------------------


def trial_completions(record: Record, records: Sequence[Record] = ()) -> dict[str, str]:
    r"""Write five completions for a record: correct, incorrect, malformed, empty and very long (and correct).

    records: others, of which the first with another answer gives the incorrect one where there are no options.
    """
    def written(answer: str, think: str = "I look at the clip and think.", spans=record.spans) -> str:
        glue = f" <glue> [{spans[0]}] </glue>" if asks_span(record) else ""
        return f"<think> {think} </think> <answer> {answer} </answer>{glue}"

    others = LETTERS[:len(record.options)] if record.options else [other.answer for other in records]
    incorrect = next((other for other in others if other != record.answer), f"not {record.answer}")
    return {"correct": written(record.answer), "incorrect": written(incorrect, spans=((0.0, 0.001),)),
            "malformed": f"The answer is {record.answer}.", "empty": "",
            "very long": written(record.answer, " ".join(["again"] * LONG_WORDS))}


def trial_table(scores: dict[str, OwnScore]) -> str:
    r"""Return a trial as text: a line a completion with format, your value, the total and the built-in accuracy."""
    lines = [f"{'completion':<12}{'format':>8}{'your reward':>13}{'total of 2':>12}{'built-in accuracy':>19}"]
    for kind, one in scores.items():
        value = "failed" if one.error else f"{one.task:.3f}" if one.format else "not called"
        lines.append(f"{kind:<12}{one.format:>8.0f}{value:>13}{one.total:>12.3f}{one.accuracy:>19.3f}")
    lines += [f"{kind}: {one.error}" for kind, one in scores.items() if one.error]
    if not scores["correct"].error and scores["correct"].task <= scores["incorrect"].task:
        lines.append("note: the correct completion earns no more than the incorrect one; such a reward does not teach "
                     "the answer")
    return "\n".join(lines)


def try_on_types(reward: OwnReward, records: Sequence[Record]) -> tuple[str, bool]:
    r"""Try a reward on the first record of each problem type; return the tables, and whether it never failed."""
    tables, sound = [], True
    for record in {record.problem_type: record for record in reversed(records)}.values():
        scores = {kind: reward.try_on(record, text) for kind, text in trial_completions(record, records).items()}
        sound = sound and not any(one.error for one in scores.values())
        tables.append(f"record {record.record_id} ({record.problem_type}), answer {record.answer_in_words}\n"
                      f"{trial_table(scores)}")
    return "\n\n".join(tables), sound
