"""From a unit of a dataset to the packed clips of a shard: what one process of the writer does.

1. A unit (a trajectory, a scene's sequence, a toy seed) is read by its source as clips.
2. A clip that is excluded, cut, frozen or broken is dropped, with its reason.
3. The others are resized, frames and geometry together, get their captions, and are packed.
No split divides a scene.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.captions import CaptionOptions, best_caption
from data_prep.conventions import consistency_of
from data_prep.quality import reject_reason
from data_prep.sources import registry
from one4d_pl.data.decode import resize_clip
from one4d_pl.data.shards import pack_clip
from one4d_pl.data.staging import Dropped, Plan, Staging
from one4d_pl.data.tar_set import MANIFEST_NAME, Origin, SampleEntry
from one4d_pl.data.texts import listed_names
from one4d_pl.errors import UserError, reading
from one4d_pl.files import read_text
from one4d_pl.toy.world import clip_key, render_clip
from one4d_pl.types import Clip

# Sequences that published evaluations use, as MonST3R's data preparation lists them: all of
# Sintel's training set, five of Bonn and eight of TUM-dynamics.
BENCHMARKS = {
    "sintel": "alley_1 alley_2 ambush_2 ambush_4 ambush_5 ambush_6 ambush_7 bamboo_1 bamboo_2 bandage_1 bandage_2 "
    "cave_2 cave_4 market_2 market_5 market_6 mountain_1 shaman_2 shaman_3 sleeping_1 sleeping_2 temple_2 temple_3",
    "bonn": "balloon2 crowd2 crowd3 person_tracking2 synchronous rgbd_bonn_balloon2 rgbd_bonn_crowd2 rgbd_bonn_crowd3 "
    "rgbd_bonn_person_tracking2 rgbd_bonn_synchronous",
    "tum-dynamics": " ".join(
        f"rgbd_dataset_freiburg3_{who}_{camera}"
        for who in ("sitting", "walking")
        for camera in ("static", "xyz", "halfsphere", "rpy")
    ),
}
BENCHMARK_OF = {name: benchmark for benchmark, names in BENCHMARKS.items() for name in names.split()}


@dataclass(frozen=True)
class UnitTask:
    """One unit, and everything a new process needs to convert it."""

    number: int
    unit: str
    source: str
    root: str | None
    out: Path
    plan: Plan
    num_frames: int
    stride: int | None
    height: int
    width: int
    geometry: str | None
    min_confidence: float
    exclusions: frozenset[str]
    captions: CaptionOptions


@dataclass(frozen=True)
class UnitResult:
    """The outcome of a unit: what was written, and what was left out."""

    clips: int
    bytes: int
    dropped: list[Dropped]


def list_source_units(source: str, root: str | None, seed: int, count: int, domain: str) -> list[str]:
    """List every unit of a source, in the order of the shards; the toy world's are clip keys."""
    if source == "toy":
        return [clip_key(number, domain) for number in range(seed, seed + count)]
    assert root is not None  # write_shards.Arguments checks it
    with reading(root):
        units = registry.list_units(source, root)
        if not units:
            registry.iter_clips(source, root)  # its error says what it looked for
    if not units:
        raise UserError(f"{root}: nothing to convert")
    return units


def read_exclusions(path: str | None) -> set[str]:
    """Read clip keys and units, one per line; what follows a # is a comment."""
    if path is None:
        return set()
    return listed_names(read_text(Path(path)))


def scene_of(source: str, unit: str) -> str:
    """Return the scene that a unit shows; every toy clip is a scene of its own."""
    return unit if source == "toy" else registry.scene_of(source, unit)


def split_units(source: str, units: Sequence[str], split: str, val_share: float) -> list[str]:
    """Return the units of a split; a scene's name alone decides, so more data moves none to the other split."""
    if split == "all":
        return list(units)
    return [unit for unit in units if (_scene_share(scene_of(source, unit)) < val_share) == (split == "val")]


def _scene_share(scene: str) -> float:  # [0, 1)
    return int.from_bytes(hashlib.sha256(scene.encode(errors="surrogateescape")).digest()[:6], "big") / 2**48


def benchmark_of(root: str | None, unit: str) -> str:
    """Return the evaluation set, or "", that a unit belongs to by a folder's name, whether or not that is a link."""
    place = Path(root or ".")
    names = (*place.resolve().parts, *unit.split("/"), *(place / unit).resolve().parts)
    parts = [name.removesuffix(".npz") for name in names]
    return next((BENCHMARK_OF[part] for part in reversed(parts) if part in BENCHMARK_OF), "")


def convert_unit(task: UnitTask) -> UnitResult:
    """Read, check, resize and pack the clips of one unit into the staging folder.

    Nothing is done where the set is complete already: units beyond a limit may still be under way
    when the last clip comes.
    """
    if (task.out / MANIFEST_NAME).exists():
        return UnitResult(0, 0, [])
    dropped: list[Dropped] = []
    staging = Staging(task.out, task.plan)
    samples = _packed_clips(task, dropped)
    try:
        with _SourceLog(task.unit, dropped):
            clips, size = staging.write_unit(task.number, samples, dropped)
    except FileNotFoundError:
        if (task.out / MANIFEST_NAME).exists():  # finished, and its staging folder removed, in the meantime
            return UnitResult(0, 0, [])
        raise
    return UnitResult(clips, size, dropped)


def _packed_clips(task: UnitTask, dropped: list[Dropped]) -> Iterator[tuple[Origin, SampleEntry, bytes]]:
    scene, benchmark = scene_of(task.source, task.unit), benchmark_of(task.root, task.unit)
    for raw in iter_unit(task):
        clip = resize_clip(raw, task.height, task.width)
        reason = "excluded by the list" if clip.key in task.exclusions else reject_reason(clip)
        if reason is None:
            clip = replace(clip, caption=best_caption(clip, task.unit, task.captions))
            try:
                packed = pack_clip(clip, scene, benchmark, consistency_of(clip))
            except ValueError as error:
                reason = str(error).removeprefix(f"{clip.key}: ")
            else:
                yield Origin(clip.source, clip.domain, clip.licence), *packed
                continue
        dropped.append(Dropped(task.unit, clip.key, reason))


def iter_unit(task: UnitTask) -> Iterator[Clip]:
    """Yield the clips of one unit as its source gives them."""
    if task.source == "toy":
        domain, seed = task.unit.removeprefix("toy_").rsplit("_", 1)
        yield render_clip(int(seed), task.num_frames, task.height, task.width, domain)
        return
    assert task.root is not None
    with reading(Path(task.root) / task.unit):
        yield from registry.iter_clips(
            task.source, task.root, task.num_frames, task.stride, [task.unit], task.geometry, task.min_confidence
        )


class _SourceLog(logging.Handler):
    """A log handler that keeps in `dropped` what sources leave out while a unit is read, instead of logging it."""

    def __init__(self, unit: str, dropped: list[Dropped]) -> None:
        super().__init__(logging.WARNING)
        self.unit, self.dropped = unit, dropped
        self.logger = logging.getLogger("data_prep.sources")

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if not re.search(r"\d+ of \d+ clips dropped$", message):  # a total of what was logged before
            self.dropped.append(Dropped(self.unit, "", message.removeprefix("dropped a clip: ")))

    def __enter__(self) -> _SourceLog:
        self.logger.addHandler(self)
        self.propagated, self.logger.propagate = self.logger.propagate, False
        return self

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)
        self.logger.propagate = self.propagated
