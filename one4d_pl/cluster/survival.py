"""Callbacks that let a run survive: all ranks stop together at a signal, and a hang is noticed."""

from __future__ import annotations

import logging
import signal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from one4d_pl.cluster.restarts import forget_starts, write_marker
from one4d_pl.cluster.signals import Stop
from one4d_pl.cluster.watchdog import HangWatchdog
from one4d_pl.config import Config
from one4d_pl.training.checkpoint import StepCheckpoint
from one4d_pl.training.checkpoint_files import checkpoint_folder
from one4d_pl.training.module import One4DModule

log = logging.getLogger(__name__)

SIGNALLED = "one4d_pl/signalled"  # key in the process group's store


class Preempted(Exception):
    """Raised on every rank at the same place, once everything is saved that resuming needs."""

    def __init__(self, step: int, number: int) -> None:
        super().__init__(f"{signal.Signals(number).name} after step {step}")
        self.number = number


class Preemption(Callback):
    """Ends the run on every rank when any rank got a signal, after a checkpoint and the marker.

    It checks at every step boundary, and also during start-up, between clips that are encoded ahead, and after
    validations, since these can take longer than a scheduler's warning. It comes after every callback that has
    something to do at a step.
    """

    def __init__(self, config: Config, stop: Stop, checkpoint: StepCheckpoint) -> None:
        self.config, self.stop, self.checkpoint = config, stop, checkpoint

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self.step = self.start_step = trainer.global_step
        self.progressed = self.stop.training = False
        self._stop_if_asked(trainer, module)  # before the base is opened, which takes minutes at the paper's scale

    def between_clips(self, trainer: Trainer) -> None:
        """Stop the run while clips are encoded ahead of it, before `setup`.

        The ranks encode at their own pace and cannot agree after every clip. So the first one that got a signal tells
        the others through the store by which they have found each other.
        """
        if _any_rank_signalled(trainer, self.stop.number):
            self._stop_if_asked(trainer, trainer.lightning_module)

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._stop_if_asked(trainer, module)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._stop_if_asked(trainer, module)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.stop.training = True

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            return  # in the middle of an accumulation
        self.step = trainer.global_step
        if self.step < trainer.max_steps:  # else the run ends anyway
            self._stop_if_asked(trainer, module)
        if trainer.is_global_zero and not self.progressed:
            self._note_progress()

    def _note_progress(self) -> None:
        """Reset the count of restarts once a checkpoint that is written in the background is on the disk."""
        saved_step = self.checkpoint.saved_step
        self.progressed = saved_step > self.start_step and checkpoint_folder(self.config.run_dir, saved_step).is_dir()
        if self.progressed:
            forget_starts(self.config.run_dir)

    def _stop_if_asked(self, trainer: Trainer, module: LightningModule) -> None:
        """Save, leave the marker and raise Preempted if any rank got a signal; a collective."""
        number = _largest_signal(trainer, self.stop.number)
        if not number:
            return
        step = trainer.global_step
        if self.stop.training:
            self.checkpoint.save(trainer, module)
            self.checkpoint.writer.wait()
        if trainer.is_global_zero:
            if self.stop.training:
                self._note_progress()
            if number != signal.SIGINT:
                write_marker(self.config.run_dir, step, number)
        trainer.strategy.barrier("preempted")  # no rank leaves before the marker is written
        raise Preempted(step, number)


def _largest_signal(trainer: Trainer, number: int) -> int:
    """Return the largest signal number that any rank has got; a collective."""
    if trainer.world_size == 1:
        return number
    largest = torch.tensor(number, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest)


def _any_rank_signalled(trainer: Trainer, number: int) -> bool:
    """Tell, without waiting for anyone, whether a rank got a signal; `number` is this one's or 0."""
    if trainer.world_size == 1:
        return number != 0
    store = torch.distributed.distributed_c10d._get_default_store()
    if number:
        store.set(SIGNALLED, str(number))
    return bool(store.check([SIGNALLED]))


class Heartbeat(Callback):
    """Runs the hang watchdog from the first progress on: a clip encoded ahead, or a pass of the transformer."""

    watchdog: HangWatchdog | None = None

    def __init__(self, config: Config, rank: int) -> None:
        self.run_dir, self.rank, self.timeout_s = config.run_dir, rank, 60 * config.train.hang_minutes

    def beat(self) -> None:
        """Note that the run has made progress; the first call starts the watchdog."""
        if self.watchdog is None and self.timeout_s:
            self.watchdog = HangWatchdog(self.run_dir, self.rank, self.timeout_s)
            self.watchdog.start()
        elif self.watchdog is not None:
            self.watchdog.beat()

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self.beat()

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, One4DModule)
        self.beat()
        # training, validation and every callback that samples call the transformer, and nothing else does
        module.transformer.register_forward_hook(lambda *arguments: self.beat())

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if self.watchdog is not None:
            self.watchdog.stop()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if self.watchdog is not None:
            self.watchdog.stop()
