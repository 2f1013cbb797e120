"""Raw shards: clips of one source in a TarSet, read and written one by one (clip_codec.py)."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from one4d_pl.data.clip_codec import clip_fault, decode_clip, encode_clip
from one4d_pl.data.ranged_reads import ShardSetError, StoreError, one_line
from one4d_pl.data.tar_set import (
    MANIFEST_NAME,
    Manifest,
    Origin,
    SampleEntry,
    SampleError,
    ShardEntry,
    TarSet,
    tar_bytes,
    write_tar,
)
from one4d_pl.files import open_whole
from one4d_pl.types import Clip


@dataclass(frozen=True)
class ShardSet(TarSet):
    """Random access to the clips of one folder of raw shards."""

    def read(self, index: int) -> Clip:
        """Read and check one clip; SampleError for whatever is wrong with it, StoreError where the store fails."""
        shard, entry = self.locate(index)
        try:
            return decode_clip(self.fetch(shard, entry), entry.key, (entry.num_frames, entry.height, entry.width))
        except StoreError:
            raise
        except ValueError as error:
            raise SampleError(entry.key, shard.name, one_line(error)) from error


def pack_clip(
    clip: Clip, scene: str = "", benchmark: str = "", consistency: float | None = None
) -> tuple[SampleEntry, bytes]:
    """Pack a clip as it will stand in a shard. Raises ValueError, naming its key, where it breaks the schema."""
    try:
        if fault := clip_fault(clip):
            raise ValueError(fault)
        content = tar_bytes(clip.key, encode_clip(clip))
    except ValueError as error:
        raise ValueError(f"{clip.key}: {error}") from error
    num_frames, height, width = clip.depth.shape
    place = (0, len(content), zlib.crc32(content))  # write_tar sets the offset
    return SampleEntry(clip.key, *place, num_frames, height, width, scene, benchmark, consistency), content


def write_shards(clips: Iterable[Clip], folder: str | Path, samples_per_shard: int) -> ShardSet:
    """Write the clips of one source as shards, the manifest last.

    The same clips give the same bytes. Raises ValueError for a clip that breaks the schema (naming
    its key) and ShardSetError where `folder` already holds shards or `clips` is empty. A folder
    without a manifest is no shard set and may be written again.
    """
    folder = Path(folder)
    if (folder / MANIFEST_NAME).exists():
        raise ShardSetError(f"{folder}: already holds shards; remove the folder or choose another")
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[ShardEntry] = []
    origins: set[Origin] = set()
    checked = enumerate(_checked(clips, origins))
    for number, group in itertools.groupby(checked, key=lambda pair: pair[0] // samples_per_shard):
        path = folder / f"shard-{number:06d}.tar"
        shards.append(write_tar(path, (pack_clip(clip) for _, clip in group), folder))
    if not shards:
        raise ShardSetError(f"{folder}: not one clip to write")
    for stale in {path.name for path in folder.glob("shard-*.tar")} - {shard.name for shard in shards}:
        (folder / stale).unlink()  # left by a longer run that died before its manifest
    (origin,) = origins
    with open_whole(folder / MANIFEST_NAME) as file:
        file.write(Manifest(**asdict(origin), shards=tuple(shards)).to_json().encode())
    return ShardSet.open(folder)


def _checked(clips: Iterable[Clip], origins: set[Origin]) -> Iterator[Clip]:
    """Yield the clips. Raises ValueError unless keys are unique and source, domain and licence the same in all."""
    keys: set[str] = set()
    for clip in clips:
        if clip.key in keys:
            raise ValueError(f"{clip.key}: a second clip with this key")
        keys.add(clip.key)
        origins.add(Origin(clip.source, clip.domain, clip.licence))
        if len(origins) > 1:
            raise ValueError(f"{clip.key}: one folder holds one source, domain and licence, got {list(origins)}")
        yield clip
