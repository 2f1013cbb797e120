"""Encode raw shards once: python -m data_prep.encode_latents --config configs/dlc.yaml --config ... [a.b=c]

Writes encoded shards (latents of frames and pointmaps, embeddings, conditioning latents of frame 0 alone and of K
sparse draws) of every folder of data.sources, or of --raw. Without --out they lie beside the raw shards, where `fit`
finds them as its cache; with it they are entries of data.sources that train alone, without raw shards and without the
VAE, and clips that check_shards flagged are not among them.
With --rank and --world it is one task of an array job (slurm/prep.sh); it can be stopped and started again.
"""

from __future__ import annotations

import argparse
import functools
import logging
from dataclasses import dataclass
from pathlib import Path

from one4d_pl.commands.command import Command
from one4d_pl.config import Config, ConfigError, load_config
from one4d_pl.files import check_folder


@dataclass(frozen=True)
class Arguments:
    """The command line, typed."""

    config: list[str]
    raw: str | None
    out: str | None
    sparse_draws: int
    device: str
    rank: int
    world: int
    overrides: list[str]

    def __post_init__(self) -> None:
        if self.out is not None and self.raw is None:
            raise ConfigError("--out needs --raw: which folder is encoded there?")
        if self.sparse_draws < 0 or not 0 <= self.rank < self.world:
            raise ConfigError("need --sparse-draws >= 0 and 0 <= --rank < --world")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="yaml, as for fit")
    parser.add_argument("--raw", metavar="FOLDER", help="raw shards; default: every folder of data.sources")
    parser.add_argument("--out", metavar="FOLDER", help="of one --raw folder; default: beside it, as the cache of fit")
    parser.add_argument("--sparse-draws", type=int, default=4, metavar="K", help="per clip (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto: see train.accelerator (default %(default)s)")
    parser.add_argument("--rank", type=int, default=0, help="number of this task of an array job (default %(default)s)")
    parser.add_argument("--world", type=int, default=1, help="tasks of the array job (default %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. data.num_frames=49")


def encode(arguments: Arguments, config: Config) -> list[str]:
    """Encode this task's share of every folder; return one line on each."""
    import torch

    from one4d_pl.data.datamodule import video_sample_maker
    from one4d_pl.data.encoded import EncodedSet, cache_folder, encode_set, encoding_recipe
    from one4d_pl.data.shards import ShardSet
    from one4d_pl.models.device import device_of
    from one4d_pl.models.sample_encoder import FrozenSampleEncoder
    from one4d_pl.models.wan import ENCODER_PARTS, fingerprint

    base = config.base
    device = device_of(config) if arguments.device == "auto" else torch.device(arguments.device)
    recipe = encoding_recipe(fingerprint(base.path, ENCODER_PARTS), base.max_text_tokens, config.data)
    open_encoders = functools.cache(lambda: FrozenSampleEncoder.of(config, device))
    lines = []
    for location in [arguments.raw] if arguments.raw else [source.path for source in config.data.sources]:
        raw = ShardSet.open(location)
        if arguments.out:  # of a cache `fit` takes what it needs
            raw = raw.without_flagged()
        if arguments.out is None and "://" in location:
            raise ConfigError(f"{location}: nothing can be written beside a URL; give --raw and --out")
        folder = Path(arguments.out) if arguments.out else cache_folder(location, recipe)
        make = video_sample_maker(raw, config.data)
        check_folder(
            folder, "--out" if arguments.out else "data.sources", "" if arguments.out else "give --raw and --out"
        )
        draws, task = arguments.sparse_draws, (arguments.rank, arguments.world)
        if encode_set(raw, folder, recipe, draws, open_encoders, make, *task):
            whole = EncodedSet.open(folder)
            size = sum(shard.bytes for shard in whole.manifest.shards) / len(whole)
            lines.append(f"{len(whole)} of {len(raw)} clips, {draws} sparse draws, {size / 1e6:.2f} MB each: {folder}")
        else:
            lines.append(f"task {arguments.rank} of {arguments.world} is done; the others are not: {folder}")
    return lines


def _run(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = Arguments(**vars(args))
    lines = encode(arguments, load_config(arguments.config, arguments.overrides))
    print("\n".join(lines))


main = Command("python -m data_prep.encode_latents", __doc__, _add_arguments, _run)

if __name__ == "__main__":
    main.run_process()
