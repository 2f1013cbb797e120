"""The law of damaged downloads: whatever a file holds, a reader gives valid clips, a named skip, or one clear error."""

from __future__ import annotations

import errno
import io
import json
import logging
import random
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.sources import registry
from data_prep.sources.decoding import npy_array
from one4d_pl.data.clip_codec import clip_fault, encode_depth
from tests.data_prep import label_layouts
from tests.data_prep import raw_layouts as raw
from tests.data_prep.raw_layouts import Shot, film

CI_CASES, ALL_CASES = 500, 10_000
SLOWEST = 30.0  # seconds; a case takes a few hundredths
SPATIALVID = "group_0001/65612f9c-b702-5626-a4e9-5ddbea42149d"
WORDS = ["nan", "inf", "-inf", "1e999", "", "-1", "0", "9" * 400, "ü", "\x00", "None", "0x10", "[]", "1,2", "1e-300"]
VALUES = [None, [], {}, "ü", -1, 0, 1e400, float("nan"), [[1]], "9" * 400, True, [None] * 9, 10**40]


@dataclass(frozen=True)
class Layout:
    """A dataset on disk that reads well."""

    source: str
    root: Path
    options: dict[str, object]
    files: list[Path]


def layouts(folder: Path) -> list[Layout]:
    """Every layout of every source, with tiny pictures."""
    small = film(height=16, width=24)
    still = np.zeros((9, 480, 640))
    eye = np.repeat(np.eye(4)[None], 9, axis=0)
    large = Shot(np.zeros((*still.shape, 3), np.uint8), still + 2, eye[:, :3, :3], eye, still > 1)
    pseudo = folder / "pseudo" / "geometry"
    (pseudo / SPATIALVID).parent.mkdir(parents=True)
    np.savez(
        pseudo / f"{SPATIALVID}.npz", frame_numbers=np.arange(0, 18, 2), **raw.generic_arrays(small, pointmaps=True)
    )
    closeup = "20221019_1_250_highbmihand_closeup_suburb_b"
    written = [
        ("tartanair", raw.write_tartanair(folder / "tartanair", large), {}),
        ("omniworld", raw.write_omniworld(folder / "omniworld", small), {}),
        ("bedlam", raw.write_bedlam(folder / "bedlam", small), {}),
        ("bedlam", raw.write_bedlam(folder / "closeup", small, scene=closeup), {}),
        ("pointodyssey", raw.write_pointodyssey(folder / "pointodyssey", small), {}),
        ("spatialvid", raw.write_spatialvid(folder / "spatialvid", small, indexes=True), {}),
        ("spatialvid", raw.write_spatialvid(folder / "pseudo", small, depth=False), {"geometry": pseudo}),
        ("rgbd", raw.write_rgbd(folder / "tum", small), {"stride": 1}),
        ("rgbd", raw.write_rgbd(folder / "bonn", small, "rgbd_bonn_crowd"), {"stride": 1}),
        ("generic", raw.write_generic_npz(folder / "npz", small), {}),
        ("generic", raw.write_generic_folder(folder / "arrays", small, pointmaps=True), {}),
        *((tool, write(folder / tool, small), {}) for tool, write in label_layouts.WRITERS.items()),
    ]
    return [Layout(s, root, o, sorted(p for p in root.rglob("*") if p.is_file())) for s, root, o in written]


# --- what can happen to a file


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def flip_bits(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    reach = rng.choice([64, 512, len(damaged)])  # headers are where it hurts
    for _ in range(rng.choice([1, 1, 4, 32]) if damaged else 0):
        damaged[rng.randrange(min(reach, len(damaged)))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def overwrite(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    return content[:start] + rng.randbytes(rng.choice([1, 8, 200])) + content[start + 8 :]


def empty(content: bytes, rng: random.Random) -> bytes:
    return b""


def noise(content: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(3000))


def wrong_picture(content: bytes, rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    mode = rng.choice(["RGB", "L", "I;16", "1", "RGBA", "P"])
    Image.new(mode, rng.choice([(1, 1), (24, 16), (16, 24), (640, 480), (48, 32)])).save(buffer, "PNG")
    return buffer.getvalue()


def wrong_array(content: bytes, rng: random.Random) -> bytes:
    """An array of another shape or type, or with numbers that cannot be."""
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
        array = np.array(array) if isinstance(array, np.ndarray) else np.ones((9, 4, 4))
    except (ValueError, EOFError, OSError):
        array = np.ones((9, 7))
    kind = rng.randrange(6)
    if kind == 0 and array.ndim:
        array = array[rng.randrange(len(array) + 1) :]
    elif kind == 1:
        array = array.reshape(-1)
    elif kind == 2:
        array = np.zeros(array.shape, rng.choice(["f8", "f2", "i4", "u1", "c16", "?", "U3", "S4", ">f4"]))
    elif kind == 3:
        array = np.full(array.shape, rng.choice([np.nan, np.inf, -np.inf, 0.0, -1.0, 1e38, 1e-38]))
    elif kind == 4 and array.size and array.dtype.kind == "f":
        array.reshape(-1)[rng.randrange(array.size)] = rng.choice([np.nan, np.inf, -1.0, 0.0, 1e30, 1e-30])
    else:
        array = array[None]
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def wrong_text(content: bytes, rng: random.Random) -> bytes:
    """A line less, a line twice, a word replaced."""
    lines = content.decode("latin-1").splitlines() or [""]
    n, kind = rng.randrange(len(lines)), rng.randrange(4)
    if kind == 0:
        del lines[n]
    elif kind == 1:
        lines.insert(n, lines[n])
    elif kind == 2:
        lines = lines[:n]
    else:
        separator = "," if "," in lines[n] else " "
        words = lines[n].split(separator)
        words[rng.randrange(len(words))] = rng.choice(WORDS)
        lines[n] = separator.join(words)
    return "\n".join(lines).encode(rng.choice(["utf-8", "utf-16", "latin-1"]), "replace")


def wrong_json(content: bytes, rng: random.Random) -> bytes:
    """A value of the tree replaced, or so deep a tree that it cannot be parsed."""
    try:
        tree = json.loads(content)
    except ValueError:
        return b"[" * 100_000
    whole = {"": tree}
    node, at = whole, ""
    while isinstance(node[at], (dict, list)) and node[at] and rng.random() < 0.7:
        node = node[at]
        at = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    node[at] = rng.choice(VALUES)
    return json.dumps(whole[""]).encode()


def wrong_archive(content: bytes, rng: random.Random) -> bytes:
    """A member less, broken, renamed (also to where it must not go), or encrypted by its flag."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except zipfile.BadZipFile:
        members = {"a.npy": content}
    name = rng.choice(list(members) or [""])
    member = members.pop(name, b"")
    kind = rng.randrange(5)
    if kind == 1:
        members[name] = rng.choice(BYTES)(member, rng)
    elif kind == 2:
        evil = rng.choice(["../../evil", "/tmp/evil", "..\\evil", "ü", "C:/evil", "a/../../evil", "evil\x00"])
        members[evil + Path(name).suffix] = member
    elif kind == 3:
        members[name] = wrong_array(member, rng)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for key, value in members.items():
            archive.writestr(key, value)
    damaged = buffer.getvalue()
    return (
        damaged.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01") if kind == 4 else damaged
    )


Damage = Callable[[bytes, random.Random], bytes]
BYTES: list[Damage] = [truncate, flip_bits, overwrite, empty, noise]
BY_SUFFIX: dict[str, list[Damage]] = {
    ".png": [wrong_picture],
    ".jpg": [wrong_picture],
    ".npy": [wrong_array, wrong_array],
    ".npz": [wrong_archive, wrong_archive],
    ".zip": [wrong_archive, wrong_archive],
    ".txt": [wrong_text, wrong_text, wrong_text],
    ".csv": [wrong_text, wrong_text, wrong_text],
    ".json": [wrong_json, wrong_json, wrong_text],
}


@contextmanager
def damaged(path: Path, rng: random.Random) -> Iterator[str]:
    """The file damaged in one way; afterwards it is as it was."""
    content = path.read_bytes()
    kind = rng.randrange(12)
    try:
        if kind == 0:
            path.unlink()
            yield f"{path.name} is missing"
        elif kind == 1:
            path.unlink()
            path.mkdir()
            yield f"{path.name} is a folder"
        elif kind == 2:
            new = path.with_name(rng.choice(["日本語", "a b", "ü" * 30, "..x", "-", "999999", "😀"]) + path.suffix)
            path.rename(new)
            try:
                yield f"{path.name} is called {new.name}"
            finally:
                new.unlink(missing_ok=True)
        else:
            change = rng.choice(BYTES + BY_SUFFIX.get(path.suffix, []) * 2)
            path.write_bytes(change(content, rng))
            yield f"{path.name} after {change.__name__}"
    finally:
        if path.is_dir():
            path.rmdir()
        path.write_bytes(content)


def run_case(seed: int, all_layouts: list[Layout]) -> None:
    """One damaged dataset; AssertionError tells what a reader did that it must not."""
    rng = random.Random(seed)
    layout = all_layouts[seed % len(all_layouts)]
    # sorted by kind of file first: a sequence has many pictures, one camera file
    kinds = sorted({(path.parent.name, path.suffix) for path in layout.files})
    kind = rng.choice(kinds)
    path = rng.choice([path for path in layout.files if (path.parent.name, path.suffix) == kind])
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("data_prep.sources.tracks")
    logger.addHandler(handler)
    logger.propagate = False  # pytest would keep all lines of thousands of cases
    started = time.monotonic()
    clips = []
    try:
        with damaged(path, rng) as what:
            where = f"seed {seed}: {layout.source}, {what}"
            try:
                clips = list(registry.iter_clips(layout.source, layout.root, 9, **layout.options))  # type: ignore[arg-type]
            except ValueError as error:
                records.append(str(error))
            except Exception as error:
                raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
    assert clips or records, f"{where}: no clip and no word about it"
    assert all(record.strip() and "\n" not in record for record in records), f"{where}: {records}"
    for clip in clips:
        assert clip_fault(clip) is None, f"{where}: {clip_fault(clip)}"
        encode_depth(clip.depth.numpy())
    assert time.monotonic() - started < SLOWEST, f"{where}: takes {time.monotonic() - started:.0f} s"


@pytest.fixture(scope="module")
def all_layouts(tmp_path_factory: pytest.TempPathFactory) -> list[Layout]:
    found = layouts(tmp_path_factory.mktemp("layouts"))
    for layout in found:
        assert len(list(registry.iter_clips(layout.source, layout.root, 9, **layout.options))) == 1  # type: ignore[arg-type]
    return found


def run_cases(seeds: range, all_layouts: list[Layout]) -> None:
    folder = all_layouts[0].root.parents[0]
    before = sorted(path for path in folder.rglob("*"))
    for seed in seeds:
        run_case(seed, all_layouts)
    assert sorted(path for path in folder.rglob("*")) == before  # nothing was unpacked
    assert not list(Path(tempfile.gettempdir()).glob("evil*"))


def test_damaged_files_give_valid_clips_a_named_skip_or_one_error(all_layouts):
    run_cases(range(CI_CASES), all_layouts)


@pytest.mark.slow
def test_damaged_files_in_large_numbers(all_layouts):
    run_cases(range(CI_CASES, CI_CASES + ALL_CASES), all_layouts)


def test_the_fuzz_sees_a_reader_that_lets_an_error_through(all_layouts, monkeypatch):
    def careless(path: Path) -> object:
        return json.loads(path.read_text())["nothing"]  # KeyError

    monkeypatch.setattr("data_prep.sources.omniworld.read_json", careless)
    omniworld = next(n for n, layout in enumerate(all_layouts) if layout.source == "omniworld")
    with pytest.raises(AssertionError, match="KeyError"):
        run_case(omniworld, all_layouts)


def test_text_beyond_unicode_is_no_text():
    buffer = io.BytesIO()
    np.save(buffer, np.array("a"))
    assert npy_array(buffer.getvalue(), "x").item() == "a"
    with pytest.raises(ValueError, match="x: its text holds a character beyond Unicode"):
        npy_array(buffer.getvalue()[:-4] + b"\xff\xff\xff\x7f", "x")


def test_names_in_archives_are_never_paths(tmp_path):
    root = raw.write_spatialvid(tmp_path / "inner" / "data", film(height=16, width=24))
    archive = root / "depths" / f"{SPATIALVID}.zip"
    with zipfile.ZipFile(archive) as old:
        contents = [old.read(name) for name in sorted(old.namelist())]
    with zipfile.ZipFile(archive, "w") as new:
        for n, content in enumerate(contents):
            new.writestr(f"../../../../evil/{n:04d}.exr", content)
    before = sorted(tmp_path.rglob("*"))
    assert len(list(registry.iter_clips("spatialvid", root, 9))) == 1  # names are only an order
    assert sorted(tmp_path.rglob("*")) == before
    shutil.rmtree(root)


@pytest.mark.parametrize("source", ["rgbd", "tartanair"])
def test_a_clip_is_not_lost_to_a_failing_disk(tmp_path, source, monkeypatch, caplog):
    """A stale file handle says nothing of the file: the run stops, and goes on when it is started again."""
    shot = film(num_frames=9, height=480, width=640)
    root = {"rgbd": raw.write_rgbd, "tartanair": raw.write_tartanair}[source](tmp_path, shot)
    assert len(list(registry.iter_clips(source, root, 9, 1))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ESTALE, "Stale file handle")))
        with pytest.raises(OSError, match=r"Stale file handle.* not the file; start again to go on, or leave out"):
            list(registry.iter_clips(source, root, 9, 1))
        patch.setattr(Image, "open", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError(errno.ENOENT, "gone")))
        assert list(registry.iter_clips(source, root, 9, 1)) == []
        assert "dropped a clip: " in caplog.text
