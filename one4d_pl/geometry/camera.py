"""Pinhole cameras: lift, project, change of frame, and the resizing of frames and geometry maps.

OpenCV axes (x right, y down, z forward), pixel centres at +0.5, depth is z. Intrinsics have no
skew. Resizing covers the target with one scale for both axes (square pixels stay square), then
crops the centre at whole pixels. Frames and geometry maps follow the same `Placement`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from one4d_pl.geometry.se3 import rotate, split_se3


def pixel_grid(
    height: int,
    width: int,
    like: Tensor,  # gives dtype and device
) -> tuple[Tensor, Tensor]:  # u [H, W], v [H, W]
    """Return the coordinates of all pixel centres, in pixels: the top left one is (0.5, 0.5)."""
    u = torch.arange(width, dtype=like.dtype, device=like.device) + 0.5
    v = torch.arange(height, dtype=like.dtype, device=like.device) + 0.5
    return u.expand(height, width), v[:, None].expand(height, width)


def split_intrinsics(intrinsics: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [..., 3, 3] -> [..., 1, 1] each
    """Return fx, fy, cx, cy in pixels, shaped to broadcast over an image."""
    matrix = intrinsics[..., None, None]
    return matrix[..., 0, 0, :, :], matrix[..., 1, 1, :, :], matrix[..., 0, 2, :, :], matrix[..., 1, 2, :, :]


def camera_rays(
    height: int,
    width: int,
    intrinsics: Tensor,  # [..., 3, 3], pixels
) -> Tensor:  # [..., H, W, 3], camera frame
    """Return the direction K⁻¹ (u, v, 1) of every pixel centre, with z = 1 (not unit length)."""
    u, v = pixel_grid(height, width, intrinsics)  # [H, W] each
    fx, fy, cx, cy = split_intrinsics(intrinsics)  # [..., 1, 1] each
    x, y = (u - cx) / fx, (v - cy) / fy
    return torch.stack([x, y, torch.ones_like(x)], dim=-1)


def unproject(
    depth: Tensor,  # [..., H, W], z-depth
    intrinsics: Tensor,  # [..., 3, 3], pixels
) -> Tensor:  # [..., H, W, 3], camera frame, unit of depth
    """Lift a depth map to a camera-frame pointmap; where depth is not finite, neither is z."""
    return camera_rays(depth.shape[-2], depth.shape[-1], intrinsics) * depth[..., None]


def project(
    points: Tensor,  # [..., H, W, 3], camera frame; N loose points are [..., 1, N, 3]
    intrinsics: Tensor,  # [..., 3, 3], pixels
) -> tuple[Tensor, Tensor]:  # pixels [..., H, W, 2] as (u, v); depth [..., H, W]
    """Project camera-frame points to pixels and z-depth. The pixels are undefined where depth <= 0."""
    fx, fy, cx, cy = split_intrinsics(intrinsics)  # [..., 1, 1] each
    x, y, depth = points.unbind(-1)
    return torch.stack([fx * x / depth + cx, fy * y / depth + cy], dim=-1), depth


def to_world(
    points: Tensor,  # [..., H, W, 3], camera frame
    cam2world: Tensor,  # [..., 4, 4]
) -> Tensor:  # [..., H, W, 3], world frame
    """Take a pointmap from its camera's frame to the world."""
    rotation, centre = split_se3(cam2world[..., None, None, :, :])
    return rotate(rotation, points) + centre


def to_camera(
    points: Tensor,  # [..., H, W, 3], world frame
    cam2world: Tensor,  # [..., 4, 4]
) -> Tensor:  # [..., H, W, 3], camera frame
    """Take a pointmap from the world to a camera's frame; the inverse of `to_world`."""
    rotation, centre = split_se3(cam2world[..., None, None, :, :])
    return rotate(rotation.mT, points - centre)  # subtract first: exact for a camera far from the world's origin


def resize_intrinsics(
    intrinsics: Tensor,  # [..., 3, 3], pixels
    from_size: tuple[float, float],  # height, width
    to_size: tuple[float, float],  # height, width
) -> Tensor:  # [..., 3, 3], pixels of the resized image
    """Return the intrinsics of the image stretched from one size to another.

    With pixel centres at +0.5 there is no half-pixel shift.
    """
    factors = intrinsics.new_tensor([to_size[1] / from_size[1], to_size[0] / from_size[0], 1.0])
    return intrinsics * factors[:, None]


@dataclass(frozen=True)
class Placement:
    """Where a map lies on its image: (u, v) of the map shows ((u + left) / scale, (v + top) / scale) of the image."""

    scale: float  # map pixels per image pixel, the same for both axes
    top: float
    left: float


def resize_crop_plan(from_height: int, from_width: int, height: int, width: int) -> Placement:
    """Find the smallest scale that covers height x width, and the centre crop, at whole pixels.

    ValueError where a side is below one pixel.
    """
    if min(from_height, from_width, height, width) < 1:
        raise ValueError(f"cannot resize {from_height}x{from_width} to {height}x{width}: every side must be at least 1")
    scale = max(height / from_height, width / from_width)
    while int(from_height * scale) < height or int(from_width * scale) < width:
        scale = math.nextafter(scale, math.inf)  # 49 · (3 / 49) < 3 in floating point: one pixel would be lost
    return Placement(scale, (int(from_height * scale) - height) // 2, (int(from_width * scale) - width) // 2)


def resize_crop_intrinsics(
    intrinsics: Tensor,  # [..., 3, 3], pixels
    from_size: tuple[int, int],  # height, width
    to_size: tuple[int, int],  # height, width
) -> Tensor:  # [..., 3, 3], pixels of the new frames
    """Return the intrinsics of frames after `resize_frames`."""
    plan = resize_crop_plan(*from_size, *to_size)
    resized = resize_intrinsics(intrinsics, from_size, (from_size[0] * plan.scale, from_size[1] * plan.scale))
    resized[..., 0, 2] -= plan.left
    resized[..., 1, 2] -= plan.top
    return resized


def resize_frames(
    frames: Tensor,  # [T, H, W, 3] uint8
    height: int,
    width: int,
) -> Tensor:  # [T, height, width, 3] uint8
    """Scale the frames (bicubic, antialiased) to cover the target and crop the centre.

    ValueError unless the frames are uint8.
    """
    if frames.dtype != torch.uint8:
        raise ValueError(f"frames: {frames.dtype}, need uint8 (bicubic overshoot is cut only there)")
    plan = resize_crop_plan(frames.shape[1], frames.shape[2], height, width)
    resized = functional.interpolate(
        frames.permute(0, 3, 1, 2),  # a channels-last view: the fast uint8 kernel
        scale_factor=(plan.scale, plan.scale),  # not a size: rounding the cropped side would stretch it
        mode="bicubic",
        antialias=True,
    ).permute(0, 2, 3, 1)
    top, left = int(plan.top), int(plan.left)
    return resized[:, top : top + height, left : left + width].contiguous()


def resize_nearest_valid(
    maps: Tensor,  # [..., H, W] depth, valid or moving
    height: int,
    width: int,
) -> Tensor:  # [..., height, width], same dtype
    """Scale and crop maps as `resize_frames` does, each pixel from the nearest source pixel.

    Values are never mixed: a bilinear depth invents flying points at edges and spreads nan and inf.
    The price is that a depth was measured on a ray up to half a source pixel (per axis) off the ray
    of its target pixel: where depth has the gradient g per source pixel its error is at most
    |g_u| / 2 + |g_v| / 2, and zero on a fronto-parallel plane.
    """
    from_height, from_width = maps.shape[-2:]
    plan = resize_crop_plan(from_height, from_width, height, width)
    rows = (torch.arange(height, dtype=torch.float64, device=maps.device) + plan.top + 0.5) / plan.scale
    columns = (torch.arange(width, dtype=torch.float64, device=maps.device) + plan.left + 0.5) / plan.scale
    # the pixel around a point is also the one with the nearest centre
    nearest_row = rows.long().clamp(max=from_height - 1)
    nearest_column = columns.long().clamp(max=from_width - 1)
    return maps[..., nearest_row[:, None], nearest_column]
