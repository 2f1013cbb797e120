"""Clips of the real slices in ../shared/data that are more than one call to read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_prep.sources import registry
from data_prep.sources.decoding import read_video
from one4d_pl.geometry.camera import project, to_camera, to_world, unproject
from one4d_pl.types import Clip

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


def pointodyssey_clip(root: Path) -> Clip:
    """37 frames of PointOdyssey's content, laid into `root` in the generic layout and read from there."""
    folder, clip_folder = REAL / "pointodyssey_repackaged", root / "odyssey"
    clip_folder.mkdir()
    with np.load(folder / "deps.npz") as depths, np.load(folder / "intris.npz") as cameras:
        np.save(clip_folder / "depth.npy", depths["deps"][:, 0])
        np.save(clip_folder / "intrinsics.npy", cameras["intris"][0])
        np.save(clip_folder / "cam2world.npy", np.linalg.inv(cameras["extris"][0].astype(np.float64)))
    np.save(clip_folder / "frames.npy", read_video(folder / "rgb.mp4", range(40)).numpy())
    (clip_folder / "clip.json").write_text(json.dumps({"fps": 24, "licence": "CC-BY-NC-SA-4.0", "domain": "synthetic"}))
    (clip,) = registry.iter_clips("generic", root, 37)
    return clip


def moved_points(clip: Clip, intrinsics: Tensor, i: int, j: int) -> tuple[Tensor, Tensor]:  # [H, W, 3], [H, W, 2]
    """Frame i's points, moved by the cameras into frame j, and the pixels there that they fall on; nan = invalid."""
    points = unproject(clip.depth[i].double().where(clip.valid[i], torch.nan), intrinsics[i].double())
    moved = to_camera(to_world(points, clip.cam2world[i].double()), clip.cam2world[j].double())
    return moved, project(moved, intrinsics[j].double())[0]


def median_error(clip: Clip, i: int, j: int) -> float:
    """Median distance of frame i's points to frame j's at the pixels they fall on, where both are measured.

    What moves hides in the other half.
    """
    height, width = clip.depth.shape[1:]
    moved, pixels = moved_points(clip, clip.intrinsics, i, j)
    u, v = pixels.nan_to_num(-1).floor().long().unbind(-1)
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height) & (moved[..., 2] > 0)
    target = unproject(clip.depth[j].double().where(clip.valid[j], torch.nan), clip.intrinsics[j].double())
    return float((target[v[inside], u[inside]] - moved[inside]).norm(dim=-1).nanmedian())
