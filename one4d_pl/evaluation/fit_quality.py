"""Measure every task of an adapter on held-out clips, from trivial rows to the VAE's ceiling.

Rows are `PointmapErrors` after one scale and shift per clip, means over the clips:

- trivial rows: `constant` (all points alike), `mean_pointmap` (of the training clips), `first_frame` (the prediction's
  own frame 0 repeated: a scene that does not move);
- the adapter: `video`, `sparse`, `image`; and two that must do badly, `video_other_clip` (frames and caption of another
  clip as the condition) and `video_no_links` (the control links zeroed, so that pointmaps cannot follow the frames);
- `ceiling`, the true pointmaps through the VAE and back.

Frames are measured in dB against the true ones, given and hidden ones separately, beside the VAE's
round trip and the base's own inpainting. Depth and cameras are recovered from the pointmaps of
`video`, `image` and `text` and of the ceiling. Text to 4D is searched for its caption's colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from one4d_pl.config import ConfigError
from one4d_pl.data.masking import draw_frame_mask
from one4d_pl.data.sample_order import derived_generator, derived_numpy_generator
from one4d_pl.evaluation.recovered import geometry_errors, recover_scenes, self_consistency
from one4d_pl.evaluation.toy_clips import HeldOut
from one4d_pl.evaluation.toy_colours import caption_colours
from one4d_pl.geometry.pointmap import denormalise
from one4d_pl.inference.pipeline import GeneratedScene, One4DPipeline
from one4d_pl.metrics.pointmap import pointmap_errors
from one4d_pl.progress import Progress
from one4d_pl.types import TASKS, Sample, Task, collate

BATCH = 8  # clips that are sampled together
TASKS_WITH_TRUTH: tuple[Task, ...] = ("video", "sparse", "image")
TASKS_WITH_HIDDEN: tuple[Task, ...] = ("sparse", "image")
TASKS_WITHOUT_TRUTH: tuple[Task, ...] = ("image", "text")


@dataclass(frozen=True)
class FitQuality:
    """The results of `measure_fit`; all but scenes and masks are ready for json."""

    pointmaps: dict[str, dict[str, float]]  # row -> rel_error, inliers, rel_error_moving, inliers_moving
    frames_db: dict[str, dict[str, float]]  # row -> given, hidden; where there are any
    geometry: dict[str, dict[str, float]]  # row -> abs_rel, ate_share: video and the ceiling
    consistency: dict[Task, dict[str, float]]  # of the tasks without ground truth, image and text
    colours: dict[str, dict[str, float]]  # row -> `caption_colours`: text and the true frames
    scenes: dict[Task, GeneratedScene]  # [N, ...] each, for the pictures
    masks: dict[Task, Tensor]  # [N, T] bool


def measure_fit(
    pipeline: One4DPipeline,
    base: One4DPipeline,
    held_out: HeldOut,
    seed: int,
) -> FitQuality:
    """Sample every task on the held-out clips and measure it; deterministic in its arguments.

    Two progress bars: the clips that are sampled, and those whose cameras are recovered.

    Args:
        pipeline: base plus adapter.
        base: the same base without one.
        held_out: clips with their true frames, pointmaps and cameras, and statistics of the training clips.
    """
    clips, recovery = held_out.clips, held_out.recovery
    batch = collate(clips)
    masks = {task: task_masks(task, len(clips), batch.frames.shape[2], seed) for task in TASKS}
    passes = len(TASKS) + len(TASKS_WITH_HIDDEN) + 2
    with Progress(desc="sampling 4D scenes", total=passes * len(clips), unit="clip") as bar:
        sampler = ClipSampler(clips, seed, bar.update)
        scenes = {task: sampler(pipeline, masks[task]) for task in TASKS}
        base_scenes = {task: sampler(base, masks[task]) for task in TASKS_WITH_HIDDEN}
        with links_zeroed(pipeline):
            no_links = sampler(pipeline, masks["video"])
        other = sampler(pipeline, masks["video"], shift=1)
    ceiling = round_trip(pipeline, clips)
    shown: dict[str, GeneratedScene] = {"ceiling": ceiling}
    shown |= {task: scenes[task] for task in ("video", *TASKS_WITHOUT_TRUTH)}
    with Progress(desc="recovering cameras", total=len(shown) * len(clips), unit="clip") as bar:
        recovered = {name: recover_scenes(scene.pointmap, recovery, bar.update) for name, scene in shown.items()}

    first = scenes["video"].pointmap
    rows: dict[str, Tensor] = {
        "constant": torch.zeros_like(batch.pointmap),
        "mean_pointmap": held_out.mean_pointmap.expand_as(batch.pointmap),
        "first_frame": first[:, :, :1].expand_as(first),
        **{task: scenes[task].pointmap for task in TASKS_WITH_TRUTH},
        "video_other_clip": other.pointmap,
        "video_no_links": no_links.pointmap,
        "ceiling": ceiling.pointmap,
    }
    return FitQuality(
        pointmaps={name: mean_errors(preds, clips) for name, preds in rows.items()},
        frames_db={
            "vae_round_trip": decibels(ceiling.frames, batch.frames, masks["video"]),
            **{task: decibels(scenes[task].frames, batch.frames, masks[task]) for task in TASKS_WITH_TRUTH},
            **{f"{t}_base_alone": decibels(base_scenes[t].frames, batch.frames, masks[t]) for t in TASKS_WITH_HIDDEN},
        },
        geometry={name: geometry_errors(recovered[name], clips) for name in ("video", "ceiling")},
        consistency={
            task: self_consistency(scenes[task].frames, recovered[task], clips, held_out.camera_path)
            for task in TASKS_WITHOUT_TRUTH
        },
        colours={
            name: caption_colours(frames, list(batch.captions))
            for name, frames in (("text", scenes["text"].frames), ("truth", batch.frames))
        },
        scenes=scenes,
        masks=masks,
    )


class ClipSampler:
    """A sampler of all clips in batches; each clip's noise comes from (seed, its number)."""

    def __init__(self, clips: list[Sample], seed: int, on_clip: Callable[[int], None]) -> None:
        self.clips, self.seed, self.on_clip = clips, seed, on_clip

    def __call__(self, pipeline: One4DPipeline, masks: Tensor, shift: int = 0) -> GeneratedScene:
        """Sample a scene for every clip, conditioned on the clip `shift` places further on."""
        scenes = []
        for start in range(0, len(self.clips), BATCH):
            numbers = list(range(start, min(start + BATCH, len(self.clips))))
            shown = collate([self.clips[(n + shift) % len(self.clips)] for n in numbers])
            noise = torch.stack([self._noise(pipeline, n, shown.frames.shape[2:]) for n in numbers], dim=1)
            scenes.append(pipeline.sample(list(shown.captions), shown.frames, masks[numbers], noise.flatten(0, 1)))
            self.on_clip(len(numbers))
        return GeneratedScene(torch.cat([s.frames for s in scenes]), torch.cat([s.pointmap for s in scenes]))

    def _noise(self, pipeline: One4DPipeline, number: int, size: torch.Size) -> Tensor:  # [2, C, t, h, w]
        generator = derived_generator(self.seed, number, "evaluation noise")
        return torch.randn(2, *pipeline.encoders.latent_shape(*size), generator=generator)


@contextmanager
def links_zeroed(pipeline: One4DPipeline) -> Iterator[None]:
    """Let control links add nothing for a while; ConfigError where there are none."""
    weights = list(pipeline.transformer.links.parameters())
    if not weights:
        raise ConfigError("links: this adapter has none to be zeroed")
    kept = [weight.detach().clone() for weight in weights]
    try:
        for weight in weights:
            weight.data.zero_()
        yield
    finally:
        for weight, values in zip(weights, kept):
            weight.data.copy_(values)


def task_masks(task: Task, count: int, num_frames: int, seed: int) -> Tensor:  # [N, T] bool
    generators = (derived_numpy_generator(seed, number, "evaluation frames") for number in range(count))
    return torch.stack([draw_frame_mask(task, num_frames, generator) for generator in generators])


@torch.no_grad()
def round_trip(pipeline: One4DPipeline, clips: list[Sample]) -> GeneratedScene:
    """Send the true frames and pointmaps through the VAE and back."""
    encoders, codec = pipeline.encoders, pipeline.transformer.codec
    batches = [collate(clips[i : i + BATCH]) for i in range(0, len(clips), BATCH)]
    return GeneratedScene(
        torch.cat([encoders.decode(encoders.encode(batch.frames)) for batch in batches]),
        torch.cat([codec.decode(encoders, codec.encode(encoders, batch.pointmap)) for batch in batches]),
    )


def mean_errors(preds: Tensor, clips: list[Sample]) -> dict[str, float]:  # preds [N, 3, T, H, W]
    """Average the errors over clips; those of moving points over the clips that show motion."""
    errors = []
    for points, clip in zip(preds, clips, strict=True):
        target = denormalise(clip.pointmap.movedim(0, -1), clip.scale).double()
        errors.append(pointmap_errors(points.movedim(0, -1).double(), target, clip.valid, clip.moving))
    moving = [e for e in errors if int(e.num_moving)]

    def mean(values: list[Tensor]) -> float:
        return float(torch.stack(values).mean()) if values else math.nan

    return {
        "rel_error": mean([e.rel_error for e in errors]),
        "inliers": mean([e.inliers for e in errors]),
        "rel_error_moving": mean([e.rel_error_moving for e in moving]),
        "inliers_moving": mean([e.inliers_moving for e in moving]),
    }


def decibels(preds: Tensor, target: Tensor, given: Tensor) -> dict[str, float]:
    """Average PSNR over clips, of given and of hidden frames.

    Shapes are [N, 3, T, H, W] in [-1, 1] twice and [N, T].
    """
    found: dict[str, list[Tensor]] = {"given": [], "hidden": []}
    for ours, truth, shown in zip(preds, target, given, strict=True):
        for name, frames in (("given", shown), ("hidden", ~shown)):
            if bool(frames.any()):
                found[name].append(peak_signal_noise_ratio(ours[:, frames], truth[:, frames], data_range=2.0))
    return {name: float(torch.stack(values).mean()) for name, values in found.items() if values}
