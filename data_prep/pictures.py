"""Pictures of clips and of numbers, for reports; Pillow is enough to draw them."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from one4d_pl.geometry.se3 import rebase_to_first
from one4d_pl.types import Clip

TILE = (160, 90)  # width, height of one small picture
BAR = (360, 22)  # of one bar
COLUMNS = 3  # frames shown of a clip
NEAR, FAR = np.array([252, 246, 189]), np.array([40, 20, 90])  # colours of near and far depth
NOTHING = (120, 170, 220)  # no depth: sky or a hole


def draw_clips(clips: list[Clip], titles: list[str]) -> Image.Image:
    """Draw one row per clip: frames, depth (log, light = near), the camera's path from above."""
    width, height = TILE
    sheet = Image.new("RGB", ((2 * COLUMNS + 1) * width, len(clips) * (height + 14)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (clip, title) in enumerate(zip(clips, titles, strict=True)):
        top = row * (height + 14)
        draw.text((2, top + 1), f"{clip.key}: {title}", fill="black")
        chosen = torch.linspace(0, clip.num_frames - 1, COLUMNS).round().long().tolist()
        tiles = [Image.fromarray(clip.frames[t].numpy()) for t in chosen]
        tiles += [Image.fromarray(_depth_colours(clip.depth[t], clip.valid[t])) for t in chosen]
        for column, tile in enumerate(tiles):
            sheet.paste(tile.resize(TILE), (column * width, top + 14))
        sheet.paste(_camera_path(clip.cam2world), (2 * COLUMNS * width, top + 14))
    return sheet


def _depth_colours(depth: Tensor, valid: Tensor) -> np.ndarray:  # [H, W] -> [H, W, 3] uint8
    if not bool(valid.any()):
        return np.full((*depth.shape, 3), NOTHING, np.uint8)
    log_depth = depth.clamp_min(1e-9).log()
    some = log_depth[valid][:: max(1, int(valid.sum()) // 10_000)]
    low, high = torch.quantile(some, torch.tensor([0.02, 0.98])).tolist()
    share = ((log_depth - low) / max(high - low, 1e-6)).nan_to_num(1).clamp(0, 1).numpy()[..., None]
    colours = NEAR + share * (FAR - NEAR)
    return np.where(valid.numpy()[..., None], colours, NOTHING).astype(np.uint8)


def _camera_path(cam2world: Tensor) -> Image.Image:  # [T, 4, 4]
    """Draw the camera's path from above (right and forward of camera 0), to fit; red = the end."""
    width, height = TILE
    tile = Image.new("RGB", TILE, (245, 245, 245))
    path = rebase_to_first(cam2world.double())[:, [0, 2], 3]  # [T, 2]
    extent = float((path.amax(0) - path.amin(0)).amax())
    middle = (path.amax(0) + path.amin(0)) / 2
    scale = 0.8 * height / extent if extent > 0 and math.isfinite(extent) else 0.0
    spots = [(width / 2 + x * scale, height / 2 - z * scale) for x, z in (path - middle).tolist()]
    draw = ImageDraw.Draw(tile)
    draw.line(spots, fill="black")
    (x, y) = spots[-1]
    draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill="red")
    return tile


def draw_bars(panels: dict[str, dict[str, float]]) -> Image.Image:
    """Draw a panel of named bars per entry, each panel scaled to its largest value."""
    width, line = BAR
    rows = sum(len(values) + 1 for values in panels.values())
    sheet = Image.new("RGB", (2 * width, rows * line + 4), "white")
    draw = ImageDraw.Draw(sheet)
    top = 2
    for title, values in panels.items():
        draw.text((4, top + 4), title, fill="black")
        top += line
        largest = max((abs(value) for value in values.values() if math.isfinite(value)), default=0) or 1.0
        for name, value in values.items():
            length = abs(value) / largest * (width - 70) if math.isfinite(value) else 0
            draw.text((16, top + 4), name[:50], fill="black")
            draw.rectangle((width, top + 4, width + length, top + line - 4), fill=(70, 110, 170))
            draw.text((width + length + 4, top + 4), f"{value:.4g}", fill="black")
            top += line
    return sheet
