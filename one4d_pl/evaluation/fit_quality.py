"""Does an adapter do what One4D is for? Every task on held-out clips, between what knows nothing and the VAE's ceiling.

Rows are `PointmapErrors` after one scale and shift per clip, means over the clips:

- below: `constant` (every point alike), `mean_pointmap` (of the training clips), `first_frame` (the prediction's own
  frame 0 repeated: a scene that does not move);
- the adapter: `video`, `sparse`, `image`; and two that must fail, `video_other_clip` (another clip's frames and caption
  as the condition) and `video_no_links` (the control links zeroed: pointmaps cannot follow the frames);
- above: `ceiling`, the true pointmaps through the VAE and back.

Frames are measured in dB against the true ones, given and hidden apart, beside the VAE's round trip and the base's own
inpainting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from one4d_pl.config import ConfigError
from one4d_pl.data.masking import draw_frame_mask
from one4d_pl.data.order import derived_generator, derived_numpy_generator
from one4d_pl.geometry.camera import project, to_camera
from one4d_pl.geometry.pointmap import denormalise, is_sky, pointmap_to_depth
from one4d_pl.inference.pipeline import GeneratedScene, One4DPipeline
from one4d_pl.metrics.camera import path_length
from one4d_pl.metrics.pointmap import pointmap_errors
from one4d_pl.postopt.recover import RecoverOptions, recover_scene
from one4d_pl.types import TASKS, Sample, Task, collate

BATCH = 8  # clips that are sampled together
ZOOMING = RecoverOptions(shared_focal=False)  # half of the toy world's cameras zoom
SEEN_TWICE = 0.1  # relative depth difference below which two frames show the same place
TASKS_WITH_TRUTH: tuple[Task, ...] = ("video", "sparse", "image")
TASKS_WITH_HIDDEN: tuple[Task, ...] = ("sparse", "image")
GENERATED: tuple[Task, ...] = ("image", "text")


@dataclass(frozen=True)
class FitQuality:
    """What `measure_fit` found, ready for json."""

    pointmaps: dict[str, dict[str, float]]  # row -> rel_error, inliers, rel_error_moving, inliers_moving
    frames_db: dict[str, dict[str, float]]  # row -> given, hidden; where there are any
    consistency: dict[Task, dict[str, float]]  # of the tasks that have no truth, image and text
    scenes: dict[Task, GeneratedScene]  # [N, ...] each, for the pictures
    masks: dict[Task, Tensor]  # [N, T] bool


def measure_fit(
    pipeline: One4DPipeline,
    base: One4DPipeline,
    clips: list[Sample],
    mean_pointmap: Tensor,  # [3, T, H, W] of the training clips, normalised
    train_path: float,  # median camera path of the training clips, in median distances
    seed: int,
    bfloat16: bool = False,
    on_clip: Callable[[int], None] = lambda count: None,
) -> FitQuality:
    """Sample every task on `clips` and measure; the same arguments give the same numbers.

    Args:
        pipeline: base plus adapter.
        base: the same base without one.
        clips: held out; with their true frames, pointmaps and cameras.
        bfloat16: sample under bf16 autocast, as a bf16-mixed run trains; measuring is in full precision.
        on_clip: called with the number of clips just sampled; `sampled_clips` in all.
    """
    batch = collate(clips)
    masks = {task: task_masks(task, len(clips), batch.frames.shape[2], seed) for task in TASKS}
    sampler = ClipSampler(clips, seed, bfloat16, on_clip)
    scenes = {task: sampler(pipeline, masks[task]) for task in TASKS}
    base_scenes = {task: sampler(base, masks[task]) for task in TASKS_WITH_HIDDEN}
    with links_zeroed(pipeline):
        no_links = sampler(pipeline, masks["video"])
    other = sampler(pipeline, masks["video"], shift=1)
    ceiling = round_trip(pipeline, clips)

    first = scenes["video"].pointmap
    rows = {
        "constant": torch.zeros_like(batch.pointmap),
        "mean_pointmap": mean_pointmap.expand_as(batch.pointmap),
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
        consistency={task: _self_consistency(scenes[task], clips, train_path) for task in GENERATED},
        scenes=scenes,
        masks=masks,
    )


def sampled_clips(clips: int) -> int:
    """How many clips `measure_fit` samples for `clips` held-out ones."""
    return clips * (len(TASKS) + len(TASKS_WITH_HIDDEN) + 2)


class ClipSampler:
    """Samples all clips in batches, each clip's noise from (seed, its number)."""

    def __init__(self, clips: list[Sample], seed: int, bfloat16: bool, on_clip: Callable[[int], None]) -> None:
        self.clips, self.seed, self.bfloat16, self.on_clip = clips, seed, bfloat16, on_clip

    def __call__(self, pipeline: One4DPipeline, masks: Tensor, shift: int = 0) -> GeneratedScene:
        """Scenes of every clip; `shift` takes frames and caption of the clip so many places on."""
        scenes = []
        for start in range(0, len(self.clips), BATCH):
            numbers = list(range(start, min(start + BATCH, len(self.clips))))
            shown = collate([self.clips[(n + shift) % len(self.clips)] for n in numbers])
            noise = torch.stack([self._noise(pipeline, n, shown.frames.shape[2:]) for n in numbers], dim=1)
            with torch.autocast(noise.device.type, torch.bfloat16, enabled=self.bfloat16):
                scenes.append(pipeline.sample(list(shown.captions), shown.frames, masks[numbers], noise.flatten(0, 1)))
            self.on_clip(len(numbers))
        return GeneratedScene(torch.cat([s.frames for s in scenes]), torch.cat([s.pointmap for s in scenes]))

    def _noise(self, pipeline: One4DPipeline, number: int, size: torch.Size) -> Tensor:  # [2, C, t, h, w]
        generator = derived_generator(self.seed, number, "evaluation noise")
        return torch.randn(2, *pipeline.encoders.latent_shape(*size), generator=generator)


class links_zeroed:
    """Within: the control links add nothing; of `block.rgb_to_xyz.weight` and so on, those of a pattern's names."""

    def __init__(self, pipeline: One4DPipeline, pattern: str = "*") -> None:
        named = dict(pipeline.transformer.links.named_parameters())
        self.weights = [weight for name, weight in named.items() if fnmatch(name, pattern)]
        if not self.weights:
            raise ConfigError(f"links: none is called {pattern}; this adapter has {', '.join(named) or 'none'}")

    def __enter__(self) -> None:
        self.kept = [weight.detach().clone() for weight in self.weights]
        for weight in self.weights:
            weight.data.zero_()

    def __exit__(self, *error: object) -> None:
        for weight, kept in zip(self.weights, self.kept, strict=True):
            weight.data.copy_(kept)


def task_masks(task: Task, count: int, num_frames: int, seed: int) -> Tensor:  # [N, T] bool
    generators = (derived_numpy_generator(seed, number, "evaluation frames") for number in range(count))
    return torch.stack([draw_frame_mask(task, num_frames, generator) for generator in generators])


@torch.no_grad()
def round_trip(pipeline: One4DPipeline, clips: list[Sample]) -> GeneratedScene:
    """The true frames and pointmaps through the VAE and back."""
    encoders, batches = pipeline.encoders, [collate(clips[i : i + BATCH]) for i in range(0, len(clips), BATCH)]
    return GeneratedScene(
        torch.cat([encoders.decode(encoders.encode(batch.frames)) for batch in batches]),
        torch.cat([encoders.decode_pointmap(encoders.encode_pointmap(batch.pointmap)) for batch in batches]),
    )


def mean_errors(preds: Tensor, clips: list[Sample]) -> dict[str, float]:  # preds [N, 3, T, H, W]
    """Means over clips; over those that show motion where only moving pixels count."""
    errors = []
    for points, clip in zip(preds, clips, strict=True):
        target = denormalise(clip.pointmap.movedim(0, -1), clip.scale).double()
        errors.append(pointmap_errors(points.movedim(0, -1).double(), target, clip.valid, clip.moving, "scale_shift"))
    moving = [e for e in errors if int(e.num_moving)]
    return {
        "rel_error": float(torch.stack([e.rel_error for e in errors]).mean()),
        "inliers": float(torch.stack([e.inliers for e in errors]).mean()),
        "rel_error_moving": float(torch.stack([e.rel_error_moving for e in moving]).mean()) if moving else float("nan"),
        "inliers_moving": float(torch.stack([e.inliers_moving for e in moving]).mean()) if moving else float("nan"),
    }


def decibels(preds: Tensor, target: Tensor, given: Tensor) -> dict[str, float]:
    """Mean over clips of the PSNR of given and of hidden frames; [N, 3, T, H, W] x 2 in [-1, 1], [N, T]."""
    found: dict[str, list[Tensor]] = {"given": [], "hidden": []}
    for ours, truth, shown in zip(preds, target, given, strict=True):
        for name, frames in (("given", shown), ("hidden", ~shown)):
            if bool(frames.any()):
                found[name].append(peak_signal_noise_ratio(ours[:, frames], truth[:, frames], data_range=2.0))
    return {name: float(torch.stack(values).mean()) for name, values in found.items() if values}


def _self_consistency(scenes: GeneratedScene, clips: list[Sample], train_path: float) -> dict[str, float]:
    """Generated scenes have no truth: does the camera move, and do their own frames agree with their own geometry?"""
    paths, ours, true = [], [], []
    for i, clip in enumerate(clips):
        points, frames = scenes.pointmap[i].movedim(0, -1), scenes.frames[i].movedim(0, -1)
        solid = ~is_sky(points)
        scene = recover_scene(points, solid, ZOOMING)
        paths.append(camera_path(scene.cam2world, points, solid))
        ours.append(photometric_error(frames, points, scene.intrinsics, scene.cam2world, solid))
        truth, cameras = denormalise(clip.pointmap.movedim(0, -1), clip.scale), clip.cam2world.double()
        true.append(photometric_error(clip.frames.movedim(0, -1), truth, clip.intrinsics, cameras, clip.valid))
    ours_error, true_error = (float(torch.stack(errors).nanmedian()) for errors in (ours, true))
    return {
        "camera_path": float(torch.stack(paths).median()),
        "camera_path_training": train_path,
        "camera_path_ratio": float(torch.stack(paths).median()) / train_path,
        "photometric_error": ours_error,
        "photometric_error_truth": true_error,
        "photometric_ratio": ours_error / true_error,
    }


def camera_path(cam2world: Tensor, points: Tensor, valid: Tensor) -> Tensor:
    """Length of a camera path [T, 4, 4] in median distances of the clip's valid points [T, H, W, 3] from camera 0."""
    distance = points[valid].norm(dim=-1).median() if bool(valid.any()) else points.new_tensor(float("nan"))
    return path_length(cam2world).double() / distance.double()


def photometric_error(
    frames: Tensor,  # [T, H, W, 3] in [-1, 1]
    points: Tensor,  # [T, H, W, 3], camera-0 coordinates
    intrinsics: Tensor,  # [T, 3, 3], pixels
    cam2world: Tensor,  # [T, 4, 4] float64, world and unit of the points
    valid: Tensor,  # [T, H, W] bool
) -> Tensor:
    """Median colour difference (of a range of 2) between frame 0's points and where they fall in each later frame.

    Over pixels whose point the later frame shows too: its own depth there agrees within `SEEN_TWICE`. A median, because
    moving things, a minority, break the premise that the world stands still; from frame 0, because between neighbours
    a camera that stands would do nearly as well. nan where nothing is seen twice.
    """
    height, width = points.shape[1:3]
    own_depth = pointmap_to_depth(points.double(), cam2world)
    differences = []
    for t in range(1, len(points)):
        pixels, depth = project(to_camera(points[0].double(), cam2world[t]), intrinsics[t].double())
        column, row = pixels.nan_to_num(-1).floor().unbind(-1)
        inside = (depth > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height) & valid[0]
        column, row = torch.where(inside, column, 0).long(), torch.where(inside, row, 0).long()
        there = own_depth[t][row, column]
        seen = inside & valid[t][row, column] & ((there - depth).abs() < SEEN_TWICE * depth)
        # bilinear at the exact position: half a pixel of rounding would drown what is measured
        grid = torch.stack([2 * pixels[..., 0] / width - 1, 2 * pixels[..., 1] / height - 1], -1)[None].float()
        sampled = torch.nn.functional.grid_sample(
            frames[t].movedim(-1, 0)[None].float(), grid.nan_to_num(2), align_corners=False
        )[0].movedim(0, -1)
        differences.append((sampled - frames[0]).abs().mean(-1)[seen])
    found = torch.cat(differences)
    return found.median() if len(found) else found.new_tensor(float("nan"))
