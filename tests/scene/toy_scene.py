"""A scene of the toy world with its exact geometry: what an ideal model would have made."""

from __future__ import annotations

from one4d_pl.geometry.pointmap import depth_to_pointmap
from one4d_pl.geometry.se3 import matrix_to_xyzw, rebase_to_first, se3_matrix, xyzw_to_matrix
from one4d_pl.scene.scene import Scene
from one4d_pl.toy.world import render_clip

SEED = 1_010_000


def exact_scene(num_frames: int = 5, height: int = 48, width: int = 64, seed: int = SEED) -> Scene:
    """The clip of `seed`; world = camera 0, sky where the depth is infinite, points there are not finite."""
    clip = render_clip(seed, num_frames, height, width)
    rotations = xyzw_to_matrix(matrix_to_xyzw(clip.cam2world[:, :3, :3].double()))  # to float64's last bit
    cam2world = rebase_to_first(se3_matrix(rotations, clip.cam2world[:, :3, 3].double()))
    intrinsics = clip.intrinsics.double()
    pointmap = depth_to_pointmap(clip.depth.double(), intrinsics, cam2world).float()
    depth = clip.depth.where(clip.valid, 0.0)
    return Scene(clip.frames, pointmap, clip.valid, depth, intrinsics, cam2world, clip.fps, clip.caption, (0,))
