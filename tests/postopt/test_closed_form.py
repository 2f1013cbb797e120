"""Laws of the closed form: votes and poses are exact where geometry allows, and it is said where not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from one4d_pl.geometry.camera import unproject
from one4d_pl.geometry.se3 import geodesic_angle, so3_exp
from one4d_pl.postopt.intrinsics import (
    Lens,
    Samples,
    camera_votes,
    focal_candidates,
    intrinsics_matrix,
    plane_votes,
    prior_focal,
    sample_grid,
    sample_medians,
)
from one4d_pl.postopt.trajectory import (
    Cameras,
    best_focal,
    fill_missing,
    ray_distance,
    rays,
    solvable_frames,
    solve_poses,
)

FOCAL = 0.8  # longer sides
FRAMES = 3


def seen_by(depth: Tensor, angle: float = 2.0) -> tuple[Samples, Cameras]:
    """Points at depth [T, N] on the rays of random pixels, in a world that is turned and shifted."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, depth.shape[1], generator=generator, dtype=torch.float64) - 0.5
    directions = torch.nn.functional.normalize(torch.randn(FRAMES, 3, generator=generator, dtype=torch.float64), dim=-1)
    rotation, centre = so3_exp(angle * directions), torch.randn(FRAMES, 3, generator=generator, dtype=torch.float64)
    empty = Samples(torch.zeros(*depth.shape, 3).double(), torch.ones_like(depth), x, y)
    points = (rays(empty, torch.tensor(FOCAL, dtype=torch.float64)) * depth[..., None]) @ rotation + centre[:, None]
    log_focal = torch.full((FRAMES,), math.log(FOCAL), dtype=torch.float64)
    return Samples(points, empty.weights, x, y), Cameras(log_focal, rotation, centre)


def relief() -> Tensor:
    return 1 + torch.rand(FRAMES, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_every_frame_votes_for_the_exact_focal():
    votes, lenses = camera_votes(seen_by(relief())[0])
    torch.testing.assert_close(votes, torch.full_like(votes, FOCAL), rtol=1e-9, atol=0)
    torch.testing.assert_close(lenses, torch.tensor([1.0, 0, 0]).double().expand(FRAMES, 3), rtol=0, atol=1e-8)


def test_a_plane_and_a_mirrored_scene_have_no_vote():
    samples, _ = seen_by(torch.ones(FRAMES, 200).double())
    assert bool(camera_votes(samples)[0].isnan().all())
    samples, _ = seen_by(relief())
    mirrored = Samples(-samples.points, samples.weights, samples.x, samples.y)
    assert bool(camera_votes(mirrored)[0].isnan().all())


def test_a_slanted_plane_votes_for_the_exact_focal_and_relief_does_not_vote_as_a_plane():
    pixels, _ = seen_by(relief())
    samples, _ = seen_by(1 / (0.6 + 0.3 * pixels.x - 0.2 * pixels.y).expand(FRAMES, -1))  # 1 / z is linear on a plane
    votes = plane_votes(samples)
    torch.testing.assert_close(votes, torch.full_like(votes, FOCAL), rtol=1e-9, atol=0)
    assert bool(plane_votes(pixels).isnan().all())


def test_the_vote_of_the_majority_stands_first_and_the_ladder_stands_in():
    votes = torch.tensor([0.8, 0.8, 7.0, math.nan], dtype=torch.float64)
    assert float(focal_candidates(votes, 0.9)[0]) == 0.8
    assert 0.9 in focal_candidates(torch.full((3,), math.nan, dtype=torch.float64), 0.9).tolist()


def test_the_best_candidate_is_the_true_focal():
    samples, _ = seen_by(relief())
    candidates = torch.tensor([0.3, 0.7, FOCAL, 0.9, 2.0], dtype=torch.float64)
    assert float(best_focal(samples, candidates)) == FOCAL


@pytest.mark.parametrize("angle", [0.0, 1e-3, 2.0, math.pi])
@pytest.mark.parametrize("planar", [False, True], ids=["relief", "plane"])
def test_poses_are_exact_for_the_known_focal(angle: float, planar: bool):
    depth = relief()
    samples, _ = seen_by(depth)
    if planar:
        depth = 1 / (0.6 + 0.3 * samples.x - 0.2 * samples.y).expand(FRAMES, -1)  # 1 / z is linear on a plane
    samples, truth = seen_by(depth, angle)
    cameras = solve_poses(samples, truth.log_focal.exp())
    torch.testing.assert_close(cameras.centre, truth.centre, rtol=0, atol=1e-6)
    assert float(geodesic_angle(cameras.rotation, truth.rotation).max()) <= 1e-6
    assert float(ray_distance(samples, cameras).max()) <= 1e-6


def test_poses_withstand_a_third_of_outliers():
    samples, truth = seen_by(relief())
    generator = torch.Generator().manual_seed(2)
    bad = torch.rand(FRAMES, 200, generator=generator) < 0.3
    anywhere = 4 * torch.rand(FRAMES, 200, 3, generator=generator, dtype=torch.float64) - 2
    spoilt = Samples(torch.where(bad[..., None], anywhere, samples.points), samples.weights, samples.x, samples.y)
    cameras = solve_poses(spoilt, truth.log_focal.exp())
    assert float(geodesic_angle(cameras.rotation, truth.rotation).max()) <= 1e-6


def test_frames_with_few_or_collinear_points_are_not_solvable():
    samples, _ = seen_by(relief())
    weights = samples.weights.clone()
    weights[0, 7:] = 0
    points = samples.points.clone()
    points[1] = torch.linspace(0, 1, 200).double()[:, None]
    assert solvable_frames(Samples(points, weights, samples.x, samples.y)).tolist() == [False, False, True]


def test_missing_poses_are_interpolated_inside_and_held_outside():
    turns = so3_exp(torch.tensor([[0.0, 0.1, 0], [0, 0.4, 0]], dtype=torch.float64))
    centre = torch.tensor([[0.0, 0, 0], [3, 0, 0]], dtype=torch.float64)
    known = Cameras(torch.tensor([0.0, 0.3], dtype=torch.float64), turns, centre)
    filled = fill_missing(known, torch.tensor([False, True, False, False, True, False]))
    torch.testing.assert_close(filled.centre[:, 0], torch.tensor([0.0, 0, 1, 2, 3, 3], dtype=torch.float64))
    torch.testing.assert_close(filled.log_focal, torch.tensor([0.0, 0, 0.1, 0.2, 0.3, 0.3], dtype=torch.float64))
    torch.testing.assert_close(filled.rotation[2], so3_exp(torch.tensor([0.0, 0.2, 0], dtype=torch.float64)))


# ---- samples


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 3), (24, 32), (41, 19)])
@pytest.mark.parametrize("sampler", [sample_grid, sample_medians])
def test_samples_of_a_plane_lie_on_the_rays_of_their_pixels(size: tuple[int, int], sampler) -> None:
    height, width = size
    intrinsics = intrinsics_matrix(torch.tensor([FOCAL], dtype=torch.float64), height, width, Lens(1.25))
    pointmap = unproject(torch.full((1, height, width), 2.0).double(), intrinsics)
    samples = sampler(pointmap, None, 100).through(Lens(1.25))
    camera = Cameras(
        torch.tensor([FOCAL], dtype=torch.float64).log(), torch.eye(3).double()[None], torch.zeros(1, 3).double()
    )
    assert 1 <= samples.weights.shape[1] <= 110  # about 100
    torch.testing.assert_close(ray_distance(samples, camera), torch.zeros_like(samples.weights), rtol=0, atol=1e-9)


def test_medians_outvote_four_of_nine_points_and_count_valid_ones_alone():
    pointmap = torch.ones(1, 3, 3, 3)
    pointmap[0, 0], pointmap[0, 1, 0] = 100, torch.nan
    samples = sample_medians(pointmap, None, 1)
    assert samples.points.tolist() == [[[1.0, 1.0, 1.0]]]
    assert float(samples.weights) == pytest.approx(8 / 9)
    only_bad = torch.zeros(1, 3, 3, dtype=torch.bool)
    only_bad[0, 0] = True
    assert sample_medians(pointmap, only_bad, 1).points.tolist() == [[[100.0, 100.0, 100.0]]]


def test_the_prior_spans_the_longer_side():
    for height, width, aspect in ((90, 160, 1.0), (160, 90, 1.0), (160, 90, 1.3)):
        matrix = intrinsics_matrix(torch.tensor(prior_focal(height, width, aspect)), height, width, Lens(aspect))
        focal, side = (matrix[0, 0], width) if width > height else (matrix[1, 1], height)
        assert math.degrees(2 * math.atan(side / 2 / float(focal))) == pytest.approx(60, abs=1e-4)
