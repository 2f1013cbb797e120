"""Pictures in TensorBoard: a panel per task, and its points.

A panel shows given frames | generated frames | pointmap colours | distance. The points need open3d
(the extra of that name) here and where TensorBoard runs, which shows them in its tab "Open3D".
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from one4d_pl.callbacks.scene_samples import SceneSamples
from one4d_pl.geometry.pointmap import is_sky
from one4d_pl.models.conditioning import blank_hidden_frames
from one4d_pl.scene.panels import scene_panel, to_bytes

log = logging.getLogger("one4d_pl")

POINTS = 20_000  # at most, of a cloud in TensorBoard; larger ones are thinned evenly
UPRIGHT = (1.0, -1.0, -1.0)  # open3d looks along -z with y up


class Visualize(Callback):
    """Writes rank 0's sampled scenes to TensorBoard, `val/scene/<task>` and `val/points/<task>`."""

    def __init__(self, samples: SceneSamples) -> None:
        self.samples = samples

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not boards or not trainer.is_global_zero:
            return
        writer = boards[0].experiment
        drawn: set[str] = set()
        for batch, scene in self.samples.scenes:
            task = batch.tasks[0]
            if task in drawn:
                continue
            drawn.add(task)
            given = blank_hidden_frames(batch.frames, batch.frame_mask)
            panel = scene_panel(given[0], scene.frames[0], scene.pointmap[0], batch.pointmap[0])
            writer.add_image(f"val/scene/{task}", panel, trainer.global_step, dataformats="HWC")
            if has_open3d_plugin():
                cloud = scene_points(scene.frames[0], scene.pointmap[0])
                writer.add_3d(f"val/points/{task}", cloud, trainer.global_step)


def scene_points(
    frames: Tensor,  # [3, T, H, W] in [-1, 1]
    pointmap: Tensor,  # [3, T, H, W], normalised
) -> dict[str, Tensor]:  # vertex_positions [1, N, 3], vertex_colors [1, N, 3] uint8
    """Return the points of all frames but the sky, in open3d's axes.

    Where all is sky, this is the first camera's centre alone.
    """
    points, colours = pointmap.movedim(0, -1).float().cpu(), to_bytes((frames.movedim(0, -1) + 1) / 2)
    surface = ~is_sky(points)
    points, colours = points[surface], colours[surface]
    if len(points) == 0:
        points, colours = torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.uint8)
    chosen = torch.arange(min(POINTS, len(points))) * len(points) // min(POINTS, len(points))
    return {
        "vertex_positions": points[chosen][None] * points.new_tensor(UPRIGHT),
        "vertex_colors": colours[chosen][None],
    }


@cache
def has_open3d_plugin() -> bool:
    """Tell whether open3d works; importing its plugin adds `add_3d` to TensorBoard's writer."""
    if importlib.util.find_spec("open3d") is None:
        return False
    try:
        importlib.import_module("open3d.visualization.tensorboard_plugin.summary")
    except (ImportError, OSError) as error:  # OSError: a shared library that it needs is missing
        log.warning("no point clouds in TensorBoard: open3d cannot be imported (%s)", error)
        return False
    return True
