"""one4d evaluate: run an adapter over a benchmark and score it, or score anyone's stored predictions.

Without arguments the demo adapters are evaluated on the procedural benchmark `toy`.

  --bench tasks    every task on --clips held-out clips of the adapters' own toy world, each number beside its goal
  --bench toy      fixed procedural scenes, needs nothing
  --bench sintel   --root holds training/{final,depth,camdata_left} of MPI Sintel
  --bench bonn     --root holds rgbd_bonn_balloon2, ..._crowd2, ..._crowd3, ..._person_tracking2, ..._synchronous
  --bench tum      --root holds the eight rgbd_dataset_freiburg3_{sitting,walking}_*; tum_30 takes 30 frames, not 90
  --bench vbench   --root is VBench's folder vbench2_beta_i2v: writes videos for its I2V suite, scores nothing

Predictions are stored first (OUT/predictions) and scored after; what is stored is not made again. OUT gets table.md
(laid out as the paper's, published rows beside ours), results.json, sequences.csv and pictures/. Protocols monst3r,
geo4d and cut3r are the published computations, early stops included; one4d and scale_only fit exactly. On two cores
each scores Sintel within half an hour.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from one4d_pl.commands.command import Command
from one4d_pl.config import DEMO_ADAPTERS, Config, ConfigError, load_config
from one4d_pl.files import check_folder

if TYPE_CHECKING:
    from one4d_pl.evaluation.run import Request

log = logging.getLogger("one4d_pl")


def _run(args: argparse.Namespace) -> None:
    """Check everything that needs no torch, then evaluate."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    config, adapters = (None, ()) if args.predictions else find_model(args)
    request = _request(args)
    check_folder(request.out, "--out")
    if args.bench in ("tasks", "vbench"):
        if config is None or len(adapters) != 1:
            raise ConfigError(f"--bench {args.bench}: needs one adapter folder (--ckpt)")
        if args.bench == "tasks":
            from one4d_pl.evaluation.tasks import evaluate_tasks

            print(evaluate_tasks(config, adapters[0], args.clips, request.out).text, end="")
        else:
            from one4d_pl.evaluation.run import generate_vbench

            generate_vbench(request, config, adapters[0], args.ratio, args.fps)
    else:
        from one4d_pl.evaluation.run import evaluate

        print(evaluate(request, config, adapters), end="")
    log.info("written: %s", request.out / "videos" if args.bench == "vbench" else request.out)


def find_model(args: argparse.Namespace) -> tuple[Config, tuple[Path, ...]]:
    """Find the config, and the adapter folders: several for --sweep checkpoint, none for the ceiling alone.

    ConfigError says what is missing and the cure.
    """
    rows = args.rows.split(",")
    adapters = tuple(args.ckpt or [DEMO_ADAPTERS]) if "model" in rows else ()
    for folder in adapters:
        if not (folder / "card.json").is_file():
            what = "the demo adapters are not at" if folder == DEMO_ADAPTERS else "--ckpt: no adapter (card.json) at"
            cure = (
                "train some with `python -m one4d_pl.fit --config configs/dlc.yaml` and name a checkpoint with --ckpt"
            )
            raise ConfigError(f"{what} {folder}; {cure}")
    if args.sweep != "checkpoint" and len(adapters) > 1:
        raise ConfigError("--ckpt: several adapters are compared by --sweep checkpoint")
    configs = args.config or [str(_config_beside(adapters))]
    return load_config(configs, args.overrides), adapters


def _config_beside(adapters: tuple[Path, ...]) -> Path:
    """Find the config that trained a checkpoint (<run>/config.yaml), or the demo's."""
    for folder in adapters:
        run = folder.resolve().parent.parent / "config.yaml"
        if run.is_file():
            return run
    if adapters and adapters[0] != DEMO_ADAPTERS:
        raise ConfigError(f"--config: name the yaml that trained {adapters[0]} (no config.yaml in its run folder)")
    return Path("configs/demo.yaml")


def _request(args: argparse.Namespace) -> Request:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as fit does
    from one4d_pl.evaluation.protocols import PROTOCOLS
    from one4d_pl.evaluation.run import Request

    if args.protocol not in PROTOCOLS:
        raise ConfigError(f"--protocol: {args.protocol!r} is not one of {', '.join(PROTOCOLS)}")
    if not 0 < args.sparsity <= 1:
        raise ConfigError(f"--sparsity: {args.sparsity}, need a share of frames above 0 and at most 1")
    processes = (1 if args.bench == "toy" else 2) if args.processes is None else args.processes
    if args.clips < 2:
        raise ConfigError(f"--clips: {args.clips}, need 2 or more (one clip's condition is tried on another)")
    if processes < 1:
        raise ConfigError(f"--processes: {processes}, need 1 or more")
    rows = tuple(args.rows.split(","))
    if set(rows) - {"model", "ceiling"}:
        raise ConfigError(f"--rows: {args.rows!r}, need model, ceiling or model,ceiling")
    return Request(
        bench=args.bench,
        root=args.root,
        out=args.out or Path("runs") / "eval" / args.bench,
        protocol=PROTOCOLS[args.protocol],
        sequences=tuple(name for name in args.sequences.split(",") if name),
        predictions=args.predictions,
        rows=rows,
        shape=args.shape,
        one_pass=args.passes == "one",
        overlap=args.overlap,
        sparsity=args.sparsity,
        sweep=args.sweep,
        seed=args.seed,
        processes=processes,
        pictures=not args.no_pictures,
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--bench", choices=("toy", "tasks", "sintel", "bonn", "tum", "tum_30", "vbench"), default="toy")
    add("--root", type=Path, help="folder of the benchmark's files (toy needs none)")
    add("--ckpt", type=Path, action="append", metavar="FOLDER", help="adapter folder; default: the demo adapters")
    add("--config", action="append", metavar="FILE", help="yaml of the run; default: the one beside the checkpoint")
    add("--predictions", type=Path, metavar="FOLDER", help="score these instead: one folder or npz per sequence")
    add("--protocol", default="one4d", help="monst3r, geo4d, cut3r, one4d (default) or scale_only")
    add("--out", type=Path, help="default: runs/eval/BENCH")
    add("--sequences", default="", metavar="A,B", help="only these; the table then says how many are missing")
    add("--rows", default="model,ceiling", help="what to run: model, ceiling (true pointmaps through the VAE) or both")
    add("--shape", choices=("no_squash", "letterbox"), default="no_squash", help="how images fit the model's frame")
    add("--passes", choices=("one", "windows"), default="one", help="one pass up to 113 frames, or overlapping windows")
    add("--overlap", type=int, default=5, help="frames that neighbouring windows share (default 5)")
    add("--sparsity", type=float, default=1.0, help="share of frames that the model is given (default 1)")
    add("--sweep", choices=("sparsity", "guidance", "steps", "checkpoint"), help="one row per value of this")
    add("--seed", type=int, default=0, help="of the sampler's noise")
    add("--processes", type=int, help="for scoring; default 2, 1 for toy, where starting one costs more than it saves")
    add("--no-pictures", action="store_true", help="no depth strips and camera paths")
    add("--clips", type=int, default=64, help="tasks: held-out clips to measure on (default %(default)s)")
    add("--ratio", default="16-9", help="vbench: aspect ratio of its images (1-1, 8-5, 7-4, 16-9)")
    add("--fps", type=float, default=16.0, help="vbench: frame rate of the model's videos, written into the file")
    add("overrides", nargs="*", metavar="section.key=value", help="of the config, e.g. sampler.steps=20")


main = Command("one4d evaluate", __doc__, _add_arguments, _run)
