"""python -m experiments.tiny_wan.build_base --config configs/tiny_base.yaml: pretrain the tiny Wan on RGB video.

Builds a bundle around a trained VAE (see build_vae), trains its transformer and text encoder as an RGB inpainting
video model on the toy world, and leaves the averaged weights as a diffusers folder at run_dir/wan. Run again to resume.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from one4d_pl.commands.command import Command
from one4d_pl.config import EMBEDDED_BASE, Config, ConfigError, base_folder, load_config
from one4d_pl.config.places import DIFFUSERS_MARK
from one4d_pl.files import check_folder

log = logging.getLogger("one4d_pl")

SHIPPED_VAE = base_folder(EMBEDDED_BASE) / "vae"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vae", type=Path, default=SHIPPED_VAE, help="diffusers folder; default: the shipped one")
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="yaml; later files win")
    parser.add_argument("--images", action="store_true", help="train on first frames by their captions alone")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def _run(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    config = load_config(args.config, args.overrides)
    if not (args.vae / "config.json").is_file():
        raise ConfigError(f"--vae: no VAE at {args.vae}; make it with `python -m experiments.tiny_wan.build_vae`")
    check_folder(Path(config.run_dir), "run_dir")
    build(config, args.vae, args.images)


def build(config: Config, vae_folder: Path, images: bool = False) -> None:
    """Pretrain to train.max_steps, from where the run folder's state left off."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as fit does

    from diffusers import AutoencoderKLWan

    from experiments.tiny_wan.base import BaseState, TinyBaseModule
    from experiments.tiny_wan.tokenizer import toy_tokenizer
    from one4d_pl.callbacks.throughput import StepBar, Throughput
    from one4d_pl.data.datamodule import One4DDataModule
    from one4d_pl.models.sample_encoder import FrozenSampleEncoder
    from one4d_pl.models.tiny import build_tiny_wan
    from one4d_pl.models.wan import fingerprint
    from one4d_pl.training.library_messages import quieten
    from one4d_pl.training.strategy import build_trainer, fast_forward, limit_threads

    quieten()
    limit_threads(config)
    base = config.base
    if base.tiny is None:
        raise ConfigError("base.tiny: gives the shape of the base to build, and is null")
    vae = AutoencoderKLWan.from_pretrained(vae_folder, low_cpu_mem_usage=False)
    if not (Path(base.path) / DIFFUSERS_MARK).is_file():
        build_tiny_wan(Path(base.path), base.tiny, vae, toy_tokenizer())
    # the latents depend on the VAE alone; the text encoder is being trained
    encoders = fingerprint(base.path, ("vae",))
    datamodule = One4DDataModule(config, lambda device: FrozenSampleEncoder.of(config, device), encoders)
    state = BaseState(config)
    datamodule.start_step = state.step()
    if datamodule.start_step >= config.train.max_steps:
        log.info("nothing to do: %s has reached train.max_steps", config.run_dir)
        return
    callbacks = [Throughput(config.train, config.data.max_skip_share), state, StepBar()]
    trainer = build_trainer(config, callbacks, datamodule.start_step)
    fast_forward(trainer, datamodule.start_step, config.train.accumulation)
    trainer.fit(TinyBaseModule(config, images), datamodule=datamodule)


main = Command("python -m experiments.tiny_wan.build_base", __doc__, _add_arguments, _run)

if __name__ == "__main__":
    main.run_process()
