"""Laws of the video distance: scipy agrees, names tell the features, small samples are warned of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn

from one4d_pl.metrics.video import FrechetVideoDistance, I3DFeatures, VaeFeatures

# TorchScript is the format of the shared I3D file, whatever torch recommends for new ones
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:fvd:UserWarning")


def encode(videos: Tensor) -> Tensor:  # [B, 3, T, H, W] -> [B, 3, ceil(T / 4), H / 2, W / 2]
    return nn.functional.avg_pool3d(videos, (1, 2, 2))[:, :, ::4]


class TinyI3D(nn.Module):
    """The call signature of the shared I3D file, with pooled pixels as features."""

    def forward(self, videos: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        if rescale or resize or not return_features or videos.shape[-2:] != (224, 224):
            raise RuntimeError("called in another way than the real file")
        return nn.functional.adaptive_avg_pool3d(videos, (4, 10, 10)).mean(1).flatten(1)


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


def test_fvd_is_the_name_of_i3d_features_from_a_file_alone(tmp_path):
    path = tmp_path / "i3d.pt"
    torch.jit.save(torch.jit.script(TinyI3D()), path)
    metric = FrechetVideoDistance(I3DFeatures(path))
    assert (metric.name, fd_vae().name) == ("fvd", "fd_vae")
    short_side = torch.rand(2, 3, 10, 24, 40, generator=torch.Generator().manual_seed(0))
    metric.update(short_side, real=True)
    metric.update(short_side, real=False)
    assert abs(float(metric.compute())) < 1e-6


def test_i3d_sees_the_centre_square_unsquashed(tmp_path):
    path = tmp_path / "i3d.pt"
    torch.jit.save(torch.jit.script(TinyI3D()), path)
    centre = torch.zeros(1, 3, 10, 20, 60)
    centre[..., 20:40] = 1
    features = I3DFeatures(path)(centre)
    assert features.shape == (1, 400)
    assert features.view(4, 10, 10)[:, :, 1:-1].min() > 0.999  # one side's worth of width fills the square


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no I3D TorchScript file at .*nowhere\.pt"):
        I3DFeatures(tmp_path / "nowhere.pt")
    path = tmp_path / "i3d.pt"
    torch.jit.save(torch.jit.script(TinyI3D()), path)
    with pytest.raises(ValueError, match="9 frames, I3D needs at least 10"):
        I3DFeatures(path)(videos(1, 0))
