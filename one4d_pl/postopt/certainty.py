"""How well the points determine focal length and motion, from the normal equations at the minimum.

Deviations assume that pixels err independently. In truth the errors of neighbouring pixels are alike, so noise alone is
no reason to call a camera static: its motion must also be below a fixed share of the distance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from one4d_pl.geometry.se3 import geodesic_angle, matrix_product, rotate, so3_log
from one4d_pl.postopt.intrinsics import Samples
from one4d_pl.postopt.normal_equations import MEAN_INVERSE, NormalEquations, Objective
from one4d_pl.postopt.trajectory import Cameras, weighted_median

MIN_CONDITION = 1e-6  # least observable share: depths that differ by 0.3 % of the distance
_STILL_CENTRE, _STILL_TURN = 1e-3, 1.75e-3  # of the distance, radians: static, whatever the noise
_NOISE_CENTRE, _NOISE_TURN = 2e-2, 1.75e-2  # likewise: more is motion, whatever the noise
_MAX_CHI_SQUARED = 2.0, 10.0  # that noise explains: per degree of freedom, plus a constant


def focal_certainty(
    normal: NormalEquations, samples: Samples, cameras: Cameras, noise: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Return how well the focal length is determined: its condition and the deviation of its log.

    The condition (0 .. 1) is the share of the focal's effect that no change of pose or lens can imitate, less the share
    that noise in depth imitates. It is 0 on a fronto-parallel plane, or in a field of view so narrow that depths hardly
    differ. Both are [], or [T] for one focal per frame.
    """
    unexplained = _focal_information(_eliminate_poses(normal), objective)
    information = _focal_information(
        _eliminate_poses(normal) / _information_scale(samples, noise, objective), objective
    )
    focal = normal.matrix[:, 6, 6]
    # a depth that is off by e changes an effect proportional to it by e / depth
    distance = torch.linalg.vector_norm(samples.points - cameras.centre[:, None], dim=-1)
    from_noise = focal * (noise / weighted_median(distance, samples.weights).clamp_min(1e-300)).square()
    if objective.focal_mode == "shared":
        from_noise, focal = from_noise.sum(), focal.sum()
    share = torch.where(unexplained > 1.25 * from_noise, unexplained - from_noise, 0) / focal.clamp_min(1e-300)
    return share, information.clamp_min(1e-300).rsqrt()


def pose_information(
    normal: NormalEquations, samples: Samples, noise: Tensor, objective: Objective
) -> Tensor:  # [T, 6, 6]
    """Return the inverse covariance of each frame's rotation and centre.

    A focal length per frame is free as well. A shared one and the lens err alike in all frames and are taken as known.
    """
    pose = normal.matrix[:, :6, :6]
    if objective.focal_mode == "per_frame":
        cross = normal.matrix[:, :6, 6:7]
        pose = pose - cross @ cross.mT / normal.matrix[:, 6:7, 6:7].clamp_min(1e-300)
    return pose / _information_scale(samples, noise, objective)


def motion_flags(
    cameras: Cameras,
    information: Tensor,  # [T, 6, 6], of rotation and centre
    distance: float,
) -> tuple[str, ...]:
    """Say whether the camera is static or only turns, as far as noise lets one tell.

    Centres within 1/1000 of the distance and turns within 0.1 degree are static. So are centres within 1/50 and turns
    within 1 degree where noise explains them: squared deviations from one pose are then at most twice what noise gives,
    over all frames and between the means of the clip's two halves, where slow motion adds up.
    """
    if len(cameras.centre) == 1:
        return ()
    shift = cameras.centre - cameras.centre.mean(0)
    spread = float(torch.linalg.vector_norm(shift, dim=-1).amax()) / distance
    turn = float(geodesic_angle(cameras.rotation[:1], cameras.rotation).amax())
    vector = so3_log(matrix_product(cameras.rotation, cameras.rotation[:1].mT))
    if spread > _STILL_CENTRE and not (
        spread < _NOISE_CENTRE and _noise_explains(shift, _centre_information(information))
    ):
        return ()
    if spread < _STILL_CENTRE and turn < _STILL_TURN:
        return ("static camera",)
    if not _noise_explains(torch.cat([vector, shift], dim=-1), information):
        return ("pure rotation",)
    return ("static camera",) if turn < _NOISE_TURN else ()


def _noise_explains(values: Tensor, information: Tensor) -> bool:  # [T, D], [T, D, D]
    """Tell whether noise alone could make one constant look like these values.

    Both the values and the means of the clip's two halves are tested (chi-squared).
    """
    factor, slack = _MAX_CHI_SQUARED
    count, size = values.shape
    half = (count + 1) // 2
    parts = [_mean(values[part], information[part]) for part in (slice(half), slice(half, None))]
    means, sums = (torch.stack(part) for part in zip(*parts, strict=True))
    return all(
        _chi_squared(sample, weight) <= factor * size * (len(sample) - 1) + slack
        for sample, weight in ((values, information), (means, sums))
    )


def _chi_squared(values: Tensor, information: Tensor) -> float:
    """Sum the squared deviations from the mean, each divided by its variance."""
    deviation = values - _mean(values, information)[0]
    return float((deviation * rotate(information, deviation)).sum())


def _mean(values: Tensor, information: Tensor) -> tuple[Tensor, Tensor]:  # [T, D], [T, D, D] -> [D], [D, D]
    """Return the mean weighted by information, and the information about it."""
    total = information.sum(0)
    return _inverse(total) @ rotate(information, values).sum(0), total


def _centre_information(information: Tensor) -> Tensor:  # [T, 6, 6] -> [T, 3, 3]
    """Return the information about the centre where the rotation is unknown (Schur complement)."""
    turn, cross, centre = information[:, :3, :3], information[:, :3, 3:], information[:, 3:, 3:]
    return centre - cross.mT @ _inverse(turn) @ cross


def _eliminate_poses(normal: NormalEquations) -> Tensor:  # [T, U - 6, U - 6]
    """Return what poses cannot explain of the intrinsics' normal matrix (Schur complement)."""
    cross = normal.matrix[:, :6, 6:]
    return normal.matrix[:, 6:, 6:] - cross.mT @ _inverse(normal.matrix[:, :6, :6]) @ cross


def _information_scale(samples: Samples, noise: Tensor, objective: Objective) -> Tensor:  # [T, 1, 1]
    """Return the number that divides a normal matrix to make it information.

    The objective weights by 1 / noise, the likelihood by 1 / noise².
    """
    return (1 / samples.weights.sum() * MEAN_INVERSE * noise)[:, None, None]


def _focal_information(reduced: Tensor, objective: Objective) -> Tensor:  # [] or [T]
    """Return the information about the focal length(s) where the lens is free as well."""
    if objective.focal_mode == "shared":
        reduced = reduced.sum(0, keepdim=True)
    focal = reduced[:, 0, 0].clamp_min(0)
    if columns := [column - 6 for column in objective.lens_columns]:
        coupling = reduced[:, columns, 0] / focal.clamp_min(1e-300)[:, None]  # [T, L]
        variance = (coupling @ _inverse(_lens_information(reduced, objective)) * coupling).sum(-1)
        focal = focal / (1 + focal * variance)
    return focal[0] if objective.focal_mode == "shared" else focal


def _lens_information(reduced: Tensor, objective: Objective) -> Tensor:  # [L, L]
    """Return the information about the lens where the focal length(s) are free as well."""
    columns = [column - 6 for column in objective.lens_columns]
    lens = reduced[:, columns][:, :, columns]
    if objective.focal_mode == "fixed":
        return lens.sum(0)
    if objective.focal_mode == "shared":
        reduced, lens = reduced.sum(0, keepdim=True), lens.sum(0, keepdim=True)
    cross = reduced[:, columns, :1]
    return (lens - cross @ cross.mT / reduced[:, :1, :1].clamp_min(1e-300)).sum(0)


def _inverse(matrix: Tensor) -> Tensor:  # [..., D, D], positive semidefinite
    """Invert after scaling to a unit diagonal; a singular matrix gets a large inverse."""
    scale = matrix.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).rsqrt()
    scale = scale[..., None] * scale[..., None, :]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return scale * torch.linalg.inv(scale * matrix + 1e-13 * eye)
