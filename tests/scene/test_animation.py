"""The animated picture: time that joins its end, cells that show what they say, a file that keeps its limit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from one4d_pl.geometry.camera import project, to_camera
from one4d_pl.geometry.pointmap import normalise_pointmap
from one4d_pl.postopt.recover import recover_scene
from one4d_pl.scene.animation import BACKGROUND, GAP, PICTURES, STRIP, Column, animate, time_at
from one4d_pl.scene.folder import save_animation
from one4d_pl.scene.point_cloud import EDGES, camera_pyramids
from one4d_pl.toy.world import render_clip


@pytest.mark.parametrize("num_frames", [1, 2, 9, 17, 81])
def test_time_shows_every_frame_or_evenly_some_and_its_end_joins_its_beginning(num_frames):
    times = [time_at(k, num_frames) for k in range(PICTURES)]
    assert times[0] == 0 and max(times) == num_frames - 1 and min(times) == 0
    steps = {abs(a - b) for a, b in zip(times, times[1:] + times[:1], strict=True)}
    assert max(steps) <= max(1, round(2 * num_frames / PICTURES) + 1)
    if num_frames <= 17:
        assert set(times) == set(range(num_frames))


def test_a_drawn_camera_sees_the_corners_of_its_own_picture():
    intrinsics = torch.tensor([[40.0, 0, 30], [0, 44, 20], [0, 0, 1]], dtype=torch.float64)
    cam2world = torch.eye(4, dtype=torch.float64)
    cam2world[:3, :3] = torch.tensor([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])
    cam2world[:3, 3] = torch.tensor([1.0, 2, 3])
    lines = camera_pyramids(intrinsics[None], cam2world[None], 40, 60, depth=0.5)[0, EDGES].unflatten(0, (8, 2))
    pixels, depth = project(to_camera(lines, cam2world), intrinsics)
    assert torch.allclose(lines[:4, 0], cam2world[:3, 3].expand(4, 3))
    assert torch.allclose(depth[:4, 1], torch.tensor(0.5).double())
    assert pixels[:4, 1].round().tolist() == [[0, 0], [60, 0], [60, 40], [0, 40]]
    assert torch.allclose(lines[4:, 0].roll(-1, 0), lines[4:, 1])  # the picture's border is closed


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    clip = render_clip(3, 5, 24, 32, level="clear")
    points = normalise_pointmap(clip.depth, clip.valid, clip.intrinsics, clip.cam2world, 10.0, False)
    scene = recover_scene(points.points, points.valid)
    red = torch.zeros_like(clip.frames)
    red[..., 0] = 255
    columns = [Column("video to 4D", clip.frames, red, scene), Column("text to 4D", clip.caption, clip.frames, scene)]
    return animate(columns, 64)


def cell(pictures: torch.Tensor, row: int, column: int) -> torch.Tensor:
    top, left = 2 * STRIP + row * (48 + STRIP), GAP + column * (64 + GAP)
    return pictures[:, top : top + 48, left : left + 64].float()


def test_every_cell_shows_what_it_says(pictures):
    assert pictures.dtype == torch.uint8 and len(pictures) == PICTURES
    red = torch.tensor([255.0, 0, 0])
    assert (cell(pictures, 1, 0) == red).all()  # the output frames
    assert not (cell(pictures, 0, 0) == red).all(-1).any()
    cloud = cell(pictures, 2, 0)
    share = ((cloud - red).abs().amax(-1) < 60).float().mean((1, 2))
    assert (share > 0.15).all() and (cloud == torch.tensor(BACKGROUND).float()).all(-1).any()  # red points, dark about
    # neither red nor background nor a blend of them: a camera, in every picture
    assert ((cloud[..., 1:].amax(-1) > 60).float().mean((1, 2)) > 0.002).all()
    words = cell(pictures, 0, 1)
    assert (words == words[:1]).all() and (words < 100).any()
    assert torch.equal(cell(pictures, 1, 1), cell(pictures, 0, 0))  # there the given frames are the generated ones


def test_the_view_swings_and_comes_back(pictures):
    cloud = cell(pictures, 2, 0)
    change = (cloud - cloud.roll(1, 0)).abs().mean((1, 2, 3))
    assert (change > 0).all() and change[0] < 2 * change[1:].max()


def test_an_animation_keeps_its_limit_and_its_frames(tmp_path):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 255, (6, 32, 48, 3), generator=generator).to(torch.uint8)
    save_animation(tmp_path / "fine.webp", noise, 10.0, 100_000)
    limit = (tmp_path / "fine.webp").stat().st_size * 2 // 3
    save_animation(tmp_path / "coarse.webp", noise, 10.0, limit)
    assert (tmp_path / "coarse.webp").stat().st_size <= limit
    for name in ("fine", "coarse"):
        with Image.open(tmp_path / f"{name}.webp") as image:
            assert image.n_frames == 6 and image.size == (48, 32) and image.info["loop"] == 0
    with Image.open(tmp_path / "fine.webp") as image:
        image.seek(5)
        shown = np.asarray(image.convert("RGB"), np.float32)
    assert np.corrcoef(shown.mean(-1).ravel(), noise[5].float().mean(-1).ravel())[0, 1] > 0.8
    with pytest.raises(ValueError, match="need 300 or less"):
        save_animation(tmp_path / "none.webp", noise, 10.0, 300)
    assert not (tmp_path / "none.webp").exists()
