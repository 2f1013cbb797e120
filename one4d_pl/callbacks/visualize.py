"""Pictures where people would look: one panel per task, given | generated | pointmap colours | distance."""

from __future__ import annotations

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from one4d_pl.callbacks.scene_samples import SceneSamples
from one4d_pl.inference.panels import scene_panel
from one4d_pl.models.conditioning import blank_hidden_frames


class Visualize(Callback):
    """Writes `val/scene/<task>` image panels of this rank's sampled scenes (rank 0's) to TensorBoard."""

    def __init__(self, samples: SceneSamples) -> None:
        self.samples = samples

    def on_validation_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if not isinstance(trainer.logger, TensorBoardLogger) or not trainer.is_global_zero:
            return
        drawn: set[str] = set()
        for batch, scene in self.samples.scenes:
            if batch.tasks[0] in drawn:
                continue
            drawn.add(batch.tasks[0])
            given = blank_hidden_frames(batch.frames, batch.frame_mask)
            panel = scene_panel(given[0], scene.frames[0], scene.pointmap[0], batch.pointmap[0])
            trainer.logger.experiment.add_image(
                f"val/scene/{batch.tasks[0]}", panel, trainer.global_step, dataformats="HWC"
            )
