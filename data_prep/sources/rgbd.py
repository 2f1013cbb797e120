"""RGB-D folders in TUM's or Bonn's layout -> clips.

The formats are described in one4d_pl.data.rgbd_folder.
- Images are paired with depth maps and cameras by time. A clip never crosses a break in the image
  times: a gap of more than 1.5 usual intervals starts a new track.
- Lens distortion (TUM's freiburg1 and 2) is left in the images.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from data_prep.sources.decoding import read_frames, stack_alike
from data_prep.sources.tracks import Track, clip_key, find_units, holds
from one4d_pl.data.rgbd_folder import INTRINSICS, RGBDFrame, RGBDSequence, open_sequence
from one4d_pl.types import Clip

LICENCES = {"tum": "CC-BY-4.0", "bonn": "LicenseRef-Bonn-RGB-D-Dynamic"}
LONGEST_INTERVAL = 1.5  # times the median one


MEMBERS = {"rgb", "depth", "groundtruth.txt"}
LAYOUT = f"RGB-D sequence (rgb/, depth/ and groundtruth.txt in a folder named ...{'..., ...'.join(INTRINSICS)}...)"


def list_units(root: Path) -> list[str]:
    """List the sequence folders at or below `root`, relative to it."""
    return find_units(root, MEMBERS)


def has_unit(root: Path, unit: str) -> bool:
    """Tell whether there is a unit of this name."""
    return holds(root / unit, MEMBERS)


def open_unit(root: Path, unit: str, stride: int) -> list[Track]:
    """Return a track for each run of the sequence without a break in time."""
    sequence = open_sequence(root / unit)
    frames = [frame for frame in sequence.frames if frame.present]
    if len(frames) < 2:
        raise ValueError(f"{root / unit}: {len(frames)} frames with image, depth and camera")
    usual = statistics.median(b.timestamp - a.timestamp for a, b in itertools.pairwise(frames))
    if usual <= 0:
        raise ValueError(f"{root / unit}: the images' timestamps do not ascend")

    def read(window: range) -> Clip:
        chosen = [frames[n] for n in window]
        key = clip_key(root, unit, f"{chosen[0].timestamp:.4f}".replace(".", "_"))
        return _read_clip(sequence, chosen, key, 1 / usual / stride)

    return [Track(str(root / unit), numbers, read) for numbers in _runs(frames, LONGEST_INTERVAL * usual)]


def _runs(frames: Sequence[RGBDFrame], longest: float) -> list[list[int]]:
    """List runs of frame indices without a break in time."""
    runs = [[0]]
    for n, (before, after) in enumerate(itertools.pairwise(frames), start=1):
        if after.timestamp - before.timestamp > longest:
            runs.append([])
        runs[-1].append(n)
    return runs


def _read_clip(sequence: RGBDSequence, frames: Sequence[RGBDFrame], key: str, fps: float) -> Clip:
    depth_paths = [frame.depth_path for frame in frames]
    images = read_frames([frame.rgb_path for frame in frames])
    depth = torch.from_numpy(stack_alike([frame.read_depth().numpy() for frame in frames], depth_paths))
    if depth.shape != images.shape[:3]:
        raise ValueError(f"{depth_paths[0]}: depth is {tuple(depth.shape[1:])}, the image {tuple(images.shape[1:3])}")
    return Clip(
        key=key,
        frames=images,
        depth=depth,
        intrinsics=sequence.intrinsics.expand(len(frames), 3, 3).clone(),
        cam2world=torch.stack([frame.cam2world for frame in frames]).float(),
        valid=depth.isfinite(),
        moving=None,
        caption="",
        source="rgbd",
        domain="real",
        fps=fps,
        licence=LICENCES[sequence.layout],
    )
