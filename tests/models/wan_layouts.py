"""One tiny Wan in both layouts: diffusers', and the original one of Wan-AI and VideoX-Fun, with every kind of tensor.

The original names are written down here as those projects publish them, apart from the package's own tables; what they
mean is diffusers' own converter's word (transformer, VAE) or the reference forward passes in test_original_layout.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import ByT5Tokenizer, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
IMAGE_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
VAE_FILE = "Wan2.1_VAE.pth"
TRANSFORMER_FILE = "diffusion_pytorch_model.safetensors"
WEIGHT_BIAS = ("weight", "bias")


def transformer_names(num_layers: int, image_tokens: bool) -> list[str]:
    """Of WanModel (and VideoX-Fun's copy of it) with model_type i2v or t2v."""
    modules = ["patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"]
    modules += ["time_projection.1", "head.head"]
    norms = []
    if image_tokens:
        modules += [f"img_emb.proj.{i}" for i in (0, 1, 3, 4)]
    for i in range(num_layers):
        attentions = product(("self_attn", "cross_attn"), ("q", "k", "v", "o"))
        modules += [f"blocks.{i}.{attention}.{linear}" for attention, linear in attentions]
        modules += [f"blocks.{i}.{name}" for name in ("norm3", "ffn.0", "ffn.2")]
        norms += [f"blocks.{i}.{a}.norm_{x}.weight" for a, x in product(("self_attn", "cross_attn"), "qk")]
        norms += [f"blocks.{i}.modulation"]
        if image_tokens:
            modules += [f"blocks.{i}.cross_attn.{name}" for name in ("k_img", "v_img")]
            norms += [f"blocks.{i}.cross_attn.norm_k_img.weight"]
    return [f"{module}.{leaf}" for module, leaf in product(modules, WEIGHT_BIAS)] + [*norms, "head.modulation"]


def possible_vae_names() -> Iterator[str]:
    """Every name that a layer of WanVAE could have; which of them exist is the converter's word."""
    residual = [f"residual.{i}.gamma" for i in (0, 3)]
    residual += [f"{m}.{leaf}" for m, leaf in product(("residual.2", "residual.6", "shortcut"), WEIGHT_BIAS)]
    resample = [f"{m}.{leaf}" for m, leaf in product(("resample.1", "time_conv"), WEIGHT_BIAS)]
    attention = ["norm.gamma", *(f"{m}.{leaf}" for m, leaf in product(("to_qkv", "proj"), WEIGHT_BIAS))]
    yield from (f"{m}.{leaf}" for m, leaf in product(("conv1", "conv2"), WEIGHT_BIAS))
    for side, stack in (("encoder", "downsamples"), ("decoder", "upsamples")):
        yield from (f"{side}.{m}.{leaf}" for m, leaf in product(("conv1", "head.2"), WEIGHT_BIAS))
        yield f"{side}.head.0.gamma"
        yield from (f"{side}.middle.{i}.{name}" for i, name in product((0, 2), residual))
        yield from (f"{side}.middle.1.{name}" for name in attention)
        yield from (f"{side}.{stack}.{i}.{name}" for i, name in product(range(16), residual + resample))


def original_text_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """UMT5EncoderModel's tensors under the names of Wan's T5Encoder."""
    words = {
        "encoder.block.": "blocks.", "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
        "layer.0.SelfAttention.": "attn.", "layer.0.layer_norm": "norm1", "layer.1.layer_norm": "norm2",
        "layer.1.DenseReluDense.wi_0": "ffn.gate.0", "layer.1.DenseReluDense.wi_1": "ffn.fc1",
        "layer.1.DenseReluDense.wo": "ffn.fc2", "encoder.final_layer_norm": "norm", "shared": "token_embedding",
    }  # fmt: skip
    return {_replaced(name, words): t for name, t in state.items() if name != "encoder.embed_tokens.weight"}


def original_image_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIPVisionModel's tensors under the names of Wan's XLMRobertaCLIP, with what of it we never use."""
    words = {
        "encoder.layers.": "visual.transformer.", "self_attn.out_proj": "attn.proj", "layer_norm": "norm",
        "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2", "embeddings.patch_embedding": "visual.patch_embedding",
        "pre_layrnorm": "visual.pre_norm", "post_layernorm": "visual.post_norm",
    }  # fmt: skip
    state = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
    original = {
        "visual.cls_embedding": state.pop("embeddings.class_embedding")[None, None],
        "visual.pos_embedding": state.pop("embeddings.position_embedding.weight")[None],
    }
    for name in [name for name in state if ".q_proj." in name]:
        joined = torch.cat([state.pop(name.replace(".q_proj.", f".{x}_proj.")) for x in "qkv"])
        original[_replaced(name.replace("self_attn.q_proj", "attn.to_qkv"), words)] = joined
    original |= {_replaced(name, words): tensor for name, tensor in state.items()}
    width = original["visual.cls_embedding"].shape[-1]
    unused = {"visual.head": (width, 8), "textual.blocks.0.attn.q.weight": (8, 8), "log_scale": ()}
    return original | {name: torch.zeros(shape) for name, shape in unused.items()}


def _replaced(name: str, words: dict[str, str]) -> str:
    for ours, theirs in words.items():
        name = name.replace(ours, theirs)
    return name


def original_names(targets: set[str], candidates: list[str], convert: object) -> dict[str, str]:
    """diffusers' name -> original name, by diffusers' converter alone."""
    assert callable(convert)
    found = {}
    for candidate in candidates:
        (target,) = convert({candidate: torch.zeros(2)})
        if target in targets:
            assert target not in found, f"{target} has two originals"
            found[target] = candidate
    return found


def write_twins(root: Path, convert_transformer: object, convert_vae: object) -> tuple[Path, Path]:
    """The same weights in diffusers layout and in the original one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=36, out_channels=16, text_dim=16, freq_dim=8,
            ffn_dim=48, num_layers=2, image_dim=160, added_kv_proj_dim=24,
        )  # fmt: skip
        for parameter in transformer.parameters():  # so that a swap of two norms or biases would be seen
            parameter.data += 0.1 * torch.randn_like(parameter)
        vae = AutoencoderKLWan(base_dim=4, z_dim=16)
        text = UMT5EncoderModel(
            UMT5Config(
                vocab_size=384, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, tie_word_embeddings=False
            )
        )
        image = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=160, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=16,
                patch_size=4, hidden_act="gelu",
            )
        )  # fmt: skip
        for parameter in (*vae.parameters(), *text.parameters(), *image.parameters()):
            parameter.data += 0.1 * torch.randn_like(parameter)
        text.encoder.embed_tokens = text.shared
    ours, theirs = root / "diffusers", root / "original"
    for part, model in {
        "transformer": transformer, "vae": vae, "text_encoder": text, "image_encoder": image
    }.items():  # fmt: skip
        model.save_pretrained(ours / part)
    (ours / "model_index.json").write_text("{}")
    theirs.mkdir()
    for folder in (ours / "tokenizer", theirs / "google" / "umt5-xxl"):
        ByT5Tokenizer().save_pretrained(folder)
    config = {
        "_class_name": "WanModel", "model_type": "i2v", "dim": 24, "num_heads": 2, "num_layers": 2, "ffn_dim": 48,
        "freq_dim": 8, "in_dim": 36, "out_dim": 16, "eps": 1e-6, "text_len": 512, "text_dim": 16, "image_dim": 160,
    }  # fmt: skip
    (theirs / "config.json").write_text(json.dumps(config))
    names = original_names(set(transformer.state_dict()), transformer_names(2, True), convert_transformer)
    save_file({names[name]: t.contiguous() for name, t in transformer.state_dict().items()}, theirs / TRANSFORMER_FILE)
    names = original_names(set(vae.state_dict()), list(possible_vae_names()), convert_vae)
    torch.save({names[name]: tensor for name, tensor in vae.state_dict().items()}, theirs / VAE_FILE)
    torch.save(original_text_tensors(dict(text.state_dict())), theirs / TEXT_FILE)
    torch.save(original_image_tensors(dict(image.state_dict())), theirs / IMAGE_FILE)
    return ours, theirs
