"""Clips of the real slices in ../shared/data that are more than one call to read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from data_prep.sources import registry
from data_prep.sources.decoding import read_video
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
