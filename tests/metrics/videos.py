"""Videos and a small I3D for the tests of video metrics."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn


class TinyI3D(nn.Module):
    """The call signature of the shared I3D file, with pooled pixels as features."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        if rescale or resize or not return_features or x.shape[-2:] != (224, 224):
            raise RuntimeError("called in another way than the real file")
        return nn.functional.adaptive_avg_pool3d(x, (4, 10, 10)).mean(1).flatten(1)


def saved(network: nn.Module, folder: Path) -> Path:
    torch.jit.save(torch.jit.script(network), folder / "i3d.pt")
    return folder / "i3d.pt"


def waves(seed: float, height: int, width: int, num_frames: int = 10) -> Tensor:
    """[3, T, H, W] float64 in [-1, 1]: sines that no neighbouring pixels share, so that half a pixel shows."""
    channel, frame = torch.arange(3.0).view(3, 1, 1, 1) + 1, torch.arange(num_frames).view(1, -1, 1, 1)
    v, u = torch.arange(height).view(1, 1, -1, 1), torch.arange(width).view(1, 1, 1, -1)
    along_u, along_v = (0.37 + 0.05 * seed) * channel, (0.23 + 0.03 * seed) * channel.sqrt()
    return torch.sin(along_u.double() * u + along_v.double() * v + 0.61 * frame + seed)
