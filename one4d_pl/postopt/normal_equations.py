"""The objective of the refinement (One4D, Eq. 12) at some cameras: cost and normal equations.

    mean |X - X̂| + alpha2 · mean (‖R_iᵀ R_{i+1} - I‖_F + ‖o_{i+1} - o_i‖)

With the best depth of each pixel put in, |X - X̂| is the distance from the point to its pixel's ray: 6 T + 1 unknowns
are left, and up to three more of the lens. The distance enters through Tukey's biweight. Its weights equal those of |r|
on average over inliers and are 0 beyond six times the noise, which is measured by the frame's median distance: so
flying points are left out. In a frame that has no such points the gate is so wide that these are least squares, the
most accurate where noise is Gaussian.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from one4d_pl.geometry.se3 import geodesic_angle, matrix_product, rotate, so3_exp, so3_log
from one4d_pl.postopt.intrinsics import FOCAL_BOUNDS, Lens, Samples
from one4d_pl.postopt.trajectory import Cameras, camera_points, ray_distance, weighted_median

FocalMode = Literal["shared", "per_frame", "fixed"]

NOISE_FLOOR = 1e-7  # of the scene's unit: the rounding of float32 pointmaps
MEAN_INVERSE = 1.2533  # mean of 1 / length of a 2-D Gaussian: the average weight that |r| gives to noise
_RAYLEIGH_MEDIAN = 1.1774  # median length of a 2-D Gaussian vector of unit deviation per axis
GATE = 6.0  # noise deviations; a point farther from its ray is an outlier
_WIDE_GATE = 60.0  # without outliers; of Gaussian noise one point in 10^8 lies beyond the narrow gate
_OUTLIER_SHARE = 1e-4  # of a frame's points: more beyond the narrow gate mean that there are outliers
_HUBER_STEP = 1e-3  # of the scene's unit (and radians): shorter camera steps count quadratically
_CHUNK = 60_000  # points linearised at once: bounds the memory, fits the cache
_ASPECT_BOUNDS = (0.1, 10.0)
_MAX_SHIFT = 1.0  # longer sides, of the principal point from the image centre


@dataclass(frozen=True)
class Objective:
    """What is minimised over which unknowns."""

    alpha2: float  # of the smoothness of the trajectory
    focal_mode: FocalMode
    aspect: bool = False  # True = solved for, one for all frames
    principal_point: bool = False  # True = solved for, one for all frames

    @property
    def lens_columns(self) -> list[int]:
        """Return the columns of the lens that are solved for, among a frame's ten unknowns."""
        return [7] * self.aspect + [8, 9] * self.principal_point


@dataclass(frozen=True)
class Noise:
    """How far a frame's points lie from their rays."""

    level: Tensor  # [T], robust deviation per axis
    gate: Tensor  # [T], distance beyond which a point has no weight

    def take(self, frames: Tensor) -> Noise:
        """Return the noise of some frames."""
        return Noise(self.level[frames], self.gate[frames])


@dataclass(frozen=True)
class NormalEquations:
    """Normal equations of the data term at some cameras.

    A frame has U = 7 unknowns: rotation, centre and log focal; or 10 with the lens's: log aspect
    and the principal point's x and y (longer sides, y divided by the aspect).
    """

    cost: Tensor  # [], mean loss
    matrix: Tensor  # [T, U, U], of the reweighted squares
    gradient: Tensor  # [T, U]
    excess: Tensor  # [T, U, U], matrix less the loss's Hessian


@dataclass(frozen=True)
class SmoothnessTerm:
    """Normal equations of the smoothness term; a frame's unknowns are rotation and centre."""

    cost: Tensor  # [], alpha2 · mean
    matrix: Tensor  # [T, 2, 6, 6]: a frame with itself, and with the next
    gradient: Tensor  # [T, 6]


def measure_noise(samples: Samples, cameras: Cameras) -> Noise:
    """Measure how far each frame's points lie from their rays, and choose the gate."""
    distance = ray_distance(samples, cameras)
    level = weighted_median(distance, samples.weights) / _RAYLEIGH_MEDIAN + NOISE_FLOOR
    beyond = ((distance > GATE * level[:, None]) & (samples.weights > 0)).sum(-1)
    narrow = beyond > _OUTLIER_SHARE * (samples.weights > 0).sum(-1)
    return Noise(level, level * torch.where(narrow, GATE, _WIDE_GATE))


def linearise(
    cameras: Cameras, samples: Samples, noise: Noise, objective: Objective, whole_lens: bool = False
) -> NormalEquations:
    """Linearise the data term at these cameras, a few frames at a time.

    The lens's unknowns are included where one of them is solved for, or by `whole_lens`.
    """
    num_frames, num_points = samples.weights.shape
    total = samples.weights.sum()
    size = max(1, _CHUNK // num_points)
    with_lens = whole_lens or bool(objective.lens_columns)
    parts = [
        _linearise_frames(cameras.take(part), samples.take(part), noise.take(part), with_lens)
        for part in torch.arange(num_frames, device=total.device).split(size)
    ]
    factor = 1 / total
    cost, matrix, gradient, excess = (torch.cat(field) for field in zip(*parts))
    return NormalEquations(factor * cost.sum(), factor * matrix, factor * gradient, factor * excess)


def _linearise_frames(
    cameras: Cameras, samples: Samples, noise: Noise, with_lens: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # cost [t], matrix [t, U, U], gradient [t, U], excess [t, U, U]
    """Linearise the distance to the ray, as two coordinates across it, weighted by the loss."""
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
    cost, weights, excess_weights = _loss(residual_a.square() + residual_b.square(), noise)
    weights = weights * samples.weights

    zero = torch.zeros_like(ax)
    rows_a = [py * az, pz * ax - px * az, -py * ax, ax, zero, az, depth * x * ax]
    rows_b = [py * bz - pz * by, pz * bx - px * bz, px * by - py * bx, bx, by, bz, depth * y * b_scale]
    if with_lens:
        scale = depth / focal
        rows_a += [zero, scale * ax, zero]
        rows_b += [depth * y * by, scale * bx, scale * by]
    jacobian = torch.stack([torch.stack(rows_a, 1), torch.stack(rows_b, 1)], 2)  # [t, U, 2, N]
    weighted = (jacobian * weights[:, None, None]).flatten(2)
    matrix = weighted @ jacobian.flatten(2).mT
    # Derivatives of half the squared distance, [t, U, N].
    slope = (jacobian[:, :, 0] * residual_a[:, None]).addcmul_(jacobian[:, :, 1], residual_b[:, None])
    gradient = (slope @ weights[..., None])[..., 0]
    excess = (slope * (excess_weights * samples.weights)[:, None]) @ slope.mT
    # So far columns 3 to 5 shift the points in camera axes; the unknown is the centre, o <- o + v.
    change = torch.eye(jacobian.shape[1], dtype=matrix.dtype, device=matrix.device).repeat(len(matrix), 1, 1)
    change[:, 3:6, 3:6] = -cameras.rotation
    gradient = (change.mT @ gradient[..., None])[..., 0]
    return (cost * samples.weights).sum(-1), change.mT @ matrix @ change, gradient, change.mT @ excess @ change


def _loss(squared: Tensor, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:  # [t, N], [t] -> [t, N] each
    """Return Tukey's biweight rho of the distance r, its weight rho'/r, and -(rho'/r)'/r."""
    gate = noise.gate.square()[:, None]
    inlying = (1 - squared / gate).clamp_min(0)  # 1 at the ray, 0 from the gate on
    scale = MEAN_INVERSE / noise.level[:, None]
    return scale * gate / 6 * (1 - inlying**3), scale * inlying.square(), 4 * scale / gate * inlying


def weighted_normal(normals: list[NormalEquations], shares: list[float]) -> NormalEquations:
    """Add normal equations, each times its share."""
    parts = (
        [share * getattr(n, f.name) for n, share in zip(normals, shares, strict=True)] for f in fields(NormalEquations)
    )
    return NormalEquations(*(torch.stack(part).sum(0) for part in parts))


def towards_newton(normal: NormalEquations, reach: float) -> NormalEquations:
    """Return the normal equations of longer steps, from reweighted squares towards Newton's.

    The excess is taken off the matrix, which then is the Hessian, but no direction falls below
    1 / reach of what it was.
    """
    scale = normal.matrix.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).sqrt()
    scale = scale[..., None] * scale[..., None, :]
    eye = torch.eye(scale.shape[-1], dtype=scale.dtype, device=scale.device)
    root = torch.linalg.cholesky(normal.matrix / scale + 1e-10 * eye)
    half = torch.linalg.solve_triangular(root, normal.excess / scale, upper=False)
    share = torch.linalg.solve_triangular(root, half.mT, upper=False)
    values, vectors = torch.linalg.eigh((share + share.mT) / 2)
    vectors = root @ (vectors * values.clamp(0, 1 - 1 / reach).sqrt()[..., None, :])
    return replace(normal, matrix=normal.matrix - scale * (vectors @ vectors.mT))


def smoothness(cameras: Cameras, objective: Objective) -> SmoothnessTerm:
    """Linearise the smoothness term, reweighted like the data term (IRLS)."""
    num_frames = len(cameras.centre)
    matrix, gradient = cameras.centre.new_zeros(num_frames, 2, 6, 6), cameras.centre.new_zeros(num_frames, 6)
    if objective.alpha2 == 0 or num_frames == 1:
        return SmoothnessTerm(gradient.sum(), matrix, gradient)
    factor = objective.alpha2 / (num_frames - 1)
    turn = matrix_product(cameras.rotation[1:], cameras.rotation[:-1].mT)  # [T-1, 3, 3]
    vector, shift = so3_log(turn), cameras.centre[1:] - cameras.centre[:-1]
    # ‖RᵀR' - I‖_F = 2 √2 sin(angle / 2), nearly √2 · angle for the turns between frames. Both norms
    # are quadratic for short steps, as in the Huber loss.
    angle = geodesic_angle(cameras.rotation[:-1], cameras.rotation[1:])
    length = torch.linalg.vector_norm(shift, dim=-1)
    chord = 8**0.5 * (angle / 2).sin()
    cost = factor * (_huber(chord, 2**0.5 * _HUBER_STEP) + _huber(length, _HUBER_STEP)).sum()
    turn_weight = factor * 2**0.5 / angle.clamp_min(_HUBER_STEP)[:, None, None]
    shift_weight = factor / length.clamp_min(_HUBER_STEP)[:, None, None]
    eye = torch.eye(3, dtype=turn.dtype, device=turn.device)
    # Turns w, w' and shifts u, u' of both cameras make the turn's vector v + w' - Q w (to first
    # order in v) and the shift s + u' - u.
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
    return SmoothnessTerm(cost, matrix, gradient)


def _huber(length: Tensor, step: float) -> Tensor:
    return torch.where(length < step, length.square() / (2 * step), length - step / 2)


def assemble(
    normal: NormalEquations, smooth: SmoothnessTerm, objective: Objective
) -> tuple[Tensor, Tensor]:  # [6 T + F + L, 6 T + F + L], [6 T + F + L]
    """Assemble the dense normal equations: poses frame by frame, focal length(s), lens.

    81 frames have 487 unknowns, which are solved in 10 ms.
    """
    num_frames = len(normal.matrix)
    frames = torch.arange(num_frames, device=normal.matrix.device)
    poses = normal.matrix.new_zeros(num_frames, 6, num_frames, 6)
    poses[frames, :, frames] = normal.matrix[:, :6, :6] + smooth.matrix[:, 0]
    poses[frames[:-1], :, frames[1:]] = smooth.matrix[:-1, 1]
    poses[frames[1:], :, frames[:-1]] = smooth.matrix[:-1, 1].mT
    full = poses.view(6 * num_frames, 6 * num_frames)
    gradient = (normal.gradient[:, :6] + smooth.gradient).flatten()
    to_unknowns = _intrinsic_unknowns(normal, objective)  # [T, U - 6, F + L]
    border = (normal.matrix[:, :6, 6:] @ to_unknowns).flatten(0, 1)
    corner = (to_unknowns.mT @ normal.matrix[:, 6:, 6:] @ to_unknowns).sum(0)
    more = (to_unknowns.mT @ normal.gradient[:, 6:, None]).sum(0)[:, 0]
    full = torch.cat([torch.cat([full, border], 1), torch.cat([border.mT, corner], 1)])
    return full, torch.cat([gradient, more])


def _intrinsic_unknowns(normal: NormalEquations, objective: Objective) -> Tensor:
    """Return which unknown changes which intrinsic: [T, U - 6, F + L] of 0 and 1."""
    num_frames, width = len(normal.matrix), normal.matrix.shape[-1] - 6
    count = {"fixed": 0, "shared": 1, "per_frame": num_frames}[objective.focal_mode]
    columns = objective.lens_columns
    change = normal.matrix.new_zeros(num_frames, width, count + len(columns))
    if objective.focal_mode == "per_frame":
        frames = torch.arange(num_frames, device=change.device)
        change[frames, 0, frames] = 1
    elif objective.focal_mode == "shared":
        change[:, 0, 0] = 1
    for number, column in enumerate(columns, start=count):
        change[:, column - 6, number] = 1
    return change


def solve(full: Tensor, gradient: Tensor, damping: float) -> Tensor:
    """Solve for the damped step. The damping is added after scaling the matrix to a unit diagonal."""
    diagonal = full.diagonal().clamp_min(1e-300)
    scale = diagonal.rsqrt()
    scaled = scale[:, None] * full * scale
    scaled = scaled + damping * torch.eye(len(full), dtype=full.dtype, device=full.device)
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if bool(failed):  # rounding made a singular matrix indefinite
        factor = torch.linalg.cholesky(scaled + 1e-6 * torch.eye(len(full), dtype=full.dtype, device=full.device))
    return -scale * torch.cholesky_solve((scale * gradient)[:, None], factor)[:, 0]


def move(cameras: Cameras, samples: Samples, step: Tensor, objective: Objective) -> tuple[Cameras, Samples]:
    """Return cameras and lens after a step.

    Focal lengths and aspect change by a factor of exp(0.3) at most, and all stay in bounds.
    """
    num_frames = len(cameras.centre)
    pose_step, rest = step[: 6 * num_frames].view(num_frames, 6), step[6 * num_frames :]
    columns = objective.lens_columns
    focal_step, lens_step = rest[: len(rest) - len(columns)], rest[len(rest) - len(columns) :]
    log_focal = cameras.log_focal
    if objective.focal_mode != "fixed":
        low, high = (math.log(bound) for bound in FOCAL_BOUNDS)
        log_focal = (log_focal + focal_step.clamp(-0.3, 0.3)).clamp(low, high)
    rotation = matrix_product(so3_exp(pose_step[:, :3]), cameras.rotation)
    if columns:
        moved = dict(zip(columns, lens_step.tolist()))
        samples = samples.through(_moved_lens(samples.lens, *(moved.get(column, 0.0) for column in (7, 8, 9))))
    return Cameras(log_focal, rotation, cameras.centre + pose_step[:, 3:]), samples


def _moved_lens(lens: Lens, log_aspect: float, x: float, y: float) -> Lens:
    aspect = lens.aspect * math.exp(min(max(log_aspect, -0.3), 0.3))
    x, y = lens.x + min(max(x, -0.1), 0.1), lens.y + lens.aspect * min(max(y, -0.1), 0.1)
    low, high = _ASPECT_BOUNDS
    return Lens(min(max(aspect, low), high), *(min(max(p, -_MAX_SHIFT), _MAX_SHIFT) for p in (x, y)))
