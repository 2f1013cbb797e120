"""Read raw shards again and look for what is wrong: python -m data_prep.check_shards FOLDER [--jobs N]

Every shard is compared with its hash, every clip decoded, and its geometry, normalisation and cameras are measured.
Each clip is also read by the conventions that are commonly mistaken for each other (conventions.py): one that fits
clearly better is reported, with its margin. Leaves in FOLDER/check (or --report): report.json (numbers per clip, their
medians, what each convention is found to be, what is flagged), exclude.txt (the flagged clips with the reasons; `fit`
leaves out what FOLDER/check/exclude.txt lists, so look at it and delete lines) and clips.png (flagged clips first).
Ends with 1 where a file is damaged. With --rank and --world it is one task of an array job; a shard that was checked is
not checked again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median

import torch
from diffusers import AutoencoderKLWan

from data_prep.conventions import READINGS, believed_reading, verdict
from data_prep.geometry_checks import check_geometry
from data_prep.parallel import run_parallel
from data_prep.pictures import draw_clips
from one4d_pl.commands.command import Command
from one4d_pl.config import EMBEDDED_BASE, base_folder
from one4d_pl.data.shards import ShardSet
from one4d_pl.data.tar_set import FLAGGED_NAME, SampleError
from one4d_pl.errors import UserError, reading
from one4d_pl.files import check_folder, open_whole, write_json
from one4d_pl.geometry.pointmap import denormalise, depth_to_pointmap, normalise_pointmap
from one4d_pl.models.base_files import weight_files
from one4d_pl.models.encoder_files import open_vae
from one4d_pl.progress import Progress
from one4d_pl.types import Clip

FAR_LIMIT = 10.0  # as in training (config.DataConfig)
MAX_PICTURES = 16

log = logging.getLogger("data_prep")


@dataclass(frozen=True)
class ClipCheck:
    """The measurements of one clip; nan = cannot be measured."""

    key: str
    fault: str  # "" = it can be read
    valid_share: float = math.nan  # of all pixels
    static_error: float = math.nan  # see geometry_checks.GeometryCheck, as the next six
    depth_scale: float = math.nan
    margins: dict[str, tuple[float, float]] = field(default_factory=dict)
    path_length: float = math.nan
    largest_step: float = math.nan
    turn: float = math.nan
    motion: float = math.nan
    round_trip: float = math.nan  # largest relative error of normalise and back, valid points
    kept: float = math.nan  # share of the valid points that the cube holds
    vae_error: float = math.nan  # median error of a valid point through the VAE and back, in the cube; where asked

    def flags(self) -> list[str]:
        """List why somebody should look at the clip before training."""
        found = {
            f"cannot be read: {self.fault}": bool(self.fault),
            f"geometry: static points land {100 * self.static_error:.0f} % off": self.static_error > 0.1,
            self._reading_text(): self.reading is not None,
            f"valid: {100 * self.valid_share:.0f} % of the pixels": self.valid_share < 0.1,
            f"camera jumps by {self.largest_step:.2f} median depths": self.largest_step > 0.5,
            f"normalisation loses {self.round_trip:.1e}": self.round_trip > 1e-3,
            f"cube: holds {100 * self.kept:.0f} % of the points": self.kept < 0.5,
            f"VAE: pointmaps come back {self.vae_error:.3f} off": self.vae_error > 0.1,
        }
        return [reason for reason, raised in found.items() if raised]

    @property
    def reading(self) -> str | None:
        """Return the convention that fits this clip clearly better, if any."""
        return believed_reading(self.margins)

    def _reading_text(self) -> str:
        if self.reading is None:
            return ""
        misfit = f"depth does not fit the camera's motion: it should be x{_factor(self.depth_scale)}"
        depth, colour = (f"{-100 * margin:+.0f} %" for margin in self.margins[self.reading])
        return f"{READINGS.get(self.reading, misfit)} (misfit of depth {depth}, of colour {colour})"


@dataclass(frozen=True)
class ShardTask:
    """One shard to check."""

    folder: str
    number: int
    part: Path
    vae: str | None
    vae_clips: int  # of the whole set


def check_clip(clip: Clip, vae: AutoencoderKLWan | None) -> ClipCheck:
    """Measure all numbers of one clip."""
    valid_share = float(clip.valid.float().mean())
    if valid_share == 0:
        return ClipCheck(clip.key, "", valid_share)
    normalised = normalise_pointmap(clip.depth, clip.valid, clip.intrinsics, clip.cam2world, FAR_LIMIT, False)
    valid = normalised.valid
    points = depth_to_pointmap(clip.depth, clip.intrinsics, clip.cam2world)[valid]  # [N, 3]
    back = denormalise(normalised.points, normalised.scale)[valid]
    error = ((back - points).abs().amax(-1) / points.abs().amax(-1)).max() if len(points) else torch.tensor(math.nan)
    vae_error = math.nan
    if vae is not None:
        video = normalised.points.permute(3, 0, 1, 2)[None]
        with torch.no_grad():
            decoded = vae.decode(vae.encode(video).latent_dist.mode()).sample[0].permute(1, 2, 3, 0)
        vae_error = float((decoded - normalised.points).norm(dim=-1)[valid].median())
    return ClipCheck(
        clip.key,
        "",
        valid_share,
        **asdict(check_geometry(clip)),
        round_trip=float(error),
        kept=float(valid.sum() / clip.valid.sum()),
        vae_error=vae_error,
    )


def check_shard(task: ShardTask) -> None:
    """Check one shard's hash and clips; write the numbers to the task's part file."""
    shards = ShardSet.open(task.folder)
    shard = shards.manifest.shards[task.number]
    every = max(1, -(-len(shards) // max(1, task.vae_clips)))
    vae = None if task.vae is None else open_vae(Path(task.vae))
    checks = []
    for index in range(shards.starts[task.number], shards.starts[task.number] + len(shard.samples)):
        try:
            checks.append(check_clip(shards.read(index), vae if index % every == 0 else None))
        except (SampleError, ValueError) as error:
            checks.append(ClipCheck(shards.key(index), str(error)))
    path = Path(task.folder) / shard.name
    with reading(path), path.open("rb") as file:
        intact = hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    tree = {"sha256": shard.sha256, "intact": intact, "clips": [asdict(check) for check in checks]}
    with open_whole(task.part) as file:
        file.write(json.dumps(tree).encode())


def write_report(shards: ShardSet, parts: list[Path], report: Path) -> tuple[list[ClipCheck], list[str]]:
    """Write report.json, exclude.txt and clips.png. Returns the clips' numbers and the names of damaged shards."""
    trees = [json.loads(part.read_text()) for part in parts]
    names = [shard.name for shard in shards.manifest.shards]
    damaged = [name for name, tree in zip(names, trees, strict=True) if not tree["intact"]]
    checks = [ClipCheck(**clip) for tree in trees for clip in tree["clips"]]
    flagged = {check.key: reasons for check in checks if (reasons := check.flags())}
    medians = {}
    for name in (entry.name for entry in fields(ClipCheck)[2:] if entry.name != "margins"):
        known = [value for check in checks if not math.isnan(value := getattr(check, name))]
        medians[name] = {"median": median(known), "max": max(known), "clips": len(known)} if known else None
    report_tree = {
        "folder": shards.location, "clips": len(checks), "damaged_shards": damaged, "numbers": medians,
        "conventions": _count_verdicts(checks), "flagged": flagged,
        "checks": [{k: _plain(v) for k, v in asdict(check).items()} for check in checks],
    }  # fmt: skip
    write_json(report / "report.json", report_tree)
    with open_whole(report / Path(FLAGGED_NAME).name) as file:
        for key, reasons in flagged.items():
            if not reasons[0].startswith("VAE"):  # the last one; few clips go through it, and another may train
                file.write(f"{key}  # {'; '.join(reasons)}\n".encode())
    readable = [n for n, check in enumerate(checks) if not check.fault]
    shown = sorted(readable, key=lambda n: checks[n].key not in flagged)[:MAX_PICTURES]
    titles = ["; ".join(flagged.get(checks[n].key, ["nothing flagged"])) for n in shown]
    if shown:
        with open_whole(report / "clips.png") as file:
            draw_clips([shards.read(n) for n in shown], titles).save(file, "PNG")
    return checks, damaged


def _count_verdicts(checks: list[ClipCheck]) -> dict[str, dict[str, float]]:
    """Count for each other reading the clips for the given one and against it, and their median margins."""
    tree = {}
    for name in READINGS:
        margins = [check.margins[name] for check in checks if name in check.margins]
        if margins:
            verdicts = Counter(verdict(margin) for margin in margins)
            tree[name] = {
                "for": verdicts[-1], "against": verdicts[1], "cannot_tell": verdicts[0],
                "depth_margin": median(depth for depth, _ in margins),
                "colour_margin": median(colour for _, colour in margins),
            }  # fmt: skip
    return tree


def _factor(value: float) -> str:
    return f"{float(f'{value:.3g}'):g}"  # 1000, not 1e+03


def _plain(value: str | float) -> str | float | None:
    return None if isinstance(value, float) and math.isnan(value) else value  # json has no nan


def summary(shards: ShardSet, checks: list[ClipCheck], damaged: list[str]) -> list[str]:
    """Summarise the check in lines for people."""
    flagged = [check for check in checks if check.flags()]
    lines = [f"{shards.location}: {len(checks)} clips, {len(flagged)} flagged, {len(damaged)} damaged shards"]
    lines += [f"  {check.key}: {'; '.join(check.flags())}" for check in flagged[:20]]
    if len(flagged) > 20:
        lines.append(f"  ... and {len(flagged) - 20} more in exclude.txt")
    for name, text in READINGS.items():
        believers = sum(check.reading == name for check in checks)
        confirmed = sum(verdict(check.margins[name]) < 0 for check in checks if name in check.margins)
        if believers > max(1, confirmed):
            lines.append(f"  the whole set: {text} ({believers} of {len(checks)} clips)")
    factors = [check.depth_scale for check in checks if not math.isnan(check.depth_scale)]
    if factors and not 0.5 < median(factors) < 2:
        lines.append(
            f"  the whole set's depth does not fit its cameras: a constant of the source is wrong by about "
            f"x{_factor(median(factors))} ({len(factors)} clips can tell)"
        )
    return lines


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="raw shards, local")
    parser.add_argument("--report", type=Path, help="folder of the report; default: FOLDER/check, where fit looks")
    parser.add_argument("--base", help="folder of a base whose VAE is tried; default: the shipped tiny VAE")
    parser.add_argument("--vae-clips", type=int, default=8, help="so many clips go through it (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default %(default)s)")
    parser.add_argument("--rank", type=int, default=0, help="number of this task of an array job (default %(default)s)")
    parser.add_argument("--world", type=int, default=1, help="tasks of the array job (default %(default)s)")


def _run(args: argparse.Namespace) -> int:
    """Check and print; return the exit code: 1 where a shard or clip is damaged."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    report = args.report or Path(args.folder, FLAGGED_NAME).parent
    vae = None if args.vae_clips < 1 else args.base or str(base_folder(EMBEDDED_BASE))
    settings_id = hashlib.sha256(f"{vae} {args.vae_clips} {sorted(READINGS)}".encode()).hexdigest()[:8]
    if vae is not None and not weight_files(Path(vae), "vae"):
        raise UserError(f"{vae}: no VAE there; --base takes a folder in diffusers layout or in Wan's own")
    shards = ShardSet.open(args.folder)
    check_folder(report, "--report")
    parts = [
        report / "parts" / f"{shard.name}.{shard.sha256[:12]}-{settings_id}.json" for shard in shards.manifest.shards
    ]
    mine = range(args.rank, len(parts), args.world)
    tasks = [ShardTask(args.folder, n, parts[n], vae, args.vae_clips) for n in mine if not parts[n].exists()]
    for _ in Progress(run_parallel(check_shard, tasks, args.jobs), total=len(tasks), unit="shard"):
        pass
    if not all(part.exists() for part in parts):
        print(f"task {args.rank} of {args.world} is done; the others are not: {report}")
        return 0
    checks, damaged = write_report(shards, parts, report)
    print("\n".join([*summary(shards, checks, damaged), f"  report: {report}"]))
    return 1 if damaged or any(check.fault for check in checks) else 0


main = Command("python -m data_prep.check_shards", __doc__, _add_arguments, _run)

if __name__ == "__main__":
    main.run_process()
