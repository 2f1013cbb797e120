"""Run a model, or only its VAE, over a benchmark and store what it says of each sequence.

1. Frames are placed in the model's frame (`framing`): square pixels, about as many tokens as it was trained with.
2. Windows: one pass of 4k+1 frames up to 113, or overlapping windows of the trained length; a last frame is repeated to
   fill a pass and cut again.
3. The given frames condition the first window; later ones also see what the window before made of the shared frames.
4. Each window's pointmaps become cameras and depth (`postopt`), windows are joined into one scene, and it is stored.

The ceiling replaces steps 2 and 3: true pointmaps, normalised, through the VAE and back. What it loses no model on this
base can win; with `vae` off only the normalisation and the solver are left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from one4d_pl.config import SamplerConfig
from one4d_pl.data.order import derived_generator
from one4d_pl.evaluation.benchmarks import EvalSequence
from one4d_pl.evaluation.sweeps import sparse_indices
from one4d_pl.geometry.pointmap import is_sky, normalise_pointmap
from one4d_pl.geometry.se3 import rebase_to_first
from one4d_pl.inference.framing import Framing, Shape, frame_images
from one4d_pl.inference.pipeline import One4DPipeline
from one4d_pl.inference.predictions import Prediction, report_dict, write_prediction
from one4d_pl.models.wan import WanEncoders
from one4d_pl.postopt.recover import RecoveredScene, RecoverOptions, recover_scene
from one4d_pl.postopt.windows import Window, join_windows, plan_windows, window_condition

ONE_PASS = 113  # frames at most; 110 is the longest benchmark video


@dataclass(frozen=True)
class PredictOptions:
    """How a benchmark's videos are shown to the model."""

    height: int  # the size and length the model was trained at
    width: int
    num_frames: int
    shape: Shape = "no_squash"
    one_pass: bool = True  # whole videos up to 113 frames; False: windows of num_frames
    overlap: int = 5  # frames that neighbouring windows share, at least
    sparsity: float = 1.0  # share of frames that are given; 1 = all
    seed: int = 0
    far_limit: float = 10.0  # ceiling: of the normalisation, as in training
    z_offset: bool = False

    def windows(self, num_frames: int) -> tuple[Window, ...]:
        """The passes over a video of this length."""
        length = ONE_PASS if self.one_pass else self.num_frames
        return plan_windows(num_frames, length, self.overlap)

    def frame_mask(self, num_frames: int) -> Tensor:  # [T] bool, 1 = given
        """Which frames of a video are shown."""
        given = torch.zeros(num_frames, dtype=torch.bool)
        given[sparse_indices(num_frames, self.sparsity)] = True
        return given

    def framing(self, sequence_size: tuple[int, int]) -> Framing:
        """The model's frame for images of this size."""
        return frame_images(*sequence_size, self.height, self.width, self.shape)


def predict_sequence(
    pipeline: One4DPipeline,
    sequence: EvalSequence,
    options: PredictOptions,
    folder: Path,  # of this sequence's prediction
    on_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Generate pointmaps for one sequence, recover cameras and depth, and store them."""
    frames = sequence.read_frames()
    framing = options.framing((frames.shape[1], frames.shape[2]))
    placed, _ = framing.place_frames(frames, torch.eye(3).expand(len(frames), 3, 3))
    video = placed.permute(3, 0, 1, 2).float() / 127.5 - 1  # [3, T, h, w]
    frame_mask, windows = options.frame_mask(len(frames)), options.windows(len(frames))
    device = pipeline.encoders.latents_mean.device
    scenes: list[RecoveredScene] = []
    seen: list[Tensor] = []
    shown = video
    for index, window in enumerate(windows):
        condition = window_condition(frame_mask, windows, index)
        clip = _fill(shown[:, window.start : window.stop], window, dim=1).to(device)
        noise = draw_noise(pipeline.encoders, clip, sequence.name, index, options.seed)
        scene = pipeline.sample([sequence.caption()], clip[None], condition.frame_mask[None].to(device), noise, on_step)
        count = window.stop - window.start
        points = framing.cut(scene.pointmap[0, :, :count].cpu()).permute(1, 2, 3, 0)  # [T, h, w, 3]
        scenes.append(_recover(points, sequence))
        seen.append(~is_sky(points))
        if index + 1 < len(windows):  # what the next window is shown of the frames it shares
            made = scene.frames[0, :, :count].cpu()
            hidden = ~frame_mask[window.start : window.stop]
            shown = shown.clone()
            shown[:, window.start : window.stop][:, hidden] = made[:, hidden]
    _store(scenes, windows, seen, framing, frame_mask, folder)


def ceiling_sequence(
    encoders: WanEncoders | None,  # None = without the VAE: normalisation and solver alone
    sequence: EvalSequence,
    options: PredictOptions,
    folder: Path,
) -> None:
    """What true pointmaps are worth after normalisation, VAE and post-optimisation, stored as a prediction."""
    depth = sequence.read_depth()
    intrinsics, cam2world = sequence.read_cameras()
    cam2world = rebase_to_first(cam2world).float()  # float32 is exact enough near the origin alone
    framing = options.framing((depth.shape[1], depth.shape[2]))
    blank = torch.zeros(*depth.shape, 3, dtype=torch.uint8)
    _, intrinsics = framing.place_frames(blank, intrinsics.float())
    placed = framing.place_map(depth)
    windows = options.windows(len(depth))
    scenes, seen = [], []
    for window in windows:
        part = slice(window.start, window.stop)
        true = placed[part]
        geometry = normalise_pointmap(
            true,
            true.isfinite() & (true > 0),
            intrinsics[part],
            cam2world[part],
            options.far_limit,
            options.z_offset,
        )
        points, valid = geometry.points, geometry.valid
        if encoders is not None:
            points = _through_vae(encoders, points, window, framing)
            valid = ~is_sky(points)
        scenes.append(_recover(points, sequence, valid))
        seen.append(valid)
    _store(scenes, windows, seen, framing, torch.ones(len(depth), dtype=torch.bool), folder)


def _through_vae(encoders: WanEncoders, points: Tensor, window: Window, framing: Framing) -> Tensor:
    """Encode and decode [T, h, w, 3]; where the frame has bars they repeat the pointmap's edge."""
    device = encoders.latents_mean.device
    video = _fill(points.permute(3, 0, 1, 2), window, dim=1)
    top, left = framing.bars
    right, bottom = framing.width - framing.inner_width - left, framing.height - framing.inner_height - top
    video = torch.nn.functional.pad(video, (left, right, top, bottom), mode="replicate")
    decoded = encoders.decode(encoders.encode(video[None].to(device)))[0].cpu()
    return framing.cut(decoded)[:, : window.stop - window.start].permute(1, 2, 3, 0)


def _recover(points: Tensor, sequence: EvalSequence, valid: Tensor | None = None) -> RecoveredScene:
    """Cameras and depth of one window; sky has no say."""
    valid = ~is_sky(points) if valid is None else valid
    return recover_scene(points, valid, RecoverOptions(shared_focal=not sequence.zooms))


def _store(
    scenes: list[RecoveredScene],
    windows: tuple[Window, ...],
    seen: list[Tensor],  # [T, h, w] bool per window
    framing: Framing,
    frame_mask: Tensor,
    folder: Path,
) -> None:
    joined = join_windows(scenes, windows)
    valid = seen[0]
    for window, part in zip(windows[1:], seen[1:]):  # shared frames: valid where both windows say so
        shared = len(valid) - window.start
        valid = torch.cat([valid[: window.start], valid[window.start :] & part[:shared], part[shared:]])
    scene = joined.scene
    flags = scene.report.flags + tuple(flag for seam in joined.seams for flag in seam.flags)
    prediction = Prediction(
        scene.depth,
        scene.cam2world,
        scene.intrinsics.double(),
        valid & (scene.depth > 0),
        framing.placement,
        tuple(frame_mask.nonzero()[:, 0].tolist()),
        flags,
    )
    report = report_dict(scene.report) | {
        "windows": [[window.start, window.stop, window.length] for window in windows],
        "seams": [{"residual": seam.residual, "inliers": seam.inliers} for seam in joined.seams],
        "model_size": [framing.height, framing.width],
    }
    write_prediction(folder, prediction, report)


def _fill(frames: Tensor, window: Window, dim: int) -> Tensor:
    """Repeat the last frame to the window's 4k+1."""
    last = frames.narrow(dim, frames.shape[dim] - 1, 1)
    return torch.cat([frames, *[last] * window.padding], dim=dim)


def draw_noise(encoders: WanEncoders, clip: Tensor, name: str, window: int, seed: int) -> Tensor:  # [2, C, t, h, w]
    """Noise from (seed, sequence, window) alone, whatever ran before."""
    generator = derived_generator(seed, window, f"evaluation {name}")
    return torch.randn(2, *encoders.latent_shape(*clip.shape[1:]), generator=generator).to(clip.device)


def with_guidance(pipeline: One4DPipeline, guidance: float) -> One4DPipeline:
    """The same model at one guidance for every task and both branches."""
    config = pipeline.config
    same = replace(config.guidance, text=guidance, image=guidance, sparse=guidance, video=guidance)
    return _with_config(pipeline, replace(config, guidance=same, guidance_xyz=None))


def with_steps(pipeline: One4DPipeline, steps: int) -> One4DPipeline:
    """The same model at another number of sampling steps."""
    return _with_config(pipeline, replace(pipeline.config, steps=steps))


def _with_config(pipeline: One4DPipeline, config: SamplerConfig) -> One4DPipeline:
    return One4DPipeline(pipeline.transformer, pipeline.encoders, config, pipeline.shift, pipeline.negative_prompt)
