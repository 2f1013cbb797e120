"""How a clip's depth and cameras fit together and how its camera moves, on some of its pixels.

- Consistency and conventions: see conventions.py.
- Motion: how far static points move on the image from frame to frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.conventions import compare_readings
from one4d_pl.geometry.camera import project, to_camera, to_world, unproject
from one4d_pl.geometry.se3 import geodesic_angle, split_se3
from one4d_pl.types import Clip

POINTS = 3000  # at most, of each frame


@dataclass(frozen=True)
class GeometryCheck:
    """The measurements of one clip."""

    static_error: float  # of static points' depth, median over pairs of frames; nan = no shared view
    depth_scale: float  # factor on depth that fits the cameras; nan = undetermined
    margins: dict[str, tuple[float, float]]  # of other readings of the files: see conventions.py
    path_length: float  # of the camera, in median depths
    largest_step: float  # of the camera between two frames, in median depths
    turn: float  # of the camera from the first to the last frame, degrees
    motion: float  # median of static points between consecutive frames, share of the image width


def check_geometry(clip: Clip) -> GeometryCheck:
    """Measure a clip; it needs a valid pixel."""
    readings = compare_readings(clip)
    rotation, centre = split_se3(clip.cam2world.double())
    steps = (centre[1:] - centre[:-1]).norm(dim=-1) / float(clip.depth[clip.valid].median())
    return GeometryCheck(
        static_error=readings.static_error,
        depth_scale=readings.depth_scale,
        margins=readings.margins,
        path_length=float(steps.sum()),
        largest_step=float(steps.max()),
        turn=float(torch.rad2deg(geodesic_angle(rotation[0], rotation[-1]))),
        motion=_median_motion(clip),
    )


def _static_points(clip: Clip, frame: int) -> tuple[Tensor, Tensor]:  # [N, 3] camera frame, [N] bool, usable
    step = max(1, int((clip.depth[frame].numel() / POINTS) ** 0.5))
    start = step // 2
    points = unproject(clip.depth[frame].double(), clip.intrinsics[frame].double())[start::step, start::step]
    usable = clip.valid[frame] if clip.moving is None else clip.valid[frame] & ~clip.moving[frame]
    return points.flatten(0, 1), usable[start::step, start::step].flatten()


def _median_motion(clip: Clip) -> float:
    """Return the median displacement of static points between frames, in image widths; nan where none is seen."""
    width = clip.depth.shape[2]
    moves = []
    for t in range(0, clip.num_frames - 1, max(1, clip.num_frames // 8)):
        points, seen = _static_points(clip, t)
        points = points[seen][None]  # [1, N, 3]
        before, _ = project(points, clip.intrinsics[t].double())
        moved = to_camera(to_world(points, clip.cam2world[t].double()), clip.cam2world[t + 1].double())
        after, depth = project(moved, clip.intrinsics[t + 1].double())
        moves.append((after - before).norm(dim=-1)[depth > 0] / width)
    return float(torch.cat(moves).median()) if any(len(m) for m in moves) else float("nan")
