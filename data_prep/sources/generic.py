"""Clips of any origin, one folder or one .npz each, so that any labeler's output can become shards.

A clip is `<name>.npz`, or a folder `<name>/` that holds `clip.json`. A folder's arrays are
`<array>.npy`, and it may hold `frames/` (png or jpg, in the order of their numbers) or `frames.mp4`
(or .m4v, .mov, .mkv, .webm, .avi) instead of frames.npy. Pictures and videos are turned as the file
says (EXIF, display matrix), as most labelers see them. With T frames:

    frames      [T, H, W, 3]  uint8, sRGB
    depth       [T, h, w]     z in the camera, any unit; not finite or <= 0 = no measurement, +inf = sky
    pointmaps   [T, h, w, 3]  instead of depth: points in one world; not finite = no point
    intrinsics  [T, 3, 3] or [3, 3]  pixels of h x w, pixel centres at +0.5 (add 0.5 to cx, cy of
                              integer centres)
    cam2world   [T, 4, 4]     OpenCV axes, unit of the geometry
    confidence  [T, h, w]     optional, larger = better; `min_confidence` makes the rest invalid
    valid       [T, h, w]     optional, bool
    moving      [T, h, w]     optional, bool

intrinsics and cam2world may both be left out where there are pointmaps: they are then solved for (One4D, Eq. 11-12).
`clip.json`, or text arrays of one value in the npz: fps, licence (both needed), domain ("real"), caption (""). null and
NaN mean that there is none (see `data.texts`). Where h x w is smaller than H x W, the geometry is taken to cover the
largest centred part of the frame that has its aspect ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_prep.sources.decoding import read_frames, read_npy, read_npz, read_video
from data_prep.sources.geometry import Geometry, fit_to_frames
from data_prep.sources.tracks import Track, clip_key, files_once, walk_once
from one4d_pl.data.frame_order import numbered_files
from one4d_pl.data.texts import caption_text, is_missing, licence_text
from one4d_pl.files import read_json
from one4d_pl.scene.media import frame_count
from one4d_pl.types import DOMAINS, Clip

ARRAYS = ("frames", "frame_numbers", "depth", "pointmaps", "intrinsics", "cam2world", "confidence", "valid", "moving")
TEXTS = ("fps", "licence", "domain", "caption")
IMAGES = (".png", ".jpg", ".jpeg")
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
LAYOUT = "generic clip (<name>/clip.json or <name>.npz)"


def list_units(root: Path) -> list[str]:
    """List the clips at or below `root`, relative to it."""
    found, archives = [], []
    for folder, folders, files in walk_once(root):
        if "clip.json" in files:
            found.append(folder)
            folders.clear()
        else:
            archives += [folder / name for name in files if name.endswith(".npz")]
    return sorted(path.relative_to(root).as_posix() for path in [*found, *files_once(archives)])


def has_unit(root: Path, unit: str) -> bool:
    """Tell whether there is a clip of this name."""
    return (root / unit / "clip.json").is_file() or (unit.endswith(".npz") and (root / unit).is_file())


def open_unit(root: Path, unit: str, stride: int, min_confidence: float) -> list[Track]:
    """Return the folder's or npz's only track."""
    path = root / unit
    named = unit.removesuffix(".npz")
    return track_of("generic", root, named, path, read_arrays(path), _read_texts(path), stride, min_confidence)


def track_of(
    source: str,
    root: Path,
    unit: str,  # for the keys
    path: Path,  # for errors, and of the frames where the arrays have none
    arrays: dict[str, np.ndarray],  # by the names in the module's docstring
    texts: Texts,
    stride: int,
    min_confidence: float,
) -> list[Track]:
    """Return the only track of a clip whose arrays are read; ValueError names what is missing or wrong."""
    geometry = Geometry.of_arrays(arrays, str(path), min_confidence)
    moving = arrays.get("moving")
    if moving is not None and (moving.dtype != bool or moving.shape != geometry.depth.shape):
        raise ValueError(f"{path}: moving is {moving.dtype} {moving.shape}, need bool {tuple(geometry.depth.shape)}")

    def read(window: range) -> Clip:
        frames = _read_frames(path, arrays, window, geometry.num_frames)
        part = None if moving is None else torch.from_numpy(moving[list(window)])
        frames, fitted, part = fit_to_frames(frames, geometry.at(window), part, str(path))
        return Clip(
            key=clip_key(root, unit, f"{window[0]:05d}"),
            frames=frames,
            **vars(fitted),
            moving=part,
            caption=texts.caption,
            source=source,
            domain=texts.domain,
            fps=texts.fps / stride,
            licence=texts.licence,
        )

    return [Track(str(path), list(range(geometry.num_frames)), read)]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a clip, by the names in the module's docstring."""
    if path.suffix == ".npz":
        return read_npz(path, ARRAYS)
    return {name: read_npy(path / f"{name}.npy") for name in ARRAYS if (path / f"{name}.npy").is_file()}


@dataclass(frozen=True)
class Texts:
    """The contents of clip.json."""

    fps: float
    licence: str
    domain: str
    caption: str  # "" = none


def _read_texts(path: Path) -> Texts:
    """Read the texts of a clip (see `data.texts`); ValueError names what is missing or wrong."""
    if path.suffix == ".npz":
        members = read_npz(path, TEXTS)
        if wrong := [name for name, array in members.items() if array.size != 1]:
            raise ValueError(f"{path}: {wrong[0]} is not one value")
        tree: object = {name: array.item() for name, array in members.items()}
    else:
        tree = read_json(path / "clip.json")
    return texts_of(tree, path)


def texts_of(tree: object, path: Path) -> Texts:
    """Check the contents of a clip.json; ValueError names what is missing or wrong."""
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: clip.json is no object")
    if missing := {"fps", "licence"} - set(tree):
        raise ValueError(f"{path}: no {sorted(missing)[0]}, need fps and licence")
    fps = tree["fps"]
    try:
        rate = np.nan if isinstance(fps, bool) else float(fps)
    except (TypeError, ValueError, OverflowError):
        rate = np.nan
    if not 0 < rate < 1e4:
        raise ValueError(f"{path}: fps is {fps!r}")
    domain = "real" if is_missing(tree.get("domain")) else tree["domain"]
    if domain not in DOMAINS:
        raise ValueError(f"{path}: domain is {domain!r}, need one of {DOMAINS}")
    try:
        return Texts(rate, licence_text(tree["licence"]), domain, caption_text(tree.get("caption")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_frames(path: Path, arrays: dict[str, np.ndarray], window: range, total: int) -> Tensor:  # [T, H, W, 3] uint8
    """Read the window's frames; ValueError where frames and geometry differ in number."""
    if "frames" in arrays:
        frames = arrays["frames"]
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
            raise ValueError(f"{path}: frames are {frames.dtype} {frames.shape}, need uint8 [T, H, W, 3]")
        found = len(frames)
    elif (path / "frames").is_dir():
        images = numbered_files(path / "frames", IMAGES)
        found = len(images)
    elif video := next((v for suffix in VIDEOS if (v := path / f"frames{suffix}").is_file()), None):
        found = frame_count(video)
        if found != total:  # a container's index may count frames that are never shown
            found = frame_count(video, decode=True)
    else:
        raise ValueError(f"{path}: no frames (frames array, frames/ or frames.mp4)")
    if found != total:
        raise ValueError(f"{path}: {found} frames, but geometry of {total}")
    if "frames" in arrays:
        return torch.from_numpy(frames[list(window)])
    if (path / "frames").is_dir():
        return read_frames([images[n] for n in window])
    assert video is not None
    return read_video(video, window)
