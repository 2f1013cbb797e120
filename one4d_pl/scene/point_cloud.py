"""Coloured points of a scene: which pixels are surfaces, and pictures of them from any view."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from one4d_pl.geometry.camera import project, to_camera
from one4d_pl.geometry.pointmap import is_sky
from one4d_pl.geometry.se3 import se3_matrix, so3_exp
from one4d_pl.postopt.recover import RecoveredScene

FLYING = 0.15  # of the disparity: where it bends by more, a pixel lies between two surfaces
EDGES = (0, 1, 0, 2, 0, 3, 0, 4, 1, 2, 2, 3, 3, 4, 4, 1)  # of the five points of a camera's pyramid
SWING = math.radians(25)  # of the turntable's camera to either side
SEEN_THROUGH = 0.1  # of the distance: a surface this much behind a point shows that the point is not there
PROBES = 8  # frames, evenly spaced, that a point is compared with
STEP_BACK = 0.15  # of the distance to the scene's middle, so that its borders are in view


def solid_pixels(
    pointmap: Tensor,  # [T, H, W, 3], normalised
    depth: Tensor,  # [T, H, W], z in each frame's own camera; not finite or 0 = unknown
) -> Tensor:  # [T, H, W] bool
    """Tell which pixels show a surface: neither sky nor flying points (`not_flying`)."""
    return not_flying(~is_sky(pointmap), depth)


def not_flying(
    valid: Tensor,  # [T, H, W] bool, on a surface
    depth: Tensor,  # [T, H, W], z in each frame's own camera; not finite or 0 = unknown
) -> Tensor:  # [T, H, W] bool
    """Return the valid pixels of known depth except flying points, which lie between two surfaces.

    Disparity is linear along every plane, however slanted, so where it bends by more than `FLYING` there is an edge.
    """
    known = valid & depth.isfinite() & (depth > 0)
    disparity = torch.where(known, 1 / depth.clamp_min(1e-6), 0.0)
    flat = torch.nn.functional.pad(disparity[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    here = flat[:, 1:-1, 1:-1]
    bend_u = (flat[:, 1:-1, 2:] + flat[:, 1:-1, :-2] - 2 * here).abs()
    bend_v = (flat[:, 2:, 1:-1] + flat[:, :-2, 1:-1] - 2 * here).abs()
    return known & (torch.maximum(bend_u, bend_v) <= FLYING * here)


def static_pixels(
    points: Tensor,  # [T, h, w, 3], world; any subset of the pixels
    valid: Tensor,  # [T, H, W] bool, on a surface; the rest is sky
    solid: Tensor,  # [T, H, W] bool, and no flying point
    depth: Tensor,  # [T, H, W], z in each frame's own camera
    intrinsics: Tensor,  # [T, 3, 3], pixels of depth
    cam2world: Tensor,  # [T, 4, 4]
) -> Tensor:  # [T, h, w] bool
    """Tell which points are static as far as can be seen.

    None of `PROBES` frames sees something behind them. A frame that hides a point, or does not
    contain it, does not contradict it.
    """
    height, width = depth.shape[1:]
    surface = torch.where(valid, depth, torch.inf).where(solid | ~valid, 0.0)  # 0 = nothing is known
    static = torch.ones(points.shape[:3], dtype=torch.bool)
    for probe in torch.linspace(0, len(depth) - 1, min(PROBES, len(depth))).round().long().tolist():
        local = to_camera(points, cam2world[probe].to(points))
        pixels, z = project(local, intrinsics[probe].to(points))
        column, row = pixels.nan_to_num(-1.0, -1.0, -1.0).clamp(-1, max(height, width)).floor().long().unbind(-1)
        inside = (z > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        behind = surface[probe][row.clamp(0, height - 1), column.clamp(0, width - 1)]
        static &= ~(inside & (behind > (1 + SEEN_THROUGH) * z))
    return static


def frustum_depth(depth: Tensor, valid: Tensor) -> float:  # [T, H, W] x 2
    """Return the depth of a drawn camera, in the depth's unit: a tenth of the median depth."""
    seen = depth[valid & depth.isfinite() & (depth > 0)]
    return 0.1 * float(seen[:: max(1, len(seen) // 100_000)].median()) if len(seen) else 0.1


def camera_pyramids(
    intrinsics: Tensor,  # [T, 3, 3] float64, pixels
    cam2world: Tensor,  # [T, 4, 4] float64
    height: int,  # of the cameras' pictures
    width: int,
    depth: float,  # of the pictures, ahead of the centres
) -> Tensor:  # [T, 5, 3] float64, world
    """Return each camera as a pyramid: centre, then image corners clockwise from the top left."""
    corners = torch.tensor([[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]], dtype=torch.float64)
    rays = corners @ torch.linalg.inv(intrinsics).mT * depth  # [T, 4, 3]
    centres = cam2world[:, None, :3, 3]  # [T, 1, 3]
    return torch.cat([centres, rays @ cam2world[:, :3, :3].mT + centres], dim=1)


def draw_points(
    points: Tensor,  # [N, 3], world
    colours: Tensor,  # [N, 3] uint8
    intrinsics: Tensor,  # [3, 3], pixels of the picture
    cam2world: Tensor,  # [4, 4]
    height: int,
    width: int,
    size: Tensor,  # [N], edge of each point's square, world units
    background: tuple[int, int, int] = (255, 255, 255),
) -> Tensor:  # [H, W, 3] uint8
    """Draw a point cloud: each point is a square that faces the camera, nearer ones in front."""
    local = (points - cam2world[:3, 3]) @ cam2world[:3, :3]
    picture = np.full((height, width, 3), background, np.uint8)
    x, y, z = local.double().numpy().T
    ahead = np.flatnonzero(z > 1e-3)
    ahead = ahead[np.argsort(-z[ahead])]  # far to near: the last one drawn stays
    focal, shift = intrinsics[0, 0].item(), intrinsics[:2, 2].tolist()
    half = 0.5 * focal * size.double().numpy()[ahead] / z[ahead]
    u, v = focal * x[ahead] / z[ahead] + shift[0], focal * y[ahead] / z[ahead] + shift[1]
    # Clip both sides to the picture: a negative end of a slice would count from the far side.
    left, right = (np.clip(u + side, 0, width).astype(int) for side in (-half, half + 1))
    top, bottom = (np.clip(v + side, 0, height).astype(int) for side in (-half, half + 1))
    for i, colour in enumerate(colours.numpy()[ahead]):
        picture[top[i] : bottom[i], left[i] : right[i]] = colour
    return torch.from_numpy(picture)


def turntable(
    scene: RecoveredScene,
    frames: Tensor,  # [T, H, W, 3] uint8
    height: int,
    width: int,
    turns: int = 48,
) -> Tensor:  # [turns, height, width, 3] uint8
    """Draw the scene from a camera that swings about its middle while time runs there and back."""
    pointmap, num_frames = scene.pointmap, len(frames)
    solid = solid_pixels(pointmap, scene.depth)
    shown = solid[0] if bool(solid[0].any()) else torch.ones_like(solid[0])
    middle = pointmap[0][shown].double().median(0).values * torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    intrinsics = scene.intrinsics[0].double() * height / pointmap.shape[1]
    intrinsics[:2, 2] = torch.tensor([width / 2, height / 2])
    pictures = []
    for k in range(turns):
        phase = 2 * math.pi * k / turns
        rotation = so3_exp(torch.tensor([0.3 * SWING * math.cos(phase), SWING * math.sin(phase), 0.0]).double())
        cam2world = se3_matrix(rotation, middle - (1 + STEP_BACK) * rotation @ middle)
        t = round((num_frames - 1) * (1 - abs(1 - 2 * k / turns)))
        size = scene.depth[t] / scene.intrinsics[t, 0, 0] * 1.6  # a pixel's footprint, a little overlapping
        keep = solid[t]
        pictures.append(
            draw_points(pointmap[t][keep].double(), frames[t][keep], intrinsics, cam2world, height, width, size[keep])
        )
    return torch.stack(pictures)
