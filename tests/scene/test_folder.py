"""Scenes on disk and on the screen: what is written can be read back, and a picture shows what is there."""

from __future__ import annotations

import math

import av
import numpy as np
import pytest
import torch
from PIL import Image

from one4d_pl.geometry.camera import camera_rays
from one4d_pl.geometry.pointmap import normalise_pointmap
from one4d_pl.postopt.recover import recover_scene
from one4d_pl.scene.folder import MARGIN, save_picture, save_ply, save_video
from one4d_pl.scene.point_cloud import draw_points, solid_pixels, turntable
from one4d_pl.toy.world import render_clip


def test_a_video_comes_back_in_order_and_colour(tmp_path):
    frames = torch.zeros(6, 32, 48, 3, dtype=torch.uint8)
    for t in range(6):
        frames[t, ..., t % 3] = 200
    save_video(tmp_path / "a" / "v.mp4", frames, fps=12.5)
    with av.open(str(tmp_path / "a" / "v.mp4")) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == pytest.approx(12.5)
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(decoded) == 6
    assert [int(frame.mean((0, 1)).argmax()) for frame in decoded] == [0, 1, 2, 0, 1, 2]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["v.mp4"]


def test_a_ply_holds_points_and_colours(tmp_path):
    points = torch.tensor([[1.5, -2.0, 3.25], [0.0, 0.5, 1e6]])
    colours = torch.tensor([[1, 2, 3], [250, 0, 255]], dtype=torch.uint8)
    save_ply(tmp_path / "p.ply", points, colours)
    header, body = (tmp_path / "p.ply").read_bytes().split(b"end_header\n")
    assert b"element vertex 2\n" in header and header.startswith(b"ply\nformat binary_little_endian 1.0\n")
    # by hand: three little-endian floats, three bytes; 1.5 is 0x3fc00000
    assert len(body) == 2 * 15 and body[:4] == b"\x00\x00\xc0\x3f" and body[12:15] == b"\x01\x02\x03"
    assert np.frombuffer(body[15:27], "<f4").tolist() == points[1].tolist()


def test_a_picture_keeps_its_pixels_beside_the_names(tmp_path):
    picture = torch.randint(0, 255, (40, 30, 3), dtype=torch.uint8)
    save_picture(tmp_path / "p.png", picture, ["upper row", "lower"])
    read = np.asarray(Image.open(tmp_path / "p.png"))
    assert read.shape == (40, 30 + MARGIN, 3) and (read[:, MARGIN:] == picture.numpy()).all()
    assert (read[:20, :MARGIN] < 128).any() and (read[20:, :MARGIN] < 128).any()


def test_nearer_points_cover_farther_ones_and_right_is_right():
    intrinsics = torch.tensor([[20.0, 0, 16], [0, 20, 12], [0, 0, 1]]).double()
    points = torch.tensor(
        [[0.0, 0, 2], [0.0, 0, 1], [0.6, 0, 1.5], [0.0, 0.5, 1.5], [0.0, 0, -1], [-9.0, 0, 1], [0, -9, 1]]
    )
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9], [1, 1, 1], [2, 2, 2], [2, 2, 2]])
    points, colours = points.double(), colours.to(torch.uint8)
    size = torch.tensor([0.4, 0.1, 0.1, 0.1, 9.0, 0.1, 0.1])
    picture = draw_points(points, colours, intrinsics, torch.eye(4).double(), 24, 32, size)
    assert picture[12, 16].tolist() == [0, 255, 0]  # the near one, although it came second
    assert picture[12, 24].tolist() == [0, 0, 255]  # x to the right: 20 * 0.6 / 1.5
    assert picture[12 + 6, 16].tolist() == [9, 9, 9]  # y down
    assert picture[0, 0].tolist() == [255, 255, 255] and not (picture == 1).any()  # nothing behind the camera
    assert not (picture == 2).any()  # nor from outside the picture


@pytest.fixture(scope="module")
def scene():
    clip = render_clip(1_010_000, 9, 48, 64)
    pointmap = normalise_pointmap(clip.depth, clip.valid, clip.intrinsics, clip.cam2world, 10.0, False)
    return clip, pointmap.points, recover_scene(pointmap.points, pointmap.valid)


def test_slanted_planes_are_solid_and_silhouettes_are_not():
    rays = camera_rays(24, 32, torch.tensor([[30.0, 0, 16], [0, 30, 12], [0, 0, 1]]))
    normal = torch.tensor([0.6, 0.0, 1.0])
    depth = (1.0 / (rays @ normal))[None]  # a wall at 31 degrees
    box = depth.clone()
    box[:, 8:16, 10:20] *= 0.5
    points = 0.1 * rays * depth[..., None]
    assert bool(solid_pixels(points, depth).all())
    solid = solid_pixels(points, box)
    assert not bool(solid[0, 12, 9:11].any()) and bool(solid[0, 12, 12:18].all()) and bool(solid[0, :6].all())
    assert not bool(solid_pixels(torch.full_like(points, 0.97), depth).any())  # sky


def test_the_turntable_starts_near_the_given_view(scene):
    clip, _, recovered = scene
    pictures = turntable(recovered, clip.frames, 96, 128, turns=8)
    assert pictures.shape == (8, 96, 128, 3)
    assert (pictures.float().mean((1, 2, 3)) < 250).all()  # something is seen from everywhere
    assert not torch.equal(pictures[2], pictures[6])  # the two sides


def test_seen_from_its_own_camera_a_scene_looks_like_its_frame(scene):
    clip, points, recovered = scene
    solid = solid_pixels(points, recovered.depth)[0]
    size = recovered.depth[0] / recovered.intrinsics[0, 0, 0]
    picture = draw_points(
        points[0][solid].double(), clip.frames[0][solid], recovered.intrinsics[0].double(),
        recovered.cam2world[0], 48, 64, size[solid],
    )  # fmt: skip
    difference = (picture.float() - clip.frames[0].float()).abs().mean(-1)[solid]
    assert difference.median() < 12 and math.isfinite(float(difference.max()))
