"""Pointmaps as the network sees them: bent, encoded by the frozen VAE, standardised; and back."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from one4d_pl.config import ConfigError
from one4d_pl.geometry.pointmap import bend, unbend


class VideoEncoder(Protocol):
    """What the codec needs of `WanEncoders`, whose libraries a bench of the network alone does without."""

    def encode(self, video: Tensor) -> Tensor: ...  # [B, 3, T, H, W] -> [B, C, t, h, w]

    def decode(self, latents: Tensor) -> Tensor: ...  # [B, C, t, h, w] -> [B, 3, T, H, W]


class PointmapCodec(nn.Module):
    """Turns normalised pointmaps into the network's latents and back.

    Its settings are in the adapter's card. Encoded shards hold latents from before `standardise`,
    since its statistics are measured on them.

    Args:
        power: power of `geometry.pointmap.bend`, by which the VAE sees distances (data.pointmap_power); 1 = linear.
        channels: number of latent channels C.
        device: where the statistics lie.
    """

    mean: Tensor  # [C, 1, 1, 1]
    std: Tensor  # [C, 1, 1, 1]

    def __init__(self, power: float, channels: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.power = power
        self.standardises = False  # until `set_statistics`
        self.register_buffer("mean", torch.zeros(channels, 1, 1, 1, device=device), persistent=False)
        self.register_buffer("std", torch.ones(channels, 1, 1, 1, device=device), persistent=False)

    def encode(self, encoders: VideoEncoder, pointmap: Tensor) -> Tensor:  # [B, 3, T, H, W] -> [B, C, t, h, w]
        """Encode normalised pointmaps; the latents are not standardised yet."""
        return encoders.encode(self._bend(pointmap))

    def encode_clips(
        self, encoders: VideoEncoder, frames: Tensor, pointmap: Tensor
    ) -> Tensor:  # [B, 3, T, H, W] x 2 -> [2B, C, t, h, w]
        """Encode both branches, frames first; the latents are not standardised yet."""
        return encoders.encode(torch.cat([frames, self._bend(pointmap)]))

    def decode(self, encoders: VideoEncoder, latents: Tensor) -> Tensor:  # [B, C, t, h, w] -> [B, 3, T, H, W]
        """Undo `encode`."""
        return unbend(encoders.decode(latents).movedim(1, -1), self.power).movedim(-1, 1)

    def standardise(self, latents: Tensor) -> Tensor:  # [2B, C, t, h, w], rgb first
        """Give the pointmaps' latents mean 0 and deviation 1 per channel. The frames' stay the same."""
        rgb, xyz = latents.chunk(2)
        return torch.cat([rgb, (xyz - self.mean) / self.std])

    def restore(self, latents: Tensor) -> Tensor:  # [2B, C, t, h, w], rgb first
        """Undo `standardise`."""
        rgb, xyz = latents.chunk(2)
        return torch.cat([rgb, xyz * self.std + self.mean])

    def set_statistics(self, mean: list[float], std: list[float]) -> None:  # [C] each
        """Set what `standardise` subtracts and divides by.

        Raises ConfigError unless there are C of each and all deviations are above 0.
        """
        if len(mean) != len(self.mean) or len(std) != len(self.std) or not min(std) > 0:
            raise ConfigError(
                f"xyz statistics: need {len(self.mean)} means and as many deviations above 0, got {mean}, {std}"
            )
        for buffer, values in ((self.mean, mean), (self.std, std)):
            buffer.copy_(torch.tensor(values).view_as(buffer))
        self.standardises = True

    @property
    def statistics(self) -> dict[str, list[float]] | None:
        """Return what `set_statistics` was given, for the card. Returns None where nothing is standardised."""
        if not self.standardises:
            return None
        return {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}

    def _bend(self, pointmap: Tensor) -> Tensor:  # [B, 3, T, H, W]
        return bend(pointmap.movedim(1, -1), self.power).movedim(-1, 1)
