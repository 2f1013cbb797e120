"""What a bad value says."""

from __future__ import annotations

import math

from one4d_pl.errors import UserError


class ConfigError(UserError):
    """A knob, option or path that cannot work."""


def one_of(name: str, value: str | int, allowed: tuple[str | int, ...]) -> None:
    """ConfigError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{name}: {value!r} is not one of {', '.join(map(str, allowed))}")


def positive(name: str, value: float) -> None:
    """ConfigError unless above 0 and finite."""
    if not 0 < value < math.inf:
        raise ConfigError(f"{name}: must be > 0 and finite, got {value}")


def at_least(name: str, value: float, low: int) -> None:
    """ConfigError unless at least `low` and finite."""
    if not low <= value < math.inf:
        raise ConfigError(f"{name}: must be >= {low}, got {value}")


def share(name: str, value: float) -> None:
    """ConfigError unless between 0 and 1."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name}: must be between 0 and 1, got {value}")
