"""One camera per frame for a known focal length, in closed form; the others are interpolated.

For a fixed focal length the summed squared distance of the points to their pixels' rays is, once the translation is
eliminated, a quadratic form rᵀ Ω r in the nine entries of the rotation (Terzakis & Lourakis 2020, "SQPnP"): all pixels
are read once, then rotations are found from 9x9 matrices. Points on a plane determine only two columns of the rotation,
their homography, so every frame is also started from that.
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
_TAIL = 5.0  # median distances; Gaussian noise has nothing beyond
_TAIL_SHARE = 0.05  # of the points beyond: more is too much for chance
_DRAWS, _DRAW_SIZE = 48, 6  # at 30 % outliers the chance that all 48 draws of 6 hold one is 0.3 %
_SAME_DISTANCE = 1.05  # ratio of two focal lengths' median distances that noise explains
_EXACT = 1e-12  # of the scene's unit: smaller distances of exact points are rounding
_PROBE_EVERY = 24  # frames: one is solved again even if nothing is suspect
_CLEARLY_NEARER = 0.8  # of the median distance before
_SCORED_POINTS = 250  # on which a drawn pose is scored
_MIN_SCORED_POINTS = 4 * _DRAW_SIZE  # half of fewer points are so few that a wrong pose fits them too
_MIRROR_FACTOR = 4.0  # a fit with its points behind the camera must be this much better to be taken
_ROUNDING = 1e-14  # of the form's trace: smaller differences of costs are rounding


@dataclass(frozen=True)
class Cameras:
    """Cameras of T frames."""

    log_focal: Tensor  # [T], of longer sides
    rotation: Tensor  # [T, 3, 3], world2cam
    centre: Tensor  # [T, 3], world

    def take(self, frames: Tensor) -> Cameras:  # frames: [T] bool, or indices
        """Return the cameras of some frames."""
        return Cameras(self.log_focal[frames], self.rotation[frames], self.centre[frames])


def rays(samples: Samples, focal: Tensor) -> Tensor:  # focal [...] -> [..., N, 3]
    """Return the directions (x / f, y / f, 1) of the sampled pixels, camera frame."""
    x, y = samples.x / focal[..., None], samples.y / focal[..., None]
    return torch.stack([x, y, torch.ones_like(x)], dim=-1)


def camera_points(samples: Samples, cameras: Cameras) -> Tensor:  # [T, N, 3]
    """Move the sampled points into their own cameras' frames."""
    return (samples.points - cameras.centre[:, None]) @ cameras.rotation.mT


def ray_distance(samples: Samples, cameras: Cameras) -> Tensor:  # [T, N], unit of the points
    """Return each point's distance from the line along its pixel's ray: |X - X̂| at best depth."""
    focal = cameras.log_focal.exp()[:, None]
    x, y = samples.x / focal, samples.y / focal
    px, py, pz = camera_points(samples, cameras).unbind(-1)
    # |p x (x, y, 1)| / |(x, y, 1)| subtracts no squares: exact points are off by rounding alone.
    across = (py - pz * y).square() + (pz * x - px).square() + (px * y - py * x).square()
    return (across / (1 + x * x + y * y)).sqrt()


def solve_poses(
    samples: Samples,  # every frame with at least three points that do not lie on a line
    focal: Tensor,  # [T], longer sides
) -> Cameras:
    """Solve for the robust pose of every frame by itself: SQPnP, then reweighted by 1 / distance.

    The weights make it the least sum of absolute distances. Frames whose distances have a long tail
    are solved again from the best of some poses of six pixels each, which flying points that all
    lie on one side do not spoil. Of both answers the one with the lower median distance is kept.
    """
    cameras = _reweight(samples, focal, None)
    distance = ray_distance(samples, cameras)
    tail = _TAIL * weighted_median(distance, samples.weights)[:, None] + 1e-9 * _size(samples)[:, None]
    suspect = ((distance > tail) * (samples.weights > 0)).double().mean(-1) > _TAIL_SHARE
    probe = suspect | (torch.arange(len(focal), device=focal.device) % _PROBE_EVERY == 0)
    scorable = (samples.weights > 0).sum(-1) >= _MIN_SCORED_POINTS
    cameras, improved = _solve_again(samples, cameras, probe & scorable)
    if bool((improved & ~suspect).any()):  # a compromise between two groups of points has no tail: try all frames
        cameras, _ = _solve_again(samples, cameras, ~probe & scorable)
    return cameras


def _solve_again(samples: Samples, cameras: Cameras, frames: Tensor) -> tuple[Cameras, Tensor]:
    """Solve some frames [T] bool from drawn poses; keep clearly nearer ones, and say which [T]."""
    improved = torch.zeros_like(frames)
    if not bool(frames.any()):
        return cameras, improved
    some, old = samples.take(frames), cameras.take(frames)
    new = _reweight(some, old.log_focal.exp(), _consensus(some, old.log_focal.exp()))
    better = _misfit(some, new) < _CLEARLY_NEARER * _misfit(some, old)
    improved[frames.nonzero()[better, 0]] = True
    rotation, centre = cameras.rotation.clone(), cameras.centre.clone()
    rotation[improved], centre[improved] = new.rotation[better], new.centre[better]
    return Cameras(cameras.log_focal, rotation, centre), improved


def _reweight(samples: Samples, focal: Tensor, cameras: Cameras | None) -> Cameras:
    """Solve for poses by reweighted SQPnP, from given cameras or from none.

    From given cameras, points far beyond the median distance have no weight.
    """
    directions = torch.nn.functional.normalize(rays(samples, focal), dim=-1)  # [T, N, 3]
    gated, weights = cameras is not None, samples.weights
    for _ in range(_ROUNDS):
        if cameras is not None:
            distance = ray_distance(samples, cameras)
            # Below half the median the loss is quadratic: sharper weights need more rounds.
            median = weighted_median(distance, samples.weights)[:, None] + 1e-12
            weights = samples.weights / torch.maximum(distance, median / 2)
            weights = weights * (distance <= _TAIL * median) if gated else weights
        rotation = None if cameras is None else cameras.rotation[:, None]
        cameras = _solve_weighted(replace(samples, weights=weights), focal, directions, rotation)
    assert cameras is not None
    return cameras


def _solve_weighted(
    samples: Samples, focal: Tensor, directions: Tensor, starts: Tensor | None, rough: bool = False
) -> Cameras:
    """Solve SQPnP (weighted least squares) from the given rotations [T, C, 3, 3] or its own."""
    weights = samples.weights / samples.weights.sum(-1, keepdim=True)
    mean = (weights[..., None] * samples.points).sum(1)
    centred = replace(samples, points=samples.points - mean[:, None], weights=weights)
    omega, to_translation = _quadratic_form(centred, directions)
    if starts is None:
        starts = _starts(omega, principal_axes(centred.points, weights)[1][..., :2], _ROUGH_STARTS if rough else 4)
    rotation, cost = _descend(omega, starts, _ROUGH_STEPS if rough else _ROTATION_STEPS)  # [T, C, 3, 3], [T, C]
    translation = _times_rotation(to_translation[:, None], rotation)  # [T, C, 3]
    # A plane fits as well behind the camera as in front of it: let costs within rounding be equal.
    cost = cost + _ROUNDING * omega.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    # Cheirality: the mean point lies in front, unless only a mirrored scene fits.
    best = (cost * torch.where(translation[..., 2] > 0, 1, _MIRROR_FACTOR)).argmin(-1)
    frames = torch.arange(len(best), device=best.device)
    rotation, translation = rotation[frames, best], translation[frames, best]
    return Cameras(focal.log(), rotation, mean - rotate(rotation.mT, translation))


def _consensus(samples: Samples, focal: Tensor) -> Cameras:
    """Return each frame's pose of least median distance, among those of six random points."""
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
    scored = samples.pixels(
        torch.arange(len(samples.x), device=focal.device) % max(1, len(samples.x) // _SCORED_POINTS) == 0
    )
    parts = [
        _misfit(scored.take(frame[part]), cameras.take(part))
        for part in torch.arange(len(frame), device=focal.device).split(4 * _DRAWS)  # bounds the memory
    ]
    best = torch.cat(parts).view(num_frames, _DRAWS).argmin(-1)
    return cameras.take(torch.arange(num_frames, device=focal.device) * _DRAWS + best)


def _misfit(samples: Samples, cameras: Cameras) -> Tensor:  # [T]
    """Return the points' median distance from their rays, doubled where their mean lies behind."""
    weights = samples.weights[..., None]
    mean = (weights * samples.points).sum(1) / weights.sum(1)
    front = ((mean - cameras.centre) * cameras.rotation[:, 2]).sum(-1) > 0
    rounding = 1e-9 * _size(samples)
    distance = weighted_median(ray_distance(samples, cameras), samples.weights) + rounding
    return distance * torch.where(front, 1, _MIRROR_FACTOR**0.5)


def _size(samples: Samples) -> Tensor:  # [T]
    """Return the largest coordinate of a frame's points, to which rounding is relative."""
    return (samples.points.abs().amax(-1) * (samples.weights > 0)).amax(-1)


def best_focal(samples: Samples, candidates: Tensor, frames: int = 9) -> Tensor:  # [F] -> scalar
    """Return the focal length whose poses bring the points of some frames nearest to their rays.

    Measured by the median distance. The first candidates are the closed form's votes. They win unless another is nearer
    by more than noise explains: on a plane, distances hardly differ over a wide range of focal lengths.
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
    ties = nearest <= _SAME_DISTANCE * nearest.min() + _EXACT
    return candidates[int(ties.nonzero()[0])]


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:  # [T, N] x 2 -> [T]
    """Return the lower median of the values that have weight, counted once each; 0 for none."""
    return torch.where(weights > 0, values, torch.nan).nanmedian(-1).values.nan_to_num(0.0)


def solvable_frames(samples: Samples, least: int = 8) -> Tensor:  # [T] bool
    """Tell which frames have a pose of their own: at least `least` points, not all on one line."""
    weights = samples.weights / samples.weights.sum(-1, keepdim=True).clamp_min(1e-300)
    mean = (weights[..., None] * samples.points).sum(1, keepdim=True)
    centred = (samples.points - mean) * weights[..., None].sqrt()
    spread = torch.linalg.eigvalsh(centred.mT @ centred)  # ascending
    size = (weights[..., None] * samples.points.square()).sum((1, 2))  # equal points have a spread of rounding errors
    return (
        ((samples.weights > 0).sum(-1) >= least) & (spread[:, 1] > 1e-8 * spread[:, 2]) & (spread[:, 2] > 1e-14 * size)
    )


def fill_missing(
    cameras: Cameras,  # of the solved frames
    solved: Tensor,  # [T] bool
) -> Cameras:  # of all T frames
    """Interpolate frames without a pose between their solved neighbours, or copy the only one."""
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
    """Build Ω [T, 9, 9] of the cost rᵀ Ω r, and the matrix [T, 3, 9] from r to the translation.

    The rotation's entries r are row-major; the translation is the best one for them.
    """
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
    """Return the rotations nearest to the weakest eigenvectors and to the plane's homography.

    Each is taken with either sign. Points on a plane do not determine what a matrix does to the
    normal: the form then has four null directions, and its eigenvectors are any mixture of them.
    The 6x6 form of the two axes in the plane has a single one: the homography.
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
    """Minimise the form over rotations by Levenberg-Marquardt, every start by itself."""
    omega = omega[:, None]
    scale = omega.diagonal(dim1=-2, dim2=-1).sum(-1)  # [T, 1]
    eye = torch.eye(3, dtype=omega.dtype, device=omega.device)
    damping = torch.full(rotation.shape[:2], 1e-3, dtype=omega.dtype, device=omega.device)

    def cost_of(candidate: Tensor) -> Tensor:
        return (candidate.flatten(-2) * _times_rotation(omega, candidate)).sum(-1)

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
