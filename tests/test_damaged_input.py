"""Mutated files through every reader: success or one UserError line, no other exception, no hang, no changed input."""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from data_prep.captions import read_table
from data_prep.sources import decoding
from data_prep.units import read_exclusions
from one4d_pl.commands.cameras import read_pointmaps
from one4d_pl.config import load_config
from one4d_pl.data.rgbd_folder import list_files, read_depth_png, read_rgb_png, read_trajectory
from one4d_pl.data.shards import ShardSet, write_shards
from one4d_pl.evaluation.formats import TAG, read_cam, read_dpt
from one4d_pl.files import read_json, read_text
from one4d_pl.models.adapters import AdapterCard
from one4d_pl.models.base_files import safetensors_header
from one4d_pl.models.weights import TensorFiles
from one4d_pl.scene.media import frame_count, frame_rate, load_image, open_video
from one4d_pl.scene.predictions import read_prediction, read_wxyz_trajectory
from one4d_pl.toy.world import render_clip

HANG_S = 30
LINES = "\n".join(f"{10 + i / 30:.5f} {i} 0 0 0 0 0 1" for i in range(20)).encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 19000000\n"


def _npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.random.default_rng(0).random((3, 4, 5, 3)).astype(np.float32))
    return file.getvalue()


def _npz() -> bytes:
    file = io.BytesIO()
    depth = np.random.default_rng(0).random((3, 4, 5)).astype(np.float32)
    cameras = np.tile(np.eye(4), (3, 1, 1))
    np.savez_compressed(file, pointmap=np.stack([depth] * 3, -1), valid=depth > 0, depth=depth, cam2world=cameras)
    return file.getvalue()


def _picture(kind: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels[..., 0].astype(np.uint16)) if mode == "I;16" else Image.fromarray(pixels)
    image.save(file, kind)
    return file.getvalue()


def _video(kind: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for i in range(6):
            picture = np.full((32, 48, 3), 40 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("x"), io.BytesIO(b""))
    return file.getvalue()


def _frames(path: Path) -> None:
    for _ in zip(range(200), open_video(path, None, 16)):
        pass


def _shards(path: Path) -> None:
    shards = ShardSet.open(path.parent)
    for index in range(len(shards)):
        shards.read(index)


def _tensors(path: Path) -> None:
    files = TensorFiles([path], path.parent)
    for name in ("a", "b"):
        if name in files:
            files.read(name).sum()


CARD = json.dumps({"step": 1, "base_path": "x"}).encode()
CSV, JSONL = b"key,caption\na,one\nb,two\n", b'{"key": "a", "caption": "one"}\n{"key": "b", "caption": "two"}\n'
YAML = b"run_dir: runs/x\ntrain: {max_steps: 3}\ndata:\n  num_frames: 9\n"
# name of the file -> a sound one, and what reads it
READERS: dict[str, tuple[Callable[[], bytes], Callable[[Path], object]]] = {
    "a.npy": (_npy, read_pointmaps),
    "b.npy": (_npy, decoding.read_npy),
    "a.npz": (_npz, read_pointmaps),
    "b.npz": (_npz, read_prediction),
    "c.npz": (_npz, lambda path: decoding.read_npz(path, ["depth", "valid"])),
    "a.png": (lambda: _picture("PNG"), load_image),
    "b.png": (lambda: _picture("PNG"), read_rgb_png),
    "c.png": (lambda: _picture("PNG", "I;16"), read_depth_png),
    "d.png": (lambda: _picture("PNG", "I;16"), decoding.read_depth_codes),
    "a.jpg": (lambda: _picture("JPEG"), load_image),
    "b.jpg": (lambda: _picture("JPEG"), decoding.read_image),
    "a.webp": (lambda: _picture("WEBP"), load_image),
    "a.tif": (lambda: _picture("TIFF"), load_image),
    "a.gif": (lambda: _picture("GIF"), load_image),
    "a.bmp": (lambda: _picture("BMP"), load_image),
    "a.mp4": (lambda: _video("mp4"), _frames),
    "a.mkv": (lambda: _video("matroska"), _frames),
    "b.mp4": (lambda: _video("mp4"), lambda path: decoding.read_video(path, [0, 3])),
    "c.mp4": (lambda: _video("mp4"), lambda path: (frame_rate(path), frame_count(path))),
    "a.safetensors": (lambda: save({"a": torch.zeros(3, 4), "b": torch.ones(2)}), _tensors),
    "b.safetensors": (lambda: save({"a": torch.zeros(3, 4), "b": torch.ones(2)}), safetensors_header),
    "a.json": (lambda: json.dumps([{"a": 1.5}, None, "x"]).encode(), read_json),
    "card.json": (lambda: CARD, lambda path: AdapterCard.read(path.parent)),
    "a.csv": (lambda: CSV, read_table),
    "b.csv": (lambda: CSV, decoding.read_csv),
    "a.jsonl": (lambda: JSONL, read_table),
    "a.txt": (lambda: LINES, read_trajectory),
    "b.txt": (lambda: LINES, read_wxyz_trajectory),
    "c.txt": (lambda: b"a # why\nb\n", lambda path: read_exclusions(str(path))),
    "d.txt": (lambda: LINES, read_text),
    "rgb.txt": (lambda: b"10.5 rgb/a.png\n11.5 rgb/b.png\n", lambda path: list_files(path.parent, "rgb")),
    "a.dpt": (lambda: TAG.tobytes() + struct.pack("<ii", 5, 4) + bytes(80), read_dpt),
    "a.cam": (lambda: TAG.tobytes() + np.eye(3).tobytes() + np.eye(4)[:3].tobytes(), read_cam),
    "a.yaml": (lambda: YAML, lambda path: load_config([str(path)], [])),
}


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A cut, flipped, doubled, shuffled or other file."""
    at = rng.randrange(len(content) + 1)
    to = min(len(content), at + rng.choice((1, 4, 16, 200)))
    return rng.choice((
        lambda: content[:at],
        lambda: content[at:],
        lambda: content[:at] + content[to:],
        lambda: content[:at] + rng.randbytes(to - at) + content[to:],
        lambda: content[:at] + bytes(to - at) + content[to:],
        lambda: content[:at] + b"\xff" * (to - at) + content[to:],
        lambda: content[:at] + content[at:to] * 3 + content[to:],
        lambda: content + rng.randbytes(rng.randrange(100)),
        lambda: bytes(byte ^ (rng.random() < 0.01) * rng.randrange(256) for byte in content),
        lambda: content.replace(b"1", rng.choice((b"nan", b"-1", b"1e999", b",", b"\0", b"\xc3", b'"'))),
        lambda: b"\xef\xbb\xbf" + content,
        lambda: content.decode("latin-1").encode("utf-16"),
        lambda: rng.choice((b"", POINTER, b"\0" * 100, rng.randbytes(300), b"{" * 5000, b"[" * 100_000)),
    ))()  # fmt: skip


def fuzz(folder: Path, seed: int, count: int) -> list[str]:
    """What went wrong in so many mutated files, all readers in turn."""
    rng, faults = random.Random(seed), []
    sound = {name: make() for name, (make, _) in READERS.items()}
    for number in range(count):
        name = list(READERS)[number % len(READERS)]
        place = folder / str(number)
        place.mkdir()
        content = mutated(sound[name], rng)
        if rng.random() < 0.3:
            content = mutated(content, rng)
        (place / name).write_bytes(content)
        began = time.monotonic()
        try:
            READERS[name][1](place / name)
        except ValueError as error:  # UserError, or what a source tells of a clip that it leaves out
            text = str(error)
            if "\n" in text or str(place) not in text:
                faults.append(f"{number} {name}: says {text[:300]!r}")
        except Exception as error:
            faults.append(f"{number} {name}: {type(error).__name__}: {error}"[:400])
        if time.monotonic() - began > HANG_S:
            faults.append(f"{number} {name}: took {time.monotonic() - began:.0f} s")
        if (place / name).read_bytes() != content:
            faults.append(f"{number} {name}: changed its input")
    return faults


def fuzz_shards(folder: Path, seed: int, count: int) -> list[str]:
    """The same for a set of shards: its manifest or its tar is another one."""
    rng, faults = random.Random(seed), []
    write_shards([render_clip(s, 9, 32, 48) for s in range(2)], folder / "sound", samples_per_shard=1)
    sound = {path.name: path.read_bytes() for path in (folder / "sound").iterdir()}
    for number in range(count):
        place = folder / f"set-{number}"
        place.mkdir()
        for name, content in sound.items():
            (place / name).write_bytes(content)
        name = rng.choice(sorted(sound))
        (place / name).write_bytes(mutated(sound[name], rng))
        try:
            _shards(place / name)
        except ValueError as error:
            if "\n" in str(error) or (name != "manifest.json" and "shard-" not in str(error)):
                faults.append(f"{number} {name}: says {str(error)[:300]!r}")
        except Exception as error:
            faults.append(f"{number} {name}: {type(error).__name__}: {error}"[:400])
    return faults


def test_sound_files_are_read(tmp_path):
    for name, (make, read) in READERS.items():
        if name != "card.json":  # a whole one is made by training alone
            (tmp_path / name).write_bytes(make())
            read(tmp_path / name)


def test_two_hundred_mutated_files_end_in_success_or_one_line(tmp_path):
    assert not fuzz(tmp_path, 0, 180)
    assert not fuzz_shards(tmp_path, 0, 20)


@pytest.mark.slow
def test_two_thousand_mutated_files_end_in_success_or_one_line(tmp_path):
    assert not fuzz(tmp_path, 1, 1850)
    assert not fuzz_shards(tmp_path, 1, 150)
