"""A file that one process at a time may hold; the kernel frees the lock of a process that dies."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def locked(path: Path, wait_s: float, poll_s: float) -> Iterator[BinaryIO]:
    """Open a file (made if need be) for reading and appending, and lock it; TimeoutError after `wait_s`."""
    with path.open("a+b") as file:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{path} is locked by another process") from None
                time.sleep(poll_s)
        yield file
