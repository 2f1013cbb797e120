"""Animations of scenes side by side: what was given, the frames that came out, and the scene in 3-D.

Time runs forwards and back while the view of the point cloud swings once, so that the end joins the
beginning. Frames are enlarged smoothly for the eye; the other files hold the pixels themselves.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from one4d_pl.geometry.camera import project, to_camera
from one4d_pl.geometry.pointmap import is_sky
from one4d_pl.geometry.se3 import se3_matrix, so3_exp
from one4d_pl.postopt.recover import RecoveredScene
from one4d_pl.scene.panels import near_to_far, to_bytes
from one4d_pl.scene.point_cloud import EDGES, camera_pyramids, draw_points, solid_pixels, static_pixels

PICTURES = 64
FPS = 16.0
GAP = 8  # pixels
STRIP = 24  # height of a line of text
SUPERSAMPLING = 2  # clouds are drawn this much larger and averaged
INK, PAPER, CARD = (40, 40, 46), (255, 255, 255), (241, 241, 244)
BACKGROUND = (30, 32, 40)  # of the clouds: far things are pale
SWING, PITCH = math.radians(22), math.radians(15)  # of the view
CAMERA_DEPTH = 0.16  # of a drawn pyramid, in median distances
OVERLAP = 1.6  # a point's edge over its pixel's footprint
STATIC_POINTS = 6000
FITTED_POINTS = 2000  # that decide the lens
FILLED = 0.94  # of a cell


@dataclass(frozen=True)
class Column:
    """One scene, and what it was made from."""

    title: str
    given: Tensor | str  # [T, H, W, 3] uint8; [1, H, W, 3] for a picture; or a prompt
    frames: Tensor  # [T, H, W, 3] uint8, that came out
    scene: RecoveredScene  # of the output pointmap


def animate(columns: list[Column], width: int) -> Tensor:  # [PICTURES, h, w, 3] uint8
    """Draw columns of `width` pixels: what was given, the frames, the point cloud with cameras."""
    height = round(width * columns[0].frames.shape[1] / columns[0].frames.shape[2])
    clouds = [_turning_cloud(column, height, width) for column in columns]
    rows = ("given, with the caption", "output frames", "output 4D scene: point cloud and cameras")
    size = (len(columns) * (width + GAP) + GAP, STRIP + len(rows) * (height + STRIP) + GAP)
    pictures = []
    for k in range(PICTURES):
        sheet = Image.new("RGB", size, PAPER)
        draw = ImageDraw.Draw(sheet)
        for row, label in enumerate(rows):
            _write(draw, (GAP, STRIP + row * (height + STRIP) + STRIP // 2), label, 13, "lm")
        for i, column in enumerate(columns):
            left = GAP + i * (width + GAP)
            _write(draw, (left + width // 2, STRIP // 2 + 2), column.title, 18, "mm")
            frame = _enlarged(_frame_at(column.frames, k), height, width)
            for row, cell in enumerate((_given_cell(column, k, height, width), frame, clouds[i][k])):
                sheet.paste(cell, (left, STRIP + row * (height + STRIP) + STRIP))
        pictures.append(torch.from_numpy(np.asarray(sheet).copy()))
    return torch.stack(pictures)


def time_at(picture: int, num_frames: int) -> int:
    """Return the frame that a picture shows, forwards and back, each twice where that fits."""
    rounds = max(1, PICTURES // (4 * max(1, num_frames - 1)))
    phase = picture * rounds / PICTURES % 1
    return round((num_frames - 1) * (1 - abs(1 - 2 * phase)))


def _frame_at(frames: Tensor, picture: int) -> Tensor:  # [T, H, W, 3] -> [H, W, 3]
    return frames[time_at(picture, len(frames))]


def _given_cell(column: Column, picture: int, height: int, width: int) -> Image.Image:
    if isinstance(column.given, Tensor):
        return _enlarged(_frame_at(column.given, picture), height, width)
    card = Image.new("RGB", (width, height), CARD)
    _write(ImageDraw.Draw(card), (width // 2, height // 2), textwrap.fill(column.given, 34), 16, "mm")
    return card


def _enlarged(frame: Tensor, height: int, width: int) -> Image.Image:  # [H, W, 3] uint8
    return Image.fromarray(frame.numpy()).resize((width, height), Image.Resampling.BICUBIC)


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, anchor: str) -> None:
    draw.multiline_text(at, text, fill=INK, font=ImageFont.load_default(size), anchor=anchor, align="center", spacing=6)


def _turning_cloud(column: Column, height: int, width: int) -> list[Image.Image]:
    """Draw the scene's points and cameras from a view that swings about them.

    Static points are drawn from all frames: one frame alone leaves holes behind near objects.
    """
    points, scene = column.scene.pointmap.double(), column.scene
    solid = solid_pixels(scene.pointmap, scene.depth)
    distance = float(points[solid].norm(dim=-1).median()) if bool(solid.any()) else 1.0
    size = (points.shape[1], points.shape[2], CAMERA_DEPTH * distance)
    pyramids = camera_pyramids(scene.intrinsics.double(), scene.cam2world, *size)
    frusta = pyramids[:, EDGES].unflatten(1, (8, 2))  # [T, 8, 2, 3], edges
    views = [_swinging_view(k / PICTURES, distance) for k in range(PICTURES)]
    lenses = _fitting_lenses(points[solid], pyramids.view(-1, 3), views, SUPERSAMPLING * height, SUPERSAMPLING * width)
    edge = scene.depth / scene.intrinsics[:, 0, 0, None, None] * OVERLAP
    surface = ~is_sky(scene.pointmap)
    static = solid & static_pixels(points, surface, solid, scene.depth, scene.intrinsics, scene.cam2world)
    static = static.flatten().nonzero()[:, 0]
    static = static[:: max(1, len(static) // STATIC_POINTS)]
    pictures = []
    for k, (view, intrinsics) in enumerate(zip(views, lenses, strict=True)):
        t = time_at(k, len(points))
        drawn = torch.cat([static, t * solid[0].numel() + solid[t].flatten().nonzero()[:, 0]])
        cloud = draw_points(
            points.view(-1, 3)[drawn], column.frames.reshape(-1, 3)[drawn], intrinsics, view,
            SUPERSAMPLING * height, SUPERSAMPLING * width, edge.flatten()[drawn], BACKGROUND,
        )  # fmt: skip
        image = Image.fromarray(cloud.numpy())
        _draw_cameras(ImageDraw.Draw(image), frusta, t, intrinsics, view)
        pictures.append(image.resize((width, height), Image.Resampling.BOX))
    return pictures


def _swinging_view(phase: float, distance: float) -> Tensor:  # cam2world [4, 4]
    """Look from behind and above the first camera, swinging about a point before the middle."""
    angle = 2 * math.pi * phase
    yaw = so3_exp(torch.tensor([0.0, SWING * math.sin(angle), 0.0], dtype=torch.float64))
    rotation = yaw @ so3_exp(torch.tensor([-PITCH, 0.0, 0.0], dtype=torch.float64))
    pivot = torch.tensor([0.0, 0.0, 0.8 * distance], dtype=torch.float64)
    return se3_matrix(rotation, pivot - 1.4 * distance * rotation[:, 2])


def _fitting_lenses(points: Tensor, cameras: Tensor, views: list[Tensor], height: int, width: int) -> list[Tensor]:
    """Return intrinsics [3, 3] for every view that centre the scene and all cameras in it.

    The outermost 1 % of the points on each side may be cut off. All views have one focal length, the longest that fits.
    """
    size, corners = torch.tensor([width, height], dtype=torch.float64), []
    points = points[:: max(1, len(points) // FITTED_POINTS)]
    for view in views:
        box = []
        for shown, outside in ((points, 0.01), (cameras, 0.0)):
            x, y, z = to_camera(shown, view).unbind(-1)
            seen = torch.stack([x, y], dim=-1)[z > 1e-3] / z[z > 1e-3, None]
            if len(seen):
                box.append(torch.quantile(seen, seen.new_tensor([outside, 1 - outside]), dim=0))
        low, high = torch.stack(box).unbind(1) if box else (-torch.ones(1, 2).double(), torch.ones(1, 2).double())
        corners.append(torch.stack([low.amin(0), high.amax(0)]))
    low, high = torch.stack(corners).unbind(1)  # [views, 2] each, x / z and y / z
    focal = float((FILLED * size / (high - low)).min())
    lenses = torch.diag(torch.tensor([focal, focal, 1.0], dtype=torch.float64)).repeat(len(views), 1, 1)
    lenses[:, :2, 2] = size / 2 - focal * (low + high) / 2
    return list(lenses)


def _draw_cameras(draw: ImageDraw.ImageDraw, frusta: Tensor, now: int, intrinsics: Tensor, view: Tensor) -> None:
    """Draw all cameras as thin pyramids coloured by time, the present one thick and bright."""
    bright = near_to_far(torch.linspace(0.1, 0.6, len(frusta)))  # [T, 3]
    dim = (bright + torch.tensor(BACKGROUND) / 255) / 2
    for t in [*(t for t in range(len(frusta)) if t != now), now]:
        pixels, depth = project(to_camera(frusta[t], view), intrinsics)
        for (a, b), z in zip(pixels.tolist(), depth.tolist(), strict=True):
            if min(z) > 1e-3:
                colour = tuple(to_bytes((bright if t == now else dim)[t]).tolist())
                draw.line([tuple(a), tuple(b)], fill=colour, width=3 * SUPERSAMPLING if t == now else SUPERSAMPLING)
