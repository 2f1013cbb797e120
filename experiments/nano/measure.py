"""The numbers of one run: video and image to 4D on held-out clips, measured as in the demo."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from experiments.nano.experiments import CEILINGS, LINKS_ZEROED, OTHER_CLIP
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
from one4d_pl.geometry.pointmap import denormalise
from one4d_pl.inference.pipeline import GeneratedScene, One4DPipeline
from one4d_pl.metrics.video import FrechetVideoDistance, VaeFeatures
from one4d_pl.types import Sample, Task, collate

MASK_SEED = 0  # the given frames are the same for every run
TASKS: tuple[Task, ...] = ("video", "image")  # all frames given, the first alone
EDGE = 0.2  # relative difference of neighbouring distances, above which there is an edge


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
    pattern = LINKS_ZEROED.get(broken or "")
    num_frames = clips[0].frames.shape[1]
    for task in TASKS if given is None else TASKS[:1]:
        masks = task_masks(task, len(clips), num_frames, MASK_SEED)
        if given is not None:
            masks = torch.zeros_like(masks)
            masks[:, sparse_indices(num_frames, given) if given else [0]] = True
        with nullcontext() if pattern is None else links_zeroed(pipeline, pattern):
            scenes = sampler(pipeline, masks, shift=int(broken == OTHER_CLIP))
        numbers |= {f"{task}.{name}": value for name, value in _scores(pipeline, scenes, masks, clips).items()}
    return numbers


def sampled_clips(clips: int, given: float | None) -> int:
    """Return the number of clips that `measure` samples."""
    return clips * (len(TASKS) if given is None else 1)


def measure_references(
    base: One4DPipeline, clips: list[Sample], mean_pointmap: Tensor, seed: int, on_clip: Callable[[int], None]
) -> dict[str, float]:
    """Measure what runs are compared with: clips' mean pointmap, the VAE's round trip, the base's own frames."""
    batch = collate(clips)
    every = torch.ones(batch.frame_mask.shape, dtype=torch.bool)
    numbers: dict[str, float] = {}
    for name, power in CEILINGS.items():
        base.transformer.codec.power = power
        ceiling = round_trip(base, clips)
        numbers |= {f"{name}.{n}": value for n, value in _scores(base, ceiling, every, clips).items()}
    mean = replace(ceiling, pointmap=mean_pointmap.expand_as(batch.pointmap))
    numbers |= {f"mean.{n}": value for n, value in _scores(base, mean, every, clips).items() if n.startswith("rel")}
    base_alone = measure(base, clips, seed, None, on_clip)
    return numbers | {f"base.{n}": value for n, value in base_alone.items() if n.endswith(("_db", "fd_vae"))}


@torch.no_grad()
def measure_vae(vae: AutoencoderKLWan, clips: list[Sample]) -> dict[str, float]:
    """Measure the clips' true frames and pointmaps after a VAE's round trip."""
    batch = collate(clips)
    frames, pointmap = (
        torch.cat([vae.decode(vae.encode(some).latent_dist.mode()).sample for some in videos.split(BATCH)])
        for videos in (batch.frames, batch.pointmap)
    )
    quality = decibels(frames, batch.frames, torch.ones_like(batch.frame_mask))["given"]
    return {f"vae.{name}": value for name, value in mean_errors(pointmap, clips).items()} | {"vae.given_db": quality}


def _scores(pipeline: One4DPipeline, scenes: GeneratedScene, masks: Tensor, clips: list[Sample]) -> dict[str, float]:
    frames = collate(clips).frames
    edges = [replace(clip, moving=edge_pixels(clip)) for clip in clips]
    distance = FrechetVideoDistance(VaeFeatures(pipeline.encoders.encode, pipeline.encoders.latent_channels))
    for ours, true in zip(scenes.frames.split(BATCH), frames.split(BATCH), strict=True):
        distance.update(ours.clamp(-1, 1), real=False)
        distance.update(true, real=True)
    return {
        **mean_errors(scenes.pointmap, clips),
        "rel_error_edges": mean_errors(scenes.pointmap, edges)["rel_error_moving"],
        **{f"{kind}_db": value for kind, value in decibels(scenes.frames, frames, masks).items()},
        "fd_vae": float(distance.compute()),
    }


def edge_pixels(clip: Sample) -> Tensor:  # [T, H, W] bool
    """Mark valid pixels beside one whose distance from camera 0 differs by more than EDGE."""
    distance = denormalise(clip.pointmap.movedim(0, -1), clip.scale).norm(dim=-1)
    edge = torch.zeros_like(clip.valid)
    for dim in (1, 2):
        size = distance.shape[dim] - 1
        ahead, behind = distance.narrow(dim, 1, size), distance.narrow(dim, 0, size)
        step = (ahead - behind).abs() > EDGE * torch.minimum(ahead, behind)
        edge.narrow(dim, 1, size).logical_or_(step)
        edge.narrow(dim, 0, size).logical_or_(step)
    return edge & clip.valid
