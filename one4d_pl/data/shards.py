"""Raw shards: one schema, one writer, a tar index and one reader.

1. A folder holds the clips of one source: `shard-000000.tar` ... and `manifest.json`, written last.
2. A shard is a plain WebDataset tar; the members of one sample lie side by side (clip_codec.py).
3. The manifest lists each sample's byte range and CRC-32, so a reader needs one ranged read per sample, locally or
   through any fsspec URL, and a flipped byte is always noticed.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import fsspec
from webdataset.writer import TarWriter

from one4d_pl.data.clip_codec import (
    MAX_STACKED_PIXELS,
    SAFE_KEY,
    SCHEMA_VERSION,
    decode_clip,
    encode_clip,
    validate_clip,
)
from one4d_pl.types import Clip

MANIFEST_NAME = "manifest.json"
SAFE_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.tar")
RETRY_PAUSES_S = (0.5, 2.0)  # a hiccup of a remote store must not change which samples are seen
READ_TIMEOUT_S = 120.0  # of one ranged read from a remote store


class ShardSetError(ValueError):
    """A folder of shards that cannot be used as a whole."""


class SampleError(ValueError):
    """One broken sample; the rest of its shard set may be fine."""

    def __init__(self, key: str, shard: str, reason: str) -> None:
        super().__init__(key, shard, reason)  # these args let the error travel between processes
        self.key, self.shard, self.reason = key, shard, reason

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key}: {self.reason}"


@dataclass(frozen=True)
class SampleEntry:
    """Where one sample lies within its shard, and its size."""

    key: str
    offset: int  # bytes from the start of the tar to the header of the sample's first member
    size: int  # bytes up to the end of the last member's padding
    crc32: int  # of these bytes
    num_frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if not isinstance(self.key, str) or not SAFE_KEY.fullmatch(self.key):
            raise ValueError(f"unsafe key {self.key!r}")
        numbers = (self.size, self.num_frames, self.height, self.width)
        if not all(type(n) is int for n in (self.offset, self.crc32, *numbers)) or min(numbers) < 1 or self.offset < 0:
            raise ValueError(f"{self.key}: offset, crc32 and sizes must be whole numbers, got {asdict(self)}")
        if self.num_frames * self.height * self.width > MAX_STACKED_PIXELS:
            raise ValueError(f"{self.key}: more than {MAX_STACKED_PIXELS} pixels")


@dataclass(frozen=True)
class ShardEntry:
    """One tar of a shard set."""

    name: str
    sha256: str
    bytes: int
    samples: tuple[SampleEntry, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not SAFE_SHARD.fullmatch(self.name):
            raise ValueError(f"unsafe shard name {self.name!r}")


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`: every shard, and what all its clips have in common."""

    source: str
    domain: str
    licence: str
    shards: tuple[ShardEntry, ...]

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps({"version": SCHEMA_VERSION, "kind": "raw", **asdict(self)}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Parse and check the text of the file; ValueError tells what is wrong with it."""
        tree = json.loads(text)
        if not isinstance(tree, dict) or (tree.get("version"), tree.get("kind")) != (SCHEMA_VERSION, "raw"):
            raise ValueError(f'expected "version": {SCHEMA_VERSION} and "kind": "raw"')
        try:
            shards = tuple(
                ShardEntry(s["name"], s["sha256"], s["bytes"], tuple(SampleEntry(**entry) for entry in s["samples"]))
                for s in tree["shards"]
            )
            manifest = Manifest(tree["source"], tree["domain"], tree["licence"], shards)
        except (KeyError, TypeError) as error:
            raise ValueError(f"a field is missing or of the wrong type ({error})") from error
        keys = [sample.key for shard in shards for sample in shard.samples]
        if not keys or len(set(keys)) != len(keys) or not all(shard.samples for shard in shards):
            raise ValueError("no sample, a shard without samples, or a key that occurs twice")
        return manifest


@dataclass(frozen=True)
class ShardSet:
    """Random access to the clips of one folder of shards; holds no open file, so workers may fork or pickle it."""

    location: str  # folder or fsspec URL
    manifest: Manifest
    starts: tuple[int, ...]  # index of each shard's first sample

    @staticmethod
    def open(location: str | Path) -> ShardSet:
        """Read the manifest of a folder or fsspec URL; ShardSetError tells how to make a missing or broken one."""
        folder = str(location).rstrip("/")
        remedy = f"make it with: python -m data_prep.write_shards --source ... --root ... --out {folder}"
        try:
            filesystem, path = fsspec.core.url_to_fs(f"{folder}/{MANIFEST_NAME}")
            manifest = Manifest.from_json(filesystem.cat_file(path).decode())
        except FileNotFoundError as error:
            raise ShardSetError(f"{folder}: no {MANIFEST_NAME}; {remedy}") from error
        except Exception as error:  # each remote backend raises types of its own
            raise ShardSetError(f"{folder}: cannot read {MANIFEST_NAME} ({_one_line(error)}); {remedy}") from error
        sizes = [len(shard.samples) for shard in manifest.shards]
        return ShardSet(folder, manifest, tuple(itertools.accumulate(sizes[:-1], initial=0)))

    def __len__(self) -> int:
        return self.starts[-1] + len(self.manifest.shards[-1].samples)

    @property
    def samples_per_shard(self) -> list[int]:
        """The number of samples of each shard, in the manifest's order."""
        return [len(shard.samples) for shard in self.manifest.shards]

    def key(self, index: int) -> str:
        """The key of a sample."""
        return self._locate(index)[1].key

    def read(self, index: int) -> Clip:
        """Read and check one clip; SampleError for whatever is wrong with it."""
        shard, entry = self._locate(index)
        try:
            return decode_clip(self._fetch(shard, entry), entry.key, (entry.num_frames, entry.height, entry.width))
        except ValueError as error:
            raise SampleError(entry.key, shard.name, _one_line(error)) from error

    def verify(self) -> None:
        """Compare every shard with the manifest's size and sha256; ShardSetError lists those that differ."""
        different = []
        for shard in self.manifest.shards:
            digest, size = hashlib.sha256(), 0
            try:
                with fsspec.open(f"{self.location}/{shard.name}", "rb") as file:
                    while chunk := file.read(1 << 20):
                        digest.update(chunk)
                        size += len(chunk)
            except FileNotFoundError:
                different.append(f"{shard.name} is missing")
            else:
                if (digest.hexdigest(), size) != (shard.sha256, shard.bytes):
                    different.append(f"{shard.name} differs ({size} bytes, written {shard.bytes})")
        if different:
            raise ShardSetError(f"{self.location}: {'; '.join(different)}")

    def _locate(self, index: int) -> tuple[ShardEntry, SampleEntry]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.location}: sample {index} of {len(self)}")
        number = bisect.bisect_right(self.starts, index) - 1
        shard = self.manifest.shards[number]
        return shard, shard.samples[index - self.starts[number]]

    def _fetch(self, shard: ShardEntry, entry: SampleEntry) -> bytes:
        content = b""
        for pause in (*RETRY_PAUSES_S, None):
            try:
                # opened per read (fsspec caches it per process): remote filesystems do not survive a fork
                filesystem, path = fsspec.core.url_to_fs(f"{self.location}/{shard.name}")
                limit = {"timeout": READ_TIMEOUT_S} if filesystem.async_impl else {}
                content = filesystem.cat_file(path, start=entry.offset, end=entry.offset + entry.size, **limit)
                break
            except FileNotFoundError as error:
                raise ValueError("the shard file is missing") from error
            except Exception as error:  # each remote backend raises types of its own
                if pause is None:
                    raise ValueError(f"cannot be read ({_one_line(error)})") from error
                time.sleep(pause)
        if len(content) != entry.size:
            what = "the shard is cut short" if len(content) < entry.size else "the server ignores byte ranges"
            raise ValueError(f"got {len(content)} of {entry.size} bytes: {what}")
        if zlib.crc32(content) != entry.crc32:
            raise ValueError("its bytes differ from the manifest's checksum: the shard was changed or damaged")
        return content


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def write_shards(clips: Iterable[Clip], folder: str | Path, samples_per_shard: int) -> ShardSet:
    """Write the clips of one source as shards, the manifest last; the same clips give the same bytes.

    Raises ValueError for a clip that breaks the schema (naming its key) and ShardSetError where `folder` already
    holds shards or `clips` is empty. Without its manifest a folder is no shard set and may be written again.
    """
    folder = Path(folder)
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
    if (folder / MANIFEST_NAME).exists():
        raise ShardSetError(f"{folder}: already holds shards; remove the folder or choose another")
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[ShardEntry] = []
    common: set[tuple[str, str, str]] = set()  # source, domain, licence
    checked = _checked(clips, common)
    for number, group in itertools.groupby(enumerate(checked), key=lambda pair: pair[0] // samples_per_shard):
        shards.append(_write_shard((clip for _, clip in group), folder / f"shard-{number:06d}.tar"))
    if not shards:
        raise ShardSetError(f"{folder}: not one clip to write")
    for stale in {path.name for path in folder.glob("shard-*.tar")} - {shard.name for shard in shards}:
        (folder / stale).unlink()  # of a longer run that died before its manifest
    ((source, domain, licence),) = common
    text = Manifest(source, domain, licence, tuple(shards)).to_json()
    with _atomic(folder / MANIFEST_NAME) as file:
        file.write(text.encode())
    return ShardSet.open(folder)


def _checked(clips: Iterable[Clip], common: set[tuple[str, str, str]]) -> Iterator[Clip]:
    """The clips, each checked for the schema, a key of its own and the source, domain and licence of the others."""
    keys: set[str] = set()
    for clip in clips:
        validate_clip(clip)
        if clip.key in keys:
            raise ValueError(f"{clip.key}: a second clip with this key")
        keys.add(clip.key)
        common.add((clip.source, clip.domain, clip.licence))
        if len(common) > 1:
            raise ValueError(f"{clip.key}: one folder holds one source, domain and licence, got {sorted(common)}")
        yield clip


def _write_shard(clips: Iterable[Clip], path: Path) -> ShardEntry:
    shapes: dict[str, tuple[int, ...]] = {}
    with _atomic(path) as file:
        # encoder=False: the members are bytes already; owner, mode and time are fixed for equal bytes
        with TarWriter(file, user="", group="", mode=0o444, mtime=0, compress=False, encoder=False) as tar:
            for clip in clips:
                try:
                    tar.write({"__key__": clip.key, **encode_clip(clip)})
                except ValueError as error:
                    raise ValueError(f"{clip.key}: {error}") from error
                shapes[clip.key] = tuple(clip.depth.shape)
        entries = [SampleEntry(*fields, *shapes[fields[0]]) for fields in index_tar(file)]
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return ShardEntry(path.name, digest, file.tell(), tuple(entries))


def index_tar(file: io.BufferedRandom) -> list[tuple[str, int, int, int]]:
    """Key, offset, size and CRC-32 of the byte range of each sample of an open tar, in order."""
    ranges: dict[str, tuple[int, int]] = {}  # key: start, end
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            key = member.name.split(".", 1)[0]
            padded = -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            start, _ = ranges.get(key, (member.offset, 0))
            ranges[key] = (start, member.offset_data + padded)
    entries = []
    for key, (start, end) in ranges.items():
        file.seek(start)
        entries.append((key, start, end - start, zlib.crc32(file.read(end - start))))
    return entries


@contextlib.contextmanager
def _atomic(path: Path) -> Iterator[io.BufferedRandom]:
    """A file that appears under its name whole and flushed to disk, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
