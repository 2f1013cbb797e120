"""The law of the benchmark at toy size: as accurate as a gradient fit of depth and cameras, or more, and faster."""

from __future__ import annotations

import pytest

from tests.postopt.benchmark_gradient_fit import compare
from tests.postopt.worlds import build_world

TOLERANCE = 1.05  # two estimates from the same noise differ by chance; 5 % is none


@pytest.mark.parametrize(
    ("path", "noise", "outliers"),
    [("static", 0.05, 0.0), ("orbit", 0.01, 0.0), ("hand-held", 0.01, 0.3), ("forward", 0.0, 0.0)],
)
def test_never_less_accurate_than_a_gradient_fit_and_faster(path: str, noise: float, outliers: float) -> None:
    world = build_world(path, num_frames=5, height=16, width=28)
    result = compare(world, noise, outliers, steps=400)
    theirs_at_end = result.gradient[-1].accuracy
    for name in ("centre", "rotation", "abs_rel"):
        ours, theirs = getattr(result.ours, name), getattr(theirs_at_end, name)
        assert ours <= TOLERANCE * theirs + 1e-6, f"{name}: {result.ours} against {theirs_at_end}"
    assert outliers == 0 or result.ours.centre <= 0.1 * theirs_at_end.centre  # squares cannot take outliers
