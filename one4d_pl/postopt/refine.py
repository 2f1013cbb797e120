"""Joint refinement of poses and intrinsics on the objective (One4D, Eq. 12), depth eliminated.

Reweighted squares (IRLS) always descend, but overestimate the curvature where many points lie near
the gate, and become slow. Newton's matrix is right near the minimum and unreliable elsewhere. The
steps pass from the first to the second as they succeed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from one4d_pl.postopt.certainty import focal_certainty, pose_information
from one4d_pl.postopt.intrinsics import Lens, Samples
from one4d_pl.postopt.normal_equations import (
    NOISE_FLOOR,
    Noise,
    NormalEquations,
    Objective,
    assemble,
    linearise,
    measure_noise,
    move,
    smoothness,
    solve,
    towards_newton,
)
from one4d_pl.postopt.trajectory import Cameras

_EXACT = 1e-8  # of the scene's unit: a lower cost is rounding, no step can gain
DAMPING = 1e-9  # of a unit diagonal: far below the data's weight, but enough for a singular matrix
_ROUNDS, _STEPS = 4, 25  # most estimates of the noise; most Gauss-Newton steps for each
_MAX_REACH = 64.0  # steps are at most this many times longer than those of reweighted squares


@dataclass(frozen=True)
class Refined:
    """Cameras and lens at the minimum and how well the points determine them."""

    cameras: Cameras
    lens: Lens
    noise: Tensor  # [T], deviation of the points from their rays, per axis
    iterations: int
    converged: bool
    alpha2: float  # the objective's
    focal_condition: Tensor  # [] or [T]: see `focal_certainty`
    focal_deviation: Tensor  # [] or [T]: standard deviation of log focal if pixels were independent
    pose_information: Tensor  # [T, 6, 6], inverse covariance of rotation and centre, likewise


@dataclass(frozen=True)
class Linearised:
    """The data term at some cameras, for `refine` to start from."""

    noise: Noise
    normal: NormalEquations


def refine(
    cameras: Cameras,  # close: the poses of the closed form
    samples: Samples,  # in units of the scene, every frame with weight
    objective: Objective,
    tolerance: float,  # a smaller gain of a step, relative to the objective, ends the descent
    start: Linearised | None = None,  # at these cameras, where known: saves a pass over all points
) -> Refined:
    """Minimise the objective, and again as long as that lowers the measured noise."""
    iterations, noise = 0, measure_noise(samples, cameras) if start is None else start.noise
    normal = None if start is None else start.normal
    for _ in range(_ROUNDS):
        normal = linearise(cameras, samples, noise, objective) if normal is None else normal
        cameras, samples, normal, used, converged = _minimise(cameras, samples, noise, normal, objective, tolerance)
        iterations, known = iterations + used, normal
        normal = None
        before, noise = noise, measure_noise(samples, cameras)
        if bool((noise.level > 0.8 * before.level).all()) or bool((noise.level < 3 * NOISE_FLOOR).all()):
            break
    certainty = focal_certainty(known, samples, cameras, before.level, objective)
    information = pose_information(known, samples, before.level, objective)
    return Refined(cameras, samples.lens, noise.level, iterations, converged, objective.alpha2, *certainty, information)


def _minimise(
    cameras: Cameras, samples: Samples, noise: Noise, normal: NormalEquations, objective: Objective, tolerance: float
) -> tuple[Cameras, Samples, NormalEquations, int, bool]:
    """Take damped steps for fixed noise levels.

    Returns cameras, samples with their lens, normal equations there, the steps used, and whether they converged.
    """
    smooth = smoothness(cameras, objective)
    cost, damping, reach = normal.cost + smooth.cost, DAMPING, 2.0
    for number in range(1, _STEPS + 1):
        full, gradient = assemble(towards_newton(normal, reach), smooth, objective)
        step = solve(full, gradient, damping)
        expected = -float(gradient @ step) / 2  # gain of the quadratic model
        if expected <= 0.1 * tolerance * float(cost) or float(cost) < _EXACT:
            return cameras, samples, normal, number - 1, True
        candidate, seen = move(cameras, samples, step, objective)
        new, new_smooth = linearise(candidate, seen, noise, objective), smoothness(candidate, objective)
        gain = float(cost - new.cost - new_smooth.cost)
        if gain > 0:
            cameras, samples, normal, smooth = candidate, seen, new, new_smooth
            cost = new.cost + new_smooth.cost
            damping, reach = max(damping * 0.01, DAMPING), min(2 * reach, _MAX_REACH)
            if max(gain, expected) <= tolerance * float(cost):
                return cameras, samples, normal, number, True
        elif reach > 1:
            reach = max(reach / 8, 1.0)
        else:
            if expected <= 100 * tolerance * float(cost):  # so small a gain is lost in rounding
                return cameras, samples, normal, number, True
            damping = max(damping * 100, 1e-6)
    return cameras, samples, normal, _STEPS, False
