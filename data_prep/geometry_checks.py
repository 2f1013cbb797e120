"""What a clip's depth and cameras say about each other, measured on a subsample of its pixels.

- Consistency: a point of frame i, moved by the cameras, lands on frame j's surface (median relative error of depth).
- Depth scale: which factor on depth, from 1e-4 to 1e4, would make them agree best. Cameras in metres with depth in
  millimetres or raw codes, or a wrong constant of a dataset, show as a factor far from 1; a camera that hardly moves
  tells nothing (nan).
- Motion: how far static points move on the image from frame to frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from one4d_pl.geometry.camera import project, to_camera, to_world, unproject
from one4d_pl.geometry.se3 import geodesic_angle, split_se3
from one4d_pl.types import Clip

POINTS = 3000  # of each frame of a pair, at most
# Factors on depth that are tried, five per decade. The outermost are never believed; within them lie millimetres for
# metres (1000), raw codes of TUM and Bonn (5000) and of sensors with steps of 0.1 mm (10000), and the other way round.
FACTORS = torch.logspace(-4.2, 4.2, 43)
MISFIT_CUT = 0.1  # relative error of depth that counts as wrong altogether: a hidden surface, a wrong factor
CLEAR_SHARE = 0.7  # another factor than 1 is believed where it leaves less than this share of the misfit at 1 ...
GOOD_FIT = 0.03  # ... and a misfit that noise could leave
TELLING_SPREAD = 0.003  # misfit by which factors must differ for the motion to tell anything


@dataclass(frozen=True)
class GeometryCheck:
    """One clip's numbers."""

    static_error: float  # of depth, static points, median over pairs of frames; nan = no pair shares a view
    depth_scale: float  # factor on depth that the cameras ask for; nan = their motion cannot tell
    path_length: float  # of the camera, in median depths
    largest_step: float  # of the camera between two frames, in median depths
    turn: float  # of the camera from the first to the last frame, degrees
    motion: float  # median of static points between consecutive frames, share of the image width


def check_geometry(clip: Clip) -> GeometryCheck:
    """The numbers of a clip; it needs a valid pixel."""
    last = clip.num_frames - 1
    # far apart: what the camera's way does to depth must stand out from pixels that are finite
    pairs = [(0, last // 2), (last // 2, last), (last // 4, 3 * last // 4), (0, last), (last, 0)]
    errors = [pair_errors(clip, i, j, FACTORS) for i, j in pairs]
    median, misfit = (torch.stack(kind).nanmedian(0).values for kind in zip(*errors, strict=True))  # [F] each
    rotation, centre = split_se3(clip.cam2world.double())
    steps = (centre[1:] - centre[:-1]).norm(dim=-1) / float(clip.depth[clip.valid].median())
    return GeometryCheck(
        static_error=float(median[len(FACTORS) // 2]),
        depth_scale=_believed_factor(misfit),
        path_length=float(steps.sum()),
        largest_step=float(steps.max()),
        turn=float(torch.rad2deg(geodesic_angle(rotation[0], rotation[-1]))),
        motion=_median_motion(clip),
    )


def pair_errors(
    clip: Clip,
    i: int,
    j: int,
    factors: Tensor,  # [F] on depth
) -> tuple[Tensor, Tensor]:  # [F] each: median relative error, misfit; nan where too few points of i are seen in j
    """How far the static points of frame i land before or behind frame j's surface, for several factors on depth.

    On a plane that the camera moves along every factor fits, so the median may be blind where the misfit, the mean of
    the errors cut at MISFIT_CUT, is not.
    """
    points, seen = _static_points(clip, i)  # [N, 3] camera i
    scaled = points[None] * factors[:, None, None].double()  # [F, N, 3]
    world = to_world(scaled[:, None], clip.cam2world[i].double())  # [F, 1, N, 3]
    pixels, depth = project(to_camera(world, clip.cam2world[j].double()), clip.intrinsics[j].double())
    surface = _sample_depth(clip, j, pixels[:, 0])[:, None] * factors[:, None, None]  # [F, 1, N], nan = none
    error = ((depth - surface).abs() / surface)[:, 0]  # [F, N]
    error[~(seen & (depth[:, 0] > 0))] = torch.nan
    # a factor that throws most points off the image fits the few that stay: it is no fit
    enough = error.isfinite().sum(1) >= 0.2 * len(points)
    misfit = error.clamp_max(MISFIT_CUT).nanmean(1)
    return torch.where(enough, error.nanmedian(1).values, torch.nan), torch.where(enough, misfit, torch.nan)


def _sample_depth(clip: Clip, frame: int, pixels: Tensor) -> Tensor:  # [F, N, 2] -> [F, N], nan = no static surface
    """Depth between the pixel centres, linear in disparity: exact on every plane."""
    height, width = clip.depth.shape[1:]
    static = clip.valid[frame] & ~_moving(clip, frame)
    disparity = torch.where(static, 1 / clip.depth[frame].double(), 0.0)
    grid = (pixels / pixels.new_tensor([width, height]) * 2 - 1).nan_to_num(-9).clamp(-9, 9)[None]  # [1, F, N, 2]
    maps = torch.stack([disparity, static.double()])[None]  # [1, 2, H, W]
    found, known = grid_sample(maps, grid, padding_mode="zeros", align_corners=False)[0]  # [F, N] each
    return torch.where(known > 0.999, 1 / found, torch.nan)


def _static_points(clip: Clip, frame: int) -> tuple[Tensor, Tensor]:  # [N, 3] camera frame, [N] bool, usable
    step = max(1, int((clip.depth[frame].numel() / POINTS) ** 0.5))
    start = step // 2
    points = unproject(clip.depth[frame].double(), clip.intrinsics[frame].double())[start::step, start::step]
    usable = (clip.valid[frame] & ~_moving(clip, frame))[start::step, start::step]
    return points.flatten(0, 1), usable.flatten()


def _moving(clip: Clip, frame: int) -> Tensor:  # [H, W] bool
    return torch.zeros_like(clip.valid[frame]) if clip.moving is None else clip.moving[frame]


def _believed_factor(misfit: Tensor) -> float:  # [F] -> factor, nan = cannot be told
    one = len(FACTORS) // 2
    known = misfit.isfinite()
    if not bool(known.any()):
        return float("nan")
    best = int(misfit.nan_to_num(torch.inf).argmin())
    if float(misfit[known].max() - misfit[best]) < TELLING_SPREAD:
        return float("nan")  # everything fits: the camera hardly moves
    if known[one] and float(misfit[best]) > CLEAR_SHARE * float(misfit[one]):
        return 1.0
    believed = 0 < best < len(FACTORS) - 1 and float(misfit[best]) < GOOD_FIT
    return float(FACTORS[best]) if believed else float("nan")


def _median_motion(clip: Clip) -> float:
    """Median displacement of static points between consecutive frames, in image widths; nan = nothing static seen."""
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
