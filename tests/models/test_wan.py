"""The loader and the frozen encoders."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from safetensors.torch import load_file, save_file

from one4d_pl.config import ConfigError, TinyWanConfig
from one4d_pl.models.tiny import build_tiny_wan
from one4d_pl.models.wan import WanEncoders, fingerprint, load_transformer, resolve_base
from tests.seeded_vae import seeded_vae


def test_the_bundle_opens_as_a_stock_diffusers_pipeline(tiny_base):
    pipeline = WanImageToVideoPipeline.from_pretrained(tiny_base.path)
    assert (pipeline.image_encoder is not None) == tiny_base.image_tokens
    assert pipeline.transformer.config.in_channels == 36


def test_latents_are_normalised_as_diffusers_does_and_have_unit_statistics(tiny_base_plain):
    encoders = tiny_base_plain.encoders()
    video = torch.rand(2, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1  # the calibration clips
    latents = encoders.encode(video)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3, 4)), torch.zeros(16), rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3, 4)), torch.ones(16), rtol=0, atol=1e-2)
    raw = encoders.vae.encode(video).latent_dist.mode()
    config = encoders.vae.config
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    assert torch.equal(latents, (raw - mean) / std)
    torch.testing.assert_close(encoders.decode(latents), encoders.vae.decode(raw).sample, rtol=0, atol=1e-4)


def test_encoders_stay_frozen_in_eval_mode_and_in_float32_under_autocast(tiny_base_plain):
    encoders, video = tiny_base_plain.encoders(), torch.rand(1, 3, 5, 32, 32)
    expected = encoders.encode(video)
    encoders.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoders.encode(video), expected)
    assert not encoders.vae.training and not any(p.requires_grad for p in encoders.parameters())


@pytest.mark.parametrize("shape", [(8, 32, 32), (5, 36, 32)])
def test_encode_refuses_what_the_vae_would_drop_in_silence(tiny_base_plain, shape):
    with pytest.raises(ValueError, match=r"4k\+1|multiple"):
        tiny_base_plain.encoders().encode(torch.zeros(1, 3, *shape))


def test_prompts_equal_diffusers_zero_padded_embeddings(tiny_base):
    encoders = tiny_base.encoders()
    prompts = ["a red ball", "", "a much longer prompt than the sixteen tokens of this text encoder"]
    ours = encoders.pad_prompt_embeds(encoders.encode_prompts(prompts))
    pipeline = WanImageToVideoPipeline.from_pretrained(tiny_base.path)
    theirs = pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=tiny_base.max_text_tokens)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_image_tokens_need_512_text_tokens(tiny_base):
    if not tiny_base.image_tokens:
        pytest.skip("the base has no image tokens")
    with pytest.raises(ConfigError, match="max_text_tokens=512"):
        WanEncoders(tiny_base.path, "float32", 96)


def test_bfloat16_keeps_in_float32_what_wan_keeps(tiny_base_plain):
    transformer = load_transformer(tiny_base_plain.path, "bfloat16")
    kept = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
    for name, parameter in transformer.named_parameters():
        assert parameter.dtype == (torch.float32 if any(k in name for k in kept) else torch.bfloat16), name


def test_the_same_seed_builds_the_same_bytes_and_another_seed_another_base(tmp_path):
    calibration = torch.rand(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = TinyWanConfig(seed=seed, num_layers=1, num_heads=1, head_dim=12, ffn_dim=8, text_dim=16)
        build_tiny_wan(tmp_path / name, config, seeded_vae(4, seed, calibration))
    prints = [fingerprint(str(tmp_path / name)) for name in "abc"]
    assert prints[0] == prints[1] != prints[2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]  # nothing half-written is left


def test_the_fingerprint_sees_a_changed_weight(tiny_base_plain, tmp_path):
    shutil.copytree(tiny_base_plain.path, tmp_path / "copy")
    copied = str(tmp_path / "copy")
    before = fingerprint(copied)
    assert before == fingerprint(tiny_base_plain.path)
    file = tmp_path / "copy" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for tensor in tensors.values():
        tensor += 1e-3
    save_file(tensors, file, {"format": "pt"})
    assert fingerprint(copied) != before


def test_a_missing_or_foreign_base_is_one_clear_line(tmp_path, tiny_base_plain):
    with pytest.raises(ConfigError, match="hf download"):
        resolve_base("someone/not-in-the-cache")
    with pytest.raises(ConfigError, match=r"model_index\.json"):
        resolve_base(str(tmp_path))
    shutil.copytree(tiny_base_plain.path, tmp_path / "t2v")
    config = tmp_path / "t2v" / "transformer" / "config.json"
    transformer = load_transformer(tiny_base_plain.path, "float32")
    transformer.register_to_config(in_channels=16)
    config.write_text(transformer.to_json_string())
    (tmp_path / "t2v" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    transformer.patch_embedding = torch.nn.Conv3d(16, 24, (1, 2, 2), (1, 2, 2))
    transformer.save_pretrained(tmp_path / "t2v" / "transformer")
    with pytest.raises(ConfigError, match="needs an inpainting"):
        load_transformer(str(tmp_path / "t2v"), "float32")
