"""What the package ships: small, and as good as it says."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from one4d_pl.config import DataConfig, load_config
from one4d_pl.data.datamodule import VAL_SEED_OFFSET
from one4d_pl.data.decode import Draw, make_sample
from one4d_pl.evaluation.fit_quality import mean_errors
from one4d_pl.evaluation.toy_clips import render_samples
from one4d_pl.models.sample_encoder import FrozenSampleEncoder
from one4d_pl.toy.world import render_clip

REPO = Path(__file__).parents[1]
ASSETS = REPO / "one4d_pl" / "assets"


def test_the_tiny_vae_keeps_held_out_frames_and_pointmaps():
    """Over six held-out clips of 17 x 64 x 96: frames >= 28 dB, pointmaps >= 34 dB (peak to peak 2)."""
    vae = AutoencoderKLWan.from_pretrained(ASSETS / "tiny_wan" / "vae", low_cpu_mem_usage=False).eval()
    assert (vae.config.scale_factor_temporal, vae.config.scale_factor_spatial, vae.config.z_dim) == (4, 4, 16)
    given, errors = torch.ones(17, dtype=torch.bool), []
    for seed in range(VAL_SEED_OFFSET, VAL_SEED_OFFSET + 6):
        clip = render_clip(seed, 17, 64, 96)
        sample = make_sample(clip, 0, Draw("video", given, False), DataConfig(), None)
        videos = torch.stack([sample.frames, sample.pointmap])
        with torch.no_grad():
            decoded = vae.decode(vae.encode(videos).latent_dist.mode()).sample
        errors.append((decoded - videos).square().flatten(1).mean(1))
    frames, pointmaps = (10 * math.log10(4 / error) for error in torch.stack(errors).mean(0).tolist())
    assert frames >= 28 and pointmaps >= 34, (frames, pointmaps)


def test_bent_pointmaps_survive_the_tiny_vae_better():
    """Relative point error over four held-out clips, as the tiny scale sees them."""
    config = load_config(["configs/demo.yaml"], [])
    seed, errors = config.data.toy.seed + VAL_SEED_OFFSET, {}
    for power in (1.0, 0.5):
        config.data.pointmap_power = power
        encoder = FrozenSampleEncoder.of(config)
        encoders, codec = encoder.encoders, encoder.codec
        clips = render_samples(config, range(seed, seed + 4), "clips")
        shown = [codec.decode(encoders, codec.encode(encoders, clip.pointmap[None])) for clip in clips]
        errors[power] = mean_errors(torch.cat(shown), clips)["rel_error"]
    assert errors[0.5] < 0.85 * errors[1.0], errors


def test_assets_stay_small():
    folders = {ASSETS / "tiny_wan": 24_000_000, ASSETS / "demo_adapters": 8_000_000, REPO / "docs" / "nano": 1_500_000}
    for folder, limit in folders.items():
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        assert max(sizes) <= 16_000_000 and sum(sizes) <= limit, folder
