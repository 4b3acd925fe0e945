r"""Settings: one way to declare a config field with its help, unit, paper value and range, and to check it.

config.py declares every field once, in the dataclass of its idea; `config.TrainConfig` inherits them all.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Sequence
from typing import Any

from .errors import ConfigError

NOT_GIVEN = "not given"
EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list of texts"}


def setting(default: Any, text: str, unit: str, paper: str = NOT_GIVEN, choices: Sequence[str] | None = None, *,
            at_least: float | None = None, above: float | None = None, below: float | None = None) -> Any:
    r"""Declare a config field: default, what it does, its unit, the paper's value, and which values are possible."""
    metadata = {"help": f"{text} [{unit}; paper: {paper}]", "at_least": at_least, "above": above, "below": below}
    if choices is not None:
        metadata["choices"] = list(choices)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache
def field_types(config: type) -> dict[str, tuple[type, bool]]:
    r"""Map each field of a settings dataclass to (type, whether None is possible), e.g. clip_eps: (float, True)."""
    found = {}
    for name, hint in typing.get_type_hints(config).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kind = next(option for option in options if option is not type(None))
        found[name] = (typing.get_origin(kind) or kind, type(None) in options)
    return found


def check_settings(config: Any) -> None:
    r"""Check type, choices and range of every field of a settings dataclass. Raises `ConfigError` for the first bad."""
    kinds = field_types(type(config))
    for field in dataclasses.fields(config):
        kind, optional = kinds[field.name]
        value = getattr(config, field.name)
        if not (value is None and optional):
            _check_type(field.name, value, kind, optional)
            _check_range(field.name, value, field.metadata)


def _check_type(name: str, value: Any, kind: type, optional: bool) -> None:
    accepted = (int, float) if kind is float else (kind,)
    fits = isinstance(value, accepted) and not (isinstance(value, bool) and kind is not bool)
    if not fits or (kind is list and not all(isinstance(entry, str) for entry in value)):
        raise ConfigError(f"{name} is {value!r}: give {EXPECTED[kind]}" + (" or none" if optional else ""))


def _check_range(name: str, value: Any, limits: typing.Mapping[str, Any]) -> None:
    if limits.get("choices") and value not in limits["choices"]:
        raise ConfigError(f"{name} is {value!r}: choose one of {', '.join(limits['choices'])}")
    at_least, above, below = (limits.get(key) for key in ("at_least", "above", "below"))
    stated = [f"at least {at_least:g}" if at_least is not None else "", f"above {above:g}" if above is not None else "",
              f"below {below:g}" if below is not None else ""]
    if not any(stated):
        return
    possible = (math.isfinite(value) and (at_least is None or value >= at_least) and (above is None or value > above)
                and (below is None or value < below))
    if not possible:
        raise ConfigError(f"{name} is {value!r}: give a number {' and '.join(filter(None, stated))}")
