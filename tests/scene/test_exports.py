"""Exports are read again by other people's programs, and show every point at the pixel it came from."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh
from evo.tools import file_interface
from PIL import Image

from one4d_pl.commands import export
from one4d_pl.scene import exports
from one4d_pl.scene.exports import FORMATS, collect_points, export_scene, save_depth16, shown_pixels
from one4d_pl.scene.gltf import LINEAR
from one4d_pl.scene.scene import save_scene
from tests.scene.toy_scene import exact_scene

NAMES = [f"{i:06d}" for i in range(5)]


@pytest.fixture(scope="module")
def scene():
    return exact_scene()


@pytest.fixture(scope="module")
def exported(scene, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "a" / "new"
    export_scene(scene, out, tuple(FORMATS))
    return out


@pytest.fixture(scope="module")
def shown(scene):
    return shown_pixels(scene, keep_flying_points=False)


def land(points, intrinsics, world2cam):  # [N, 3], [3, 3], [4, 4] numpy, OpenCV -> [N, 2] pixels
    local = points @ world2cam[:3, :3].T + world2cam[:3, 3]
    assert (local[:, 2] > 0).all()
    return (local @ intrinsics.T)[:, :2] / local[:, 2:]


def centres(pixels):  # [H, W] bool -> [N, 2]
    return pixels.nonzero().flip(-1).double().numpy() + 0.5


def test_every_format_has_its_folder_and_nothing_else_is_left(exported):
    assert sorted(path.name for path in exported.iterdir()) == sorted(FORMATS)
    assert [path.name for path in exported.parent.iterdir()] == ["new"]
    assert not list(exported.rglob(".*"))
    assert tuple(FORMATS) == export.FORMATS


@pytest.mark.parametrize("index", range(5))
def test_ply_points_are_the_scenes_to_the_bit(scene, exported, shown, index):
    cloud = trimesh.load(exported / "ply" / f"{NAMES[index]}.ply")
    assert np.array_equal(cloud.vertices.astype(np.float32), scene.pointmap[index][shown[index]].numpy())
    assert np.array_equal(cloud.colors[:, :3], scene.frames[index][shown[index]].numpy())


def test_the_merged_ply_holds_all_frames_in_order(scene, exported, shown):
    cloud = trimesh.load(exported / "ply" / "merged.ply")
    assert np.array_equal(cloud.vertices.astype(np.float32), scene.pointmap[shown].numpy())


def test_glb_has_points_and_upright_cameras_of_every_frame(scene, exported, shown):
    loaded = trimesh.load(exported / "glb" / "scene.glb")
    clouds = [n for n in loaded.graph.nodes_geometry if n.startswith("frame_")]
    assert sorted(clouds) == [f"frame_{name}" for name in NAMES]
    for i, name in enumerate(NAMES):
        to_world, geometry = loaded.graph[f"frame_{name}"]
        cloud = loaded.geometry[geometry]
        points = scene.pointmap[i][shown[i]].numpy()
        assert np.array_equal(cloud.vertices.astype(np.float32), points)
        upright = cloud.vertices @ to_world[:3, :3].T
        np.testing.assert_allclose(upright, points * [1, -1, -1], atol=1e-6)  # y up, z back
        _, geometry = loaded.graph[f"camera_{name}"]
        vertices = loaded.geometry[geometry].vertices
        centre = scene.cam2world[i, :3, 3].numpy()
        assert np.abs(vertices - centre).max(1).min() < 1e-6
        corners = vertices[np.abs(vertices - centre).max(1) > 1e-6]
        pixels = land(corners, scene.intrinsics[i].numpy(), np.linalg.inv(scene.cam2world[i].numpy()))
        assert sorted({(round(u), round(v)) for u, v in pixels}) == [(0, 0), (0, 48), (64, 0), (64, 48)]


def test_glb_colours_are_linear_light_and_its_animation_shows_one_frame_at_a_time(scene, exported, shown):
    content = (exported / "glb" / "scene.glb").read_bytes()
    length = int.from_bytes(content[12:16], "little")
    document, binary = json.loads(content[20 : 20 + length]), content[28 + length :]
    assert (
        int.from_bytes(content[8:12], "little") == len(content) and len(binary) == document["buffers"][0]["byteLength"]
    )

    def array(accessor, dtype, columns):
        entry = document["accessors"][accessor]
        view = document["bufferViews"][entry["bufferView"]]
        assert view["byteOffset"] % 4 == 0
        return np.frombuffer(binary, dtype, entry["count"] * columns, view["byteOffset"]).reshape(-1, columns)

    mesh = document["meshes"][document["nodes"][1]["mesh"]]["primitives"][0]
    colours = array(mesh["attributes"]["COLOR_0"], "<u2", 4)
    assert np.array_equal(colours[:, :3], LINEAR[scene.frames[0][shown[0]].numpy()])
    assert len(set(LINEAR.tolist())) == 256 and LINEAR[[0, 255]].tolist() == [0, 65535]
    assert LINEAR[188] / 65535 == pytest.approx(0.5, abs=0.005)  # the middle grey of sRGB is half of the light
    animation = document["animations"][0]
    sizes = np.stack([array(s["output"], "<f4", 3) for s in animation["samplers"]])  # [T, T + 1, 3]
    assert np.array_equal(sizes[:, :5, 0], np.eye(5)) and sizes[:, 5, 0].tolist() == [0, 0, 0, 0, 1]
    times = array(animation["samplers"][0]["input"], "<f4", 1)[:, 0]
    np.testing.assert_allclose(times, np.arange(6) / scene.fps, rtol=1e-6)


@pytest.mark.parametrize("kind", ["sparse/0", "text"])
def test_colmap_reads_cameras_and_projects_every_point_on_its_own_pixel(scene, exported, shown, kind):
    pycolmap = pytest.importorskip("pycolmap", reason="no wheel of pycolmap for Linux on arm")
    model = pycolmap.Reconstruction(str(exported / "colmap" / kind))
    assert (model.num_cameras(), model.num_images(), model.num_points3D()) == (1, 5, int(shown.sum()))
    for i, image in enumerate(sorted(model.images.values(), key=lambda image: image.name)):
        assert (exported / "colmap" / "images" / image.name).is_file() and image.name == f"{NAMES[i]}.png"
        camera = model.cameras[image.camera_id]
        assert camera.model.name == "PINHOLE" and (camera.width, camera.height) == (64, 48)
        np.testing.assert_allclose(camera.calibration_matrix(), scene.intrinsics[i].numpy(), rtol=0, atol=0)
        world2cam = image.cam_from_world() if callable(image.cam_from_world) else image.cam_from_world
        np.testing.assert_allclose(world2cam.inverse().matrix(), scene.cam2world[i, :3].numpy(), atol=1e-12)
        points = [model.points3D[point.point3D_id] for point in image.points2D]
        observed = np.array([point.xy for point in image.points2D])
        assert np.array_equal(observed, centres(shown[i]))
        positions = np.array([point.xyz for point in points])
        assert np.array_equal(positions.astype(np.float32), scene.pointmap[i][shown[i]].numpy())
        landed = np.array([image.project_point(position) for position in positions[::50]])
        np.testing.assert_allclose(landed, observed[::50], atol=1e-3)  # pixels, from float32 points
        assert np.array_equal([point.color for point in points], scene.frames[i][shown[i]].numpy())
        assert max(point.error for point in points) < 1e-3
        first = points[0].track.elements
        assert [(e.image_id, e.point2D_idx) for e in first] == [(image.image_id, 0)]


def test_cameras_of_a_zoom_are_one_each(scene, tmp_path):
    zoom = scene.intrinsics.clone()
    zoom[:, [0, 1], [0, 1]] *= torch.linspace(1, 1.5, 5).double()[:, None]
    export_scene(replace(scene, intrinsics=zoom), tmp_path / "out", ("colmap", "nerfstudio"))
    pycolmap = pytest.importorskip("pycolmap", reason="no wheel of pycolmap for Linux on arm")
    model = pycolmap.Reconstruction(str(tmp_path / "out" / "colmap" / "text"))
    assert model.num_cameras() == 5
    focal = [model.cameras[i.camera_id].focal_length_x for i in sorted(model.images.values(), key=lambda i: i.name)]
    assert focal == zoom[:, 0, 0].tolist()
    about = json.loads((tmp_path / "out" / "nerfstudio" / "transforms.json").read_text())
    assert "fl_x" not in about and [frame["fl_x"] for frame in about["frames"]] == focal


def test_nerfstudio_has_the_documented_keys_and_opengl_cameras(scene, exported, shown):
    # docs.nerf.studio/quickstart/data_conventions: shared intrinsics on top, camera to world with y up and z back
    folder = exported / "nerfstudio"
    about = json.loads((folder / "transforms.json").read_text())
    assert about["camera_model"] in ("OPENCV", "OPENCV_FISHEYE")
    assert {key: type(about[key]) for key in ("fl_x", "fl_y", "cx", "cy", "w", "h")} == {
        "fl_x": float, "fl_y": float, "cx": float, "cy": float, "w": int, "h": int
    }  # fmt: skip
    intrinsics = np.array([[about["fl_x"], 0, about["cx"]], [0, about["fl_y"], about["cy"]], [0, 0, 1]])
    cloud = trimesh.load(folder / about["ply_file_path"]).vertices
    assert len(cloud) == int(shown.sum())
    first = 0
    for i, frame in enumerate(about["frames"]):
        with Image.open(folder / frame["file_path"]) as image:
            assert image.size == (about["w"], about["h"]) and np.array_equal(image, scene.frames[i].numpy())
        opengl = np.linalg.inv(np.array(frame["transform_matrix"]))
        own = cloud[first : first + int(shown[i].sum())]
        first += len(own)
        local = own @ opengl[:3, :3].T + opengl[:3, 3]
        assert (local[:, 2] < 0).all()  # an OpenGL camera looks along -z
        pixels = (
            np.stack([local[:, 0] / -local[:, 2], -local[:, 1] / -local[:, 2], np.ones(len(own))], 1) @ intrinsics.T
        )
        np.testing.assert_allclose(pixels[:, :2], centres(shown[i]), atol=1e-3)


def test_evo_reads_the_trajectory(scene, exported):
    trajectory = file_interface.read_tum_trajectory_file(str(exported / "tum" / "trajectory.txt"))
    np.testing.assert_allclose(trajectory.timestamps, np.arange(5) / scene.fps, rtol=1e-11)
    np.testing.assert_allclose(np.stack(trajectory.poses_se3), scene.cam2world.numpy(), atol=1e-10)


def test_depth_comes_back_within_half_a_step_and_zero_is_no_surface(scene, exported):
    scale = json.loads((exported / "depth16" / "depth.json").read_text())["scale"]
    for i, name in enumerate(NAMES):
        with Image.open(exported / "depth16" / f"{name}.png") as image:
            assert image.mode == "I;16"
            value = torch.from_numpy(np.asarray(image).astype(np.float64))
        assert torch.equal(value == 0, ~scene.valid[i])
        assert float((value * scale - scene.depth[i])[scene.valid[i]].abs().max()) <= 0.5001 * scale


def test_the_nearest_surface_is_never_written_as_none(tmp_path):
    depth = torch.tensor([[[1e-6, 1.0, 0.5]]])
    save_depth16(tmp_path, depth, torch.tensor([[[True, True, False]]]))
    with Image.open(tmp_path / "000000.png") as image:
        assert np.asarray(image).tolist() == [[1, 65535, 0]]


def test_flying_points_go_unless_they_are_kept(scene):
    solid, every = shown_pixels(scene, False), shown_pixels(scene, True)
    assert torch.equal(every, scene.valid) and bool((solid <= every).all()) and int(solid.sum()) < int(every.sum())
    # a point halfway between a near and a far surface
    depth = torch.full((1, 8, 8), 4.0)
    depth[:, :, :4], depth[:, :, 4] = 1.0, 2.0
    torn = replace(scene, depth=depth, valid=torch.ones(1, 8, 8, dtype=torch.bool), pointmap=torch.zeros(1, 8, 8, 3))
    assert not bool(shown_pixels(torn, False)[0, :, 4].any()) and bool(shown_pixels(torn, True).all())


def test_a_limited_cloud_is_spread_evenly_over_all_frames(scene, shown):
    cloud = collect_points(scene, shown, 1000)
    assert len(cloud.pixel) == 1000 and len({tuple(p) for p in cloud.pixel.tolist()}) == 1000
    share = torch.bincount(cloud.pixel[:, 0]) / 1000
    torch.testing.assert_close(share, shown.sum((1, 2)) / shown.sum(), atol=0.002, rtol=0)


def test_a_scene_of_sky_alone_still_has_cameras(scene, tmp_path):
    sky = replace(scene, valid=torch.zeros_like(scene.valid))
    export_scene(sky, tmp_path / "sky", tuple(FORMATS))
    assert len(trimesh.load(tmp_path / "sky" / "glb" / "scene.glb").geometry) == 5
    pycolmap = pytest.importorskip("pycolmap", reason="no wheel of pycolmap for Linux on arm")
    model = pycolmap.Reconstruction(str(tmp_path / "sky" / "colmap" / "sparse" / "0"))
    assert (model.num_images(), model.num_points3D()) == (5, 0)


def test_the_door_exports_a_stored_scene_or_says_why_not(scene, tmp_path, refusal, monkeypatch):
    save_scene(tmp_path / "scene", scene)
    run = [str(tmp_path / "scene"), "--out", str(tmp_path / "out")]
    assert export.main([*run, "--formats", "tum", "ply", "tum", "--points", "100", "--keep-flying-points"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ply", "tum"]
    assert len(trimesh.load(tmp_path / "out" / "ply" / "merged.ply").vertices) == 100
    assert len(trimesh.load(tmp_path / "out" / "ply" / "000000.ply").vertices) == int(scene.valid[0].sum())

    def refused(arguments, complaint):
        before = sorted(tmp_path.rglob("*"))
        assert complaint in refusal(export.main, *arguments)
        assert sorted(tmp_path.rglob("*")) == before

    refused(run, "exists; name a new folder")
    other = [str(tmp_path / "scene"), "--out", str(tmp_path / "other")]
    refused([*other, "--points", "0"], "--points: 0")
    refused([*other, "--dtype", "bfloat16"], "--dtype")
    refused([str(tmp_path / "scene"), "--out", str(tmp_path / "scene" / "scene.json" / "x")], "cannot write")
    refused([str(tmp_path), "--out", str(tmp_path / "other"), "--formats", "ply"], "no scene.json")
    refused([str(tmp_path), "--out", str(tmp_path / "other")], "nor a scene")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setitem(exports.FORMATS, "tum", full_disk)
        refused([*other, "--formats", "ply", "tum"], "No space left")
    (tmp_path / "scene" / "depth.npy").write_bytes(b"torn")
    refused(other, "depth.npy")
