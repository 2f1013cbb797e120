"""When a claim holds: a difference of means beyond what Student's t allows for chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from scipy.stats import t

from one4d_pl.nano.experiments import Claim

HIGHER_IS_BETTER = ("_db", "inliers")
CONFIDENCE = 0.95  # two-sided

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


def judge(claim: Claim, values: Values) -> Verdict | None:
    """None where a run is missing.

    Args:
        claim: which run is better.
        values: of the claim's metric, of every run whose seeds spread as the claim's two do: their variance is pooled.
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
    repeated = [seeds for seeds in values.values() if len(seeds) > 1]
    freedom = sum(len(seeds) - 1 for seeds in repeated)
    if not freedom:
        return Verdict("cannot tell", advantage, math.nan)
    pooled = sum((len(seeds) - 1) * variance(seeds) for seeds in repeated) / freedom
    counts = (len(better), len(worse))
    error = math.sqrt(pooled * sum(scale**2 / count for scale, count in zip(scales, counts, strict=True)))
    if not abs(advantage) > t.ppf((1 + CONFIDENCE) / 2, freedom) * error:  # so worded that nan is no proof
        return Verdict("cannot tell", advantage, error)
    return Verdict("holds" if advantage > 0 else "does not hold", advantage, error)
