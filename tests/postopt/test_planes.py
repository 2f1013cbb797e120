"""Laws of planes: a camera that sees only a plane is found as well as noise allows, from none to 1 % of the distance.

What the noise explains is the pose at which the refinement ends when it starts from the true one. Another pose that
fits at least as well, in front of the camera, is as good an answer: then the noise does not tell them apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from one4d_pl.geometry.se3 import geodesic_angle, so3_exp
from one4d_pl.postopt.certainty import MIN_CONDITION
from one4d_pl.postopt.intrinsics import Samples, sample_grid
from one4d_pl.postopt.model_choice import MAX_FOCAL_DEVIATION
from one4d_pl.postopt.normal_equations import Objective
from one4d_pl.postopt.recover import RecoveredScene, RecoverOptions, recover_scene
from one4d_pl.postopt.refine import refine
from one4d_pl.postopt.trajectory import Cameras, ray_distance, rays, solve_poses

HEIGHT, WIDTH = 24, 32
NOISES = (0.0, *(10.0**power for power in range(-9, -1)))  # deviation per axis, in median distances
LIMIT = math.radians(1)
SAME_FIT = 1 + 1e-6  # ratio of root mean squares: the stop of the refinement
EXACT_FIT = 1e-7  # of the scene's unit: NOISE_FLOOR of the refinement


@dataclass(frozen=True)
class Planes:
    """Pictures of planes, each in a world of its own."""

    pointmap: Tensor  # [T, H, W, 3]
    valid: Tensor  # [T, H, W], False beyond the horizon
    cameras: Cameras


def draw_planes(first: int, count: int, noise: float, focal: float, relief: float = 0.0) -> Planes:
    """Walls to floors with their horizon in view, at all turns; `relief` is the deviation of log depth."""
    parts = [_draw_plane(seed, noise, focal, relief) for seed in range(first, first + count)]
    pointmap, valid, rotation, centre = (torch.stack(part) for part in zip(*parts, strict=True))
    return Planes(pointmap, valid, Cameras(torch.full((count,), focal).double().log(), rotation, centre))


def _draw_plane(seed: int, noise: float, focal: float, relief: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    slope, azimuth, distance, turn = (torch.rand(4, generator=generator, dtype=torch.float64)).tolist()
    rows, columns = (torch.arange(size, dtype=torch.float64) for size in (HEIGHT, WIDTH))
    y, x = torch.meshgrid((rows + 0.5 - HEIGHT / 2) / WIDTH, (columns + 0.5 - WIDTH / 2) / WIDTH, indexing="ij")
    # 1 / z is linear on a plane.
    inverse = 1 + 2.5 * slope * (math.cos(2 * math.pi * azimuth) * x + math.sin(2 * math.pi * azimuth) * y)
    valid = inverse > 0.1
    depth = (0.5 + 2 * distance) / inverse.clamp_min(0.1)
    depth = depth * (relief * torch.randn(HEIGHT, WIDTH, generator=generator, dtype=torch.float64)).exp()
    points = torch.stack([x / focal, y / focal, torch.ones_like(x)], dim=-1) * depth[..., None]
    unit = torch.linalg.vector_norm(points[valid], dim=-1).median()
    points = points + noise * unit * torch.randn(points.shape, generator=generator, dtype=torch.float64)
    axis, centre = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    rotation = so3_exp(math.pi * turn * torch.nn.functional.normalize(axis, dim=0))
    return points @ rotation + centre, valid, rotation, centre


def count_wrong(planes: Planes, scene: RecoveredScene, known: bool) -> int:
    """Frames off by more than a degree beyond what the noise explains, or falsely said not to show the focal length."""
    samples = sample_grid(planes.pointmap, planes.valid, HEIGHT * WIDTH)
    points = samples.points[samples.weights > 0]
    centre = points.median(0).values
    unit = torch.linalg.vector_norm(points - centre, dim=-1).median()
    samples = samples.normalised(centre, unit)
    truth, found = planes.cameras, scene.cam2world
    start = Cameras(truth.log_focal, truth.rotation, (truth.centre - centre) / unit)
    oracle = refine(start, samples, Objective(0.0, "fixed" if known else "per_frame"), 1e-6)
    if "focal from prior" in scene.report.flags:  # half of each threshold: both stop a little beside the minimum
        told = (oracle.focal_condition > 2 * MIN_CONDITION) & (oracle.focal_deviation < 0.5 * MAX_FOCAL_DEVIATION)
        return int(told.sum())
    log_focal = truth.log_focal if known else (scene.intrinsics[:, 0, 0].double() / WIDTH).log()
    ours = Cameras(log_focal, found[:, :3, :3].mT, (found[:, :3, 3] - centre) / unit)

    def misfit(cameras: Cameras) -> Tensor:  # [T], root mean square
        return ((ray_distance(samples, cameras).square() * samples.weights).sum(-1) / samples.weights.sum(-1)).sqrt()

    error, explained = (geodesic_angle(cameras.rotation, truth.rotation) for cameras in (ours, oracle.cameras))
    fits = (misfit(ours) <= SAME_FIT * misfit(oracle.cameras) + EXACT_FIT) & (scene.report.behind < 0.5)
    return int(((error > explained + LIMIT) & ~fits).sum())


def wrong_with_known_focal(first: int, count: int, noise: float, relief: float = 0.0) -> int:
    planes = draw_planes(first, count, noise, focal := _focal_of(first), relief)
    options = RecoverOptions(alpha2=0, focal=WIDTH * focal)
    return count_wrong(planes, recover_scene(planes.pointmap, planes.valid, options), known=True)


def wrong_with_solved_focal(seed: int, noise: float, relief: float = 0.0) -> int:
    """One picture alone: no other frame helps."""
    planes = draw_planes(seed, 1, noise, _focal_of(seed), relief)
    scene = recover_scene(planes.pointmap, planes.valid, RecoverOptions(alpha2=0))
    return count_wrong(planes, scene, known=False)


def _focal_of(seed: int) -> float:
    """0.5 .. 2 longer sides."""
    return 0.5 * 4 ** (seed / 50 % 1)


@pytest.mark.parametrize("noise", NOISES)
def test_a_plane_shows_the_camera_of_known_focal(noise: float) -> None:
    assert wrong_with_known_focal(10, 40, noise) == 0


@pytest.mark.parametrize("noise", NOISES[::2])
def test_one_plane_alone_shows_camera_and_focal(noise: float) -> None:
    assert sum(wrong_with_solved_focal(seed, noise) for seed in range(5, 50, 8)) == 0


@pytest.mark.parametrize(
    ("noise", "seed"), [(1e-3, 102), (1e-3, 176), (1e-3, 979), (1e-2, 255), (1e-2, 262), (1e-2, 695)]
)
def test_a_plane_alone_keeps_the_closed_forms_vote_and_a_plain_lens(noise: float, seed: int) -> None:
    """These were wrong: distances hardly differ over a range of focal lengths, and one step promised a freer lens."""
    assert wrong_with_solved_focal(seed, noise) == 0


@pytest.mark.parametrize("relief", [1e-9, 1e-7, 1e-5, 1e-3, 1e-1])
@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_nearly_planar_frames_are_no_exception(relief: float, noise: float) -> None:
    assert wrong_with_known_focal(10, 40, noise, relief) == 0
    assert wrong_with_solved_focal(16, noise, relief) == 0


@pytest.mark.parametrize("count", [8, 12, 20])
@pytest.mark.parametrize("noise", [0.0, 1e-8, 1e-4])
def test_few_points_on_a_plane_are_enough(count: int, noise: float) -> None:
    generator = torch.Generator().manual_seed(count)
    frames, focal = 200, torch.tensor(0.8, dtype=torch.float64)
    x, y = torch.rand(2, count, generator=generator, dtype=torch.float64) - 0.5
    slope = torch.rand(2, frames, 1, generator=generator, dtype=torch.float64) - 0.5
    axis = torch.nn.functional.normalize(torch.randn(frames, 3, generator=generator, dtype=torch.float64), dim=-1)
    rotation = so3_exp(2 * axis)
    samples = Samples(torch.zeros(frames, count, 3).double(), torch.ones(frames, count).double(), x, y)
    points = rays(samples, focal) / (1 + slope[0] * x + slope[1] * y)[..., None]
    points = (points + noise * torch.randn(points.shape, generator=generator, dtype=torch.float64)) @ rotation
    samples = Samples(points, samples.weights, x, y)
    cameras = solve_poses(samples, focal.expand(frames))
    assert float(geodesic_angle(cameras.rotation, rotation).max()) <= max(1e-6, 100 * noise)


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISES)
def test_a_thousand_planes_show_the_camera_of_known_focal(noise: float) -> None:
    wrong = {first: wrong_with_known_focal(first, 40, noise) for first in range(0, 1000, 40)}
    assert not any(wrong.values()), wrong


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISES)
def test_each_of_a_thousand_planes_alone_shows_camera_and_focal(noise: float) -> None:
    wrong = [seed for seed in range(1000) if wrong_with_solved_focal(seed, noise)]
    assert not wrong, wrong
