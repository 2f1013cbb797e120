"""Where a run's time goes: seconds per optimiser step, the share spent waiting for data, and the progress bar."""

from __future__ import annotations

import time

import lightning
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from one4d_pl.config import ConfigError, TrainConfig
from one4d_pl.types import Batch


class Throughput(Callback):
    """Logs `train/time/step_s` and `train/time/data_wait` (share), and counts skipped samples as `data/skipped`."""

    def __init__(self, config: TrainConfig, max_skip_share: float) -> None:
        self.config, self.max_skip_share = config, max_skip_share
        self.samples = self.skipped = 0

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.step, self.step_began, self.waiting_since = trainer.global_step, time.perf_counter(), time.perf_counter()
        self.waited = 0.0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self.waited += time.perf_counter() - self.waiting_since
        self.samples += len(batch)
        self.skipped += len(batch.skipped)
        # the first two batches of a run are too few to judge a share by
        if self.skipped > max(2, self.max_skip_share * self.samples):
            raise ConfigError(
                f"data.max_skip_share: {self.skipped} of the first {self.samples} samples of this process were broken, "
                f"more than {self.max_skip_share:.0%}; the last was {batch.skipped[-1] if batch.skipped else 'above'}"
            )

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        now = time.perf_counter()
        self.waiting_since = now
        if trainer.global_step == self.step:
            return  # in the middle of an accumulation
        steps, seconds = trainer.global_step - self.step, now - self.step_began
        metrics = {
            "train/time/step_s": seconds / steps,
            "train/time/data_wait": self.waited / seconds,
            "data/skipped": float(self.skipped),
        }
        module.log("s/step", metrics["train/time/step_s"], prog_bar=True, logger=False)
        module.log("wait", metrics["train/time/data_wait"], prog_bar=True, logger=False)
        if trainer.global_step % self.config.log_every == 0:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, trainer.global_step)
        self.step, self.step_began, self.waited = trainer.global_step, now, 0.0

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.waiting_since = self.step_began = time.perf_counter()  # validation is neither step nor wait


class StepBar(Callback):
    """A progress bar over optimiser steps, with an ETA; rank 0 only."""

    bar: tqdm | None = None

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            unit="step",
            dynamic_ncols=True,
            disable=not trainer.is_global_zero,
        )

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        assert self.bar is not None
        if trainer.global_step > self.bar.n:
            shown = {name: f"{value:.3g}" for name, value in trainer.progress_bar_metrics.items()}
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(trainer.global_step - self.bar.n)

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        assert self.bar is not None
        self.bar.close()

    def on_exception(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException
    ) -> None:
        if self.bar is not None:
            self.bar.close()  # the error's line must not be glued to the bar
