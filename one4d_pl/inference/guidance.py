"""Classifier-free guidance with a scale of its own for every sample and branch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from one4d_pl.config import SamplerConfig
from one4d_pl.data.masking import task_of
from one4d_pl.models.transformer import CoupledTransformer
from one4d_pl.models.wan import WanEncoders


@dataclass(frozen=True)
class GuidedText:
    """Text for classifier-free guidance."""

    prompt_embeds: Tensor  # [B, L, D]
    negative_embeds: Tensor  # [B, L, D]
    scale_rgb: Tensor  # [B]
    scale_xyz: Tensor  # [B]

    @staticmethod
    def embed(
        encoders: WanEncoders,
        config: SamplerConfig,
        prompts: list[str],
        negative_prompt: str,
        frame_mask: Tensor,  # [B, T] bool, 1 = given
    ) -> GuidedText:
        """Embed prompts and negative prompt, and look up each sample's guidance by its task."""
        tasks = [task_of(given) for given in frame_mask]
        xyz = config.guidance_xyz or config.guidance
        embeds = encoders.pad_prompt_embeds(encoders.encode_prompts([*prompts, negative_prompt]))
        return GuidedText(
            prompt_embeds=embeds[:-1],
            negative_embeds=embeds[-1:].expand(len(prompts), -1, -1),
            scale_rgb=embeds.new_tensor([config.guidance.of(task) for task in tasks]),
            scale_xyz=embeds.new_tensor([xyz.of(task) for task in tasks]),
        )

    @property
    def is_off(self) -> bool:
        """Tell whether every scale is 1, so that the unconditional branch is not needed."""
        return bool((self.scale_rgb == 1).all() and (self.scale_xyz == 1).all())


def guided_velocity(
    transformer: CoupledTransformer,
    noisy_latents: Tensor,  # [2B, C, t, h, w], rgb first
    condition: Tensor,  # [B, 4 + C, t, h, w]
    sigma: Tensor,  # [2B]
    text: GuidedText,
    image_embeds: Tensor | None,  # [B, N, D]
    two_calls: bool = False,  # half the batch at a time: half the activations, the same result
) -> Tensor:  # [2B, C, t, h, w]
    """Predict the velocity with classifier-free guidance (Ho & Salimans 2022) on text alone.

    Given frames and image tokens stay in both passes.
    """
    if text.is_off:
        return transformer(noisy_latents, condition, sigma, text.prompt_embeds, image_embeds)
    if two_calls:
        inputs = (noisy_latents, condition, sigma)
        conditional = transformer(*inputs, text.prompt_embeds, image_embeds)
        unconditional = transformer(*inputs, text.negative_embeds, image_embeds)
        scale = torch.cat([text.scale_rgb, text.scale_xyz]).view(-1, 1, 1, 1, 1)
        return unconditional + scale * (conditional - unconditional)
    # The order is [rgb_cond, rgb_uncond, xyz_cond, xyz_uncond]: the usual cat(cond, uncond) would
    # send xyz through the rgb LoRA.
    rgb, xyz = noisy_latents.chunk(2)
    sigma_rgb, sigma_xyz = sigma.chunk(2)
    velocity = transformer(
        torch.cat([rgb, rgb, xyz, xyz]),
        condition.repeat(2, 1, 1, 1, 1),
        torch.cat([sigma_rgb, sigma_rgb, sigma_xyz, sigma_xyz]),
        torch.cat([text.prompt_embeds, text.negative_embeds]),
        None if image_embeds is None else image_embeds.repeat(2, 1, 1),
    )
    rgb_cond, rgb_uncond, xyz_cond, xyz_uncond = velocity.chunk(4)
    scale_rgb, scale_xyz = (s.view(-1, 1, 1, 1, 1) for s in (text.scale_rgb, text.scale_xyz))
    return torch.cat(
        [rgb_uncond + scale_rgb * (rgb_cond - rgb_uncond), xyz_uncond + scale_xyz * (xyz_cond - xyz_uncond)]
    )
