"""Export a scene to point clouds, glTF, COLMAP, nerfstudio, TUM trajectories and 16-bit depth.

OUT/ply/         000000.ply ... and merged.ply: world points (OpenCV: x right, y down, z forward)
OUT/glb/         scene.glb: points and camera of every frame, played by its animation (`gltf`)
OUT/colmap/      images/, sparse/0 (binary) and text/: cameras, images, points3D (`colmap_files`)
OUT/nerfstudio/  images/, points.ply, transforms.json (cameras are OpenGL's: y up, z back; the world
                 stays OpenCV's)
OUT/tum/         trajectory.txt: t x y z qx qy qz qw, camera to world, t in seconds
OUT/depth16/     000000.png ... and depth.json, which states the scale; 0 = no surface

COLMAP and nerfstudio know no time: their cloud holds the points of all frames. Frames are numbered
anew, so that no name from a file becomes a name on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from one4d_pl.files import open_whole, whole_file, whole_folder, write_json, write_text
from one4d_pl.geometry.se3 import matrix_to_xyzw
from one4d_pl.scene.colmap_files import write_colmap
from one4d_pl.scene.folder import save_frames, save_ply
from one4d_pl.scene.gltf import glb_bytes
from one4d_pl.scene.point_cloud import camera_pyramids, frustum_depth, not_flying
from one4d_pl.scene.scene import Scene

POINT_LIMIT = 500_000  # points of a cloud of all frames; a frame's own .ply has every pixel
OPENGL = (1.0, -1.0, -1.0)  # OpenCV's camera axes in OpenGL's


@dataclass(frozen=True)
class Cloud:
    """Points of several frames, and the pixels that show them."""

    position: Tensor  # [N, 3] float32, world
    colour: Tensor  # [N, 3] uint8
    pixel: Tensor  # [N, 3] int64: frame, row, column


def export_scene(
    scene: Scene,
    out: Path,  # a new folder; it appears whole or not at all
    formats: tuple[str, ...],  # of FORMATS
    keep_flying_points: bool = False,  # at depth edges, see point_cloud.not_flying
    point_limit: int = POINT_LIMIT,  # evenly thinned to it
) -> None:
    """Write one folder per format; UserError where `out` cannot be written."""
    pixels = shown_pixels(scene, keep_flying_points)
    cloud = collect_points(scene, pixels, point_limit)
    with whole_folder(out) as staging:
        for name in formats:
            (staging / name).mkdir()
            FORMATS[name](scene, pixels, cloud, staging / name)


def shown_pixels(scene: Scene, keep_flying_points: bool) -> Tensor:  # [T, H, W] bool
    """Return the pixels whose points are exported: on a surface, by default no flying points."""
    valid = scene.valid & scene.pointmap.isfinite().all(-1)
    return valid if keep_flying_points else not_flying(valid, scene.depth)


def collect_points(
    scene: Scene,
    shown: Tensor,  # [T, H, W] bool
    limit: int,
) -> Cloud:
    """Collect the shown points of all frames in the order of their pixels, thinned to `limit`."""
    pixel = shown.nonzero()  # [N, 3]
    if len(pixel) > limit:
        pixel = pixel[torch.arange(limit) * len(pixel) // limit]
    t, row, column = pixel.unbind(-1)
    return Cloud(scene.pointmap[t, row, column], scene.frames[t, row, column], pixel)


def save_depth16(folder: Path, depth: Tensor, valid: Tensor) -> None:  # [T, H, W] x 2
    """Write depth as 16-bit png, depth = value * scale; 0 where there is no surface.

    Rounding is off by half a scale at most.
    """
    known = valid & depth.isfinite() & (depth > 0)
    farthest = float(depth[known].max()) if bool(known.any()) else 1.0
    scale = farthest / 65535
    values = torch.where(known, (depth.double() / scale).round().clamp(1, 65535), 0.0).numpy().astype(np.uint16)
    for i, value in enumerate(values):
        picture = Image.fromarray(value)
        with whole_file(folder / f"{i:06d}.png") as staging:
            picture.save(staging, format="png")
    metadata = {"depth": "value * scale, z in the frame's camera, unit of the scene", "scale": scale, "no_surface": 0}
    write_json(folder / "depth.json", metadata)


def _write_ply(scene: Scene, pixels: Tensor, cloud: Cloud, folder: Path) -> None:
    for i in range(scene.num_frames):
        save_ply(folder / f"{i:06d}.ply", scene.pointmap[i][pixels[i]], scene.frames[i][pixels[i]])
    save_ply(folder / "merged.ply", cloud.position, cloud.colour)


def _write_glb(scene: Scene, pixels: Tensor, cloud: Cloud, folder: Path) -> None:
    frame = cloud.pixel[:, 0]
    clouds = [(cloud.position[frame == i], cloud.colour[frame == i]) for i in range(scene.num_frames)]
    size = (*scene.frames.shape[1:3], frustum_depth(scene.depth, scene.valid))
    frusta = camera_pyramids(scene.intrinsics, scene.cam2world, *size).float()
    with open_whole(folder / "scene.glb") as file:
        file.write(glb_bytes(clouds, frusta, scene.fps))


def _write_colmap(scene: Scene, pixels: Tensor, cloud: Cloud, folder: Path) -> None:
    save_frames(folder / "images", scene.frames)
    write_colmap(folder, scene, cloud.position, cloud.colour, cloud.pixel)


def _write_nerfstudio(scene: Scene, pixels: Tensor, cloud: Cloud, folder: Path) -> None:
    save_frames(folder / "images", scene.frames)
    save_ply(folder / "points.ply", cloud.position, cloud.colour)
    height, width = scene.frames.shape[1:3]
    lenses = [
        {"fl_x": k[0][0], "fl_y": k[1][1], "cx": k[0][2], "cy": k[1][2], "w": width, "h": height}
        for k in scene.intrinsics.tolist()
    ]
    shared = lenses[0] if all(lens == lenses[0] for lens in lenses) else {}
    cameras = scene.cam2world * scene.cam2world.new_tensor([*OPENGL, 1.0])
    frames = [
        {"file_path": f"images/{i:06d}.png", "transform_matrix": camera} | ({} if shared else lenses[i])
        for i, camera in enumerate(cameras.tolist())
    ]
    transforms = {"camera_model": "OPENCV", **shared, "ply_file_path": "points.ply", "frames": frames}
    write_json(folder / "transforms.json", transforms)


def _write_tum(scene: Scene, pixels: Tensor, cloud: Cloud, folder: Path) -> None:
    rows = torch.cat([scene.cam2world[:, :3, 3], matrix_to_xyzw(scene.cam2world[:, :3, :3])], dim=1).tolist()
    lines = [" ".join(f"{number:.12g}" for number in [i / scene.fps, *row]) for i, row in enumerate(rows)]
    write_text(folder / "trajectory.txt", "# t x y z qx qy qz qw\n" + "\n".join(lines) + "\n")


FORMATS: dict[str, Callable[[Scene, Tensor, Cloud, Path], None]] = {
    "ply": _write_ply,
    "glb": _write_glb,
    "colmap": _write_colmap,
    "nerfstudio": _write_nerfstudio,
    "tum": _write_tum,
    "depth16": lambda scene, pixels, cloud, folder: save_depth16(folder, scene.depth, scene.valid),
}
