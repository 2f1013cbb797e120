"""FVD as public code computes it: frames come to I3D to the pixel as theirs, and the distance is theirs.

The reference values are what the preprocessing and the distance of public FVD code (common_metrics_on_video_quality,
TATS, VideoGPT) gave in float32 for `colours`: short side to 224, long side rounded up, bilinear without antialiasing,
the centre square, [-1, 1]; np.cov and scipy's sqrtm.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from one4d_pl.errors import UserError
from one4d_pl.metrics.video import FrechetVideoDistance, I3DFeatures
from tests.metrics.videos import TinyI3D, saved, waves

# TorchScript is the format of the shared I3D file, whatever torch recommends for new ones
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:fvd:UserWarning")


class Pixels(nn.Module):
    """What I3D is shown at four spots, as its first features."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        spots = [x[:, 0, 0, 0, 0], x[:, 1, 3, 100, 17], x[:, 2, 9, 223, 223], x[:, 0, 5, 112, 112]]
        return nn.functional.pad(torch.stack(spots, 1), (0, 396))


class OtherCall(nn.Module):
    """Some other network in TorchScript."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class OtherShape(TinyI3D):
    """A network of the same call whose features are not I3D's."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        return x.mean((1, 2, 3))


def colours(seed: float, height: int, width: int) -> Tensor:
    """[3, 10, H, W] float32 in [0, 1]."""
    return (0.5 + 0.5 * waves(seed, height, width)).float()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((320, 576), (-0.970796, 0.934512, 0.411215, -0.241667)),  # 224 x 404: 403.2 is rounded up
        ((352, 624), (0.910627, 0.006811, -0.75862, -0.898193)),
        ((53, 30), (-0.671389, 0.683769, -0.973325, -0.922743)),  # portrait, enlarged
        ((200, 200), (0.841471, -0.835581, 0.768968, 0.34644)),  # 225 x 224: 200 · (224 / 200) > 224 in floating point
    ],
)
def test_i3d_is_shown_what_public_code_shows_it(size, expected, tmp_path):
    shown = I3DFeatures(saved(Pixels(), tmp_path))(colours(1, *size)[None] * 2 - 1)
    torch.testing.assert_close(shown[0, :4], torch.tensor(expected).double(), rtol=0, atol=1e-4)


def test_fvd_equals_public_codes_and_is_the_name_of_i3d_features_alone(tmp_path):
    metric = FrechetVideoDistance(I3DFeatures(saved(TinyI3D(), tmp_path)))
    assert metric.name == "fvd"
    for seed in range(12):
        metric.update(colours(seed, 64, 96)[None] * 2 - 1, real=True)
        metric.update(colours(0.5 * seed, 64, 96)[None] * 1.8 - 1, real=False)
    assert float(metric.compute()) == pytest.approx(5.14221, rel=1e-5)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no I3D TorchScript file at .*nowhere\.pt"):
        I3DFeatures(tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(UserError, match=r"text\.pt: .*need I3D as a TorchScript file"):
        I3DFeatures(tmp_path / "text.pt")
    with pytest.raises(UserError, match=r"i3d\.pt: takes .*need I3D that takes rescale, resize, return_features"):
        I3DFeatures(saved(OtherCall(), tmp_path))
    ten = colours(1, 24, 40)[None]
    with pytest.raises(UserError, match=r"i3d\.pt: gives \(1, 224\), need I3D's \[1, 400\]"):
        I3DFeatures(saved(OtherShape(), tmp_path))(ten)
    with pytest.raises(UserError, match="9 frames, I3D needs at least 10"):
        I3DFeatures(saved(TinyI3D(), tmp_path))(ten[:, :, :9])
