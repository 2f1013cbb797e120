"""The numbers of one run: video and image to 4D on held-out clips, measured as in the demo."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from experiments.nano.experiments import ALL_TASKS, LINKS_ZEROED, OTHER_CLIP
from one4d_pl.evaluation.fit_quality import (
    BATCH,
    ClipSampler,
    decibels,
    links_zeroed,
    mean_errors,
    round_trip,
    task_masks,
)
from one4d_pl.evaluation.sweeps import sparse_indices
from one4d_pl.inference.pipeline import GeneratedScene, One4DPipeline
from one4d_pl.metrics.video import FrechetVideoDistance, VaeFeatures
from one4d_pl.types import Sample, collate

MASK_SEED = 0  # the given frames are the same for every run


def measure(
    pipeline: One4DPipeline,
    clips: list[Sample],
    seed: int,
    given: float | None,
    on_clip: Callable[[int], None],
    broken: str | None = None,
) -> dict[str, float]:
    """Sample and measure held-out clips, with `seed` of the noise; return means as task.metric -> number.

    `given`: share of given frames, reported as the video task; None = both tasks. `on_clip` is called with the number
    of clips just sampled. `broken`: Run.broken.
    """
    sampler = ClipSampler(clips, seed, on_clip)
    numbers: dict[str, float] = {}
    num_frames = clips[0].frames.shape[1]
    for task in ALL_TASKS if given is None else ALL_TASKS[:1]:
        masks = task_masks(task, len(clips), num_frames, MASK_SEED)
        if given is not None:
            masks = torch.zeros_like(masks)
            masks[:, sparse_indices(num_frames, given)] = True
        with links_zeroed(pipeline) if broken == LINKS_ZEROED else nullcontext():
            scenes = sampler(pipeline, masks, shift=int(broken == OTHER_CLIP))
        numbers |= {f"{task}.{name}": value for name, value in _scores(pipeline, scenes, masks, clips).items()}
    return numbers


def sampled_clips(clips: int, given: float | None) -> int:
    """Return the number of clips that `measure` samples."""
    return clips * (len(ALL_TASKS) if given is None else 1)


def measure_references(
    base: One4DPipeline, clips: list[Sample], mean_pointmap: Tensor, seed: int, on_clip: Callable[[int], None]
) -> dict[str, float]:
    """Measure what runs are compared with: clips' mean pointmap, the VAE's round trip, the base's own frames."""
    batch = collate(clips)
    every = torch.ones(batch.frame_mask.shape, dtype=torch.bool)
    ceiling = round_trip(base, clips)
    numbers = {f"ceiling.{name}": value for name, value in _scores(base, ceiling, every, clips).items()}
    mean = replace(ceiling, pointmap=mean_pointmap.expand_as(batch.pointmap))
    numbers |= {f"mean.{n}": value for n, value in _scores(base, mean, every, clips).items() if n.startswith("rel")}
    base_alone = measure(base, clips, seed, None, on_clip)
    return numbers | {f"base.{n}": value for n, value in base_alone.items() if n.endswith(("_db", "fd_vae"))}


def _scores(pipeline: One4DPipeline, scenes: GeneratedScene, masks: Tensor, clips: list[Sample]) -> dict[str, float]:
    frames = collate(clips).frames
    distance = FrechetVideoDistance(VaeFeatures(pipeline.encoders.encode, pipeline.encoders.latent_channels))
    for ours, true in zip(scenes.frames.split(BATCH), frames.split(BATCH), strict=True):
        distance.update(ours.clamp(-1, 1), real=False)
        distance.update(true, real=True)
    return {
        **mean_errors(scenes.pointmap, clips),
        **{f"{kind}_db": value for kind, value in decibels(scenes.frames, frames, masks).items()},
        "fd_vae": float(distance.compute()),
    }
