"""Laws of st_lpips; its reference values are what the package's own code gave for the same frames."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from one4d_pl.errors import UserError
from one4d_pl.metrics import perceptual
from one4d_pl.metrics.perceptual import LAYERS, MIN_SIDE, PACKAGE, STLPIPS, frame_distances, open_st_lpips, st_lpips
from tests.metrics import videos

INSTALLED = importlib.util.find_spec(PACKAGE) is not None
SHAPES = ((64, 3, 11, 11), (192, 64, 5, 5), (384, 192, 3, 3), (256, 384, 3, 3), (256, 256, 3, 3))


def random_weights() -> dict[str, Tensor]:
    """Weights of the file's names and shapes, with calibrations that are not negative."""
    generator = torch.Generator().manual_seed(0)
    weights = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.full((1, 3, 1, 1), 0.5)}
    for number, ((name, _, _), shape) in enumerate(zip(LAYERS, SHAPES, strict=True)):
        fan_in = shape[1] * shape[2] * shape[3]
        weights[f"net.{name}.weight"] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        weights[f"net.{name}.bias"] = torch.zeros(shape[0])
        weights[f"lin{number}.model.1.weight"] = torch.rand(1, shape[0], 1, 1, generator=generator)
    return weights


@pytest.fixture(scope="module")
def network() -> STLPIPS:
    return STLPIPS(random_weights())


def waves(seed: float, height: int, width: int, num_frames: int = 3) -> Tensor:
    return videos.waves(seed, height, width, num_frames).float()


@pytest.mark.skipif(not INSTALLED, reason="needs the extra st-lpips")
@pytest.mark.parametrize(
    ("size", "other", "shifted"),
    [
        ((64, 96), (0.035893, 0.036036, 0.036278), (0.007027, 0.007034, 0.007074)),
        ((37, 33), (0.051059, 0.053467, 0.053249), (0.007372, 0.007211, 0.007607)),
    ],
)
def test_values_are_those_of_the_packages_own_code(size, other, shifted):
    network, frames = open_st_lpips(), waves(1, *size)
    for preds, expected in ((waves(2, *size), other), (frames.roll(1, -1), shifted)):
        distance = frame_distances(network, frames, preds)
        torch.testing.assert_close(distance, torch.tensor(expected), rtol=1e-3, atol=1e-6)
    hidden = torch.tensor([[True, False, False]])
    found = st_lpips(waves(2, *size)[None], frames[None], hidden)
    assert found == pytest.approx({"given": other[0], "hidden": (other[1] + other[2]) / 2}, rel=1e-3)


def test_it_is_a_distance_that_grows_and_takes_any_number_of_frames(network):
    frames = waves(1, 32, 48, num_frames=5)  # more than go through at once
    assert frame_distances(network, frames, frames).abs().max() == 0
    near, far = (frame_distances(network, frames, frames + c * waves(2, 32, 48, 5)) for c in (0.05, 0.5))
    assert near.shape == (5,) and bool((near > 0).all()) and bool((near < far).all())
    torch.testing.assert_close(near, frame_distances(network, frames + 0.05 * waves(2, 32, 48, 5), frames))
    alone = frame_distances(network, frames[:, 4:], frames[:, 4:] + 0.5 * waves(2, 32, 48, 5)[:, 4:])
    torch.testing.assert_close(far[4:], alone)


def test_the_smallest_frames_are_measured(network):
    side = torch.zeros(1, 3, MIN_SIDE, MIN_SIDE)
    assert float(network(side, side + 1)) > 0
    with pytest.raises(RuntimeError, match=r"[Pp]adding"):
        network(side[..., 1:], side[..., 1:])


def test_what_is_left_out_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    perceptual._log_left_out.cache_clear()
    frames, given = torch.zeros(1, 3, 2, 32, 32), torch.tensor([[True, False]])
    with caplog.at_level(logging.INFO):
        assert st_lpips(frames, frames, given) == st_lpips(frames, frames, given) == {}
        assert st_lpips(frames[..., :16], frames[..., :16], given) == {}
    assert [r.message for r in caplog.records] == [
        "st_lpips is left out: it needs `pip install 'one4d_pl[st-lpips]'`",
        "st_lpips is left out: frames need 21 pixels a side",
    ]


def test_a_damaged_file_is_one_line(tmp_path: Path):
    torch.save({"net.slice1.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: no 'scaling_layer\.shift' in it; need the weights of stlpips"):
        STLPIPS.open(tmp_path / "other.pth")
