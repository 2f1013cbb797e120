"""Files and folders that appear whole or not at all, with the modes that the umask asks for.

A new file or folder is made beside its final place under a hidden name, flushed to the disk and
renamed. A full disk, an error or Ctrl-C leaves what was there before, and nothing else. Where the
file system refuses, UserError names the path.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import math
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path

from one4d_pl.errors import UserError, reading, writing
from one4d_pl.interrupts import at_interrupt, uninterrupted

_making: set[Path] = set()  # folders that will be renamed as a whole: their files need no temporary name


@contextlib.contextmanager
def temporary(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """Yield a hidden name beside `path`, or in `folder` on the same file system, and remove it at the end."""
    staging = (folder or path.parent) / f".{path.name}.{uuid.uuid4().hex[:12]}.tmp"

    def remove() -> None:
        if staging.is_dir() and not staging.is_symlink():
            shutil.rmtree(staging, ignore_errors=True)
        else:
            staging.unlink(missing_ok=True)

    with at_interrupt(remove):
        try:
            yield staging
        finally:
            remove()


@contextlib.contextmanager
def whole_file(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """Yield the name to write under.

    At the end move the file to `path`, whose folder is made if need be. With `folder` (on the same file system) the
    file lies there until then; FileNotFoundError where one of the two folders is absent.
    """
    if folder is None:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
    if any(made in path.parents for made in _making):
        yield path
        return
    with writing(path), temporary(path, folder) as staging:
        staging.touch(exist_ok=False)
        mode = staging.stat().st_mode & 0o777  # as the umask and the folder decide
        yield staging
        _settle(staging, mode)
        staging.replace(path)


@contextlib.contextmanager
def open_whole(path: Path, folder: Path | None = None) -> Iterator[io.BufferedRandom]:
    """Open a `whole_file` for writing bytes."""
    with whole_file(path, folder) as staging, staging.open("w+b") as file:
        yield file


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with whole_file(path) as staging:
        staging.write_text(text, encoding="utf-8")


def write_json(path: Path, tree: object) -> None:
    """Write a json file that people can read, whole or not at all."""
    write_text(path, json.dumps(tree, indent=1) + "\n")


def finite(tree: object) -> object:
    """Replace numbers that json cannot hold by null."""
    if isinstance(tree, dict):
        return {name: finite(value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder to fill. At the end move it to `path`, which must not be there or be empty."""
    with writing(path), temporary(path) as staging:
        staging.mkdir(parents=True)
        with _in_making(staging):
            yield staging
        settle(staging)
        staging.rename(path)


@contextlib.contextmanager
def replaced_folder(path: Path, names: Collection[str] | None = None, last: str = "") -> Iterator[Path]:
    """Yield a folder to fill.

    At the end its contents replace those of `path`, the file `last` after the others. `names`
    (default: all) are the contents that are replaced; what else lies in `path` stays. `path` itself
    stays, so it may be a mount point or a link. The old contents are untouched until the new ones
    are whole; after an error a folder that was not there before is not there either.
    """
    with writing(path):
        absent = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
    for left in (*path.glob(".new.*.tmp"), *path.glob(".old.*.tmp")):  # left by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        with writing(path), temporary(path / "new") as staging, temporary(path / "old") as old:
            staging.mkdir()
            with _in_making(staging):
                yield staging
            settle(staging)
            old.mkdir()
            going = [n for n in os.listdir(path) if n not in (staging.name, old.name) and (names is None or n in names)]
            with uninterrupted():
                for name in sorted(going, key=lambda name: name != last):
                    (path / name).rename(old / name)
                for name in sorted(os.listdir(staging), key=lambda name: name == last):
                    (staging / name).rename(path / name)
    finally:
        if absent:
            with contextlib.suppress(OSError):  # it holds something
                path.rmdir()


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, byte order mark or not; UserError where it is not one."""
    with reading(path):
        content = path.read_bytes()
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError("text in UTF-16; save it in UTF-8")
        return content.decode("utf-8-sig")


def read_json(path: Path) -> object:
    """Read a json file; UserError where it is not one."""
    text = read_text(path)
    with reading(path, "json"):
        return json.loads(text)


def check_folder(path: Path, option: str, advice: str = "") -> None:
    """Raise UserError where a folder cannot be made or written, before hours of work are spent. Leave no trace."""
    place = path
    try:
        while not os.path.lexists(place) and place != place.parent:
            place = place.parent
        if not place.is_dir():
            kind = "file" if place.exists() else "link to nothing"
            raise UserError(f"{option}: cannot write {path} ({place} is a {kind}); {advice or 'name a folder'}")
        with temporary(place / path.name) as probe:
            probe.mkdir()
            if place != path:  # its name may be too long
                (probe / path.name).mkdir()
            with open(probe / "byte", "wb") as file:  # a full disk takes a folder, but no byte
                file.write(b"0")
    except OSError as error:
        raise UserError(f"{option}: cannot write {path} ({error.strerror}){advice and f'; {advice}'}") from None


def sync(path: Path) -> None:
    """Flush a file or folder to the disk: no power cut may leave a renamed file without bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _in_making(folder: Path) -> Iterator[None]:
    _making.add(folder)
    try:
        yield
    finally:
        _making.discard(folder)


def _settle(path: Path, mode: int) -> None:
    """Give a file its permission bits, which some libraries narrow to the owner, and flush it."""
    if path.stat().st_mode & 0o777 != mode:
        path.chmod(mode)
    sync(path)


def settle(folder: Path) -> None:
    """Give every file below a folder the folder's permission bits and flush it. To be called before a rename."""
    mode = folder.stat().st_mode & 0o666
    for parent, _, names in os.walk(folder):
        for name in names:
            _settle(Path(parent) / name, mode)
        sync(Path(parent))
