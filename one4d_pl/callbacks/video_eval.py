"""How far are generated videos from true ones as a set? A Fréchet distance while training, on a cadence of its own."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from one4d_pl.callbacks.cadence import Cadence
from one4d_pl.callbacks.scene_samples import sample_scene
from one4d_pl.config import ConfigError, EvalConfig
from one4d_pl.data.datamodule import datamodule_of
from one4d_pl.data.decode import PaddedStream
from one4d_pl.metrics.video import I3D_MIN_FRAMES, FrechetVideoDistance, I3DFeatures, VaeFeatures
from one4d_pl.training.module import One4DModule
from one4d_pl.types import Batch, Sample, Task

log = logging.getLogger(__name__)

FEWEST = 2  # videos: one has no covariance


class VideoEval(Callback):
    """Logs `val/video/fvd` where eval.i3d names an I3D file, `val/video/fd_vae` (the base's own VAE) where not.

    Every clip is generated from its first frame and caption, whatever task validation draws for it:
    a video of which more is given would be judged by what it was shown. More clips are needed than
    a validation has, so these are the first eval.video_clips of the validation sources (all, if
    they hold fewer), split over the ranks.
    """

    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        self.cadence = Cadence(config.video_every)
        self.i3d: I3DFeatures | None = None

    def setup(self, trainer: lightning.Trainer, module: lightning.LightningModule, stage: str) -> None:
        assert isinstance(module, One4DModule)
        self.cadence.start(trainer.global_step)
        if self.config.i3d is not None:
            if module.config.data.num_frames < I3D_MIN_FRAMES:
                raise ConfigError(
                    f"eval.i3d: I3D needs {I3D_MIN_FRAMES} frames, data.num_frames is {module.config.data.num_frames}; "
                    "set eval.i3d=null for val/video/fd_vae"
                )
            self.i3d = I3DFeatures(self.config.i3d)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        assert isinstance(module, One4DModule)
        if not self.cadence.due(trainer.global_step):
            return
        features = self.i3d or VaeFeatures(module.encoders.encode, module.encoders.latent_channels)
        metric = FrechetVideoDistance(features).to(module.device)  # anew: between two evaluations it holds no memory
        clips = _clips(trainer, self.config.video_clips)
        assert isinstance(clips.dataset, PaddedStream)
        count = clips.dataset.count
        if count < FEWEST:
            raise ConfigError(
                f"eval.video_every: a Fréchet distance needs {FEWEST} validation clips, data.val_sources hold {count}; "
                "add some or set eval.video_every=0"
            )
        for batch in clips:
            shown = image_to_video(batch.to(module.device))
            scene = sample_scene(trainer, module, shown, self.config.steps)
            for frames, real in ((shown.frames, True), (scene.frames, False)):
                if shown.counted.all():
                    metric.update(frames, real=real)
                else:
                    features(frames)  # for nothing: every rank makes the same calls, see SceneSamples
        name, distance = f"val/video/{metric.name}", float(metric.compute())
        for logger in trainer.loggers:
            logger.log_metrics({name: distance}, trainer.global_step)
        if trainer.is_global_zero:
            log.info("step %d: %s %.4f over %d videos", trainer.global_step, name, distance, count)


def image_to_video(batch: Batch) -> Batch:
    """The same clips with their first frame given and no other."""
    first = torch.zeros_like(batch.frame_mask)
    first[:, 0] = True
    task: Task = "image"
    return replace(batch, frame_mask=first, tasks=(task,) * len(batch))


def _clips(trainer: lightning.Trainer, count: int) -> DataLoader[Sample]:
    """This rank's share of the first `count` validation clips, one per batch: the loader of a longer validation."""
    longer = copy.copy(datamodule_of(trainer))
    longer.config = replace(longer.config, val=replace(longer.config.val, clips=count))
    return longer.val_dataloader()
