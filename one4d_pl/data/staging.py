"""An unfinished tar set, whose units any processes on any machines finish in any order.

1. A unit is a named part of the work (a trajectory, a clip). Its packed samples are written as pieces into `.staging`;
   then a record makes the unit finished. A killed process loses the unit it was working on, and nothing else.
2. `assemble` turns the pieces of finished units, in the plan's order, into shards; one process does it at a time. So
   the shards' bytes do not depend on which process made what, when or how often.
3. After the last shard `dropped.jsonl` and then the manifest are written, and `.staging` is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from one4d_pl.config import changes, flatten
from one4d_pl.data.tar_set import (
    MANIFEST_NAME,
    Manifest,
    Origin,
    Recipe,
    SampleEntry,
    ShardEntry,
    ShardSetError,
    one_line,
    write_tar,
)
from one4d_pl.errors import UserError, writing
from one4d_pl.files import open_whole

STAGING_NAME = ".staging"
DROPPED_NAME = "dropped.jsonl"


@dataclass(frozen=True)
class Dropped:
    """Something that was left out, and why."""

    unit: str
    key: str  # of the clip, "" where the source gave none
    reason: str


@dataclass(frozen=True)
class Plan:
    """What a set will be made of. A run goes on where another stopped only if their plans are equal."""

    units: list[str]
    samples_per_shard: int
    limit: int | None  # stop after so many samples
    kind: str
    split: str
    recipe: Recipe

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise UserError(f"samples per shard must be at least 1, got {self.samples_per_shard}")


def is_finished(folder: Path, kind: str, recipe: Recipe) -> bool:
    """Tell whether the set is whole already. Raises ShardSetError where it was made with other settings."""
    try:
        manifest = Manifest.from_json((folder / MANIFEST_NAME).read_text(), (kind,))
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise ShardSetError(f"{folder}: holds another {MANIFEST_NAME} ({one_line(error)}); choose another") from error
    if differing := changes(manifest.recipe, recipe):
        raise ShardSetError(f"{folder}: already holds shards of other settings: {', '.join(map(str, differing))}")
    shutil.rmtree(folder / STAGING_NAME, ignore_errors=True)  # left by a run that was killed after its manifest
    return True


class Staging:
    """The unfinished set of one folder. Safe to open in many processes: every file appears by one rename."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self.path = folder / STAGING_NAME
        with writing(folder):
            self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(plan))
        plan_file = self.path / "plan.json"
        begun = flatten(self._read(plan_file)) if plan_file.exists() else None
        if begun is not None and (differing := changes(begun, flatten(json.loads(text)))):
            raise ShardSetError(
                f"{folder}: begun with other settings: {', '.join(map(str, differing))}; "
                f"go on with those, or remove {self.path}"
            )
        if not plan_file.exists():
            with open_whole(plan_file) as file:
                file.write(text.encode())
        self._shards: list[ShardEntry] = []
        self._pieces: list[tuple[Path, SampleEntry]] = []  # in the plan's order, up to the first unfinished unit
        self._keys: set[str] = set()
        self._dropped: list[Dropped] = []
        self._origins: set[Origin] = set()
        self._units_read = 0

    def has(self, unit: int) -> bool:
        """Tell whether a unit is finished."""
        return self._record(unit).is_file()

    def write_unit(
        self,
        unit: int,
        samples: Iterable[tuple[Origin, SampleEntry, bytes]],
        dropped: list[Dropped],  # may grow while `samples` is walked
    ) -> tuple[int, int]:  # samples, their bytes
        """Store one unit: its pieces as they come, then the record that makes it finished."""
        entries, origins = [], []
        for number, (origin, entry, content) in enumerate(samples):
            with open_whole(self._piece(unit, number), self.path) as file:
                file.write(content)
            entries.append(asdict(entry))
            origins.append(asdict(origin))
        record = {"samples": entries, "origins": origins, "dropped": [asdict(d) for d in dropped]}
        with open_whole(self._record(unit), self.path) as file:
            file.write(json.dumps(record).encode())
        return len(entries), sum(entry["size"] for entry in entries)

    def assemble(self) -> bool:
        """Make the shards that can be made; return True once the set is whole.

        Nothing happens while another process assembles. Raises ShardSetError where units do not fit together.
        """
        if (self.folder / MANIFEST_NAME).exists():
            return True
        try:
            with self._lock() as locked:
                if locked:
                    self._read_records()
                    whole = self._is_whole()
                    self._write_ready_shards(whole)
                    if whole:
                        self._finish()
        except FileNotFoundError:  # another process has just finished the set and removed the staging folder
            if not (self.folder / MANIFEST_NAME).exists():
                raise
        return (self.folder / MANIFEST_NAME).exists()

    def _record(self, unit: int) -> Path:
        return self.path / f"unit-{unit:07d}.json"

    def _piece(self, unit: int, number: int) -> Path:
        return self.path / f"unit-{unit:07d}-{number:05d}.piece"

    def _journal(self, shard: int) -> Path:
        return self.path / f"shard-{shard:06d}.json"

    def _read(self, path: Path) -> dict:
        """Read a json file that this module has written. Raises ShardSetError where the disk has damaged it."""
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ShardSetError(f"{path}: damaged ({one_line(error)}); remove {self.path} to start over") from error

    @contextlib.contextmanager
    def _lock(self) -> Iterator[bool]:
        """Yield whether this process holds the lock. The kernel frees the lock of a process that dies."""
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def _read_records(self) -> None:
        limit = self.plan.limit
        while self._units_read < len(self.plan.units) and (limit is None or len(self._pieces) < limit):
            unit = self._units_read
            if not self.has(unit):
                return
            record = self._read(self._record(unit))
            for number, tree in enumerate(record["samples"]):
                entry = SampleEntry(**tree)
                if entry.key in self._keys:
                    raise ShardSetError(f"{self.folder}: {entry.key}: a second clip with this key")
                self._keys.add(entry.key)
                self._pieces.append((self._piece(unit, number), entry))
            self._dropped += [Dropped(**tree) for tree in record["dropped"]]
            self._origins |= {Origin(**tree) for tree in record["origins"]}
            if len(self._origins) > 1:
                found = sorted(map(str, self._origins))
                raise ShardSetError(f"{self.folder}: one folder holds one source, domain and licence, got {found}")
            self._units_read += 1

    def _is_whole(self) -> bool:
        limit = self.plan.limit
        if limit is not None and len(self._pieces) >= limit:
            del self._pieces[limit:]
            return True
        return self._units_read == len(self.plan.units)

    def _write_ready_shards(self, whole: bool) -> None:
        size = self.plan.samples_per_shard
        while pieces := self._pieces[len(self._shards) * size : (len(self._shards) + 1) * size]:
            number = len(self._shards)
            if not self._journal(number).exists():
                if len(pieces) < size and not whole:
                    return
                samples = ((entry, _read_piece(path, entry)) for path, entry in pieces)
                shard = write_tar(self.folder / f"shard-{number:06d}.tar", samples, self.path)
                with open_whole(self._journal(number), self.path) as file:
                    file.write(json.dumps(asdict(shard)).encode())
                for path, _ in pieces:
                    path.unlink()
            self._shards.append(ShardEntry.from_tree(self._read(self._journal(number))))

    def _finish(self) -> None:
        with open_whole(self.folder / DROPPED_NAME, self.path) as file:
            file.writelines((json.dumps(asdict(dropped)) + "\n").encode() for dropped in self._dropped)
        if not self._shards:
            why = f"; {len(self._dropped)} dropped, see {self.folder / DROPPED_NAME}" if self._dropped else ""
            shutil.rmtree(self.path)  # so that other settings may be tried
            raise ShardSetError(f"{self.folder}: not one clip to write{why}")
        for stale in {path.name for path in self.folder.glob("shard-*.tar")} - {shard.name for shard in self._shards}:
            (self.folder / stale).unlink()  # made with other settings, whose staging folder was removed
        (origin,) = self._origins
        plan = self.plan
        manifest = Manifest(
            **asdict(origin), shards=tuple(self._shards), kind=plan.kind, split=plan.split, recipe=plan.recipe
        )
        with open_whole(self.folder / MANIFEST_NAME, self.path) as file:
            file.write(manifest.to_json().encode())
        # errors are ignored: others may still write units beyond the limit; is_finished removes the rest
        shutil.rmtree(self.path, ignore_errors=True)


def _read_piece(path: Path, entry: SampleEntry) -> bytes:
    content = path.read_bytes()
    if (len(content), zlib.crc32(content)) != (entry.size, entry.crc32):
        raise ShardSetError(f"{path}: differs from its record (a full or failing disk?); remove {path.parent}")
    return content
