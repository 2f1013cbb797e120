"""One record per dataset whose numbers were worked out by hand from the formats' pages, not by our code or writers."""

from __future__ import annotations

import io
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.sources import bedlam, omniworld, pointodyssey, registry, spatialvid, tartanair
from tests.data_prep import raw_layouts as raw
from tests.data_prep.raw_layouts import film

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
HALF = 0.5**0.5  # a quaternion (HALF about an axis, HALF) is a quarter turn about it


def near(tensor: torch.Tensor | np.ndarray, expected: object, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(np.asarray(tensor), expected, rtol=0, atol=tolerance)


def test_tartanair_row_is_ned_camera_to_world():
    """At 1 m ahead, 2 m right, 3 m down of the origin, turned by a quarter about down: ahead is now right."""
    camera = tartanair.camera_from_row(np.array([1.0, 2, 3, 0, 0, HALF, HALF]))
    near(camera[:3, 3], [2, 3, 1])
    near(camera[:3, 2], [1, 0, 0])  # forward
    near(camera[:3, 0], [0, 0, -1])  # right is now backward
    near(camera[:3, 1], [0, 1, 0])  # down


def test_omniworld_depth_codes():
    codes = np.array([98, 99, 13107, 52428, 65500, 65501, 65535], np.uint16)
    # 13107 / 65535 = 0.2: 0.2 / (1000 - 199.8) / 0.004; 52428 / 65535 = 0.8: 0.8 / (1000 - 799.2) / 0.004
    # 65500 / 65535 = 0.999465934: 0.999465934 / (1000 - 998.466468) / 0.004 = 162.935
    depth = omniworld.depth_from_codes(codes)
    near(depth[2:4], [0.0624843789, 0.9960159363], 1e-7)
    near(depth[4], 162.935, 1e-2)
    assert np.isnan(depth[0]) and 0 < depth[1] < 0.001 and np.isinf(depth[5:]).all()


def test_omniworld_camera_row_is_world_to_camera_with_the_scalar_first(tmp_path):
    """The world's x is the camera's backward: the camera looks along -x from where -R^T (1, 2, 3) lies."""
    root = raw.write_omniworld(tmp_path, film())
    path = root / "b04f88d1f85a" / "camera" / "split_1.json"
    rows = {
        "focals": [1000.0] * 9,
        "cx": 640.0,
        "cy": 360.0,
        "quats": [[HALF, 0, HALF, 0]] * 9,
        "trans": [[1, 2, 3]] * 9,
    }
    path.write_text(json.dumps(rows))
    (clip,) = registry.iter_clips("omniworld", root, 9)
    near(clip.cam2world[0], [[0, 0, -1, 3], [0, 1, 0, -2], [1, 0, 0, -1], [0, 0, 0, 1]])
    near(clip.intrinsics[0], [[1000, 0, 640], [0, 1000, 360], [0, 0, 1]])


def test_bedlam_row_of_unreals_page():
    """Row of seq_000000_0000.png as the page prints it: the camera turns right, then looks down, then rolls clockwise.

    Sines of yaw, pitch, roll 0.0256208 -0.0506815 0.0490944, cosines 0.9996717 0.9987149 0.9987941.
    """
    row = {"x": 5.058579, "y": -9.743741, "z": 168.953232, "yaw": 1.468127, "pitch": -2.905068, "roll": 2.813995}
    camera = bedlam.camera_from_row(row)
    near(camera[:3, 3], [-0.09743741, -1.68953232, 0.05058579], 1e-9)  # right, down, forward in metres
    near(camera[:3, 2], [0.9987149 * 0.0256208, 0.0506815, 0.9987149 * 0.9996717])  # looks right and down
    near(camera[1, 0], 0.9987149 * 0.0490944)  # its right side dips: it rolls clockwise
    assert np.linalg.det(camera[:3, :3]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("angles", "forward", "right"),
    [
        ({"yaw": 90.0}, [1, 0, 0], [0, 0, -1]),
        ({"pitch": 30.0}, [0, -0.5, 0.8660254], [1, 0, 0]),
        ({"roll": 30.0}, [0, 0, 1], [0.8660254, 0.5, 0]),
        ({"yaw": 90.0, "pitch": 30.0}, [0.8660254, -0.5, 0], [0, 0, -1]),
    ],
)
def test_bedlam_angles_turn_as_the_page_says(angles, forward, right):
    camera = bedlam.camera_from_row({"x": 0, "y": 0, "z": 0, "yaw": 0, "pitch": 0, "roll": 0, **angles})
    near(camera[:3, 2], forward)
    near(camera[:3, 0], right)


def test_bedlam_focal_length_and_centimetres(tmp_path):
    """36.905 mm on a 36 mm sensor is 1312.18 px of 1280, as the page's hfov of 52 degrees is; 250 cm are 2.5 m."""
    assert 640 / math.tan(math.radians(26)) == pytest.approx(1312.18, abs=0.02)
    root = raw.write_bedlam(tmp_path, film())
    scene = root / "20221011_1_250_batch01hand"
    name = "seq_000000"
    for path in (scene / "png" / name).iterdir():
        if int(path.stem[-4:]) % 5 == 0:
            Image.new("RGB", (1280, 720)).save(path)
    for path in (scene / "depth" / name).iterdir():
        raw.save_exr(path, "Depth", np.full((720, 1280), 250, np.float32))
    camera = scene / "ground_truth" / "camera" / f"{name}_camera.csv"
    rows = "".join(f"{name}_{n:04d}.png,0,0,0,0,0,0,36.905,36,20.25,52\n" for n in range(41))
    camera.write_text("name,x,y,z,yaw,pitch,roll,focal_length,sensor_width,sensor_height,hfov\n" + rows)
    (clip,) = registry.iter_clips("bedlam", root, 9)
    near(clip.intrinsics[0], [[1312.1778, 0, 640], [0, 1312.1778, 360], [0, 0, 1]], 1e-3)
    near(clip.depth, 2.5)


def test_pointodyssey_depth_codes():
    depth = pointodyssey.depth_from_codes(np.array([0, 131, 1000, 65534, 65535], np.uint16))
    assert np.isnan(depth[0]) and np.isinf(depth[4])
    near(depth[1:4], [1.998932, 15.259022, 999.984741], 1e-4)  # 131 / 65535 * 1000, ...


def test_pointodyssey_row_is_world_to_camera(tmp_path):
    root = raw.write_pointodyssey(tmp_path, film())
    row = [[0, 0, 1, 1], [0, 1, 0, 2], [-1, 0, 0, 3], [0, 0, 0, 1]]
    k = [[666.5, 0, 480], [0, 666.5, 270], [0, 0, 1]]
    path = root / "train" / "cab_h_bench_3rd" / "anno.npz"
    np.savez(path, intrinsics=np.array([k] * 9), extrinsics=np.array([row] * 9, np.float32))
    (clip,) = registry.iter_clips("pointodyssey", root, 9)
    near(clip.cam2world[0], [[0, 0, -1, 3], [0, 1, 0, -2], [1, 0, 0, -1], [0, 0, 0, 1]])
    near(clip.intrinsics[0], k)


def test_spatialvid_rows_and_inverse_depth(tmp_path):
    """Scalar last, world to camera; shares of 64x48; Z 0.5 is 2, 0.005 lies beyond 100, 0 is nothing."""
    root = raw.write_spatialvid(tmp_path, film())
    name = "group_0001/65612f9c-b702-5626-a4e9-5ddbea42149d"
    np.save(root / "annotations" / name / "poses.npy", np.array([[1, 2, 3, 0, HALF, 0, HALF]] * 9, np.float32))
    np.save(root / "annotations" / name / "intrinsics.npy", np.array([[0.75, 1.0, 0.5, 0.5]] * 9, np.float32))
    inverse = np.full((48, 64), 0.5, np.float16)
    inverse[0, :3] = 0.005, 0, np.nan
    content = io.BytesIO()
    raw.save_exr(content, "Z", inverse)
    with zipfile.ZipFile(root / "depths" / f"{name}.zip", "w") as archive:
        for t in range(9):
            archive.writestr(f"{t:05d}.exr", content.getvalue())
    (clip,) = registry.iter_clips("spatialvid", root, 9)
    near(clip.cam2world[0], [[0, 0, -1, 3], [0, 1, 0, -2], [1, 0, 0, -1], [0, 0, 0, 1]])
    near(clip.intrinsics[0], [[48, 0, 32], [0, 48, 24], [0, 0, 1]])
    near(clip.depth[0, 1], 2.0)
    assert clip.depth[0, 0, :3].isnan().all() and not clip.valid[0, 0, :3].any()


def test_spatialvid_annotations_are_every_fifth_second():
    """int(0.2 * 29.97) = 5, int(0.2 * 59.94) = 11, int(0.2 * 24) = 4."""
    nowhere = Path("nowhere")
    assert spatialvid.video_frames_of_rows(nowhere, 30000 / 1001, 4) == [0, 5, 10, 15]
    assert spatialvid.video_frames_of_rows(nowhere, 59.94, 3) == [0, 11, 22]
    assert spatialvid.video_frames_of_rows(nowhere, 24.0, 3) == [0, 4, 8]


@pytest.mark.realdata
@pytest.mark.skipif(not (REAL / "bedlam_unreal").is_dir(), reason="needs ../shared/data/bedlam_unreal")
def test_the_page_still_prints_the_row_that_the_golden_record_is_of():
    page = (REAL / "bedlam_unreal" / "render" / "unreal_coordinate_system.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("seq_000000_0000.png,"))
    assert line == "seq_000000_0000.png,5.058579,-9.743741,168.953232,1.468127,-2.905068,2.813995,36.905,36,20.25,52"
