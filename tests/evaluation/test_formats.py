"""Sintel's byte layouts against literals worked out by hand, not against a writer of our own."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from one4d_pl.evaluation.formats import read_cam, read_dpt

TAG = bytes.fromhex("50494548")  # 202021.25 = 1.5413... x 2^17 -> 0x48454950, little-endian: the letters PIEH
# 2 wide, 1 high: 1.5 = 0x3fc00000, -2 = 0xc0000000
DPT = TAG + bytes.fromhex("02000000 01000000 0000c03f 000000c0")


def cam_bytes() -> bytes:
    """fx 100, fy 200, principal point 511.5 217.5; the world turned a quarter about z and moved by (1, 2, 3)."""
    intrinsics = [100.0, 0.0, 511.5, 0.0, 200.0, 217.5, 0.0, 0.0, 1.0]
    world2cam = [0.0, -1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 1.0, 3.0]
    return TAG + struct.pack("<21d", *intrinsics, *world2cam)


def test_a_dpt_file_is_width_height_and_rows(tmp_path):
    (tmp_path / "a.dpt").write_bytes(DPT)
    assert read_dpt(tmp_path / "a.dpt").tolist() == [[1.5, -2.0]]
    (tmp_path / "b.dpt").write_bytes(TAG + struct.pack("<2i6f", 3, 2, 1, 2, 3, 4, 5, 6))
    assert read_dpt(tmp_path / "b.dpt").tolist() == [[1, 2, 3], [4, 5, 6]]


def test_a_cam_file_is_world_to_camera_in_float64(tmp_path):
    content = cam_bytes()
    assert len(content) == 172 and content[4:12] == bytes.fromhex("0000000000005940")  # 100.0
    (tmp_path / "a.cam").write_bytes(content)
    intrinsics, cam2world = read_cam(tmp_path / "a.cam")
    assert intrinsics.tolist() == [[100, 0, 512], [0, 200, 218], [0, 0, 1]]  # centres at +0.5
    # x = R X + t with R: x -> y, y -> -x. The camera's centre is -Rᵀ t = (-2, 1, -3).
    assert cam2world.tolist() == [[0, 1, 0, -2], [-1, 0, 0, 1], [0, 0, 1, -3], [0, 0, 0, 1]]
    assert cam2world.dtype == torch.float64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "tag"),
        (b"\0" * 40, "tag"),
        (TAG, "4 bytes"),
        (DPT[:-1], "19 bytes, its header says 2x1 pixels"),
        (TAG + struct.pack("<2i", -1, -1), "its header says -1x-1"),
    ],
)
def test_a_broken_dpt_is_named(tmp_path, content, message):
    (tmp_path / "a.dpt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.dpt: .*{message}"):
        read_dpt(tmp_path / "a.dpt")


def test_a_broken_cam_is_named(tmp_path):
    path = tmp_path / "a.cam"
    for content, message in ((cam_bytes()[:-8], "164 bytes"), (TAG + struct.pack("<21d", *[math.nan] * 21), "finite")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_cam(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_cam(tmp_path / "absent.cam")
