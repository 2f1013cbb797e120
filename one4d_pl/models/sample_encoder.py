"""The encoder of whole clips, whose results encoded shards store (data/encoded.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from one4d_pl.config import Config
from one4d_pl.models.conditioning import blank_hidden_frames
from one4d_pl.models.encoder_files import CPU
from one4d_pl.models.pointmap_codec import PointmapCodec
from one4d_pl.models.wan import WanEncoders
from one4d_pl.types import Encoded, Sample


class FrozenSampleEncoder:
    """Encodes whole clips with the frozen encoders; the codec prepares pointmaps for the VAE."""

    def __init__(self, encoders: WanEncoders, codec: PointmapCodec) -> None:
        self.encoders, self.codec = encoders, codec

    @staticmethod
    def of(config: Config, device: torch.device = CPU) -> FrozenSampleEncoder:
        """Open a run's encoders and the codec of its `data.pointmap_power`."""
        encoders = WanEncoders.of(config.base).to(device)
        return FrozenSampleEncoder(encoders, PointmapCodec(config.data.pointmap_power, encoders.latent_channels))

    def encode_sample(self, sample: Sample) -> Encoded:
        """Encode frames, pointmap, caption and first frame of a clip."""
        encoders = self.encoders
        frames, pointmap = sample.frames.to(encoders.latents_mean), sample.pointmap.to(encoders.latents_mean)
        image = encoders.encode_image(frames[None, :, 0])
        prompt = encoders.encode_prompts([sample.caption])[0]
        latents = self.codec.encode_clips(encoders, frames[None], pointmap[None])
        return Encoded(latents, prompt, None if image is None else image[0])

    def encode_prompts(self, prompts: list[str]) -> list[Tensor]:  # [n, D] each
        """Embed texts, as `WanEncoders.encode_prompts` does."""
        return self.encoders.encode_prompts(prompts)

    def encode_conditions(self, sample: Sample, frame_masks: Tensor) -> Tensor:  # [K, T] bool -> [K, C, t, h, w]
        """Encode a clip's condition for several sets of given frames, one by one to save memory."""
        frames = sample.frames.to(self.encoders.latents_mean)[None]
        given = frame_masks.to(frames.device)[:, None]  # [K, 1, T]
        return torch.cat([self.encoders.encode(blank_hidden_frames(frames, one)) for one in given])
