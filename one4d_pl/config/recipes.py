"""Is what lies there made as it would be made now? One comparison for checkpoints, shards, encodings and studies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """A setting that is not what it was."""

    key: str
    stored: object
    now: object

    def __str__(self) -> str:
        return f"{self.key} ({_short(self.stored)} -> {_short(self.now)})"


def flatten(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    """section.key -> value, of a config's `as_dict`."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def changes(
    stored: Mapping[str, object],
    now: Mapping[str, object],
    defaults: Mapping[str, object] | None = None,
    ignore: Callable[[str], bool] = lambda key: False,
) -> list[Change]:
    """List the settings in which two flat recipes differ, in the order of their names.

    Args:
        stored, now: key -> value.
        defaults: of settings that are younger than what is stored: what was done before there was a choice.
        ignore: tells the keys that do not matter.
    """
    was = {**(defaults or {}), **stored}
    return [
        Change(key, was.get(key), now.get(key))
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and not ignore(key)
    ]


def _short(value: object) -> str:
    if isinstance(value, list) and len(value) > 20:
        return f"{len(value)} items"
    return str(value)
