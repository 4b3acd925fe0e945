r"""Difficulty (Eq. 9) and the augmentation it controls (section 3.3): hints for hard prompts, noise for easy ones.

The paper leaves the amounts open. Here, with $\Delta R$ of Eq. 9 on rewards normalised to [0, 1]:
- hard, $\Delta R >$ `dead_zone`: a hint, the beginning of a trace that the policy itself wrote when it was shown the
  answer. The share of its words is linear in $\Delta R$, from `hint_min` at the dead zone's edge to `hint_max` at 1;
- easy, $\Delta R < -$`dead_zone`: noise on every frame with $\sigma = $ `noise_scale` $\cdot |\Delta R|$, or that share
  of the frames masked.
"""

import hashlib
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import AugmentationConfig
from .errors import ConfigError, NumericsError
from .rewards import Score, parse_completion


class RewardHistory:
    r"""Keep the mean normalised rewards of the last W groups and measure a prompt's difficulty against them (Eq. 9).

    window: W in groups, at least 1. reference: None compares with the history's mean, a number in [0, 1] with that
    number (table 6). Push only groups sampled on the *original* prompt: an augmented one says little about it.
    """

    def __init__(self, window: int = 100, reference: float | None = None) -> None:
        if not isinstance(window, int) or window < 1 or not (reference is None or 0.0 <= reference <= 1.0):
            raise ConfigError(f"reward history has window {window!r} and reference {reference!r}: give a whole number "
                              "of groups, at least 1, and a normalised reward in [0, 1] or none")
        self.window, self.reference = window, reference
        self._rewards: deque[float] = deque(maxlen=window)

    def __len__(self) -> int:
        return len(self._rewards)

    def push(self, group_mean: float) -> None:
        r"""Add one group's mean normalised reward. Raises `NumericsError` if it is not finite."""
        if not math.isfinite(group_mean):
            raise NumericsError(f"a group's mean reward is {group_mean}: check the reward of its record")
        self._rewards.append(float(group_mean))

    @property
    def mean(self) -> float:
        r"""Mean of the history; NaN while it is empty."""
        return math.fsum(self._rewards) / len(self._rewards) if self._rewards else math.nan

    def difficulty(self, group_mean: float) -> float:
        r"""Compute Eq. 9, $\Delta R(x) = \mathrm{mean}(B_W) - \bar R(x)$: above 0 hard, below 0 easy.

        Without a fixed reference it is 0.0 until a quarter of the window is filled. Call it before `push`, so that a
        prompt is not compared with itself.
        """
        if self.reference is not None:
            return self.reference - group_mean
        return self.mean - group_mean if len(self._rewards) >= self.window / 4 else 0.0

    def state_dict(self) -> dict[str, Any]:
        r"""Return the history as JSON types; floats are restored bit for bit."""
        return {"window": self.window, "reference": self.reference, "rewards": list(self._rewards)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        r"""Restore a saved history. Raises `ConfigError` if it is not one or has another window or reference."""
        try:
            window, reference, rewards = state["window"], state["reference"], list(map(float, state["rewards"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a saved reward history ({error}): resume from another checkpoint") from None
        if (window, reference) != (self.window, self.reference):
            raise ConfigError(f"the saved reward history has window {window} and reference {reference}, this run "
                              f"{self.window} and {self.reference}: resume with the settings of the saved run")
        self._rewards.clear()
        for reward in rewards:
            self.push(reward)


@dataclass(frozen=True)
class Augmentation:
    r"""A kind, "none", "hint", "noise" or "mask", and its amount: 0, share of words, sigma, or share of frames."""

    kind: str = "none"
    amount: float = 0.0


def plan_augmentation(difficulty: float, config: AugmentationConfig) -> Augmentation:
    r"""Choose kind and amount for a prompt of difficulty $\Delta R$ in [-1, 1]; "resample" is planned like "both".

    With a fixed scale, sign and dead zone still decide which prompts are augmented; only the amount is fixed.
    """
    if not math.isfinite(difficulty):
        raise NumericsError(f"a prompt's difficulty is {difficulty}: check the rewards of its group")
    hard = difficulty > 0
    if abs(difficulty) <= config.dead_zone or config.augment not in ("both", "resample", "hard" if hard else "easy"):
        return Augmentation()
    size = abs(difficulty) if config.augment_scale == "adaptive" else config.fixed_difficulty
    if hard:
        progress = min(max((size - config.dead_zone) / (1.0 - config.dead_zone), 0.0), 1.0)
        return Augmentation("hint", config.hint_min + (config.hint_max - config.hint_min) * progress)
    amount = config.noise_scale * size
    return Augmentation(config.easy_kind, min(amount, 1.0) if config.easy_kind == "mask" else amount)


def augmentation_seed(seed: int, record_id: str, step: int) -> int:
    r"""Derive a seed in [0, 2**63) from run, record and step: the same on every machine and after a resume."""
    digest = hashlib.sha256(f"{seed}\n{step}\n{record_id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def add_noise(frames: Tensor, sigma: float, seed: int) -> Tensor:
    r"""Add Gaussian noise to frames (T, 3, H, W) in [0, 1]: clamp(frames + sigma * n, 0, 1); a new tensor.

    Each frame has its own draw from a generator on the CPU: one seed gives one noise on any device, and a longer clip
    keeps the noise of its first frames. Raises `ConfigError` if sigma is negative or not finite.
    """
    if not 0.0 <= sigma < math.inf:
        raise ConfigError(f"noise sigma is {sigma!r}: give a number of at least 0")
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(frame.shape, generator=generator).to(frames) for frame in frames]
    return (frames + sigma * torch.stack(noise)).clamp(0.0, 1.0)


def mask_frames(frames: Tensor, share: float, seed: int) -> Tensor:
    r"""Turn ceil(share * T) random frames of (T, 3, H, W) to mid grey (0.5), at most all but one; a new tensor.

    Masked frames stay in place, so times and token counts do not change.
    """
    count = min(_count(share, len(frames)), max(len(frames) - 1, 0))
    hidden = torch.randperm(len(frames), generator=torch.Generator().manual_seed(seed))[:count]
    masked = frames.clone()
    masked[hidden.to(frames.device)] = 0.5
    return masked


def cut_hint(trace: str, share: float, blank: str = "_") -> str:
    r"""Keep the first ceil(share * words) words of a trace and turn each other into `blank`: `red at 2 _ _ _`.

    The blanks show a small model the length of the trace; `blank=""` leaves them out.
    """
    words = trace.split()
    shown = _count(share, len(words))
    return " ".join(words[:shown] + ([blank] * (len(words) - shown) if blank else []))


def best_trace(scored: Iterable[tuple[str, Score]]) -> str | None:
    r"""Return the reasoning of the best completion written with the answer shown, or None if none can be a hint.

    Only correct completions (`Score.correct`) with some reasoning count; the highest total wins, ties go to the first.
    """
    traces = [(score.total, parse_completion(text).think) for text, score in scored if score.correct]
    return max((pair for pair in traces if pair[1]), key=lambda pair: pair[0], default=(0.0, None))[1]


def _count(share: float, total: int) -> int:
    r"""Compute ceil(share * total), forgiving rounding: 0.07 * 100 = 7.000000000000001 counts as 7."""
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"hint or mask share is {share!r}: give a share in [0, 1]")
    return math.ceil(share * total - 1e-9)
