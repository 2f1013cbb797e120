"""Pictures of a scored sequence: a strip of depth maps, and the camera's path from above."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate

from one4d_pl.evaluation.benchmarks import EvalSequence
from one4d_pl.evaluation.score import SequenceScore
from one4d_pl.files import whole_file
from one4d_pl.geometry.alignment import align_sim3
from one4d_pl.scene.framing import to_image
from one4d_pl.scene.panels import near_to_far
from one4d_pl.scene.predictions import Prediction

COLUMNS = 5  # frames of a strip, evenly spaced, first and last among them
WIDTH = 240  # pixels of one picture
UNKNOWN = (0.5, 0.5, 0.5)
MAX_ERROR = 0.5  # relative error of the darkest colour
SIZE, MARGIN = 480, 30  # pixels of the path's picture
TRUTH, PREDICTED = (40, 110, 200), (215, 80, 30)


def save_pictures(folder: Path, sequence: EvalSequence, prediction: Prediction, score: SequenceScore) -> None:
    """Write <sequence>_depth.png and <sequence>_path.png, each where it was scored."""
    if prediction.depth is not None and score.fit is not None:
        _save(depth_strip(sequence, prediction, score.fit), folder / f"{sequence.name}_depth.png")
    if prediction.cam2world is not None and score.cameras is not None:
        _save(path_plot(prediction.cam2world, sequence.read_cameras()[1]), folder / f"{sequence.name}_path.png")


def depth_strip(sequence: EvalSequence, prediction: Prediction, fit: tuple[float, float]) -> Image.Image:
    """Draw frames, true depth, aligned prediction and relative error (light = small), one row each.

    Columns are frames in time.
    """
    chosen = torch.linspace(0, sequence.num_frames - 1, min(COLUMNS, sequence.num_frames)).round().long()
    frames, true = sequence.read_frames()[chosen].float() / 255, sequence.read_depth()[chosen]
    assert prediction.depth is not None
    preds = to_image(prediction.depth[chosen], true.shape[1], true.shape[2], prediction.placement)
    preds = fit[0] * preds + fit[1]
    known = true.isfinite() & (true > 0)
    some = true[known] if bool(known.any()) else torch.ones(1)
    some = some[:: max(1, len(some) // 100_000)]
    near, far = torch.quantile(some, torch.tensor([0.02, 0.98])).tolist()
    span = math.log(max(far / near, 1.001))
    error = torch.where(known, (preds - true).abs() / true / MAX_ERROR, torch.nan)
    rows = [
        frames,
        _colours(torch.where(known, (true / near).log() / span, torch.nan)),
        _colours((preds.clamp_min(1e-6) / near).log() / span),
        _colours(error),
    ]
    height = max(1, round(WIDTH * true.shape[1] / true.shape[2]))
    small = [interpolate(row.movedim(-1, 1), (height, WIDTH), mode="area") for row in rows]  # [T, 3, h, w] each
    panel = torch.cat([torch.cat(list(row), dim=2) for row in small], dim=1)  # [3, 4 h, T w]
    return Image.fromarray((panel.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def path_plot(cam2world: Tensor, target: Tensor) -> Image.Image:  # [T, 4, 4] x 2
    """Draw both camera paths after the best similarity.

    The picture's axes are the two directions in which the true path extends most.
    """
    centres, true = cam2world[:, :3, 3].double(), target[:, :3, 3].double()
    try:
        fit = align_sim3(centres, true, torch.ones(len(true), dtype=torch.bool))
        aligned = fit.apply(centres)
    except ValueError:  # a path on a line or at one place does not determine a rotation
        aligned = centres - centres.mean(0) + true.mean(0)
    axes = torch.linalg.svd(true - true.mean(0), full_matrices=True).Vh[:2]
    flat, flat_true = (aligned - true.mean(0)) @ axes.mT, (true - true.mean(0)) @ axes.mT
    reach = float(torch.cat([flat, flat_true]).abs().amax().clamp_min(1e-9))
    picture = Image.new("RGB", (SIZE, SIZE), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    draw.text((8, 6), f"truth, {len(true)} frames", fill=TRUTH)
    draw.text((8, 20), "prediction after Sim(3)", fill=PREDICTED)
    draw.text((8, SIZE - 18), f"half width {reach:.3g} (unit of the truth); dot: first frame", fill=(90, 90, 90))
    for path, colour in ((flat_true, TRUTH), (flat, PREDICTED)):
        placed = path * (SIZE / 2 - MARGIN) / reach
        pixels = [(SIZE / 2 + x, SIZE / 2 - y) for x, y in placed.tolist()]
        draw.line(pixels, fill=colour, width=2)
        x, y = pixels[0]
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
    return picture


def _colours(position: Tensor) -> Tensor:  # [T, H, W], 0 = first colour, 1 = last, nan = unknown -> [T, H, W, 3]
    known = position.isfinite()
    return torch.where(known[..., None], near_to_far(torch.where(known, position, 0)), torch.tensor(UNKNOWN))


def _save(picture: Image.Image, path: Path) -> None:
    with whole_file(path) as staging:
        picture.save(staging, "PNG")
