"""How good is the geometry of scenes sampled while training?"""

from __future__ import annotations

import logging

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torchmetrics import Metric

from one4d_pl.callbacks.scene_samples import SceneSamples
from one4d_pl.geometry.pointmap import denormalise, pointmap_to_depth
from one4d_pl.inference.pipeline import GeneratedScene
from one4d_pl.metrics.depth import VideoDepthError
from one4d_pl.metrics.pointmap import PointmapError, align_pointmap
from one4d_pl.types import TASKS, Batch

log = logging.getLogger(__name__)


class GeometryEval(Callback):
    """Logs `val/pointmap/*` (all tasks and each alone) and `val/depth_true_cameras/*` over every rank's sampled scenes.

    Pointmaps are aligned by one scale and shift per clip. Depth is read from the aligned pointmap with the *true*
    cameras, which is why its name says so: it judges the geometry, not the cameras recovered from it.
    """

    def __init__(self, samples: SceneSamples) -> None:
        self.samples = samples

    def setup(self, trainer: lightning.Trainer, module: lightning.LightningModule, stage: str) -> None:
        # every task on every rank, whatever scenes it got: computing a metric is a collective
        self.pointmap: dict[str, PointmapError] = {t: PointmapError("scale_shift") for t in ("all", *TASKS)}
        self.depth = VideoDepthError("none")

    def on_validation_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if not self.samples.due:
            return
        for metric in (self.depth, *self.pointmap.values()):
            metric.to(module.device)  # NCCL cannot reduce what lies on the CPU
        for batch, scene in self.samples.scenes:
            self._update(batch, scene)
        metrics = {f"val/depth_true_cameras/{k}": v for k, v in _finite(self.depth).items()}
        for task, errors in self.pointmap.items():
            where = "val/pointmap" if task == "all" else f"val/pointmap_{task}"
            metrics |= {f"{where}/{k}": v for k, v in _finite(errors).items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)
        if trainer.is_global_zero and "val/pointmap/rel_error" in metrics:
            log.info("step %d: val/pointmap/rel_error %.4f", trainer.global_step, metrics["val/pointmap/rel_error"])

    def _update(self, batch: Batch, scene: GeneratedScene) -> None:
        preds = scene.pointmap.movedim(1, -1).double()  # [B, T, H, W, 3]
        target = denormalise(batch.pointmap.movedim(1, -1), batch.scale).double()
        valid, moving = batch.valid, batch.moving
        for i, task in enumerate(batch.tasks):
            one = slice(i, i + 1)
            for name in ("all", task):
                self.pointmap[name].update(preds[one], target[one], valid[one], moving[one])
            fit, _ = align_pointmap(preds[i], target[i], valid[i], "scale_shift")
            cam2world = batch.cam2world[i].double()
            depth = [pointmap_to_depth(points, cam2world) for points in (fit.apply(preds[i]), target[i])]
            self.depth.update(*depth, valid[i])


def _finite(metric: Metric) -> dict[str, float]:
    """Compute over all ranks and start anew; a value without any clip behind it is left out."""
    values = {name: float(value) for name, value in metric.compute().items()}
    metric.reset()
    return {name: value for name, value in values.items() if torch.tensor(value).isfinite()}
