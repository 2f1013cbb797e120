"""Choose which intrinsics are solved for, and fit the cameras that go with them.

The plain model is one focal length, square pixels and the principal point at the image centre.
One rule decides which of these assumptions are given up:

- Alternatives: one focal length per frame, a free principal point, a free aspect, and, where a focal length is given, a
  free one; each alone and every combination.
- When: after each fit, first on the blocks, then on the grid, until nothing more is given up.
- How: by cross-validation (`held_out.gains`). An alternative is fitted by one step to three quarters of the picture and
  scored by the data term of the fourth, each once. It convinces if it lowers the data term of every quarter, and by 10
  % on average; 0.3 % are enough for what the user asks for ("solve"). Of those within 90 % of the best, the one with
  the fewest unknowns is chosen, and everything is fitted again. The change stays if that brings the points 1 % nearer
  to their rays, or if the user asked for it.
- Known values: what the user has given is kept. Where the choice includes it, a flag says so and nothing is given up,
  as other unknowns would only make up for the wrong value.

One step is not enough where the plain model fits a part of the scene, a plane for example, and takes the rest for
outliers. So where more than a tenth of the blocks lie far off, all assumptions are given up at once, starting from the
frames' own camera matrices. If that brings the points clearly nearer, plain values come back one by one where they cost
nothing, and what is still free is the choice.

A focal length that the points do not determine is taken from the prior.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from one4d_pl.postopt.certainty import MIN_CONDITION
from one4d_pl.postopt.held_out import credible_alpha2, gains
from one4d_pl.postopt.intrinsics import FOCAL_BOUNDS, Lens, Samples, camera_votes, focal_candidates, plane_votes
from one4d_pl.postopt.normal_equations import GATE, NOISE_FLOOR, FocalMode, Objective, measure_noise
from one4d_pl.postopt.options import RecoverOptions
from one4d_pl.postopt.refine import Refined, refine
from one4d_pl.postopt.trajectory import Cameras, best_focal, ray_distance, solve_poses

MAX_FOCAL_DEVIATION = 0.1  # of log focal
_BOUND_MARGIN = 0.1  # of log focal: so close to a bound it diverges, as on a flat wall with noise
_CONVINCING = 0.1  # mean gain in held-out quarters of the picture, as a share of the data term
_CONVINCING_IF_ASKED = 0.003  # the same where the user asks for it
_NEARLY_BEST = 0.9  # of the best gain
_MIN_DIFFERENCE = 0.005  # of a focal length, or of the longer side, that is worth a flag
_MIN_FAR, _MANY = 2e-3, 0.1  # of the scene's unit: nearer is never far off; share of the blocks
_CLEARLY_NEARER, _NO_WORSE = 0.7, 1.1  # times the mean distance
_KEPT = 0.99  # times the mean distance, outliers included: what a change has to reach that nobody asked for
_MAX_CHANGES = 3  # of the model, on blocks or on the grid

# The plain model's assumptions, in the order in which they are given up, and their flags.
_FOCAL, _ZOOM, _POINT, _ASPECT = "focal", "zoom", "principal point", "aspect"
_UNUSUAL = {_ZOOM: "focal length changes", _POINT: "principal point off the centre", _ASPECT: "pixels not square"}
_CONTRADICTED = {
    _FOCAL: "points contradict the known focal length",
    _ZOOM: "points contradict one focal length",
    _POINT: "points contradict the known principal point",
    _ASPECT: "points contradict the known aspect",
}


def fit(
    blocks: Samples,  # for the start, through the known lens or the plain one
    grid: Samples,  # for the last steps, likewise
    prior: float,  # focal length where the points do not tell, longer sides
    known_focal: float | None,  # longer sides
    options: RecoverOptions,
) -> tuple[Refined, tuple[str, ...]]:
    """Fit cameras and choose the intrinsics that are solved for.

    Returns the fit and the flags: what is unusual about its intrinsics, contradicted by the points
    or not determined by them.
    """
    mode: FocalMode = "per_frame" if options.shared_focal is False else "shared"
    if known_focal is not None:
        mode, focal = "fixed", blocks.points.new_tensor(known_focal)
    else:
        focal = best_focal(blocks, focal_candidates(torch.stack([camera_votes(blocks)[0], plane_votes(blocks)]), prior))
    objective = first = Objective(options.alpha2, mode)
    coarse = _refine_on_blocks(solve_poses(blocks, focal.expand(len(blocks.points))), blocks, objective)

    def on_blocks(fit: Refined, objective: Objective) -> Refined:
        return _refine_on_blocks(fit.cameras, blocks.through(fit.lens), objective)

    def on_both(fit: Refined, objective: Objective) -> Refined:
        return _refine_on_grid(on_blocks(fit, objective), grid, objective)

    given = _given(options)
    chosen, freer = _choose_at_once(coarse, blocks, objective)
    if not given & set(chosen):
        coarse, objective = freer, _freed(objective, chosen)
        coarse, objective, chosen = _free_contradicted(coarse, blocks, objective, options, on_blocks)  # cheap
    refined = _refine_on_grid(coarse, grid, objective)
    if not given & set(chosen):
        refined, objective, chosen = _free_contradicted(refined, grid, objective, options, on_both)  # more exact
    unusual = set(_unusual(refined, blocks.lens)) & set(_assumed(first, len(blocks.points)))
    flags = tuple(flag for name, flag in _UNUSUAL.items() if name in unusual)
    flags += tuple(flag for name, flag in _CONTRADICTED.items() if name in given & set(chosen))
    if known_focal is not None:
        return refined, flags
    refined, focal_flags = _with_observable_focal(refined, blocks, grid, prior, objective)
    return refined, flags + focal_flags


def _refine_on_blocks(cameras: Cameras, blocks: Samples, objective: Objective) -> Refined:
    """Make the first steps: on the blocks, without smoothing."""
    return refine(cameras, blocks, replace(objective, alpha2=0.0), 1e-4)


def _refine_on_grid(coarse: Refined, grid: Samples, objective: Objective) -> Refined:
    """Make the last steps: on the grid, with as much smoothing as its pixels confirm."""
    seen = grid.through(coarse.lens)
    alpha2, start = credible_alpha2(coarse.cameras, seen, objective)
    dense = refine(coarse.cameras, seen, replace(objective, alpha2=alpha2), 1e-6, start)
    return replace(dense, iterations=coarse.iterations + dense.iterations)


def _free_contradicted(
    refined: Refined,
    samples: Samples,  # where contradictions are looked for
    objective: Objective,
    options: RecoverOptions,
    refit: Callable[[Refined, Objective], Refined],
) -> tuple[Refined, Objective, tuple[str, ...]]:
    """Give up contradicted assumptions and fit again, until there are none or one is given.

    Returns the last fit, its objective, and the assumptions that the points contradict there: none,
    or some that include a given one.
    """
    for _ in range(_MAX_CHANGES):
        chosen = _choose(refined, samples, objective, options)
        if not chosen or _given(options) & set(chosen):
            return refined, objective, chosen
        freer = _freed(objective, chosen)
        fitted = refit(refined, freer)
        if not set(chosen) <= _asked(options) and _distance(fitted, samples) > _KEPT * _distance(refined, samples):
            break  # one step promised what the whole fit does not keep
        objective, refined = freer, fitted
    return refined, objective, ()


def _choose(refined: Refined, samples: Samples, objective: Objective, options: RecoverOptions) -> tuple[str, ...]:
    """Return the assumptions that the points contradict, as few as explain them, or none."""
    names = _assumed(objective, len(refined.noise))
    changes = [change for count in range(1, len(names) + 1) for change in combinations(names, count)]
    if not changes:
        return ()
    minimised, seen = replace(objective, alpha2=refined.alpha2), samples.through(refined.lens)
    noise = measure_noise(seen, refined.cameras)
    gain_of = gains(refined.cameras, seen, noise, minimised, [_freed(objective, change) for change in changes])
    asked = _asked(options)
    convincing = {
        change: float(gain.mean())
        for change, gain in zip(changes, gain_of, strict=True)
        if float(gain.amin()) > 0
        and float(gain.mean()) >= (_CONVINCING_IF_ASKED if set(change) <= asked else _CONVINCING)
    }
    least = _NEARLY_BEST * max(convincing.values(), default=0.0)
    return next((change for change, gain in convincing.items() if gain >= least), ())


def _choose_at_once(coarse: Refined, blocks: Samples, objective: Objective) -> tuple[tuple[str, ...], Refined]:
    """Return the assumptions that many far points contradict, and the fit without them."""
    votes, lenses = camera_votes(blocks)
    names = _assumed(objective, len(votes))
    if not names or not bool(votes.isfinite().any()) or not _many_are_far(coarse, blocks):
        return (), coarse
    freest = _freed(objective, tuple(names))
    lens = _voted_lens(lenses, blocks.lens, freest)
    focal = votes * (blocks.lens.aspect / lens.aspect) ** 0.5  # of square pixels -> fx
    if freest.focal_mode == "per_frame":
        focal = torch.where(focal.isfinite(), focal, focal.nanmedian())
    else:
        focal = focal.nanmedian().expand(len(focal))
    seen = blocks.through(lens)
    fitted = _refine_on_blocks(solve_poses(seen, focal), seen, freest)
    nearest = _distance(fitted, blocks)
    if nearest > _CLEARLY_NEARER * _distance(coarse, blocks):
        return (), coarse
    for name in reversed(names):
        fewer = _freed(objective, tuple(other for other in names if other != name))
        plainer = _refit_plainer(fitted, coarse, blocks, fewer)
        if _distance(plainer, blocks) <= _NO_WORSE * nearest:
            names.remove(name)
            fitted = plainer
    return tuple(names), fitted


def _voted_lens(lenses: Tensor, plain: Lens, objective: Objective) -> Lens:
    """Return the median of the frames' lenses [T, 3], plain where it is not solved for."""
    aspect, x, y = lenses.nanmedian(0).values.tolist()
    voted = Lens(plain.aspect * aspect, plain.x + x, plain.y + plain.aspect * y)
    return _plain_where_fixed(voted, plain, objective)


def _refit_plainer(fitted: Refined, coarse: Refined, blocks: Samples, objective: Objective) -> Refined:
    """Fit again, with the plain values for what the objective does not leave free."""
    log_focal = fitted.cameras.log_focal
    if objective.focal_mode == "shared":
        log_focal = log_focal.median().expand(len(log_focal))
    elif objective.focal_mode == "fixed":
        log_focal = coarse.cameras.log_focal
    seen = blocks.through(_plain_where_fixed(fitted.lens, blocks.lens, objective))
    return _refine_on_blocks(replace(fitted.cameras, log_focal=log_focal), seen, objective)


def _plain_where_fixed(lens: Lens, plain: Lens, objective: Objective) -> Lens:
    """Return the lens with plain values where it is not solved for."""
    point = lens if objective.principal_point else plain
    return Lens(lens.aspect if objective.aspect else plain.aspect, point.x, point.y)


def _distance(fit: Refined, blocks: Samples) -> float:
    """Return the geometric mean of the points' distances from their rays.

    Outliers weigh little in it, and an exactly fitted half of the points cannot make it vanish.
    """
    seen = blocks.through(fit.lens)
    logarithm = (ray_distance(seen, fit.cameras) + NOISE_FLOOR).log()
    return math.exp(float((logarithm * seen.weights).sum() / seen.weights.sum()))


def _many_are_far(fit: Refined, blocks: Samples) -> bool:
    """Tell whether a fit leaves so many points out that another may be right."""
    seen = blocks.through(fit.lens)
    far = ray_distance(seen, fit.cameras) > (GATE * fit.noise[:, None]).clamp_min(_MIN_FAR)
    return float((far * seen.weights).sum() / seen.weights.sum()) > _MANY


def _unusual(refined: Refined, plain: Lens) -> tuple[str, ...]:
    """List the intrinsics that differ from the plain model's by more than `_MIN_DIFFERENCE`."""
    lens, log_focal = refined.lens, refined.cameras.log_focal
    sizes = {
        _ZOOM: float(log_focal.amax() - log_focal.amin()),
        _POINT: max(abs(lens.x - plain.x), abs(lens.y - plain.y)),
        _ASPECT: abs(math.log(lens.aspect / plain.aspect)),
    }
    return tuple(name for name, size in sizes.items() if size > _MIN_DIFFERENCE)


def _assumed(objective: Objective, num_frames: int) -> list[str]:
    """List the intrinsics that are assumed, not solved for."""
    return [
        *([_FOCAL] if objective.focal_mode == "fixed" else []),
        *([_ZOOM] if objective.focal_mode == "shared" and num_frames > 1 else []),
        *([] if objective.principal_point else [_POINT]),
        *([] if objective.aspect else [_ASPECT]),
    ]


def _given(options: RecoverOptions) -> set[str]:
    """Return the intrinsics that the user has given."""
    known = {
        _FOCAL: options.focal is not None,
        _ZOOM: options.shared_focal is True,
        _POINT: isinstance(options.principal_point, tuple),
        _ASPECT: isinstance(options.aspect, (int, float)),
    }
    return {name for name, sure in known.items() if sure}


def _asked(options: RecoverOptions) -> set[str]:
    """Name what the user wants solved for."""
    wanted = {_POINT: options.principal_point == "solve", _ASPECT: options.aspect == "solve"}
    return {name for name, sure in wanted.items() if sure}


def _freed(objective: Objective, names: tuple[str, ...]) -> Objective:
    """Return the objective with more unknowns."""
    mode: FocalMode = "shared" if _FOCAL in names else "per_frame" if _ZOOM in names else objective.focal_mode
    return replace(
        objective,
        focal_mode=mode,
        aspect=objective.aspect or _ASPECT in names,
        principal_point=objective.principal_point or _POINT in names,
    )


def _with_observable_focal(
    refined: Refined, blocks: Samples, grid: Samples, prior: float, objective: Objective
) -> tuple[Refined, tuple[str, ...]]:
    """Replace a focal length that the points do not determine and fit again; return fit and flags.

    The replacement is the median of the frames that determine theirs, or the prior.
    """
    unknown = (refined.focal_condition < MIN_CONDITION) | (refined.focal_deviation > MAX_FOCAL_DEVIATION)
    low, high = (math.log(bound) for bound in FOCAL_BOUNDS)
    at_bounds = (refined.cameras.log_focal < low + _BOUND_MARGIN) | (refined.cameras.log_focal > high - _BOUND_MARGIN)
    unknown = unknown | (at_bounds if objective.focal_mode == "per_frame" else at_bounds.any())
    if not bool(unknown.any()):
        return refined, ()
    blocks, grid = blocks.through(refined.lens), grid.through(refined.lens)
    if objective.focal_mode == "per_frame" and not bool(unknown.all()):
        log_focal = refined.cameras.log_focal
        focal = torch.where(unknown, log_focal[~unknown].median(), log_focal).exp()
        flag = "focal of some frames from the others"
    else:
        focal, flag = blocks.points.new_tensor(prior).expand(len(blocks.points)), "focal from prior"
    known = replace(objective, focal_mode="fixed", aspect=False, principal_point=False)
    fixed = _refine_on_grid(_refine_on_blocks(solve_poses(blocks, focal), blocks, known), grid, known)
    return replace(fixed, focal_condition=refined.focal_condition, focal_deviation=refined.focal_deviation), (flag,)
