"""Camera trajectories against ground truth: ATE, RPE, relative pose AUC, and how far they go.

ATE and RPE are those of evo with Sim(3) alignment over all frames (`evo_ape -as`, `evo_rpe -as -d 1 -u f` with all
pairs): root mean squares. RPE does not depend on the rotation and translation of the alignment, only on its scale.

A camera that stands still, or moves on a line, does not determine the rotation of the alignment; evo refuses it, and
published protocols then drop the sequence. Here the errors of the best similarity are reported all the same (they are
unique) and the sequence is flagged `degenerate`. Path length and total rotation are reported too, so that a standing
camera does not look good. Nor does one that only trembles: Sim(3) scales its jitter to whatever fits best, so its path
may have any length, but its ATE is hardly below `ate_standing`.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from one4d_pl.geometry.alignment import align_sim3
from one4d_pl.geometry.se3 import geodesic_angle, relative_se3, split_se3

AUC_LIMIT = 30.0  # degrees
NO_BASELINE = 1e-6  # times the path length: two camera centres closer than this have no direction


@dataclass(frozen=True)
class CameraErrors:
    """The errors of one trajectory; lengths in the unit of the target."""

    ate: Tensor  # RMSE of camera centres after Sim(3)
    ate_standing: Tensor  # what a camera that stands still would get: the spread of the true centres
    rpe_trans: Tensor  # RMSE over successive frames of the relative translation, scale aligned
    rpe_rot: Tensor  # RMSE over successive frames of the relative rotation, degrees
    auc_30: Tensor  # `relative_pose_auc` up to 30 degrees, 1 is best
    path_length: Tensor  # of preds, scale aligned
    path_length_target: Tensor
    total_rotation: Tensor  # of preds, degrees
    total_rotation_target: Tensor  # degrees
    degenerate: Tensor  # bool: the alignment's rotation is not determined (rank < 2), evo would refuse


ERROR_NAMES = tuple(CameraErrors.__dataclass_fields__)[:-1]


def camera_errors(
    preds: Tensor,  # [T, 4, 4] cam2world
    target: Tensor,  # [T, 4, 4] cam2world
    valid: Tensor,  # [T] bool; other rows are left out, as if never recorded
) -> CameraErrors:
    """Compare two trajectories in float64.

    ValueError for fewer than two valid cameras, or a valid one that is not finite.
    """
    preds, target = preds[valid].double(), target[valid].double()
    if len(preds) < 2:
        raise ValueError(f"camera_errors: {len(preds)} valid cameras, need at least 2")
    if not bool(preds.isfinite().all() & target.isfinite().all()):
        raise ValueError("camera_errors: a valid camera is not finite; mark it as not valid")
    ate, scale, degenerate = absolute_error(preds[:, :3, 3], target[:, :3, 3])
    rotation, step = split_se3(relative_se3(preds[:-1], preds[1:]))  # [T-1, 3, 3], [T-1, 3]
    rotation_target, step_target = split_se3(relative_se3(target[:-1], target[1:]))
    return CameraErrors(
        ate=ate,
        ate_standing=(target[:, :3, 3] - target[:, :3, 3].mean(0)).square().sum(-1).mean().sqrt(),
        rpe_trans=(scale * step - step_target).square().sum(-1).mean().sqrt(),
        rpe_rot=geodesic_angle(rotation, rotation_target).rad2deg().square().mean().sqrt(),
        auc_30=relative_pose_auc(preds, target, AUC_LIMIT),
        path_length=scale * path_length(preds),
        path_length_target=path_length(target),
        total_rotation=total_rotation(preds),
        total_rotation_target=total_rotation(target),
        degenerate=degenerate,
    )


def absolute_error(
    preds: Tensor,  # [T, 3] camera centres, float64
    target: Tensor,  # [T, 3] camera centres, float64
) -> tuple[Tensor, Tensor, Tensor]:  # RMSE, scale, degenerate
    """Align two paths by the best similarity.

    Returns the RMSE, the scale, and whether evo would refuse: the rotation is not determined.
    """
    centred, target_centred = preds - preds.mean(0), target - target.mean(0)
    covariance = (target_centred[:, :, None] * centred[:, None, :]).mean(0)  # [3, 3]
    singular = torch.linalg.svdvals(covariance)
    eps = torch.finfo(torch.float64).eps
    refused = singular[1] <= eps  # evo's absolute rule: what published protocols drop
    if bool(singular[1] > 100 * eps * singular[0]):  # well above the rank test of align_sim3
        everywhere = torch.ones_like(preds[:, 0], dtype=torch.bool)
        fit = align_sim3(preds, target, everywhere)
        return (fit.apply(preds) - target).square().sum(-1).mean().sqrt(), fit.scale, refused
    # Rank below 2: every best rotation leaves the same residual (Umeyama 1991, eq. 33), so none has to be chosen.
    variance = centred.square().sum(-1).mean()
    scale = singular[0] / variance if bool(variance > 0) else torch.zeros_like(variance)
    squared = target_centred.square().sum(-1).mean() - scale * singular[0]
    return squared.clamp(min=0).sqrt(), scale, torch.ones_like(refused)


def path_length(cam2world: Tensor) -> Tensor:  # [..., T, 4, 4] -> [...], its unit
    """Return the length of the camera's path."""
    return torch.linalg.vector_norm(cam2world[..., 1:, :3, 3] - cam2world[..., :-1, :3, 3], dim=-1).sum(-1)


def total_rotation(cam2world: Tensor) -> Tensor:  # [..., T, 4, 4] -> [...], degrees
    """Sum the angles by which the camera turns from frame to frame."""
    return geodesic_angle(cam2world[..., :-1, :3, :3], cam2world[..., 1:, :3, :3]).rad2deg().sum(-1)


def relative_pose_auc(
    preds: Tensor,  # [T, 4, 4] cam2world, T >= 2
    target: Tensor,  # [T, 4, 4] cam2world
    limit: float,  # degrees
) -> Tensor:  # scalar in [0, 1]
    """Return the area under the recall curve of relative pose errors from 0 to `limit` degrees.

    It is over all pairs of frames i < j. The error of a pair is the larger of two angles: that
    between the relative rotations, and that between the directions of the relative translations
    (without alignment, whatever the scale). The area is mean(max(0, 1 - error / limit)), exact and
    not binned to degrees. Where the true cameras do not move apart, only the rotation counts; where
    they do and the predicted ones do not, the direction is as wrong as it can be (180 degrees).
    """
    preds_far, target_far = NO_BASELINE * path_length(preds), NO_BASELINE * path_length(target)
    score = torch.zeros_like(preds_far)
    for i in range(len(preds) - 1):  # row by row: memory linear in T
        rotation, baseline = split_se3(relative_se3(preds[i], preds[i + 1 :]))
        rotation_target, baseline_target = split_se3(relative_se3(target[i], target[i + 1 :]))
        sine = torch.linalg.vector_norm(torch.linalg.cross(baseline, baseline_target), dim=-1)
        direction = torch.atan2(sine, (baseline * baseline_target).sum(-1))
        direction = torch.where(torch.linalg.vector_norm(baseline, dim=-1) > preds_far, direction, torch.pi)
        direction = torch.where(torch.linalg.vector_norm(baseline_target, dim=-1) > target_far, direction, 0)
        error = torch.maximum(geodesic_angle(rotation, rotation_target), direction).rad2deg()
        score += (1 - error / limit).clamp(min=0).sum()
    return score / (len(preds) * (len(preds) - 1) / 2)


class CameraError(Metric):
    """Unweighted means of `CameraErrors` over all sequences and over those that evo can align.

    The latter are named `..._regular`. A sequence with fewer than two valid cameras enters no mean
    and is counted in `unscored`. nan before any sequence.
    """

    higher_is_better, full_state_update = False, False
    totals: Tensor
    regular_totals: Tensor
    sequences: Tensor
    degenerate: Tensor
    unscored: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("totals", torch.zeros(len(ERROR_NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("regular_totals", torch.zeros(len(ERROR_NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("sequences", "degenerate", "unscored"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, valid: Tensor) -> None:
        """Add one sequence: cam2world [T, 4, 4] twice, [T] bool."""
        if valid.sum() < 2:
            self.unscored += 1
            return
        *values, degenerate = astuple(camera_errors(preds, target, valid))
        self.totals += torch.stack(values)
        self.regular_totals += torch.stack(values) * ~degenerate
        self.sequences += 1
        self.degenerate += degenerate

    def compute(self) -> dict[str, Tensor]:
        """Return both means of every error, and the counts: sequences, degenerate, unscored."""
        means = dict(zip(ERROR_NAMES, self.totals / self.sequences))
        regular = self.regular_totals / (self.sequences - self.degenerate)
        means |= {f"{name}_regular": value for name, value in zip(ERROR_NAMES, regular)}
        return means | {"sequences": self.sequences, "degenerate": self.degenerate, "unscored": self.unscored}
