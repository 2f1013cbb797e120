"""Real footage through the shipped base and demo adapters: no error; quality is another matter (README)."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from one4d_pl.commands import export, generate
from one4d_pl.config import DEMO_ADAPTERS, load_config
from one4d_pl.inference.pipeline import One4DPipeline
from one4d_pl.scene.exports import FORMATS

REPO = Path(__file__).parents[2]
SHARED = REPO.parent / "shared" / "data"


def lady_running() -> list[Image.Image]:
    return [Image.open(path) for path in sorted((SHARED / "videos" / "lady-running").glob("*.jpg"))]


def drift_turn() -> list[Image.Image]:
    with av.open(str(SHARED / "videos" / "drift-turn.mp4")) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def tartanair() -> list[Image.Image]:
    return [Image.open(path) for path in sorted((SHARED / "tartanair").rglob("image_left/*.png"))]


@pytest.mark.realdata
@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is not here")
@pytest.mark.parametrize("read", [lady_running, drift_turn, tartanair])
def test_the_demo_adapters_take_real_clips(read):
    config = load_config([str(REPO / "configs" / "demo.yaml")], ["sampler.steps=4"])
    pictures = read()
    pictures = [pictures[min(i, len(pictures) - 1)].convert("RGB").resize((64, 48)) for i in range(9)]
    frames = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures])
    video = frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    given = torch.tensor([[True] * 9, [True] + [False] * 8])
    pipeline = One4DPipeline.open(config, DEMO_ADAPTERS)
    noise = torch.randn(4, 16, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    scene = pipeline.sample(["", "A street."], video.repeat(2, 1, 1, 1, 1), given, noise)
    assert scene.frames.shape == scene.pointmap.shape == (2, 3, 9, 48, 64)
    assert bool(scene.pointmap.isfinite().all())
    assert (scene.frames[0] - video[0]).square().mean() < 0.1  # the given video comes back through the VAE


@pytest.mark.realdata
@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is not here")
@pytest.mark.parametrize(
    ("option", "file"), [("--video", "lady-running"), ("--image", "lady-running/*0.jpg"), ("--image", "drift-turn.mp4")]
)
def test_scenes_of_real_clips_go_through_every_export(option, file, tmp_path):
    source = sorted((SHARED / "videos").glob(file))[0]
    if source.suffix == ".mp4":
        drift_turn()[0].save(tmp_path / "frame.png")
        source = tmp_path / "frame.png"
    assert generate.main([option, str(source), "--out", str(tmp_path / "scene"), "--steps", "1"]) == 0
    assert export.main([str(tmp_path / "scene"), "--out", str(tmp_path / "out")]) == 0
    pycolmap = pytest.importorskip("pycolmap", reason="no wheel of pycolmap for Linux on arm")
    model = pycolmap.Reconstruction(str(tmp_path / "out" / "colmap" / "sparse" / "0"))
    count = len(list((tmp_path / "scene" / "frames").iterdir()))
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FORMATS)
    assert model.num_images() == count and model.num_points3D() > 100
