"""Every source by name: what `write_shards` needs to cut any dataset into clips, unit by unit.

A source is a module of this package with `list_units(root)` and `iter_clips(root, num_frames,
stride, units, ...)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from data_prep.sources import bedlam, generic, omniworld, pointodyssey, rgbd, spatialvid, tartanair
from one4d_pl.types import Clip

# Strides that make motion per frame comparable, in frames as each source counts them.
DEFAULT_STRIDES = {
    "bedlam": 1,  # frames with depth: 6 per second
    "generic": 1,
    "omniworld": 1,  # 24 per second; its captions are of 81 frames
    "pointodyssey": 1,
    "rgbd": 2,  # 15 per second
    "spatialvid": 1,  # annotated frames: 5 or 6 per second
    "tartanair": 1,  # nominally 10 per second, and fast
}
SOURCES = tuple(DEFAULT_STRIDES)


def list_units(source: str, root: str | Path) -> list[str]:
    """List the parts of a dataset that can be converted on their own, sorted.

    They are trajectories, scenes or sequences. ValueError for an unknown source.
    """
    return _module(source).list_units(Path(root))


def scene_of(source: str, unit: str) -> str:
    """Return a unit's scene. Units that show the same place share it, and no split divides it."""
    parts = unit.split("/")
    if source == "tartanair":  # <environment>/<Easy or Hard>/<trajectory>
        return "/".join(parts[:-2]) or unit
    if source == "bedlam":  # <scene>/png/<sequence>
        return "/".join(parts[:-2]) or unit
    # <scene>_3rd, <scene>_ego1, ... are cameras in one scene, <scene>_f is the scene in fog
    if source == "pointodyssey":
        return re.sub(r"(_3rd|_ego\d*|_f)+$", "", unit)
    return unit


def iter_clips(
    source: str,
    root: str | Path,
    num_frames: int = 81,
    stride: int | None = None,  # None: DEFAULT_STRIDES
    units: Sequence[str] | None = None,  # None: all of list_units
    geometry: str | Path | None = None,  # spatialvid only: a folder of pseudo geometry, one generic clip per video
    min_confidence: float = 0.0,  # generic, and spatialvid with `geometry`: less trusted pixels become invalid
) -> Iterator[Clip]:
    """Yield the clips of one dataset; a broken one is dropped with one logged line.

    ValueError where the root holds no such dataset, a unit does not exist or an option does not
    apply.
    """
    root = Path(root)
    _module(source)
    stride = DEFAULT_STRIDES[source] if stride is None else stride
    if geometry is not None and source != "spatialvid":
        raise ValueError(f"{source} has its own geometry; only spatialvid takes a geometry folder")
    if min_confidence > 0 and source != "generic" and geometry is None:
        raise ValueError(f"{source} has no confidence; min_confidence is for generic, or spatialvid with geometry")
    if source == "generic":
        return generic.iter_clips(root, num_frames, stride, units, min_confidence)
    if source == "spatialvid":
        return spatialvid.iter_clips(root, num_frames, stride, units, geometry, min_confidence)
    return _module(source).iter_clips(root, num_frames, stride, units)


def _module(source: str) -> ModuleType:
    modules = {
        module.__name__.rsplit(".", 1)[-1]: module
        for module in (bedlam, generic, omniworld, pointodyssey, rgbd, spatialvid, tartanair)
    }
    if source not in modules:
        raise ValueError(f"no source {source!r}; there are {', '.join(SOURCES)}")
    return modules[source]
