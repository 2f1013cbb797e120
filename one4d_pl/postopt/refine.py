"""Joint refinement of all poses and the focal length on the paper's objective (One4D, Eq. 12), depth eliminated.

    alpha1 · mean |X - X̂| + alpha2 · mean (‖R_iᵀ R_{i+1} - I‖_F + ‖o_{i+1} - o_i‖)

With the best depth of each pixel put in, |X - X̂| is the distance from the point to its pixel's ray: 6 T + 1 unknowns
are left. The distance enters through Tukey's biweight, whose weights equal those of |r| on average over inliers and
are nil beyond six times the noise (from the frame's own median distance): flying points are left out. In a frame that
has no point out there the gate stands so wide that these are least squares, the most accurate where noise is Gaussian.

Reweighted squares (IRLS) descend surely but overrate the curvature, by far where many points lie near the gate, and
then creep; Newton's matrix is right near the minimum and wild elsewhere. The steps pass from the one to the other as
they succeed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from one4d_pl.geometry.se3 import geodesic_angle, matrix_product, rotate, so3_exp, so3_log
from one4d_pl.postopt.intrinsics import FOCAL_BOUNDS, Samples
from one4d_pl.postopt.trajectory import Cameras, camera_points, ray_distance, weighted_median

FocalMode = Literal["shared", "per_frame", "fixed"]

NOISE_FLOOR = 1e-7  # of the scene's unit: the rounding of float32 pointmaps
EXACT = 1e-8  # of the scene's unit: a lower cost is rounding, no step can gain
_ROUNDS, _STEPS = 4, 25  # most estimates of the noise; most Gauss-Newton steps for each
_DAMPING = 1e-9  # of a unit diagonal: far below what the data say, but a singular matrix is no accident
_RAYLEIGH_MEDIAN = 1.1774  # median length of a 2-D Gaussian vector of unit deviation per axis
_MEAN_INVERSE = 1.2533  # mean of 1 / length of the same: the average weight that |r| gives to noise
_GATE = 6.0  # noise deviations; a point farther from its ray is no measurement of it
_WIDE_GATE = 60.0  # where (nearly) no point is: Gaussian noise has one in 10^8 beyond the narrow gate
_BEYOND = 1e-4  # share of a frame's points beyond the narrow gate that narrows it
_STILL = 1e-3  # of the scene's unit (and radians): shorter camera steps are smoothed quadratically
_REACH = 64.0  # steps are at most so many times longer than those of reweighted squares
_TILES = 8  # along each side of the picture
_CREDIBLE = 0.2  # of the errors of a fit without smoothing: a smaller gain on left-out pixels is chance
_ALPHA2_PARTS = (1.0, 0.3, 0.1, 0.03, 0.0)
_CHUNK = 60_000  # points linearised at once: bounds the memory, fits the cache


@dataclass(frozen=True)
class Objective:
    """What is minimised over which unknowns."""

    alpha1: float  # of the data term
    alpha2: float  # of the smoothness of the trajectory
    focal_mode: FocalMode


@dataclass(frozen=True)
class Refined:
    """Cameras at the minimum and how well the points determine the focal length."""

    cameras: Cameras
    noise: Tensor  # [T], deviation of the points from their rays, per axis
    iterations: int
    converged: bool
    alpha2: float  # the objective's
    focal_condition: Tensor  # [] or [T]: share of the focal's effect that no pose explains, less what noise feigns
    focal_deviation: Tensor  # [] or [T]: standard deviation of log focal if pixels were independent


@dataclass(frozen=True)
class Noise:
    """How far a frame's points lie from their rays."""

    level: Tensor  # [T], robust deviation per axis
    gate: Tensor  # [T], distance beyond which a point has no weight

    def take(self, frames: Tensor) -> Noise:
        return Noise(self.level[frames], self.gate[frames])


@dataclass(frozen=True)
class _Normal:
    """Normal equations of the data term at some cameras; unknowns of a frame: rotation, centre, log focal."""

    cost: Tensor  # [], alpha1 · mean loss
    matrix: Tensor  # [T, 7, 7], of the reweighted squares
    gradient: Tensor  # [T, 7]
    bend: Tensor  # [T, 7, 7], by how much the loss's Hessian is below matrix


@dataclass(frozen=True)
class Linearised:
    """The data term at some cameras, for `refine` to start from."""

    noise: Noise
    normal: _Normal


@dataclass(frozen=True)
class _Smooth:
    """Normal equations of the smoothness term; unknowns of a frame: rotation, centre."""

    cost: Tensor  # [], alpha2 · mean
    matrix: Tensor  # [T, 2, 6, 6]: a frame with itself, and with the next
    gradient: Tensor  # [T, 6]


def measure_noise(samples: Samples, cameras: Cameras) -> Noise:
    """Deviation of each frame's points from their rays, and the gate that their tail asks for."""
    distance = ray_distance(samples, cameras)
    level = weighted_median(distance, samples.weights) / _RAYLEIGH_MEDIAN + NOISE_FLOOR
    beyond = ((distance > _GATE * level[:, None]) & (samples.weights > 0)).sum(-1)
    narrow = beyond > _BEYOND * (samples.weights > 0).sum(-1)
    return Noise(level, level * torch.where(narrow, _GATE, _WIDE_GATE))


def refine(
    cameras: Cameras,  # close: the poses of the closed form
    samples: Samples,  # in units of the scene, every frame with weight
    objective: Objective,
    tolerance: float,  # gain of a step, relative to the objective, that is not worth another
    start: Linearised | None = None,  # at these cameras, where known: spares a pass over all points
) -> Refined:
    """Minimise the objective over poses and focal length, anew as long as that lowers the measured noise."""
    iterations, noise = 0, measure_noise(samples, cameras) if start is None else start.noise
    normal = None if start is None else start.normal
    for _ in range(_ROUNDS):
        normal = _linearise(cameras, samples, noise, objective) if normal is None else normal
        cameras, normal, used, converged = _minimise(cameras, samples, noise, normal, objective, tolerance)
        iterations, known = iterations + used, normal
        normal = None
        before, noise = noise, measure_noise(samples, cameras)
        if bool((noise.level > 0.8 * before.level).all()) or bool((noise.level < 3 * NOISE_FLOOR).all()):
            break
    condition, deviation = _focal_condition(known, samples, cameras, before.level, objective)
    return Refined(cameras, noise.level, iterations, converged, objective.alpha2, condition, deviation)


def credible_alpha2(cameras: Cameras, samples: Samples, objective: Objective) -> tuple[float, Linearised | None]:
    """The largest part of alpha2, down to none, that pixels left out of the fit confirm; the data term, if computed.

    The smoothness of Eq. 12 has a fixed weight, so many pixels or much tremble make it a bias rather than a help. The
    picture is cut into tiles (errors of neighbouring pixels are alike) of four sorts. Three sorts are fitted by one
    step from the same cameras with parts of alpha2, and the data term of the fourth is the judge, each sort once.
    """
    if objective.alpha2 == 0 or len(cameras.centre) == 1:
        return objective.alpha2, None
    noise = measure_noise(samples, cameras)
    if bool((noise.level < 3 * NOISE_FLOOR).all()):
        return 0.0, None  # exact points need no help
    tile = [((p - p.amin()) / (p.amax() - p.amin()).clamp_min(1e-12) * _TILES).long() for p in (samples.x, samples.y)]
    sort = (tile[0] + 2 * tile[1]) % 4
    used = (samples.pixels(sort == number) for number in range(4))  # one at a time: bounds the memory
    shares, normals = [], []
    for part in used:
        if bool((part.weights > 0).any()):
            shares.append(float(part.weights.sum() / samples.weights.sum()))
            normals.append(_linearise(cameras, part, noise, objective))
    if len(normals) < 2:
        return objective.alpha2, None
    nothing = _smoothness(cameras, replace(objective, alpha2=0.0))
    judges = [_assemble(normal, nothing, objective.focal_mode) for normal in normals]
    scores = []
    for share in _ALPHA2_PARTS:
        smooth = _smoothness(cameras, replace(objective, alpha2=share * objective.alpha2))
        score = 0.0
        for number, judge in enumerate(judges):
            others = normals[:number] + normals[number + 1 :]
            fitted = _weighted_normal(others, [1 / len(others)] * len(others))
            score += _model_cost(*judge, _solve(*_assemble(fitted, smooth, objective.focal_mode), _DAMPING))
        scores.append(score)
    best = min(range(len(scores)), key=scores.__getitem__)
    # What a fit without smoothing loses against the judge's own best: one part its own errors, the others the judge's.
    own = sum(_model_cost(*judge, _solve(*judge, _DAMPING)) for judge in judges)
    loss = (scores[-1] - own) / len(judges)
    alpha2 = _ALPHA2_PARTS[best] * objective.alpha2 if scores[-1] - scores[best] > _CREDIBLE * loss else 0.0
    return alpha2, Linearised(noise, _weighted_normal(normals, shares))


def _model_cost(matrix: Tensor, gradient: Tensor, step: Tensor) -> float:
    """Change of a quadratic model by a step."""
    return float(gradient @ step + step @ matrix @ step / 2)


def _weighted_normal(normals: list[_Normal], shares: list[float]) -> _Normal:
    parts = ([share * getattr(n, f.name) for n, share in zip(normals, shares, strict=True)] for f in fields(_Normal))
    return _Normal(*(torch.stack(part).sum(0) for part in parts))


def _minimise(
    cameras: Cameras, samples: Samples, noise: Noise, normal: _Normal, objective: Objective, tolerance: float
) -> tuple[Cameras, _Normal, int, bool]:
    """Damped steps for fixed noise levels: cameras, normal equations there, steps used, whether at rest."""
    smooth = _smoothness(cameras, objective)
    cost, damping, reach = normal.cost + smooth.cost, _DAMPING, 2.0
    for step in range(1, _STEPS + 1):
        full, gradient = _assemble(_less_bend(normal, reach), smooth, objective.focal_mode)
        move = _solve(full, gradient, damping)
        expected = -float(gradient @ move) / 2  # gain of the quadratic model
        if expected <= 0.1 * tolerance * float(cost) or float(cost) < EXACT * objective.alpha1:
            return cameras, normal, step - 1, True
        candidate = _move(cameras, move, objective.focal_mode)
        new, new_smooth = _linearise(candidate, samples, noise, objective), _smoothness(candidate, objective)
        gain = float(cost - new.cost - new_smooth.cost)
        if gain > 0:
            cameras, normal, smooth, cost = candidate, new, new_smooth, new.cost + new_smooth.cost
            damping, reach = max(damping * 0.01, _DAMPING), min(2 * reach, _REACH)
            if max(gain, expected) <= tolerance * float(cost):
                return cameras, normal, step, True
        elif reach > 1:
            reach = max(reach / 8, 1.0)
        else:
            if expected <= 100 * tolerance * float(cost):  # little was promised, rounding denies even that
                return cameras, normal, step, True
            damping = max(damping * 100, 1e-6)
    return cameras, normal, _STEPS, False


def _linearise(cameras: Cameras, samples: Samples, noise: Noise, objective: Objective) -> _Normal:
    """Data term of all frames, a few frames at a time."""
    num_frames, num_points = samples.weights.shape
    total = samples.weights.sum()
    size = max(1, _CHUNK // num_points)
    parts = [
        _linearise_frames(cameras.take(part), samples.take(part), noise.take(part))
        for part in torch.arange(num_frames, device=total.device).split(size)
    ]
    factor = objective.alpha1 / total
    cost, matrix, gradient, bend = (torch.cat(field) for field in zip(*parts))
    return _Normal(factor * cost.sum(), factor * matrix, factor * gradient, factor * bend)


def _linearise_frames(
    cameras: Cameras, samples: Samples, noise: Noise
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # cost [t], matrix [t, 7, 7], gradient [t, 7], bend [t, 7, 7]
    """Distance to the ray as two coordinates across it, and their derivatives; weights from the loss."""
    focal = cameras.log_focal.exp()[:, None]  # [t, 1]
    x, y = samples.x / focal, samples.y / focal  # [t, N]
    px, py, pz = camera_points(samples, cameras).unbind(-1)
    # Two unit vectors across the ray (x, y, 1): a ~ (1, 0, -x) and b ~ ray x a = (-xy, 1 + x², -y).
    square = 1 + x * x
    length = (square + y * y).sqrt()
    ax = square.rsqrt()
    az = -x * ax
    by = square.sqrt() / length
    b_scale = ax / length
    bx, bz = -x * y * b_scale, -y * b_scale
    residual_a, residual_b = ax * px + az * pz, bx * px + by * py + bz * pz
    depth = (x * px + y * py + pz) / length.square()  # best depth, z
    cost, weights, bends = _loss(residual_a.square() + residual_b.square(), noise)
    weights = weights * samples.weights

    zero = torch.zeros_like(ax)
    rows_a = [py * az, pz * ax - px * az, -py * ax, ax, zero, az, depth * x * ax]
    rows_b = [py * bz - pz * by, pz * bx - px * bz, px * by - py * bx, bx, by, bz, depth * y * b_scale]
    jacobian = torch.stack([torch.stack(rows_a, 1), torch.stack(rows_b, 1)], 2)  # [t, 7, 2, N]
    weighted = (jacobian * weights[:, None, None]).flatten(2)
    matrix = weighted @ jacobian.flatten(2).mT
    # Derivatives of half the squared distance, [t, 7, N].
    along = (jacobian[:, :, 0] * residual_a[:, None]).addcmul_(jacobian[:, :, 1], residual_b[:, None])
    gradient = (along @ weights[..., None])[..., 0]
    bend = (along * (bends * samples.weights)[:, None]) @ along.mT
    # So far the columns are: R <- exp(w) R, shift in camera axes, log focal. The unknown is the centre, o <- o + v.
    change = torch.eye(7, dtype=matrix.dtype, device=matrix.device).repeat(len(matrix), 1, 1)
    change[:, 3:6, 3:6] = -cameras.rotation
    gradient = (change.mT @ gradient[..., None])[..., 0]
    return (cost * samples.weights).sum(-1), change.mT @ matrix @ change, gradient, change.mT @ bend @ change


def _loss(squared: Tensor, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:  # [t, N], [t] -> [t, N] each
    """Tukey's biweight rho of the distance r, its weight rho'/r, and -(rho'/r)'/r, by which that falls."""
    gate = noise.gate.square()[:, None]
    left = (1 - squared / gate).clamp_min(0)
    scale = _MEAN_INVERSE / noise.level[:, None]
    return scale * gate / 6 * (1 - left**3), scale * left.square(), 4 * scale / gate * left


def _less_bend(normal: _Normal, reach: float) -> _Normal:
    """The normal equations of longer steps: matrix - bend, but in no direction below matrix / reach."""
    unit = normal.matrix.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).sqrt()
    unit = unit[..., None] * unit[..., None, :]
    eye = torch.eye(7, dtype=unit.dtype, device=unit.device)
    root = torch.linalg.cholesky(normal.matrix / unit + 1e-10 * eye)
    half = torch.linalg.solve_triangular(root, normal.bend / unit, upper=False)
    share = torch.linalg.solve_triangular(root, half.mT, upper=False)
    values, vectors = torch.linalg.eigh((share + share.mT) / 2)
    vectors = root @ (vectors * values.clamp(0, 1 - 1 / reach).sqrt()[..., None, :])
    return replace(normal, matrix=normal.matrix - unit * (vectors @ vectors.mT))


def _smoothness(cameras: Cameras, objective: Objective) -> _Smooth:
    """The smoothness term, reweighted like the data term (IRLS)."""
    num_frames = len(cameras.centre)
    matrix, gradient = cameras.centre.new_zeros(num_frames, 2, 6, 6), cameras.centre.new_zeros(num_frames, 6)
    if objective.alpha2 == 0 or num_frames == 1:
        return _Smooth(gradient.sum(), matrix, gradient)
    factor = objective.alpha2 / (num_frames - 1)
    turn = matrix_product(cameras.rotation[1:], cameras.rotation[:-1].mT)  # [T-1, 3, 3]
    vector, shift = so3_log(turn), cameras.centre[1:] - cameras.centre[:-1]
    # ‖RᵀR' - I‖_F = 2 √2 sin(angle / 2) = √2 · angle for the turns between frames; the tip is rounded like a Huber's.
    angle = geodesic_angle(cameras.rotation[:-1], cameras.rotation[1:])
    length = torch.linalg.vector_norm(shift, dim=-1)
    chord = 8**0.5 * (angle / 2).sin()
    cost = factor * (_rounded(chord, 2**0.5 * _STILL) + _rounded(length, _STILL)).sum()
    turn_weight = factor * 2**0.5 / angle.clamp_min(_STILL)[:, None, None]
    shift_weight = factor / length.clamp_min(_STILL)[:, None, None]
    eye = torch.eye(3, dtype=turn.dtype, device=turn.device)
    # Perturbed, the turn's vector is v + w' - Q w (to first order in v), the shift s + u' - u.
    matrix[1:, 0, :3, :3] += turn_weight * eye
    matrix[:-1, 0, :3, :3] += turn_weight * eye
    matrix[:-1, 1, :3, :3] = -turn_weight * turn.mT  # rows: this frame, columns: the next
    matrix[1:, 0, 3:, 3:] += shift_weight * eye
    matrix[:-1, 0, 3:, 3:] += shift_weight * eye
    matrix[:-1, 1, 3:, 3:] = -shift_weight * eye
    gradient[1:, :3] += turn_weight[..., 0] * vector
    gradient[:-1, :3] -= turn_weight[..., 0] * rotate(turn.mT, vector)
    gradient[1:, 3:] += shift_weight[..., 0] * shift
    gradient[:-1, 3:] -= shift_weight[..., 0] * shift
    return _Smooth(cost, matrix, gradient)


def _rounded(length: Tensor, tip: float) -> Tensor:
    return torch.where(length < tip, length.square() / (2 * tip), length - tip / 2)


def _assemble(
    normal: _Normal, smooth: _Smooth, focal_mode: FocalMode
) -> tuple[Tensor, Tensor]:  # [6 T + F, 6 T + F], [6 T + F]
    """Dense normal equations: poses frame by frame, then the focal length(s). 81 frames are 487 unknowns: 10 ms."""
    num_frames = len(normal.matrix)
    frames = torch.arange(num_frames, device=normal.matrix.device)
    poses = normal.matrix.new_zeros(num_frames, 6, num_frames, 6)
    poses[frames, :, frames] = normal.matrix[:, :6, :6] + smooth.matrix[:, 0]
    poses[frames[:-1], :, frames[1:]] = smooth.matrix[:-1, 1]
    poses[frames[1:], :, frames[:-1]] = smooth.matrix[:-1, 1].mT
    full = poses.view(6 * num_frames, 6 * num_frames)
    gradient = (normal.gradient[:, :6] + smooth.gradient).flatten()
    if focal_mode == "fixed":
        return full, gradient
    border = normal.matrix.new_zeros(num_frames, 6, num_frames)
    border[frames, :, frames] = normal.matrix[:, :6, 6]
    corner, focal_gradient = torch.diag(normal.matrix[:, 6, 6]), normal.gradient[:, 6]
    border = border.view(6 * num_frames, num_frames)
    if focal_mode == "shared":
        border, corner = border.sum(1, keepdim=True), corner.sum().view(1, 1)
        focal_gradient = focal_gradient.sum().view(1)
    full = torch.cat([torch.cat([full, border], 1), torch.cat([border.mT, corner], 1)])
    return full, torch.cat([gradient, focal_gradient])


def _solve(full: Tensor, gradient: Tensor, damping: float) -> Tensor:
    """The damped step, in units that give the matrix a unit diagonal: then 1e-9 is far below what the data say."""
    diagonal = full.diagonal().clamp_min(1e-300)
    unit = diagonal.rsqrt()
    scaled = unit[:, None] * full * unit
    scaled = scaled + damping * torch.eye(len(full), dtype=full.dtype, device=full.device)
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if bool(failed):  # rounding made a singular matrix indefinite
        factor = torch.linalg.cholesky(scaled + 1e-6 * torch.eye(len(full), dtype=full.dtype, device=full.device))
    return -unit * torch.cholesky_solve((unit * gradient)[:, None], factor)[:, 0]


def _move(cameras: Cameras, step: Tensor, focal_mode: FocalMode) -> Cameras:
    """Cameras after a step; focal lengths change by at most a third and stay in bounds."""
    num_frames = len(cameras.centre)
    pose_step = step[: 6 * num_frames].view(num_frames, 6)
    log_focal = cameras.log_focal
    if focal_mode != "fixed":
        low, high = (math.log(bound) for bound in FOCAL_BOUNDS)
        log_focal = (log_focal + step[6 * num_frames :].clamp(-0.3, 0.3)).clamp(low, high)
    rotation = matrix_product(so3_exp(pose_step[:, :3]), cameras.rotation)
    return Cameras(log_focal, rotation, cameras.centre + pose_step[:, 3:])


def _focal_condition(
    normal: _Normal, samples: Samples, cameras: Cameras, noise: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Share of the focal's effect that no change of pose explains, less the part that noise in depth feigns; its
    deviation. On a fronto-parallel plane, or in a field of view so narrow that depths hardly differ, the share is 0."""
    pose, cross, focal = normal.matrix[:, :6, :6], normal.matrix[:, :6, 6:], normal.matrix[:, 6, 6]
    unit = pose.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).rsqrt()
    scaled = unit[..., None] * pose * unit[..., None, :]
    scaled = scaled + 1e-13 * torch.eye(6, dtype=pose.dtype, device=pose.device)
    explained = (unit[..., None] * cross).mT @ torch.linalg.solve(scaled, unit[..., None] * cross)
    left = (focal - explained[:, 0, 0]).clamp_min(0)  # [T]
    # A depth that is off by the noise e changes the effect, which is proportional to depth, by e / depth.
    distance = torch.linalg.vector_norm(samples.points - cameras.centre[:, None], dim=-1)
    feigned = focal * (noise / weighted_median(distance, samples.weights).clamp_min(1e-300)).square()
    factor = objective.alpha1 / samples.weights.sum()
    information = left / (factor * _MEAN_INVERSE * noise)
    if objective.focal_mode == "shared":
        left, feigned, focal, information = left.sum(), feigned.sum(), focal.sum(), information.sum()
    share = torch.where(left > 1.25 * feigned, left - feigned, 0) / focal.clamp_min(1e-300)
    return share, information.clamp_min(1e-300).rsqrt()
