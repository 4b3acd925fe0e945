r"""How hard a prompt is for the policy right now: the reward history $B_W$ and Eq. 9.

The reward of every group is divided by its record's largest possible reward, so that kinds of questions compare, and
only groups sampled on the *original* input enter the history: an augmented group says little about the prompt.
"""

import math
from collections import deque
from typing import Any

from .errors import ConfigError, NumericsError


class RewardHistory:
    r"""The mean normalised rewards of the last `window` groups, and a prompt's difficulty against them.

    `window` is W in groups, at least 1 (paper: 100; its text says "steps" in section 3.3 and "samples" in appendix
    C.1, here it is groups). `reference` None compares with the history's mean, a number in [0, 1] with that number
    (table 6's absolute reference). Raises `ConfigError` for an impossible window or reference.
    """

    def __init__(self, window: int = 100, reference: float | None = None) -> None:
        if not isinstance(window, int) or window < 1:
            raise ConfigError(f"history window is {window!r}. Give a whole number of groups, at least 1.")
        if reference is not None and not 0.0 <= reference <= 1.0:
            raise ConfigError(f"difficulty reference is {reference!r}. Give a normalised reward in [0, 1], or none.")
        self.window = window
        self.reference = reference
        self._rewards: deque[float] = deque(maxlen=window)

    def __len__(self) -> int:
        return len(self._rewards)

    def push(self, group_mean: float) -> None:
        """Add one group's mean normalised reward; the oldest leaves once `window` are held. Must be finite."""
        if not math.isfinite(group_mean):
            raise NumericsError(f"A group's mean reward is {group_mean}. Check the reward of its record.")
        self._rewards.append(float(group_mean))

    @property
    def ready(self) -> bool:
        """At least a quarter of the window is filled; before that no prompt is called hard or easy."""
        return len(self) >= self.window / 4

    @property
    def mean(self) -> float:
        """Mean of the history, in the unit of what was pushed; NaN while it is empty."""
        return math.fsum(self._rewards) / len(self) if self._rewards else math.nan

    def difficulty(self, group_mean: float) -> float:
        r"""Eq. 9: $\Delta R(x) = \mathrm{mean}(B_W) - \bar R(x)$; above 0 hard, below 0 easy, 0.0 until `ready`.

        `group_mean` is the prompt's own mean normalised reward. Compare before you push, so that a prompt is not
        measured against itself. An absolute reference waits for `ready` as well, so that table 6 compares the
        references and nothing else.
        """
        if not self.ready:
            return 0.0
        return (self.mean if self.reference is None else self.reference) - group_mean

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, all of it JSON; floats come back bit for bit."""
        return {"window": self.window, "reference": self.reference, "rewards": list(self._rewards)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved history. Raises `ConfigError` if it was kept with other settings or is not one."""
        try:
            settings, rewards = (state["window"], state["reference"]), [float(r) for r in state["rewards"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"Not a saved reward history ({error}). Resume from another checkpoint.") from None
        if settings != (self.window, self.reference):
            raise ConfigError(
                f"The saved reward history has window {settings[0]} and reference {settings[1]}, this run has "
                f"{self.window} and {self.reference}. Resume with the settings of the saved run."
            )
        self._rewards.clear()
        for reward in rewards:
            self.push(reward)
