"""Laws of the refinement: its derivatives are those of the objective, and its minimum is one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from one4d_pl.geometry.se3 import so3_exp
from one4d_pl.postopt.held_out import credible_alpha2
from one4d_pl.postopt.intrinsics import Lens, Samples
from one4d_pl.postopt.normal_equations import Noise, Objective, linearise, measure_noise, move, smoothness
from one4d_pl.postopt.refine import _minimise, refine
from one4d_pl.postopt.trajectory import Cameras, rays, solve_poses

FOCAL = 0.8


def random_problem(noise: float, frames: int = 4, points: int = 60) -> tuple[Samples, Cameras]:
    """Cameras on a curved path and the points that their pixels see."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64) - 0.5

    time = torch.arange(frames, dtype=torch.float64)[:, None]
    rotation = so3_exp(0.1 * time * draw(1, 3) + 0.02 * draw(frames, 3))
    cameras = Cameras(torch.full((frames,), FOCAL).double().log(), rotation, 0.1 * time * draw(1, 3))
    empty = Samples(
        torch.zeros(frames, points, 3).double(), 0.5 + draw(frames, points).abs(), draw(points), draw(points)
    )
    camera_points = rays(empty, torch.tensor(FOCAL).double()) * (1.5 + draw(frames, points)[..., None])
    world = camera_points @ rotation + cameras.centre[:, None] + noise * draw(frames, points, 3)
    return replace(empty, points=world), cameras


def total(cameras: Cameras, samples: Samples, noise: Noise, objective: Objective) -> float:
    return float(linearise(cameras, samples, noise, objective).cost + smoothness(cameras, objective).cost)


@pytest.mark.parametrize("lens", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("mode", ["shared", "per_frame", "fixed"])
def test_the_gradient_is_that_of_the_objective(mode, lens):
    samples, cameras = random_problem(noise=0.1)
    samples = samples.through(Lens(1.1, 0.02, -0.03))
    cameras = replace(cameras, centre=cameras.centre + 0.02, log_focal=cameras.log_focal + 0.05)
    objective = Objective(alpha2=0.3, focal_mode=mode, aspect=lens[0], principal_point=lens[1])
    noise = measure_noise(samples, cameras)
    normal, smooth = linearise(cameras, samples, noise, objective), smoothness(cameras, objective)
    poses = (normal.gradient[:, :6] + smooth.gradient).flatten()
    focal = {"shared": normal.gradient[:, 6].sum()[None], "per_frame": normal.gradient[:, 6], "fixed": poses[:0]}[mode]
    gradient = torch.cat([poses, focal, normal.gradient[:, objective.lens_columns].sum(0)])
    step = 1e-6 * torch.eye(len(gradient), dtype=torch.float64)
    numeric = [
        (
            total(*move(cameras, samples, e, objective), noise, objective)
            - total(*move(cameras, samples, -e, objective), noise, objective)
        )
        / 2e-6
        for e in step
    ]
    # Turns are linearised to first order in the angle between frames, 0.1: the only approximation.
    torch.testing.assert_close(torch.tensor(numeric).double(), gradient, rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize("gate", [2.0, 60.0])  # in noise levels: with points beyond it, and without
def test_the_curvature_is_that_of_the_loss_where_the_distances_are_straight(gate):
    samples, cameras = random_problem(noise=0.1)
    objective = Objective(alpha2=0.0, focal_mode="fixed")
    noise = measure_noise(samples, cameras)
    noise = replace(noise, gate=gate * noise.level)
    normal = linearise(cameras, samples, noise, objective)

    def gradient(axis: int, step: float) -> torch.Tensor:  # [T, 3]
        shift = step * torch.eye(3, dtype=torch.float64)[axis]
        moved = replace(cameras, centre=cameras.centre + shift)
        return linearise(moved, samples, noise, objective).gradient[:, 3:6]

    numeric = torch.stack([(gradient(axis, 1e-6) - gradient(axis, -1e-6)) / 2e-6 for axis in range(3)], dim=1)
    hessian = (normal.matrix - normal.excess)[:, 3:6, 3:6]  # a ray's two coordinates are linear in the centre
    torch.testing.assert_close(hessian, numeric, rtol=1e-5, atol=1e-6 * float(numeric.abs().amax()))


@pytest.mark.parametrize("seed", range(4))
def test_at_rest_no_stricter_criterion_moves_the_cameras(seed):
    samples, cameras = random_problem(noise=0.0, points=400)
    generator = torch.Generator().manual_seed(seed)
    errors = 0.003 * torch.randn(samples.points.shape, generator=generator, dtype=torch.float64)
    bad = torch.rand(samples.weights.shape, generator=generator) < 0.45
    samples = replace(samples, points=samples.points + torch.where(bad[..., None], 8 * errors, errors))
    objective = Objective(alpha2=0.0, focal_mode="per_frame")
    start = solve_poses(samples, 1.05 * cameras.log_focal.exp())
    noise = measure_noise(samples, start)
    usual, _, normal, _, at_rest = _minimise(
        start, samples, noise, linearise(start, samples, noise, objective), objective, 1e-6
    )
    strict = _minimise(usual, samples, noise, normal, objective, 1e-14)[0]
    deviation = refine(usual, samples, objective, 1e-6).focal_deviation
    assert at_rest
    # A 20th of what the points leave open.
    assert bool(((usual.log_focal - strict.log_focal).abs() <= 0.05 * deviation).all())


def test_too_few_steps_are_reported(monkeypatch):
    samples, cameras = random_problem(noise=0.1, points=300)
    monkeypatch.setattr("one4d_pl.postopt.refine._STEPS", 1)
    start = replace(cameras, centre=cameras.centre + 0.1, log_focal=cameras.log_focal + 0.2)
    assert not refine(start, samples, Objective(0.01, "shared"), tolerance=1e-9).converged


def test_the_smoothness_is_the_papers_sum():
    _, cameras = random_problem(noise=0.0)
    objective = Objective(alpha2=0.7, focal_mode="shared")
    turn = cameras.rotation[:-1].mT @ cameras.rotation[1:] - torch.eye(3).double()
    shift = cameras.centre[1:] - cameras.centre[:-1]
    expected = 0.7 * (torch.linalg.matrix_norm(turn) + torch.linalg.vector_norm(shift, dim=-1)).mean()
    # Tips are rounded below 1e-3, which lowers each longer term by half of that.
    torch.testing.assert_close(smoothness(cameras, objective).cost, expected, rtol=0, atol=0.7 * 1.3e-3)


def test_the_minimum_is_no_higher_than_the_truth_and_its_neighbours():
    samples, cameras = random_problem(noise=0.1, points=300)
    objective = Objective(alpha2=0.01, focal_mode="shared")
    refined = refine(solve_poses(samples, cameras.log_focal.exp()), samples, objective, tolerance=1e-9)
    assert refined.converged
    noise = measure_noise(samples, refined.cameras)
    lowest = total(refined.cameras, samples, noise, objective)
    assert lowest <= total(cameras, samples, noise, objective)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        step = 1e-3 * torch.randn(6 * 4 + 1, generator=generator, dtype=torch.float64)
        assert lowest <= total(*move(refined.cameras, samples, step, objective), noise, objective)


def test_stronger_smoothing_shortens_the_path():
    samples, cameras = random_problem(noise=0.1)
    lengths = []
    for alpha2 in (0.0, 0.1, 10.0):
        objective = Objective(alpha2=alpha2, focal_mode="fixed")
        centre = refine(cameras, samples, objective, tolerance=1e-6).cameras.centre
        lengths.append(float(torch.linalg.vector_norm(centre[1:] - centre[:-1], dim=-1).sum()))
    assert lengths[0] > lengths[1] > lengths[2]
    assert lengths[2] < 0.1 * lengths[0]


def test_the_gate_is_wide_in_clean_frames_and_narrow_in_those_with_outliers():
    samples, cameras = random_problem(noise=0.01, points=3000)
    wild = samples.points.clone()
    wild[1, :30] += 3.0
    noise = measure_noise(replace(samples, points=wild), cameras)
    factor = noise.gate / noise.level
    assert float(factor[1]) == pytest.approx(6) and bool((factor[torch.arange(len(factor)) != 1] == 60).all())


def test_what_judging_the_smoothness_has_linearised_is_the_data_term():
    samples, cameras = random_problem(noise=0.1, points=300)
    objective = Objective(alpha2=0.01, focal_mode="shared")
    alpha2, start = credible_alpha2(cameras, samples, objective)
    assert alpha2 <= 0.01
    expected = linearise(cameras, samples, start.noise, objective)
    for name in ("cost", "matrix", "gradient", "excess"):
        torch.testing.assert_close(getattr(start.normal, name), getattr(expected, name), rtol=1e-9, atol=1e-9)
