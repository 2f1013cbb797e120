"""Captions and licences as datasets hold them: what is text, what is missing, what an error.

null, NaN (which pandas writes for an empty cell) and the words that programs write for them mean that there is no text.
A caption may be missing, a licence may not. Any other type (a number, a list) is an error, never turned into text.
"""

from __future__ import annotations

import math

WORDS_FOR_NOTHING = {"", "none", "null", "nan", "nat", "<na>", "n/a"}  # in any case


def is_missing(value: object) -> bool:
    """Tell whether a field's value says that there is none."""
    if isinstance(value, str):
        return value.strip().lower() in WORDS_FOR_NOTHING
    return value is None or (isinstance(value, float) and math.isnan(value))


def caption_text(value: object) -> str:
    """Return the caption as it stands, "" where there is none. Raises ValueError where it is something else."""
    if is_missing(value):
        return ""
    if not isinstance(value, str):
        raise ValueError(f"the caption is {_shown(value)}, need a text, or null for none")
    return value


def licence_text(value: object) -> str:
    """Return the licence as it stands; ValueError where there is none, or something else."""
    if is_missing(value) or not isinstance(value, str):
        raise ValueError(f"the licence is {_shown(value)}, need its name (an SPDX id or the dataset's own tag)")
    return value


def listed_names(text: str) -> set[str]:
    """Return the names of a list, one per line; what follows a # is a comment."""
    names = (line.split("#", 1)[0].strip() for line in text.splitlines())
    return {name for name in names if name}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
