"""What pixels left out of a fit say of what it assumes: a smooth trajectory, one focal length, a plain lens.

The picture is cut into parts. All but one are fitted by one step from the same cameras, and the data term of that one
is the judge, each part once.
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
    Normal,
    Objective,
    Smooth,
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
_CREDIBLE = 0.2  # of the errors of a fit without smoothing: a smaller gain on left-out pixels is chance
_ALPHA2_PARTS = (1.0, 0.3, 0.1, 0.03, 0.0)
_WITNESSES = 4000  # pixels per frame that are asked about the intrinsics, about
_EXACT = 1e-12  # of the scene's unit: cost of a part without errors
_TRIFLE = 2e-3  # share of the data term: a smaller gain is not worth a second look


def credible_alpha2(cameras: Cameras, samples: Samples, objective: Objective) -> tuple[float, Linearised | None]:
    """The largest part of alpha2, down to none, that pixels left out of the fit confirm; the data term, if computed.

    The smoothness of Eq. 12 has a fixed weight, so many pixels or much tremble make it a bias rather than a help. The
    picture is cut into tiles (errors of neighbouring pixels are alike) of four sorts. Three sorts are fitted by one
    step from the same cameras with parts of alpha2, and the data term of the fourth is the judge, each sort once.
    """
    if objective.alpha2 == 0 or len(cameras.centre) == 1:
        return objective.alpha2, None
    noise = measure_noise(samples, cameras)
    if bool((noise.level < 3 * NOISE_FLOOR).all()):
        return 0.0, None  # exact points need no help
    shares, normals = [], []
    for part in _tiles(samples):
        shares.append(float(part.weights.sum() / samples.weights.sum()))
        normals.append(linearise(cameras, part, noise, objective))
    if len(normals) < 2:
        return objective.alpha2, None
    nothing = smoothness(cameras, replace(objective, alpha2=0.0))
    judges = [assemble(normal, nothing, objective) for normal in normals]
    scores = []
    for share in _ALPHA2_PARTS:
        smooth = smoothness(cameras, replace(objective, alpha2=share * objective.alpha2))
        score = 0.0
        for number, judge in enumerate(judges):
            others = normals[:number] + normals[number + 1 :]
            fitted = weighted_normal(others, [1 / len(others)] * len(others))
            score += _model_cost(*judge, solve(*assemble(fitted, smooth, objective), DAMPING))
        scores.append(score)
    best = min(range(len(scores)), key=scores.__getitem__)
    # What a fit without smoothing loses against the judge's own best: one part its own errors, the others the judge's.
    own = sum(_model_cost(*judge, solve(*judge, DAMPING)) for judge in judges)
    loss = (scores[-1] - own) / len(judges)
    alpha2 = _ALPHA2_PARTS[best] * objective.alpha2 if scores[-1] - scores[best] > _CREDIBLE * loss else 0.0
    return alpha2, Linearised(noise, weighted_normal(normals, shares))


def gains(
    cameras: Cameras, samples: Samples, noise: Noise, objective: Objective, alternatives: list[Objective]
) -> list[Tensor]:
    """By which share of the data term each alternative lowers it in quarters of the picture left out of the fit: [Q].

    A wrong intrinsic is wrong in every quarter, so what corrects it in three helps in the fourth. Bent surfaces and
    correlated noise, which a freer fit follows as well, differ from quarter to quarter. All gains are 0 where the
    points are exact, and where no alternative fits its own pixels better by more than a trifle.
    """
    samples = samples.pixels(slice(None, None, max(1, len(samples.x) // _WITNESSES)))
    inside = ray_distance(samples, cameras) < noise.gate[:, None]  # outliers have no say, nor a share of the data term
    samples = replace(samples, weights=samples.weights * inside)
    normals = [linearise(cameras, part, noise, objective, whole_lens=True) for part in _quarters(samples)]
    none = [noise.level.new_zeros(max(1, len(normals))) for _ in alternatives]
    if len(normals) < 2 or bool((noise.level < 3 * NOISE_FLOOR).all()):
        return none
    smooth = smoothness(cameras, objective)
    nothing = smoothness(cameras, replace(objective, alpha2=0.0))
    before = _changes(normals, smooth, nothing, objective)
    freest = max(alternatives, key=lambda one: (one.focal_mode != objective.focal_mode, len(one.lens_columns)))
    after = {freest: _changes(normals, smooth, nothing, freest)}
    if float((before[0] - after[freest][0]).mean()) < _TRIFLE:
        return none
    after |= {one: _changes(normals, smooth, nothing, one) for one in alternatives if one != freest}
    return [before[1] - after[one][1] for one in alternatives]


def _changes(
    normals: list[Normal], smooth: Smooth, nothing: Smooth, objective: Objective
) -> tuple[Tensor, Tensor]:  # [Q] each
    """Relative change of the data term by a step that all parts but one agree on: in those parts, and in that one."""
    changes = []
    for number, normal in enumerate(normals):
        others = normals[:number] + normals[number + 1 :]
        rest = weighted_normal(others, [1 / len(others)] * len(others))
        step = solve(*assemble(rest, smooth, objective), DAMPING)
        judged = [_model_cost(*assemble(one, nothing, objective), step) for one in (rest, normal)]
        changes.append([change / max(float(one.cost), _EXACT) for change, one in zip(judged, (rest, normal))])
    inside, left_out = torch.tensor(changes, dtype=torch.float64).T
    return inside, left_out


def _quarters(samples: Samples) -> Iterator[Samples]:
    """The samples by quarter of the picture; one without weight is left out."""
    right, below = samples.x > samples.x.median(), samples.y > samples.y.median()
    parts = (samples.pixels(one & two) for one in (right, ~right) for two in (below, ~below))
    yield from (part for part in parts if bool((part.weights > 0).any()))


def _tiles(samples: Samples) -> Iterator[Samples]:
    """The samples by sort of tile, one at a time to bound the memory; a sort without weight is left out."""
    tile = [((p - p.amin()) / (p.amax() - p.amin()).clamp_min(1e-12) * _TILES).long() for p in (samples.x, samples.y)]
    sort = (tile[0] + 2 * tile[1]) % 4
    parts = (samples.pixels(sort == number) for number in range(4))
    yield from (part for part in parts if bool((part.weights > 0).any()))


def _model_cost(matrix: Tensor, gradient: Tensor, step: Tensor) -> float:
    """Change of a quadratic model by a step."""
    return float(gradient @ step + step @ matrix @ step / 2)
