"""Laws of the video distance and of the VAE's features: scipy agrees, small samples are warned of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn

from one4d_pl.metrics.video import FrechetVideoDistance, VaeFeatures


def encode(videos: Tensor) -> Tensor:  # [B, 3, T, H, W] -> [B, 3, ceil(T / 4), H / 2, W / 2]
    return nn.functional.avg_pool3d(videos, (1, 2, 2))[:, :, ::4]


def videos(count: int, seed: int, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    level = 0.2 * torch.randn(count, 3, 1, 1, 1, generator=generator) + mean
    return (level + 0.3 * torch.randn(count, 3, 9, 4, 6, generator=generator)).clamp(-1, 1)


def fd_vae() -> FrechetVideoDistance:
    return FrechetVideoDistance(VaeFeatures(encode, num_channels=3))


def numpy_distance(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(cov_a @ cov_b).real
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root))


def test_the_distance_equals_scipys_matrix_square_root():
    real, fake = videos(60, 0), videos(50, 1, mean=0.1)
    metric = fd_vae()
    for start in range(0, 60, 20):
        metric.update(real[start : start + 20], real=True)
    metric.update(fake, real=False)
    features = VaeFeatures(encode, 3)
    expected = numpy_distance(features(real).numpy(), features(fake).numpy())
    assert metric.compute().dtype == torch.float64
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-9)
    assert expected > 0.02


def test_equal_sets_have_no_distance_even_with_fewer_videos_than_features():
    metric = fd_vae()
    few = videos(5, 0)
    metric.update(few, real=True)
    metric.update(few, real=False)
    with pytest.warns(UserWarning, match="fd_vae: 5 videos for 9 features"):
        assert abs(float(metric.compute())) < 1e-6


def test_enough_videos_are_not_warned_of(recwarn):
    metric = fd_vae()
    metric.update(videos(20, 0), real=True)
    metric.update(videos(20, 1), real=False)
    metric.compute()
    assert not [w for w in recwarn if "videos for" in str(w.message)]


@pytest.mark.parametrize("change", ["frozen", "blurred", "brighter"])
def test_a_change_of_the_videos_is_far_beyond_the_noise_of_sampling(change):
    real, other = videos(60, 0), videos(60, 1)
    changed = {
        "frozen": other[:, :, :1].expand_as(other),
        "blurred": other.mean((3, 4), keepdim=True).expand_as(other),
        "brighter": other + 0.3,
    }[change]
    distance = {}
    for name, fake in (("same", other), ("changed", changed)):
        metric = fd_vae()
        metric.update(real, real=True)
        metric.update(fake, real=False)
        distance[name] = float(metric.compute())
    assert distance["changed"] > 5 * distance["same"] > 0


def test_vae_features_are_mean_spread_and_change_per_channel():
    latents = torch.tensor([1.0, 3.0, 1.0]).view(1, 1, 3, 1, 1).repeat(2, 2, 1, 4, 5)
    features = VaeFeatures(lambda _: latents, num_channels=2)(latents)
    assert features.shape == (2, 6) and features.dtype == torch.float64
    spread = float(np.std([1, 3, 1]))
    torch.testing.assert_close(features[0], torch.tensor([5 / 3, 5 / 3, spread, spread, 2.0, 2.0]).double())
    still = VaeFeatures(lambda _: latents[:, :, :1], num_channels=2)(latents)
    assert still[:, 2:].eq(0).all()
