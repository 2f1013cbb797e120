"""The ODE solver from noise to latents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor


def integrate(
    velocity: Callable[[Tensor, Tensor], Tensor],  # (noisy_latents [2B, ...], sigma [2B]) -> [2B, ...]
    noise: Tensor,  # [2B, C, t, h, w]
    steps: int,
    shift: float,
    on_step: Callable[[int], None],  # called with the number of finished steps
) -> Tensor:  # [2B, C, t, h, w] clean latents
    """Euler from sigma 1 to 0 on the shifted schedule of diffusers' FlowMatchEulerDiscreteScheduler."""
    # built from our shift: from_pretrained on Wan's scheduler folder drops flow_shift in silence
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(steps, device=noise.device)
    latents = noise
    for i, timestep in enumerate(scheduler.timesteps):
        sigma = (timestep / 1000).to(torch.float32).expand(len(latents))
        latents = scheduler.step(velocity(latents, sigma).float(), timestep, latents, return_dict=False)[0]
        on_step(i + 1)
    return latents
