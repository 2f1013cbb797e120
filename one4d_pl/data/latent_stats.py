"""Mean and deviation per channel of encoded clips; 4DNeX found the branches to differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from one4d_pl.data.encoded import EncodedSet


@dataclass(frozen=True)
class LatentStats:
    """Mean and standard deviation per channel, over all clips and latent positions."""

    rgb_mean: list[float]
    rgb_std: list[float]
    xyz_mean: list[float]
    xyz_std: list[float]
    clips: int


def latent_statistics(sets: Sequence[EncodedSet], clips: int) -> LatentStats:
    """Measure `clips` evenly spaced clips of every set, or all where it has fewer."""
    count, measured = 0, 0
    total = squares = torch.zeros((), device="cpu")  # clips are read on the CPU, whatever the default device is
    for encoded in sets:
        for index in spread(len(encoded), clips):
            latents = encoded.read(index).latents.double().flatten(2)  # [2, C, N]
            count, measured = count + latents.shape[-1], measured + 1
            total, squares = total + latents.sum(-1), squares + latents.square().sum(-1)  # [2, C]
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    (rgb_mean, xyz_mean), (rgb_std, xyz_std) = mean.tolist(), std.tolist()
    return LatentStats(rgb_mean, rgb_std, xyz_mean, xyz_std, measured)


def spread(length: int, count: int) -> list[int]:
    """List at most `count` evenly spaced indices below `length`."""
    count = min(count, length)
    return [round(n * (length - 1) / max(count - 1, 1)) for n in range(count)]
