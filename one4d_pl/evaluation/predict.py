"""Run a model, or only its VAE, over a benchmark and store its prediction of each sequence.

1. Place frames in the model's frame (`framing`): square pixels, about as many tokens as it was trained with.
2. Generate pointmaps in one pass of 4k+1 frames up to 113, or in overlapping windows of the trained length
   (`inference.long_video`).
3. Recover cameras and depth of one scene, and store it.

The ceiling replaces step 2 by true pointmaps, normalised, encoded by the VAE and decoded. No model
on this base can be better than it. Without the VAE it measures the normalisation and the solver.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from one4d_pl.data.sample_order import derived_generator
from one4d_pl.evaluation.benchmarks import EvalSequence
from one4d_pl.evaluation.sweeps import sparse_indices
from one4d_pl.geometry.camera import resize_crop_intrinsics, resize_nearest_valid
from one4d_pl.geometry.pointmap import is_sky, normalise_pointmap
from one4d_pl.geometry.se3 import rebase_to_first
from one4d_pl.inference.long_video import fill_window, recover_video
from one4d_pl.inference.pipeline import One4DPipeline
from one4d_pl.models.sample_encoder import FrozenSampleEncoder
from one4d_pl.postopt.recover import RecoveredScene, RecoverOptions
from one4d_pl.postopt.windows import Window, plan_windows
from one4d_pl.scene.framing import Framing, Shape, frame_images
from one4d_pl.scene.media import to_network
from one4d_pl.scene.predictions import Prediction, report_dict, write_prediction

MAX_ONE_PASS = 113  # frames; the longest benchmark video has 110


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
        """Plan the passes over a video of this length."""
        length = MAX_ONE_PASS if self.one_pass else self.num_frames
        return plan_windows(num_frames, length, self.overlap)

    def frame_mask(self, num_frames: int) -> Tensor:  # [T] bool, 1 = given
        """Return which frames of a video are given."""
        given = torch.zeros(num_frames, dtype=torch.bool)
        given[sparse_indices(num_frames, self.sparsity)] = True
        return given

    def framing(self, sequence_size: tuple[int, int]) -> Framing:
        """Choose the model's frame for images of this size."""
        return frame_images(*sequence_size, self.height, self.width, self.shape)


def predict_sequence(
    pipeline: One4DPipeline,
    options: PredictOptions,
    sequence: EvalSequence,
    folder: Path,  # of this sequence's prediction
) -> None:
    """Generate pointmaps for one sequence, recover cameras and depth, and store them."""
    frames = sequence.read_frames()
    framing = options.framing((frames.shape[1], frames.shape[2]))
    placed = framing.place_frames(frames)
    frame_mask, windows = options.frame_mask(len(frames)), options.windows(len(frames))

    def noise(window: int, shape: tuple[int, ...]) -> Tensor:
        return draw_noise(shape, sequence.name, window, options.seed)

    _, points = pipeline.sample_windows(sequence.caption(), to_network(placed), frame_mask, windows, noise)
    points = tuple(framing.cut(part.movedim(-1, 0)).movedim(0, -1) for part in points)
    _store(recover_video(windows, points, _recovery(sequence)), windows, framing, frame_mask, folder)


def ceiling_sequence(
    encoder: FrozenSampleEncoder | None,  # None = without the VAE: normalisation and solver alone
    options: PredictOptions,
    sequence: EvalSequence,
    folder: Path,
) -> None:
    """Store what true pointmaps give after normalisation, VAE and post-optimisation."""
    depth = sequence.read_depth()
    intrinsics, cam2world = sequence.read_cameras()
    cam2world = rebase_to_first(cam2world).float()  # float32 is exact enough only near the origin
    framing = options.framing((depth.shape[1], depth.shape[2]))
    inner = framing.inner_height, framing.inner_width
    intrinsics = resize_crop_intrinsics(intrinsics.float(), (depth.shape[1], depth.shape[2]), inner)
    placed = resize_nearest_valid(depth, *inner)
    windows = options.windows(len(depth))
    pointmaps, masks = [], []
    for window in windows:
        part = slice(window.start, window.stop)
        known = placed[part].isfinite() & (placed[part] > 0)
        limits = options.far_limit, options.z_offset
        geometry = normalise_pointmap(placed[part], known, intrinsics[part], cam2world[part], *limits)
        points, valid = geometry.points, geometry.valid
        if encoder is not None:
            points = _through_vae(encoder, points, window, framing)
            valid = ~is_sky(points)
        pointmaps.append(points)
        masks.append(valid)
    scene = recover_video(windows, tuple(pointmaps), _recovery(sequence), tuple(masks))
    _store(scene, windows, framing, torch.ones(len(depth), dtype=torch.bool), folder)


def _through_vae(encoder: FrozenSampleEncoder, points: Tensor, window: Window, framing: Framing) -> Tensor:
    """Encode and decode points [T, h, w, 3]; bars of the frame repeat the pointmap's edge."""
    encoders, codec = encoder.encoders, encoder.codec
    video = framing.with_bars(fill_window(points.permute(3, 0, 1, 2), window), "replicate")
    latents = codec.encode(encoders, video[None].to(encoders.latents_mean.device))
    decoded = codec.decode(encoders, latents)[0].cpu()
    return framing.cut(decoded)[:, : window.stop - window.start].permute(1, 2, 3, 0)


def _recovery(sequence: EvalSequence) -> RecoverOptions:
    return RecoverOptions(shared_focal=False if sequence.zooms else None)


def _store(
    scene: RecoveredScene, windows: tuple[Window, ...], framing: Framing, frame_mask: Tensor, folder: Path
) -> None:
    given = tuple(frame_mask.nonzero()[:, 0].tolist())
    passes = [[window.start, window.stop, window.length] for window in windows]
    report = report_dict(scene.report) | {"windows": passes, "model_size": [framing.height, framing.width]}
    write_prediction(folder, Prediction.of(scene, framing.placement, given), report)


def draw_noise(shape: tuple[int, ...], name: str, window: int, seed: int) -> Tensor:
    """Draw noise that depends on seed, sequence and window alone, not on what ran before."""
    return torch.randn(shape, generator=derived_generator(seed, window, f"evaluation {name}"))
