"""Joint refinement of all poses and the intrinsics on the paper's objective (One4D, Eq. 12), depth eliminated.

Reweighted squares (IRLS) descend surely but overrate the curvature, by far where many points lie near the gate, and
then creep; Newton's matrix is right near the minimum and wild elsewhere. The steps pass from the one to the other as
they succeed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from one4d_pl.postopt.certainty import focal_certainty, pose_information
from one4d_pl.postopt.intrinsics import Lens, Samples
from one4d_pl.postopt.normal_equations import (
    NOISE_FLOOR,
    Noise,
    Normal,
    Objective,
    assemble,
    less_bend,
    linearise,
    measure_noise,
    move,
    smoothness,
    solve,
)
from one4d_pl.postopt.trajectory import Cameras

_EXACT = 1e-8  # of the scene's unit: a lower cost is rounding, no step can gain
DAMPING = 1e-9  # of a unit diagonal: far below what the data say, but a singular matrix is no accident
_ROUNDS, _STEPS = 4, 25  # most estimates of the noise; most Gauss-Newton steps for each
_REACH = 64.0  # steps are at most so many times longer than those of reweighted squares


@dataclass(frozen=True)
class Refined:
    """Cameras and lens at the minimum and how well the points determine them."""

    cameras: Cameras
    lens: Lens
    noise: Tensor  # [T], deviation of the points from their rays, per axis
    iterations: int
    converged: bool
    alpha2: float  # the objective's
    focal_condition: Tensor  # [] or [T]: share of the focal's effect that no pose explains, less what noise feigns
    focal_deviation: Tensor  # [] or [T]: standard deviation of log focal if pixels were independent
    pose_information: Tensor  # [T, 6, 6], inverse covariance of rotation and centre, likewise


@dataclass(frozen=True)
class Linearised:
    """The data term at some cameras, for `refine` to start from."""

    noise: Noise
    normal: Normal


def refine(
    cameras: Cameras,  # close: the poses of the closed form
    samples: Samples,  # in units of the scene, every frame with weight
    objective: Objective,
    tolerance: float,  # gain of a step, relative to the objective, that is not worth another
    start: Linearised | None = None,  # at these cameras, where known: spares a pass over all points
) -> Refined:
    """Minimise the objective over its unknowns, anew as long as that lowers the measured noise."""
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
    condition, deviation = focal_certainty(known, samples, cameras, before.level, objective)
    return Refined(
        cameras,
        samples.lens,
        noise.level,
        iterations,
        converged,
        objective.alpha2,
        condition,
        deviation,
        pose_information(known, samples, before.level, objective),
    )


def _minimise(
    cameras: Cameras, samples: Samples, noise: Noise, normal: Normal, objective: Objective, tolerance: float
) -> tuple[Cameras, Samples, Normal, int, bool]:
    """Damped steps for fixed noise levels: cameras and lens, normal equations there, steps used, whether at rest."""
    smooth = smoothness(cameras, objective)
    cost, damping, reach = normal.cost + smooth.cost, DAMPING, 2.0
    for number in range(1, _STEPS + 1):
        full, gradient = assemble(less_bend(normal, reach), smooth, objective)
        step = solve(full, gradient, damping)
        expected = -float(gradient @ step) / 2  # gain of the quadratic model
        if expected <= 0.1 * tolerance * float(cost) or float(cost) < _EXACT * objective.alpha1:
            return cameras, samples, normal, number - 1, True
        candidate, seen = move(cameras, samples, step, objective)
        new, new_smooth = linearise(candidate, seen, noise, objective), smoothness(candidate, objective)
        gain = float(cost - new.cost - new_smooth.cost)
        if gain > 0:
            cameras, samples, normal, smooth = candidate, seen, new, new_smooth
            cost = new.cost + new_smooth.cost
            damping, reach = max(damping * 0.01, DAMPING), min(2 * reach, _REACH)
            if max(gain, expected) <= tolerance * float(cost):
                return cameras, samples, normal, number, True
        elif reach > 1:
            reach = max(reach / 8, 1.0)
        else:
            if expected <= 100 * tolerance * float(cost):  # little was promised, rounding denies even that
                return cameras, samples, normal, number, True
            damping = max(damping * 100, 1e-6)
    return cameras, samples, normal, _STEPS, False
