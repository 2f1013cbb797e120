"""The user's error: a command answers it with one line and exit code 2.

A bug of ours stays a traceback. Files and file systems raise errors of many types: the system's,
each format's, each library's. `reading` and `writing` are the one place that turns them into a
UserError which names the file. They stand around the code that opens and parses a file, or writes
one, and around nothing else: a bug of ours inside them would be blamed on the file.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import os
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

LFS_POINTER, LFS_HINT = b"version https://git-lfs", "a git-lfs pointer, not the file itself; get it with: git lfs pull"
# raised by a file that is not what its name says; KeyError, TypeError and the like by json of another shape than ours
UNREADABLE = (
    OSError, ValueError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError,
    SyntaxError, NotImplementedError, RuntimeError, csv.Error, struct.error, tarfile.TarError, zipfile.BadZipFile,
    zlib.error, tokenize.TokenError,
)  # fmt: skip
# libraries whose own errors are about the file; named, not imported, since importing them takes long
LIBRARIES = ("PIL", "av", "safetensors", "yaml")

# errors of the file system that are never a bug of ours, wherever they are met
FILE_SYSTEM = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTDIR,
    errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip


class UserError(ValueError):
    """A mistake of the user, or a file that cannot be used. One line that names it and says what would work."""


class RunFailed(RuntimeError):
    """A training that cannot go on for a reason that one line tells: exit code 1, no traceback."""


@contextlib.contextmanager
def reading(path: Path | str, need: str = "") -> Iterator[None]:
    """Turn errors of opening and parsing a file or folder into a UserError that names it and what is needed."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, UNREADABLE) and not _of_library(error):
            raise
        raise UserError(f"{path}: {fault_of(path, error)}{need and f'; need {need}'}") from error


@contextlib.contextmanager
def writing(path: Path | str, option: str = "") -> Iterator[None]:
    """Turn errors of writing into a UserError that names path and option; FileNotFoundError (it vanished) stays."""
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not _of_library(error):
            raise
        raise UserError(f"{option and f'{option}: '}cannot write {path} ({reason_of(error)})") from error


def fault_of(path: Path | str, error: Exception) -> str:
    """Say why a file cannot be read; where git-lfs has left a pointer in its place, say that."""
    if is_lfs_pointer(path):
        return LFS_HINT
    if isinstance(error, UnicodeError):
        return "not text in UTF-8"
    return reason_of(error).replace(f"{path}: ", "").replace(f": '{path}'", "").replace(f" '{path}'", "")


def is_lfs_pointer(path: Path | str) -> bool:
    """Tell whether a file is the pointer that git-lfs leaves where a large file was not fetched."""
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def reason_of(error: Exception) -> str:
    """Return the text of an error on one line, without what only programmers read."""
    if reason := getattr(error, "strerror", None):  # an error of the system, or of FFmpeg
        return str(reason)
    no_space = os.strerror(errno.ENOSPC)
    if no_space in str(error) or (isinstance(error, OSError) and "requested and" in str(error)):  # NumPy's
        return no_space
    if isinstance(error, KeyError):
        return f"no {error.args[0]!r} in it" if error.args else "an entry is missing"
    return " ".join(str(error).split())[:300] or type(error).__name__


def _of_library(error: Exception) -> bool:
    return type(error).__module__.split(".")[0] in LIBRARIES
