"""The user's error: what a command answers with one line and exit code 2, where a bug of ours stays a traceback.

What files and file systems raise has many types: the system's, those of each format, those of each library. `reading`
and `writing` are the one place where they become a UserError that names the file. They stand around what opens and
parses a file, or writes one, and nothing else: a bug of ours inside would be told as the file's fault.
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
# of a file that is not what its name says; KeyError, TypeError and the like: of a tree of another shape
UNREADABLE = (
    OSError, ValueError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError,
    SyntaxError, NotImplementedError, RuntimeError, csv.Error, struct.error, tarfile.TarError, zipfile.BadZipFile,
    zlib.error, tokenize.TokenError,
)  # fmt: skip
LIBRARIES = ("PIL", "av", "safetensors", "yaml")  # whose own errors are about the file; by name: they are heavy

# states of a file system, met where nothing more can be said about them; never a bug of ours
FILE_SYSTEM = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTDIR,
    errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip


class UserError(ValueError):
    """A mistake of the user, or a file that cannot be used; one line that names it and says what would work."""


class RunFailed(RuntimeError):
    """A training cannot go on, for a reason that one line says whole: exit code 1 without a traceback."""


@contextlib.contextmanager
def reading(path: Path | str, need: str = "") -> Iterator[None]:
    """Turn what opening and parsing a file or folder raises into a UserError that names it, and what is needed."""
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
    """Turn what writing a file or folder raises into a UserError that names it, and the option that chose it.

    FileNotFoundError stays: the folder has vanished, and who works with others in it knows why.
    """
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not _of_library(error):
            raise
        raise UserError(f"{option and f'{option}: '}cannot write {path} ({reason_of(error)})") from error


def fault_of(path: Path | str, error: Exception) -> str:
    """Say why a file cannot be read; a pointer that git-lfs has left in its place is called by its name."""
    if is_lfs_pointer(path):
        return LFS_HINT
    if isinstance(error, UnicodeError):
        return "not text in UTF-8"
    return reason_of(error).replace(f"{path}: ", "").replace(f": '{path}'", "").replace(f" '{path}'", "")


def is_lfs_pointer(path: Path | str) -> bool:
    """Tell whether a file is what git-lfs leaves where a large file was not fetched."""
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def reason_of(error: Exception) -> str:
    """Give the text of an error on one line, without what only programmers read."""
    if reason := getattr(error, "strerror", None):  # of the system, or of FFmpeg
        return str(reason)
    no_space = os.strerror(errno.ENOSPC)
    if no_space in str(error) or (isinstance(error, OSError) and "requested and" in str(error)):  # NumPy's
        return no_space
    if isinstance(error, KeyError):
        return f"no {error.args[0]!r} in it" if error.args else "an entry is missing"
    return " ".join(str(error).split())[:300] or type(error).__name__


def _of_library(error: Exception) -> bool:
    return type(error).__module__.split(".")[0] in LIBRARIES
