"""Laws of the published alignments: plain autograd code and plain numpy agree, early stops and limits included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from one4d_pl.metrics import published_fits
from one4d_pl.metrics.depth import Alignment, DepthErrors, align_depth, depth_errors
from one4d_pl.metrics.published_fits import ADAM, MIN_SCALE, adam_scale_shift, weiszfeld_scale


def noisy_copy(seed: int, factor: float = 1.0) -> tuple[Tensor, Tensor]:  # [1, 40, 50] float32 each
    """A prediction with 20 % noise and its truth, 1 .. 60 m."""
    rng = np.random.default_rng(seed)
    target = rng.uniform(1, 60, (1, 40, 50)).astype(np.float32)
    preds = 0.05 * target * (1 + 0.2 * rng.standard_normal(target.shape)) + 0.01
    return factor * torch.from_numpy(preds.astype(np.float32)), torch.from_numpy(target)


def everywhere(values: Tensor) -> Tensor:
    return torch.ones_like(values, dtype=torch.bool)


def cut_errors(preds: Tensor, target: Tensor, alignment: Alignment) -> DepthErrors:
    """The errors of the aligned prediction, cut at 70 m as published."""
    fit = align_depth(preds, target, everywhere(target), alignment)
    return depth_errors(fit.apply(preds.double()).clamp(max=70), target, everywhere(target))


def by_autograd(points: Tensor, depths: Tensor, lr: float, steps: int) -> tuple[float, float, int]:
    """The fit in autograd's own operations, and how many steps it took."""
    scale = torch.tensor([float(depths.median() / points.median())], dtype=points.dtype, requires_grad=True)
    shift = torch.zeros_like(scale).requires_grad_()
    optimizer = torch.optim.Adam([scale, shift], lr=lr)
    losses: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (scale * points + shift - depths).abs().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) > 1 and abs(losses[-2] - losses[-1]) < 1e-6:
            break
    return scale.item(), shift.item(), len(losses)


@pytest.mark.parametrize("name", ADAM)
@pytest.mark.parametrize(
    ("factor", "dtype"),  # metres, as float64, mirrored, millimetres
    [(1, torch.float32), (1, torch.float64), (-1, torch.float32), (1000, torch.float32)],
)
def test_adam_equals_autograd_to_the_bit_whatever_the_pieces(name, factor, dtype, monkeypatch):
    preds, target = noisy_copy(26, factor)
    points, depths = preds.flatten(), target.flatten().to(dtype)
    expected = by_autograd(points, depths, *ADAM[name])
    for piece in (published_fits.CHUNK, 700):
        monkeypatch.setattr(published_fits, "CHUNK", piece)
        assert adam_scale_shift(points, depths, *ADAM[name]) == expected[:2]


def test_threads_change_nothing():
    rng = np.random.default_rng(1)
    depths = torch.from_numpy(rng.uniform(1, 60, 100_000).astype(np.float32))
    points = depths * torch.from_numpy(1 + 0.2 * rng.standard_normal(100_000, dtype=np.float32))
    fits = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        fits.append((adam_scale_shift(points, depths, 1e-2, 300), weiszfeld_scale(points, depths)))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert fits[0] == fits[1]


def test_the_early_stop_fires_in_float32_and_later_in_float64():
    preds, target = noisy_copy(25)
    points, depths = preds.flatten(), target.flatten()
    single, double = (by_autograd(points, d, *ADAM["scale_shift_geo4d"])[2] for d in (depths, depths.double()))
    assert single < double < 5000


@pytest.mark.parametrize(
    ("alignment", "factor", "abs_rel", "delta"),  # of the repositories' own functions on these inputs
    [
        ("scale_shift_geo4d", 1, 0.185216, 0.7085),
        ("scale_shift_geo4d", 1000, 0.179987, 0.7130),
        ("scale_shift_monst3r", 1, 0.169839, 0.7220),
        ("scale_shift_monst3r", 1000, 0.156838, 0.7325),
        ("scale_cut3r", 1, 0.157031, 0.7350),
        ("scale_cut3r", 1000, 0.157070, 0.7360),
    ],
)
def test_scores_are_those_of_the_published_code(alignment, factor, abs_rel, delta):
    errors = cut_errors(*noisy_copy(25, factor), alignment)
    assert float(errors.abs_rel) == pytest.approx(abs_rel, rel=1e-4)
    assert float(errors.delta_1) == pytest.approx(delta, rel=1e-4)


def test_a_mirrored_prediction_starts_adam_at_its_negative_ratio():
    target = noisy_copy(0)[1].flatten()[1:]  # an odd number: one median
    assert adam_scale_shift(-target, target, *ADAM["scale_shift_monst3r"]) == (-1, 0)


def test_weiszfeld_takes_ten_steps_from_the_ratio_of_means():
    points, depths = (each.flatten().double() for each in noisy_copy(7))  # in float32 each step magnifies rounding
    p, g = points.numpy(), depths.numpy()
    scale = g.mean() / p.mean()
    for _ in range(10):
        weights = 1 / (np.abs(scale * p - g) + 1e-8)
        scale = (weights * p * g).sum() / (weights * p**2).sum()
    assert weiszfeld_scale(points, depths) == pytest.approx(scale, rel=1e-9)


def test_weiszfeld_is_not_the_exact_fit_and_by_far_where_depth_spans_two_decades():
    rng = np.random.default_rng(0)
    target = torch.from_numpy(rng.uniform(0.5, 90, (2, 40, 50)).astype(np.float32))
    preds = torch.from_numpy(rng.uniform(0.1, 5, (2, 40, 50)).astype(np.float32))
    scored = target < 70
    published, exact = (float(cut_errors(preds[scored], target[scored], a).abs_rel) for a in ("scale_cut3r", "scale"))
    assert published == pytest.approx(1.729592, rel=1e-4)  # of the repository's own function
    assert published > 1.05 * exact


def test_weiszfeld_holds_its_scale_at_the_published_limit():
    preds, target = noisy_copy(0)
    for case in (-preds, 1e6 * preds, 0 * preds):
        fit = align_depth(case, target, everywhere(target), "scale_cut3r")
        assert (float(fit.scale), float(fit.shift)) == (MIN_SCALE, 0)
