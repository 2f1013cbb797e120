"""Whether a claim holds: a difference beyond what Student's t allows for chance.

The model is value = run + seed + noise. A seed decides a run's data, masks and noise, so its effect
is common to all runs and does not count as noise. Errors and losses are compared by their ratios
(logarithms), decibels by their differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

from experiments.nano.experiments import Claim, in_decibels

CONFIDENCE = 0.95  # two-sided

Values = Mapping[str, Mapping[int, float]]  # run -> seed -> number


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim: whether it holds, and by how much (positive = for it; slack is not included)."""

    outcome: str  # holds | does not hold | cannot tell
    difference: float  # dB; else the logarithm of the other's error over the better one's
    standard_error: float  # of it; nan = unknown


def judge(claim: Claim, values: Values) -> Verdict | None:
    """Judge a claim; None where a run is missing.

    `values` are of the claim's metric, of all runs whose noise is like that of the claim's two: it is estimated there.
    """
    if not values.get(claim.better) or not values.get(claim.than):
        return None
    decibels, runs = in_decibels(claim.metric), list(values)
    seeds = sorted({seed for numbers in values.values() for seed in numbers})
    observed = [(run, seed, number) for run, numbers in values.items() for seed, number in numbers.items()]
    design = np.zeros((len(observed), len(runs) + len(seeds)))
    for row, (run, seed, _) in enumerate(observed):
        design[row, runs.index(run)] = design[row, len(runs) + seeds.index(seed)] = 1
    target = np.array([number if decibels else -math.log(number) for _, _, number in observed])  # higher is better
    contrast = np.zeros(design.shape[1])
    contrast[runs.index(claim.better)], contrast[runs.index(claim.than)] = 1, -1

    effects, _, rank, _ = np.linalg.lstsq(design, target)
    covariance = np.linalg.pinv(design.T @ design)
    difference, freedom = float(contrast @ effects), len(observed) - int(rank)
    estimable = np.allclose(contrast @ covariance @ design.T @ design, contrast)  # not where the two share no seed
    if not freedom or not estimable:
        return Verdict("cannot tell", difference, math.nan)
    variance = float(np.sum((target - design @ effects) ** 2)) / freedom
    error = math.sqrt(variance * float(contrast @ covariance @ contrast))
    advantage = difference + (claim.slack if decibels else math.log1p(claim.slack))
    if not abs(advantage) > t.ppf((1 + CONFIDENCE) / 2, freedom) * error:  # nan compares as false, hence `not`
        return Verdict("cannot tell", difference, error)
    return Verdict("holds" if advantage > 0 else "does not hold", difference, error)
