"""`make bench` runs: one small block, once; its figures are nobody's law, but the operations' ratios are."""

from __future__ import annotations

import pytest

from tests.models.benchmark_coupling import Coupling, measure, report


def test_the_coupling_benchmark_runs():
    coupling = Coupling(heads=1, layers=1, grid=(2, 4, 6))
    text = report(coupling, measure(coupling.ways(), repeats=1), repeats=1)
    assert text.count("\n| step") == 2 and text.count("\n| forward") == 2 and "interleaved" in text


def test_the_ratio_of_operations_beside_width_coupling_is_the_one_expected():
    """At 3.5 tokens per channel attention is two fifths of a block, and width coupling doubles it."""
    operations = Coupling(heads=4, layers=8, grid=(8, 30, 30)).operations()
    ratio = operations["forward: stacked DLC"] / operations["forward: width coupling"]
    assert ratio == pytest.approx(0.73, abs=0.02)
    lora = operations["forward: stacked DLC"] / operations["forward: two plain bases"]
    assert 1.01 < lora < 1.05
