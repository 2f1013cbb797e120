"""python -m experiments.tiny_wan.build_vae --out FOLDER --minutes N [--resume]: train the tiny Wan's VAE.

With --finish VAE it trains the decoder of a finished VAE further, at the tiny scale's 9 frames of 48x64: the encoder,
and so the latents, the base and adapters trained on them, stay as they are.

Trains on clips that it renders itself (synthetic seeds from 0, real from 2 000 000; held out: synthetic from 1 000 000,
the toy world's own offsets). Every few minutes FOLDER gets the state to resume from, a point of the curve on held-out
clips, and the VAE so far (vae/, diffusers layout, half precision); at the end metrics.json, with a PCA for comparison.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from one4d_pl.commands.command import Command
from one4d_pl.errors import UserError
from one4d_pl.files import check_folder, replaced_folder, write_json

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

    from experiments.tiny_wan.vae import ClipPool, Quality, TinyVaeConfig, VaeTraining

log = logging.getLogger("one4d_pl")

SYNTHETIC_CLIPS, REAL_CLIPS, HELD_OUT_CLIPS = 500, 150, 32
FINISHED_SIZE = (9, 48, 64)  # frames, height, width of configs/scale/tiny.yaml
CURVE_CLIPS = 8  # held-out clips of each point of the curve
STATISTICS_CLIPS = 64  # training clips over which the latents' mean and std are measured
EVALUATE_SECONDS = 240.0  # of training between two points of the curve


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="gets vae/, state.safetensors and metrics.json")
    parser.add_argument("--minutes", type=float, required=True, help="training time; the schedule is stretched to it")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's state.safetensors")
    parser.add_argument(
        "--pointmaps",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train on pointmaps too, as the shipped one; Wan's own VAE never saw any",
    )
    parser.add_argument("--finish", type=Path, metavar="VAE", help="folder of a VAE whose decoder to train further")


def _run(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    check_folder(args.out, "--out")
    state = args.out / "state.safetensors"
    if args.resume != state.exists():
        hint = "is not there to resume; leave --resume away" if args.resume else "exists; pass --resume or remove it"
        raise UserError(f"{state} {hint}")

    from experiments.tiny_wan.vae import TinyVaeConfig, finishing_config

    config = TinyVaeConfig(pointmaps=args.pointmaps)
    if args.finish is not None:
        if not (args.finish / "config.json").is_file():
            raise UserError(f"--finish: {args.finish} holds no VAE (no config.json)")
        config = finishing_config(config, *FINISHED_SIZE)
    try:
        build(args.out, 60 * args.minutes, args.resume, config, args.finish)
    except ValueError as error:
        raise UserError(str(error)) from None


def build(folder: Path, budget_s: float, resume: bool, config: TinyVaeConfig, finish: Path | None) -> None:
    """Render the clips, train for `budget_s` seconds of training steps, write VAE and metrics."""
    from diffusers import AutoencoderKLWan

    from experiments.tiny_wan.vae import VaeTraining, build_vae, evaluate, load_training, pca_baseline

    folder.mkdir(parents=True, exist_ok=True)
    if resume:
        training = load_training(folder / "state.safetensors", config)
    elif finish is not None:
        training = VaeTraining.start(AutoencoderKLWan.from_pretrained(finish, low_cpu_mem_usage=False))
    else:
        training = VaeTraining.start(build_vae(config))
    train, held_out = render_pools(config)
    baseline = pca_baseline(train, held_out, config.z_dim)
    _report("PCA", baseline)
    _train(training, train, held_out, config, budget_s, folder)
    vae = AutoencoderKLWan.from_pretrained(folder / "vae", low_cpu_mem_usage=False)  # float32 from what lies on disk
    quality = evaluate(vae.eval(), held_out, bfloat16=False)
    _report("VAE ", quality)
    figures = {
        "minutes": training.seconds / 60,
        "steps": training.step,
        "config": asdict(config),
        "vae": {kind: asdict(q) for kind, q in quality.items()},
        "pca": {kind: asdict(q) for kind, q in baseline.items()},
        "curve": [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()],
    }
    write_json(folder / "metrics.json", figures)
    log.info("wrote %s", folder / "vae")


def render_pools(config: TinyVaeConfig) -> tuple[ClipPool, ClipPool]:
    """Render the training and the held-out clips, as large as the last stage's crops.

    Seeds follow the toy world's own offsets.
    """
    from experiments.tiny_wan.vae import render_pool
    from one4d_pl.config import DataConfig
    from one4d_pl.data.datamodule import REAL_SEED_OFFSET, VAL_SEED_OFFSET

    data = DataConfig()
    whole = config.stages[-1]
    shape = (whole.num_frames, whole.height, whole.width, data.far_limit, data.z_offset)
    seen = (config.level, config.pointmap_power)
    # domains are mixed, so that the first clips, over which latents are measured, have both
    clips = [(seed, "synthetic") for seed in range(SYNTHETIC_CLIPS)]
    every = SYNTHETIC_CLIPS // REAL_CLIPS
    for i in range(REAL_CLIPS):
        clips.insert(i * (every + 1) + every, (REAL_SEED_OFFSET + i, "real"))
    train = render_pool(clips, *shape, *seen)
    held_out = render_pool([(VAL_SEED_OFFSET + i, "synthetic") for i in range(HELD_OUT_CLIPS)], *shape, *seen)
    return train, held_out


def _train(
    training: VaeTraining, train: ClipPool, held_out: ClipPool, config: TinyVaeConfig, budget_s: float, folder: Path
) -> None:
    from experiments.tiny_wan.vae import evaluate, save_training, train_step
    from one4d_pl.progress import Progress

    few = held_out.first(CURVE_CLIPS)
    bar = Progress(total=round(budget_s), initial=round(training.seconds), unit="s", desc="training")
    while training.seconds < budget_s:
        before = monotonic()
        train_step(training, train, config, training.seconds / budget_s)
        elapsed = monotonic() - before
        due = int((training.seconds + elapsed) / EVALUATE_SECONDS) > int(training.seconds / EVALUATE_SECONDS)
        training.seconds += elapsed
        bar.update(round(training.seconds) - bar.n)
        if due or training.seconds >= budget_s:
            save_training(training, config, folder / "state.safetensors")
            vae = export(training, config, train, folder / "vae", bfloat16=training.seconds < budget_s)
            quality = evaluate(vae, few, bfloat16=True)
            point: dict[str, object] = {"minutes": training.seconds / 60, "step": training.step}
            point |= {kind: asdict(q) for kind, q in quality.items()}
            with (folder / "curve.jsonl").open("a") as file:
                file.write(json.dumps(point) + "\n")
            _report(f"{training.seconds / 60:5.1f} min, step {training.step}", quality)
    bar.close()


def export(
    training: VaeTraining, config: TinyVaeConfig, train: ClipPool, folder: Path, bfloat16: bool
) -> AutoencoderKLWan:
    """Write the averaged VAE, in half precision and with statistics of its latents; return it."""
    from experiments.tiny_wan.vae import measure_latents

    vae = training.averaged_vae()
    if not config.decoder_only:  # a finished VAE keeps its latents and their statistics
        measure_latents(vae, train, STATISTICS_CLIPS, bfloat16)
    with replaced_folder(folder) as staging:
        vae.half().save_pretrained(staging)
    return vae.float()


def _report(name: str, quality: dict[str, Quality]) -> None:
    frames, points = quality["frames"], quality["pointmaps"]
    log.info(
        "%s: frames %.2f dB | pointmaps %.2f dB, relative point error %.4f (of sums %.4f) | by frame %s / %s",
        name, frames.psnr, points.psnr, points.point_error, points.point_error_of_sums,
        " ".join(f"{frames.psnr_per_frame[t]:.1f}" for t in range(0, len(frames.psnr_per_frame), 4)),
        " ".join(f"{points.psnr_per_frame[t]:.1f}" for t in range(0, len(points.psnr_per_frame), 4)),
    )  # fmt: skip


main = Command("python -m experiments.tiny_wan.build_vae", __doc__, _add_arguments, _run)

if __name__ == "__main__":
    main.run_process()
