"""The literal protocols give what the repositories' own code gave on the same maps; tables say which is which."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from one4d_pl.data.rgbd_folder import read_depth_png, unrounded
from one4d_pl.evaluation.protocols import PROTOCOLS
from one4d_pl.evaluation.score import BenchmarkScore, SequenceScore, score_sequence
from one4d_pl.evaluation.tables import Row, markdown
from one4d_pl.metrics.depth import align_depth
from one4d_pl.scene.predictions import Prediction
from tests.evaluation.depth_sequence import DepthSequence

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


def score(benchmark: str, depth: Tensor, preds: Tensor, protocol: str) -> SequenceScore:
    return score_sequence(benchmark, DepthSequence.of(depth), Prediction(preds, None), PROTOCOLS[protocol])


def noisy_copy(depth: Tensor) -> Tensor:
    """0.3 of the depth and 0.1, with 20 % noise; 2 m where nothing was measured."""
    noise = np.random.default_rng(0).standard_normal(depth.shape, dtype=np.float32)
    known = np.where(np.isfinite(depth.numpy()), depth.numpy(), np.float32(2))
    return torch.from_numpy((0.3 * known * (1 + 0.2 * noise) + 0.1).astype(np.float32))


def real_slice(name: str) -> Tensor:  # [T, 240, 320] float32, metres; nan = no measurement
    if name == "bonn":
        files = sorted((REAL / "bonn" / "rgbd_bonn_crowd" / "depth").glob("*.png"))[::4]
        return torch.stack([read_depth_png(file) for file in files])[:, ::2, ::2]
    files = sorted((REAL / "tartanair" / "depth_left").glob("*.npy"))[::8]
    return torch.stack([torch.from_numpy(np.load(file)) for file in files])[:, ::2, ::2]


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize(
    ("benchmark", "protocol", "abs_rel", "delta"),  # MonST3R 574cc77, CUT3R 8bc15dc, Geo4D 2e57abc on these maps, CPU
    [
        ("bonn", "monst3r", 0.157589, 0.752614),
        ("bonn", "cut3r", 0.151710, 0.761174),  # 0.151580 in float32
        ("bonn", "geo4d", 0.155883, 0.749374),
        ("sintel", "monst3r", 0.177224, 0.694705),  # TartanAir's maps by Sintel's rules
        ("sintel", "cut3r", 0.201285, 0.649835),
        ("sintel", "geo4d", 0.156498, 0.745039),
    ],
)
def test_real_maps_get_the_published_code_s_numbers(benchmark, protocol, abs_rel, delta):
    depth = real_slice(benchmark)
    errors = score(benchmark, depth, noisy_copy(depth), protocol).depth["all"].errors
    assert errors["abs_rel"] == pytest.approx(abs_rel, rel=1e-4)
    assert errors["delta_1"] == pytest.approx(delta, rel=1e-4)


def test_bonn_s_truth_is_float64_where_the_repository_reads_it_so():
    codes = torch.from_numpy(np.random.default_rng(1).integers(0, 40000, (2, 30, 40)))
    depth = torch.where(codes > 0, codes.float() / 5000, torch.nan)
    preds = noisy_copy(depth)
    exact = codes.double() / 5000
    assert torch.equal(unrounded(depth)[codes > 0], exact[codes > 0])
    for protocol in ("monst3r", "cut3r", "geo4d"):
        alignment = PROTOCOLS[protocol].alignment
        double, single = (align_depth(preds, truth, codes > 0, alignment) for truth in (exact, depth))
        for benchmark in ("bonn", "sintel"):
            expected = double if benchmark == "bonn" and protocol != "geo4d" else single
            fit = score(benchmark, depth, preds, protocol).fit
            assert fit == (float(expected.scale), float(expected.shift)), (protocol, benchmark)
        assert protocol == "monst3r" or float(double.scale) != float(single.scale)  # which it is can be told


def table(benchmark: str, protocol: str, *scores: SequenceScore) -> str:
    return markdown([Row("model", BenchmarkScore(benchmark, PROTOCOLS[protocol], scores), {})], len(scores), None)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_column_of_depth_names_its_protocol_and_published_rows_are_told_apart(protocol):
    depth = 1 + torch.rand(2, 6, 8, generator=torch.Generator().manual_seed(0))
    lines = table("sintel", protocol, score("sintel", depth, depth, protocol)).splitlines()
    (head,) = [line for line in lines if line.startswith("| row | frames")]
    assert all(f"({protocol})" in column for column in head.strip("| ").split(" | ")[2:])
    assert any(line.startswith("Published rows are quoted") for line in lines)


def test_a_scale_that_is_held_at_its_limit_is_said_beside_the_number():
    depth = 1 + 9 * torch.rand(2, 6, 8, generator=torch.Generator().manual_seed(0))
    for protocol, preds, limit in (("one4d", 20 - depth, "0"), ("cut3r", 2000 * depth, "0.001")):
        fine, held = score("toy", depth, depth, protocol), score("toy", depth, preds, protocol)
        assert "held" not in table("toy", protocol, fine) and not fine.notes
        text = table("toy", protocol, fine, replace(held, name="other"))
        assert f" (scale held at {limit} in 1) | " in text and "other (" in text
        assert any(f"held at {limit}, the lowest that {protocol} allows" in note for note in held.notes)


def test_a_prediction_in_millimetres_is_told_where_the_fit_depends_on_the_unit():
    depth = 1 + 9 * torch.rand(2, 6, 8, generator=torch.Generator().manual_seed(0))
    for protocol in PROTOCOLS:
        notes = {factor: " ".join(score("toy", depth, factor * depth, protocol).notes) for factor in (0.05, 1, 1000)}
        assert ("1e+03 times the true one" in notes[1000]) == (protocol in ("monst3r", "geo4d", "cut3r"))
        assert "unit" not in notes[1] + notes[0.05]
