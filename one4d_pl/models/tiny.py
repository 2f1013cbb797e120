"""A tiny Wan with seeded weights, in the 14B's diffusers layout and opened by the same loader."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import nn
from transformers import (
    ByT5Tokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerBase,
    UMT5Config,
    UMT5EncoderModel,
)

from one4d_pl.config import TinyWanConfig
from one4d_pl.errors import UserError
from one4d_pl.files import whole_folder, write_json

IMAGE_DIM = 32  # width of the tiny CLIP


def build_tiny_wan(
    folder: Path, config: TinyWanConfig, vae: AutoencoderKLWan, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write a base around a VAE to `folder`, atomically; the same seed and VAE give the same bytes.

    Args:
        folder: created; left alone if it already holds a base.
        config: shape and seed.
        vae: the base's VAE.
        tokenizer: the base's tokenizer; by default bytes, which need no vocabulary.
    """
    if (folder / "model_index.json").is_file():
        return
    try:
        with whole_folder(folder) as staging, torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            _save_parts(staging, config, vae, tokenizer or ByT5Tokenizer())
    except (OSError, UserError):
        if not (folder / "model_index.json").is_file():  # else another process was faster
            raise


def _save_parts(folder: Path, config: TinyWanConfig, vae: AutoencoderKLWan, tokenizer: PreTrainedTokenizerBase) -> None:
    vae.save_pretrained(folder / "vae")
    transformer = WanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=2 * vae.config.z_dim + vae.config.scale_factor_temporal,
        out_channels=vae.config.z_dim,
        text_dim=config.text_dim,
        freq_dim=64,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        image_dim=IMAGE_DIM if config.image_tokens else None,
        added_kv_proj_dim=config.num_heads * config.head_dim if config.image_tokens else None,
    )
    _pass_noise_through(transformer)
    transformer.save_pretrained(folder / "transformer")
    text_config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=config.text_dim,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        tie_word_embeddings=False,
    )
    UMT5EncoderModel(text_config).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanImageToVideoPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", type(tokenizer).__name__],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if config.image_tokens:
        image_config = CLIPVisionConfig(
            hidden_size=IMAGE_DIM, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32,
            patch_size=8,
        )  # fmt: skip
        CLIPVisionModel(image_config).save_pretrained(folder / "image_encoder")
        index["image_encoder"] = ["transformers", "CLIPVisionModel"]
    write_json(folder / "model_index.json", index)


def _pass_noise_through(transformer: WanTransformer3DModel) -> None:
    """Make the output layer read what the patch embedding wrote, as in trained denoisers.

    A wholly random Wan loses the noise between the two, and an adapter would spend its training on learning to pass it.
    """
    channels, width = transformer.config.out_channels, transformer.proj_out.in_features
    kernel = transformer.patch_embedding.weight.data  # [D, 2C + 4, 1, p, p]
    patch = kernel.shape[-2] * kernel.shape[-1]
    mixing = nn.init.orthogonal_(torch.empty(width, channels * patch))  # [D, C p p]
    kernel[:, :channels] = mixing.view(width, channels, *kernel.shape[2:])
    # unpatchify reads the output layer's rows as (p, p, C); the final norm gives the hidden state unit variance
    head = mixing.T.view(channels, patch, width).transpose(0, 1).flatten(0, 1)  # [p p C, D]
    transformer.proj_out.weight.data.copy_(head * (channels * patch / width) ** 0.5)
