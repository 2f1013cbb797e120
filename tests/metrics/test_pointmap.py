"""Laws of the pointmap metrics: known errors come out, alignments free what they name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from one4d_pl.geometry.alignment import Similarity
from one4d_pl.geometry.se3 import so3_exp
from one4d_pl.metrics.pointmap import PointmapError, align_pointmap, pointmap_errors


def clip(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A random pointmap [T, H, W, 3] two to eight units away, a valid and a moving map."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(3, 8, 10, 3, generator=generator) * torch.tensor([4.0, 4.0, 6.0]) + torch.tensor([-2.0, -2, 2])
    valid = torch.rand(3, 8, 10, generator=generator) < 0.8
    return points, valid, torch.rand(3, 8, 10, generator=generator) < 0.2


def test_a_relative_error_is_the_distance_of_the_points_over_the_distance_from_camera_0():
    target = torch.tensor([[0.0, 0, 1], [0, 0, 2], [3, 0, 4], [0, 0, 2]]).view(1, 1, 4, 3).repeat(1, 5, 1, 1)
    target, valid = torch.cat([-target, target]), torch.ones(2, 5, 4, dtype=torch.bool)
    offset = torch.tensor([0.0, 0.01, 0.0])
    preds = target + torch.stack([offset, -offset]).view(2, 1, 1, 3)  # no scale fits this much better
    errors = pointmap_errors(preds, target, valid, None)
    assert float(errors.rel_error) == pytest.approx((0.01 + 0.005 + 0.002 + 0.005) / 4, rel=1e-3)
    assert errors.inliers == 1 and errors.num_moving == 0 and not errors.collapsed


def test_scale_and_shift_are_free_and_the_rotation_is_not():
    target, valid, moving = clip()
    eye = torch.eye(3)
    shift, turn = torch.tensor([0.3, -0.4, 1.0]), so3_exp(torch.tensor([0.2, 0.5, -0.3]))
    for rotation, free in ((eye, True), (turn, False)):
        preds = Similarity(torch.tensor(0.2), rotation, shift).apply(target.flatten(0, 2)).view_as(target)
        assert (pointmap_errors(preds, target, valid, moving).rel_error < 1e-5) == free


def test_no_unit_of_the_clip_changes_the_error():
    target, valid, moving = clip()
    preds = target + 0.3 * torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    expected = pointmap_errors(preds, target, valid, moving)
    actual = pointmap_errors(7 * preds, 1000 * target, valid, moving)
    assert float(actual.rel_error) == pytest.approx(float(expected.rel_error), rel=1e-4)
    assert 0.01 < expected.rel_error < 0.2


def test_the_alignment_minimises_squared_relative_errors():
    target, valid, _ = clip()
    preds = target + 0.5 * torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    fit, _ = align_pointmap(preds, target, valid)

    def cost(factor: float) -> float:
        changed = Similarity(fit.scale * factor, fit.rotation, fit.translation)
        error = changed.apply(preds[valid].double()) - target[valid]
        return float((error / target[valid].norm(dim=-1, keepdim=True)).square().sum())

    assert cost(1.0) < min(cost(0.999), cost(1.001))


def test_moving_points_are_measured_alone_after_the_alignment_of_all():
    target, valid, _ = clip()
    moving = torch.zeros_like(valid)
    moving[:, 2, 3] = True
    valid[:, 2, 3] = True
    preds = target.clone()
    preds[moving] *= 2
    errors = pointmap_errors(preds, target, valid, moving)
    assert errors.num_moving == 3 and errors.inliers_moving == 0
    assert 0.8 < errors.rel_error_moving < 1 and errors.rel_error < 0.1
    assert float(errors.inliers) == pytest.approx(1 - 3 / float(errors.num_valid))


def test_invalid_points_do_not_matter_and_missing_predictions_have_error_one():
    target, valid, moving = clip()
    preds = 0.5 * target
    preds[~valid], expected = math.nan, int(valid.sum())
    errors = pointmap_errors(preds, target, valid, moving)
    assert errors.rel_error < 1e-5 and errors.num_valid == expected
    target[~valid], preds[0] = math.inf, math.nan
    errors = pointmap_errors(preds, target, valid, moving)
    missing = float(valid[0].sum() / valid.sum())
    assert float(errors.rel_error) == pytest.approx(missing, abs=1e-5)
    assert float(errors.inliers) == pytest.approx(1 - missing)


def test_a_collapsed_prediction_is_told_and_gets_the_best_of_what_is_left():
    target, valid, moving = clip()
    line = torch.ones_like(target) * target[..., 2:]
    for preds, collapsed in ((torch.zeros_like(target), True), (line, False)):
        errors = pointmap_errors(preds, target, valid, moving)
        assert errors.collapsed == collapsed and 0.1 < errors.rel_error < 1
    nothing = pointmap_errors(torch.full_like(target, math.nan), target, valid, moving)
    assert nothing.collapsed and nothing.rel_error == 1


def test_a_point_at_camera_0_cannot_outweigh_the_clip():
    target, valid, moving = clip()
    valid[0, 0, 0], target[0, 0, 0] = True, torch.tensor([0.0, 0.0, 1e-9])
    preds = target.clone()
    preds[0, 0, 0] += 0.1
    assert pointmap_errors(preds, target, valid, moving).rel_error < 0.02


def test_clips_count_once_each_and_empty_ones_not_at_all():
    target, valid, moving = clip()
    targets, valids = torch.stack([target] * 4), torch.stack([valid] * 4)
    noise = torch.randn(targets.shape, generator=torch.Generator().manual_seed(1))
    preds, movings = targets + 0.3 * noise, torch.stack([moving] * 4)
    valids[0] = False
    valids[1, 1:] = False
    movings[2] = False
    metric = PointmapError()
    metric.update(preds[:1], targets[:1], valids[:1], movings[:1])
    metric.update(preds[1:], targets[1:], valids[1:], movings[1:])
    each = [pointmap_errors(preds[i], targets[i], valids[i], movings[i]) for i in range(4)]
    result = metric.compute()
    assert float(result["rel_error"]) == pytest.approx(sum(float(e.rel_error) for e in each[1:]) / 3)
    assert float(result["inliers"]) == pytest.approx(sum(float(e.inliers) for e in each[1:]) / 3)
    moving_mean = (float(each[1].rel_error_moving) + float(each[3].rel_error_moving)) / 2
    assert float(result["rel_error_moving"]) == pytest.approx(moving_mean)
    assert result["collapsed"] == 0
