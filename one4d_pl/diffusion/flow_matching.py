"""Flow matching in Wan's sign and timestep (One4D, Eq. 1-4).

With the paper's t and v: sigma = 1 - t, velocity = -v.
"""

from __future__ import annotations

from torch import Tensor


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Move uniform sigmas towards noise: k sigma / (1 + (k - 1) sigma); any shape."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def interpolate(
    latents: Tensor,  # [2B, C, t, h, w] clean
    noise: Tensor,  # [2B, C, t, h, w]
    sigma: Tensor,  # [2B], 1 = noise
) -> tuple[Tensor, Tensor]:
    """Return noisy latents (1 - sigma) latents + sigma noise, and their velocity noise - latents.

    Both are [2B, C, t, h, w].
    """
    sigma = sigma.view(-1, 1, 1, 1, 1)
    return (1 - sigma) * latents + sigma * noise, noise - latents


def mse_per_sample(
    velocity_pred: Tensor,  # [2B, C, t, h, w]
    velocity: Tensor,  # [2B, C, t, h, w]
) -> tuple[Tensor, Tensor]:  # rgb [B], xyz [B]
    """Compute the mean squared error of each sample and branch, in float32."""
    error = (velocity_pred.float() - velocity.float()).square().flatten(1).mean(1)
    rgb, xyz = error.chunk(2)
    return rgb, xyz
