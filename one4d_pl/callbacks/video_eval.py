"""The distance of generated videos from true ones, as a set and frame by frame."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import replace

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from one4d_pl.callbacks.cadence import Cadence
from one4d_pl.config import ConfigError, EvalConfig
from one4d_pl.data.datamodule import datamodule_of
from one4d_pl.data.decode import PaddedStream
from one4d_pl.evaluation.fit_quality import decibels
from one4d_pl.metrics.perceptual import st_lpips
from one4d_pl.metrics.video import I3D_MIN_FRAMES, FrechetVideoDistance, I3DFeatures, VaeFeatures
from one4d_pl.training.module import One4DModule
from one4d_pl.types import Batch, Sample, Task

log = logging.getLogger(__name__)

MIN_VIDEOS = 2  # one video has no covariance


class VideoEval(Callback):
    """Logs `val/video/fvd` where eval.i3d names a file, else `val/video/fd_vae`, by the base's VAE.

    It also logs `val/video/psnr` of the frames that were not given, and `val/video/st_lpips` where its extra is
    installed. Every clip is generated from its first frame and caption, whatever task validation draws for it: with
    more frames given, the measure would be of given frames. A validation has too few clips, so these are the first
    eval.video_clips of the validation sources (all, if they hold fewer), split over the ranks.
    """

    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        self.cadence = Cadence(config.video_every)
        self.i3d: I3DFeatures | None = None

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        assert isinstance(module, One4DModule)
        self.cadence.start(trainer.global_step)
        if self.config.i3d is not None:
            if module.config.data.num_frames < I3D_MIN_FRAMES:
                raise ConfigError(
                    f"eval.i3d: I3D needs {I3D_MIN_FRAMES} frames, data.num_frames is {module.config.data.num_frames}; "
                    "set eval.i3d=null for val/video/fd_vae"
                )
            self.i3d = I3DFeatures(self.config.i3d)

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, One4DModule)
        if not self.cadence.due(trainer.global_step):
            return
        features = self.i3d or VaeFeatures(module.encoders.encode, module.encoders.latent_channels)
        metric = FrechetVideoDistance(features).to(module.device)  # a new one each time, so that none is kept in memory
        clips = _clips(trainer, self.config.video_clips)
        assert isinstance(clips.dataset, PaddedStream)
        count = clips.dataset.count
        if count < MIN_VIDEOS:
            raise ConfigError(
                f"eval.video_every: a Fréchet distance needs {MIN_VIDEOS} validation clips, data.val_sources hold "
                f"{count}; add some or set eval.video_every=0"
            )
        scores = HiddenFrameScores(module.device)
        for batch in clips:
            target = image_to_video(batch.to(module.device))
            scene = module.sample(target, self.config.steps)
            for frames, real in ((target.frames, True), (scene.frames, False)):
                if target.counted.all():
                    metric.update(frames, real=real)
                else:
                    features(frames)  # the result is dropped: every rank makes the same calls, see SceneSamples
            if target.counted.all():
                scores.update(scene.frames, target.frames, target.frame_mask)
        name, distance = f"val/video/{metric.name}", float(metric.compute())
        metrics = {name: distance, **{f"val/video/{k}": v for k, v in scores.compute().items()}}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)
        if trainer.is_global_zero:
            log.info("step %d: %s %.4f over %d videos", trainer.global_step, name, distance, count)


class HiddenFrameScores:
    """PSNR and ST-LPIPS of the frames that were not given, as means over the clips of all ranks."""

    def __init__(self, device: torch.device) -> None:
        self.means = {name: MeanMetric().to(device) for name in ("psnr", "st_lpips")}
        for mean in self.means.values():
            mean.update(0.0, weight=0.0)  # computing is a collective, in which ranks without clips take part, too

    def update(self, preds: Tensor, target: Tensor, given: Tensor) -> None:  # [B, 3, T, H, W] x 2, [B, T]
        """Add clips. A score that cannot be measured (one frame, no extra `st-lpips`) is left out."""
        for name, measure in (("psnr", decibels), ("st_lpips", st_lpips)):
            if (hidden := measure(preds, target, given).get("hidden")) is not None:
                self.means[name].update(hidden, weight=len(preds))

    def compute(self) -> dict[str, float]:
        """Compute the means over all ranks; one without any clip is left out."""
        values = {name: float(mean.compute()) for name, mean in self.means.items()}
        return {name: value for name, value in values.items() if not math.isnan(value)}


def image_to_video(batch: Batch) -> Batch:
    """Return the same clips with their first frame given and no other."""
    first = torch.zeros_like(batch.frame_mask)
    first[:, 0] = True
    task: Task = "image"
    return replace(batch, frame_mask=first, tasks=(task,) * len(batch))


def _clips(trainer: Trainer, count: int) -> DataLoader[Sample]:
    """Return the loader of this rank's share of the first `count` validation clips."""
    longer = copy.copy(datamodule_of(trainer))
    longer.config = replace(longer.config, val=replace(longer.config.val, clips=count))
    return longer.val_dataloader()
