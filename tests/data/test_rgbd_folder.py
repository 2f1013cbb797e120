"""Laws of the TUM/Bonn folder reader; literals are worked out by hand from the formats' pages.

Real files: tests/data_prep/test_real_files.py.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from one4d_pl.data.rgbd_folder import (
    associate,
    bonn_cam2world,
    list_files,
    open_sequence,
    read_depth_png,
    read_rgb_png,
    read_trajectory,
)
from one4d_pl.geometry.se3 import is_rotation


def png16(codes: list[list[int]]) -> bytes:
    """A 16-bit grey png by the PNG specification: big-endian samples, filter 0 before each row."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", len(codes[0]), len(codes), 16, 0, 0, 0, 0)
    rows = b"".join(b"\0" + struct.pack(f">{len(row)}H", *row) for row in codes)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def make_folder(root: Path) -> Path:
    """Three images; the second has no depth map within 0.02 s."""
    for kind in ("rgb", "depth"):
        (root / kind).mkdir(parents=True)
    for t in ("1.00", "1.10", "1.20"):
        Image.new("RGB", (4, 2), (1, 2, 3)).save(root / "rgb" / f"{t}.png")
    for t in ("1.01", "1.13", "1.19"):
        (root / "depth" / f"{t}.png").write_bytes(png16([[0, 5000, 1, 65535], [2500, 7, 7, 7]]))
    lines = ["# timestamp filename", *(f"{t} rgb/{t}.png" for t in ("1.00", "1.10", "1.20"))]
    (root / "rgb.txt").write_text("\n".join(lines))
    (root / "groundtruth.txt").write_text(
        "# timestamp tx ty tz qx qy qz qw\n"
        "1.0 1 2 3 0 0 0 1\n"
        "1.1 4 5 6 0 0 0.7071067811865476 0.7071067811865476\n"
        "1.2 7 8 9 1 0 0 0\n"
    )
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "rgbd_dataset_freiburg3_walking_xyz")


def test_depth_is_a_5000th_of_a_metre_and_zero_is_no_measurement(folder):
    depth = read_depth_png(folder / "depth" / "1.01.png")
    expected = torch.tensor([[torch.nan, 1.0, 1 / 5000, 13.107], [0.5, 7 / 5000, 7 / 5000, 7 / 5000]])
    torch.testing.assert_close(depth, expected, rtol=1e-7, atol=0, equal_nan=True)


def test_rows_are_camera_to_world_with_the_scalar_part_of_the_quaternion_last(folder):
    trajectory = read_trajectory(folder / "groundtruth.txt")
    assert trajectory.timestamps.tolist() == [1.0, 1.1, 1.2]
    quarter_about_z = [[0, -1, 0, 4], [1, 0, 0, 5], [0, 0, 1, 6], [0, 0, 0, 1]]  # x goes to y
    half_about_x = [[1, 0, 0, 7], [0, -1, 0, 8], [0, 0, -1, 9], [0, 0, 0, 1]]
    expected = torch.tensor([quarter_about_z, half_about_x]).double()
    torch.testing.assert_close(trajectory.cam2world[1:], expected, rtol=0, atol=1e-15)


def test_frames_are_paired_by_time_and_unpaired_images_left_out(folder):
    sequence = open_sequence(folder)
    assert [frame.timestamp for frame in sequence.frames] == [1.0, 1.2]
    assert [frame.depth_path.name for frame in sequence.frames] == ["1.01.png", "1.19.png"]
    assert sequence.frames[1].cam2world[:3, 3].tolist() == [7, 8, 9]
    assert read_rgb_png(sequence.frames[0].rgb_path)[0, 0].tolist() == [1, 2, 3]
    expected = [[535.4, 0, 320.6], [0, 539.2, 248.1], [0, 0, 1]]  # half a pixel beyond the published centre
    torch.testing.assert_close(sequence.intrinsics, torch.tensor(expected))


def test_without_a_list_the_file_names_are_the_timestamps(folder):
    listed = list_files(folder, "rgb")
    (folder / "rgb.txt").unlink()
    assert list_files(folder, "rgb") == listed


def test_nearest_pairs_are_made_first_and_each_once():
    first = torch.tensor([0.0, 0.011, 5.0], dtype=torch.float64)
    second = torch.tensor([0.012, 0.032, 4.979], dtype=torch.float64)
    assert associate(first, second) == [(1, 0)]  # 0.0 lost its partner; 0.021 s apart is too far
    assert associate(first, second, 0.05) == [(0, 1), (1, 0), (2, 2)]


def test_a_pair_at_the_limit_is_decided_by_the_difference_as_tum_s_script_does():
    rng = np.random.default_rng(0)
    for time in rng.uniform(1.3e9, 1.4e9, 200):
        for other in (time - 0.02, time + 0.02):
            for neighbour in (np.nextafter(other, 0), other, np.nextafter(other, 2e9)):
                pairs = associate(torch.tensor([time]).double(), torch.tensor([neighbour]).double())
                assert pairs == ([(0, 0)] if abs(time - neighbour) < 0.02 else [])


def test_files_that_are_listed_but_absent_are_told_apart(folder):
    (folder / "rgb" / "1.20.png").unlink()
    frames = open_sequence(folder).frames
    assert [frame.present for frame in frames] == [True, False]
    with pytest.raises(ValueError, match=r"1\.20\.png"):
        read_rgb_png(frames[1].rgb_path)


def test_bonn_rows_become_cameras_by_the_published_rule():
    # row = identity: cam2world = T_ros · T_ros · T_m = T_m, whose third column is (-0.2389, -0.6413, -0.8085) / 1.0593
    camera = bonn_cam2world(torch.eye(4, dtype=torch.float64))
    assert bool(is_rotation(camera[:3, :3], 1e-12))
    torch.testing.assert_close(camera[:3, 2], torch.tensor([-0.22552, -0.60540, -0.76324]).double(), rtol=0, atol=2e-4)
    assert camera[:3, 3].tolist() == [0.0113, -0.0098, 0.0111]
    # a row one metre along the mocap's y axis moves the camera along -T_ros: (x, y, z) -> (-x, z, y)
    moved = torch.eye(4, dtype=torch.float64)
    moved[:3, 3] = torch.tensor([1.0, 2.0, 3.0])
    shift = bonn_cam2world(moved)[:3, 3] - camera[:3, 3]
    torch.testing.assert_close(shift, torch.tensor([-1.0, 3.0, 2.0]).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("groundtruth.txt", "1.0 1 2 3 0 0 0\n", r"groundtruth.txt: line 1: 7 columns, need 8"),
        ("groundtruth.txt", "\n1.0 1 2 3 0 0 0 2\n", r"groundtruth.txt: line 2: the quaternion's norm is 2.0000"),
        ("groundtruth.txt", "1.0 1 2 x 0 0 0 1\n", r"groundtruth.txt: line 1: 'x' is no finite number"),
        ("groundtruth.txt", "1.0 1 2 nan 0 0 0 1\n", r"line 1: 'nan' is no finite number"),
        ("groundtruth.txt", "# nothing\n", r"groundtruth.txt: no camera in it"),
        ("rgb.txt", "1.0\n", r"rgb.txt: line 1: 1 columns, need 2"),
        ("rgb.txt", "", r"no rgb image is listed"),
    ],
)
def test_a_broken_text_is_named_with_its_line(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        open_sequence(folder)


def test_a_broken_folder_is_named(tmp_path, folder):
    with pytest.raises(ValueError, match="folder's name tells the camera"):
        open_sequence(make_folder(tmp_path / "kitchen"))
    (folder / "depth" / "1.01.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1.01.png: cannot be decoded"):
        open_sequence(folder).frames[0].read_depth()
    with pytest.raises(ValueError, match="need 16-bit grey"):
        read_depth_png(folder / "rgb" / "1.00.png")


@pytest.mark.parametrize("name", ["../elsewhere/secret.png", "/etc/secret.png", "rgb/../../secret.png"])
def test_a_list_names_no_file_outside_its_folder(folder, name):
    (folder / "rgb.txt").write_text(f"1.0 {name}\n")
    with pytest.raises(ValueError, match=r"rgb\.txt: line 1: .* lies outside of the folder"):
        open_sequence(folder)


def test_a_png_that_claims_to_be_huge_is_named(tmp_path):
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 16, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    (tmp_path / "huge.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )
    with pytest.raises(ValueError, match=r"huge\.png: cannot be decoded"):
        read_depth_png(tmp_path / "huge.png")
