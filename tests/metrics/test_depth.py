"""Laws of the depth metrics: numpy agrees, exact fits are optimal, alignments free what their name says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from one4d_pl.metrics import depth
from one4d_pl.metrics.depth import VideoDepthError, align_depth, depth_errors, score_depth


def sequence(seed: int = 0, frames: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """A noisy, scaled and shifted prediction, its target (holes, far and negative pixels) and a valid map."""
    generator = torch.Generator().manual_seed(seed)
    target = 1 + 90 * torch.rand(frames, 12, 16, generator=generator)
    noise = 0.2 * torch.randn(target.shape, generator=generator)
    preds = (target * noise.exp() - 2) / 7
    target[0, :2], target[1, 3], target[2, 4, :3] = 0, -1, math.nan
    valid = torch.rand(target.shape, generator=generator) < 0.9
    return preds, target, valid


def everywhere(values: Tensor) -> Tensor:
    return torch.ones_like(values, dtype=torch.bool)


def cost(preds: Tensor, target: Tensor, scale: float, shift: float) -> float:
    return float((scale * preds.double() + shift - target.double()).abs().sum())


def numpy_errors(p: np.ndarray, g: np.ndarray) -> dict[str, float]:
    safe = np.maximum(p, 1e-5)
    ratio = np.maximum(safe / g, g / safe)
    return {
        "abs_rel": np.mean(np.abs(p - g) / g),
        "sq_rel": np.mean((p - g) ** 2 / g),
        "rmse": np.sqrt(np.mean((p - g) ** 2)),
        "log_rmse": np.sqrt(np.mean((np.log(safe) - np.log(g)) ** 2)),
        "delta_1": np.mean(ratio < 1.25),
        "delta_2": np.mean(ratio < 1.25**2),
        "delta_3": np.mean(ratio < 1.25**3),
        "not_positive": np.mean(p <= 0),
    }


def programmed_optimum(p: np.ndarray, g: np.ndarray, free_shift: bool) -> float:
    """The least sum |s p + t - g|, s >= 0, by linear programming."""
    n = len(p)
    lines = np.stack([p, np.full(n, float(free_shift))], axis=1)
    bounds = [(0, None), (None, None)] + [(0, None)] * n
    slack = -np.eye(n)
    constraints = np.block([[lines, slack], [-lines, slack]])
    return linprog(np.r_[0, 0, np.ones(n)], constraints, np.r_[g, -g], bounds=bounds, method="highs").fun


@pytest.mark.parametrize("alignment", ["none", "scale", "scale_shift", "scale_shift_monst3r"])
def test_errors_equal_an_independent_numpy_computation(alignment):
    preds, target, valid = sequence()
    actual = score_depth(preds, target, valid, alignment)
    p, g = preds.numpy().astype(np.float64), target.numpy().astype(np.float64)
    with np.errstate(invalid="ignore"):
        scored = valid.numpy() & (g > 0)
    fit = align_depth(preds, target, torch.from_numpy(scored), alignment)
    assert int(actual.num_valid) == scored.sum() > 100
    for name, expected in numpy_errors(p[scored] * float(fit.scale) + float(fit.shift), g[scored]).items():
        assert float(getattr(actual, name)) == pytest.approx(expected, abs=1e-6), name


def test_each_error_of_one_pixel_is_worked_out_by_hand():
    errors = depth_errors(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 9.0]), torch.tensor([True, False]))
    assert (errors.abs_rel, errors.sq_rel, errors.rmse) == (0.5, 0.5, 1.0)
    assert float(errors.log_rmse) == pytest.approx(math.log(1.5))
    assert (errors.delta_1, errors.delta_2, errors.delta_3) == (0, 1, 1)  # 1.25 < 1.5 < 1.5625
    assert (errors.not_positive, errors.num_valid) == (0, 1)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("alignment", ["scale", "scale_shift"])
def test_exact_l1_fit_is_the_optimum_of_the_linear_program(alignment, seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 40))
    p = rng.normal(size=n) + 3 * (seed % 2)
    g = (-1 if seed % 5 == 0 else 1) * 2 * p + (0, 0.1, 1)[seed % 3] * rng.standard_cauchy(n)
    if seed % 4 == 0:
        p, g = p.round(1), g.round(1)  # ties
    if seed % 7 == 0:
        p[:] = p[0]
    preds, target = torch.tensor(p), torch.tensor(g)
    fit = align_depth(preds, target, everywhere(preds), alignment)
    best = programmed_optimum(p, g, alignment == "scale_shift")
    assert fit.scale >= 0
    assert cost(preds, target, float(fit.scale), float(fit.shift)) == pytest.approx(best, abs=1e-9 * np.abs(g).sum())


@pytest.mark.parametrize("kind", ["noisy", "outliers", "exact", "mirrored", "quantised", "constant", "misled"])
@pytest.mark.parametrize("alignment", ["scale", "scale_shift"])
def test_many_points_get_the_same_fit_as_without_a_sample(alignment, kind, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    preds = 0.5 + torch.rand(6001, generator=generator, dtype=torch.float64)
    noise = torch.randn(6001, generator=generator, dtype=torch.float64)
    target = 3 * preds + 1
    if kind == "noisy":
        target += 0.3 * noise
    elif kind == "outliers":
        target[::3] += 50 * noise[::3].abs()
    elif kind == "mirrored":
        target = 9 - target + 0.1 * noise
    elif kind == "quantised":
        preds, target = (10 * preds).round() / 10, (10 * target + noise).round() / 10
    elif kind == "constant":
        preds = torch.full_like(preds, 0.3)
    elif kind == "misled":
        target[::23] = 40  # every point of the sample, none of the others
    monkeypatch.setattr(depth, "SAMPLE_POINTS", 256)
    assert 6001 // 256 == 23
    sampled = align_depth(preds, target, everywhere(preds), alignment)
    monkeypatch.setattr(depth, "SAMPLE_POINTS", 1 << 20)
    direct = align_depth(preds, target, everywhere(preds), alignment)
    expected = cost(preds, target, float(direct.scale), float(direct.shift))
    actual = cost(preds, target, float(sampled.scale), float(sampled.shift))
    assert actual == pytest.approx(expected, abs=1e-12 * float(target.abs().sum()))


def test_published_adam_with_large_steps_ends_near_the_exact_fit_and_with_small_ones_near_its_start():
    preds, target, valid = sequence()
    valid &= target > 0
    exact = align_depth(preds, target, valid, "scale_shift")
    start = target[valid].median() / preds[valid].median()
    converged = align_depth(preds, target, valid, "scale_shift_geo4d")
    stuck = align_depth(preds, target, valid, "scale_shift_monst3r")
    best = cost(preds[valid], target[valid], float(exact.scale), float(exact.shift))
    stopped = cost(preds[valid], target[valid], float(converged.scale), float(converged.shift))
    assert best <= stopped <= 1.01 * best  # its early stop
    assert float(converged.scale) == pytest.approx(float(exact.scale), rel=0.01)
    assert 0 < abs(float(stuck.scale - start)) <= 0.101 and 0 < abs(float(stuck.shift)) <= 0.101


def test_adam_takes_the_published_number_of_steps_of_the_published_size():
    preds, target = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1e9])
    preds[2] = -1e6  # the gradient never changes its sign: each step of Adam is lr
    for alignment, lr, steps in (("scale_shift_monst3r", 1e-4, 1000), ("scale_shift_geo4d", 1e-2, 5000)):
        fit = align_depth(preds, target, everywhere(preds), alignment)
        assert float(fit.scale) == pytest.approx(1 - lr * steps, rel=1e-3)


def test_alignments_free_what_their_name_says():
    _, target, valid = sequence()
    scaled, shifted = 0.2 * target, 0.2 * target - 0.1
    perfect = {"none": [target], "scale": [target, scaled], "scale_shift": [target, scaled, shifted]}
    for alignment, cases in perfect.items():
        for case in (target, scaled, shifted):
            errors = score_depth(case, target, valid, alignment)
            solved = any(case is other for other in cases)
            assert (float(errors.abs_rel) < 1e-6) == solved, alignment
            assert not solved or errors.delta_1 == 1


def test_a_perfect_prediction_scores_exactly_zero():
    _, target, valid = sequence()
    for alignment in ("none", "scale"):
        errors = score_depth(target, target, valid, alignment)
        assert (errors.abs_rel, errors.rmse, errors.delta_1) == (0, 0, 1)


def test_a_mirrored_prediction_is_not_turned_round():
    _, target, valid = sequence()
    mirrored = 100 - target
    assert align_depth(mirrored, target, valid, "scale_shift").scale == 0
    assert score_depth(-target, target, valid, "scale").not_positive == 1


def test_depths_not_positive_are_reported_clamped_in_the_ratio_and_not_in_the_difference():
    preds, target = torch.tensor([[[-1.0, 2.0]]]), torch.tensor([[[1.0, 2.0]]])
    errors = score_depth(preds, target, everywhere(target), "none")
    assert (errors.not_positive, errors.abs_rel, errors.delta_3) == (0.5, 1.0, 0.5)
    assert float(errors.log_rmse) == pytest.approx(math.log(1e5) / math.sqrt(2))


@pytest.mark.parametrize("nothing", [math.nan, math.inf, -math.inf])
def test_a_prediction_that_is_not_finite_counts_as_zero_depth_and_does_not_touch_the_fit(nothing):
    _, target, valid = sequence()
    target[target.isnan()] = 0
    preds = 0.5 * target
    preds[0] = nothing
    errors = score_depth(preds, target, valid, "scale_shift")
    scored = valid & (target > 0)
    share = float(scored[0].sum() / scored.sum())
    assert float(errors.abs_rel) == pytest.approx(share, abs=1e-6)
    assert float(errors.not_positive) == pytest.approx(share)
    assert float(errors.delta_1) == pytest.approx(1 - share)


def test_the_fit_may_use_fewer_pixels_than_are_scored():
    _, target, valid = sequence()
    preds = target.clone()
    preds[1:] = 5
    fit_valid = torch.zeros_like(valid)
    fit_valid[0] = True
    errors = score_depth(preds, target, valid, "scale_shift", fit_valid=fit_valid)
    scored = valid & (target > 0)
    expected = ((5 - target).abs() / target)[1:][scored[1:]].sum() / scored.sum()
    assert float(errors.abs_rel) == pytest.approx(float(expected), rel=1e-5)


def test_sequences_are_weighted_by_their_scored_pixels():
    metric = VideoDepthError("scale")
    scores = []
    for seed, frames in enumerate((1, 3, 2)):
        preds, target, valid = sequence(seed, 3)
        preds, target, valid = preds[:frames], target[:frames], valid[:frames]
        metric.update(preds, target, valid)
        scores.append(score_depth(preds, target, valid, "scale"))
    weights = [int(s.num_valid) for s in scores]
    for name, value in metric.compute().items():
        expected = np.average([float(getattr(s, name)) for s in scores], weights=weights)
        assert float(value) == pytest.approx(expected, rel=1e-12), name
    assert len(set(weights)) == 3


def test_an_empty_frame_or_sequence_counts_for_nothing():
    preds, target, valid = sequence()
    valid[1] = False
    metric = VideoDepthError("scale_shift")
    metric.update(preds, target, valid)
    expected = metric.compute()
    metric.update(preds, target, torch.zeros_like(valid))
    metric.update(preds, torch.full_like(target, math.nan), valid)
    assert metric.compute() == expected
    assert score_depth(preds[[0, 2]], target[[0, 2]], valid[[0, 2]], "scale_shift").abs_rel == expected["abs_rel"]


def test_an_unknown_alignment_is_named():
    preds, target, valid = sequence()
    with pytest.raises(ValueError, match="'affine', need one of none, scale"):
        align_depth(preds, target, valid & (target > 0), "affine")
