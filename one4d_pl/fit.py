"""python -m one4d_pl.fit --config configs/dlc.yaml: train Decoupled LoRA Control on a frozen Wan."""

from __future__ import annotations

from one4d_pl.cluster.signals import STOP, Stop, die_with_launcher, early_rank, end_process, exit_code
from one4d_pl.errors import RunFailed, UserError
from one4d_pl.files import check_folder, write_text
from one4d_pl.interrupts import INTERRUPTED, at_interrupt

if __name__ == "__main__":  # before the other imports, so that a signal during them is remembered
    STOP.watch()
    die_with_launcher()

import argparse
import logging
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from one4d_pl.cluster.readiness import refuse_absent_packages
from one4d_pl.cluster.restarts import begin_start, forget_starts, note_end
from one4d_pl.cluster.watchdog import rank_log
from one4d_pl.commands.command import Command
from one4d_pl.config import Config, ConfigError, EvalConfig, check_paths, initial_adapters, load_config, to_yaml
from one4d_pl.training.library_messages import quieten
from one4d_pl.training.run_lock import sole_run

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback


log = logging.getLogger("one4d_pl")

LARGE_SCALE = (
    "python -m one4d_pl.fit --config configs/dlc.yaml --config configs/scale/wan_14b.yaml "
    "--config configs/data/one4d_mix.yaml"
)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="yaml; later files win")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. train.max_steps=50")


def _run(args: argparse.Namespace) -> int:
    """Check what needs no torch, then train; return the exit code (cluster/signals.py)."""
    config = load_config(args.config, args.overrides)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    check_paths(config)
    refuse_absent_packages(config)
    check_folder(Path(config.run_dir), "run_dir")
    rank = early_rank(config.train.devices)
    with sole_run(config.run_dir) if rank == 0 else nullcontext():
        if rank == 0:
            begin_start(config.run_dir, config.train.max_restarts)
        with rank_log(config.run_dir, rank):
            return _fit_counted(config, rank)


def _fit_counted(config: Config, rank: int) -> int:
    """Run `fit` and note, for the next start, how it ended; return the exit code."""

    def forget() -> None:
        if rank == 0:
            forget_starts(config.run_dir)

    try:
        with at_interrupt(forget):
            code = fit(config, STOP)
        reason = f"exit code {code}" if code else ""
    except (KeyboardInterrupt, SystemExit):  # Lightning raises SystemExit after a KeyboardInterrupt
        forget()  # a person stopped it: the restart limit is for runs that nobody watches
        return INTERRUPTED
    except RunFailed as failure:  # every rank raises the same: one line is enough
        if rank == 0:
            print(f"error: {failure}", file=sys.stderr)
        code, reason = 1, str(failure)[:300]
    except Exception as error:
        if is_mistake(error, STOP.training):
            forget()
            raise
        log.exception("rank %d failed", rank)
        code, reason = 1, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if rank == 0:
        note_end(config.run_dir, reason) if code else forget_starts(config.run_dir)
    return code


def is_mistake(error: Exception, training: bool) -> bool:
    """Tell whether the user has to act before another start can work.

    A store or disk that fails while the run trains may work again at the next start; a wrong knob,
    a broken clip or a lost shard will not.
    """
    from one4d_pl.data.shards import SampleError, ShardSetError, StoreError

    if isinstance(error, ConfigError | SampleError | ShardSetError):
        return not (training and isinstance(error, StoreError))
    return isinstance(error, UserError) and not training


def fit(config: Config, stop: Stop | None = None) -> int:
    """Prepare the data, resume where a checkpoint lies, train to train.max_steps or until `stop`.

    Returns 0. Where a signal has stopped it early, it has written a checkpoint and the marker file,
    and returns that signal's exit code on rank 0.
    """
    stop = Stop() if stop is None else stop
    quieten()
    # before torch loads OpenMP: threads that spin while they wait make a busy machine ten times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    import torch  # heavy imports only after every cheap check

    from one4d_pl.models.device import device_of
    from one4d_pl.models.precision import describe_precision

    log.info(
        "one4d_pl fit: scale %s in %s, run folder %s; the paper's scale: %s",
        config.scale, describe_precision(config, device_of(config)), config.run_dir, LARGE_SCALE,
    )  # fmt: skip

    import lightning
    import transformers

    from one4d_pl.callbacks.losses import LossCurves
    from one4d_pl.callbacks.throughput import StepBar, StepLine, Throughput
    from one4d_pl.cluster.survival import Heartbeat, Preempted, Preemption
    from one4d_pl.data.shared_memory import refuse_small_shared_memory
    from one4d_pl.models.cuda_driver import driver_mismatch
    from one4d_pl.models.transformer import describe_sizes
    from one4d_pl.training.checkpoint import StepCheckpoint, refuse_other_run
    from one4d_pl.training.checkpoint_files import newest_checkpoint, read_step, refuse_used_folder
    from one4d_pl.training.loggers import finish_loggers
    from one4d_pl.training.module import One4DModule
    from one4d_pl.training.step_guard import StepGuard
    from one4d_pl.training.strategy import build_trainer, fast_forward, limit_threads, training_data
    from one4d_pl.training.weight_average import WeightAverage

    refuse_small_shared_memory(config)
    if config.scale == "tiny" and torch.cuda.device_count() > 1:
        log.warning("the tiny scale on %d GPUs: did you mean %s ?", torch.cuda.device_count(), LARGE_SCALE)
    if mismatch := driver_mismatch():
        log.warning("%s", mismatch)
    transformers.utils.logging.disable_progress_bar()  # it draws one per file that is opened, over ours
    limit_threads(config)
    lightning.seed_everything(config.train.seed, verbose=False)
    if not config.train.resume:
        refuse_used_folder(config.run_dir)
    resume_from = newest_checkpoint(config.run_dir)
    start_step = 0
    if resume_from is not None:
        refuse_other_run(resume_from, config)
        start_step = read_step(resume_from)
        log.info("resuming %s at step %d of %d", resume_from, start_step, config.train.max_steps)
    if start_step >= config.train.max_steps:
        log.info("nothing to do: %s has reached train.max_steps", config.run_dir)
        return 0
    if early_rank(config.train.devices) == 0:
        write_text(Path(config.run_dir) / "config.yaml", to_yaml(config))

    heartbeat = Heartbeat(config, early_rank(config.train.devices))
    module = One4DModule(config, adapters=resume_from or initial_adapters(config), resume=resume_from is not None)
    guard = StepGuard(config.train)
    average = WeightAverage(config.optim.ema_decay, guard, resume_from) if config.optim.ema_decay else None
    checkpoint = StepCheckpoint(config, resume_from, guard.skipped, average)
    throughput, losses = Throughput(config.train, config.data.max_skip_share), LossCurves(config.train)
    preemption = Preemption(config, stop, checkpoint)
    callbacks = [
        heartbeat,
        throughput,
        losses,
        guard,
        *([average] if average else []),
        StepLine(config, losses, throughput),
        *scene_callbacks(config.eval),
        checkpoint,
        StepBar(),
        preemption,
    ]
    trainer = build_trainer(config, callbacks, start_step)
    datamodule = training_data(config, heartbeat.beat, lambda: preemption.between_clips(trainer))
    datamodule.start_step = start_step
    fast_forward(trainer, start_step, config.train.accumulation)
    try:
        with at_interrupt(checkpoint.writer.wait):
            trainer.fit(module, datamodule=datamodule)
    except Preempted as stopped:
        log.info("stopped by %s; the same command goes on from there", stopped)
        return exit_code(stopped.number) if trainer.is_global_zero else 0
    finally:
        checkpoint.writer.wait()  # a checkpoint that is being written is finished, whatever ended the run
        finish_loggers(trainer)
    log.info("adapter: %s; trainables %s", config.run_dir, describe_sizes(module.transformer.parameter_counts()))
    return 0


def scene_callbacks(config: EvalConfig) -> list[Callback]:
    """Build the callbacks that sample, measure and draw scenes in training; none for an interval of 0."""
    from one4d_pl.callbacks.geometry_eval import GeometryEval
    from one4d_pl.callbacks.scene_samples import SceneSamples
    from one4d_pl.callbacks.video_eval import VideoEval
    from one4d_pl.callbacks.visualize import Visualize

    callbacks: list[Callback] = []
    if config.every:
        samples = SceneSamples(config)
        callbacks += [samples, GeometryEval(samples), Visualize(samples)]
    if config.video_every:
        callbacks.append(VideoEval(config))
    return callbacks


main = Command("python -m one4d_pl.fit", __doc__, _add_arguments, _run)

if __name__ == "__main__":
    end_process(lambda: main(sys.argv[1:]))
