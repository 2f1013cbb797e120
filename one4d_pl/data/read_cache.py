"""A bounded cache of reads of remote shards, on a local disk, shared by a node's processes.

It holds one file per byte range, named after its origin. A file is used only if its CRC-32 is
right, and whatever fails here (a full disk, a lock that stays taken) costs a warning and another
read of the store: the cache saves time and can do nothing else.

A process that adds a file holds the lock, and counts the file in the ledger before it writes it. So a process killed at
any moment leaves the ledger too high, never too low, and the bound holds at every moment. When the ledger says that a
file does not fit, the folder's files are counted again and those used longest ago are removed.
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

LEDGER = "ledger"  # a file that holds the number of bytes of all others; locking it locks the folder
LOCK_WAIT_S = 2.0
LOCK_POLL_S = 0.005
KEPT_SHARE = 0.9  # of the bound is left after an eviction, so that not every new file causes another one
SUFFIX, UNFINISHED = ".range", ".tmp"


@dataclass(frozen=True)
class RangeCache:
    """Byte ranges by name, in one folder on a disk of this node; holds no open file."""

    folder: Path
    limit: int  # bytes

    def name(self, url: str, start: int, end: int, crc32: int) -> str:
        """Return the file name of a range."""
        return hashlib.sha256(f"{url}\n{start}\n{end}\n{crc32}".encode()).hexdigest()[:32] + SUFFIX

    def get(self, name: str, size: int, crc32: int) -> bytes | None:
        """Return the content of a range, or None where it is not kept. A damaged file is removed."""
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
        with contextlib.suppress(OSError):  # another process may have evicted it just now
            os.utime(path)  # marks it as just used
        return content

    def put(self, name: str, content: bytes) -> None:
        """Keep a range; where there is no room, remove those used longest ago."""
        path = self.folder / name
        if len(content) > self.limit:
            return
        try:
            with self._lock() as ledger:
                if path.exists():
                    return  # another process was faster
                self._make_room(ledger, len(content))
                unfinished = path.with_suffix(UNFINISHED)
                unfinished.write_bytes(content)  # not flushed: a power cut leaves a wrong CRC-32
                unfinished.replace(path)
        except OSError as error:
            _warn(self.folder, str(error))

    def _lock(self) -> contextlib.AbstractContextManager[BinaryIO]:
        """Open and lock the ledger; TimeoutError where another process does not release it."""
        return locked(self.folder / LEDGER, LOCK_WAIT_S, LOCK_POLL_S)

    def _make_room(self, ledger: BinaryIO, needed: int) -> None:
        """Enter `needed` more bytes into the locked ledger, after an eviction where they do not fit."""
        ledger.seek(0)
        text = ledger.read()
        total = int(text) if text.isdigit() else None  # None: a new folder or a half-written ledger, so count
        if total is None or total + needed > self.limit:
            total = self._evict(needed)
        ledger.truncate(0)
        ledger.write(str(total + needed).encode())
        ledger.flush()

    def _evict(self, needed: int) -> int:
        """Remove what was used longest ago until `needed` bytes fit below KEPT_SHARE. Return the bytes left."""
        kept: list[tuple[int, int, str]] = []  # time of last use, bytes, path
        for file in os.scandir(self.folder):
            if file.name.endswith(UNFINISHED):
                os.unlink(file)  # left by a killed process: only the holder of the lock writes, and that is us
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
    """Log a warning, once per process and reason."""
    log.warning("data.cache_dir: %s: %s; reading on without it", folder, reason)
