"""Names of diffusers' and transformers' tensors in Wan's original files.

Each function takes the name that our model uses and returns the place in the original file. The numbers are the same
under other names, except that CLIP's queries, keys and values are one matrix there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A tensor of a file, or a part of one."""

    key: str
    part: int = 0  # which of `parts` equal pieces along the first axis
    parts: int = 1
    leading: int = 0  # how many leading axes of length 1 to drop


def same_name(name: str) -> Source:
    """Find a tensor in a file that uses the names of the library that opens it."""
    return Source(name)


TRANSFORMER = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "proj_out": "head.head",
}
TRANSFORMER_BLOCK = {
    **{
        f"{ours}.{inner}": f"{theirs}.{original}"
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for inner, original in (
            ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"), ("norm_q", "norm_q"), ("norm_k", "norm_k")
        )
    },
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
    "norm2": "norm3",  # before cross-attention; Wan's own norm2, before the feed-forward, has no weight
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}  # fmt: skip
TEXT_BLOCK = {
    "layer.0.SelfAttention.q": "attn.q",
    "layer.0.SelfAttention.k": "attn.k",
    "layer.0.SelfAttention.v": "attn.v",
    "layer.0.SelfAttention.o": "attn.o",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.0.layer_norm": "norm1",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
    "layer.1.layer_norm": "norm2",
}
TEXT = {
    "shared": "token_embedding",
    "encoder.embed_tokens": "token_embedding",  # the same matrix
    "encoder.final_layer_norm": "norm",
}
IMAGE = {
    "embeddings.patch_embedding.weight": Source("visual.patch_embedding.weight"),
    "embeddings.class_embedding": Source("visual.cls_embedding", leading=2),
    "embeddings.position_embedding.weight": Source("visual.pos_embedding", leading=1),
    **{
        f"{ours}.{leaf}": Source(f"visual.{theirs}.{leaf}")
        for ours, theirs in (("pre_layrnorm", "pre_norm"), ("post_layernorm", "post_norm"))
        for leaf in ("weight", "bias")
    },
}
IMAGE_BLOCK = {
    "self_attn.out_proj": "attn.proj",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
IMAGE_UNUSED = ["textual.", "log_scale", "visual.head"]  # CLIP's text tower and the projection of its pooled vector
VAE = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    **{
        f"{side}.{ours}": f"{side}.{theirs}"
        for side in ("encoder", "decoder")
        for ours, theirs in (("conv_in", "conv1"), ("norm_out", "head.0"), ("conv_out", "head.2"))
    },
}
VAE_RESIDUAL = {
    "norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}  # fmt: skip


def transformer_source(name: str) -> Source:
    """Find a tensor of WanTransformer3DModel in `diffusion_pytorch_model*.safetensors`."""
    if name == "scale_shift_table":
        return Source("head.modulation")
    if inside := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        block, rest = inside.groups()
        if rest == "scale_shift_table":
            return Source(f"blocks.{block}.modulation")
        return Source(f"blocks.{block}.{_renamed(rest, TRANSFORMER_BLOCK)}")
    return Source(_renamed(name, TRANSFORMER))


def text_encoder_source(name: str) -> Source:
    """Find a tensor of transformers' UMT5EncoderModel in `models_t5_umt5-xxl-enc-bf16.pth`."""
    if inside := re.fullmatch(r"encoder\.block\.(\d+)\.(.+)", name):
        return Source(f"blocks.{inside[1]}.{_renamed(inside[2], TEXT_BLOCK)}")
    return Source(_renamed(name, TEXT))


def image_encoder_source(name: str) -> Source:
    """Find a tensor of transformers' CLIPVisionModel.

    The file is `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`.
    """
    name = name.removeprefix("vision_model.")  # a prefix in some releases of transformers only
    if inside := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
        layer, path, leaf = inside.groups()
        if path in QKV:
            return Source(f"visual.transformer.{layer}.attn.to_qkv.{leaf}", QKV.index(path), len(QKV))
        return Source(f"visual.transformer.{layer}.{IMAGE_BLOCK[path]}.{leaf}")
    return IMAGE[name]


def vae_source(name: str, residual_blocks: int) -> Source:  # residual_blocks: per level of the encoder, 2 in Wan 2.1
    """Find a tensor of diffusers' AutoencoderKLWan in `Wan2.1_VAE.pth`."""
    if inside := re.fullmatch(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        side, kind, i, rest = inside.groups()  # the middle is resnet, attention, resnet
        if kind == "attentions":
            return Source(f"{side}.middle.1.{rest}")
        return Source(f"{side}.middle.{2 * int(i)}.{_renamed(rest, VAE_RESIDUAL)}")
    if inside := re.fullmatch(r"encoder\.down_blocks\.(\d+)\.(.+)", name):
        return Source(f"encoder.downsamples.{inside[1]}.{_renamed_residual(inside[2])}")
    if inside := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.+)", name):
        level, kind, i, rest = inside.groups()  # a level: one residual block more than the encoder's, then an upsampler
        place = int(level) * (residual_blocks + 2) + (int(i) if kind == "resnets" else residual_blocks + 1)
        return Source(f"decoder.upsamples.{place}.{_renamed_residual(rest)}")
    return Source(_renamed(name, VAE))


def _renamed(name: str, table: dict[str, str]) -> str:
    """Rename a module's path by the table; keep the parameter's own name."""
    path, _, leaf = name.rpartition(".")
    return f"{table[path]}.{leaf}"


def _renamed_residual(name: str) -> str:
    """Rename inside a level of the VAE, where resampling layers have the same names in both."""
    return name if name.startswith(("resample.", "time_conv.")) else _renamed(name, VAE_RESIDUAL)
