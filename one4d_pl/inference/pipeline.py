"""The only sampler: prompts and given frames in, RGB frames and pointmaps out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from one4d_pl.config import Config, SamplerConfig
from one4d_pl.data.masking import task_of
from one4d_pl.diffusion.sampler import integrate
from one4d_pl.models.adapters import load_adapters
from one4d_pl.models.conditioning import encode_condition
from one4d_pl.models.transformer import One4DTransformer
from one4d_pl.models.wan import WanEncoders, fingerprint, load_transformer


@dataclass(frozen=True)
class GeneratedScene:
    """What one call produces, on the encoders' device."""

    frames: Tensor  # [B, 3, T, H, W] in [-1, 1]; given frames are decoded, never pasted
    pointmap: Tensor  # [B, 3, T, H, W] in [-1, 1], camera-0 coordinates, normalised


@dataclass(frozen=True)
class GuidedText:
    """Text for classifier-free guidance."""

    prompt_embeds: Tensor  # [B, L, D]
    negative_embeds: Tensor  # [B, L, D]
    scale_rgb: Tensor  # [B]
    scale_xyz: Tensor  # [B]


class One4DPipeline:
    """Sample 4D scenes from an adapted Wan.

    Args:
        transformer: base plus adapter.
        encoders: the base's VAE, text and image encoder.
        config: steps and guidance.
        shift: sigma shift, the one the adapter was trained with.
        negative_prompt: of the unconditional branch.
    """

    def __init__(
        self,
        transformer: One4DTransformer,
        encoders: WanEncoders,
        config: SamplerConfig,
        shift: float,
        negative_prompt: str,
    ) -> None:
        self.transformer, self.encoders, self.config = transformer, encoders, config
        self.shift, self.negative_prompt = shift, negative_prompt

    @staticmethod
    def open(config: Config, adapters: Path | None) -> One4DPipeline:
        """The base at `base.path` with an adapter folder; None leaves the base as it is, both branches alike.

        Raises ConfigError where the adapter is not of this base or not of the config's shape.
        """
        base = config.base
        encoders = WanEncoders(base.path, base.dtype, base.max_text_tokens)
        transformer = One4DTransformer(load_transformer(base.path, base.dtype), config.dlc, config.train.seed)
        if adapters is not None:
            load_adapters(transformer, adapters, fingerprint(base.path))
        return One4DPipeline(transformer, encoders, config.sampler, config.flow.shift, base.negative_prompt)

    @torch.no_grad()
    def sample(
        self,
        prompts: list[str],
        frames: Tensor,  # [B, 3, T, H, W] in [-1, 1]; hidden frames are never read
        frame_mask: Tensor,  # [B, T] bool, 1 = given
        noise: Tensor,  # [2B, C, t, h, w], rgb first
        on_step: Callable[[int], None] = lambda step: None,
    ) -> GeneratedScene:
        """Generate; guidance follows each sample's task (none, first, some or all frames given)."""
        encoders = self.encoders
        condition = encode_condition(encoders.encode, frames, frame_mask, encoders.temporal_factor)
        image_embeds = encode_first_frame(encoders, frames, frame_mask)
        text = self.guided_text(prompts, frame_mask)
        latents = integrate(
            lambda noisy, sigma: guided_velocity(self.transformer, noisy, condition, sigma, text, image_embeds),
            noise,
            self.config.steps,
            self.shift,
            on_step,
        )
        rgb, xyz = latents.chunk(2)
        return GeneratedScene(encoders.decode(rgb), encoders.decode(xyz))

    def guided_text(self, prompts: list[str], frame_mask: Tensor) -> GuidedText:
        """Embed prompts and negative prompt, and look up each sample's guidance by its task."""
        tasks = [task_of(given) for given in frame_mask]
        xyz = self.config.guidance_xyz or self.config.guidance
        embeds = self.encoders.pad_prompt_embeds(self.encoders.encode_prompts([*prompts, self.negative_prompt]))
        return GuidedText(
            prompt_embeds=embeds[:-1],
            negative_embeds=embeds[-1:].expand(len(prompts), -1, -1),
            scale_rgb=embeds.new_tensor([self.config.guidance.of(task) for task in tasks]),
            scale_xyz=embeds.new_tensor([xyz.of(task) for task in tasks]),
        )


def encode_first_frame(
    encoders: WanEncoders,
    frames: Tensor,  # [B, 3, T, H, W] in [-1, 1]
    frame_mask: Tensor,  # [B, T] bool, 1 = given
) -> Tensor | None:  # [B, N, D]
    """CLIP tokens of frame 0; zero features (not absent tokens) where frame 0 is hidden, as Fun-InP was trained."""
    image_embeds = encoders.encode_image(frames[:, :, 0])
    if image_embeds is None:
        return None
    return torch.where(frame_mask[:, :1, None], image_embeds, 0.0)


def guided_velocity(
    transformer: One4DTransformer,
    noisy_latents: Tensor,  # [2B, C, t, h, w], rgb first
    condition: Tensor,  # [B, 4 + C, t, h, w]
    sigma: Tensor,  # [2B]
    text: GuidedText,
    image_embeds: Tensor | None,  # [B, N, D]
) -> Tensor:  # [2B, C, t, h, w]
    """Classifier-free guidance on text alone: given frames and image tokens stay in both passes."""
    if bool((text.scale_rgb == 1).all() and (text.scale_xyz == 1).all()):
        return transformer(noisy_latents, condition, sigma, text.prompt_embeds, image_embeds)
    # [rgb_cond, rgb_uncond, xyz_cond, xyz_uncond]: the usual cat(cond, uncond) would send xyz through the rgb LoRA
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
