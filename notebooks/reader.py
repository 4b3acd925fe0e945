"""Feedback for readers: predictions made before an output, check questions, and exercises that may stay undone.

Nothing here raises for an answer that is missing or wrong: a notebook runs to its end either way.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def same(answer: Any, truth: Any, tolerance: float = 0.0) -> bool:
    """Whether an answer is right: numbers within `tolerance`, words whatever their case, else equality."""
    if isinstance(truth, bool) or isinstance(answer, bool):
        return answer is truth
    if isinstance(truth, (int, float)) and isinstance(answer, (int, float)):
        return math.isclose(answer, truth, rel_tol=0.0, abs_tol=tolerance + 1e-9)
    if isinstance(truth, str) and isinstance(answer, str):
        return answer.strip().lower() == truth.strip().lower()
    return answer == truth


def predict(guess: Any, answer: Any, why: str, tolerance: float = 0.0) -> None:
    """Print how a prediction compares with what came out. `guess` None means that the reader made none."""
    if guess is None:
        print(f"No guess made. It is {answer}: {why}")
    elif same(guess, answer, tolerance):
        print(f"Yes, {answer}: {why}")
    else:
        print(f"You said {guess}; it is {answer}: {why}")


def quiz(answers: Mapping[str, Any], key: Mapping[str, tuple[Any, str]], tolerance: float = 0.0) -> None:
    """Print a line for every question answered wrong, and how many are answered and right.

    `key` has, for each question, the right answer and the sentence that explains it.
    """
    tried = {name: answer for name, answer in answers.items() if answer is not None}
    right = [name for name, answer in tried.items() if same(answer, key[name][0], tolerance)]
    for name in (name for name in tried if name not in right):
        print(f"{name}: not quite. {key[name][1]}")
    print(f"answered {len(tried)} of {len(key)}, right {len(right)}" if tried else "not attempted yet")


def exercise(name: str, attempt: Any, check: Callable[[], None]) -> None:
    """Run a check, a function of asserts, unless the exercise has not been attempted (an answer is None)."""
    attempts: Sequence[Any] = attempt if isinstance(attempt, (tuple, list)) else (attempt,)
    if any(answer is None for answer in attempts):
        print(f"Exercise {name}: not attempted yet")
        return
    try:
        check()
    except AssertionError as error:
        print(f"Exercise {name}: not yet.", str(error).split("\n")[0])
    except Exception as error:  # the reader's own code may raise anything
        print(f"Exercise {name}: it stopped with {type(error).__name__}: {error}")
    else:
        print(f"Exercise {name}: right")


# The refresher's ten questions (notebook 01): the answer, and why.
REFRESHER = {
    "q1": (-5.0, "The log-prob of a sequence is the sum of its tokens' log-probs: -2 + -3."),
    "q2": (1.65, "A ratio of probabilities is the exp of a difference of log-probs: exp(-4.0 - -4.5) = exp(0.5)."),
    "q3": (1.0, "The tokens' log-ratios add up to 0, and exp(0) = 1, although every token's own ratio differs from 1."),
    "q4": (0.0, "Every log-ratio is 0, and so is their mean."),
    "q5": (0.14, "0.5 log(0.5/0.25) + 0.5 log(0.5/0.75) = 0.347 - 0.203 = 0.144."),
    "q6": (0.13, "0.25 log(0.25/0.5) + 0.75 log(0.75/0.5) = -0.173 + 0.304 = 0.131: the KL divergence is not symmetric."),
    "q7": (True, "k1 = d is the log-ratio itself: negative wherever the other policy gives the sample more probability."),
    "q8": (False, "k3 = exp(-d) + d - 1 is at least 0 for every d, because exp(-d) >= 1 - d."),
    "q9": (0.02, "exp(-0.2) + 0.2 - 1 = 0.8187 - 0.8 = 0.0187, close to d^2/2 = 0.02."),
    "q10": (0.0, "The mean of grad log pi under pi itself is the gradient of sum(pi) = 1, which is 0."),
}
