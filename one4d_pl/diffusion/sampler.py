"""The ODE solver from noise to latents."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor


def sampling_sigmas(steps: int) -> np.ndarray:  # [steps]
    """Return the sigma at which each step begins, before the shift: from 1 down by 1 / steps.

    The last step ends at 0. This is Wan's schedule (`get_sampling_sigmas` of its repository). Diffusers' default for
    Euler ends at its smallest training sigma, close to 0, and then steps to 0, which wastes one call of the model.
    """
    return np.linspace(1, 0, steps + 1)[:steps]


def integrate(
    velocity: Callable[[Tensor, Tensor], Tensor],  # (noisy_latents [2B, ...], sigma [2B]) -> [2B, ...]
    noise: Tensor,  # [2B, C, t, h, w]
    steps: int,
    shift: float,
    solver: str,  # one of config.SOLVERS
    on_step: Callable[[int], None],  # called with the number of finished steps
) -> Tensor:  # [2B, C, t, h, w] clean latents
    """Integrate from sigma 1 to 0 on Wan's schedule, by diffusers' Euler or UniPC of order 2."""
    # built from our shift: from_pretrained on Wan's scheduler folder silently drops flow_shift
    if solver == "unipc":
        scheduler = UniPCMultistepScheduler(
            num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(sigmas=sampling_sigmas(steps), device=noise.device)  # shifts them and ends at 0
    latents = noise
    for i, timestep in enumerate(scheduler.timesteps):
        # UniPC rounds its timesteps to whole numbers, a little off its sigmas; diffusers calls the base with those
        sigma = (timestep / 1000).to(torch.float32).expand(len(latents))
        latents = scheduler.step(velocity(latents, sigma).float(), timestep, latents, return_dict=False)[0]
        on_step(i + 1)
    return latents
