"""A run's use of time: seconds per step, waiting for data, the share of the peak FLOP/s."""

from __future__ import annotations

import logging
import resource
import sys
import time

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from one4d_pl.callbacks.losses import LossCurves
from one4d_pl.config import Config, ConfigError, TrainConfig
from one4d_pl.costs.flops import Flops, TransformerShape, peak_flops, training_flops
from one4d_pl.costs.memory import batch_of
from one4d_pl.data.datamodule import TimedLoader
from one4d_pl.models.base_files import image_tokens, resolve_base
from one4d_pl.progress import Progress
from one4d_pl.training.module import One4DModule
from one4d_pl.types import Batch

log = logging.getLogger(__name__)

GIB = 2**30


class Throughput(Callback):
    """Logs `train/time/{step_s,data_wait,samples_per_s}` and `data/skipped`, a count.

    Times are means over the steps since the last logged one, without validation; data_wait is a share.
    """

    def __init__(self, config: TrainConfig, max_skip_share: float) -> None:
        self.config, self.max_skip_share = config, max_skip_share
        self.samples = self.skipped = 0
        self.latest: dict[str, float] = {}  # what was last logged

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.step, self.step_began, self.waited = trainer.global_step, time.perf_counter(), _waited(trainer)
        self.window = [0.0, 0.0, 0.0]  # steps, seconds, seconds of waiting since the last logged step

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self.samples += len(batch)
        self.skipped += len(batch.skipped)
        # with up to two broken samples there are too few to compare a share
        if self.skipped > max(2, self.max_skip_share * self.samples):
            raise ConfigError(
                f"data.max_skip_share: {self.skipped} of the first {self.samples} samples of this process were broken, "
                f"more than {self.max_skip_share:.0%}; the last was {batch.skipped[-1] if batch.skipped else 'above'}"
            )

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if trainer.global_step == self.step:
            return  # in the middle of an accumulation
        steps, seconds = trainer.global_step - self.step, now - self.step_began
        waited, self.waited = _waited(trainer) - self.waited, _waited(trainer)
        module.log("s/step", seconds / steps, prog_bar=True, logger=False)
        module.log("wait", waited / seconds, prog_bar=True, logger=False)
        self.window = [a + b for a, b in zip(self.window, (steps, seconds, waited), strict=True)]
        self.step, self.step_began = trainer.global_step, now
        if self.step % self.config.log_every == 0:
            steps_since, seconds_since, waited_since = self.window
            self.window = [0.0, 0.0, 0.0]
            self.latest = {
                "train/time/step_s": seconds_since / steps_since,
                "train/time/data_wait": waited_since / seconds_since,
                "train/time/samples_per_s": self.config.global_batch_size * steps_since / seconds_since,
                "data/skipped": float(self.skipped),
            }
            for logger in trainer.loggers:
                logger.log_metrics(self.latest, self.step)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.step_began = time.perf_counter()  # a step's time does not include validation


def _waited(trainer: Trainer) -> float:
    """Return the seconds that training has waited for batches since the run began."""
    assert isinstance(trainer.train_dataloader, TimedLoader)
    return trainer.train_dataloader.waited_s


class StepLine(Callback):
    """Writes a line per `train.log_every` steps from rank 0: losses, time, hardware, memory.

    It also logs `train/flops/{tflops,mfu,hfu}` and `train/memory/gib`, the peak, of one process:
    operations where costs/flops.py can count them, MFU and HFU where it knows the device's peak
    too. It comes after LossCurves and Throughput, whose numbers it shows.
    """

    def __init__(self, config: Config, losses: LossCurves, throughput: Throughput) -> None:
        self.config, self.losses, self.throughput = config, losses, throughput

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, One4DModule)
        train = self.config.train
        self.step = trainer.global_step
        self.on_gpu = module.device.type == "cuda"
        self.flops: Flops | None = None
        if self.config.dlc.coupling == "decoupled":
            shape = TransformerShape.of(dict(module.transformer.base.config), self.config.dlc)
            batch = batch_of(self.config, image_tokens(resolve_base(self.config.base.path)))
            self.flops = training_flops(shape, batch, train.activation_checkpointing, self.on_gpu) * train.accumulation
        name = torch.cuda.get_device_name(module.device) if self.on_gpu else "cpu"
        self.peak = peak_flops(name, train.precision)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero or trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        if self.step % self.config.train.log_every:
            return
        metrics = self._metrics(self.throughput.latest["train/time/step_s"])
        for logger in trainer.loggers:
            logger.log_metrics(metrics, self.step)
        with Progress.external_write_mode():  # writes above the progress bar, not into it
            shown = self.throughput.latest | metrics
            log.info("%s", step_line(self.step, self.config.train.max_steps, self.losses.latest, shown))

    def _metrics(self, step_s: float) -> dict[str, float]:
        if self.on_gpu:
            memory = torch.cuda.max_memory_allocated()
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux reports KiB
        metrics = {"train/memory/gib": memory / GIB}
        if self.flops is not None:
            metrics["train/flops/tflops"] = self.flops.model / step_s / 1e12
        if self.flops is not None and self.peak is not None:
            metrics["train/flops/mfu"] = self.flops.model / step_s / self.peak
            metrics["train/flops/hfu"] = self.flops.hardware / step_s / self.peak
        return metrics


def step_line(step: int, max_steps: int, losses: dict[str, float], metrics: dict[str, float]) -> str:
    """Write the line of one logged step."""
    parts = [f"step {step}/{max_steps}", *(f"{name} {loss:.4f}" for name, loss in losses.items())]
    parts.append(f"{metrics['train/time/step_s']:.3g} s/step")
    parts.append(f"{metrics['train/time/samples_per_s']:.3g} samples/s")
    parts.append(f"data wait {metrics['train/time/data_wait']:.1%}")
    if "train/flops/tflops" in metrics:
        parts.append(f"{metrics['train/flops/tflops']:.3g} TFLOP/s")
    if "train/flops/mfu" in metrics:
        parts += [f"MFU {metrics['train/flops/mfu']:.1%}", f"HFU {metrics['train/flops/hfu']:.1%}"]
    parts.append(f"{metrics['train/memory/gib']:.3g} GiB")
    return " | ".join(parts)


class StepBar(Callback):
    """A progress bar over optimiser steps, with an ETA; on rank 0 only, and only in a terminal."""

    bar: Progress | None = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.bar = Progress(
            total=trainer.max_steps,
            initial=trainer.global_step,
            unit="step",
            disable=not (trainer.is_global_zero and sys.stderr.isatty()),
        )

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        assert self.bar is not None
        if trainer.global_step > self.bar.n:
            shown = {name: f"{value:.3g}" for name, value in trainer.progress_bar_metrics.items()}
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(trainer.global_step - self.bar.n)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        assert self.bar is not None
        self.bar.close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if self.bar is not None:
            self.bar.close()  # so that the error gets a line of its own
