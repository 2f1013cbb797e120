"""What shards hold: python -m data_prep.stats FOLDER ... [--out FOLDER]

Prints one row per folder of raw shards, and one per domain over all of them; leaves stats.json and stats.png. Counts
are of every clip (from the manifests); what needs decoding is measured on --clips evenly spaced clips per folder. The
latents' statistics are of the encoded shards beside a folder, where there are any: per channel, of frames and of
pointmaps, over the same number of clips.
"""

from __future__ import annotations

import argparse
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

import torch

from data_prep.geometry_checks import check_geometry
from data_prep.pictures import draw_bars
from one4d_pl.commands.command import Command
from one4d_pl.data.encoded import EncodedSet
from one4d_pl.data.latent_stats import LatentStats, latent_statistics, spread
from one4d_pl.data.shards import ShardSet
from one4d_pl.data.tar_set import SampleError
from one4d_pl.errors import UserError
from one4d_pl.files import check_folder, open_whole, write_json

COLUMNS = ("folder", "source", "domain", "split", "licence", "clips", "scenes", "hours", "size", "MB/clip",
           "motion %", "turn deg", "depth 2-98 %", "words")  # fmt: skip


@dataclass(frozen=True)
class SetStats:
    """The numbers of one folder."""

    folder: str
    source: str
    domain: str
    split: str
    licence: str
    clips: int
    benchmark_clips: int
    scenes: int
    hours: float  # frames / fps, the fps of the measured clips
    sizes: list[str]  # TxHxW, most frequent first
    bytes_per_clip: float
    measured: int  # clips that were decoded
    motion: float  # median displacement of static points per frame, share of the image width
    turn: float  # median of the camera's turn over a clip, degrees
    depth_near: float  # 2nd and 98th percentile of valid depth, medians over clips, the source's unit
    depth_far: float
    valid_share: float
    caption_words: float
    uncaptioned: float  # share of the measured clips
    latents: LatentStats | None


def measure_set(folder: str, num_clips: int) -> SetStats:
    """Measure all numbers of one folder of raw shards."""
    shards = ShardSet.open(folder)
    manifest, entries = shards.manifest, shards.entries
    clips = []
    for index in spread(len(shards), num_clips):
        try:
            clips.append(shards.read(index))
        except SampleError as error:
            logging.getLogger("data_prep").warning("left out: %s", error)
    if not clips:
        raise UserError(f"{folder}: none of its clips can be read; run check_shards")
    checks = [check_geometry(clip) for clip in clips if bool(clip.valid.any())]
    ranges = [_depth_range(clip.depth[clip.valid]) for clip in clips if bool(clip.valid.any())]
    words = [len(clip.caption.split()) for clip in clips]
    sizes = [f"{e.num_frames}x{e.height}x{e.width}" for e in entries]
    return SetStats(
        folder=folder,
        source=manifest.source,
        domain=manifest.domain,
        split=manifest.split,
        licence=manifest.licence,
        clips=len(entries),
        benchmark_clips=sum(bool(e.benchmark) for e in entries),
        scenes=len({e.scene for e in entries} - {""}),
        hours=sum(e.num_frames for e in entries) * fmean(1 / clip.fps for clip in clips) / 3600,
        sizes=sorted(set(sizes), key=sizes.count, reverse=True),
        bytes_per_clip=sum(shard.bytes for shard in manifest.shards) / len(entries),
        measured=len(clips),
        motion=_median([check.motion for check in checks]),
        turn=_median([check.turn for check in checks]),
        depth_near=_median([near for near, _ in ranges]),
        depth_far=_median([far for _, far in ranges]),
        valid_share=fmean(float(clip.valid.float().mean()) for clip in clips),
        caption_words=fmean(words),
        uncaptioned=fmean(not count for count in words),
        latents=measure_latents(folder, num_clips),
    )


def _depth_range(depth: torch.Tensor) -> tuple[float, float]:  # [N]
    some = depth[:: max(1, len(depth) // 100_000)]
    near, far = torch.quantile(some, torch.tensor([0.02, 0.98])).tolist()
    return near, far


def _median(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return median(known) if known else math.nan


def measure_latents(folder: str, num_clips: int) -> LatentStats | None:
    """Measure the encoded shards beside a local folder, the newest of several; None where there are none."""
    found = sorted(Path(folder).glob("encoded/*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        return None
    return latent_statistics([EncodedSet.open(found[-1].parent)], num_clips)


def table(found: list[SetStats]) -> str:
    """Format one row per folder, then one per domain."""
    rows = [list(COLUMNS)]
    for s in found:
        rows.append([
            s.folder, s.source, s.domain, s.split, s.licence, f"{s.clips}", f"{s.scenes}", f"{s.hours:.2f}",
            s.sizes[0] + (" ..." if len(s.sizes) > 1 else ""), f"{s.bytes_per_clip / 1e6:.2f}",
            f"{100 * s.motion:.2f}", f"{s.turn:.1f}", f"{s.depth_near:.3g}-{s.depth_far:.3g}", f"{s.caption_words:.0f}",
        ])  # fmt: skip
    for domain in sorted({s.domain for s in found}):
        mine = [s for s in found if s.domain == domain]
        clips, hours = sum(s.clips for s in mine), sum(s.hours for s in mine)
        rows.append(["all", "", domain, "", "", f"{clips}", f"{sum(s.scenes for s in mine)}", f"{hours:.2f}"])
    widths = [max(len(row[n]) for row in rows if n < len(row)) for n in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    for s in (s for s in found if s.latents):
        assert s.latents is not None
        for name, mean, std in (
            ("rgb", s.latents.rgb_mean, s.latents.rgb_std),
            ("xyz", s.latents.xyz_mean, s.latents.xyz_std),
        ):
            lines.append(f"{s.folder}: {name} latents, mean {fmean(mean):+.3f}, std {fmean(std):.3f} over channels")
    return "\n".join(lines)


def draw(found: list[SetStats], path: Path) -> None:
    """Draw bars per folder, and per channel where there are latents."""
    panels = {
        "clips": {s.folder: float(s.clips) for s in found},
        "hours": {s.folder: s.hours for s in found},
        "motion per frame, % of the width": {s.folder: 100 * s.motion for s in found},
        "camera's turn over a clip, degrees": {s.folder: s.turn for s in found},
        "depth, 98th percentile over 2nd": {s.folder: s.depth_far / s.depth_near for s in found},
    }
    for s in found:
        if s.latents is not None:
            for kind, values in (("rgb", s.latents.rgb_std), ("xyz", s.latents.xyz_std)):
                bars = {f"channel {n}": value for n, value in enumerate(values)}
                panels[f"{s.folder}: std of {kind} latents"] = bars
    with open_whole(path) as file:
        draw_bars(panels).save(file, "PNG")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", help="raw shards")
    parser.add_argument("--out", type=Path, default=Path("."), help="gets stats.json and stats.png (default: here)")
    parser.add_argument("--clips", type=int, default=32, help="decoded per folder (default %(default)s)")


def _run(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.clips < 1:
        raise UserError("--clips must be at least 1")
    check_folder(args.out, "--out")
    found = [measure_set(folder, args.clips) for folder in args.folders]
    write_json(args.out / "stats.json", [{k: _plain(v) for k, v in asdict(s).items()} for s in found])
    draw(found, args.out / "stats.png")
    print(table(found))


def _plain(value: object) -> object:
    return None if isinstance(value, float) and math.isnan(value) else value  # json has no nan


main = Command("python -m data_prep.stats", __doc__, _add_arguments, _run)

if __name__ == "__main__":
    main.run_process()
