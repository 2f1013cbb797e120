"""How a source walks its dataset: units, tracks, windows, clips.

A unit is a folder that can be converted on its own, named by its path relative to the root, with
forward slashes ("." is the root itself). A track is a run of frames that share one world; a clip is
a window of a track. What cannot be read is dropped with one logged line.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import av

from one4d_pl.data.clip_codec import MAX_FRAMES, MIN_FRAMES, clip_fault
from one4d_pl.types import Clip

# errors of the disk or machine, which another try may not meet
MACHINE_ERRORS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE}
MAX_KEY = 80  # characters; what clip_codec.SAFE_KEY allows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Track:
    """Frames that share a world: their ascending numbers and how to read a clip of them."""

    name: str  # for messages
    numbers: list[int]
    read: Callable[[range], Clip]  # raises ValueError or OSError, naming the broken file


def clips_of_units(
    root: Path, units: Sequence[str], open_unit: Callable[[str], list[Track]], num_frames: int, stride: int
) -> Iterator[Clip]:
    """Yield disjoint clips of `num_frames` frames, every `stride`-th, of each unit, in order.

    A broken clip or unit is dropped with one line that says why. ValueError for a length or stride
    below 1, OSError where the machine fails rather than a file.
    """
    if num_frames < 1 or stride < 1:
        raise ValueError(f"num_frames and stride must be at least 1, got {num_frames} and {stride}")
    num_clips = num_dropped = 0
    for unit in units:
        try:
            tracks = open_unit(unit)
        except (OSError, ValueError) as error:
            _raise_machine_error(unit, error)
            logger.warning("skipped %s: %s", unit, one_line(error))
            continue
        for track in tracks:
            windows = clip_windows(track.numbers, num_frames, stride)
            if not windows:
                logger.warning("%s: no run of %d frames at stride %d, no clip", track.name, num_frames, stride)
            for window in windows:
                num_clips += 1
                try:
                    clip = _check_clip(track.read(window))
                except (OSError, ValueError) as error:
                    _raise_machine_error(unit, error)
                    num_dropped += 1
                    logger.warning("dropped a clip: %s", one_line(error))
                else:
                    yield clip
    if num_dropped:
        logger.warning("%s: %d of %d clips dropped", root, num_dropped, num_clips)


def _raise_machine_error(unit: str, error: Exception) -> None:
    """Raise OSError where another try may work: a disk's short failure must not lose a sound clip for good."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, av.FFmpegError):  # broken videos give the same numbers
        if isinstance(cause, OSError) and cause.errno in MACHINE_ERRORS:
            remedy = f"start again to go on, or leave out {unit!r} (write_shards --exclude)"
            raise OSError(f"{one_line(error)}: the disk or machine fails, not the file; {remedy}") from error
        cause = cause.__cause__


def _check_clip(clip: Clip) -> Clip:
    """Return the clip, of any length, which the writer refuses; ValueError where it breaks the schema otherwise."""
    can_be_stored = MIN_FRAMES <= clip.num_frames <= MAX_FRAMES and clip.num_frames % 4 == 1
    if can_be_stored and (fault := clip_fault(clip)):
        raise ValueError(f"{clip.key}: {fault}")
    return clip


def clip_windows(numbers: Sequence[int], num_frames: int, stride: int) -> list[range]:
    """Cut disjoint windows; where a frame is absent, the next window starts behind the gap."""
    present, windows = set(numbers), []
    free = 0  # the first frame number that no window has used
    for first in numbers:
        window = range(first, first + num_frames * stride, stride)
        if first >= free and present.issuperset(window):
            windows.append(window)
            free = window.stop
    return windows


def holds(folder: Path, members: set[str]) -> bool:
    """Tell whether there is such a folder, with these files and folders in it."""
    return folder.is_dir() and members <= {path.name for path in folder.iterdir()}


def find_units(root: Path, members: set[str]) -> list[str]:
    """List the folders at or below `root` that hold these files and folders, sorted; none inside of another."""
    found = []
    for folder, folders, files in walk_once(root):
        if members <= {*folders, *files}:
            found.append(folder.relative_to(root).as_posix())
            folders.clear()
    return sorted(found)


def walk_once(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield every folder at or below `root` once, with the names of its folders and files.

    Links are followed. A folder whose real path was seen under another name is not entered again, so that links in a
    circle end and no scene is taken twice; folders come before links to them. The caller clears the list of folders to
    stay out of them. A link to nothing, or a folder that may not be listed, is left out with one logged line.
    """
    seen: set[Path] = set()
    waiting, links = [root] if root.is_dir() else [], deque[Path]()
    while waiting or links:
        folder = waiting.pop() if waiting else links.popleft()
        real = folder.resolve()
        if real in seen:
            continue
        seen.add(real)
        try:
            # scandir knows files from folders without a call per file
            entries = {entry.name: entry for entry in os.scandir(folder)}
        except PermissionError as error:
            logger.warning("%s: left out: %s", folder, error.strerror)
            continue
        folders = [name for name, entry in entries.items() if entry.is_dir()]
        files = [name for name, entry in entries.items() if entry.is_file()]
        for name in entries.keys() - set(folders) - set(files):
            if entries[name].is_symlink():
                logger.warning("%s: a link to nothing, left out", folder / name)
        yield folder, folders, files
        for name in sorted(folders, reverse=True):
            (links if entries[name].is_symlink() else waiting).append(folder / name)


def files_once(paths: Iterable[Path]) -> list[Path]:
    """Return the files, sorted, each once even if links give it several names. A file comes before links to it."""
    linked = {path: path.is_symlink() or path.parent.is_symlink() for path in paths}
    if not any(linked.values()):
        return sorted(linked)
    by_place: dict[Path, Path] = {}
    for path in sorted(linked, key=lambda path: (linked[path], path)):
        by_place.setdefault(path.resolve(), path)
    return sorted(by_place.values())


def clip_key(root: Path, unit: str, suffix: str) -> str:
    """Make a file-safe name of a clip. Where characters are replaced or cut away, a hash keeps it unique."""
    name = f"{root.resolve().name if unit == '.' else unit}/{suffix}"
    key = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    ascii_path = re.fullmatch(r"[A-Za-z0-9_/-]+", name)
    if ascii_path and len(key) <= MAX_KEY and key[0].isalnum():
        return key
    digest = sha256(name.encode(errors="surrogateescape")).hexdigest()[:12]
    return f"c{digest}-{key[-(MAX_KEY - 14) :]}"


def one_line(error: Exception) -> str:
    """Return the text of an error without line breaks."""
    return " ".join(str(error).split())
