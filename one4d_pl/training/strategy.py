"""From the config to a Lightning Trainer and its data."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

import lightning
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.progress import _ProcessedTracker
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from one4d_pl.config import Config
from one4d_pl.data.datamodule import One4DDataModule
from one4d_pl.models.device import device_of
from one4d_pl.models.precision import uses_bfloat16
from one4d_pl.models.sample_encoder import FrozenSampleEncoder
from one4d_pl.models.wan import ENCODER_PARTS, fingerprint
from one4d_pl.training.loggers import build_loggers
from one4d_pl.training.zero import ZeroStrategy

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # a process that waits longer for the others ends the run


def build_trainer(config: Config, callbacks: list[Callback], start_step: int = 0) -> lightning.Trainer:
    """Build a Trainer that stops at train.max_steps; its curves go on after `start_step`.

    It validates before the first step and every val.every steps.
    """
    train = config.train
    bfloat16 = uses_bfloat16(config, device_of(config))
    return lightning.Trainer(
        accelerator="gpu" if device_of(config).type == "cuda" else "cpu",
        strategy=_strategy(config, bfloat16),
        num_nodes=train.num_nodes,
        devices=train.devices,
        # DeepSpeed's strategy has a precision plugin of its own: training/zero.py
        precision=None if train.strategy == "deepspeed" else "bf16-mixed" if bfloat16 else 32,
        max_steps=train.max_steps,
        accumulate_grad_batches=train.accumulation,
        gradient_clip_val=config.optim.grad_clip,
        val_check_interval=config.val.every * train.accumulation,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,  # the curve starts at step 0
        log_every_n_steps=1,  # our callbacks decide when to log: train.log_every
        logger=build_loggers(config, start_step),
        callbacks=callbacks,
        # Lightning's own requeue saves inside a signal handler, where ranks would wait for each
        # other at different places
        plugins=[SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else None,
        enable_checkpointing=False,  # training/checkpoint.py does this
        enable_progress_bar=False,  # callbacks/throughput.py has one that counts optimiser steps
        enable_model_summary=False,
        use_distributed_sampler=False,  # Lightning would shuffle our ordered stream a second time
    )


def training_data(
    config: Config,
    on_progress: Callable[[], None] = lambda: None,
    between_clips: Callable[[], None] = lambda: None,
) -> One4DDataModule:
    """Return the run's data module. Its encoders are opened only where some clips are not encoded yet."""
    fingerprints = fingerprint(config.base.path, ENCODER_PARTS)
    return One4DDataModule(
        config, lambda device: FrozenSampleEncoder.of(config, device), fingerprints, on_progress, between_clips
    )


def fast_forward(trainer: lightning.Trainer, step: int, accumulation: int) -> None:
    """Set Lightning's counters to `step` finished optimiser steps, as its own checkpoints would."""
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped = step
    optimizer_step = loop.automatic_optimization.optim_progress.optimizer.step.total
    optimizer_step.ready = optimizer_step.completed = step
    batches = loop.batch_progress.total
    assert isinstance(batches, _ProcessedTracker)
    batches.ready = batches.started = batches.processed = batches.completed = step * accumulation


def limit_threads(config: Config) -> None:
    """Share this machine's cores between its processes, unless OMP_NUM_THREADS does: more threads are slower."""
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.train.devices))


def _strategy(config: Config, bfloat16: bool) -> Strategy:
    if config.train.strategy == "single":
        return SingleDeviceStrategy(device="cuda:0" if device_of(config).type == "cuda" else "cpu")
    if config.train.strategy == "deepspeed":
        return ZeroStrategy(config.train, bfloat16, COLLECTIVE_TIMEOUT)
    # every trainable is used in every step, whatever the task; the base has no buffers that change
    return DDPStrategy(
        find_unused_parameters=False, broadcast_buffers=False, gradient_as_bucket_view=True, timeout=COLLECTIVE_TIMEOUT
    )
