r"""Difficulty-aware augmentation (section 3.3, figure 2): hints for hard prompts, noise for easy ones.

The paper leaves the amounts open. Here, with $\Delta R$ from Eq. 9 and normalised rewards:

- $|\Delta R| \le$ `dead_zone`: nothing;
- hard, $\Delta R > 0$: a hint, the beginning of a trace that the policy itself wrote when it was shown the answer. The
  share of its words grows linearly from `hint_min` at the edge of the dead zone to `hint_max` at $\Delta R = 1$;
- easy, $\Delta R < 0$: Gaussian noise on every frame with $\sigma = $ `noise_scale` $\cdot |\Delta R|$, or the same
  share of frames masked.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError, NumericsError
from .rewards import Score, parse_completion

SCALES = ("adaptive", "fixed")
DIRECTIONS = ("both", "hard", "easy", "none")
EASY_KINDS = ("noise", "mask")
HINT_UPDATES = ("hinted", "unhinted", "mixed")
HINT_PROBES = (0.15, 0.3, 0.45, 0.6)  # shares that are tried, the smallest first
PROBE_SUCCESS = 0.3  # the share of right answers at which a probe stops: neither hopeless nor given away


@dataclass(frozen=True)
class AugmentationConfig:
    """How much to augment and whom. `validate_augmentation` says which values are possible."""

    scale: str = "adaptive"  # "adaptive": grows with |dR|; "fixed": always as at |dR| = fixed_difficulty (table 8)
    directions: str = "both"  # which prompts: "both", "hard", "easy" or "none" (table 7)
    easy_kind: str = "noise"  # for easy prompts: "noise" or "mask"
    dead_zone: float = 0.1  # |dR| up to here changes nothing, in [0, 1)
    hint_min: float = 0.1  # share of the trace's words at the dead zone's edge, in [0, 1]
    hint_max: float = 0.6  # share at dR = 1, and never more
    noise_scale: float = 0.4  # sigma per unit of |dR|, pixel values in [0, 1]; for masking the share of frames
    fixed_difficulty: float = 0.5  # the |dR| that scale="fixed" acts as, in (0, 1]


@dataclass(frozen=True)
class Augmentation:
    """What to do with one prompt. `amount`: hint, share of words; noise, sigma; mask, share of frames; none, 0."""

    kind: str  # "none", "hint", "noise" or "mask"
    amount: float


NOTHING = Augmentation("none", 0.0)


def validate_augmentation(config: AugmentationConfig) -> None:
    """Raise `ConfigError` naming the first impossible value and what is possible."""
    for name, known in (("scale", SCALES), ("directions", DIRECTIONS), ("easy_kind", EASY_KINDS)):
        if getattr(config, name) not in known:
            value = getattr(config, name)
            raise ConfigError(f"augmentation {name} {value!r} is unknown. Use one of: {', '.join(known)}.")
    checks = {
        "dead_zone": (0.0 <= config.dead_zone < 1.0, "a number in [0, 1)"),
        "hint_min": (0.0 <= config.hint_min <= config.hint_max, "a share between 0 and hint_max"),
        "hint_max": (0.0 <= config.hint_max <= 1.0, "a share in [0, 1]"),
        "noise_scale": (0.0 <= config.noise_scale < math.inf, "a number of at least 0"),
        "fixed_difficulty": (0.0 < config.fixed_difficulty <= 1.0, "a number in (0, 1]"),
    }
    for name, (possible, wanted) in checks.items():
        if not possible:
            raise ConfigError(f"augmentation {name} is {getattr(config, name)!r}. Give {wanted}.")


def plan_augmentation(difficulty: float, config: AugmentationConfig) -> Augmentation:
    r"""Choose kind and amount for a prompt of difficulty $\Delta R$ (Eq. 9, in [-1, 1] for normalised rewards).

    With `scale="fixed"` the sign and the dead zone still decide *whom* to augment, only the amount stays the same.
    Raises `NumericsError` if the difficulty is not finite.
    """
    if not math.isfinite(difficulty):
        raise NumericsError(f"A prompt's difficulty is {difficulty}. Check the rewards of its group.")
    hard = difficulty > 0
    if abs(difficulty) <= config.dead_zone or config.directions not in ("both", "hard" if hard else "easy"):
        return NOTHING
    size = abs(difficulty) if config.scale == "adaptive" else config.fixed_difficulty
    if hard:
        return Augmentation("hint", _hint_share(size, config))
    amount = config.noise_scale * size
    return Augmentation(config.easy_kind, min(amount, 1.0) if config.easy_kind == "mask" else amount)


def _hint_share(size: float, config: AugmentationConfig) -> float:
    """Linear in dR: `hint_min` at the dead zone's edge, `hint_max` at 1."""
    progress = (size - config.dead_zone) / (1.0 - config.dead_zone)
    return config.hint_min + (config.hint_max - config.hint_min) * min(max(progress, 0.0), 1.0)


def augmentation_seed(seed: int, record_id: str, step: int) -> int:
    """A seed that belongs to run, record and step: the same on every machine and after a resume, in [0, 2**63)."""
    digest = hashlib.sha256(f"{seed}\n{step}\n{record_id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# --- easy: frames ----------------------------------------------------------------------------------------------------


def add_noise(frames: Tensor, sigma: float, seed: int) -> Tensor:
    r"""Gaussian noise on every frame: `clamp(frames + sigma * n, 0, 1)` with standard normal `n`.

    `frames` is (T, 3, H, W) with values in [0, 1]; `sigma` is in the same unit and at least 0. Every frame has its
    own draw, from a generator of its own on the CPU, so the same seed gives the same noise on any device, global
    random states are left alone, and a longer clip keeps the noise of its first frames. Returns a new tensor.
    """
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ConfigError(f"noise sigma is {sigma!r}. Give a number of at least 0.")
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(frame.shape, generator=generator).to(frames) for frame in frames]
    return (frames + sigma * torch.stack(noise)).clamp(0.0, 1.0)


def mask_frames(frames: Tensor, share: float, seed: int) -> Tensor:
    r"""Turn `ceil(share * T)` frames, drawn without replacement, to mid grey (0.5); at least one frame always stays.

    `frames` is (T, 3, H, W), `share` in [0, 1]. The frames stay in place, so times and token counts do not change.
    Returns a new tensor.
    """
    _check_share("mask share", share)
    count = min(_ceil(share * len(frames)), max(len(frames) - 1, 0))
    hidden = torch.randperm(len(frames), generator=torch.Generator().manual_seed(seed))[:count]
    masked = frames.clone()
    masked[hidden.to(frames.device)] = 0.5
    return masked


# --- hard: hints -----------------------------------------------------------------------------------------------------


def cut_hint(trace: str, share: float, blank: str = "_") -> str:
    r"""The first `ceil(share * words)` words of a trace, then `blank` for each hidden word: `red at 2 _ _ _`.

    The blanks keep the trace's length, which tells a small model where in the trace it stands; `blank=""` leaves
    them out. `share` in [0, 1]. An empty trace gives an empty hint.
    """
    _check_share("hint share", share)
    words = trace.split()
    shown = _ceil(share * len(words))
    return " ".join(words[:shown] + ([blank] * (len(words) - shown) if blank else []))


def best_trace(scored: Iterable[tuple[str, Score]]) -> str | None:
    r"""The thought of the best completion, or None if none may serve as a hint.

    `scored` holds (completion text, its `Score`) of what the policy wrote when it was shown the answer. Only a
    completion whose format and answer are right counts; among those the highest total wins (with a time span its IoU
    decides), the first one of equals. Empty thoughts do not count.
    """
    best, best_total = None, -math.inf
    for text, score in scored:
        thought = parse_completion(text).think
        if score.right and thought and score.total > best_total:
            best, best_total = thought, score.total
    return best


def probed_shares(count: int, success: Callable[[list[int], float], list[float]]) -> list[float]:
    r"""For each of `count` prompts the smallest of `HINT_PROBES` with which enough answers are right, else the largest.

    success: takes the prompts still open (their numbers, together) and a share, and gives each one's share of right
    answers; `PROBE_SUCCESS` is enough. Differs from the paper: there the share follows from $\Delta R$ alone.
    """
    shares, waiting = [HINT_PROBES[-1]] * count, list(range(count))
    for share in HINT_PROBES[:-1]:
        rates = success(waiting, share) if waiting else []
        for number, rate in zip(list(waiting), rates):
            if rate >= PROBE_SUCCESS:
                shares[number] = share
                waiting.remove(number)
    return shares


def _check_share(name: str, share: float) -> None:
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"{name} is {share!r}. Give a share in [0, 1].")


def _ceil(value: float) -> int:
    """Ceiling that forgives rounding: 0.07 * 100 = 7.000000000000001 counts as 7."""
    return math.ceil(value - 1e-9)
