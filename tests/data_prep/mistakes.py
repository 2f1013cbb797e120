"""Ways in which a dataset's files are read wrongly: each takes a sound clip to what the mistake makes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from one4d_pl.geometry.camera import camera_rays
from one4d_pl.geometry.se3 import invert_se3, matrix_to_xyzw, se3_matrix, split_se3, xyzw_to_matrix
from one4d_pl.types import Clip

OPENGL = torch.diag(torch.tensor([1.0, -1, -1, 1]))
BODY = torch.tensor([[0.0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])  # x forward, y right, z down


def part(clip: Clip, frames: Sequence[int], cameras: Sequence[int] | None = None) -> Clip:
    """Some frames of a clip, with their own cameras or those of other frames."""
    rows, other = list(frames), list(frames if cameras is None else cameras)
    moving = None if clip.moving is None else clip.moving[rows]
    return dataclasses.replace(
        clip, frames=clip.frames[rows], depth=clip.depth[rows], valid=clip.valid[rows], moving=moving,
        intrinsics=clip.intrinsics[rows], cam2world=clip.cam2world[other],
    )  # fmt: skip


def with_rolled_quaternions(clip: Clip, places: int) -> Clip:
    rotation, centre = split_se3(clip.cam2world)
    turned = xyzw_to_matrix(matrix_to_xyzw(rotation).roll(places, -1))
    return dataclasses.replace(clip, cam2world=se3_matrix(turned, centre))


def with_focal(clip: Clip, factor: float) -> Clip:
    intrinsics = clip.intrinsics.clone()
    intrinsics[:, 0, 0] *= factor
    intrinsics[:, 1, 1] *= factor
    return dataclasses.replace(clip, intrinsics=intrinsics)


def with_ray_length(clip: Clip) -> Clip:
    rays = camera_rays(*clip.depth.shape[1:], clip.intrinsics)
    return dataclasses.replace(clip, depth=clip.depth * rays.norm(dim=-1))


# by the reading that undoes it (data_prep.conventions.READINGS); a camera of the wrong frame needs frames to spare
MISTAKES: dict[str, Callable[[Clip], Clip]] = {
    "world-to-camera": lambda clip: dataclasses.replace(clip, cam2world=invert_se3(clip.cam2world)),
    "OpenGL axes": lambda clip: dataclasses.replace(clip, cam2world=clip.cam2world @ OPENGL),
    "body axes": lambda clip: dataclasses.replace(clip, cam2world=clip.cam2world @ BODY),
    "quaternions wxyz": lambda clip: with_rolled_quaternions(clip, 1),
    "quaternions xyzw": lambda clip: with_rolled_quaternions(clip, -1),
    "focal / 2": lambda clip: with_focal(clip, 2.0),
    "focal x 2": lambda clip: with_focal(clip, 0.5),
    "ray length": with_ray_length,
    "disparity": lambda clip: dataclasses.replace(clip, depth=1 / clip.depth),
}


def with_the_cameras_of_neighbours(clip: Clip, start: int, num_frames: int, stride: int = 1) -> dict[str, Clip]:
    """Frames whose cameras are those of the next or the previous frame, by the reading that undoes it."""
    frames = range(start, start + stride * num_frames, stride)
    shifted = {
        step: range(start + step * stride, start + step * stride + stride * num_frames, stride) for step in (1, -1)
    }
    return {"cameras early": part(clip, frames, shifted[1]), "cameras late": part(clip, frames, shifted[-1])}
