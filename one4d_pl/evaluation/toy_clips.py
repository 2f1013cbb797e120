"""Clips of the toy world as training sees them, straight from the renderer."""

from __future__ import annotations

import torch
from tqdm import tqdm

from one4d_pl.config import Config
from one4d_pl.data.decode import Draw, make_sample
from one4d_pl.toy.world import render_clip
from one4d_pl.types import Sample


def render_samples(config: Config, seeds: range, what: str) -> list[Sample]:
    """One clip per seed, every frame given; `what` names the progress bar."""
    data, level = config.data, config.data.toy.level if config.data.toy else "hard"
    draw = Draw("video", torch.ones(data.num_frames, dtype=torch.bool), drop_caption=False)
    return [
        make_sample(render_clip(seed, data.num_frames, data.height, data.width, level=level), n, draw, data, None)
        for n, seed in enumerate(tqdm(seeds, desc=f"rendering {what}", unit="clip"))
    ]
