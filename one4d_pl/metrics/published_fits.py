"""Depth alignments as published code computes them: start, steps, precision and early stop.

Adam        MonST3R and Geo4D. It minimises sum |s p + t - g| from the ratio of medians and shift 0,
            and stops once the sum changes by less than 1e-6 from one step to the next. Float32 sums
            above 16 differ by more than that or not at all, and Adam becomes slow enough to repeat
            a sum long before it reaches the minimum.
Weiszfeld   CUT3R. Ten reweighted least squares for one scale, which end near the exact L1 fit.

Precision is part of the protocol and follows the arguments: Sintel's truth is float32, Bonn's is float64 in MonST3R and
CUT3R and float32 in Geo4D, predictions are float32 in all. Sums are torch's own, over all points in their order, by one
thread: on a CPU the results equal those of plain autograd code to the last bit, however many processes score. They are
no more portable than that. Where Adam stops depends on how a sum is rounded, so another vector width, more threads or a
GPU may end elsewhere: sums in float64, rounded to float32, moved AbsRel by 0.1 % in the median of twelve Geo4D fits, by
1.2 % at worst.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

ADAM = {  # learning rate, number of steps at most
    "scale_shift_monst3r": (1e-4, 1000),
    "scale_shift_geo4d": (1e-2, 5000),
}
STOP_CHANGE = 1e-6  # of the sum of absolute errors, unit of the target; a smaller change ends the fit
WEISZFELD_STEPS = 10
WEISZFELD_EPSILON = 1e-8  # added to a residual, unit of the target
MIN_SCALE = 1e-3  # the Weiszfeld fit gives no smaller one
CHUNK = 1 << 17  # points at a time: their temporaries fit into the CPU's cache


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run with one thread within: torch's sums over many points depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def adam_scale_shift(
    points: Tensor,  # [N] finite, N > 0; its dtype is that of scale and shift
    depths: Tensor,  # [N]
    lr: float,
    steps: int,
) -> tuple[float, float]:
    """Fit scale and shift by Adam, which may stop early; nothing keeps the scale positive."""
    middle = points.median()
    scale_shift = points.new_tensor([float(depths.median() / middle) if middle != 0 else 0.0, 0.0])
    optimizer = torch.optim.Adam([scale_shift], lr=lr)
    absolute_errors = _AbsoluteErrors(points, depths)
    previous = math.nan
    for _ in range(steps):
        loss, scale_shift.grad = absolute_errors.evaluate(scale_shift)
        optimizer.step()
        if abs(previous - loss) < STOP_CHANGE:  # as published: after the step
            break
        previous = loss
    return float(scale_shift[0]), float(scale_shift[1])


@_one_thread()
def weiszfeld_scale(
    points: Tensor,  # [N] finite, N > 0
    depths: Tensor,  # [N]
) -> float:
    """Fit one scale by ten Weiszfeld steps from the ratio of means; at least 1e-3."""
    scale = depths.nanmean() / points.nanmean()
    for _ in range(WEISZFELD_STEPS):
        weights = (scale * points - depths).abs_().add_(WEISZFELD_EPSILON).reciprocal_()
        scale = (weights * points).mul_(depths).sum() / weights.mul_(points.square()).sum()
    value = float(scale)
    return max(value, MIN_SCALE) if math.isfinite(value) else MIN_SCALE  # all depths are 0


class _AbsoluteErrors:
    """The sum of |s p + t - g| and its gradient, in two buffers that every step reuses."""

    def __init__(self, points: Tensor, depths: Tensor) -> None:
        self.errors = torch.empty_like(points, dtype=torch.promote_types(points.dtype, depths.dtype))  # [N]
        self.signed = torch.empty_like(points)  # [N], sign · p
        self.chunks = list(zip(*(each.split(CHUNK) for each in (points, depths, self.errors, self.signed))))

    def evaluate(self, scale_shift: Tensor) -> tuple[float, Tensor]:  # [2], scale and shift -> sum, [2]
        """Return sum and gradient, rounded wherever plain autograd code rounds."""
        scale, shift = scale_shift.tolist()
        sign_sum = 0.0  # whole numbers: exact in any order
        for points, depths, errors, signed in self.chunks:
            torch.mul(points, scale, out=signed).add_(shift)
            torch.sub(signed, depths, out=errors)
            signed.copy_(errors).sign_()  # rounding to float32 makes no difference of depths zero
            errors.abs_()
            sign_sum += float(signed.sum())
            signed.mul_(points)
        return float(self.errors.sum()), scale_shift.new_tensor([float(self.signed.sum()), sign_sum])
