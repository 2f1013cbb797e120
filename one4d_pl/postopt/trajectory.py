"""One camera per frame for a known focal length, in closed form, and the frames in between that show nothing.

For a fixed focal length the summed squared distance of the points to their pixels' rays is, once the translation is
eliminated, a quadratic form rᵀ Ω r in the nine entries of the rotation (Terzakis & Lourakis 2020, "SQPnP"): all pixels
are read once, then rotations are found from 9x9 matrices. Of points on a plane the form knows two columns of the
rotation only, their homography: every frame is also started from that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from one4d_pl.geometry.se3 import matrix_product, rotate, so3_exp, so3_log
from one4d_pl.postopt.intrinsics import Samples, principal_axes

_ROUNDS = 4  # reweightings of a pose; the joint refinement does the rest
_ROTATION_STEPS = 12
_ROUGH_STEPS, _ROUGH_STARTS = 5, 2  # for a pose of six pixels, which is only a start
_TAIL = 5.0  # median distances; of Gaussian noise nothing lies beyond
_TAIL_SHARE = 0.05  # of points beyond: more are no accident
_DRAWS, _DRAW_SIZE = 48, 6  # with 30 % of outliers all 48 draws of 6 hold one with a chance of 0.3 %
_SAME_DISTANCE = 1.05  # ratio of median distances of two focal lengths that noise explains
_PROBE = 24  # every so many frames one is solved again without a doubt
_CLEARLY = 0.8  # of the median distance before
_JUDGES = 250  # points that judge a drawn pose
_LEAST_JUDGES = 4 * _DRAW_SIZE  # half of fewer points are so few that a wrong pose fits them too
_MIRROR_FACTOR = 4.0  # a fit with its points behind the camera must be this much better to be believed
_ROUNDING = 1e-14  # of the form's trace: differences of costs below it mean nothing


@dataclass(frozen=True)
class Cameras:
    """Cameras of T frames."""

    log_focal: Tensor  # [T], of longer sides
    rotation: Tensor  # [T, 3, 3], world2cam
    centre: Tensor  # [T, 3], world

    def take(self, frames: Tensor) -> Cameras:  # frames: [T] bool, or indices
        """The cameras of some frames."""
        return Cameras(self.log_focal[frames], self.rotation[frames], self.centre[frames])


def rays(samples: Samples, focal: Tensor) -> Tensor:  # focal [...] -> [..., N, 3]
    """Directions (x / f, y / f, 1) of the sampled pixels, camera frame."""
    x, y = samples.x / focal[..., None], samples.y / focal[..., None]
    return torch.stack([x, y, torch.ones_like(x)], dim=-1)


def camera_points(samples: Samples, cameras: Cameras) -> Tensor:  # [T, N, 3]
    """The sampled points in their own cameras' frames."""
    return (samples.points - cameras.centre[:, None]) @ cameras.rotation.mT


def ray_distance(samples: Samples, cameras: Cameras) -> Tensor:  # [T, N], unit of the points
    """Distance of every sampled point from the line through its camera along its pixel's ray: |X - X̂| at best depth."""
    focal = cameras.log_focal.exp()[:, None]
    x, y = samples.x / focal, samples.y / focal
    px, py, pz = camera_points(samples, cameras).unbind(-1)
    # |p x (x, y, 1)| / |(x, y, 1)|: no difference of squares, exact points stay at the level of rounding.
    across = (py - pz * y).square() + (pz * x - px).square() + (px * y - py * x).square()
    return (across / (1 + x * x + y * y)).sqrt()


def solve_poses(
    samples: Samples,  # every frame with at least three points that do not lie on a line
    focal: Tensor,  # [T], longer sides
) -> Cameras:
    """The robust pose of every frame by itself: SQPnP, then reweighted by the inverse distance (least absolute sum).

    Frames whose distances have a long tail are solved again from the best of some poses of six pixels each, which
    stands up to flying points that lean all one way; of both answers the one with the lower median distance is kept.
    """
    cameras = _reweight(samples, focal, None)
    distance = ray_distance(samples, cameras)
    tail = _TAIL * weighted_median(distance, samples.weights)[:, None] + 1e-9 * _size(samples)[:, None]
    doubted = ((distance > tail) * (samples.weights > 0)).double().mean(-1) > _TAIL_SHARE
    probe = doubted | (torch.arange(len(focal), device=focal.device) % _PROBE == 0)
    judged = (samples.weights > 0).sum(-1) >= _LEAST_JUDGES
    cameras, improved = _try_again(samples, cameras, probe & judged)
    if bool((improved & ~doubted).any()):  # a compromise between two groups of points has no tail: doubt all frames
        cameras, _ = _try_again(samples, cameras, ~probe & judged)
    return cameras


def _try_again(samples: Samples, cameras: Cameras, frames: Tensor) -> tuple[Cameras, Tensor]:
    """Solve some frames [T] bool from drawn poses; keep what lowers the median distance clearly, and say where [T]."""
    improved = torch.zeros_like(frames)
    if not bool(frames.any()):
        return cameras, improved
    some, old = samples.take(frames), cameras.take(frames)
    new = _reweight(some, old.log_focal.exp(), _consensus(some, old.log_focal.exp()))
    better = _misfit(some, new) < _CLEARLY * _misfit(some, old)
    improved[frames.nonzero()[better, 0]] = True
    rotation, centre = cameras.rotation.clone(), cameras.centre.clone()
    rotation[improved], centre[improved] = new.rotation[better], new.centre[better]
    return Cameras(cameras.log_focal, rotation, centre), improved


def _reweight(samples: Samples, focal: Tensor, cameras: Cameras | None) -> Cameras:
    """Poses by reweighted SQPnP; from given cameras on, points far beyond the median distance have no weight."""
    directions = torch.nn.functional.normalize(rays(samples, focal), dim=-1)  # [T, N, 3]
    gated, weights = cameras is not None, samples.weights
    for _ in range(_ROUNDS):
        if cameras is not None:
            distance = ray_distance(samples, cameras)
            # Half the median rounds the tip of |r|: sharper weights would not converge in these few rounds.
            middle = weighted_median(distance, samples.weights)[:, None] + 1e-12
            weights = samples.weights / torch.maximum(distance, middle / 2)
            weights = weights * (distance <= _TAIL * middle) if gated else weights
        rotation = None if cameras is None else cameras.rotation[:, None]
        cameras = _solve_weighted(replace(samples, weights=weights), focal, directions, rotation)
    assert cameras is not None
    return cameras


def _solve_weighted(
    samples: Samples, focal: Tensor, directions: Tensor, starts: Tensor | None, rough: bool = False
) -> Cameras:
    """SQPnP (weighted least squares) from given rotations [T, C, 3, 3], or from the form's own."""
    weights = samples.weights / samples.weights.sum(-1, keepdim=True)
    mean = (weights[..., None] * samples.points).sum(1)
    centred = replace(samples, points=samples.points - mean[:, None], weights=weights)
    omega, to_translation = _quadratic_form(centred, directions)
    if starts is None:
        starts = _starts(omega, principal_axes(centred.points, weights)[1][..., :2], _ROUGH_STARTS if rough else 4)
    rotation, cost = _descend(omega, starts, _ROUGH_STEPS if rough else _ROTATION_STEPS)  # [T, C, 3, 3], [T, C]
    translation = _times_rotation(to_translation[:, None], rotation)  # [T, C, 3]
    # A plane fits behind the camera just as well as in front of it: where both costs are rounding, neither is better.
    cost = cost + _ROUNDING * omega.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    # Cheirality: the mean point lies in front, unless only a mirrored scene fits.
    best = (cost * torch.where(translation[..., 2] > 0, 1, _MIRROR_FACTOR)).argmin(-1)
    frames = torch.arange(len(best), device=best.device)
    rotation, translation = rotation[frames, best], translation[frames, best]
    return Cameras(focal.log(), rotation, mean - rotate(rotation.mT, translation))


def _consensus(samples: Samples, focal: Tensor) -> Cameras:
    """Per frame the pose, of some from six random points each, that has the lowest median distance (least median)."""
    num_frames = len(focal)
    generator = torch.Generator().manual_seed(0)  # the same answer every time
    chances = (samples.weights > 0).double().cpu().repeat_interleave(_DRAWS, 0)
    drawn = torch.multinomial(chances, _DRAW_SIZE, generator=generator).to(focal.device)  # [T · draws, 6]
    frame = torch.arange(num_frames, device=focal.device).repeat_interleave(_DRAWS)
    drawn_focal = focal[frame]
    points = samples.points[frame[:, None], drawn]
    directions = torch.stack([samples.x[drawn], samples.y[drawn], drawn_focal[:, None].expand(drawn.shape)], -1)
    few = Samples(points, torch.ones_like(points[..., 0]), samples.x, samples.y)
    cameras = _solve_weighted(few, drawn_focal, torch.nn.functional.normalize(directions, dim=-1), None, rough=True)
    judges = samples.pixels(torch.arange(len(samples.x), device=focal.device) % max(1, len(samples.x) // _JUDGES) == 0)
    parts = [
        _misfit(judges.take(frame[part]), cameras.take(part))
        for part in torch.arange(len(frame), device=focal.device).split(4 * _DRAWS)  # bounds the memory
    ]
    best = torch.cat(parts).view(num_frames, _DRAWS).argmin(-1)
    return cameras.take(torch.arange(num_frames, device=focal.device) * _DRAWS + best)


def _misfit(samples: Samples, cameras: Cameras) -> Tensor:  # [T]
    """Median distance of the points from their rays, and more where their mean lies behind the camera."""
    weights = samples.weights[..., None]
    mean = (weights * samples.points).sum(1) / weights.sum(1)
    front = ((mean - cameras.centre) * cameras.rotation[:, 2]).sum(-1) > 0
    rounding = 1e-9 * _size(samples)
    distance = weighted_median(ray_distance(samples, cameras), samples.weights) + rounding
    return distance * torch.where(front, 1, _MIRROR_FACTOR**0.5)


def _size(samples: Samples) -> Tensor:  # [T]
    """Largest coordinate of a frame's points: what rounding is relative to."""
    return (samples.points.abs().amax(-1) * (samples.weights > 0)).amax(-1)


def best_focal(samples: Samples, candidates: Tensor, frames: int = 9) -> Tensor:  # [F] -> scalar
    """Choose the candidate whose poses bring the points of a few frames nearest to their rays.

    Measured by the median distance. The first candidates are the closed form's votes: they win unless another is nearer
    by more than noise in the median explains, since a plane's distances hardly differ over a wide range of focals.
    """
    chosen = torch.linspace(0, len(samples.points) - 1, min(frames, len(samples.points))).round().long()
    some = samples.take(chosen.to(candidates.device))
    # Candidates are stacked as if they were frames: one batch for all.
    stacked = Samples(
        some.points.repeat(len(candidates), 1, 1), some.weights.repeat(len(candidates), 1), some.x, some.y
    )
    cameras = solve_poses(stacked, candidates.repeat_interleave(len(chosen)))
    distance = weighted_median(ray_distance(stacked, cameras), stacked.weights)
    nearest = distance.view(len(candidates), -1).median(-1).values
    return candidates[int((nearest <= _SAME_DISTANCE * nearest.min() + 1e-12).nonzero()[0])]


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:  # [T, N] x 2 -> [T]
    """The lower median of the values that have weight, however much; 0 where none has."""
    return torch.where(weights > 0, values, torch.nan).nanmedian(-1).values.nan_to_num(0.0)


def solvable_frames(samples: Samples, least: int = 8) -> Tensor:  # [T] bool
    """Frames with at least `least` points that are not all on one line: the others have no pose of their own."""
    weights = samples.weights / samples.weights.sum(-1, keepdim=True).clamp_min(1e-300)
    mean = (weights[..., None] * samples.points).sum(1, keepdim=True)
    centred = (samples.points - mean) * weights[..., None].sqrt()
    spread = torch.linalg.eigvalsh(centred.mT @ centred)  # ascending
    size = (weights[..., None] * samples.points.square()).sum((1, 2))  # equal points leave rounding errors, no spread
    return (
        ((samples.weights > 0).sum(-1) >= least) & (spread[:, 1] > 1e-8 * spread[:, 2]) & (spread[:, 2] > 1e-14 * size)
    )


def fill_missing(
    cameras: Cameras,  # of the solved frames
    solved: Tensor,  # [T] bool
) -> Cameras:  # of all T frames
    """Frames without a pose lie on the way between their solved neighbours (constant speed), or stay at the nearest."""
    index = solved.nonzero()[:, 0]
    frames = torch.arange(len(solved), device=solved.device)
    after = torch.searchsorted(index, frames)  # number of the first solved frame at or after
    before = (torch.searchsorted(index, frames, right=True) - 1).clamp_min(0)
    after = after.clamp_max(len(index) - 1)
    gap = (index[after] - index[before]).clamp_min(1)
    share = ((frames - index[before]) / gap).clamp(0, 1).to(cameras.centre.dtype)[:, None]
    start, end = cameras.take(before), cameras.take(after)
    turn = so3_log(matrix_product(end.rotation, start.rotation.mT))
    return Cameras(
        torch.lerp(start.log_focal, end.log_focal, share[:, 0]),
        matrix_product(so3_exp(share * turn), start.rotation),
        torch.lerp(start.centre, end.centre, share),
    )


def _quadratic_form(samples: Samples, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Ω [T, 9, 9] of the cost rᵀ Ω r, and the matrix [T, 3, 9] that gives the best translation from r (row-major)."""
    points = torch.nn.functional.pad(samples.points, (0, 1), value=1.0)  # [T, N, 4]
    eye = torch.eye(3, dtype=points.dtype, device=points.device)
    off_ray = eye - directions[..., :, None] * directions[..., None, :]  # [T, N, 3, 3]
    outer = (points[..., :, None] * points[..., None, :]).flatten(-2)  # [T, N, 16]
    moments = ((off_ray.flatten(-2) * samples.weights[..., None]).mT @ outer).unflatten(-1, (4, 4)).unflatten(1, (3, 3))
    square = moments[..., :3, :3].transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [T, (a c), (b d)]
    cross = moments[..., :3, 3].flatten(2, 3)  # [T, a, (b d)]
    to_translation = -torch.linalg.solve(moments[..., 3, 3], cross)
    omega = square + cross.mT @ to_translation
    return (omega + omega.mT) / 2, to_translation


def _times_rotation(matrix: Tensor, rotation: Tensor) -> Tensor:  # [..., K, 9], [..., 3, 3] -> [..., K]
    return (matrix @ rotation.flatten(-2)[..., None])[..., 0]


def _starts(omega: Tensor, plane: Tensor, count: int) -> Tensor:  # [T, 9, 9], [T, 3, 2] -> [T, 2 · count + 2, 3, 3]
    """Rotations nearest to the weakest eigenvectors, with either sign, and to the homography of the points' plane.

    Points on a plane say nothing of what a matrix does to the normal: there the form has four null directions, and its
    eigenvectors are any mixture of them. The form of the two axes in the plane, 6x6, has one: the homography.
    """
    vectors = torch.linalg.eigh(omega).eigenvectors[..., :count].mT.unflatten(-1, (3, 3))
    eye = torch.eye(3, dtype=omega.dtype, device=omega.device)
    lift = (eye[:, None, :, None] * plane[:, None, :, None]).flatten(3, 4).flatten(1, 2)  # [T, 9, 6]: M -> M · planeᵀ
    homography = lift @ torch.linalg.eigh(lift.mT @ omega @ lift).eigenvectors[..., :1]
    vectors = torch.cat([vectors, homography.mT.unflatten(-1, (3, 3))], dim=1)
    left, _, right = torch.linalg.svd(torch.cat([vectors, -vectors], dim=1))
    sign = torch.linalg.det(left) * torch.linalg.det(right)
    left = torch.cat([left[..., :2], left[..., 2:] * sign[..., None, None]], dim=-1)
    return matrix_product(left, right)


def _descend(omega: Tensor, rotation: Tensor, steps: int) -> tuple[Tensor, Tensor]:  # [T, C, 3, 3]; cost [T, C]
    """Levenberg-Marquardt on rotations, every start by itself."""
    omega = omega[:, None]
    scale = omega.diagonal(dim1=-2, dim2=-1).sum(-1)  # [T, 1]
    eye = torch.eye(3, dtype=omega.dtype, device=omega.device)
    damping = torch.full(rotation.shape[:2], 1e-3, dtype=omega.dtype, device=omega.device)

    def cost_of(candidate: Tensor) -> Tensor:
        flat = candidate.flatten(-2)
        return (flat * (omega @ flat[..., None])[..., 0]).sum(-1)

    cost = cost_of(rotation)
    for _ in range(steps):
        # d(exp(w) R) = [w]x R, column by column w x R_j
        tangent = torch.linalg.cross(
            eye[:, :, None].expand(*rotation.shape[:2], 3, 3, 3), rotation[:, :, None].expand(-1, -1, 3, 3, 3), dim=-2
        ).flatten(-2)  # [T, C, 3, 9]
        through = tangent @ omega
        hessian = through @ tangent.mT + (damping * scale + 1e-30)[..., None, None] * eye  # equal points: all zero
        step = -torch.linalg.solve(hessian, _times_rotation(through, rotation))
        candidate = matrix_product(so3_exp(step), rotation)
        new_cost = cost_of(candidate)
        better = new_cost < cost
        rotation = torch.where(better[..., None, None], candidate, rotation)
        cost = torch.where(better, new_cost, cost)
        damping = torch.where(better, damping * 0.1, damping * 10).clamp(1e-12, 1e3)
    return rotation, cost
