"""TartanAir v1 (Wang et al., 2020): trajectory folders -> clips, at their native 640x480.

A trajectory folder holds `image_left/%06d_left.png`, `depth_left/%06d_left_depth.npy` (metres,
z-depth) and `pose_left.txt`, whose row n belongs to frame number n: tx ty tz qx qy qz qw, camera to
world, in NED axes (x forward, y right, z down).

- Axes: x_cv = y_ned, y_cv = z_ned, z_cv = x_ned, for the camera's axes and the world's alike, so
  the identity is the same camera in both.
- Intrinsics: fx = fy = 320, cx = 320, cy = 240. The renderer's axis passes through the middle of
  the image, which is W/2, H/2 with pixel centres at +0.5, so the published numbers need no change.
- Sky: depth that is not finite or >= 1000 m becomes +inf; depth < 1 mm becomes nan.
- There is no official frame rate: 10 frames per second is nominal. What moves is not known.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.sources.decoding import read_image, read_npy
from data_prep.sources.tracks import Track, clip_key, find_units, holds
from one4d_pl.geometry.se3 import se3_matrix, xyzw_to_matrix
from one4d_pl.types import Clip

HEIGHT, WIDTH = 480, 640
FOCAL = 320.0  # pixels: 90 degrees across 640
SKY_DEPTH = 1000.0  # metres; the sky is rendered as 10000 m and more
NEAREST_DEPTH = 1e-3  # metres; nearer, the camera is inside an object
NOMINAL_FPS = 10.0
LICENCE = "CC-BY-4.0"
CV_FROM_NED = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]).double()
PATTERNS = {"image_left": r"(\d{6})_left\.png", "depth_left": r"(\d{6})_left_depth\.npy"}
MEMBERS = {"pose_left.txt", *PATTERNS}
LAYOUT = "TartanAir v1 trajectory (image_left/, depth_left/ and pose_left.txt)"


def list_units(root: Path) -> list[str]:
    """List the trajectories at or below `root`, relative to it."""
    return find_units(root, MEMBERS)


def has_unit(root: Path, unit: str) -> bool:
    """Tell whether there is a unit of this name."""
    return holds(root / unit, MEMBERS)


def open_unit(root: Path, unit: str, stride: int) -> list[Track]:
    """Return the trajectory's only track."""

    def read(window: range) -> Clip:
        return _read_clip(root / unit, window, clip_key(root, unit, f"{window[0]:06d}"), NOMINAL_FPS / stride)

    return [Track(str(root / unit), _frame_numbers(root / unit), read)]


def _read_clip(trajectory: Path, window: range, key: str, fps: float) -> Clip:
    frames = np.stack([_read_image(trajectory / "image_left" / f"{n:06d}_left.png") for n in window])
    depth = np.stack([_read_depth(trajectory / "depth_left" / f"{n:06d}_left_depth.npy") for n in window])
    intrinsics = torch.tensor([[FOCAL, 0.0, WIDTH / 2], [0.0, FOCAL, HEIGHT / 2], [0.0, 0.0, 1.0]])
    return Clip(
        key=key,
        frames=torch.from_numpy(frames),
        depth=torch.from_numpy(depth),
        intrinsics=intrinsics.repeat(len(window), 1, 1),
        cam2world=_read_cameras(trajectory / "pose_left.txt", window).float(),
        valid=torch.from_numpy(np.isfinite(depth)),
        moving=None,
        caption="",
        source="tartanair",
        domain="synthetic",
        fps=fps,
        licence=LICENCE,
    )


def _frame_numbers(trajectory: Path) -> list[int]:
    """List every frame number that has an image or a depth file; one that has only one is an error, not a gap."""
    found = [re.fullmatch(p, path.name) for folder, p in PATTERNS.items() for path in (trajectory / folder).iterdir()]
    return sorted({int(match[1]) for match in found if match})


def _read_image(path: Path) -> NDArray[np.uint8]:  # [H, W, 3]
    frame = read_image(path)
    if frame.shape != (HEIGHT, WIDTH, 3):
        raise ValueError(f"{path}: {frame.shape[1]}x{frame.shape[0]} pixels, TartanAir has {WIDTH}x{HEIGHT}")
    return frame


def _read_depth(path: Path) -> NDArray[np.float32]:  # [H, W], metres; +inf = sky, nan = no measurement
    depth = read_npy(path)
    if depth.shape != (HEIGHT, WIDTH) or depth.dtype.kind != "f":
        raise ValueError(f"{path}: need float depth of {WIDTH}x{HEIGHT} pixels, got {depth.dtype} {depth.shape}")
    sky = ~np.isfinite(depth) | (depth >= SKY_DEPTH)
    return np.where(sky, np.inf, np.where(depth < NEAREST_DEPTH, np.nan, depth)).astype(np.float32)


def _read_cameras(path: Path, window: range) -> Tensor:  # [T, 4, 4] float64, OpenCV axes
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number in window:
        if number >= len(lines):
            raise ValueError(f"{path}: {len(lines)} rows, none for frame {number}")
        try:
            row = np.array([float(word) for word in lines[number].split()])
            rows.append(camera_from_row(row))
        except ValueError as error:
            raise ValueError(f"{path}: row of frame {number}: {error}") from error
    return torch.stack(rows)


def camera_from_row(row: np.ndarray) -> Tensor:  # [7] tx ty tz qx qy qz qw, NED -> [4, 4] float64, OpenCV axes
    """Convert one row of pose_left.txt to cam2world; ValueError without seven finite numbers and a unit quaternion."""
    if row.shape != (7,) or not np.isfinite(row).all():
        raise ValueError(f"need 7 finite numbers, got {row.tolist()}")
    norm = float(np.linalg.norm(row[3:]))
    if abs(norm - 1) > 1e-2:
        raise ValueError(f"the quaternion's norm is {norm:.4f}, need 1")
    rotation = CV_FROM_NED @ xyzw_to_matrix(torch.from_numpy(row[3:])) @ CV_FROM_NED.T
    return se3_matrix(rotation, CV_FROM_NED @ torch.from_numpy(row[:3]))
