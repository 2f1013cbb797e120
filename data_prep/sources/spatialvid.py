"""SpatialVID(-HQ) (Wang et al., 2025): real videos with MegaSaM's cameras and depth -> clips.

The root holds `videos/group_%04d/<id>.mp4`, `annotations/group_%04d/<id>/` (poses.npy, intrinsics.npy, caption.json,
dyn_masks.npz, indexes.txt) and `depths/group_%04d/<id>.zip`. Facts: NJU-3DV/SpatialVID @ 5228326.

- Annotations are sub-sampled: row k of every array belongs to one video frame, which the second column of indexes.txt
  names [utils/pack_clip_assets.py:L30-34]; without that file it is frame k * int(0.2 * fps). A stride counts rows.
- poses.npy [N, 7]: tx ty tz qx qy qz qw, world to camera [L108-110].
- intrinsics.npy [N, 4]: fx / W, fy / H, 0.5, 0.5 [L59-72].
- Depth zip: one EXR per row, channel "Z", *inverse* depth; z = 1 / Z, cut to 1e-3 .. 100. At 100 it is sky or unknown,
  so not valid here [utils/read_depth.py]. The unit is arbitrary.
- One4D uses pseudo geometry instead: with `geometry`, a folder of generic clips `group_%04d/<id>` (or .npz) whose rows
  are the annotation's, or the video frames that an array `frame_numbers` [T] names. Its cameras are used; where it has
  depth but no cameras it is refused.
- dyn_masks.npz: what moves, one sparse (CSR) image of the video's size per row [utils/expand_npz.py].
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_prep.sources.decoding import (
    finite,
    pinhole,
    read_exr,
    read_npy,
    read_npz,
    read_video,
    read_zip,
    rigid_transforms,
    stack_alike,
    zip_names,
)
from data_prep.sources.generic import read_arrays
from data_prep.sources.geometry import Geometry, fit_to_frames
from data_prep.sources.tracks import Track, clip_key, files_once
from one4d_pl.data.frame_order import by_number
from one4d_pl.data.texts import caption_text
from one4d_pl.files import read_json
from one4d_pl.geometry.se3 import invert_se3
from one4d_pl.scene.media import frame_count, frame_rate
from one4d_pl.types import Clip

LICENCE = "CC-BY-NC-SA-4.0"
FARTHEST = 100.0  # of z; the dataset's own reader cuts there
CAPTION_FIELDS = ("SceneDescription", "CameraMotion")
LAYOUT = "SpatialVID video (videos/group_*/*.mp4)"


def list_units(root: Path) -> list[str]:
    """List the videos as group_%04d/<id>."""
    videos = files_once((root / "videos").glob("group_*/*.mp4"))
    return [f"{path.parent.name}/{path.stem}" for path in videos]


def has_unit(root: Path, unit: str) -> bool:
    """Tell whether there is a video of this name."""
    return (root / "videos" / f"{unit}.mp4").is_file()


def video_frames_of_rows(annotation: Path, fps: float, total: int) -> list[int]:
    """Return the video frame that each of `total` annotation rows belongs to."""
    path = annotation / "indexes.txt"
    if not path.is_file():
        return [k * max(1, int(0.2 * fps)) for k in range(total)]
    rows = [line.replace(",", " ").split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(rows) < total or not all(len(row) >= 2 and re.fullmatch(r"\d{1,7}", row[1]) for row in rows):
        raise ValueError(f"{path}: need {total} rows of two frame numbers")
    numbers = [int(row[1]) for row in rows[:total]]
    if numbers != sorted(set(numbers)):
        raise ValueError(f"{path}: the frame numbers do not ascend")
    return numbers


def read_cameras(
    annotation: Path,
    height: int,  # of the video
    width: int,
) -> tuple[Tensor, Tensor]:  # intrinsics [N, 3, 3] float32 in pixels, cam2world [N, 4, 4] float64
    """Read the annotation's own cameras, one per row."""
    rows = finite(read_npy(annotation / "poses.npy"), str(annotation / "poses.npy"), -1, 7)
    shares = finite(read_npy(annotation / "intrinsics.npy"), str(annotation / "intrinsics.npy"), len(rows), 4)
    if not (shares > 0).all():
        raise ValueError(f"{annotation / 'intrinsics.npy'}: not positive")
    world2cam = rigid_transforms(rows[:, 3:], rows[:, :3], str(annotation / "poses.npy"))
    return pinhole(*(shares * [width, height, width, height]).T), invert_se3(world2cam)


def open_unit(root: Path, unit: str, stride: int, pseudo: Path | None, min_confidence: float) -> list[Track]:
    """Return the video's only track; `pseudo` is a folder of pseudo geometry to use instead of the dataset's."""
    video, annotation = root / "videos" / f"{unit}.mp4", root / "annotations" / unit
    fps, length = frame_rate(video), frame_count(video)
    geometry: Geometry | None = None
    if pseudo is None:
        archive = root / "depths" / f"{unit}.zip"
        if not archive.is_file():
            raise ValueError(f"{archive}: no such file, need SpatialVID's depth or a folder of pseudo geometry")
        total = len(finite(read_npy(annotation / "poses.npy"), str(annotation / "poses.npy"), -1, 7))
        numbers = video_frames_of_rows(annotation, fps, total)
    else:
        path = pseudo / f"{unit}.npz" if (pseudo / f"{unit}.npz").is_file() else pseudo / unit
        arrays = read_arrays(path)
        geometry = Geometry.of_arrays(arrays, str(path), min_confidence)
        numbers = _numbers_of_pseudo(arrays, str(path), geometry.num_frames) or video_frames_of_rows(
            annotation, fps, geometry.num_frames
        )
    rows = [row for row, number in enumerate(numbers) if number < length]
    caption = _read_caption(annotation / "caption.json")
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1

    def read(window: range) -> Clip:
        frames = read_video(video, [numbers[row] for row in window])
        own = (
            _read_dataset_geometry(root, unit, window, *frames.shape[1:3]) if geometry is None else geometry.at(window)
        )
        moving = _read_moving(annotation / "dyn_masks.npz", window, *frames.shape[1:3]) if pseudo is None else None
        frames, fitted, _ = fit_to_frames(frames, own, None, str(video))
        if moving is not None and moving.shape != fitted.depth.shape:
            moving = None
        return Clip(
            key=clip_key(root, unit, f"{numbers[window[0]]:06d}"),
            frames=frames,
            **vars(fitted),
            moving=moving,
            caption=caption,
            source="spatialvid",
            domain="real",
            fps=fps / step / stride,
            licence=LICENCE,
        )

    return [Track(str(video), rows, read)]


def _numbers_of_pseudo(arrays: dict[str, np.ndarray], name: str, total: int) -> list[int]:
    if "frame_numbers" not in arrays:
        return []
    numbers = [int(n) for n in finite(arrays["frame_numbers"], f"{name}: frame_numbers", total)]
    if numbers != sorted(set(numbers)) or numbers[0] < 0:
        raise ValueError(f"{name}: frame_numbers do not ascend from 0")
    return numbers


def _read_dataset_geometry(root: Path, unit: str, window: range, height: int, width: int) -> Geometry:
    """Read the dataset's own depth, with cameras for it; `height` and `width` are the video's."""
    archive = root / "depths" / f"{unit}.zip"
    intrinsics, cam2world = read_cameras(root / "annotations" / unit, height, width)
    pictures = by_number((name for name in zip_names(archive) if name.lower().endswith(".exr")), str(archive))
    if len(pictures) != len(cam2world):
        raise ValueError(f"{archive}: {len(pictures)} pictures for {len(cam2world)} cameras")
    wanted = [pictures[row] for row in window]
    contents = read_zip(archive, wanted)
    inverse = stack_alike(
        [read_exr(contents[name], f"{archive}: {name!r}", "Z") for name in wanted], [archive] * len(wanted)
    )
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        depth = 1 / inverse
    depth = np.where((inverse > 0) & (depth < FARTHEST), np.maximum(depth, 1e-3), np.nan)
    known = torch.from_numpy(np.isfinite(depth))
    (h, w), rows = depth.shape[1:], list(window)
    if abs(h / w - height / width) > 0.02 * height / width:
        raise ValueError(f"{archive}: depth is {w}x{h}, the video {width}x{height}: another shape")
    scale = torch.tensor([w / width, h / height, 1.0])
    return Geometry(
        torch.from_numpy(depth.astype(np.float32)), intrinsics[rows] * scale[:, None], cam2world[rows].float(), known
    )


def _read_moving(path: Path, window: range, height: int, width: int) -> Tensor | None:  # [T, H, W] bool
    """Read what moves; None where the dataset does not say so for every frame."""
    if not path.is_file():
        return None
    names = [f"f_{row}_{part}" for row in window for part in ("indices", "indptr")]
    arrays = read_npz(path, ["shape", *names])
    if len(arrays) <= len(names) or arrays["shape"].tolist() != [height, width]:
        return None
    moving = np.zeros((len(window), height, width), bool)
    for t, row in enumerate(window):
        columns, ends = arrays[f"f_{row}_indices"], arrays[f"f_{row}_indptr"]
        counts = np.diff(ends) if ends.shape == (height + 1,) and ends.dtype.kind == "i" else np.array([-1])
        if columns.dtype.kind != "i" or columns.ndim != 1 or (counts < 0).any() or counts.sum() != len(columns):
            raise ValueError(f"{path}: frame {row} is no sparse picture of {width}x{height}")
        if len(columns) and not 0 <= columns.min() <= columns.max() < width:
            raise ValueError(f"{path}: frame {row} names columns outside the picture")
        moving[t, np.repeat(np.arange(height), counts), columns] = True
    return torch.from_numpy(moving)


def _read_caption(path: Path) -> str:
    """Read what describes the scene and the camera's motion; "" without a caption file or a caption in it."""
    if not path.is_file():
        return ""
    tree = read_json(path)
    fields = [tree.get(name) for name in CAPTION_FIELDS] if isinstance(tree, dict) else [tree]
    try:
        return " ".join(" ".join(caption_text(field).split()) for field in fields).strip()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
