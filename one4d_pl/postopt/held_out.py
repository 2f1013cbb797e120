"""Cross-validation of what a fit assumes: a smooth trajectory, one focal length, a plain lens.

The picture is cut into folds. All but one are fitted by one step from the same cameras, and the
data term of the one left out is the score; each fold is left out once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from one4d_pl.postopt.intrinsics import Samples
from one4d_pl.postopt.normal_equations import (
    NOISE_FLOOR,
    Noise,
    NormalEquations,
    Objective,
    SmoothnessTerm,
    assemble,
    linearise,
    measure_noise,
    smoothness,
    solve,
    weighted_normal,
)
from one4d_pl.postopt.refine import DAMPING, Linearised
from one4d_pl.postopt.trajectory import Cameras, ray_distance

_TILES = 8  # along each side of the picture
_CREDIBLE = 0.2  # of the loss of a fit without smoothing: a smaller gain on held-out pixels is chance
_ALPHA2_FACTORS = (1.0, 0.3, 0.1, 0.03, 0.0)
_PIXELS = 4000  # per frame, about, that decide on the intrinsics
_EXACT = 1e-12  # of the scene's unit: cost of a fold without errors
_MIN_GAIN = 2e-3  # share of the data term that an alternative must gain to be looked at further


def credible_alpha2(cameras: Cameras, samples: Samples, objective: Objective) -> tuple[float, Linearised | None]:
    """Return the smoothness weight that held-out pixels confirm, from alpha2 down to 0.

    The smoothness of Eq. 12 has a fixed weight, so with many pixels or a shaky camera it is a bias
    rather than a help. The folds are made of tiles, since errors of neighbouring pixels are alike.
    The second value is the data term at these cameras, None if it was not needed.
    """
    if objective.alpha2 == 0 or len(cameras.centre) == 1:
        return objective.alpha2, None
    noise = measure_noise(samples, cameras)
    if bool((noise.level < 3 * NOISE_FLOOR).all()):
        return 0.0, None  # exact points need no help
    shares, normals = [], []
    for fold in _tile_folds(samples):
        shares.append(float(fold.weights.sum() / samples.weights.sum()))
        normals.append(linearise(cameras, fold, noise, objective))
    if len(normals) < 2:
        return objective.alpha2, None
    unsmoothed = smoothness(cameras, replace(objective, alpha2=0.0))
    held_out = [assemble(normal, unsmoothed, objective) for normal in normals]
    scores = []
    for factor in _ALPHA2_FACTORS:
        smooth = smoothness(cameras, replace(objective, alpha2=factor * objective.alpha2))
        score = 0.0
        for number, fold_system in enumerate(held_out):
            fitted = assemble(_without(normals, number), smooth, objective)
            score += _model_cost(*fold_system, solve(*fitted, DAMPING))
        scores.append(score)
    best = min(range(len(scores)), key=scores.__getitem__)
    # The excess over each fold's own best fit has two sources: the errors of the pixels fitted, which smoothing may
    # reduce, and those of the fold itself. Divided by the number of folds it is the share of the former.
    own = sum(_model_cost(*fold_system, solve(*fold_system, DAMPING)) for fold_system in held_out)
    loss = (scores[-1] - own) / len(held_out)
    alpha2 = _ALPHA2_FACTORS[best] * objective.alpha2 if scores[-1] - scores[best] > _CREDIBLE * loss else 0.0
    return alpha2, Linearised(noise, weighted_normal(normals, shares))


def gains(
    cameras: Cameras, samples: Samples, noise: Noise, objective: Objective, alternatives: list[Objective]
) -> list[Tensor]:
    """Return by which share each alternative lowers the data term of held-out quarters: [Q] each.

    A wrong intrinsic is wrong in every quarter of the picture, so what corrects it in three helps in the fourth. Bent
    surfaces and correlated noise, which a freer fit follows as well, differ from quarter to quarter. All gains are 0
    where the points are exact, and where no alternative gains more than `_MIN_GAIN` on the very pixels that it fits.
    """
    samples = samples.pixels(slice(None, None, max(1, len(samples.x) // _PIXELS)))
    inside = ray_distance(samples, cameras) < noise.gate[:, None]  # without outliers, in the data term too
    samples = replace(samples, weights=samples.weights * inside)
    normals = [linearise(cameras, quarter, noise, objective, whole_lens=True) for quarter in _quarters(samples)]
    no_gains = [noise.level.new_zeros(max(1, len(normals))) for _ in alternatives]
    if len(normals) < 2 or bool((noise.level < 3 * NOISE_FLOOR).all()):
        return no_gains
    smooth = smoothness(cameras, objective)
    unsmoothed = smoothness(cameras, replace(objective, alpha2=0.0))
    before = _changes(normals, smooth, unsmoothed, objective)
    freest = max(alternatives, key=lambda one: (one.focal_mode != objective.focal_mode, len(one.lens_columns)))
    after = {freest: _changes(normals, smooth, unsmoothed, freest)}
    if float((before[0] - after[freest][0]).mean()) < _MIN_GAIN:
        return no_gains
    after |= {one: _changes(normals, smooth, unsmoothed, one) for one in alternatives if one != freest}
    return [before[1] - after[one][1] for one in alternatives]


def _changes(
    normals: list[NormalEquations], smooth: SmoothnessTerm, unsmoothed: SmoothnessTerm, objective: Objective
) -> tuple[Tensor, Tensor]:  # [Q] each
    """Take a step for all folds but one; return the relative change of the data term in both.

    First in the folds fitted, then in the one held out; each fold is held out once.
    """
    changes = []
    for number, held_out in enumerate(normals):
        fitted = _without(normals, number)
        step = solve(*assemble(fitted, smooth, objective), DAMPING)
        costs = [_model_cost(*assemble(one, unsmoothed, objective), step) for one in (fitted, held_out)]
        changes.append([change / max(float(one.cost), _EXACT) for change, one in zip(costs, (fitted, held_out))])
    inside, left_out = torch.tensor(changes, dtype=torch.float64).T
    return inside, left_out


def _quarters(samples: Samples) -> Iterator[Samples]:
    """Yield the samples of each quarter of the picture that has weight."""
    right, below = samples.x > samples.x.median(), samples.y > samples.y.median()
    quarters = (samples.pixels(one & two) for one in (right, ~right) for two in (below, ~below))
    yield from (quarter for quarter in quarters if bool((quarter.weights > 0).any()))


def _tile_folds(samples: Samples) -> Iterator[Samples]:
    """Yield the samples in four folds of interleaved tiles, one at a time to bound the memory.

    Folds without weight are left out.
    """
    tile = [((p - p.amin()) / (p.amax() - p.amin()).clamp_min(1e-12) * _TILES).long() for p in (samples.x, samples.y)]
    fold_of = (tile[0] + 2 * tile[1]) % 4
    folds = (samples.pixels(fold_of == number) for number in range(4))
    yield from (fold for fold in folds if bool((fold.weights > 0).any()))


def _without(normals: list[NormalEquations], number: int) -> NormalEquations:
    """Return the mean of all folds but one."""
    others = normals[:number] + normals[number + 1 :]
    return weighted_normal(others, [1 / len(others)] * len(others))


def _model_cost(matrix: Tensor, gradient: Tensor, step: Tensor) -> float:
    """Return the change of a quadratic model by a step."""
    return float(gradient @ step + step @ matrix @ step / 2)
