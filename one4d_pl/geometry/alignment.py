"""Closed-form least-squares alignment of point sets, named by what is free.

`align_scale_shift` fits a scale and a shift, `align_sim3` a similarity. Both minimise
sum_i w_i |s R p_i + t - q_i|² with one set of parameters per leading index and s >= 0 (a mirrored scene is not an
aligned one). Squared errors let far points count most: for a relative error pass weights such as 1 / depth². Rows of
weight zero are ignored even if they hold nan. The caller flattens the points: a clip is [T·H·W, 3].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from one4d_pl.geometry.se3 import matrix_product, rotate


@dataclass(frozen=True)
class Similarity:
    """The map x -> scale · rotation · x + translation. What an alignment does not fit is the identity."""

    scale: Tensor  # [...]
    rotation: Tensor  # [..., 3, 3]
    translation: Tensor  # [..., 3]

    def apply(self, points: Tensor) -> Tensor:  # [..., N, 3] -> [..., N, 3]
        """Move every point."""
        rotated = rotate(self.rotation[..., None, :, :], points)
        return self.scale[..., None, None] * rotated + self.translation[..., None, :]


def align_scale_shift(
    preds: Tensor,  # [..., N, 3]
    target: Tensor,  # [..., N, 3]
    valid: Tensor,  # [..., N] bool, or weights >= 0
) -> Similarity:
    """Fit the least-squares scale (at least 0) and 3-D shift. ValueError for fewer than two distinct valid points."""
    preds, target, weights = _clean(preds, target, valid)
    preds_mean, target_mean = _mean(preds, weights), _mean(target, weights)
    centred, target_centred = preds - preds_mean[..., None, :], target - target_mean[..., None, :]
    # Equal points keep rounding errors after centring, which must not pass for a spread.
    size = preds.abs().amax((-2, -1), keepdim=True)
    centred = torch.where(centred.abs() <= 8 * torch.finfo(preds.dtype).eps * size, 0, centred)
    spread = (weights[..., None] * centred.square()).sum((-2, -1))
    if not bool((spread > 0).all()):
        raise ValueError("align_scale_shift: fewer than two distinct valid points")
    scale = ((weights[..., None] * centred * target_centred).sum((-2, -1)) / spread).clamp(min=0)
    rotation = torch.eye(3, dtype=preds.dtype, device=preds.device).expand(*preds.shape[:-2], 3, 3)
    return Similarity(scale, rotation, target_mean - scale[..., None] * preds_mean)


def align_sim3(
    preds: Tensor,  # [..., N, 3]
    target: Tensor,  # [..., N, 3]
    valid: Tensor,  # [..., N] bool, or weights >= 0
) -> Similarity:
    """Fit the least-squares similarity (Umeyama 1991, weighted), never a reflection.

    ValueError for fewer than three or collinear valid points.
    """
    preds, target, weights = _clean(preds, target, valid)
    # 1. Means and variance of the source (Umeyama 1991, eqs. 34-36).
    preds_mean, target_mean = _mean(preds, weights), _mean(target, weights)
    centred, target_centred = preds - preds_mean[..., None, :], target - target_mean[..., None, :]
    variance = (weights[..., None] * centred.square()).sum((-2, -1))
    # 2. Covariance of target and source (eq. 38), column by column: no matmul, see se3.py.
    columns = [(weights[..., None] * target_centred * centred[..., j, None]).sum(-2) for j in range(3)]
    covariance = torch.stack(columns, dim=-1)  # [..., 3, 3]
    # 3. Its SVD; below rank 2 the rotation is not determined (text before eq. 39).
    left, singular, right_t = torch.linalg.svd(covariance)
    if not bool((singular[..., 1] > 10 * torch.finfo(preds.dtype).eps * singular[..., 0]).all()):
        raise ValueError("align_sim3: valid points are fewer than three or collinear, the rotation is not determined")
    # 4. Rotation; the weakest axis is flipped where the best fit is a reflection (eqs. 39, 40, 43).
    signs = torch.ones_like(singular)
    signs[..., 2] = (torch.linalg.det(left) * torch.linalg.det(right_t)).sign()
    rotation = matrix_product(left * signs[..., None, :], right_t)
    # 5. Scale (eq. 42), then translation (eq. 41).
    scale = (singular * signs).sum(-1) / variance
    return Similarity(scale, rotation, target_mean - scale[..., None] * rotate(rotation, preds_mean))


def _clean(preds: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero the rows without weight and let the weights sum to one; ValueError if none is left."""
    weights = valid.to(preds.dtype)
    total = weights.sum(-1, keepdim=True)
    if not bool((total > 0).all()):
        raise ValueError("alignment: no valid point; skip the clip or check its valid map")
    used = weights[..., None] > 0
    return torch.where(used, preds, 0), torch.where(used, target, 0), weights / total


def _mean(points: Tensor, weights: Tensor) -> Tensor:  # [..., N, 3], [..., N] -> [..., 3]
    return (weights[..., None] * points).sum(-2)
