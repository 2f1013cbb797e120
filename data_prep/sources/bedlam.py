"""BEDLAM (Black et al., 2023): rendered sequences with depth -> clips at 6 frames per second.

A scene folder holds `png/<seq>/<seq>_%04d.png` (1280x720, 30 fps), `depth/<seq>/<seq>_%04d_depth.exr` (channel "Depth")
and `ground_truth/camera/<seq>_camera.csv`, whose rows are named after the images. Facts:
bedlam_render:unreal/render/unreal_coordinate_system.md @ 82d6c67, CUT3R:preprocess_bedlam.py,
pixelite1201/BEDLAM:data_processing/df_full_body.py @ 099ab0e.

- Unreal's axes are x forward, y right, z up, left-handed, cm: x_cv = y, y_cv = -z, z_cv = x.
- Rotation: yaw about the world's z (to the right), then pitch about the camera's y (up is positive: the first source
  calls -2.9 "down"), then roll about its x (clockwise).
- Intrinsics: focal_length / sensor_width * 1280; the renderer's axis passes through the middle of the image.
- Depth is planar z in centimetres, and exists for every fifth image only: frames are paired by their number, and a
  stride of 1 is one step of the depth.
- Depth that is not finite or beyond 200 m is sky; <= 0 is no measurement.
- Scenes named `...closeup...` are filmed by a camera lying on its side: the camera rows belong to the landscape
  picture, which is turned clockwise to stand upright. Pictures that are upright already stay as they are.
- HDRI scenes show a picture behind the people, whose depth is sky: a clip with less than 5 % of known depth is dropped.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_prep.sources.decoding import pinhole, read_csv, read_exr, read_frames, stack_alike
from data_prep.sources.tracks import Track, clip_key, find_units, holds
from one4d_pl.types import Clip

FPS = 30.0  # rate at which images are numbered
SKY_DEPTH = 200.0  # metres
MIN_KNOWN = 0.05  # share of pixels with depth, at least
LICENCE = "LicenseRef-BEDLAM-noncommercial"
CAMERA_COLUMNS = ("x", "y", "z", "yaw", "pitch", "roll", "focal_length", "sensor_width", "sensor_height")
CV_FROM_UNREAL = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]])
# The upright camera in the axes of the lying one: right in the landscape picture becomes down.
LYING_FROM_UPRIGHT = torch.tensor([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).double()
SCENE = {"png", "depth", "ground_truth"}
LAYOUT = "BEDLAM scene (png/, depth/ and ground_truth/)"


def list_units(root: Path) -> list[str]:
    """List the sequences at or below `root` as <scene>/png/<sequence>."""
    scenes = find_units(root, SCENE)
    folders = [folder for scene in scenes for folder in (root / scene / "png").iterdir() if folder.is_dir()]
    return sorted(folder.relative_to(root).as_posix() for folder in folders)


def has_unit(root: Path, unit: str) -> bool:
    """Tell whether there is a sequence of this name."""
    sequence = root / unit
    return sequence.is_dir() and sequence.parent.name == "png" and holds(sequence.parent.parent, SCENE)


def open_unit(root: Path, unit: str, stride: int) -> list[Track]:
    """Return a track of the sequence's frames with depth."""
    numbers = _depth_numbers(root / unit)
    step = min((b - a for a, b in itertools.pairwise(numbers)), default=1)  # 5 as published
    start = numbers[0] % step if numbers else 0

    def read(window: range) -> Clip:
        images = [start + n * step for n in window]
        return _read_clip(root / unit, images, clip_key(root, unit, f"{images[0]:04d}"), FPS / step / stride)

    return [Track(str(root / unit), [n // step for n in numbers if n % step == start], read)]


def camera_from_row(row: Mapping[str, float]) -> np.ndarray:  # [4, 4] float64, cam2world, OpenCV axes, metres
    """Convert one row of a camera csv (x y z in centimetres, yaw pitch roll in degrees)."""
    (cy, cp, cr), (sy, sp, sr) = (
        [f(math.radians(row[name])) for name in ("yaw", "pitch", "roll")] for f in (math.cos, math.sin)
    )
    # Columns are images of the axes in Unreal's left-handed world; comments say what turns where.
    yaw = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])  # x (forward) to y (right)
    pitch = np.array([[cp, 0, -sp], [0, 1, 0], [sp, 0, cp]])  # x (forward) to z (up)
    roll = np.array([[1, 0, 0], [0, cr, sr], [0, -sr, cr]])  # y (right) to -z (down)
    cam2world = np.eye(4)
    cam2world[:3, :3] = CV_FROM_UNREAL @ yaw @ pitch @ roll @ CV_FROM_UNREAL.T
    cam2world[:3, 3] = CV_FROM_UNREAL @ [row["x"] / 100, row["y"] / 100, row["z"] / 100]
    return cam2world


def _depth_numbers(sequence: Path) -> list[int]:
    """List the numbers of the images that have depth."""
    folder = sequence.parent.parent / "depth" / sequence.name
    pattern = re.compile(re.escape(sequence.name) + r"_(\d{4,6})_depth\.exr")
    return sorted({int(match[1]) for path in folder.iterdir() if (match := pattern.fullmatch(path.name))})


def _read_clip(sequence: Path, numbers: list[int], key: str, fps: float) -> Clip:
    scene, name = sequence.parent.parent, sequence.name
    frames = read_frames([sequence / f"{name}_{n:04d}.png" for n in numbers])
    depth_paths = [scene / "depth" / name / f"{name}_{n:04d}_depth.exr" for n in numbers]
    depth = stack_alike([read_exr(path.read_bytes(), str(path), "Depth") for path in depth_paths], depth_paths) / 100
    if depth.shape != frames.shape[:3]:
        raise ValueError(f"{depth_paths[0]}: depth is {depth.shape[1:]}, the image is {tuple(frames.shape[1:3])}")
    depth = np.where(~np.isfinite(depth) | (depth > SKY_DEPTH), np.inf, np.where(depth < 1e-3, np.nan, depth))
    if np.isfinite(depth).mean() < MIN_KNOWN:
        raise ValueError(f"{depth_paths[0]}: depth is known for {np.isfinite(depth).mean():.1%}: a painted background")
    rows = _camera_rows(scene / "ground_truth" / "camera" / f"{name}_camera.csv", name, numbers)
    cam2world = torch.from_numpy(np.stack([camera_from_row(row) for row in rows]))
    height, width = sorted(frames.shape[1:3])  # of the landscape sensor
    focal_x, focal_y = (
        np.array([row["focal_length"] / row[f"sensor_{side}"] * size for row in rows])
        for side, size in (("width", width), ("height", height))
    )
    centre = np.full(len(rows), width / 2), np.full(len(rows), height / 2)
    intrinsics = pinhole(focal_x, focal_y, *centre)
    geometry = torch.from_numpy(depth.astype(np.float32))
    if "closeup" in scene.absolute().name or "closeup" in scene.resolve().name:  # a link may have a name of its own
        frames, geometry, intrinsics, cam2world = _turn_upright(frames, geometry, intrinsics, cam2world)
    elif frames.shape[1] > frames.shape[2]:
        raise ValueError(f"{sequence}: portrait pictures, only close-ups have those")
    return Clip(
        key=key,
        frames=frames,
        depth=geometry,
        intrinsics=intrinsics,
        cam2world=cam2world.float(),
        valid=geometry.isfinite(),
        moving=None,
        caption="",
        source="bedlam",
        domain="synthetic",
        fps=fps,
        licence=LICENCE,
    )


def _turn_upright(
    frames: Tensor, depth: Tensor, intrinsics: Tensor, cam2world: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn pictures and geometry, cameras included, of a camera on its side clockwise by a quarter."""
    if frames.shape[2] > frames.shape[1]:
        frames, depth = frames.rot90(-1, (1, 2)).contiguous(), depth.rot90(-1, (1, 2)).contiguous()
    width = frames.shape[2]
    focal_x, focal_y = intrinsics[:, 0, 0].numpy(), intrinsics[:, 1, 1].numpy()
    centre_x, centre_y = intrinsics[:, 0, 2].numpy(), intrinsics[:, 1, 2].numpy()
    return frames, depth, pinhole(focal_y, focal_x, width - centre_y, centre_x), cam2world @ LYING_FROM_UPRIGHT


def _camera_rows(path: Path, name: str, numbers: list[int]) -> list[dict[str, float]]:
    rows = {row.get("name", ""): row for row in read_csv(path)}
    found = []
    for number in numbers:
        image = f"{name}_{number:04d}.png"
        if image not in rows:
            raise ValueError(f"{path}: no row for {image}")
        try:
            row = {column: float(rows[image][column]) for column in CAMERA_COLUMNS}
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: row of {image}: {error} is missing or no number") from error
        if not all(map(math.isfinite, row.values())) or min(row[column] for column in CAMERA_COLUMNS[6:]) <= 0:
            raise ValueError(f"{path}: row of {image}: need finite numbers and positive lengths")
        found.append(row)
    return found
