"""PointOdyssey v1.2 (Zheng et al., 2023): sequence folders -> clips.

A sequence folder holds `rgbs/rgb_%05d.jpg`, `depths/depth_%05d.png` (16 bit) and `anno.npz` (intrinsics [T, 3, 3],
extrinsics [T, 4, 4]; row n belongs to frame number n). Facts: y-zheng18/point_odyssey @ a053342.

- Cameras: world to camera, OpenCV axes; v1.1 and later need no flips [utils/reprojection.py:L38-40, L81-85].
- Depth = code / 65535 * 1000 m, planar z [utils/gen_tracking.py:L115-124]; one code is 1.5 cm.
  MotionCrafter wrongly reads it as ray length. 65535 (1000 m or more) is sky; 0 is no measurement.
- The principal point is the middle of the image, the renderer's axis, so pixel centres are at +0.5.
- The numbers of images, depths and camera rows can differ: a clip needs all three.
- There is no official frame rate; 30 frames per second is nominal.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.sources.decoding import finite, nearest_rotations, read_depth_codes, read_frames, read_npz, stack_alike
from data_prep.sources.tracks import Track, clip_key, find_units, holds
from one4d_pl.geometry.se3 import invert_se3
from one4d_pl.types import Clip

NOMINAL_FPS = 30.0
LICENCE = "CC-BY-NC-SA-4.0"
PATTERNS = {"rgbs": r"rgb_(\d{5})\.jpg", "depths": r"depth_(\d{5})\.png"}


MEMBERS = {"anno.npz", *PATTERNS}
LAYOUT = "PointOdyssey v1.2 sequence (rgbs/, depths/ and anno.npz)"


def list_units(root: Path) -> list[str]:
    """List the sequence folders at or below `root`, relative to it."""
    return find_units(root, MEMBERS)


def has_unit(root: Path, unit: str) -> bool:
    """Tell whether there is a unit of this name."""
    return holds(root / unit, MEMBERS)


def open_unit(root: Path, unit: str, stride: int) -> list[Track]:
    """Return the sequence's only track."""

    def read(window: range) -> Clip:
        return _read_clip(root / unit, window, clip_key(root, unit, f"{window[0]:05d}"), NOMINAL_FPS / stride)

    return [Track(str(root / unit), _frame_numbers(root / unit), read)]


def depth_from_codes(codes: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return metres; +inf = sky, nan = no measurement."""
    depth = codes.astype(np.float64) / 65535 * 1000
    return np.where(codes == 65535, np.inf, np.where(codes == 0, np.nan, depth)).astype(np.float32)


def _frame_numbers(sequence: Path) -> list[int]:
    """List every frame number that has an image or a depth file; one that has only one is an error, not a gap."""
    found = [re.fullmatch(p, path.name) for folder, p in PATTERNS.items() for path in (sequence / folder).iterdir()]
    return sorted({int(match[1]) for match in found if match})


def _read_clip(sequence: Path, window: range, key: str, fps: float) -> Clip:
    path = sequence / "anno.npz"
    cameras = read_npz(path, ("intrinsics", "extrinsics"))
    if missing := {"intrinsics", "extrinsics"} - set(cameras):
        raise ValueError(f"{path}: no {sorted(missing)[0]}")
    rows = min(len(numbers) if numbers.ndim else 0 for numbers in cameras.values())
    if window[-1] >= rows:
        raise ValueError(f"{path}: {rows} camera rows, none for frame {window[-1]}")
    intrinsics = finite(cameras["intrinsics"][list(window)], f"{path}: intrinsics", len(window), 3, 3)
    world2cam = nearest_rotations(cameras["extrinsics"][list(window)], f"{path}: extrinsics")
    paths = [sequence / "depths" / f"depth_{n:05d}.png" for n in window]
    depth = torch.from_numpy(depth_from_codes(stack_alike([read_depth_codes(p) for p in paths], paths)))
    return Clip(
        key=key,
        frames=read_frames([sequence / "rgbs" / f"rgb_{n:05d}.jpg" for n in window]),
        depth=depth,
        intrinsics=torch.from_numpy(intrinsics).float(),
        cam2world=invert_se3(world2cam).float(),
        valid=depth.isfinite(),
        moving=None,
        caption="",
        source="pointodyssey",
        domain="synthetic",
        fps=fps,
        licence=LICENCE,
    )
