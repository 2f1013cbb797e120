"""Laws of labelling: each clip once, nothing half-done.

The tools themselves are not here. A program of the same name stands in their place that leaves the same folders.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from data_prep.label import LABELERS, main
from data_prep.write_shards import main as write_main
from one4d_pl.data.shards import ShardSet
from one4d_pl.scene.folder import save_video
from tests.data_prep.label_layouts import WRITERS
from tests.data_prep.raw_layouts import Shot, film
from tests.data_prep.test_sources import worst_reprojection

OUTPUT = {"vipe": "--output", "da3": "--export-dir"}


def raw_video(path: Path, shot: Shot) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_video(path, torch.from_numpy(shot.frames), 12, crf=4)
    return path


def program(folder: Path, tool: str, shots: dict[str, Shot]) -> Path:
    """Write a program that leaves what the tool would leave of these clips, and fails on any other."""
    for name, shot in shots.items():
        WRITERS[tool](folder / "canned" / name, shot, name)
    path = folder / tool
    path.write_text(
        f"""#!{sys.executable}
import pathlib, shutil, sys
clip, out = pathlib.Path(sys.argv[2]).stem, pathlib.Path(sys.argv[sys.argv.index("{OUTPUT[tool]}") + 1])
(written,) = (pathlib.Path({str(folder)!r}) / "canned" / clip).iterdir()
print("labelling", clip, sys.argv)
shutil.copytree(written, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("clip.json"))
"""
    )
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("tool", ["vipe", "da3"])
def test_each_clip_is_labelled_once(tmp_path, tool, capsys):
    shots = {name: film(seed=seed) for name, seed in (("a", 2), ("b", 0))}
    clips = [raw_video(tmp_path / f"clips/{name}.mp4", shot) for name, shot in shots.items()]
    words = [str(tmp_path / "clips"), "--with", tool, "--out", str(tmp_path / "labels"), "--licence", "CC-BY-4.0"]
    words += ["--model", "dav3"] if tool == "vipe" else []
    broken = program(tmp_path / "bin", tool, {"a": shots["a"]})
    assert main([*words, "--program", str(broken)]) == 1  # it fails on b
    assert "1 of 2 clips are labelled" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "labels").iterdir()) == ["a", "a.log", "b.log"]
    before = (tmp_path / "labels/a/clip.json").stat().st_mtime_ns
    whole = program(tmp_path / "other", tool, shots)
    assert main([*words, "--program", str(whole)]) == 0
    assert (tmp_path / "labels/a/clip.json").stat().st_mtime_ns == before
    said = json.loads((tmp_path / "labels/b/clip.json").read_text())
    assert said["fps"] == 12 and said["tool"] == tool and said["domain"] == "real"
    free = "CC-BY-NC-4.0" if tool == "vipe" else "Apache-2.0"
    assert said["licence"] == f"CC-BY-4.0 AND {free}"
    assert str(clips[1]) in (tmp_path / "labels/b.log").read_text()
    assert main([*words, "--program", str(whole), "--rank", "1", "--world", "2"]) == 0
    assert "1 of 1 clips are labelled" in capsys.readouterr().out


def test_a_tool_that_hangs_is_ended(tmp_path, caplog):
    raw_video(tmp_path / "clips/a.mp4", film())
    hangs = tmp_path / "da3"
    hangs.write_text("#!/bin/sh\nexec sleep 600\n")
    hangs.chmod(0o755)
    words = [str(tmp_path / "clips"), "--with", "da3", "--out", str(tmp_path / "labels"), "--program", str(hangs)]
    assert main([*words, "--minutes", "0.01"]) == 1
    assert "took more than 0.01 minutes" in caplog.text and not (tmp_path / "labels/a").exists()


def test_no_labels_that_may_not_be_used_commercially_by_default():
    for tool, labeler in LABELERS.items():
        assert labeler.default is None or labeler.models[labeler.default] == "Apache-2.0", tool


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    def error_of(*words: str) -> str:
        assert main([str(tmp_path / "clips"), "--out", str(tmp_path / "labels"), *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    (tmp_path / "clips").mkdir()
    assert "data_prep.cut_clips makes them" in error_of("--with", "da3")
    raw_video(tmp_path / "clips/a.mp4", film(num_frames=9))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no program da3; install it (https://github.com/ByteDance-Seed/" in error_of("--with", "da3")
    assert "--model default (CC-BY-NC-4.0), no_vda" in error_of("--with", "vipe")
    assert "has no package mapanything; install it" in error_of("--with", "mapanything")
    assert "--licence: the licence is" in error_of("--with", "da3", "--program", "/bin/true", "--licence", "")
    assert not (tmp_path / "labels/a").exists()


MAPANYTHING = """
import numpy, os, torch
class MapAnything:
    def from_pretrained(name):
        assert name == "facebook/map-anything-apache"
        return MapAnything()
    def to(self, device):
        return self
    def infer(self, views, **settings):
        kept = numpy.load(os.environ["CANNED"])
        names = {"depth": "depth_z", "extrinsic": "camera_poses", "intrinsic": "intrinsics", "images": "img_no_norm"}
        pick = lambda t: {key: torch.from_numpy(kept[name][t])[None] for name, key in names.items()}
        masks = kept["final_mask"]
        return [pick(t) | {"mask": torch.from_numpy(masks[t])[None, ..., None], "conf": torch.from_numpy(kept["conf"][t])[None]}
                for t in range(len(views))]
"""  # fmt: skip # noqa: E501


def test_mapanything_is_driven_through_its_python(tmp_path, monkeypatch):
    """With a package of the same calls in its place."""
    shot = film()
    raw_video(tmp_path / "clips/walk.mp4", shot)
    WRITERS["mapanything"](tmp_path / "canned", shot)
    package = tmp_path / "site/mapanything"
    for part, text in (
        ("models", MAPANYTHING),
        ("utils", ""),
        ("utils/image", "import os\nload_images = os.listdir\n"),
    ):
        (package / part).mkdir(parents=True, exist_ok=True)
        (package / part / "__init__.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(package.parent) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("CANNED", str(tmp_path / "canned/walk/predictions.npz"))
    words = [str(tmp_path / "clips"), "--with", "mapanything", "--out", str(tmp_path / "labels")]
    assert main(words) == 0
    assert sorted(p.name for p in (tmp_path / "labels/walk").iterdir()) == ["clip.json", "predictions.npz"]
    shards = shards_of(tmp_path, "mapanything")
    assert worst_reprojection(shards.read(0), shot) <= 0.01


def shards_of(folder: Path, tool: str) -> ShardSet:
    words = ["--source", tool, "--root", str(folder / "labels"), "--out", str(folder / "shards"), "--num-frames", "9"]
    assert write_main([*words, "--height", "48", "--width", "64"]) == 0
    return ShardSet.open(folder / "shards")
