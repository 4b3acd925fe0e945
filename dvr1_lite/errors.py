"""User-facing errors. Each message states the problem and the fix."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator

OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory")  # as torch says it on a CPU


class UserError(Exception):
    """Base class; the command line prints it as one line and exits with status 2."""


class ClipError(UserError):
    """A clip that cannot be read. During training it is skipped and counted."""


class RecordError(UserError):
    """A record of a data set with a missing or wrong field; names file, line and field."""


class ConfigError(UserError):
    """An unknown config key or an impossible value."""


class ModelError(UserError):
    """A model folder, adapter or optional package that cannot be loaded."""


class RewardError(UserError):
    """A reward function of the user's own that fails or returns no number from 0 to 1."""


class NumericsError(UserError):
    """A non-finite log-prob, reward or gradient; names the record."""


@contextlib.contextmanager
def within_memory(what: str, fix: str) -> Iterator[None]:
    """Turn running out of memory, on a CPU or a GPU, into a `UserError` that says what ran out of it and the fix."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # on a CPU torch raises a plain RuntimeError
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            raise UserError(f"{what} ran out of memory: {fix}") from error
        raise


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise `ConfigError` with a near match for a name that is not among the known ones."""
    names = list(known)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise ConfigError(f"unknown {kind} {name!r}: " + (f"did you mean {near[0]}?" if near else
                                                         f"use one of {', '.join(names)}"))
