"""How well the points determine the focal length and the motion, from the normal equations at the minimum.

Deviations assume that pixels err independently. Errors of neighbouring pixels are alike in truth, so noise alone is no
reason to say that a camera rests: its motion has to be below a fixed share of the distance as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from one4d_pl.geometry.se3 import geodesic_angle, matrix_product, rotate, so3_log
from one4d_pl.postopt.intrinsics import Samples
from one4d_pl.postopt.normal_equations import MEAN_INVERSE, Normal, Objective
from one4d_pl.postopt.trajectory import Cameras, weighted_median

MIN_CONDITION = 1e-6  # least share of an effect that is to be seen: depths that differ by 0.3 % of the distance
_STILL_CENTRE, _STILL_TURN = 1e-3, 1.75e-3  # of the distance, radians (0.1 degree): rest, whatever the noise
_HIDDEN_CENTRE, _HIDDEN_TURN = 2e-2, 1.75e-2  # noise that hides more than this hides the motion, too
_EXPLAINED = 2.0, 10.0  # squared deviations that noise explains: per degree of freedom, and in all beside these


def focal_certainty(
    normal: Normal, samples: Samples, cameras: Cameras, noise: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Share of the focal's effect that no change of pose or lens explains, less what noise in depth feigns; deviation.

    On a fronto-parallel plane, or in a field of view so narrow that depths hardly differ, the share is 0.
    """
    left = _focal_information(_beside_poses(normal), objective)
    information = _focal_information(_beside_poses(normal) / _unit(samples, noise, objective), objective)
    focal = normal.matrix[:, 6, 6]
    feigned = focal * _feigned(samples, cameras, noise)
    if objective.focal_mode == "shared":
        feigned, focal = feigned.sum(), focal.sum()
    share = torch.where(left > 1.25 * feigned, left - feigned, 0) / focal.clamp_min(1e-300)
    return share, information.clamp_min(1e-300).rsqrt()


def _feigned(samples: Samples, cameras: Cameras, noise: Tensor) -> Tensor:  # [T]
    """Share of an effect proportional to depth that is noise: a depth that is off by e changes it by e / depth."""
    distance = torch.linalg.vector_norm(samples.points - cameras.centre[:, None], dim=-1)
    return (noise / weighted_median(distance, samples.weights).clamp_min(1e-300)).square()


def pose_information(normal: Normal, samples: Samples, noise: Tensor, objective: Objective) -> Tensor:  # [T, 6, 6]
    """Inverse covariance of each frame's rotation and centre; of a shared focal length and lens the error is common."""
    pose = normal.matrix[:, :6, :6]
    if objective.focal_mode == "per_frame":
        cross = normal.matrix[:, :6, 6:7]
        pose = pose - cross @ cross.mT / normal.matrix[:, 6:7, 6:7].clamp_min(1e-300)
    return pose / _unit(samples, noise, objective)


def motion_flags(
    cameras: Cameras,
    information: Tensor,  # [T, 6, 6], of rotation and centre
    distance: float,
) -> tuple[str, ...]:
    """Whether the camera rests or only turns, as far as noise lets this be told.

    Centres within 1/1000 of the distance and turns within 0.1 degree are rest. Up to 1/50 and 1 degree are as well
    where noise explains them: squared deviations from one pose are at most twice what noise gives, in all frames and
    between the means of the clip's two halves, in which slow motion adds up.
    """
    num_frames = len(cameras.centre)
    if num_frames == 1:
        return ()
    shift = cameras.centre - cameras.centre.mean(0)
    spread = float(torch.linalg.vector_norm(shift, dim=-1).amax()) / distance
    turn = float(geodesic_angle(cameras.rotation[:1], cameras.rotation).amax())
    vector = so3_log(matrix_product(cameras.rotation, cameras.rotation[:1].mT))
    if spread > _STILL_CENTRE and not (spread < _HIDDEN_CENTRE and _explained(shift, _of_centre(information))):
        return ()
    if spread < _STILL_CENTRE and turn < _STILL_TURN:
        return ("static camera",)
    if not _explained(torch.cat([vector, shift], dim=-1), information):
        return ("pure rotation",)
    return ("static camera",) if turn < _HIDDEN_TURN else ()


def _explained(values: Tensor, information: Tensor) -> bool:  # [T, D], [T, D, D]
    """Whether noise alone could scatter values that are one and the same, and its halves' means."""
    factor, spare = _EXPLAINED
    count, size = values.shape
    half = (count + 1) // 2
    parts = [_mean(values[part], information[part]) for part in (slice(half), slice(half, None))]
    means, sums = (torch.stack(part) for part in zip(*parts, strict=True))
    return all(
        _scatter(some, weight) <= factor * size * (len(some) - 1) + spare
        for some, weight in ((values, information), (means, sums))
    )


def _scatter(values: Tensor, information: Tensor) -> float:
    """Sum of squared deviations from the mean, in units of their own."""
    off = values - _mean(values, information)[0]
    return float((off * rotate(information, off)).sum())


def _mean(values: Tensor, information: Tensor) -> tuple[Tensor, Tensor]:  # [T, D], [T, D, D] -> [D], [D, D]
    total = information.sum(0)
    return _inverse(total) @ rotate(information, values).sum(0), total


def _of_centre(information: Tensor) -> Tensor:  # [T, 6, 6] -> [T, 3, 3]
    """What is known of the centre where the rotation is not."""
    turn, cross, centre = information[:, :3, :3], information[:, :3, 3:], information[:, 3:, 3:]
    return centre - cross.mT @ _inverse(turn) @ cross


def _beside_poses(normal: Normal) -> Tensor:  # [T, U - 6, U - 6]
    """Of the intrinsics' normal matrix what no change of pose explains."""
    cross = normal.matrix[:, :6, 6:]
    return normal.matrix[:, 6:, 6:] - cross.mT @ _inverse(normal.matrix[:, :6, :6]) @ cross


def _unit(samples: Samples, noise: Tensor, objective: Objective) -> Tensor:  # [T, 1, 1]
    """What turns a normal matrix into information: the objective weights by 1 / noise, likelihood by its square."""
    return (objective.alpha1 / samples.weights.sum() * MEAN_INVERSE * noise)[:, None, None]


def _focal_information(reduced: Tensor, objective: Objective) -> Tensor:  # [] or [T]
    """Of the focal length(s), where the lens is free as well."""
    if objective.focal_mode == "shared":
        reduced = reduced.sum(0, keepdim=True)
    focal = reduced[:, 0, 0].clamp_min(0)
    if columns := [column - 6 for column in objective.lens_columns]:
        pull = reduced[:, columns, 0] / focal.clamp_min(1e-300)[:, None]  # [T, L]
        variance = (pull @ _inverse(_lens_information(reduced, objective)) * pull).sum(-1)
        focal = focal / (1 + focal * variance)
    return focal[0] if objective.focal_mode == "shared" else focal


def _lens_information(reduced: Tensor, objective: Objective) -> Tensor:  # [L, L]
    """Of the lens, where the focal length(s) are free as well."""
    columns = [column - 6 for column in objective.lens_columns]
    lens = reduced[:, columns][:, :, columns]
    if objective.focal_mode == "fixed":
        return lens.sum(0)
    if objective.focal_mode == "shared":
        reduced, lens = reduced.sum(0, keepdim=True), lens.sum(0, keepdim=True)
    cross = reduced[:, columns, :1]
    return (lens - cross @ cross.mT / reduced[:, :1, :1].clamp_min(1e-300)).sum(0)


def _inverse(matrix: Tensor) -> Tensor:  # [..., D, D], positive semidefinite
    """The inverse, by way of a unit diagonal: a singular matrix gets a large one, not an error."""
    unit = matrix.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).rsqrt()
    unit = unit[..., None] * unit[..., None, :]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return unit * torch.linalg.inv(unit * matrix + 1e-13 * eye)
