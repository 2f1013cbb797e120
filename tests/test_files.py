"""Files and folders appear whole or not at all, readable as the umask says; what cannot be read or written is named."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from one4d_pl.commands.command import USER_ERROR, exit_code
from one4d_pl.errors import UserError, reading, writing
from one4d_pl.files import (
    check_folder,
    open_whole,
    read_json,
    read_text,
    replaced_folder,
    whole_file,
    whole_folder,
    write_json,
    write_text,
)

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 19000000\n"


class Full(OSError):
    """What a disk without room raises."""

    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("error", [RuntimeError("a bug"), Full(), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "x").write_text("old")
    expected = UserError if isinstance(error, Full) else type(error)
    said = "No space left" if isinstance(error, Full) else None
    with pytest.raises(expected, match=said), whole_file(tmp_path / "x") as staging:
        staging.write_text("half")
        raise error
    assert names(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "old"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), Full(), KeyboardInterrupt()])
def test_a_failed_folder_leaves_the_old_contents_and_the_next_one_replaces_them(tmp_path, error):
    scene = tmp_path / "scene"
    (scene / "frames").mkdir(parents=True)
    for name in ("frames/0.png", "scene.json", "notes of somebody"):
        (scene / name).write_text("old")
    before = names(scene)
    for target in (scene, tmp_path / "new"):
        with (
            pytest.raises((UserError, RuntimeError, KeyboardInterrupt)),
            replaced_folder(target, {"frames"}) as staging,
        ):
            (staging / "frames").mkdir()
            write_text(staging / "frames" / "1.png", "new")
            raise error
    assert names(scene) == before and names(tmp_path) == ["scene", *(f"scene/{name}" for name in before)]
    with replaced_folder(scene, {"frames", "scene.json"}, last="scene.json") as staging:
        for name in ("frames/1.png", "scene.json"):
            write_text(staging / name, "new")
    assert names(scene) == ["frames", "frames/1.png", "notes of somebody", "scene.json"]
    assert (scene / "scene.json").read_text() == "new"


def test_what_a_killed_writer_left_in_a_folder_goes_with_the_next_one(tmp_path):
    (tmp_path / ".new.0123456789ab.tmp" / "frames").mkdir(parents=True)
    with replaced_folder(tmp_path, {"x"}) as staging:
        write_text(staging / "x", "new")
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_every_kind_of_writer_obeys_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with whole_file(tmp_path / "a.safetensors") as staging:  # which narrows what it writes to its owner
            save_file({"x": torch.zeros(2)}, staging)
        with open_whole(tmp_path / "b.npy") as file:
            np.save(file, np.zeros(2))
        write_json(tmp_path / "c.json", {})
        with whole_folder(tmp_path / "d") as staging:
            save_file({"x": torch.zeros(2)}, staging / "d.safetensors")
            (staging / "e.txt").write_text("")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in files} == dict.fromkeys(
        ("a.safetensors", "b.npy", "c.json", "d.safetensors", "e.txt"), mode
    )
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o777 & ~umask
    assert load_file(tmp_path / "a.safetensors")["x"].tolist() == [0, 0]


@pytest.mark.parametrize("place", ["file/x", "file", "x" * 300, "file/deeper/still"])
def test_a_folder_that_cannot_be_is_refused_at_once_without_a_trace(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^--out: cannot write "):
        check_folder(tmp_path / place, "--out")
    check_folder(tmp_path / "new" / "below", "--out")
    check_folder(tmp_path, "--out")
    assert names(tmp_path) == ["file"]


TEXTS = {
    "utf-8": (b"a b\n", "a b\n"),
    "byte order mark": ("a b\n".encode("utf-8-sig"), "a b\n"),
    "utf-16": ("a b\n".encode("utf-16"), "UTF-16; save it in UTF-8"),
    "latin-1": ("ä".encode("latin-1"), "not text in UTF-8"),
    "a picture": (b"\x89PNG\r\n\x1a\n\xff", "not text in UTF-8"),
    "a pointer": (POINTER, POINTER.decode()),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_is_read_with_a_byte_order_mark_or_without_and_other_things_are_named(tmp_path, name):
    content, expected = TEXTS[name]
    (tmp_path / "x.txt").write_bytes(content)
    try:
        assert read_text(tmp_path / "x.txt") == expected
    except UserError as error:
        assert str(error).startswith(f"{tmp_path / 'x.txt'}: ") and expected in str(error)
    with pytest.raises(UserError, match=r"x\.txt: "):
        read_json(tmp_path / "x.txt")


READERS = {
    "npy": lambda path: np.load(path),
    "npz": lambda path: np.load(path)["x"],
    "png": lambda path: Image.open(path).load(),
    "json": lambda path: json.loads(path.read_text()),
    "yaml": lambda path: yaml.safe_load(path.read_text() + "\n: ["),
    "safetensors": lambda path: load_file(path),
    "numbers": lambda path: [float(word) for word in path.read_text().split()],
}


@pytest.mark.parametrize("content", [b"", b"cut sho", POINTER, b"\xff" * 200, b"{}"], ids=str)
@pytest.mark.parametrize("kind", READERS)
def test_a_damaged_file_of_any_kind_is_one_line_with_its_name(tmp_path, kind, content):
    path = tmp_path / f"x.{kind}"
    path.write_bytes(content)
    try:
        with reading(path):
            READERS[kind](path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error) and str(error).count(str(path)) == 1
        assert ("git lfs pull" in str(error)) == (content == POINTER)
    else:
        assert (kind, content) in [("json", b"{}"), ("numbers", b"")]


def test_bugs_of_ours_stay_what_they_are(tmp_path):
    with pytest.raises(AssertionError), reading(tmp_path):
        raise AssertionError("of ours")
    for error in (ValueError("a bug"), TypeError("a bug")):
        with pytest.raises(type(error)), writing(tmp_path):
            raise error
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "x", folder=tmp_path / "vanished"):
        pass


def test_what_a_file_system_refuses_anywhere_is_one_line_of_the_command(capsys):
    def fill() -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/data/x")

    assert exit_code(fill) == USER_ERROR
    assert capsys.readouterr().err == "error: /data/x: Read-only file system\n"
    with pytest.raises(OSError):
        exit_code(lambda: os.close(-1))  # a bug


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said_as_such_by_each_kind_of_writer():
    """/dev/full takes no byte."""
    writers = (
        lambda path: np.save(path.open("wb", buffering=0), np.zeros(10_000)),
        lambda path: path.write_text("x" * 100_000),
        lambda path: Image.new("RGB", (64, 64)).save(path, "PNG"),
    )
    for write in writers:
        said = r"^cannot write /dev/full \(No space left on device\)$"
        with pytest.raises(UserError, match=said), writing("/dev/full"):
            write(Path("/dev/full"))


def test_the_mechanism_is_light():
    code = "import sys, one4d_pl.commands, one4d_pl.files; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], timeout=60).returncode == 0
