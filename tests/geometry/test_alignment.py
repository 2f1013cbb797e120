"""Laws of closed-form alignment: known transforms are recovered, noise is fitted best, degenerate input is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from one4d_pl.geometry.alignment import Similarity, align_scale_shift, align_sim3
from one4d_pl.geometry.se3 import so3_exp

LEADS = [(), (2,), (2, 3)]
DTYPES = [torch.float32, torch.float64]
ATOL = {torch.float32: 2e-5, torch.float64: 1e-12}  # points and parameters of order one, 40 points
ALIGNMENTS = [align_scale_shift, align_sim3]


def random_points(lead: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, 40, 3, dtype=dtype, generator=generator) + torch.tensor([0.3, -0.2, 2.0], dtype=dtype)


def random_similarity(lead: tuple[int, ...], dtype: torch.dtype, angle: float, seed: int = 1) -> Similarity:
    generator = torch.Generator().manual_seed(seed)
    axis = torch.nn.functional.normalize(torch.randn(*lead, 3, dtype=dtype, generator=generator), dim=-1)
    scale = 0.5 + torch.rand(lead, dtype=dtype, generator=generator)
    return Similarity(scale, so3_exp(axis * angle), torch.randn(*lead, 3, dtype=dtype, generator=generator))


def everywhere(points: Tensor) -> Tensor:
    return torch.ones(points.shape[:-1], dtype=torch.bool)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("angle", [0.0, 1e-6, 1e-3, 1.0, math.pi - 1e-3, math.pi - 1e-6, math.pi])
def test_sim3_recovers_a_known_similarity(angle, lead, dtype):
    points, truth = random_points(lead, dtype), random_similarity(lead, dtype, angle)
    found = align_sim3(points, truth.apply(points), everywhere(points))
    torch.testing.assert_close(found.scale, truth.scale, rtol=0, atol=ATOL[dtype])
    torch.testing.assert_close(found.rotation, truth.rotation, rtol=0, atol=ATOL[dtype])
    torch.testing.assert_close(found.translation, truth.translation, rtol=0, atol=ATOL[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", LEADS)
def test_scale_and_shift_are_recovered_and_nothing_else_moves(lead, dtype):
    points, truth = random_points(lead, dtype), random_similarity(lead, dtype, 0.0)
    shifted = align_scale_shift(points, truth.apply(points), everywhere(points))
    torch.testing.assert_close(shifted.scale, truth.scale, rtol=0, atol=ATOL[dtype])
    torch.testing.assert_close(shifted.translation, truth.translation, rtol=0, atol=ATOL[dtype])
    assert torch.equal(shifted.rotation, torch.eye(3, dtype=dtype).expand(*lead, 3, 3))


@pytest.mark.parametrize("mirror", [1, -1])
@pytest.mark.parametrize("align", ALIGNMENTS)
def test_no_small_change_of_the_free_parameters_fits_better(align, mirror):
    points = random_points((), torch.float64)
    target = random_similarity((), torch.float64, 0.4).apply(points)
    target[:, 0] *= mirror  # the best rotation must not become a reflection, and the scale must know
    target = target + 0.3 * random_points((), torch.float64, 5)
    weights = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = align(points, target, weights)

    def cost(similarity: Similarity) -> float:
        return float((weights[:, None] * (similarity.apply(points) - target).square()).sum())

    best = cost(found)
    for step in (-1e-3, 1e-3):
        assert cost(Similarity(found.scale + step, found.rotation, found.translation)) > best
        for axis in torch.eye(3, dtype=torch.float64) * step:
            assert cost(Similarity(found.scale, found.rotation, found.translation + axis)) > best
            if align is align_sim3:
                assert cost(Similarity(found.scale, so3_exp(axis) @ found.rotation, found.translation)) > best


@pytest.mark.parametrize("align", ALIGNMENTS)
def test_points_without_weight_do_not_matter_even_if_nan(align):
    points, truth = random_points((2,), torch.float32), random_similarity((2,), torch.float32, 0.4)
    target, valid = truth.apply(points), everywhere(points)
    valid[:, 30:] = False
    expected = align(points[:, :30], target[:, :30], valid[:, :30])
    points[:, 30:35], target[:, 35:], points[:, 36] = math.nan, math.inf, 1e6
    actual = align(points, target, valid)
    torch.testing.assert_close(actual.apply(points[:, :30]), expected.apply(points[:, :30]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("align", ALIGNMENTS)
def test_a_weight_of_two_is_the_point_twice(align):
    points, target = random_points((), torch.float64), random_points((), torch.float64, 3)
    weights = torch.ones(40, dtype=torch.float64)
    weights[:10] = 2
    twice, target_twice = torch.cat([points, points[:10]]), torch.cat([target, target[:10]])
    expected = align(twice, target_twice, everywhere(twice))
    actual = align(points, target, weights)
    torch.testing.assert_close(actual.apply(points), expected.apply(points))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sim3_of_a_mirrored_or_flat_cloud_is_still_a_rotation(dtype):
    points = random_points((), dtype)
    mirror = torch.tensor([-1.0, 1.0, 1.0], dtype=dtype)
    assert torch.linalg.det(align_sim3(points, points * mirror, everywhere(points)).rotation) > 0.99
    flat, truth = points * torch.tensor([1.0, 1.0, 0.0], dtype=dtype), random_similarity((), dtype, 2.0)
    found = align_sim3(flat, truth.apply(flat), everywhere(flat))  # rank 2 determines the rotation
    torch.testing.assert_close(found.rotation, truth.rotation, rtol=0, atol=ATOL[dtype])


def test_a_mirrored_prediction_gets_scale_zero_not_a_negative_one():
    points = random_points((), torch.float64)
    assert align_scale_shift(-points, points, everywhere(points)).scale == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_sim3_refuses_collinear_points_and_one_camera_position(dtype):
    line = torch.linspace(-1, 1, 40, dtype=dtype)[:, None] * torch.tensor([0.3, -0.5, 0.7], dtype=dtype) + 3
    still = torch.full((40, 3), 0.1, dtype=dtype)
    cloud = random_points((), dtype)
    for preds, target in ((line, line), (cloud, line), (line, cloud), (still, cloud), (cloud[:2], cloud[:2])):
        with pytest.raises(ValueError, match="collinear"):
            align_sim3(preds, target, everywhere(preds))


@pytest.mark.parametrize("align", ALIGNMENTS)
def test_no_valid_point_in_any_one_of_the_batch_is_refused(align):
    points = random_points((2,), torch.float32)
    valid = everywhere(points)
    valid[1] = False
    with pytest.raises(ValueError, match="no valid point"):
        align(points, points, valid)


def test_scales_refuse_predictions_without_extent():
    cloud = random_points((), torch.float32)
    for number in range(2, 40):
        for value in (0.1, 0.7, 1e3 / 3):  # their mean is not exactly themselves
            still = torch.full((number, 3), value)
            with pytest.raises(ValueError, match="distinct"):
                align_scale_shift(still, cloud[:number], everywhere(still))


@pytest.mark.parametrize("align", ALIGNMENTS)
def test_bf16_autocast_does_not_touch_alignment(align):
    points, target = random_points((), torch.float32), random_points((), torch.float32, 4)
    expected = align(points, target, everywhere(points)).apply(points)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = align(points, target, everywhere(points)).apply(points)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
