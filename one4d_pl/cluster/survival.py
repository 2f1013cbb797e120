"""What lets a run survive: all ranks obey a signal together, and a hang is noticed."""

from __future__ import annotations

import logging
import signal

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from one4d_pl.cluster.restarts import forget_starts, write_marker
from one4d_pl.cluster.signals import Stop
from one4d_pl.cluster.watchdog import HangWatchdog
from one4d_pl.config import Config
from one4d_pl.training.checkpoint import StepCheckpoint
from one4d_pl.training.checkpoint_files import checkpoint_folder
from one4d_pl.training.module import One4DModule

log = logging.getLogger(__name__)


class Preempted(Exception):
    """Raised on every rank at the same place, once what is needed to go on has been saved."""

    def __init__(self, step: int, number: int) -> None:
        super().__init__(f"{signal.Signals(number).name} after step {step}")
        self.step, self.number = step, number


class Preemption(Callback):
    """At every step boundary: has any rank got a signal? Then save, leave the marker, and end the run on every rank.

    Asked too where start-up and validation allow it, since they can take longer than the warning of a scheduler. Comes
    after every callback that has something to do at a step.
    """

    def __init__(self, config: Config, stop: Stop, checkpoint: StepCheckpoint) -> None:
        self.config, self.stop, self.checkpoint = config, stop, checkpoint

    def setup(self, trainer: lightning.Trainer, module: lightning.LightningModule, stage: str) -> None:
        self.step = self.start_step = trainer.global_step
        self.progressed = self.stop.training = False
        self._obey(trainer, module)  # before the base is opened, minutes at the paper's scale

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._obey(trainer, module)

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._obey(trainer, module)

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.stop.training = True

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self.step:
            return  # in the middle of an accumulation
        self.step = trainer.global_step
        if self.step < trainer.max_steps:  # else it ends anyway
            self._obey(trainer, module)
        if trainer.is_global_zero and not self.progressed:
            self._note_progress()

    def _note_progress(self) -> None:
        """A new checkpoint is on the disk (they are written in the background): restarts count anew."""
        saved_step = self.checkpoint.saved_step
        self.progressed = saved_step > self.start_step and checkpoint_folder(self.config.run_dir, saved_step).is_dir()
        if self.progressed:
            forget_starts(self.config.run_dir)

    def _obey(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        number = _agreed(trainer, self.stop.number)
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
        trainer.strategy.barrier("preempted")  # nobody leaves before the marker is there
        raise Preempted(step, number)


def _agreed(trainer: lightning.Trainer, number: int) -> int:
    """The largest signal number that any rank has got; a collective."""
    if trainer.world_size == 1:
        return number
    largest = torch.tensor(number, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest)


class Heartbeat(Callback):
    """Runs the hang watchdog from the first sign of life on: a clip encoded ahead, a pass through the transformer."""

    watchdog: HangWatchdog | None = None

    def __init__(self, config: Config, rank: int) -> None:
        self.run_dir, self.rank, self.timeout_s = config.run_dir, rank, 60 * config.train.hang_minutes

    def beat(self) -> None:
        """Something moved."""
        if self.watchdog is None and self.timeout_s:
            self.watchdog = HangWatchdog(self.run_dir, self.rank, self.timeout_s)
            self.watchdog.start()
        elif self.watchdog is not None:
            self.watchdog.beat()

    def setup(self, trainer: lightning.Trainer, module: lightning.LightningModule, stage: str) -> None:
        self.beat()

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        assert isinstance(module, One4DModule)
        self.beat()
        # training, validation and every callback that samples pass here, and nothing else does
        module.transformer.register_forward_hook(lambda *arguments: self.beat())

    def teardown(self, trainer: lightning.Trainer, module: lightning.LightningModule, stage: str) -> None:
        if self.watchdog is not None:
            self.watchdog.stop()

    def on_exception(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException
    ) -> None:
        if self.watchdog is not None:
            self.watchdog.stop()
