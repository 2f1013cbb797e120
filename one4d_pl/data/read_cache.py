"""What was read of remote shards, kept on a local disk: bounded in size, shared by every process of a node.

A file per byte range, named by where it came from. It only ever saves time: a file is believed if its CRC-32 is right,
and whatever fails here (a full disk, a lock that stays taken) costs a warning and another read of the store.

Whoever adds a file holds the lock, and counts it in the ledger before writing it. So a process killed at any moment
leaves the ledger too high, never too low, and the bound holds at every moment. When the ledger says that a file does
not fit, the folder is counted anew and the files that were used longest ago go.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from one4d_pl.data.file_lock import locked

log = logging.getLogger(__name__)

LEDGER = "ledger"  # holds the bytes of all other files, as a number; its lock is the folder's
LOCK_WAIT_S = 2.0
LOCK_POLL_S = 0.005
KEPT_SHARE = 0.9  # of the bound, after an eviction: counting the folder is not to be done for every file
SUFFIX, UNFINISHED = ".range", ".tmp"


@dataclass(frozen=True)
class RangeCache:
    """Byte ranges by name in one folder, which must be of a disk of this node; holds no open file."""

    folder: Path
    limit: int  # bytes

    def name(self, url: str, start: int, end: int, crc32: int) -> str:
        """The file of a range."""
        return hashlib.sha256(f"{url}\n{start}\n{end}\n{crc32}".encode()).hexdigest()[:32] + SUFFIX

    def get(self, name: str, size: int, crc32: int) -> bytes | None:
        """The content, or None where it is not kept; a damaged file is removed."""
        path = self.folder / name
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _warn(self.folder, str(error))
            return None
        if len(content) != size or zlib.crc32(content) != crc32:
            log.warning("%s: damaged, read again", path)
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):  # evicted by another process in this moment
            os.utime(path)  # used just now
        return content

    def put(self, name: str, content: bytes) -> None:
        """Keep a range, at the cost of those that were used longest ago."""
        path = self.folder / name
        if len(content) > self.limit:
            return
        try:
            with self._lock() as ledger:
                if path.exists():
                    return  # another process was faster
                self._make_room(ledger, len(content))
                unfinished = path.with_suffix(UNFINISHED)
                unfinished.write_bytes(content)  # not flushed to disk: what a power cut tears has a wrong CRC-32
                unfinished.replace(path)
        except OSError as error:
            _warn(self.folder, str(error))

    def _lock(self) -> contextlib.AbstractContextManager[BinaryIO]:
        """The ledger, open and locked; TimeoutError where another process does not let go of it."""
        return locked(self.folder / LEDGER, LOCK_WAIT_S, LOCK_POLL_S)

    def _make_room(self, ledger: BinaryIO, needed: int) -> None:
        """Enter `needed` more bytes into the ledger, after an eviction where they do not fit; the lock is held."""
        ledger.seek(0)
        text = ledger.read()
        total = int(text) if text.isdigit() else None  # a new folder, or a torn ledger: count
        if total is None or total + needed > self.limit:
            total = self._evict(needed)
        ledger.truncate(0)
        ledger.write(str(total + needed).encode())
        ledger.flush()

    def _evict(self, needed: int) -> int:
        """Remove what was used longest ago until `needed` bytes fit well; returns the bytes that stay."""
        kept: list[tuple[int, int, str]] = []  # time of last use, bytes, path
        for file in os.scandir(self.folder):
            if file.name.endswith(UNFINISHED):
                os.unlink(file)  # of a process that was killed: who writes holds the lock, and we do
            elif file.name.endswith(SUFFIX):
                kept.append((file.stat().st_mtime_ns, file.stat().st_size, file.path))
        total = sum(size for _, size, _ in kept)
        if total + needed <= self.limit:
            return total
        for _, size, path in sorted(kept):
            if total + needed <= KEPT_SHARE * self.limit or not total:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        return total


@functools.cache
def _warn(folder: Path, reason: str) -> None:
    """Once per process and reason."""
    log.warning("data.cache_dir: %s: %s; reading on without it", folder, reason)
