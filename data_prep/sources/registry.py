"""Every source by name: what `write_shards` needs to cut any dataset into clips, unit by unit.

A source is a module of this package with `list_units(root)` and `iter_clips(root, num_frames, stride, units, ...)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.sources import tartanair
from one4d_pl.types import Clip

# Strides that make motion per frame comparable, in the frames that each source counts.
DEFAULT_STRIDES = {
    "tartanair": 1,  # nominal 10 frames per second, and fast
}
SOURCES = tuple(DEFAULT_STRIDES)


def list_units(source: str, root: str | Path) -> list[str]:
    """The parts of a dataset that can be converted on their own (trajectories, scenes, sequences), sorted.

    A split by scene never divides a unit. Raises ValueError for an unknown source.
    """
    root = Path(root)
    if source == "tartanair":
        return tartanair.list_units(root)
    raise ValueError(f"no source {source!r}; there are {', '.join(SOURCES)}")


def iter_clips(
    source: str,
    root: str | Path,
    num_frames: int = 81,
    stride: int | None = None,  # None: DEFAULT_STRIDES
    units: Sequence[str] | None = None,  # None: all of list_units
    geometry: str | Path | None = None,  # spatialvid only: a folder of pseudo geometry, one generic clip per video
    min_confidence: float = 0.0,  # generic, and spatialvid with `geometry`: less trusted pixels become invalid
) -> Iterator[Clip]:
    """The clips of one dataset; one that is broken is dropped with one logged line.

    Raises ValueError where the root holds no such dataset, a unit does not exist or an option does not apply.
    """
    root = Path(root)
    stride = DEFAULT_STRIDES.get(source, 1) if stride is None else stride
    if geometry is not None and source != "spatialvid":
        raise ValueError(f"{source} has its own geometry; only spatialvid takes a geometry folder")
    if min_confidence > 0 and source != "generic" and geometry is None:
        raise ValueError(f"{source} has no confidence; min_confidence is for generic, or spatialvid with geometry")
    if source == "tartanair":
        return tartanair.iter_clips(root, num_frames, stride, units)
    raise ValueError(f"no source {source!r}; there are {', '.join(SOURCES)}")
