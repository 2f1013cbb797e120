"""Convert one dataset to raw shards: python -m data_prep.write_shards --source tartanair --root ... --out ...

The folder that it leaves holds `shard-000000.tar` ... (plain WebDataset), `dropped.jsonl` (what was left out, and why)
and `manifest.json`, written last; training opens it by its path or by the URL it is copied to. It can be stopped at
any moment and started again: it goes on where it was. The same arguments give the same bytes, whatever the number of
processes, and a third run changes nothing. With --rank and --world it is one task of an array job (slurm/prep.sh); the
task that finishes the last unit writes the manifest.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.captions import CaptionOptions, digest_of_table, read_table
from data_prep.parallel import run_parallel
from data_prep.sources.registry import DEFAULT_STRIDES
from data_prep.units import UnitResult, UnitTask, convert_unit, list_source_units, read_exclusions, split_units
from one4d_pl.commands.command import Command
from one4d_pl.data.clip_codec import MAX_FRAMES, MIN_FRAMES
from one4d_pl.data.shards import ShardSet
from one4d_pl.data.staging import Plan, Staging, is_finished
from one4d_pl.data.tar_set import SPLITS, Recipe
from one4d_pl.errors import UserError
from one4d_pl.files import check_folder
from one4d_pl.progress import Progress
from one4d_pl.types import DOMAINS

log = logging.getLogger("data_prep")


@dataclass(frozen=True)
class Arguments:
    """The command line, typed."""

    source: str
    root: str | None
    out: str
    num_frames: int
    stride: int | None
    height: int
    width: int
    samples_per_shard: int
    limit: int | None
    split: str
    val_share: float
    exclude: str | None
    captions: str | None
    caption_url: str | None
    caption_model: str | None
    geometry: str | None
    min_confidence: float
    jobs: int
    rank: int
    world: int
    seed: int
    count: int
    domain: str

    def __post_init__(self) -> None:
        if self.count < 1 or (self.limit is not None and self.limit < 1):
            raise UserError("--count and --limit must be at least 1")
        if self.source == "toy":
            if self.root is not None or self.stride not in (None, 1):
                raise UserError("--source toy takes no --root and no --stride")
        elif self.root is None:
            raise UserError(f"--source {self.source} needs --root, the folder of the dataset")
        if not MIN_FRAMES <= self.num_frames <= MAX_FRAMES or self.num_frames % 4 != 1:
            raise UserError(f"--num-frames must be 4k+1 from {MIN_FRAMES} to {MAX_FRAMES}, got {self.num_frames}")
        if self.jobs < 1 or not 0 <= self.rank < self.world:
            raise UserError(f"need --jobs >= 1 and 0 <= --rank < --world, got {self.jobs}, {self.rank}, {self.world}")
        if not 0 < self.val_share < 1:
            raise UserError(f"--val-share must lie between 0 and 1, got {self.val_share}")
        if (self.caption_url is None) != (self.caption_model is None):
            raise UserError("--caption-url and --caption-model go together: who is asked for captions, and as what")

    def caption_options(self) -> CaptionOptions:
        """Return where captions come from; an endpoint's answers are kept in `<out>.captions`."""
        out = Path(self.out).resolve()
        return CaptionOptions(
            table=self.captions,
            table_digest=digest_of_table(read_table(Path(self.captions))) if self.captions else None,
            url=self.caption_url,
            model=self.caption_model,
            cache=str(out.parent / f"{out.name}.captions"),
        )

    def recipe(self, captions: CaptionOptions) -> Recipe:
        """Collect all that decides the bytes, for the manifest; not the folder's place nor how many write it."""
        # the model decides the captions, not the url: another port of it gives the same ones
        ignored = ("root", "out", "jobs", "rank", "world", "exclude", "geometry", "captions", "caption_url")
        settings = {name: value for name, value in asdict(self).items() if name not in ignored}
        if self.source != "toy":
            settings = {name: value for name, value in settings.items() if name not in ("seed", "count", "domain")}
            settings["stride"] = self.stride or DEFAULT_STRIDES[self.source]
        exclusions = sorted(read_exclusions(self.exclude))
        settings["exclude"] = hashlib.sha256("\n".join(exclusions).encode()).hexdigest()[:16] if exclusions else None
        settings["geometry"] = self.geometry is not None
        if captions.table_digest is not None:
            settings["captions"] = captions.table_digest
        if captions.model is None:
            del settings["caption_model"]
        return settings


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python -m data_prep.write_shards --source toy --out toy --height 64 --width 64 --count 32"
    parser.add_argument("--source", required=True, choices=(*DEFAULT_STRIDES, "toy"), help="which dataset")
    parser.add_argument("--root", help="folder of the downloaded dataset (not for toy)")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "--num-frames", type=int, default=81, help="frames per clip, 4k+1 from 9 to 81 (default %(default)s)"
    )
    strides = ", ".join(f"{name} {stride}" for name, stride in DEFAULT_STRIDES.items())
    parser.add_argument("--stride", type=int, help=f"take every n-th frame; default by source: {strides}")
    parser.add_argument(
        "--height", type=int, default=352, help="resize, with a centre crop, to this height (default %(default)s)"
    )
    parser.add_argument("--width", type=int, default=624, help="... and width in pixels (default %(default)s)")
    parser.add_argument("--samples-per-shard", type=int, default=32, help="clips per tar (default %(default)s)")
    parser.add_argument("--limit", type=int, help="stop after so many clips; default: all")
    parser.add_argument(
        "--split", choices=SPLITS, default="all", help="only the scenes of this split (default %(default)s)"
    )
    parser.add_argument(
        "--val-share", type=float, default=0.05, help="share of the scenes in val, by their names (default %(default)s)"
    )
    parser.add_argument("--exclude", metavar="FILE", help="text file of clip keys and units to leave out, # comments")
    parser.add_argument(
        "--captions", metavar="FILE", help="csv or jsonl: key (of a clip or unit), caption; wins over the dataset's"
    )
    parser.add_argument(
        "--caption-url",
        metavar="URL",
        help="OpenAI-compatible API that is asked where there is no caption, e.g. http://localhost:8000/v1; its key is "
        "taken from the environment's OPENAI_API_KEY, its answers are kept in OUT.captions",
    )
    parser.add_argument("--caption-model", metavar="NAME", help="... and the model that is asked there")
    parser.add_argument("--geometry", metavar="FOLDER", help="spatialvid: pseudo geometry, one folder per clip")
    parser.add_argument(
        "--min-confidence", type=float, default=0.0, help="pixels below become invalid (default %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes (default %(default)s)")
    parser.add_argument("--rank", type=int, default=0, help="number of this task of an array job (default %(default)s)")
    parser.add_argument("--world", type=int, default=1, help="tasks of the array job (default %(default)s)")
    toy = parser.add_argument_group("toy", "the procedural world; takes no dataset")
    toy.add_argument("--count", type=int, default=32, help="clips to render (default %(default)s)")
    toy.add_argument(
        "--seed", type=int, default=0, help="the i-th clip is rendered from seed + i (default %(default)s)"
    )
    toy.add_argument("--domain", choices=DOMAINS, default=DOMAINS[0], help="look of the clips (default %(default)s)")


def write(arguments: Arguments) -> ShardSet | None:
    """Do this task's share of the work and assemble what can be; return the shard set once whole, else None."""
    out, captions = Path(arguments.out), arguments.caption_options()
    recipe = arguments.recipe(captions)
    if is_finished(out, "raw", recipe):
        log.info("%s: nothing to do, its shards are whole", out)
        return ShardSet.open(out)
    exclusions = read_exclusions(arguments.exclude)
    units = list_source_units(arguments.source, arguments.root, arguments.seed, arguments.count, arguments.domain)
    units = [
        u for u in split_units(arguments.source, units, arguments.split, arguments.val_share) if u not in exclusions
    ]
    if not units:
        raise UserError(
            f"{arguments.root or arguments.source}: no scene left for --split {arguments.split}; with few scenes take "
            "another --val-share, the same for both splits"
        )
    plan = Plan(units, arguments.samples_per_shard, arguments.limit, "raw", arguments.split, recipe)
    staging = Staging(out, plan)
    todo = [
        UnitTask(
            number, unit, arguments.source, arguments.root, out, plan, arguments.num_frames, arguments.stride,
            arguments.height, arguments.width, arguments.geometry, arguments.min_confidence, frozenset(exclusions),
            captions,
        )
        for number, unit in enumerate(units)
        if number % arguments.world == arguments.rank and not staging.has(number)
    ]  # fmt: skip
    whole = staging.assemble()
    start, clips, size = time.monotonic(), 0, 0
    with Progress(total=len(units), initial=len(units) - len(todo), unit="unit") as bar:
        for result in run_parallel(convert_unit, [] if whole else todo, arguments.jobs):
            clips, size = clips + result.clips, size + result.bytes
            _report_unit(bar, result, clips, time.monotonic() - start)
            if staging.assemble():
                break
    if clips:
        log.info("%d clips, %.2f MB each", clips, size / clips / 1e6)
    if not staging.assemble():
        return None
    is_finished(out, "raw", recipe)  # removes what processes staged after a limit was reached
    return ShardSet.open(out)


def _report_unit(bar: Progress, result: UnitResult, clips: int, seconds: float) -> None:
    for dropped in result.dropped:
        bar.write(f"left out: {dropped.key or dropped.unit}: {dropped.reason}", file=sys.stderr)
    bar.set_postfix_str(f"{clips / max(seconds, 1e-9):.2f} clips/s")
    bar.update()


def _run(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = Arguments(**vars(args))
    check_folder(Path(arguments.out), "--out")
    shards = write(arguments)
    if shards is None:
        print(f"task {arguments.rank} of {arguments.world} is done; the others are not: {arguments.out}")
        return
    dropped = (Path(arguments.out) / "dropped.jsonl").read_text().splitlines()
    reasons = f", {len(dropped)} left out (dropped.jsonl tells why; a new --out tries them again)" if dropped else ""
    print(f"{len(shards)} clips in {len(shards.manifest.shards)} shards{reasons}: {arguments.out}")


main = Command("python -m data_prep.write_shards", __doc__, _add_arguments, _run)

if __name__ == "__main__":
    main.run_process()
