"""The one comparison of stored settings with today's: checkpoints, shards, encodings, studies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

# Knobs that are gone -> the only value left. Where something stored holds another one, no code here can go on with it.
GONE: dict[str, object] = {
    "dlc.link_blocks": None,  # the centres of dlc.num_links equal spans
    "dlc.link_direction": "both",
    "dlc.xyz_patch_embedding": True,
    "flow.separate_sigma": False,
}


@dataclass(frozen=True)
class Change:
    """A setting whose value is not the stored one."""

    key: str
    stored: object
    now: object

    def __str__(self) -> str:
        return f"{self.key} ({_short(self.stored)} -> {_short(self.now)})"


def flatten(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Flatten a tree of sections, as `as_dict` gives it, to section.key -> value."""
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
        defaults: values of settings that did not exist yet when the recipe was stored.
        ignore: tells whether a key does not matter.
    """
    kept = {key: value for key, value in stored.items() if key not in GONE or value != GONE[key]}
    was = {**(defaults or {}), **kept}
    return [
        Change(key, was.get(key), now.get(key))
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and not ignore(key)
    ]


def _short(value: object) -> str:
    if isinstance(value, list) and len(value) > 20:
        return f"{len(value)} items"
    return str(value)
