"""Clips of the toy world in the form that training sees, straight from the renderer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from one4d_pl.config import Config, ConfigError, ToyConfig
from one4d_pl.data.datamodule import VAL_SEED_OFFSET
from one4d_pl.data.decode import Draw, make_sample
from one4d_pl.evaluation.recovered import camera_path
from one4d_pl.geometry.pointmap import denormalise
from one4d_pl.postopt.recover import RecoverOptions
from one4d_pl.progress import Progress
from one4d_pl.toy.levels import LEVELS
from one4d_pl.toy.world import render_clip
from one4d_pl.types import Sample

TRAINING_CLIPS = 256  # for the mean pointmap and the median camera path


@dataclass(frozen=True)
class HeldOut:
    """Clips that training never saw, and what the training clips are like."""

    clips: list[Sample]
    mean_pointmap: Tensor  # [3, T, H, W] of the training clips, normalised
    camera_path: float  # median of the training clips, in median distances
    recovery: RecoverOptions  # of cameras: whether this level's zoom

    @classmethod
    def render(cls, config: Config, count: int) -> HeldOut:
        """Render `count` clips of the config's own toy world; ConfigError where it has none."""
        clips, seed = held_out_clips(config, range(count)), _toy(config).seed
        training = render_samples(config, range(seed, seed + TRAINING_CLIPS), "training clips")
        geometry = [(c, denormalise(c.pointmap.movedim(0, -1), c.scale)) for c in training]
        paths = torch.stack([camera_path(clip.cam2world, points, clip.valid) for clip, points in geometry])
        return cls(
            clips=clips,
            mean_pointmap=torch.stack([clip.pointmap for clip in training]).mean(0),
            camera_path=float(paths.median()),
            recovery=recovery_options(config),
        )


def held_out_clips(config: Config, numbers: range) -> list[Sample]:
    """Render held-out clips of the config's own toy world; ConfigError where it has none."""
    first = _toy(config).seed + VAL_SEED_OFFSET
    return render_samples(config, range(first + numbers.start, first + numbers.stop), "held-out clips")


def recovery_options(config: Config) -> RecoverOptions:
    """Say how cameras are recovered of the config's toy world: whether its level zooms."""
    return RecoverOptions(shared_focal=set(LEVELS[_toy(config).level].zooms) == {1.0})


def _toy(config: Config) -> ToyConfig:
    if config.data.toy is None:
        raise ConfigError("data.toy: null, but held-out clips are rendered; add --config configs/data/toy.yaml")
    return config.data.toy


def render_samples(config: Config, seeds: range, what: str) -> list[Sample]:
    """Render one clip per seed, every frame given; `what` names the progress bar."""
    data, level = config.data, config.data.toy.level if config.data.toy else "hard"
    draw = Draw("video", torch.ones(data.num_frames, dtype=torch.bool), drop_caption=False)
    return [
        make_sample(render_clip(seed, data.num_frames, data.height, data.width, level=level), n, draw, data, None)
        for n, seed in enumerate(Progress(seeds, desc=f"rendering {what}", unit="clip"))
    ]
