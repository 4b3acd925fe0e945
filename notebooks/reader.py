r"""Predictions, quiz questions and exercises for the reader of a notebook, looked up by name.

    predict("01-a", None)               # replace None by your guess
    quiz("refresher", {"q1": None})     # replace None by your answer
    exercise("01.1", my_function)       # a value, several values in a tuple, or a function

Answers and reasons are in `answers.json`, encoded, so that nobody reads one by accident; the checks of the exercises
are in `exercises.py`, one function for each (`exercise_01_1`). A missing or incorrect attempt never raises: a notebook
runs to its end either way. Authors and instructors use the command line:

    python notebooks/reader.py add 01-a 2.65 "The square root of 7." --tolerance 0.02
    python notebooks/reader.py show 01
"""

import argparse
import base64
import functools
import importlib
import inspect
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ANSWERS = Path(__file__).with_name("answers.json")


class NotAttempted(Exception):
    """Raised inside a check when the reader's function still returns None."""


def load_answers() -> dict[str, dict]:
    """Return `answer`, `reason` and `tolerance` of every prediction and quiz question, by name."""
    encoded = json.loads(ANSWERS.read_text(encoding="utf-8")) if ANSWERS.exists() else {}
    return {name: json.loads(base64.b64decode(text)) for name, text in encoded.items()}


def save_answers(answers: Mapping[str, dict]) -> None:
    """Write the answers encoded, one line each, sorted by name."""
    encoded = {name: base64.b64encode(json.dumps(answers[name]).encode()).decode() for name in sorted(answers)}
    draft = ANSWERS.with_suffix(".tmp")
    draft.write_text(json.dumps(encoded, indent=0) + "\n", encoding="utf-8", newline="\n")
    os.replace(draft, ANSWERS)


def find_answer(name: str) -> dict:
    """Return the entry of one prediction or quiz question.

    Raises:
        KeyError: there is no entry of this name.
    """
    answers = load_answers()
    if name not in answers:
        raise KeyError(f"no answer named {name!r}; add it: python notebooks/reader.py add {name} VALUE \"reason\"")
    return answers[name]


def same(answer: Any, truth: Any, tolerance: float = 0.0) -> bool:
    """Compare an answer with the truth: numbers within `tolerance`, words in any case, everything else by equality."""
    if hasattr(answer, "item"):  # a number of NumPy or torch
        try:
            answer = answer.item()
        except (RuntimeError, ValueError):  # an array of several numbers
            return False
    if isinstance(truth, bool) or isinstance(answer, bool):
        return answer is truth
    if isinstance(truth, (int, float)) and isinstance(answer, (int, float)):
        return math.isclose(answer, truth, rel_tol=0.0, abs_tol=tolerance + 1e-9)
    if isinstance(truth, str) and isinstance(answer, str):
        return answer.strip().lower() == truth.strip().lower()
    return type(answer) is type(truth) and answer == truth


def predict(name: str, guess: Any) -> None:
    """Print the answer of a prediction and its reason beside the reader's guess; without a guess, print neither."""
    known = find_answer(name)
    answer, kind = known["answer"], {bool: "True or False", str: "a word in quotes"}
    if guess is None:
        print(f"Prediction {name}: no guess yet - put {kind.get(type(answer), 'a number')} in place of None, "
              "then run the next cells.")
    elif same(guess, answer, known["tolerance"]):
        print(f"Prediction {name}: your guess {guess} agrees; the answer is {answer}. {known['reason']}")
    else:
        print(f"Prediction {name}: your guess is {guess}; the answer is {answer}. {known['reason']}")


def quiz(name: str, answers: Mapping[str, Any]) -> None:
    """Print a line for every incorrect answer, and how many questions were answered and how many correctly.

    Question `q1` of the quiz `refresher` is `refresher-q1` in answers.json.
    """
    known = {question: find_answer(f"{name}-{question}") for question in answers}
    tried = {question: answer for question, answer in answers.items() if answer is not None}
    incorrect = [question for question, answer in tried.items()
                 if not same(answer, known[question]["answer"], known[question]["tolerance"])]
    for question in incorrect:
        print(f"{question}: not yet. {known[question]['reason']}")
    print(f"answered {len(tried)} of {len(answers)}, correct {len(tried) - len(incorrect)}"
          if tried else "not attempted yet")


def guarded(attempt: Any) -> Any:
    """Return an attempt in a form that raises NotAttempted where it is None, or is a function that returns None."""
    if attempt is None:
        raise NotAttempted
    if isinstance(attempt, (tuple, list)):
        parts = [guarded(part) for part in attempt]
        return parts if isinstance(attempt, list) else tuple(parts)
    if isinstance(attempt, Mapping):
        return {key: guarded(part) for key, part in attempt.items()}
    if not inspect.isroutine(attempt):
        return attempt

    @functools.wraps(attempt)
    def call(*arguments: Any, **settings: Any) -> Any:
        result = attempt(*arguments, **settings)
        if result is None:
            raise NotAttempted
        return result

    return call


def exercise(name: str, attempt: Any) -> None:
    """Run the check `exercise_NN_K` of exercises.py on an attempt and print one line.

    The attempt is a value, a tuple of values or a function. It counts as "not attempted yet" while it (or a part of
    it) is None, or while its function returns None or raises NotImplementedError.
    """
    check = getattr(importlib.import_module("exercises"), "exercise_" + name.replace(".", "_"), None)
    if check is None:
        raise KeyError(f"no check for exercise {name}; add exercise_{name.replace('.', '_')}(attempt) to exercises.py")
    try:
        check(guarded(attempt))
    except (NotAttempted, NotImplementedError):
        print(f"Exercise {name}: not attempted yet")
    except AssertionError as error:
        print(f"Exercise {name}: not yet.", (str(error) or "the check fails").split("\n")[0])
    except Exception as error:  # the reader's own code may raise anything
        print(f"Exercise {name}: stopped with {type(error).__name__}: {error}")
    else:
        print(f"Exercise {name}: correct")


def parse_value(text: str) -> Any:
    """Read a value of the command line: a number, true or false, or else a word."""
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        return text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="add or replace an answer")
    add.add_argument("name", help="such as 01-a, or refresher-q1 for a quiz question")
    add.add_argument("value", help="a number, true or false, or a word")
    add.add_argument("reason", help="one or two sentences, shown with the answer")
    add.add_argument("--tolerance", type=float, default=0.0, help="how far a correct number may be off")
    commands.add_parser("remove", help="remove an answer").add_argument("name")
    commands.add_parser("show", help="print answers").add_argument("begin", nargs="?", default="", help="such as 01")
    given, answers = parser.parse_args(arguments), load_answers()
    if given.command == "add":
        value = parse_value(given.value)
        save_answers(answers | {given.name: {"answer": value, "reason": given.reason, "tolerance": given.tolerance}})
    elif given.command == "remove":
        save_answers({name: entry for name, entry in answers.items() if name != given.name})
    else:
        for name, entry in sorted(answers.items()):
            if name.startswith(given.begin):
                print(f"{name}: {entry['answer']!r} (tolerance {entry['tolerance']}). {entry['reason']}")


if __name__ == "__main__":
    main()
