"""Convert one dataset to raw shards: python -m data_prep.write_shards --source tartanair --root ... --out ...

The folder that it leaves holds `shard-000000.tar` ... (plain WebDataset) and `manifest.json`, written last; training
opens it by its path or by the URL it is copied to. The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from data_prep.sources import tartanair
from one4d_pl.data.shards import write_shards
from one4d_pl.types import DOMAINS, Clip

SOURCES = ("tartanair", "toy")


@dataclass(frozen=True)
class Arguments:
    """The command line, typed."""

    source: str
    root: str | None
    out: str
    num_frames: int
    stride: int
    height: int | None
    width: int | None
    samples_per_shard: int
    limit: int | None
    seed: int
    count: int
    domain: str

    def __post_init__(self) -> None:
        if (self.height is None) != (self.width is None):
            raise ValueError("--height and --width go together")
        if self.count < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError("--count and --limit must be at least 1")
        if self.source == "toy":
            if self.height is None or self.root is not None or self.stride != 1:
                raise ValueError("--source toy needs --height and --width, and takes no --root and no --stride")
        elif self.root is None:
            raise ValueError(f"--source {self.source} needs --root, the folder of the dataset")


def parse(argv: Sequence[str] | None) -> Arguments:
    """The command line as Arguments; exits with code 2 on an unknown or malformed option."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.write_shards",
        description="Convert one dataset to raw shards (WebDataset tars and a manifest).",
        epilog="example: python -m data_prep.write_shards --source toy --out toy --height 64 --width 64 --count 32",
    )
    parser.add_argument("--source", required=True, choices=SOURCES, help="which dataset")
    parser.add_argument("--root", help="folder of the downloaded dataset (not for toy)")
    parser.add_argument("--out", required=True, help="folder to write; must not hold shards yet")
    parser.add_argument(
        "--num-frames", type=int, default=17, help="frames per clip, 4k+1 from 17 to 81 (default %(default)s)"
    )
    parser.add_argument("--stride", type=int, default=1, help="take every n-th frame (default %(default)s)")
    parser.add_argument("--height", type=int, help="resize, with a centre crop, to this height; default: as it is")
    parser.add_argument("--width", type=int, help="... and width in pixels")
    parser.add_argument("--samples-per-shard", type=int, default=64, help="clips per tar (default %(default)s)")
    parser.add_argument("--limit", type=int, help="stop after so many clips; default: all")
    toy = parser.add_argument_group("toy", "the procedural world; takes no dataset")
    toy.add_argument("--count", type=int, default=32, help="clips to render (default %(default)s)")
    toy.add_argument(
        "--seed", type=int, default=0, help="the i-th clip is rendered from seed + i (default %(default)s)"
    )
    toy.add_argument("--domain", choices=DOMAINS, default=DOMAINS[0], help="look of the clips (default %(default)s)")
    return Arguments(**vars(parser.parse_args(argv)))


def iter_source(arguments: Arguments) -> Iterator[Clip]:
    """The clips of the chosen source, resized where asked."""
    height, width = arguments.height, arguments.width
    if arguments.source == "toy":
        from one4d_pl.data.toy_world import render_clip

        assert height is not None and width is not None  # Arguments saw to it
        for seed in range(arguments.seed, arguments.seed + arguments.count):
            yield render_clip(seed, arguments.num_frames, height, width, arguments.domain)
        return
    assert arguments.root is not None
    clips = tartanair.iter_clips(arguments.root, arguments.num_frames, arguments.stride)
    if height is None or width is None:
        yield from clips
        return
    from one4d_pl.data.decode import resize_clip

    for clip in clips:
        yield resize_clip(clip, height, width)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the shards; 0, or 2 after one line on stderr that tells what is wrong with the input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        arguments = parse(argv)
        clips = itertools.islice(iter_source(arguments), arguments.limit)
        with tqdm(clips, unit="clip") as progress:
            shards = write_shards(progress, arguments.out, arguments.samples_per_shard)
    except (ValueError, OSError) as error:
        print(f"write_shards: {error}", file=sys.stderr)
        return 2
    print(f"{len(shards)} clips in {len(shards.manifest.shards)} shards: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
