"""docs/own_videos.md as it is pasted: from three raw videos to shards, tuned adapters and a scene.

The labeler is a program of the user's own. In its place on the PATH stands a script that leaves what Depth Anything 3
leaves: the true geometry of films that are made up here, and of real ones a still camera before a slanted wall.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from one4d_pl.commands.command import Command
from one4d_pl.data.shards import ShardSet
from one4d_pl.scene.folder import save_video
from one4d_pl.scene.scene import open_scene
from tests.conftest import REPO
from tests.data_prep.label_layouts import write_da3
from tests.data_prep.raw_layouts import Shot, film
from tests.data_prep.real_clips import REAL
from tests.data_prep.test_sources import worst_reprojection
from tests.scene.test_video_kinds import set_matrix
from tests.test_docs import command, commands

QUICK = [
    "train.max_steps=5", "train.global_batch_size=4", "train.micro_batch_size=4", "train.save_every=5", "val.clips=2",
    "data.num_workers=0",
]  # fmt: skip
DA3 = f"""#!{sys.executable}
import pathlib, shutil, sys
import av, numpy
assert sys.argv[1] == "video" and sys.argv[-2:] == ["--export-format", "npz"]
clip, out = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[sys.argv.index("--export-dir") + 1])
canned = pathlib.Path(__file__).parent / "canned" / clip.stem / "exports"
if canned.is_dir():
    shutil.copytree(canned, out / "exports")
    sys.exit()
frames = numpy.stack([f.reformat(80, 48, "rgb24").to_ndarray() for f in av.open(str(clip)).decode(video=0)])
depth = numpy.broadcast_to(numpy.linspace(2, 4, 80, dtype=numpy.float32), frames.shape[:3])
cameras = numpy.tile(numpy.eye(4, dtype=numpy.float32)[:3], (len(frames), 1, 1))
lens = numpy.tile(numpy.array([[80, 0, 39.5], [0, 80, 23.5], [0, 0, 1]], numpy.float32), (len(frames), 1, 1))
(out / "exports/npz").mkdir(parents=True)
numpy.savez_compressed(out / "exports/npz/results.npz", image=frames, depth=depth, conf=numpy.ones_like(depth),
                       extrinsics=cameras, intrinsics=lens)
"""


@pytest.fixture
def labeler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a `da3` that is on the PATH; below `canned` lies what it has made of some clips."""
    program = tmp_path / "bin/da3"
    program.parent.mkdir()
    program.write_text(DA3)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.chdir(tmp_path)
    return program.parent


def own_video_lines() -> Iterator[list[str]]:
    """Yield the page's commands of the tiny scale."""
    page = REPO / "docs/own_videos.md"
    yield from takewhile(lambda words: "configs/scale/wan_1_3b.yaml" not in words, commands(page))


def paste() -> None:
    """Run the page's commands of the tiny scale, but for few steps."""
    for words in own_video_lines():
        if words[0] == ".venv/bin/one4d":
            name, options = words[1], words[2:]
            main = command(name)
        else:
            name, options = words[2].removeprefix("data_prep."), words[3:]
            main = importlib.import_module(words[2]).main
        assert isinstance(main, Command)
        if name == "view" and importlib.util.find_spec("viser") is None:
            continue
        assert main([*options, *(QUICK if name == "fit" else [])]) == 0, words


def raw_video(path: Path, *shots: Shot, turned: bool = False) -> None:
    """Film in 576x432, so that no rule calls it small; the labels keep their 64x48."""
    path.parent.mkdir(exist_ok=True)
    frames = [np.asarray(Image.fromarray(frame).resize((576, 432))) for shot in shots for frame in shot.frames]
    save_video(path, torch.from_numpy(np.stack([np.rot90(f, 1) if turned else f for f in frames])), 12, crf=4)
    if turned:
        set_matrix(path, 0, 1, -1, 0)


def part(shot: Shot, frames: slice) -> Shot:
    return Shot(*(value[frames] for value in vars(shot).values()))


def test_the_page_leads_from_three_raw_videos_to_a_scene(tmp_path, labeler):
    """One has two shots, one is turned, one too short; the labels of the second shot are wrong."""
    films = {"walk-f000000": film(seed=2), "walk-f000009": film(seed=0), "garden-f000000": film(seed=4)}
    first, wrong, turned = films.values()
    raw_video(tmp_path / "my_videos/walk.mp4", first, wrong)
    raw_video(tmp_path / "my_videos/garden.mp4", turned, turned=True)
    raw_video(tmp_path / "my_videos/short.mp4", part(turned, slice(5)))
    for name, shot in films.items():
        write_da3(labeler / "canned", shot, name, wrong=shot is wrong)

    paste()
    why = {row["clip"]: row["why"] for row in csv.DictReader(Path("clips/clips.csv").read_text().splitlines())}
    assert why == {**dict.fromkeys(films, ""), "short-f000000": "short: 5 frames, need 9"}
    shards = {split: ShardSet.open(f"shards/own/{split}") for split in ("train", "val")}
    assert [entry.key for entry in shards["train"].entries] == ["walk-f000000-00000", "walk-f000009-00000"]
    assert [entry.key for entry in shards["val"].entries] == ["garden-f000000-00000"]
    assert shards["train"].manifest.licence == "LicenseRef-own-videos AND Apache-2.0"
    for clip, shot in ((shards["train"].read(0), first), (shards["val"].read(0), turned)):
        assert worst_reprojection(clip, shot) <= 0.01
    (line,) = Path("shards/own/train/check/exclude.txt").read_text().splitlines()
    assert line.startswith("walk-f000009-00000  # ") and "world" in line
    state = json.loads(Path("runs/own/checkpoints/step-00000005/trainer.json").read_text())
    assert state["clips"] == [1]
    scene = open_scene(Path("scenes/walk"))
    assert len(scene.frames) == 18 and bool(scene.depth.isfinite().any())


@pytest.mark.slow  # 90 s, most of it the scene of 64 frames
@pytest.mark.realdata
@pytest.mark.skipif(not REAL.is_dir(), reason="shared/data is not here")
def test_the_page_leads_from_real_videos_to_a_scene(tmp_path, labeler):
    (tmp_path / "my_videos").mkdir()
    shutil.copy(REAL / "videos/drift-turn.mp4", "my_videos/walk.mp4")
    runner = [
        np.asarray(Image.open(path).convert("RGB")) for path in sorted((REAL / "videos/lady-running").glob("*.jpg"))
    ]
    save_video(Path("my_videos/garden.mp4"), torch.from_numpy(np.stack(runner)), 24)
    paste()
    assert len(ShardSet.open("shards/own/train")) > 4 and len(ShardSet.open("shards/own/val")) == 2
    assert Path("scenes/walk/panel.png").is_file()
