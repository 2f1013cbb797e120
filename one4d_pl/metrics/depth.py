"""Video depth against ground truth by the field's protocols.

Errors are AbsRel, SqRel, RMSE, log RMSE and δ < 1.25^k.

1. Scored are the pixels with 0 < target < max_depth, whatever was predicted there.
2. One alignment per sequence, in depth (not disparity), named by what is free; the fit may use fewer of these pixels.
3. The aligned prediction may be cut from above (post_clip), never from below. A depth <= 0 counts as 1e-5 in the
   logarithmic and ratio errors, and the share of such depths is reported. A prediction that is not finite counts as 0:
   a missing answer must not improve the mean.
4. Each error is a mean over the pixels of its sequence; sequences are averaged with their pixel count as weight.

The L1 fits are exact (a convex, piecewise linear problem). Published code stops earlier, so its result depends on the
unit of the prediction and on rounding. Its fits are in `published_fits`, to match printed numbers.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

from one4d_pl.metrics.published_fits import ADAM, adam_scale_shift, weiszfeld_scale

Alignment = Literal["none", "scale", "scale_shift", "scale_cut3r", "scale_shift_monst3r", "scale_shift_geo4d"]

MIN_DEPTH = 1e-5  # smallest depth in a ratio or a logarithm
CHUNK = 1 << 20  # pixels lifted to float64 at a time
SAMPLE_POINTS = 1 << 16  # points that the first guess of an exact fit uses


@dataclass(frozen=True)
class ScaleShift:
    """The map depth -> scale · depth + shift."""

    scale: Tensor  # scalar, float64
    shift: Tensor  # scalar, float64, unit of the target

    def apply(self, depth: Tensor) -> Tensor:  # [...] -> [...], dtype kept
        """Map every depth."""
        return depth * self.scale.to(depth.dtype) + self.shift.to(depth.dtype)


@dataclass(frozen=True)
class DepthErrors:
    """Means over the scored pixels of one sequence; all 0 where there is none."""

    num_valid: Tensor  # scored pixels
    abs_rel: Tensor  # |p - g| / g
    sq_rel: Tensor  # (p - g)² / g, unit of the target
    rmse: Tensor  # root of the mean (p - g)², unit of the target
    log_rmse: Tensor  # root of the mean (ln p - ln g)²
    delta_1: Tensor  # share with max(p / g, g / p) < 1.25
    delta_2: Tensor  # < 1.25²
    delta_3: Tensor  # < 1.25³
    not_positive: Tensor  # share of aligned depths <= 0 or not finite


ERROR_NAMES = tuple(DepthErrors.__dataclass_fields__)[1:]


def align_depth(
    preds: Tensor,  # [...], one sequence of any shape
    target: Tensor,  # [...]
    valid: Tensor,  # [...] bool
    alignment: Alignment,
) -> ScaleShift:
    """Fit target ≈ scale · preds + shift over the valid pixels of a sequence.

    none: 1 and 0. scale, scale_shift: the least sum of absolute errors with scale >= 0. The others are
    `published_fits`, in the precision of preds and target. Where nothing can be fitted (no valid pixel with a finite
    prediction) the result is the identity. ValueError for an unknown alignment.
    """
    usable = valid & preds.isfinite() & target.isfinite()
    points, depths = preds[usable], target[usable]  # [N]
    scale, shift = 1.0, 0.0
    if alignment == "none" or points.numel() == 0:
        pass
    elif alignment in ("scale", "scale_shift"):
        scale, shift = _fit_l1(points, depths, free_shift=alignment == "scale_shift")
    elif alignment in ADAM:
        scale, shift = adam_scale_shift(points, depths, *ADAM[alignment])
    elif alignment == "scale_cut3r":
        scale = weiszfeld_scale(points, depths)
    else:
        raise ValueError(f"depth alignment {alignment!r}, need one of {', '.join(get_args(Alignment))}")
    return ScaleShift(*preds.new_tensor([scale, shift], dtype=torch.float64))


def depth_errors(
    preds: Tensor,  # [...], aligned, one sequence of any shape
    target: Tensor,  # [...], > 0 where valid
    valid: Tensor,  # [...] bool
) -> DepthErrors:
    """Measure all errors over the valid pixels of one sequence, chunk by chunk in float64 (steps 3 and 4)."""
    preds, target = preds[valid], target[valid]
    totals = torch.zeros(len(ERROR_NAMES), dtype=torch.float64, device=preds.device)
    for p, g in zip(preds.split(CHUNK), target.split(CHUNK)):
        p, g = p.double(), g.double()
        p = torch.where(p.isfinite(), p, 0)
        error, positive = p - g, p.clamp(min=MIN_DEPTH)
        ratio = torch.maximum(positive / g, g / positive)
        within = [(ratio < 1.25**k).double() for k in (1, 2, 3)]
        squared, squared_log = error.square(), (positive.log() - g.log()).square()
        per_pixel = [error.abs() / g, squared / g, squared, squared_log, *within, (p <= 0).double()]
        totals += torch.stack([values.sum() for values in per_pixel])
    means = totals / max(1, preds.numel())
    means[2:4] = means[2:4].sqrt()  # rmse, log_rmse
    return DepthErrors(torch.tensor(preds.numel(), device=preds.device), *means)


def score_depth(
    preds: Tensor,  # [T, H, W], one sequence, any unit that the alignment frees
    target: Tensor,  # [T, H, W]
    valid: Tensor,  # [T, H, W] bool
    alignment: Alignment,
    fit_valid: Tensor | None = None,  # [T, H, W] bool, pixels that the fit may use; None = all scored ones
) -> DepthErrors:
    """Align one sequence and score it, without limits of depth."""
    scored = valid & target.isfinite() & (target > 0)
    fit = align_depth(preds, target, scored if fit_valid is None else scored & fit_valid, alignment)
    return depth_errors(fit.apply(preds.double()), target, scored)


class VideoDepthError(Metric):
    """Mean over sequences of every error of `score_depth`, weighted by scored pixels. nan before any pixel."""

    higher_is_better, full_state_update = False, False
    totals: Tensor
    num_valid: Tensor

    def __init__(self, alignment: Alignment) -> None:
        super().__init__()
        self.alignment: Alignment = alignment
        self.add_state("totals", torch.zeros(len(ERROR_NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_valid", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, valid: Tensor) -> None:
        """Add one sequence, [T, H, W] each."""
        num_valid, *means = astuple(score_depth(preds, target, valid, self.alignment))
        self.totals += torch.stack(means) * num_valid
        self.num_valid += num_valid

    def compute(self) -> dict[str, Tensor]:
        """Return one scalar per field of `DepthErrors` but the count."""
        return dict(zip(ERROR_NAMES, self.totals / self.num_valid))


@dataclass
class _Residuals:
    """min over t of sum |g - s p - t|, a function of s, over points whose sign is not known yet.

    Once s is known to lie in a bracket, a point on the same side of the line for every s in it adds a constant to the
    derivative and is dropped: after a few steps almost none are left, whatever N was.
    """

    points: Tensor  # [N] float64
    depths: Tensor  # [N] float64
    free_shift: bool
    rank: int  # of the median residual among the points left, from 1
    excess: int = 0  # dropped points above the line minus those below
    moment: float = 0.0  # sum of sign · p over the dropped points

    def shift(self, scale: float) -> float:
        """Return the best t at this scale: the lower median of the residuals."""
        return self._best_shift(self.depths - scale * self.points)

    def derivative(self, scale: float) -> float:
        """Return a subgradient in s at this scale.

        Points on the line share the sign for which the subgradient in t vanishes.
        """
        residuals = self.depths - scale * self.points
        sign = (residuals - self._best_shift(residuals)).sign()
        moment = self.moment + float((sign * self.points).sum())
        if self.free_shift:
            on_line = sign == 0
            unbalanced = self.excess + float(sign.sum())
            moment -= unbalanced * float(self.points[on_line].mean())
        return -moment

    def narrow(self, low: float, high: float) -> None:
        """Drop the points that stay on one side of the line for every scale in [low, high]."""
        first, last = self.depths - low * self.points, self.depths - high * self.points
        lower, upper = torch.minimum(first, last), torch.maximum(first, last)
        below, above = upper < self._best_shift(lower), lower > self._best_shift(upper)
        self.moment += float(self.points[above].sum() - self.points[below].sum())
        self.excess += int(above.sum()) - int(below.sum())
        self.rank -= int(below.sum())
        undecided = ~(below | above)
        self.points, self.depths = self.points[undecided], self.depths[undecided]

    def _best_shift(self, residuals: Tensor) -> float:
        return float(residuals.kthvalue(self.rank).values) if self.free_shift else 0.0


def _fit_l1(points: Tensor, depths: Tensor, free_shift: bool) -> tuple[float, float]:  # [N] each, N > 0
    """Find the (s, t) of least sum |g - s p - t| with s >= 0, to the last bits of float64.

    With many points a regular sample is fitted first, and a box is put around its (s, t). Inside
    the box most residuals cannot change sign and become constants of the derivative; the rest is a
    small problem that equals the large one there. If its minimum lies inside the box, it is the
    minimum of the whole (the sum is convex); if not, the box was too small and grows.
    """
    step = max(1, len(points) // SAMPLE_POINTS)
    sample, sample_depths = points[::step].double(), depths[::step].double()
    centre = float(sample.median()) if free_shift else 0.0  # centring decouples shift from scale
    middle = float(sample_depths.median()) if free_shift else 0.0
    sample = sample - centre
    size = float(sample.abs().mean()) or 1.0
    spread = float((sample_depths - middle).abs().mean())
    residuals = _Residuals(sample, sample_depths, free_shift, rank=(len(sample) + 1) // 2)
    scale, shift = _minimise(residuals, guess=spread / size)
    if step > 1:
        # a sample that fits perfectly still needs a box larger than nothing
        rounding = 1e-15 * (float(sample_depths.abs().mean()) or 1.0)
        spread = max(float((sample_depths - scale * sample - shift).abs().mean()), rounding)
        width = 8 / len(sample) ** 0.5  # some eight standard errors of the sample's fit
        guess, guess_shift, inside = scale, shift, False
        while not inside:
            box = (width * spread / size, width * spread if free_shift else 0.0)
            width *= 8
            residuals = _restrict_to_box(points, depths, centre, (guess, guess_shift), box, free_shift)
            if free_shift and not 1 <= residuals.rank <= len(residuals.points):
                continue  # no line of the box has half of the points below
            scale, shift = _minimise(residuals, guess, box[0])
            inside = abs(scale - guess) < box[0] and (not free_shift or abs(shift - guess_shift) < box[1])
    return scale, shift - scale * centre


def _restrict_to_box(
    points: Tensor,  # [N]
    depths: Tensor,  # [N]
    centre: float,
    guess: tuple[float, float],  # scale and shift of centred points
    box: tuple[float, float],  # half-widths in scale and shift
    free_shift: bool,
) -> _Residuals:
    """Keep the points whose residual may change sign within the box; sum up the others.

    It goes chunk by chunk, in float64.
    """
    kept_points, kept_depths = [], []
    num_below = num_above = 0
    moment = 0.0
    for p, g in zip(points.split(CHUNK), depths.split(CHUNK)):
        p, g = p.double() - centre, g.double()
        residuals, reach = g - guess[0] * p - guess[1], box[0] * p.abs() + box[1]
        above, below = residuals > reach, residuals < -reach
        num_above, num_below = num_above + int(above.sum()), num_below + int(below.sum())
        moment += float(p[above].sum() - p[below].sum())
        undecided = ~(above | below)
        kept_points.append(p[undecided])
        kept_depths.append(g[undecided])
    rank = (len(points) + 1) // 2 - num_below
    excess = num_above - num_below
    return _Residuals(torch.cat(kept_points), torch.cat(kept_depths), free_shift, rank, excess, moment)


def _minimise(residuals: _Residuals, guess: float, reach: float = math.inf) -> tuple[float, float]:
    """Find the scale where the derivative changes its sign, and the shift there.

    The scale is >= 0 and within `reach` of the guess.
    """
    lowest, highest = max(0.0, guess - reach), guess + reach
    low = high = guess
    width = 0.01 * guess or 1.0
    slope = residuals.derivative(guess)
    while slope > 0:  # the derivative grows with the scale
        if low == lowest:
            return low, residuals.shift(low)
        low, high, width = max(lowest, low - width), low, 8 * width
        slope = residuals.derivative(low)
    if low == high:
        while slope < 0:
            if high == highest:
                return high, residuals.shift(high)
            low, high, width = high, min(highest, high + width), 8 * width
            slope = residuals.derivative(high)
    while low < (middle := (low + high) / 2) < high:
        residuals.narrow(low, high)
        slope = residuals.derivative(middle)
        low, high = (low, middle) if slope > 0 else (middle, high)
    return high, residuals.shift(high)
