"""A knob's declaration: its default, its bounds, and whether a resumed run may change it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, get_type_hints

from one4d_pl.errors import UserError


class ConfigError(UserError):
    """A knob, option or path that cannot work."""


def knob(
    default: Any = dataclasses.MISSING,
    *,
    factory: Any = dataclasses.MISSING,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    one_of: tuple[str | int, ...] = (),
    may_change: bool = False,
) -> Any:
    """Declare a field of a config class.

    Args:
        default, factory: as of dataclasses.field.
        low, above, high: bounds; `above` itself is not allowed. A bounded number is finite.
        one_of: the allowed values.
        may_change: a resumed run may have another value, since the updates stay the same.
    """
    bounds = {"low": low, "above": above, "high": high, "one_of": one_of, "may_change": may_change}
    return dataclasses.field(default=default, default_factory=factory, metadata=bounds)


def check(section: str, knobs: Any) -> None:
    """Raise ConfigError where a knob of a section is outside its bounds."""
    for field in dataclasses.fields(knobs):
        refuse(f"{section}.{field.name}", getattr(knobs, field.name), **field.metadata)


def refuse(
    name: str,
    value: Any,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    one_of: tuple[str | int, ...] = (),
    may_change: bool = False,
) -> None:
    """Raise ConfigError unless `value` is within the bounds of `knob`; nan never is."""
    if one_of and value not in one_of:
        raise ConfigError(f"{name}: {value!r} is not one of {', '.join(map(str, one_of))}")
    if low is not None and high is not None:
        if not low <= value <= high:
            raise ConfigError(f"{name}: must be between {low} and {high}, got {value}")
    elif low is not None and not low <= value < math.inf:
        raise ConfigError(f"{name}: must be >= {low}, got {value}")
    elif above is not None and not above < value < math.inf:
        raise ConfigError(f"{name}: must be > {above} and finite, got {value}")


def changeable(section: type, prefix: str = "") -> Callable[[str], bool]:
    """Return a test that tells whether a resumed run may change a dotted key of this class."""
    free = set(_changeable(section, prefix))
    return lambda key: any(key == name or key.startswith(f"{name}.") for name in free)


def _changeable(section: type, prefix: str) -> list[str]:
    hints, found = get_type_hints(section), []
    for field in dataclasses.fields(section):
        if field.metadata.get("may_change"):
            found.append(prefix + field.name)
        elif dataclasses.is_dataclass(kind := hints[field.name]) and isinstance(kind, type):
            found += _changeable(kind, f"{prefix}{field.name}.")
    return found
