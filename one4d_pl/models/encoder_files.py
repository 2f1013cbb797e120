"""The base's VAE, text and image encoder, opened from either layout by one streaming loader.

Wan's own files carry no config of the encoders: sizes are read from the tensors' shapes, and what shapes cannot tell is
taken as in Wan 2.1. transformers' own loader is not used: its release 5 leaves UMT5's input embedding empty where the
file holds it only once, as Wan's does, and merely warns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from one4d_pl.config import ConfigError
from one4d_pl.models.base_files import is_original, transformer_config, weight_files
from one4d_pl.models.original_names import (
    IMAGE_UNUSED,
    Source,
    image_encoder_source,
    text_encoder_source,
    vae_source,
)
from one4d_pl.models.weights import TensorFiles, stream

T = TypeVar("T")
CPU = torch.device("cpu")
# per level; Wan 2.1's, as are AutoencoderKLWan's other defaults, latents' statistics among them
WAN_VAE_RESIDUAL_BLOCKS = 2
CLIP_HEAD = 80  # channels of an attention head of ViT-H/14
EMBEDDINGS = "encoder.embed_tokens.weight"
CLIP_PREFIX = "vision_model."  # every name begins with it in some releases of transformers


def open_vae(folder: Path, device: torch.device = CPU) -> AutoencoderKLWan:
    """Open the VAE, in float32."""
    if is_original(folder):
        source_of = partial(vae_source, residual_blocks=WAN_VAE_RESIDUAL_BLOCKS)
        files = TensorFiles(weight_files(folder, "vae"), folder, source_of)
        config = {"base_dim": files.shape("encoder.conv1.weight")[0], "z_dim": files.shape("conv2.weight")[0]}
    else:
        files = _diffusers_files(folder, "vae")
        config = _readable(AutoencoderKLWan.load_config, folder / "vae")
    with init_empty_weights(include_buffers=False):
        model = AutoencoderKLWan.from_config(config)
    return stream(model, files, torch.float32, device)


def open_text_encoder(folder: Path, dtype: torch.dtype, device: torch.device = CPU) -> UMT5EncoderModel:
    """Open UMT5's encoder; its input embedding is the shared one."""
    if is_original(folder):
        files = TensorFiles(weight_files(folder, "text_encoder"), folder, text_encoder_source)
        config = _umt5_config(files)
    else:
        files = _diffusers_files(folder, "text_encoder")
        if EMBEDDINGS not in files:
            files.source_of = lambda name: Source("shared.weight" if name == EMBEDDINGS else name)
        config = _readable(UMT5Config.from_pretrained, folder / "text_encoder")
    with init_empty_weights(include_buffers=False):
        model = UMT5EncoderModel(config)
    if files.source_of(EMBEDDINGS) == files.source_of("shared.weight"):
        model.encoder.embed_tokens = model.shared  # 2.1 GB in bfloat16, held once
    return stream(model, files, dtype, device)


def open_image_encoder(folder: Path, dtype: torch.dtype, device: torch.device = CPU) -> CLIPVisionModel | None:
    """Open CLIP's vision tower; None where the base has no image tokens."""
    if is_original(folder):
        if transformer_config(folder)["image_dim"] is None:
            return None
        files = TensorFiles(weight_files(folder, "image_encoder"), folder, image_encoder_source)
        config, unused = _clip_config(files), IMAGE_UNUSED
    else:
        if not (folder / "image_encoder" / "config.json").is_file():
            return None
        files, unused = _diffusers_files(folder, "image_encoder"), ["position_ids", "visual_projection"]
        prefix = CLIP_PREFIX if f"{CLIP_PREFIX}embeddings.class_embedding" in files else ""
        files.source_of = lambda name: Source(prefix + name.removeprefix(CLIP_PREFIX))
        config = _readable(CLIPVisionConfig.from_pretrained, folder / "image_encoder")
    with init_empty_weights(include_buffers=False):
        model = CLIPVisionModel(config)
    return stream(model, files, dtype, device, unused=unused)


def _diffusers_files(folder: Path, part: str) -> TensorFiles:
    return TensorFiles(weight_files(folder, part), folder / part)


def _readable(load: Callable[[Path], T], place: Path) -> T:
    try:
        return load(place)
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{place}: no readable config.json ({str(error).splitlines()[0]})") from None


def _umt5_config(files: TensorFiles) -> UMT5Config:
    vocabulary, width = files.shape("token_embedding.weight")
    buckets, heads = files.shape("blocks.0.pos_embedding.embedding.weight")
    return UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=files.shape("blocks.0.attn.q.weight")[0] // heads,
        d_ff=files.shape("blocks.0.ffn.fc1.weight")[0],
        num_layers=files.count("blocks.#.norm1.weight"),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
    )


def _clip_config(files: TensorFiles) -> CLIPVisionConfig:
    width, _, _, patch = files.shape("visual.patch_embedding.weight")
    _, tokens, _ = files.shape("visual.pos_embedding")  # the class token's and one per patch
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=files.shape("visual.transformer.0.mlp.0.weight")[0],
        num_hidden_layers=files.count("visual.transformer.#.norm1.weight"),
        num_attention_heads=max(1, width // CLIP_HEAD),
        image_size=math.isqrt(tokens - 1) * patch,
        patch_size=patch,
        hidden_act="gelu",
    )
