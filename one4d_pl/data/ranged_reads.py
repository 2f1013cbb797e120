"""Byte ranges of local files and any fsspec URL: each read ends in time, and is right or an error.

1. A read that fails is tried again after growing pauses: a short failure of a store must not change which samples are
   seen.
2. A fault of the file itself (missing, too short, the same wrong bytes twice) is a ValueError: the sample is damaged
   wherever it is read, and every rank takes the same stand-in.
3. A fault of the way to it (no answer, refusals, other bytes each time) is a StoreError and ends the run: a stand-in
   taken by the one rank that met the fault would not be in the other ranks' order, nor in that of the resumed run.
4. Ranges of a remote store are kept in a local cache (read_cache.py) where there is one.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import fsspec

from one4d_pl.data.read_cache import RangeCache
from one4d_pl.errors import LFS_HINT, UserError, is_lfs_pointer

LOCAL_PROTOCOLS = ("file", "local")

Answer = TypeVar("Answer")


class ShardSetError(UserError):
    """A folder of shards that cannot be used as a whole."""


class StoreError(ShardSetError):
    """A store that does not deliver what it holds; the error has one text, see `own_text`."""

    def __init__(self, text: str) -> None:
        super().__init__(own_text(type(self).__name__, text))


def own_text(name: str, text: str) -> str:
    """Cut an error's text out of the traceback from which torch rebuilds a worker's error."""
    return text.split(f"{name}: ", 1)[-1].rstrip()


def one_line(error: Exception) -> str:
    """Return the text of an error without line breaks; its type where it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def is_remote(url: str) -> bool:
    """Tell whether a folder or fsspec URL lies elsewhere than on a mounted disk."""
    protocol, found, _ = url.partition("://")
    return bool(found) and protocol not in LOCAL_PROTOCOLS


@dataclass(frozen=True)
class RangeReader:
    """How byte ranges are read; holds no open file, so that workers may fork or pickle it.

    With n pauses a read makes n + 1 attempts, and each one that fails may be followed by a question
    for the file's size. So it ends within 1.5 x the pauses plus 2 (n + 1) x timeout_s.
    """

    cache: RangeCache | None = None  # of ranges of remote stores
    timeout_s: float = 60.0  # of one attempt
    pauses_s: tuple[float, ...] = (0.5, 2.0, 8.0)  # before the 2nd, 3rd, ... attempt, each x 0.5 .. 1.5

    def read(self, url: str, start: int, end: int, crc32: int) -> bytes:
        """Read bytes [start, end) of a file and check them. Raises ValueError and StoreError as the module says."""
        if self.cache is None or not is_remote(url):
            return self._read(url, start, end, crc32)
        name = self.cache.name(url, start, end, crc32)
        content = self.cache.get(name, end - start, crc32)
        if content is None:
            content = self._read(url, start, end, crc32)
            self.cache.put(name, content)
        return content

    def read_whole(self, url: str) -> bytes:
        """Read a file, unchecked; FileNotFoundError, or StoreError as above."""
        trouble = ""
        for answer in self._answers(url):
            if isinstance(answer, bytes):
                return answer
            trouble = one_line(answer)
        raise self._store_error(url, trouble)

    def _read(self, url: str, start: int, end: int, crc32: int) -> bytes:
        size, previous, trouble = None, None, ""
        try:
            for answer in self._answers(url, start, end):
                if isinstance(answer, bytes):
                    fault = _fault(answer, end - start, crc32)
                    if fault is None:
                        return answer
                    if not is_remote(url) and is_lfs_pointer(url):
                        raise ValueError(LFS_HINT)
                    if not is_remote(url) or (len(answer) == end - start and answer == previous):
                        raise ValueError(fault)
                    previous, trouble = answer, fault
                else:
                    previous, trouble = None, one_line(answer)
                if size is None and not isinstance(answer, TimeoutError):
                    size = self._file_size(url)
                if size is not None and size < end:
                    raise ValueError(f"the file has {size} bytes, not {end}: the shard is cut short")
        except FileNotFoundError as error:
            raise ValueError("the shard file is missing") from error
        raise self._store_error(f"{url} bytes {start} to {end}", trouble)

    def _store_error(self, where: str, trouble: str) -> StoreError:
        return StoreError(
            f"{where}: cannot be read ({trouble}) in {1 + len(self.pauses_s)} attempts of up to {self.timeout_s:g} s; "
            "start again when it can be read: the run goes on where it was"
        )

    def _answers(self, url: str, start: int = 0, end: int | None = None) -> Iterator[bytes | Exception]:
        """Yield the store's answers, one per attempt. Raises FileNotFoundError where it says that there is no file."""
        # opened for each read, since remote filesystems do not survive a fork; fsspec caches them per process
        filesystem, path = fsspec.core.url_to_fs(url)
        span = {} if end is None else {"start": start, "end": end}
        for attempt, pause in enumerate((0.0, *self.pauses_s)):
            # a pause of its own for each range: ranks that wait for one store do not return all at once
            time.sleep(pause * (0.5 + zlib.crc32(f"{url}/{start}/{attempt}".encode()) / 2**32))
            answer: bytes | Exception
            try:
                answer = self._bounded(filesystem, lambda timeout: filesystem.cat_file(path, **span, **timeout))
            except FileNotFoundError:
                raise
            except TimeoutError:
                answer = TimeoutError(f"no answer in {self.timeout_s:g} s")
            except Exception as error:  # each remote backend raises types of its own
                answer = error
            yield answer

    def _file_size(self, url: str) -> int | None:
        """Ask for the size of a file; None where the store does not tell it."""
        filesystem, path = fsspec.core.url_to_fs(url)
        try:
            return self._bounded(filesystem, lambda timeout: filesystem.info(path, **timeout))["size"]
        except Exception:  # any type, as above; the caller already has an error to report
            return None

    def _bounded(self, filesystem: fsspec.AbstractFileSystem, question: Callable[[dict[str, float]], Answer]) -> Answer:
        """Return a filesystem's answer, or TimeoutError after `timeout_s`. Only asynchronous ones know timeouts."""
        if filesystem.async_impl:
            return question({"timeout": self.timeout_s})
        return _within(self.timeout_s, lambda: question({}))


PLAIN_READER = RangeReader()


def _fault(content: bytes, size: int, crc32: int) -> str | None:
    """Say what is wrong with the bytes of a range; None if nothing is."""
    if len(content) != size:
        what = "the shard is cut short" if len(content) < size else "the server ignores byte ranges"
        return f"got {len(content)} of {size} bytes: {what}"
    if zlib.crc32(content) != crc32:
        return "its bytes differ from the manifest's checksum: the shard was changed or damaged"
    return None


def _within(seconds: float, call: Callable[[], Answer]) -> Answer:
    """Run a call that has no timeout of its own, such as a read from a lost server's disk."""
    results: list[Answer] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)  # a thread that hangs must not keep the process alive
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer in {seconds:g} s")
    return results[0]
