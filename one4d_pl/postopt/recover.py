"""Recover intrinsics, a camera per frame and depth from a pointmap video (One4D, Eq. 11-12).

1. Sample pixels of every frame: medians of 3x3 blocks for the start, a dense grid for the last steps.
2. Closed form: compare focal votes of the frames (DLT) with a ladder of focal lengths, then solve for a pose per frame
   (SQPnP).
3. Newton's method on all poses and the focal length, first on the blocks, then on the grid. The smoothness weight is
   lowered, down to 0, where cross-validation shows that it costs accuracy.
4. One focal length, square pixels and a centred principal point are assumed. Where held-out quarters of the picture all
   contradict one of these, it is solved for (`model_choice`).
5. A focal length that the points do not determine is replaced by the prior, and the poses are solved again for it.
6. Depth: each point's projection onto its pixel's ray.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from one4d_pl.geometry.alignment import Similarity
from one4d_pl.geometry.camera import camera_rays
from one4d_pl.geometry.se3 import invert_se3, se3_matrix
from one4d_pl.postopt.certainty import motion_flags
from one4d_pl.postopt.intrinsics import Lens, Samples, intrinsics_matrix, prior_focal, sample_grid, sample_medians
from one4d_pl.postopt.model_choice import fit
from one4d_pl.postopt.options import RecoverOptions
from one4d_pl.postopt.refine import Refined
from one4d_pl.postopt.trajectory import Cameras, fill_missing, ray_distance, solvable_frames

_BLOCKS = 768  # per frame, for the start
_TRUSTED = 5.0  # noise deviations: inliers of the report


@dataclass(frozen=True)
class Seam:
    """How well two neighbouring windows agree on the frames that they share."""

    similarity: Similarity  # from the later window's world to the joined world
    residual: float  # median distance of shared points after it, in median depths
    inliers: float  # share of shared points within five deviations
    flags: tuple[str, ...]


@dataclass(frozen=True)
class RecoverReport:
    """How far to trust a recovery."""

    residual: Tensor  # [T] float64, mean |X - X̂| over sampled pixels with weight, unit of the pointmap; nan = none
    noise: Tensor  # [T] float64, robust deviation per axis across the rays, unit of the pointmap; nan = not solved
    inliers: Tensor  # [T] float64, share of sampled weight within five deviations
    solved: Tensor  # [T] bool; False = too few or degenerate points, the pose is interpolated
    behind: Tensor  # [T] float64, share of points behind their camera: their depth is 0
    iterations: int  # Gauss-Newton steps
    converged: bool
    alpha2: float  # used: at most the option's
    focal_condition: float  # 0 .. 1; 0 = a change of focal length looks like a change of pose; of the worst frame
    focal_deviation: float  # of log focal, as if pixels were independent; 0 = known; inf = not observable
    flags: tuple[str, ...]  # what is unusual or degenerate, in words
    seams: tuple[Seam, ...] = ()  # between the windows of a long video (`windows`)


@dataclass(frozen=True)
class RecoveredScene:
    """A pointmap video with its cameras and depth, in the pointmap's frame and unit."""

    pointmap: Tensor  # [T, H, W, 3]
    known: Tensor  # [T, H, W] bool, the point was used
    intrinsics: Tensor  # [T, 3, 3] float32, pixels, pixel centres at +0.5
    world2cam: Tensor  # [T, 4, 4] float64, world = frame of the pointmap
    depth: Tensor  # [T, H, W] float32, z in the frame's own camera; 0 = behind it, nan = no finite point
    report: RecoverReport

    @property
    def cam2world(self) -> Tensor:  # [T, 4, 4] float64
        """Invert world2cam."""
        return invert_se3(self.world2cam)

    @property
    def valid(self) -> Tensor:  # [T, H, W] bool
        """Tell which points are known and in front of their camera."""
        return self.known & (self.depth > 0)

    @property
    def flags(self) -> tuple[str, ...]:
        """Say what is unusual or degenerate, seams included."""
        return self.report.flags + tuple(flag for seam in self.report.seams for flag in seam.flags)


@torch.no_grad()
def recover_scene(
    pointmap: Tensor,  # [T, H, W, 3], any similarity frame; not finite = no point
    valid: Tensor | None = None,  # [T, H, W] bool or weights >= 0; None = every finite point
    options: RecoverOptions | None = None,
) -> RecoveredScene:
    """Recover the cameras and depth whose points are nearest to the pointmap (One4D, Eq. 12).

    Degenerate geometry raises nothing: the answer is defined, and `report.flags` names it. Wrong
    shapes raise ValueError. Results turn, shift and scale with the pointmap.
    """
    options = options or RecoverOptions()
    _check(pointmap, valid)
    height, width = pointmap.shape[1:3]
    side = max(height, width)
    lens = _known_lens(options, height, width)
    blocks = sample_medians(pointmap, valid, _BLOCKS).through(lens)
    grid = sample_grid(pointmap, valid, options.pixels_per_frame).through(lens)
    prior = prior_focal(height, width, lens.aspect)
    known = None if options.focal is None else options.focal / side

    centre, unit = _scene_frame(blocks)
    blocks, grid = blocks.normalised(centre, unit), grid.normalised(centre, unit)
    solved = solvable_frames(blocks) & solvable_frames(grid)
    if bool(solved.any()):
        some = (blocks, grid) if bool(solved.all()) else (blocks.take(solved), grid.take(solved))  # no copy of all
        refined, flags = fit(*some, prior, known, options)
        cameras, lens = fill_missing(refined.cameras, solved), refined.lens
        flags += motion_flags(refined.cameras, refined.pose_information, distance=1.0)
    else:
        refined, cameras, flags = None, _default_cameras(pointmap, known or prior), ("no geometry",)
        centre = torch.zeros_like(centre)
    if refined is not None and not bool(solved.all()):
        flags += ("interpolated poses",)

    grid = grid.through(lens)
    intrinsics = intrinsics_matrix(cameras.log_focal.exp(), height, width, lens)
    cam2world = se3_matrix(cameras.rotation.mT, centre + unit * cameras.centre)
    depth, behind = project_depth(pointmap, intrinsics, invert_se3(cam2world))
    if float(behind.amax()) > 0.5:
        flags += ("points behind the camera",)
    report = _report(refined, grid, cameras, solved, behind, float(unit), known is not None, flags)
    used = torch.ones_like(depth, dtype=torch.bool) if valid is None else valid > 0
    return RecoveredScene(pointmap, used, intrinsics.float(), invert_se3(cam2world), depth, report)


def project_depth(
    pointmap: Tensor,  # [T, H, W, 3]
    intrinsics: Tensor,  # [T, 3, 3]
    world2cam: Tensor,  # [T, 4, 4]
) -> tuple[Tensor, Tensor]:  # [T, H, W] float32; share behind the camera [T] float64
    """Return the z-depth, at least 0, that minimises |X - X̂| along each pixel's ray."""
    num_frames, height, width = pointmap.shape[:3]
    depth = torch.empty(num_frames, height, width, dtype=torch.float32, device=pointmap.device)
    behind = torch.zeros(num_frames, dtype=torch.float64, device=pointmap.device)
    rows = world2cam[:, :3].double().tolist()
    last = None
    for t in range(num_frames):  # frame by frame: bounded memory, and data read twice are still in the cache
        points = pointmap[t].to(torch.promote_types(pointmap.dtype, torch.float32)).unbind(-1)
        if last is None or not torch.equal(intrinsics[t], last):
            last = intrinsics[t]
            rays = camera_rays(height, width, last.double())
            shares = (rays / rays.square().sum(-1, keepdim=True)).to(points[0].dtype).unbind(-1)
        z = torch.zeros_like(points[0])  # ray · (R X + t) / ray · ray, added up row by row
        for share, (a, b, c, shift) in zip(shares, rows[t]):
            z.addcmul_(share, (points[0] * a).add_(points[1], alpha=b).add_(points[2], alpha=c).add_(shift))
        finite = z.isfinite()
        behind[t] = ((z <= 0) & finite).sum() / finite.sum().clamp_min(1)
        depth[t] = torch.where(finite, z, torch.nan).clamp_min(0)
    return depth, behind


def _check(pointmap: Tensor, valid: Tensor | None) -> None:
    if pointmap.ndim != 4 or pointmap.shape[-1] != 3 or 0 in pointmap.shape or not pointmap.is_floating_point():
        raise ValueError(f"pointmap: {pointmap.dtype} {list(pointmap.shape)}, need floating point [T, H, W, 3]")
    if valid is not None and valid.shape != pointmap.shape[:3]:
        raise ValueError(f"valid: {list(valid.shape)}, need the pointmap's [T, H, W] = {list(pointmap.shape[:3])}")


def _known_lens(options: RecoverOptions, height: int, width: int) -> Lens:
    """Return the lens that the user has given, and square pixels and the image centre otherwise."""
    aspect = options.aspect if isinstance(options.aspect, (int, float)) else 1.0
    if not isinstance(options.principal_point, tuple):
        return Lens(aspect)
    x, y = options.principal_point
    side = max(height, width)
    return Lens(aspect, (x - width / 2) / side, (y - height / 2) / side)


def _scene_frame(blocks: Samples) -> tuple[Tensor, Tensor]:  # [3], []
    """Return a robust centre and size of the scene.

    With them rounding and thresholds do not depend on the scene's place and unit.
    """
    points = blocks.points[blocks.weights > 0]
    if len(points) == 0:
        return blocks.points.new_zeros(3), blocks.points.new_ones(())
    centre = points.median(0).values
    unit = torch.linalg.vector_norm(points - centre, dim=-1).median()
    return centre, unit if float(unit) > 1e-12 * float(centre.abs().amax()) else torch.ones_like(unit)


def _default_cameras(pointmap: Tensor, focal: float) -> Cameras:
    """Put every camera at the origin of the pointmap's frame, looking along its z."""
    zeros = torch.zeros(len(pointmap), dtype=torch.float64, device=pointmap.device)
    eye = torch.eye(3, dtype=torch.float64, device=pointmap.device).expand(len(pointmap), 3, 3)
    return Cameras(zeros + math.log(focal), eye, zeros[:, None].expand(-1, 3))


def _report(
    refined: Refined | None,
    grid: Samples,
    cameras: Cameras,
    solved: Tensor,
    behind: Tensor,
    unit: float,
    focal_known: bool,
    flags: tuple[str, ...],
) -> RecoverReport:
    """Measure the result on the grid, in the pointmap's unit."""
    weight = grid.weights.sum(-1)
    distance = ray_distance(grid, cameras)
    residual = unit * (distance * grid.weights).sum(-1) / weight  # 0 / 0 = nan: no point to measure
    noise = torch.full_like(residual, torch.nan)
    inliers = torch.zeros_like(residual)
    if refined is None:
        return RecoverReport(residual, noise, inliers, solved, behind, 0, True, 0.0, 0.0, math.inf, flags)
    noise[solved] = refined.noise
    trusted = (distance < _TRUSTED * noise[:, None]) * grid.weights
    inliers = torch.where(solved, trusted.sum(-1) / weight, 0.0)
    noise = noise * unit
    condition = 1.0 if focal_known else float(refined.focal_condition.amin())
    deviation = 0.0 if focal_known else float(refined.focal_deviation.amax())
    if not refined.converged:
        flags += ("not converged",)
    steps = refined.iterations, refined.converged, refined.alpha2
    return RecoverReport(residual, noise, inliers, solved, behind, *steps, condition, deviation, flags)
