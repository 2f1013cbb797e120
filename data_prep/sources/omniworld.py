"""OmniWorld-Game (Zhou et al., 2025): extracted scene folders -> clips, at 1280x720 and 24 fps.

A scene folder holds `color/%06d.png`, `depth/%06d.png` (16 bit), `split_info.json` ("split": lists of frame numbers)
and, for split k, `camera/split_<k>.json` (focals, cx, cy, quats, trans; one row per frame of the split), and may hold
`text/<start>_<end>.json` (captions), `fps.txt`. Facts: yangzhou24/OmniWorld README, scripts/utils.py @ 5942b87.

- Cameras: world to camera, OpenCV axes, quaternions wxyz [utils.py:L41-77]. Each split has a world of its own.
- Intrinsics: one focal length for both axes; the dataset's tools put pixel centres at +0.5 [L100-111], as we do.
- Depth: d = code / 65535, z = d / (1000 - 999 d) / 0.004; d < 0.0015 is too near to be known, code > 65500 is sky
  [L80-98]. The unit differs from scene to scene; MotionCrafter divides by 0.04 with the note "verify".
- Frame numbers of a split may have gaps: a clip never crosses one.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.sources.decoding import (
    json_numbers,
    pinhole,
    read_depth_codes,
    read_frames,
    rigid_transforms,
    stack_alike,
)
from data_prep.sources.tracks import Track, clip_key, find_units, holds
from one4d_pl.data.texts import caption_text
from one4d_pl.files import read_json
from one4d_pl.geometry.se3 import invert_se3
from one4d_pl.types import Clip

FPS = 24.0
LICENCE = "CC-BY-NC-SA-4.0"
NEAREST = 0.0015  # of d; a smaller one is too near
LAST_CODE = 65500  # a larger one is sky


MEMBERS = {"color", "depth", "camera", "split_info.json"}
LAYOUT = "OmniWorld-Game scene (color/, depth/, camera/ and split_info.json)"


def list_units(root: Path) -> list[str]:
    """List the scene folders at or below `root`, relative to it."""
    return find_units(root, MEMBERS)


def has_unit(root: Path, unit: str) -> bool:
    """Tell whether there is a unit of this name."""
    return holds(root / unit, MEMBERS)


def open_unit(root: Path, unit: str, stride: int) -> list[Track]:
    """Return a track for each split of the scene."""
    return [_split_track(root, unit, k, numbers, stride) for k, numbers in enumerate(_read_splits(root / unit))]


def depth_from_codes(codes: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return z in the scene's unit; +inf = sky, nan = too near."""
    d = codes.astype(np.float64) / 65535
    depth = d / (1000 - 999 * d) / 0.004
    return np.where(codes > LAST_CODE, np.inf, np.where(d < NEAREST, np.nan, depth)).astype(np.float32)


def _read_splits(scene: Path) -> list[list[int]]:
    path = scene / "split_info.json"
    tree = read_json(path)
    splits = tree.get("split") if isinstance(tree, dict) else None
    if not isinstance(splits, list) or not all(isinstance(s, list) and all(type(n) is int for n in s) for s in splits):
        raise ValueError(f"{path}: 'split' is no list of lists of frame numbers")
    if any(s != sorted(set(s)) or (s and not 0 <= s[0] <= s[-1] <= 999_999) for s in splits):
        raise ValueError(f"{path}: the frame numbers of a split are not ascending numbers of six digits")
    return splits


def _split_track(root: Path, unit: str, k: int, numbers: list[int], stride: int) -> Track:
    scene = root / unit
    captions = _captions(scene / "text")

    def read(window: range) -> Clip:
        path = scene / "camera" / f"split_{k}.json"
        tree = read_json(path)
        if not isinstance(tree, dict):
            raise ValueError(f"{path}: no json object")
        total = len(numbers)
        rows = [numbers.index(n) for n in window]
        focals = json_numbers(tree, "focals", path, total)[rows]
        centre = [float(json_numbers(tree, name, path)) for name in ("cx", "cy")]
        quats = json_numbers(tree, "quats", path, total, 4)[rows]
        world2cam = rigid_transforms(
            quats[:, [1, 2, 3, 0]], json_numbers(tree, "trans", path, total, 3)[rows], str(path)
        )
        depth_paths = [scene / "depth" / f"{n:06d}.png" for n in window]
        depth = depth_from_codes(stack_alike([read_depth_codes(p) for p in depth_paths], depth_paths))
        return Clip(
            key=clip_key(root, unit, f"{k}-{window[0]:06d}"),
            frames=read_frames([scene / "color" / f"{n:06d}.png" for n in window]),
            depth=torch.from_numpy(depth),
            intrinsics=pinhole(focals, focals, *(np.full(len(rows), c) for c in centre)),
            cam2world=invert_se3(world2cam).float(),
            valid=torch.from_numpy(np.isfinite(depth)),
            moving=None,
            caption=_caption_of(captions, window),
            source="omniworld",
            domain="synthetic",
            fps=_read_fps(scene / "fps.txt") / stride,
            licence=LICENCE,
        )

    return Track(f"{scene} split {k}", numbers, read)


def _read_fps(path: Path) -> float:
    """Read the scene's own frame rate, or return the dataset's."""
    if not path.is_file():
        return FPS
    try:
        fps = float(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: no frame rate ({error})") from error
    if not 1 <= fps <= 1000:
        raise ValueError(f"{path}: {fps} frames per second")
    return fps


def _captions(folder: Path) -> list[tuple[int, int, Path]]:
    """List the first and last frame and the file of each caption."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    matches = [(re.fullmatch(r"(\d{1,6})_(\d{1,6})\.json", path.name), path) for path in paths]
    return [(int(match[1]), int(match[2]), path) for match, path in matches if match]


def _caption_of(captions: list[tuple[int, int, Path]], window: range) -> str:
    """Return the caption that shares the most frames with the window; "" where none does."""
    overlaps = [(min(last, window[-1]) - max(first, window[0]), path) for first, last, path in captions]
    if not overlaps or max(overlaps)[0] < 0:
        return ""
    path = max(overlaps)[1]
    tree = read_json(path)
    texts = [tree]
    if isinstance(tree, dict):  # the summary, or all that is text
        texts = [tree["Video_Caption"]] if "Video_Caption" in tree else [t for t in tree.values() if isinstance(t, str)]
    try:
        return " ".join(" ".join(caption_text(text).split()) for text in texts).strip()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
