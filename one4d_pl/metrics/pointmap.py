"""Pointmaps against ground truth in camera-0 coordinates: relative point error, inlier share.

The relative error of a point is |p - g| / |g|: its error after the alignment over the true point's distance from camera
0, the origin of the pointmap's world. It weighs a decoder's error, which is uniform in the cube, most where it hurts
most: at near points. It does not change with the unit of the clip, and a prediction of nothing but the origin gets 1. A
moving camera may see points where camera 0 stood, so distances count as at least a tenth of the clip's median. One
scale and one shift per clip minimise the squares of the same relative errors. A prediction that is not finite has error
1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from one4d_pl.geometry.alignment import Similarity, align_scale_shift

INLIER = 0.25  # an inlier has a smaller relative error
MIN_DISTANCE = 0.1  # times the median distance: the least that a distance counts as


@dataclass(frozen=True)
class PointmapErrors:
    """Means over the points of one clip, and over its moving points alone; 0 without a point."""

    rel_error: Tensor
    inliers: Tensor  # share with relative error < 0.25
    rel_error_moving: Tensor
    inliers_moving: Tensor
    num_valid: Tensor
    num_moving: Tensor
    collapsed: Tensor  # bool: one point, too little for an alignment


def align_pointmap(
    preds: Tensor,  # [..., 3], one clip of any shape
    target: Tensor,  # [..., 3], camera-0 coordinates
    valid: Tensor,  # [...] bool, at least one
) -> tuple[Similarity, bool]:
    """Fit scale and shift of least squared relative error over the valid finite points.

    Returns them, and whether the prediction is collapsed: of one point, or none, only the target's mean is left.
    """
    usable = valid & preds.isfinite().all(-1)
    distance = _distances(target, valid)
    points, truth, weights = preds[usable], target[usable], distance[usable].square().reciprocal()
    try:
        return align_scale_shift(points, truth, weights), False
    except ValueError:  # fewer than two distinct points
        centre = (weights[:, None] * truth).sum(0) / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
        rotation = torch.eye(3, dtype=distance.dtype, device=distance.device)
        return Similarity(distance.new_zeros(()), rotation, centre), True


def pointmap_errors(
    preds: Tensor,  # [T, H, W, 3], any unit, shifted by anything
    target: Tensor,  # [T, H, W, 3], camera-0 coordinates, not normalised with an offset
    valid: Tensor,  # [T, H, W] bool
    moving: Tensor | None,  # [T, H, W] bool; None = unknown, nothing is reported as moving
) -> PointmapErrors:
    """Align one clip on all its valid points; measure all of them, and the moving ones alone."""
    empty = torch.zeros((), dtype=torch.float64, device=preds.device)
    valid = valid & target.isfinite().all(-1)
    count = valid.sum()
    if count == 0:
        return PointmapErrors(empty, empty, empty, empty, count, count, count > 0)
    fit, collapsed = align_pointmap(preds, target, valid)
    distance = _distances(target, valid)
    error = torch.linalg.vector_norm(fit.apply(preds[valid]) - target[valid], dim=-1) / distance[valid]  # [N]
    error = torch.where(preds[valid].isfinite().all(-1), error, 1).double()
    inlier = (error < INLIER).double()
    is_moving = torch.zeros_like(inlier) if moving is None else moving[valid].double()
    num_moving = is_moving.sum()
    return PointmapErrors(
        rel_error=error.mean(),
        inliers=inlier.mean(),
        rel_error_moving=(is_moving * error).sum() / num_moving.clamp_min(1),
        inliers_moving=(is_moving * inlier).sum() / num_moving.clamp_min(1),
        num_valid=count,
        num_moving=num_moving.long(),
        collapsed=torch.tensor(collapsed, device=preds.device),
    )


class PointmapError(Metric):
    """Means over clips of `pointmap_errors`; nan before any clip.

    Errors of moving points are averaged over the clips that show motion.
    """

    higher_is_better, full_state_update = False, False
    totals: Tensor
    moving_totals: Tensor
    clips: Tensor
    moving_clips: Tensor
    collapsed: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("totals", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("moving_totals", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("clips", "moving_clips", "collapsed"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, valid: Tensor, moving: Tensor | None = None) -> None:
        """Add clips: preds and target [B, T, H, W, 3], valid and moving [B, T, H, W] bool."""
        for i in range(len(preds)):
            errors = pointmap_errors(preds[i], target[i], valid[i], None if moving is None else moving[i])
            self.totals += torch.stack([errors.rel_error, errors.inliers])
            self.moving_totals += torch.stack([errors.rel_error_moving, errors.inliers_moving])
            self.clips += errors.num_valid > 0
            self.moving_clips += errors.num_moving > 0
            self.collapsed += errors.collapsed

    def compute(self) -> dict[str, Tensor]:
        """Return rel_error and inliers over all and over moving points, and the share of collapsed clips."""
        names = ("rel_error", "inliers", "rel_error_moving", "inliers_moving")
        means = (*(self.totals / self.clips), *(self.moving_totals / self.moving_clips))
        return dict(zip(names, means)) | {"collapsed": self.collapsed / self.clips}


def _distances(target: Tensor, valid: Tensor) -> Tensor:  # [..., 3], [...] -> [...]
    """Return every point's distance from camera 0, at least a tenth of the valid points' median."""
    distance = torch.linalg.vector_norm(target, dim=-1)
    return distance.clamp(min=MIN_DISTANCE * float(distance[valid].median()))
