"""Fréchet distance between sets of videos, under a name that says whose features it compares.

`fvd` is the distance of I3D features as published FVD numbers use them, from a local TorchScript file. `fd_vae` is that
of pooled latents of a video VAE: it needs nothing but the base model, and is not comparable with any published number.
Both are torchmetrics' FrechetInceptionDistance: running sums in float64, reduced over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.utilities import rank_zero_warn

from one4d_pl.errors import UserError, reading

I3D_SIZE = 224  # pixels
I3D_FEATURES = 400
# frames come scaled and resized; the features are the logits before the softmax
I3D_CALL = {"rescale": False, "resize": False, "return_features": True}
I3D_MIN_FRAMES = 10  # with fewer, the temporal strides leave nothing to pool


class I3DFeatures(nn.Module):
    """Kinetics-400 logits of an I3D network, the features of FVD (Unterthiner et al. 2018).

    The file is the converted original that public FVD code shares (`i3d_torchscript.pt`): called with videos
    [B, 3, T, 224, 224] in [-1, 1] and rescale=False, resize=False, return_features=True, it returns [B, 400]. Frames
    are brought to 224 pixels exactly as that code does it: tests/metrics/test_fvd.py states its values.
    """

    name = "fvd"
    num_features = I3D_FEATURES

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        if not Path(path).is_file():
            raise UserError(f"fvd: no I3D TorchScript file at {path}; give its path or use fd_vae")
        self.path = path
        with reading(path, "I3D as a TorchScript file"):
            self.network = torch.jit.load(str(path), map_location="cpu").eval()
            taken = {argument.name for argument in self.network.forward.schema.arguments}
        if not I3D_CALL.keys() <= taken:
            raise UserError(f"{path}: takes {sorted(taken)}, need I3D that takes {', '.join(I3D_CALL)}")

    def forward(self, videos: Tensor) -> Tensor:  # [B, 3, T, H, W] in [-1, 1] -> [B, 400] float64
        """Scale the short side to 224, cut the centre square and run the network.

        UserError for fewer than 10 frames, or features of another shape.
        """
        if videos.shape[2] < I3D_MIN_FRAMES:
            raise UserError(f"fvd: {videos.shape[2]} frames, I3D needs at least {I3D_MIN_FRAMES}")
        with torch.no_grad():
            features = self.network(_square(videos.float()), **I3D_CALL)
        if features.shape != (len(videos), I3D_FEATURES):
            raise UserError(f"{self.path}: gives {tuple(features.shape)}, need I3D's [{len(videos)}, {I3D_FEATURES}]")
        return features.double()


class VaeFeatures(nn.Module):
    """Pooled latents of a video VAE: per channel the mean, the spread, the mean change per frame.

    The mean alone would not notice a blurred video, mean and spread not a frozen one.
    """

    name = "fd_vae"

    def __init__(self, encode: Callable[[Tensor], Tensor], num_channels: int) -> None:
        """Take `encode`: videos [B, 3, T, H, W] in [-1, 1] to posterior modes [B, C, t, h, w]."""
        super().__init__()
        self.encode = encode
        self.num_features = 3 * num_channels

    def forward(self, videos: Tensor) -> Tensor:  # [B, 3, T, H, W] in [-1, 1] -> [B, 3C] float64
        """Encode and pool over time and space."""
        with torch.no_grad():
            latents = self.encode(videos).double()  # [B, C, t, h, w]
        mean, spread = latents.mean((2, 3, 4)), latents.std((2, 3, 4), correction=0)
        change = latents.diff(dim=2).abs().sum((2, 3, 4)) / max(1, latents[0, 0, 1:].numel())
        return torch.cat([mean, spread, change], dim=1)


class FrechetVideoDistance(FrechetInceptionDistance):
    """The Fréchet distance of torchmetrics on video features, in float64; `name` is the features'.

    update(videos, real) takes [B, 3, T, H, W] in [-1, 1]. With no more videos than features a covariance is singular
    and the distance biased upwards: compute() warns, and such numbers compare only at equal counts.
    """

    def __init__(self, features: I3DFeatures | VaeFeatures) -> None:
        super().__init__(feature=features)
        self.name = features.name
        self.num_features = features.num_features
        # the base class sets it in update(), which a rank without videos never calls
        self.orig_dtype = torch.float64

    def compute(self) -> Tensor:
        """Return the squared distance (float64). RuntimeError for fewer than two videos on a side."""
        fewest = int(min(self.real_features_num_samples, self.fake_features_num_samples))
        if fewest <= self.num_features:
            rank_zero_warn(
                f"{self.name}: {fewest} videos for {self.num_features} features, biased upwards; "
                "compare only with distances from as many videos"
            )
        return super().compute()


def _square(videos: Tensor) -> Tensor:  # [B, 3, T, H, W] -> [B, 3, T, 224, 224]
    height, width = videos.shape[-2:]
    scale = I3D_SIZE / min(height, width)
    # the long side is rounded up, as in public FVD code: 320 x 576 becomes 224 x 404, not 403
    size = (I3D_SIZE, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), I3D_SIZE)
    frames = videos.transpose(1, 2).flatten(0, 1)  # [B·T, 3, H, W]
    # not antialiased, as in public FVD code: distances compare only if computed alike
    frames = nn.functional.interpolate(frames, size=size, mode="bilinear", align_corners=False)
    top, left = (size[0] - I3D_SIZE) // 2, (size[1] - I3D_SIZE) // 2
    frames = frames[..., top : top + I3D_SIZE, left : left + I3D_SIZE]
    return frames.unflatten(0, (videos.shape[0], videos.shape[2])).transpose(1, 2)
