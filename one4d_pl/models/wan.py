"""The frozen Wan: one loader for every size, and the encoders around the transformer.

The folder is in diffusers' layout or in Wan's own (base_files.py). Only this module converts
between pixels and diffusers' normalised latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from one4d_pl.config import BaseConfig, ConfigError
from one4d_pl.models.base_files import ENCODER_PARTS as ENCODER_PARTS
from one4d_pl.models.base_files import fingerprint as fingerprint
from one4d_pl.models.base_files import resolve_base, tokenizer_folder
from one4d_pl.models.encoder_files import CPU, open_image_encoder, open_text_encoder, open_vae
from one4d_pl.models.host_memory import VisitingBlocks
from one4d_pl.models.quantisation import quantise_linears
from one4d_pl.models.weights import Partitioner, stream_transformer

IMAGE_CONTEXT = 512  # diffusers' Wan assumes this many text tokens where it separates image from text tokens
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # the image encoder's own input statistics (OpenAI CLIP)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def load_transformer(
    path: str,
    dtype: str,
    device: torch.device | None = None,  # None = CPU
    partitioner: Partitioner | None = None,  # shards the blocks over processes as they are read
    quantisation: str = "none",  # of the blocks' linears: none, int8, fp8
    offload: bool = False,  # leave the blocks' weights in host memory (host_memory.py)
) -> WanTransformer3DModel:
    """Load the transformer alone, in `dtype`.

    As in diffusers, Wan's norms, time embedding and modulation are float32. Each block is quantised
    and moved to the host as soon as it is read, so that the device never holds two whole ones.
    """
    device = device or CPU
    visiting = VisitingBlocks(device) if offload else None

    def after_block(block: nn.Module) -> None:
        if quantisation != "none":
            quantise_linears(block, quantisation)
        if visiting is not None:
            visiting.park(block)

    return stream_transformer(resolve_base(path), getattr(torch, dtype), device, partitioner, after_block)


def pad_prompt_embeds(embeds: list[Tensor], length: int) -> Tensor:  # [n_i, D] each -> [B, length, D]
    """Pad with zeros, as Wan was trained; the transformer attends to the zeros too."""
    padded = embeds[0].new_zeros(len(embeds), length, embeds[0].shape[-1])
    for row, embed in zip(padded, embeds, strict=True):
        row[: len(embed)] = embed
    return padded


class WanEncoders(nn.Module):
    """VAE, text encoder and (where the base has one) CLIP image encoder, all frozen.

    The VAE stays float32.

    Args:
        path: base folder in either layout, or a hub id in the local cache.
        dtype: dtype of the text and image encoder.
        max_text_tokens: prompts are cut and their embeddings zero-padded to this length.
        device: where the weights are put as they are read.
    """

    latents_mean: Tensor  # [1, C, 1, 1, 1]
    latents_std: Tensor  # [1, C, 1, 1, 1]

    def __init__(self, path: str, dtype: str, max_text_tokens: int, device: torch.device = CPU) -> None:
        super().__init__()
        folder, torch_dtype = resolve_base(path), getattr(torch, dtype)
        self.vae = open_vae(folder, device)
        self.text_encoder = open_text_encoder(folder, torch_dtype, device)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            tokenizer_folder(folder), trust_remote_code=False
        )
        self.image_encoder = open_image_encoder(folder, torch_dtype, device)
        if self.image_encoder is not None and max_text_tokens != IMAGE_CONTEXT:
            raise ConfigError(
                f"base.max_text_tokens: {max_text_tokens}, but diffusers' Wan with image tokens fixes "
                f"{IMAGE_CONTEXT} text tokens; set base.max_text_tokens={IMAGE_CONTEXT}"
            )
        self.max_text_tokens = max_text_tokens
        self.waits_on_host = False  # see wait_on_host
        self.requires_grad_(False).eval()
        shape = (1, -1, 1, 1, 1)
        self.register_buffer("latents_mean", torch.tensor(self.vae.config.latents_mean).view(shape), persistent=False)
        self.register_buffer("latents_std", torch.tensor(self.vae.config.latents_std).view(shape), persistent=False)

    @staticmethod
    def of(base: BaseConfig, device: torch.device = CPU) -> WanEncoders:
        """Open the encoders of a run's base."""
        return WanEncoders(base.path, base.dtype, base.max_text_tokens, device)

    def wait_on_host(self, device: torch.device) -> WanEncoders:
        """Keep the weights in host memory; each part is on `device` only while it works.

        The text encoder, by far the largest part, visits it block by block.
        """
        if self.waits_on_host:
            return self
        self.to(CPU)
        if device.type != "cpu":
            self._park_text_blocks(device)
        if device.type == "cuda" and torch.cuda.is_available():
            for part in (self.vae, self.text_encoder, self.image_encoder):
                for tensor in () if part is None else (*part.parameters(), *part.buffers()):
                    tensor.data = tensor.data.pin_memory()  # copying takes half a second instead of two
        self.latents_mean, self.latents_std = self.latents_mean.to(device), self.latents_std.to(device)
        self.waits_on_host = device.type != "cpu"
        return self

    def _park_text_blocks(self, device: torch.device) -> None:
        visiting = VisitingBlocks(device)
        for block in self.text_encoder.encoder.block:
            visiting.park(block)

    @contextmanager
    def _at_work(self, part: nn.Module) -> Iterator[None]:
        """Put a part on the device for this section. Its host copy is kept and put back afterwards."""
        if not self.waits_on_host:
            yield
            return
        tensors = [*part.parameters(), *part.buffers()]
        on_host = [tensor.data for tensor in tensors]
        try:
            with torch.inference_mode(False):  # tensors made in inference mode cannot be used outside of it
                for tensor in tensors:
                    tensor.data = tensor.data.to(self.latents_mean.device, non_blocking=True, copy=True)
            yield
        finally:
            with torch.inference_mode(False):
                for tensor, data in zip(tensors, on_host, strict=True):
                    tensor.data = data

    @property
    def temporal_factor(self) -> int:
        """Return the VAE's temporal compression: T = factor * (t - 1) + 1."""
        return self.vae.config.scale_factor_temporal

    @property
    def spatial_factor(self) -> int:
        """Return the VAE's spatial compression: H = factor * h."""
        return self.vae.config.scale_factor_spatial

    @property
    def latent_channels(self) -> int:
        """Return the number of latent channels C."""
        return self.vae.config.z_dim

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:  # C, t, h, w
        """Return the shape of the latents of one video of this size."""
        factor = self.spatial_factor
        return self.latent_channels, (num_frames - 1) // self.temporal_factor + 1, height // factor, width // factor

    def train(self, mode: bool = True) -> WanEncoders:
        """Stay in eval mode, whatever Lightning asks: the encoders are frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:  # [B, 3, T, H, W] in [-1, 1] -> [B, C, t, h, w]
        """Encode to the normalised posterior mode, in float32.

        bfloat16 would quantise pointmaps to 2^-8 of the scene.
        """
        num_frames, height, width = video.shape[2:]
        if num_frames % self.temporal_factor != 1:
            raise ValueError(f"video: {num_frames} frames, need {self.temporal_factor}k+1; Wan's VAE drops the rest")
        if height % self.spatial_factor or width % self.spatial_factor:
            raise ValueError(f"video: {height}x{width} is not a multiple of the VAE's {self.spatial_factor}")
        with self._at_work(self.vae), torch.autocast(video.device.type, enabled=False):
            mode = self.vae.encode(video.float()).latent_dist.mode()
        return (mode - self.latents_mean) / self.latents_std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:  # [B, C, t, h, w] -> [B, 3, T, H, W] in [-1, 1]
        """Decode to pixels or pointmaps, in float32; Wan's VAE clamps at +-1."""
        with self._at_work(self.vae), torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode(latents.float() * self.latents_std + self.latents_mean).sample

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> list[Tensor]:  # -> [n, D] each, n <= max_text_tokens
        """Embed texts, each cut to its true length; `pad_prompt_embeds` stacks them."""
        tokens = self.tokenizer(
            prompts,
            padding="longest",
            max_length=self.max_text_tokens,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.latents_mean.device)
        with self._at_work(self.text_encoder):
            embeds = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        lengths = tokens.attention_mask.sum(dim=1).tolist()
        return [embed[:length].float() for embed, length in zip(embeds, lengths, strict=True)]

    def pad_prompt_embeds(self, embeds: list[Tensor]) -> Tensor:  # [n_i, D] each -> [B, max_text_tokens, D]
        """Pad to `max_text_tokens`, as the function `pad_prompt_embeds` does."""
        return pad_prompt_embeds(embeds, self.max_text_tokens)

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Tensor | None:  # [B, 3, H, W] in [-1, 1] -> [B, N, D]
        """Embed frame 0 as CLIP tokens of the penultimate layer; None where the base has no CLIP.

        The picture is squashed to the encoder's square, as Fun-InP was trained.
        """
        if self.image_encoder is None:
            return None
        size = self.image_encoder.config.image_size
        pixels = interpolate((image.float() + 1) / 2, (size, size), mode="bicubic", align_corners=False)
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        pixels = ((pixels - mean) / std).to(self.image_encoder.dtype)
        with self._at_work(self.image_encoder):
            return self.image_encoder(pixels, output_hidden_states=True).hidden_states[-2].float()

    def encode_first_frame(
        self,
        frames: Tensor,  # [B, 3, T, H, W] in [-1, 1]
        frame_mask: Tensor,  # [B, T] bool, 1 = given
    ) -> Tensor | None:  # [B, N, D]
        """Embed frame 0 by `encode_image`; zeros where it is hidden.

        The tokens are zero, not absent, as Fun-InP was trained.
        """
        image_embeds = self.encode_image(frames[:, :, 0])
        return None if image_embeds is None else torch.where(frame_mask[:, :1, None], image_embeds, 0.0)
