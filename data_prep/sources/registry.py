"""Every source by name: what `write_shards` needs to cut any dataset into clips, unit by unit.

A source is a module of this package, or a tool of `labels`, with `LAYOUT` (a unit in words), `list_units(root)`,
`has_unit(root, unit)` and `open_unit(root, unit, stride, ...)`, which lists the unit's tracks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.sources import bedlam, generic, omniworld, pointodyssey, rgbd, spatialvid, tartanair
from data_prep.sources.labels import TOOLS
from data_prep.sources.tracks import Track, clips_of_units
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
    **dict.fromkeys(TOOLS, 1),  # every frame that was labelled
}
SOURCES = tuple(DEFAULT_STRIDES)


def list_units(source: str, root: str | Path) -> list[str]:
    """List a dataset's trajectories, scenes or sequences, sorted, as units; ValueError for an unknown source."""
    return _module(source).list_units(Path(root))


def scene_of(source: str, unit: str) -> str:
    """Return a unit's scene. Units that show the same place share it, and no split divides it."""
    parts = unit.split("/")
    if source in ("tartanair", "bedlam"):  # <environment>/<Easy or Hard>/<trajectory>, <scene>/png/<sequence>
        return "/".join(parts[:-2]) or unit
    # <scene>_3rd, <scene>_ego1, ... are cameras in one scene, <scene>_f is the scene in fog
    if source == "pointodyssey":
        return re.sub(r"(_3rd|_ego\d*|_f)+$", "", unit)
    if source in TOOLS:  # clips of one video, as cut_clips names them
        return re.sub(r"-f\d{6,}(?=/|$)", "", unit)
    return unit


def iter_clips(
    source: str,
    root: str | Path,
    num_frames: int = 81,
    stride: int | None = None,  # None: DEFAULT_STRIDES
    units: Sequence[str] | None = None,  # None: all of list_units
    geometry: str | Path | None = None,  # spatialvid only: a folder of pseudo geometry, one generic clip per video
    min_confidence: float = 0.0,  # generic, labels, spatialvid with `geometry`: less trusted pixels become invalid
) -> Iterator[Clip]:
    """Yield a dataset's clips, but for broken ones, which are logged; ValueError for wrong units, root or options."""
    root, module = Path(root), _module(source)
    step = DEFAULT_STRIDES[source] if stride is None else stride
    pseudo = None if geometry is None else Path(geometry)
    if geometry is not None and source != "spatialvid":
        raise ValueError(f"{source} has its own geometry; only spatialvid takes a geometry folder")
    if min_confidence > 0 and source not in ("generic", *TOOLS) and geometry is None:
        named = ", ".join(TOOLS)
        raise ValueError(
            f"{source} has no confidence; min_confidence is for generic, {named}, spatialvid with geometry"
        )
    if pseudo is not None and not pseudo.is_dir():
        raise ValueError(f"{pseudo}: no folder of pseudo geometry")

    def open_unit(unit: str) -> list[Track]:
        if source == "generic" or source in TOOLS:
            return module.open_unit(root, unit, step, min_confidence)
        if source == "spatialvid":
            return spatialvid.open_unit(root, unit, step, pseudo, min_confidence)
        return module.open_unit(root, unit, step)

    layout, where = module.LAYOUT, "directly in it" if source == "spatialvid" else "at or below it"
    chosen = module.list_units(root) if units is None else units
    if units is None and not chosen:
        raise ValueError(f"{root}: no {layout} {where}")
    # given units are looked up one by one: the writer asks for each of thousands, and must not list them all every time
    for unit in units or ():
        if Path(unit).is_absolute() or ".." in unit.split("/") or not module.has_unit(root, unit):
            raise ValueError(f"{root}: no unit {unit!r}; a unit is a {layout}, named by its path below this folder")
    return clips_of_units(root, chosen, open_unit, num_frames, step)


def _module(source: str) -> Any:  # a module, or a tool of `labels` with the same functions
    modules = {
        "bedlam": bedlam, "generic": generic, "omniworld": omniworld, "pointodyssey": pointodyssey, "rgbd": rgbd,
        "spatialvid": spatialvid, "tartanair": tartanair, **TOOLS,
    }  # fmt: skip
    if source not in modules:
        raise ValueError(f"no source {source!r}; there are {', '.join(SOURCES)}")
    return modules[source]
