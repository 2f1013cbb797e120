"""When a claim holds: a difference of means of more than twice its standard error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from one4d_pl.nano.experiments import Claim

HIGHER_IS_BETTER = ("_db", "inliers")
SURE = 2.0  # standard errors

Values = Mapping[str, Sequence[float]]  # run -> one number per seed


@dataclass(frozen=True)
class Verdict:
    """holds | does not hold | cannot tell, and by how much: positive speaks for the claim."""

    word: str
    advantage: float
    standard_error: float  # nan = unknown


def higher_is_better(metric: str) -> bool:
    """Decibels and inliers; all else is an error, a loss or a distance."""
    return metric.endswith(HIGHER_IS_BETTER)


def judge(claim: Claim, values: Values, spread_of: str) -> Verdict | None:
    """None where a run is missing.

    Args:
        claim: which run is better.
        values: of the claim's metric.
        spread_of: the run whose variance stands for that of runs with one seed.
    """
    better, worse = values.get(claim.better), values.get(claim.than)
    if not better or not worse:
        return None
    if higher_is_better(claim.metric):
        advantage = claim.factor * fmean(better) - fmean(worse)
        scales = (claim.factor, 1.0)
    else:
        advantage = claim.factor * fmean(worse) - fmean(better)
        scales = (1.0, claim.factor)
    spare = values.get(spread_of) or ()
    errors = (_squared_error(seeds, spare) for seeds in (better, worse))
    error = math.sqrt(sum(scale**2 * squared for scale, squared in zip(scales, errors, strict=True)))
    if not abs(advantage) > SURE * error:  # so worded that nan is no proof
        return Verdict("cannot tell", advantage, error)
    return Verdict("holds" if advantage > 0 else "does not hold", advantage, error)


def _squared_error(seeds: Sequence[float], spare: Sequence[float]) -> float:
    """Of the mean; nan where no run shows a spread."""
    known = seeds if len(seeds) > 1 else spare
    return variance(known) / len(seeds) if len(known) > 1 else math.nan
