"""MPI Sintel's binary files (little-endian, each begins with the float32 tag 202021.25).

.dpt  tag, int32 width, int32 height, float32 z-depth [height, width]
.cam  tag, float64 intrinsics [3, 3], float64 world-to-camera [3, 4] (OpenCV axes), so that
      x = intrinsics · [R | t] · X

Sintel's pixel centres are integers (the principal point of 1024x436 is 511.5, 217.5); here they lie at +0.5.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from one4d_pl.errors import UserError
from one4d_pl.geometry.se3 import invert_se3, se3_matrix

TAG = np.float32(202021.25)
CAM_BYTES = 4 + 8 * (9 + 12)


def read_dpt(path: Path) -> Tensor:  # [H, W] float32
    """Read a depth map; UserError names a file that is none."""
    content = _content(path)
    if len(content) < 12:
        raise UserError(f"{path}: {len(content)} bytes, a .dpt begins with 12")
    width, height = np.frombuffer(content, "<i4", 2, offset=4).tolist()
    if width < 1 or height < 1 or len(content) != 12 + 4 * width * height:
        raise UserError(f"{path}: {len(content)} bytes, its header says {width}x{height} pixels")
    depth = np.frombuffer(content, "<f4", offset=12).reshape(height, width)
    return torch.from_numpy(depth.astype(np.float32))


def read_cam(path: Path) -> tuple[Tensor, Tensor]:  # intrinsics [3, 3] float64, cam2world [4, 4] float64
    """Read intrinsics in pixels (centres at +0.5) and the camera; UserError names a bad file."""
    content = _content(path)
    if len(content) != CAM_BYTES:
        raise UserError(f"{path}: {len(content)} bytes, a .cam has {CAM_BYTES}")
    numbers = torch.from_numpy(np.frombuffer(content, "<f8", offset=4).astype(np.float64))
    if not bool(numbers.isfinite().all()):
        raise UserError(f"{path}: holds a number that is not finite")
    intrinsics, world2cam = numbers[:9].reshape(3, 3).clone(), numbers[9:].reshape(3, 4)
    intrinsics[:2, 2] += 0.5
    return intrinsics, invert_se3(se3_matrix(world2cam[:, :3], world2cam[:, 3]))


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if content[:4] != TAG.astype("<f4").tobytes():
        raise UserError(f"{path}: does not begin with Sintel's tag 202021.25")
    return content
