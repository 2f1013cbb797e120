"""COLMAP's sparse models, binary and text: cameras, images, points3D.

There is one PINHOLE camera for every distinct intrinsics; pixel centres at +0.5 are COLMAP's convention too. Images
hold their pose as world to camera, the quaternion's w first. Every point is observed once, by the pixel it comes from.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from one4d_pl.files import open_whole, write_text
from one4d_pl.geometry.camera import project, to_camera
from one4d_pl.geometry.se3 import invert_se3, matrix_to_wxyz
from one4d_pl.scene.scene import Scene

PINHOLE = 1  # the model's number in binary files; fx, fy, cx, cy
OBSERVATION = np.dtype([("xy", "<f8", 2), ("point", "<i8")])
POINT = np.dtype(
    [("id", "<u8"), ("xyz", "<f8", 3), ("rgb", "u1", 3), ("error", "<f8"), ("length", "<u8"), ("track", "<i4", 2)]
)


def write_colmap(
    folder: Path,  # gets sparse/0 and text
    scene: Scene,
    position: Tensor,  # [N, 3], world
    colour: Tensor,  # [N, 3] uint8
    pixel: Tensor,  # [N, 3] int64: frame, row, column; in the order of frames
) -> None:
    """Write the model in binary and in text; images are images/000000.png ..., ids count from 1."""
    cameras, camera_of = torch.unique(scene.intrinsics, dim=0, return_inverse=True)
    lenses = cameras[:, [0, 1, 0, 1], [0, 1, 2, 2]].numpy()  # [C, 4] fx fy cx cy
    size = scene.frames.shape[2], scene.frames.shape[1]
    world2cam = invert_se3(scene.cam2world)
    placed = torch.cat([matrix_to_wxyz(world2cam[:, :3, :3]), world2cam[:, :3, 3]], dim=1).numpy()  # [T, 7]
    points, observations = _observed(scene, position, colour, pixel)
    counts = torch.bincount(pixel[:, 0], minlength=scene.num_frames).cumsum(0)[:-1].numpy()
    seen = np.split(observations, counts)
    images = list(zip(placed, (camera_of + 1).tolist(), seen, strict=True))
    _write_binary(folder / "sparse" / "0", lenses, size, images, points)
    _write_text(folder / "text", lenses, size, images, points)


Images = list[tuple[NDArray[np.float64], int, NDArray[np.void]]]  # qw qx qy qz tx ty tz, camera, observations


def _observed(
    scene: Scene, position: Tensor, colour: Tensor, pixel: Tensor
) -> tuple[NDArray[np.void], NDArray[np.void]]:  # POINT [N], OBSERVATION [N]
    """Tie each point to its pixel; a point's error is its reprojection error in pixels."""
    frame, count = pixel[:, 0], len(pixel)
    centres = pixel[:, [2, 1]].double() + 0.5  # [N, 2] u, v
    local = to_camera(position.double()[:, None, None], scene.cam2world[frame])
    landed = project(local, scene.intrinsics[frame])[0][:, 0, 0]  # [N, 2]
    rank = torch.arange(count) - torch.searchsorted(frame.contiguous(), frame.contiguous())  # in its frame
    points, observations = np.zeros(count, POINT), np.zeros(count, OBSERVATION)
    points["id"] = observations["point"] = np.arange(1, count + 1)
    points["xyz"], points["rgb"], points["length"] = position.double().numpy(), colour.numpy(), 1
    points["error"] = (landed - centres).norm(dim=-1).numpy()
    points["track"] = torch.stack([frame + 1, rank], dim=1).numpy()
    observations["xy"] = centres.numpy()
    return points, observations


def _write_binary(
    folder: Path, lenses: NDArray[np.float64], size: tuple[int, int], images: Images, points: NDArray[np.void]
) -> None:
    def count(number: int) -> bytes:
        return number.to_bytes(8, "little")

    camera = np.dtype([("id", "<i4"), ("model", "<i4"), ("size", "<u8", 2), ("lens", "<f8", 4)])
    rows = np.array([(i + 1, PINHOLE, size, lens) for i, lens in enumerate(lenses)], camera)
    _write(folder / "cameras.bin", [count(len(rows)), rows.tobytes()])
    parts = [count(len(images))]
    for i, (placed, camera_id, seen) in enumerate(images):
        head = np.array([(i + 1, placed, camera_id)], [("id", "<i4"), ("placed", "<f8", 7), ("camera", "<i4")])
        parts += [head.tobytes(), f"{i:06d}.png".encode() + b"\0", count(len(seen)), seen.tobytes()]
    _write(folder / "images.bin", parts)
    _write(folder / "points3D.bin", [count(len(points)), points.tobytes()])


def _write(path: Path, parts: list[bytes]) -> None:
    with open_whole(path) as file:
        file.write(b"".join(parts))


def _write_text(
    folder: Path, lenses: NDArray[np.float64], size: tuple[int, int], images: Images, points: NDArray[np.void]
) -> None:
    cameras = [f"{i + 1} PINHOLE {size[0]} {size[1]} {_numbers(lens.tolist())}" for i, lens in enumerate(lenses)]
    write_text(folder / "cameras.txt", _lines("CAMERA_ID, MODEL, WIDTH, HEIGHT, fx, fy, cx, cy", cameras))
    rows = []
    for i, (placed, camera_id, seen) in enumerate(images):
        rows.append(f"{i + 1} {_numbers(placed.tolist())} {camera_id} {i:06d}.png")
        rows.append(" ".join(f"{u} {v} {point}" for (u, v), point in zip(seen["xy"].tolist(), seen["point"].tolist())))
    header = "IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME; then POINTS2D[] as (X, Y, POINT3D_ID)"
    write_text(folder / "images.txt", _lines(header, rows))
    columns = [points[name].tolist() for name in ("id", "xyz", "rgb", "error", "track")]
    rows = [f"{i} {_numbers(xyz)} {r} {g} {b} {e} {t} {k}" for i, xyz, (r, g, b), e, (t, k) in zip(*columns)]
    header = "POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[] as (IMAGE_ID, POINT2D_IDX)"
    write_text(folder / "points3D.txt", _lines(header, rows))


def _numbers(values: Iterable[float]) -> str:
    return " ".join(map(repr, values))  # reads back exactly


def _lines(header: str, rows: list[str]) -> str:
    return f"# {header}\n" + "".join(row + "\n" for row in rows)
