"""Pictures where people would look: one panel per task, given | generated | pointmap colours | distance."""

from __future__ import annotations

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from one4d_pl.callbacks.scene_samples import SceneSamples
from one4d_pl.geometry.pointmap import is_sky
from one4d_pl.models.conditioning import blank_hidden_frames

COLUMNS = 5  # frames shown of a clip, evenly spaced, the first and the last among them
GAP = 2  # pixels between the pictures of a panel
# near to far; lightness falls with distance, so that it reads in grey too
DISTANCE_COLOURS = ((0.99, 0.91, 0.62), (0.96, 0.55, 0.25), (0.75, 0.22, 0.42), (0.35, 0.12, 0.48), (0.05, 0.03, 0.20))
SKY_COLOUR = (0.62, 0.80, 0.95)


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


def scene_panel(
    given: Tensor,  # [3, T, H, W] in [-1, 1], hidden frames grey
    frames: Tensor,  # [3, T, H, W] in [-1, 1], generated
    pointmap: Tensor,  # [3, T, H, W], generated, normalised
    true_pointmap: Tensor,  # [3, T, H, W], normalised
) -> Tensor:  # [h, w, 3] uint8
    """Rows: given, generated, pointmap as colours, distance from camera 0, true distance; columns: frames."""
    points, true_points = pointmap.movedim(0, -1), true_pointmap.movedim(0, -1)  # [T, H, W, 3]
    near, far = distance_range(true_points)
    rows = [
        (given.movedim(0, -1) + 1) / 2,
        (frames.movedim(0, -1) + 1) / 2,
        (points + 1) / 2,
        distance_colours(points, near, far),
        distance_colours(true_points, near, far),
    ]
    chosen = torch.linspace(0, frames.shape[1] - 1, COLUMNS).round().long()
    gap = [0, 0, 0, GAP, 0, GAP]
    pictures = [torch.cat([torch.nn.functional.pad(row[t], gap, value=1.0) for t in chosen], dim=1) for row in rows]
    return (torch.cat(pictures).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def distance_range(points: Tensor) -> tuple[float, float]:  # [T, H, W, 3]
    """2nd and 98th percentile of the distance from camera 0, sky left out."""
    distance = points.norm(dim=-1)[~is_sky(points)]
    if len(distance) == 0:
        return 0.01, 1.0
    some = distance.float()[:: max(1, len(distance) // 100_000)]
    near, far = torch.quantile(some, some.new_tensor([0.02, 0.98])).tolist()
    return max(near, 1e-3), max(far, near + 1e-3)


def distance_colours(points: Tensor, near: float, far: float) -> Tensor:  # [T, H, W, 3] -> [T, H, W, 3] in [0, 1]
    """Log distance from camera 0 as colours, nearer = lighter; sky blue."""
    distance = points.norm(dim=-1).clamp(near, far)
    position = torch.log(distance / near) / torch.log(torch.tensor(far / near)) * (len(DISTANCE_COLOURS) - 1)
    table = points.new_tensor(DISTANCE_COLOURS)
    low = position.floor().long().clamp(0, len(DISTANCE_COLOURS) - 2)
    weight = (position - low)[..., None]
    colours = (1 - weight) * table[low] + weight * table[low + 1]
    return torch.where(is_sky(points)[..., None], points.new_tensor(SKY_COLOUR), colours)
