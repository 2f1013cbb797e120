"""A real video VAE with random weights, for tests that need a bundle and no pictures."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan


def seeded_vae(dim: int, seed: int, calibration: torch.Tensor) -> AutoencoderKLWan:
    """Random weights, and latents' statistics that are measured, as a trained one's are.

    Args:
        dim: width.
        seed: of the weights.
        calibration: [B, 3, T, H, W] in [-1, 1], clips like those it will see: the diffusion needs unit variance.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(
            base_dim=dim, z_dim=16, num_res_blocks=1, latents_mean=[0.0] * 16, latents_std=[1.0] * 16
        )
    with torch.no_grad():
        latents = vae.encode(calibration).latent_dist.mode().transpose(0, 1).flatten(1)  # [C, N]
    vae.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())
    return vae
