"""Estimated geometry (depth or pointmaps, with or without cameras) as a clip holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_prep.sources.decoding import finite, nearest_rotations
from one4d_pl.geometry.camera import resize_frames, resize_intrinsics, resize_nearest_valid
from one4d_pl.geometry.se3 import invert_se3
from one4d_pl.postopt.recover import project_depth, recover_scene

DEPTH_RANGE = 1e4  # times the median depth, or 1 / 1e4: 16-bit log codes cannot hold the outliers beyond
MAX_GROWTH = 6.0  # 512x320 labels of 1920x1080 videos grow 3.4 times; training shrinks the frames again
MIN_TRUSTED = 0.01  # share of pixels


@dataclass(frozen=True)
class Geometry:
    """Depth and cameras of some frames, at the resolution they were estimated at."""

    depth: Tensor  # [T, h, w] float32; +inf = sky, nan = no measurement
    intrinsics: Tensor  # [T, 3, 3] float32, pixels of h x w
    cam2world: Tensor  # [T, 4, 4] float32
    valid: Tensor  # [T, h, w] bool

    @property
    def num_frames(self) -> int:
        """Count the frames."""
        return len(self.depth)

    @staticmethod
    def of_arrays(arrays: Mapping[str, np.ndarray], name: str, min_confidence: float) -> Geometry:
        """Read the geometry in a generic clip's arrays.

        Cameras that are missing are recovered from the pointmaps. ValueError names what else is
        missing or of the wrong shape.
        """
        if ("depth" in arrays) == ("pointmaps" in arrays):
            raise ValueError(f"{name}: need either depth or pointmaps")
        if ("intrinsics" in arrays) != ("cam2world" in arrays) or ("depth" in arrays and "cam2world" not in arrays):
            raise ValueError(f"{name}: need intrinsics and cam2world; only pointmaps can do without, and without both")
        values = arrays.get("depth", arrays.get("pointmaps"))
        assert values is not None
        axes = 3 if "depth" in arrays else 4
        if values.dtype.kind != "f" or values.ndim != axes or 0 in values.shape or (axes == 4 and values.shape[3] != 3):
            raise ValueError(
                f"{name}: geometry is {values.dtype} {values.shape}, need floats [T, h, w] or [T, h, w, 3]"
            )
        with np.errstate(over="ignore"):
            geometry = torch.from_numpy(values.astype(np.float32))
        trusted = _trusted(arrays, values.shape[:3], name, min_confidence)
        if "cam2world" in arrays:
            intrinsics, cam2world = _cameras(arrays, len(values), name)
            depth = geometry if axes == 3 else project_depth(geometry, intrinsics, invert_se3(cam2world))[0]
        else:
            scene = recover_scene(geometry, trusted & geometry.isfinite().all(-1))
            if not bool(scene.report.solved.all()):
                raise ValueError(f"{name}: no camera can be found for all frames ({', '.join(scene.report.flags)})")
            intrinsics, cam2world, depth = scene.intrinsics, scene.cam2world, scene.depth
        depth = _within_range(depth, name)
        valid = trusted & depth.isfinite()
        if float(valid.float().mean()) < MIN_TRUSTED:
            raise ValueError(
                f"{name}: {float(valid.float().mean()):.1%} of the pixels are valid, need {MIN_TRUSTED:.0%}"
            )
        return Geometry(depth, intrinsics, cam2world.float(), valid)

    def at(self, frames: Sequence[int]) -> Geometry:
        """Return the geometry of some frames."""
        rows = list(frames)
        return Geometry(self.depth[rows], self.intrinsics[rows], self.cam2world[rows], self.valid[rows])


def fit_to_frames(
    frames: Tensor,  # [T, H, W, 3] uint8
    geometry: Geometry,  # at h x w
    moving: Tensor | None,  # [T, h, w] bool
    name: str,  # for errors
) -> tuple[Tensor, Geometry, Tensor | None]:
    """Bring frames and geometry to one size.

    Geometry is enlarged by nearest pixel, and frames are cropped to its aspect. ValueError where it
    is larger than the frames, or enlarged more than `MAX_GROWTH` times.
    """
    (height, width), (h, w) = frames.shape[1:3], geometry.depth.shape[1:]
    if (height, width) == (h, w):
        return frames, geometry, moving
    growth = min(height / h, width / w)
    if growth < 1:
        raise ValueError(f"{name}: geometry is {w}x{h}, larger than the frames' {width}x{height}")
    if growth > MAX_GROWTH:
        raise ValueError(f"{name}: geometry is {w}x{h}, too coarse for frames of {width}x{height}")
    target = round(h * growth), round(w * growth)
    enlarged = Geometry(
        depth=resize_nearest_valid(geometry.depth, *target),
        intrinsics=resize_intrinsics(geometry.intrinsics, (h, w), target),
        cam2world=geometry.cam2world,
        valid=resize_nearest_valid(geometry.valid, *target),
    )
    frames = resize_frames(frames, *target)
    return frames, enlarged, None if moving is None else resize_nearest_valid(moving, *target)


def _trusted(
    arrays: Mapping[str, np.ndarray], shape: tuple[int, ...], name: str, min_confidence: float
) -> Tensor:  # [T, h, w] bool
    trusted = torch.ones(shape, dtype=torch.bool)
    if min_confidence > 0 and "confidence" not in arrays:
        raise ValueError(f"{name}: has no confidence, but min_confidence is {min_confidence}")
    for field, kinds in (("confidence", "fiu"), ("valid", "b")):
        if field not in arrays:
            continue
        values = arrays[field]
        if values.shape != shape or values.dtype.kind not in kinds:
            raise ValueError(f"{name}: {field} is {values.dtype} {values.shape}, need {shape}")
        if field == "valid" or min_confidence > 0:  # confidences may be logits: 0 is no threshold
            trusted &= torch.from_numpy(values >= min_confidence if field == "confidence" else values.copy())
    return trusted


def _cameras(
    arrays: Mapping[str, np.ndarray], total: int, name: str
) -> tuple[Tensor, Tensor]:  # [T, 3, 3] float32, [T, 4, 4]
    intrinsics = arrays["intrinsics"]
    if intrinsics.ndim == 2:
        intrinsics = np.repeat(intrinsics[None], total, axis=0)
    matrices = finite(intrinsics, f"{name}: intrinsics", total, 3, 3)
    if (matrices[:, [0, 1], [0, 1]] <= 0).any() or (matrices[:, 2] != [0, 0, 1]).any():
        raise ValueError(f"{name}: intrinsics need positive focal lengths and 0 0 1 below")
    cam2world = nearest_rotations(arrays["cam2world"], f"{name}: cam2world")
    if len(cam2world) != total:
        raise ValueError(f"{name}: {len(cam2world)} cameras for {total} frames")
    return torch.from_numpy(matrices).float(), cam2world


def _within_range(depth: Tensor, name: str) -> Tensor:  # [T, h, w] -> the same, nan beyond DEPTH_RANGE
    depth = torch.where(depth > 0, depth, torch.nan)  # nan > 0 is False
    known = depth[depth.isfinite()]
    if len(known) == 0:
        raise ValueError(f"{name}: no depth is known")
    median = known.median()
    outlier = depth.isfinite() & ((depth > median * DEPTH_RANGE) | (depth < median / DEPTH_RANGE))
    return torch.where(outlier, torch.nan, depth)
