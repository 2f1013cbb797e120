"""Sets of tars that are read by byte range: the manifest, reader and writer of every kind of shard.

1. A folder holds `shard-000000.tar` ... and `manifest.json`, written last: without it a folder is no set.
2. A shard is a plain WebDataset tar; the members of one sample lie side by side.
3. The manifest lists each sample's byte range and CRC-32, so a reader needs one ranged read per sample, locally or
   through any fsspec URL, and a flipped byte is always noticed.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
import json
import re
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Self

from webdataset.writer import TarWriter

from one4d_pl.data.clip_codec import MAX_STACKED_PIXELS, SAFE_KEY, SCHEMA_VERSION
from one4d_pl.data.ranged_reads import PLAIN_READER, RangeReader, ShardSetError, StoreError, one_line
from one4d_pl.data.texts import licence_text, listed_names
from one4d_pl.errors import LFS_HINT, UserError, is_lfs_pointer
from one4d_pl.files import open_whole

MANIFEST_NAME = "manifest.json"
FLAGGED_NAME = "check/exclude.txt"  # beside the manifest: the clips that data_prep.check_shards flagged
SAFE_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.tar")
SPLITS = ("all", "train", "val")

Recipe = dict[str, str | int | float | bool | None]


class SampleError(UserError):
    """One broken sample; the rest of its shard set may be fine."""

    def __init__(self, key: str, shard: str, reason: str) -> None:
        super().__init__(key, shard, reason)  # pickle rebuilds the error from these args in another process
        self.key, self.shard, self.reason = key, shard, reason

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key}: {self.reason}"


@dataclass(frozen=True)
class SampleEntry:
    """Where one sample lies within its shard, and what must be known of it without reading it."""

    key: str
    offset: int  # bytes from the start of the tar to the header of the sample's first member
    size: int  # bytes up to the end of the last member's padding
    crc32: int  # of these bytes
    num_frames: int
    height: int
    width: int
    scene: str = ""  # no split puts clips of one scene on both sides; "" = unknown
    benchmark: str = ""  # the evaluation set that this clip belongs to; `fit` refuses to train on it
    # how well the frames' depth and cameras agree, 0 .. 1 (data_prep.conventions.consistency_of); None = not measured
    consistency: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.key, str) or not SAFE_KEY.fullmatch(self.key):
            raise ValueError(f"unsafe key {self.key!r}")
        numbers = (self.size, self.num_frames, self.height, self.width)
        if not all(type(n) is int for n in (self.offset, self.crc32, *numbers)) or min(numbers) < 1 or self.offset < 0:
            raise ValueError(f"{self.key}: offset, crc32 and sizes must be whole numbers, got {asdict(self)}")
        if not isinstance(self.scene, str) or not isinstance(self.benchmark, str):
            raise ValueError(f"{self.key}: scene and benchmark must be text")
        if self.consistency is not None and not (
            isinstance(self.consistency, float | int) and 0 <= self.consistency <= 1
        ):
            raise ValueError(f"{self.key}: consistency is {self.consistency!r}, need 0 to 1, or null")
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

    @staticmethod
    def from_tree(tree: dict) -> ShardEntry:
        """Build an entry of parsed json; KeyError, TypeError or ValueError where it is none."""
        samples = tuple(SampleEntry(**entry) for entry in tree["samples"])
        return ShardEntry(tree["name"], tree["sha256"], tree["bytes"], samples)


@dataclass(frozen=True)
class Origin:
    """The properties that all clips of one set share."""

    source: str
    domain: str
    licence: str


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`: every shard, and the properties that all its clips share."""

    source: str
    domain: str
    licence: str
    shards: tuple[ShardEntry, ...]
    kind: str = "raw"  # raw | encoded
    split: str = "all"  # one of SPLITS: whether scenes were held out, and which part this is
    recipe: Recipe = field(default_factory=dict)  # the settings that made it

    def to_json(self) -> str:
        """Write the text of the file."""
        return json.dumps({"version": SCHEMA_VERSION, **asdict(self)}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str, kinds: tuple[str, ...] = ("raw",)) -> Manifest:
        """Parse and check the text of the file; ValueError tells what is wrong with it."""
        tree = json.loads(text)
        if not isinstance(tree, dict) or tree.get("version") != SCHEMA_VERSION or tree.get("kind") not in kinds:
            raise ValueError(f'expected "version": {SCHEMA_VERSION} and "kind": "{" or ".join(kinds)}"')
        try:
            shards = tuple(ShardEntry.from_tree(shard) for shard in tree["shards"])
            split, recipe = tree.get("split", "all"), tree.get("recipe", {})
            manifest = Manifest(
                tree["source"], tree["domain"], licence_text(tree["licence"]), shards, tree["kind"], split, recipe
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"a field is missing or of the wrong type ({error})") from error
        if split not in SPLITS or not isinstance(recipe, dict):
            raise ValueError(f"split must be one of {SPLITS} and recipe a mapping")
        keys = [sample.key for shard in shards for sample in shard.samples]
        if not keys or len(set(keys)) != len(keys) or not all(shard.samples for shard in shards):
            raise ValueError("no sample, a shard without samples, or a key that occurs twice")
        return manifest


@dataclass(frozen=True)
class TarSet:
    """Random access to the samples of one folder. Holds no open file, so workers may fork or pickle it."""

    kind: ClassVar[str] = "raw"
    remedy: ClassVar[str] = "make it with: python -m data_prep.write_shards --source ... --root ... --out {folder}"

    location: str  # folder or fsspec URL
    manifest: Manifest
    starts: tuple[int, ...]  # index of each shard's first sample
    reader: RangeReader

    @classmethod
    def open(cls, location: str | Path, reader: RangeReader = PLAIN_READER) -> Self:
        """Read the manifest of a folder or fsspec URL. ShardSetError tells how to make a missing or broken one."""
        folder = str(location).rstrip("/")
        return cls.of(folder, read_manifest(folder, (cls.kind,), cls.remedy.format(folder=folder), reader), reader)

    @classmethod
    def of(cls, folder: str, manifest: Manifest, reader: RangeReader) -> Self:
        """Make the set of a manifest that was read."""
        sizes = [len(shard.samples) for shard in manifest.shards]
        return cls(folder, manifest, tuple(itertools.accumulate(sizes[:-1], initial=0)), reader)

    def without_flagged(self) -> Self:
        """Return the set without the clips on its FLAGGED_NAME, if there is one. ShardSetError where none is left."""
        path = f"{self.location}/{FLAGGED_NAME}"
        try:
            listed = listed_names(self.reader.read_whole(path).decode())
        except FileNotFoundError:
            return self
        except UnicodeDecodeError:
            raise ShardSetError(f"{path}: no text in UTF-8; data_prep.check_shards writes it") from None
        return self._only(lambda entry: entry.key not in listed, f"{path}: lists every clip of the set")

    def consistent(self, least: float) -> Self:
        """Return the set of the clips of at least this consistency; 0 = all. ShardSetError where none is left."""
        if least <= 0:
            return self
        known = [entry.consistency for entry in self.entries if entry.consistency is not None]
        where = f"data.min_consistency: {self.location}"
        if not known:
            raise ShardSetError(f"{where} says no consistency of its clips; write its shards again")
        nothing_left = f"{where} has no clip of consistency {least:g}; its best has {max(known):.3f}"
        return self._only(lambda entry: (entry.consistency or 0) >= least, nothing_left)

    def _only(self, wanted: Callable[[SampleEntry], bool], nothing_left: str) -> Self:
        kept = [replace(shard, samples=tuple(filter(wanted, shard.samples))) for shard in self.manifest.shards]
        shards = tuple(shard for shard in kept if shard.samples)
        if not shards:
            raise ShardSetError(nothing_left)
        return type(self).of(self.location, replace(self.manifest, shards=shards), self.reader)

    def __len__(self) -> int:
        return self.starts[-1] + len(self.manifest.shards[-1].samples)

    @property
    def samples_per_shard(self) -> list[int]:
        """List the number of samples of each shard, in the manifest's order."""
        return [len(shard.samples) for shard in self.manifest.shards]

    @property
    def entries(self) -> list[SampleEntry]:
        """List every sample's entry, in order."""
        return [sample for shard in self.manifest.shards for sample in shard.samples]

    def key(self, index: int) -> str:
        """Return the key of a sample."""
        return self.locate(index)[1].key

    def locate(self, index: int) -> tuple[ShardEntry, SampleEntry]:
        """Return the shard and entry of a sample; IndexError outside the set."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.location}: sample {index} of {len(self)}")
        number = bisect.bisect_right(self.starts, index) - 1
        shard = self.manifest.shards[number]
        return shard, shard.samples[index - self.starts[number]]

    def fetch(self, shard: ShardEntry, entry: SampleEntry) -> bytes:
        """Read and check the bytes of one sample; ValueError where they are wrong, StoreError if the store fails."""
        return self.reader.read(f"{self.location}/{shard.name}", entry.offset, entry.offset + entry.size, entry.crc32)


def read_manifest(folder: str, kinds: tuple[str, ...], remedy: str, reader: RangeReader) -> Manifest:
    """Read the manifest of a folder or URL; ShardSetError, with the remedy, where it is missing or broken."""
    try:
        return Manifest.from_json(reader.read_whole(f"{folder}/{MANIFEST_NAME}").decode(), kinds)
    except FileNotFoundError as error:
        raise ShardSetError(f"{folder}: no {MANIFEST_NAME}; {remedy}") from error
    except StoreError:
        raise
    # not json, or a protocol for which fsspec or a package of it is missing
    except (ValueError, RecursionError, ImportError) as error:
        reason = LFS_HINT if is_lfs_pointer(f"{folder}/{MANIFEST_NAME}") else one_line(error)
        raise ShardSetError(f"{folder}: cannot read {MANIFEST_NAME} ({reason}); {remedy}") from error


def tar_bytes(key: str, members: dict[str, bytes]) -> bytes:
    """Write one sample as it stands in a tar: headers, contents, padding; no end of archive."""
    buffer = io.BytesIO()
    # encoder=False, since the members are bytes already; fixed owner, mode and time give equal bytes
    with TarWriter(buffer, user="", group="", mode=0o444, mtime=0, compress=False, encoder=False) as tar:
        tar.write({"__key__": key, **members})
        end = tar.tarstream.offset
    return buffer.getvalue()[:end]


def write_tar(
    path: Path,
    samples: Iterable[tuple[SampleEntry, bytes]],  # offsets are set here; the bytes are of `tar_bytes`
    scratch: Path,  # folder of the temporary file, on the filesystem of `path`
) -> ShardEntry:
    """Write one shard of finished samples; it appears whole and flushed to disk, or not at all."""
    entries, offset, digest = [], 0, hashlib.sha256()
    with open_whole(path, scratch) as file:
        for entry, content in samples:
            file.write(content)
            digest.update(content)
            entries.append(replace(entry, offset=offset))
            offset += len(content)
        end = bytes(-(offset + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE + 2 * tarfile.BLOCKSIZE)
        file.write(end)
        digest.update(end)
    return ShardEntry(path.name, digest.hexdigest(), offset + len(end), tuple(entries))
