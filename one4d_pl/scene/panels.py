"""Pictures of a scene: frames and pointmaps as rows of a panel, and distance as colours."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from one4d_pl.geometry.pointmap import is_sky

COLUMNS = 5  # frames shown of a clip, evenly spaced, the first and the last among them
GAP = 2  # pixels between the pictures of a panel
# Near to far; lightness falls with distance, so that it can be read in grey as well.
DISTANCE_COLOURS = ((0.99, 0.91, 0.62), (0.96, 0.55, 0.25), (0.75, 0.22, 0.42), (0.35, 0.12, 0.48), (0.05, 0.03, 0.20))
SKY_COLOUR = (0.62, 0.80, 0.95)


def scene_panel(
    given: Tensor,  # [3, T, H, W] in [-1, 1], hidden frames grey
    frames: Tensor,  # [3, T, H, W] in [-1, 1], generated
    pointmap: Tensor,  # [3, T, H, W], generated, normalised
    true_pointmap: Tensor,  # [3, T, H, W], normalised
    zoom: int = 1,  # pixels of the panel per pixel of a frame
) -> Tensor:  # [h, w, 3] uint8
    """Draw given frames, generated frames, pointmap, distance from camera 0 and true distance.

    Each is a row; columns are frames.
    """
    points, true_points = pointmap.movedim(0, -1), true_pointmap.movedim(0, -1)  # [T, H, W, 3]
    near, far = distance_range(true_points)
    rows = [  # [T, H, W, 3] each
        (given.movedim(0, -1) + 1) / 2,
        (frames.movedim(0, -1) + 1) / 2,
        (points + 1) / 2,
        distance_colours(points, near, far),
        distance_colours(true_points, near, far),
    ]
    return panel(rows, zoom)


def panel(rows: list[Tensor], zoom: int = 1) -> Tensor:  # [T, H, W, 3] in [0, 1] each -> [h, w, 3] uint8
    """Draw one row of pictures per video: the first frame, the last, and some evenly between."""
    num_frames = len(rows[0])
    chosen = torch.linspace(0, num_frames - 1, min(COLUMNS, num_frames)).round().long()
    gap = [0, 0, 0, GAP, 0, GAP]
    pictures = [torch.cat([pad(frame, gap, value=1.0) for frame in enlarge(row[chosen], zoom)], dim=1) for row in rows]
    return to_bytes(torch.cat(pictures))


def pointmap_colours(points: Tensor, valid: Tensor) -> Tensor:  # [T, H, W, 3], [T, H, W] bool -> [T, H, W, 3] in [0, 1]
    """Show x, y, z as red, green, blue. Mid-grey is the first camera's centre; the range holds 98 % of the surfaces."""
    reach = points.abs().amax(-1)[valid].float()
    if len(reach) == 0:
        return torch.full_like(points, 0.5)
    some = reach[:: max(1, len(reach) // 100_000)]
    return ((points / torch.quantile(some, 0.98).clamp_min(1e-6) + 1) / 2).clamp(0, 1)


def enlarge(pictures: Tensor, zoom: int) -> Tensor:  # [T, H, W, 3] -> [T, zoom H, zoom W, 3]
    """Enlarge every pixel to a square: a smooth filter would hide what the model made."""
    return interpolate(pictures.movedim(-1, 1).float(), scale_factor=zoom, mode="nearest").movedim(1, -1)


def to_bytes(pictures: Tensor) -> Tensor:  # [..., 3] in [0, 1] -> [..., 3] uint8 on the CPU
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def distance_range(points: Tensor) -> tuple[float, float]:  # [T, H, W, 3]
    """Return the 2nd and 98th percentile of the distance from camera 0, without the sky."""
    distance = points.norm(dim=-1)[~is_sky(points)]
    if len(distance) == 0:
        return 0.01, 1.0
    some = distance.float()[:: max(1, len(distance) // 100_000)]
    near, far = torch.quantile(some, some.new_tensor([0.02, 0.98])).tolist()
    return max(near, 1e-3), max(far, near + 1e-3)


def distance_colours(points: Tensor, near: float, far: float) -> Tensor:  # [T, H, W, 3] -> [T, H, W, 3] in [0, 1]
    """Show log distance from camera 0 as colours, nearer = lighter; the sky is blue."""
    distance = points.norm(dim=-1).clamp(near, far)
    colours = near_to_far(torch.log(distance / near) / math.log(far / near))
    return torch.where(is_sky(points)[..., None], points.new_tensor(SKY_COLOUR), colours)


def near_to_far(position: Tensor) -> Tensor:  # [...], 0 = near, 1 = far -> [..., 3] in [0, 1]
    """Interpolate `DISTANCE_COLOURS`; positions beyond its ends get the end's colour."""
    table = position.new_tensor(DISTANCE_COLOURS)
    scaled = position.clamp(0, 1) * (len(table) - 1)
    low = scaled.floor().long().clamp(0, len(table) - 2)
    weight = (scaled - low)[..., None]
    return (1 - weight) * table[low] + weight * table[low + 1]
