"""The order of numbered files, the same for every reader: by the number in the name, or refused.

Sorting names as text puts 10 before 2. Frames are then paired with other frames' depth and cameras, without an error.

- The number decides, whatever its leading zeros: 2 comes before 10, 0002 before 10.
- Seconds ("1341846313.592026", as in TUM and Bonn) are one number with its fraction. "0.5" beside "0.25" is refused.
- Several numbers in a name ("clip_3_frame_12") must all ascend together; those that are the same in all names do not
  count. Where one ascends while another falls, nobody can tell which one counts frames.
- Refused as well: two names of the same number (frame_1 beside frame_01), names with a number beside names without, and
  names of different words whose numbers give another order than the words do.
- Names without any number are sorted as text.
- Hidden files (".DS_Store", "._0001.png") are no frames.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path, PurePath

from one4d_pl.errors import UserError, reading

DECIMAL = r"(?<![0-9.])[0-9]{WHOLE}\.[0-9]+(?![0-9.])"
# Nine digits or more before a point are seconds since 1970 (from 1973 on), and what follows the
# point is a fraction of a second.
NUMBER = re.compile(f"({DECIMAL.replace('WHOLE', '9,')}|[0-9]+)")
ANY_DECIMAL = re.compile(DECIMAL.replace("WHOLE", "1,"))


def by_number(
    names: Iterable[str],
    where: str,  # the folder or archive, for errors
) -> list[str]:
    """Sort names by their numbers, without folders and suffixes; UserError names two whose order is in doubt."""
    visible = [name for name in names if not PurePath(name).name.startswith(".")]
    parts = {name: _split(PurePath(name).stem) for name in visible}
    if all(not numbers for _, numbers in parts.values()):
        return sorted(visible)
    for name, (_, numbers) in parts.items():
        if len(numbers) != len(parts[visible[0]][1]):
            raise _doubt(where, visible[0], name, "do not hold equally many numbers")
    order = sorted(visible, key=lambda name: ([Fraction(number) for number in parts[name][1]], name))
    for before, after in itertools.pairwise(order):
        _compare(where, before, after, parts)
    _compare_decimals(where, order)
    if len({words for words, _ in parts.values()}) > 1 and order != sorted(visible):
        before, after = next((a, b) for a, b in itertools.pairwise(order) if a > b)
        raise _doubt(where, before, after, "have different words, and their numbers another order than the words")
    return order


def numbered_files(folder: Path, suffixes: Sequence[str], prefix: str = "") -> list[Path]:
    """List a folder's files with this prefix and these (lower-case) suffixes, by number.

    Raises UserError as `by_number` does, or where the folder cannot be listed.
    """
    with reading(folder):
        found = [path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.name.startswith(prefix)]
    return [folder / name for name in by_number([path.name for path in found], str(folder))]


def _split(stem: str) -> tuple[tuple[str, ...], list[str]]:
    """Split a name into the words around its numbers, in lower case, and the numbers."""
    pieces = NUMBER.split(stem)
    return tuple(piece.lower() for piece in pieces[::2]), pieces[1::2]


def _compare(where: str, before: str, after: str, parts: dict[str, tuple[tuple[str, ...], list[str]]]) -> None:
    """Raise UserError unless no number falls from the first name to the second and one rises."""
    pairs = list(zip(*(map(Fraction, parts[name][1]) for name in (before, after))))
    if all(a == b for a, b in pairs):
        raise _doubt(where, before, after, "have the same number")
    if any(a > b for a, b in pairs):
        raise _doubt(where, before, after, "hold several numbers; one ascends and another falls")


def _compare_decimals(where: str, order: Sequence[str]) -> None:
    """Raise UserError where "0.5" and "0.25" may be decimals, or two numbers and a point."""
    decimals = [ANY_DECIMAL.findall(PurePath(name).stem) for name in order]
    for (before, first), (after, second) in itertools.pairwise(zip(order, decimals)):
        if len(first) == len(second) and any(a != b and Fraction(a) >= Fraction(b) for a, b in zip(first, second)):
            raise _doubt(where, before, after, "may hold decimal numbers, or two numbers with a point between them")


def _doubt(where: str, before: str, after: str, reason: str) -> UserError:
    return UserError(
        f"{where}: the order of the files is in doubt: {before!r} and {after!r} {reason}; "
        "give every file one number of its own, as in frame_0001"
    )
