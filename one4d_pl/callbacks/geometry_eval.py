"""Errors of the geometry of scenes that are sampled while training."""

from __future__ import annotations

import logging

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchmetrics import Metric, SumMetric

from one4d_pl.callbacks.scene_samples import SceneSamples
from one4d_pl.geometry.pointmap import denormalise, is_sky, pointmap_to_depth
from one4d_pl.inference.pipeline import GeneratedScene
from one4d_pl.metrics.camera import CameraError, path_length
from one4d_pl.metrics.depth import VideoDepthError
from one4d_pl.metrics.pointmap import PointmapError, align_pointmap
from one4d_pl.postopt.recover import RecoveredScene, recover_scene
from one4d_pl.types import TASKS, Batch, Task

log = logging.getLogger(__name__)


CAMERA_KEYS = (
    "ate", "rpe_trans", "rpe_rot", "auc_30", "total_rotation", "total_rotation_target",
    "ate_regular", "rpe_trans_regular", "rpe_rot_regular", "degenerate",
)  # fmt: skip


class GeometryEval(Callback):
    """Logs errors of the geometry of all ranks' sampled scenes, as means over their clips.

    - `val/pointmap/*`, all tasks and each alone: after one scale and shift per clip.
    - `val/depth_true_cameras/*`: depth read from the aligned pointmap with the *true* cameras, which measures the
      geometry alone, not the cameras recovered from it.
    - `val/depth/*`: depth recovered from the pointmap alone, after an exact L1 scale and shift per clip.
    - `val/camera/*`: cameras recovered from the pointmap alone, after Sim(3), in the unit of the true cameras. A true
      or recovered camera that stands still or moves on a line is in the plain means and counted in `degenerate`; the
      `_regular` means leave it out, as published protocols do. A recovered camera that stands still must not look good:
      `total_rotation` shows it, and `path_length_ratio` (recovered / true), which is taken in the unit of the aligned
      pointmap because Sim(3) would scale such a camera's jitter up to the length of the true path.
    """

    def __init__(self, samples: SceneSamples) -> None:
        self.samples = samples

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        # every rank has the metrics of every task, whatever scenes it got: computing one is a collective
        self.pointmap: dict[str, PointmapError] = {t: PointmapError() for t in ("all", *TASKS)}
        self.depth_true_cameras = VideoDepthError("none")
        self.depth = VideoDepthError("scale_shift")
        self.camera = CameraError()
        self.path_length, self.path_length_target = SumMetric(), SumMetric()

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not self.samples.due:
            return
        errors = (self.depth_true_cameras, self.depth, self.camera, *self.pointmap.values())
        for metric in (*errors, self.path_length, self.path_length_target):
            metric.to(module.device)  # NCCL cannot reduce tensors on the CPU
        for batch, scene in self.samples.scenes:
            self._update(batch, scene)
        metrics = self._compute()
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)
        if trainer.is_global_zero:
            shown = ("val/pointmap/rel_error", "val/depth/abs_rel", "val/camera/ate")
            values = ", ".join(f"{name} {metrics[name]:.4f}" for name in shown if name in metrics)
            note = f"; {metrics['val/camera/degenerate']:.0f} cameras stand still or move on a line"
            log.info("step %d: %s%s", trainer.global_step, values, note if metrics["val/camera/degenerate"] else "")

    def _update(self, batch: Batch, scene: GeneratedScene) -> None:
        preds = scene.pointmap.movedim(1, -1)  # [B, T, H, W, 3]
        target = denormalise(batch.pointmap.movedim(1, -1), batch.scale).double()
        for i, task in enumerate(batch.tasks):
            self._update_clip(preds[i], target[i], batch.valid[i], batch.moving[i], batch.cam2world[i].double(), task)

    def _update_clip(
        self,
        preds: Tensor,  # [T, H, W, 3], normalised
        target: Tensor,  # [T, H, W, 3], camera-0 coordinates, float64
        valid: Tensor,  # [T, H, W] bool
        moving: Tensor,  # [T, H, W] bool
        cam2world: Tensor,  # [T, 4, 4], unit of target, float64
        task: Task,
    ) -> None:
        points = preds.double()
        for name in ("all", task):
            self.pointmap[name].update(points[None], target[None], valid[None], moving[None])
        fit, _ = align_pointmap(points, target, valid)
        depth = pointmap_to_depth(target, cam2world)
        self.depth_true_cameras.update(pointmap_to_depth(fit.apply(points), cam2world), depth, valid)
        recovered = recover_without_truth(preds)
        self.depth.update(recovered.depth.to(depth), depth, valid)
        everywhere = torch.ones_like(cam2world[:, 0, 0], dtype=torch.bool)
        cam2world_preds = recovered.cam2world.to(cam2world)
        self.camera.update(cam2world_preds, cam2world, everywhere)
        self.path_length.update(fit.scale * path_length(cam2world_preds))
        self.path_length_target.update(path_length(cam2world))

    def _compute(self) -> dict[str, float]:
        """Compute every value over all ranks, by its key."""
        metrics = {f"val/depth_true_cameras/{k}": v for k, v in _finite(self.depth_true_cameras).items()}
        metrics |= {f"val/depth/{k}": v for k, v in _finite(self.depth).items()}
        camera = _finite(self.camera)
        metrics |= {f"val/camera/{k}": camera[k] for k in CAMERA_KEYS if k in camera}
        path, path_target = (_total(metric) for metric in (self.path_length, self.path_length_target))
        if path_target:
            metrics["val/camera/path_length_ratio"] = path / path_target
        for task, errors in self.pointmap.items():
            where = "val/pointmap" if task == "all" else f"val/pointmap_{task}"
            metrics |= {f"{where}/{k}": v for k, v in _finite(errors).items()}
        return metrics


def recover_without_truth(pointmap: Tensor) -> RecoveredScene:  # [T, H, W, 3], normalised
    """Recover cameras and depth of a generated pointmap, on the CPU, from what a user would have.

    Sky is what the pointmap itself marks as sky. All frames share one focal length unless the points clearly contradict
    that: a clip that zooms (many of the toy world's do) may score worse than its pointmap deserves.
    """
    points = pointmap.cpu()
    return recover_scene(points, ~is_sky(points))


def _finite(metric: Metric) -> dict[str, float]:
    """Compute over all ranks and reset; values to which no clip contributed are left out."""
    values = {name: float(value) for name, value in metric.compute().items()}
    metric.reset()
    return {name: value for name, value in values.items() if torch.tensor(value).isfinite()}


def _total(metric: SumMetric) -> float:
    """Compute the sum over all ranks and reset it."""
    value = float(metric.compute())
    metric.reset()
    return value
