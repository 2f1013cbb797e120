"""Optimiser steps with a loss or gradient that is not finite are skipped: no weight changes.

1. One4DModule turns every gradient of a loss that is not finite into NaN, so it is enough to look at the gradients'
   norm.
2. All ranks have the same norm: under single and ddp the gradients are equal everywhere by then, and the ZeRO engine
   sums its norm over all ranks. So all ranks decide the same without a collective.
3. A skipped step changes no weight, no moment and none of AdamW's step counters. The position in the data and the
   learning rate follow the global step, which goes on. Checkpoints note how many steps were skipped, so that resuming
   stays exact.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from one4d_pl.config import TrainConfig
from one4d_pl.errors import RunFailed
from one4d_pl.training.module import One4DModule
from one4d_pl.training.zero import ZeroStrategy, fill_optimizer
from one4d_pl.types import MODALITIES, Batch

log = logging.getLogger(__name__)

Value = TypeVar("Value")

MOST_IN_A_ROW = 5  # so many are not due to one bad clip: the run has diverged, or its data are broken
MAX_NAMED = 8  # samples that an error names


@dataclass
class SkippedSteps:
    """How many optimiser steps of a run were skipped, over all its starts."""

    total: int = 0
    in_a_row: int = 0  # up to the latest step


@dataclass(frozen=True)
class MicroBatch:
    """The names and losses of a micro batch's samples, without their other tensors."""

    keys: tuple[str, ...]
    position: Tensor  # [B]
    losses: Tensor  # [2, B], rgb and xyz

    def names(self) -> list[str]:
        """Return a name for each sample."""
        return [f"{key} (position {at})" for key, at in zip(self.keys, self.position.tolist(), strict=True)]

    def not_finite(self) -> list[str]:
        """Return the names of the samples with a loss that is not finite."""
        finite = self.losses.isfinite().all(0).tolist()
        return [name for name, good in zip(self.names(), finite, strict=True) if not good]


class StepGuard(Callback):
    """Skips steps whose loss or gradient is not finite; logs `train/skipped_steps`.

    A warning names the samples. After MOST_IN_A_ROW skipped steps in a row, RunFailed names them on
    every rank. In the list of callbacks it comes before the checkpoints.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.skipped = SkippedSteps()
        self.skips_step = False
        # the micro batches of the present step; their losses are read only after a skip, so that
        # other steps do not wait for the device
        self.seen: list[MicroBatch] = []
        self.suspects: list[str] = []  # this rank's samples with bad losses, over the skipped steps in a row

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.step = trainer.global_step

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if isinstance(trainer.strategy, ZeroStrategy):
            return  # the engine checks its norm and skips the step itself
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.skips_step = not bool(norm.isfinite())
        if self.skips_step:
            for parameter in parameters:
                parameter.grad = None  # AdamW then leaves the parameter, its moments and its counter alone

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(module, One4DModule) and isinstance(outputs, Mapping)
        losses = torch.stack([outputs[modality] for modality in MODALITIES])
        self.seen.append(MicroBatch(batch.keys, batch.position, losses))
        if trainer.global_step == self.step:
            return  # in the middle of an accumulation
        self.step = trainer.global_step
        if isinstance(trainer.strategy, ZeroStrategy):
            self.skips_step = bool(trainer.strategy.deepspeed_engine.optimizer.overflow)
        if self.skips_step:
            self._note_skip(trainer, module)
        else:
            self.skipped.in_a_row = 0
            self.suspects.clear()
        self.seen.clear()
        if self.step % self.config.log_every == 0:
            for logger in trainer.loggers:
                logger.log_metrics({"train/skipped_steps": float(self.skipped.total)}, self.step)

    def _note_skip(self, trainer: Trainer, module: One4DModule) -> None:
        self.skipped.total += 1
        self.skipped.in_a_row += 1
        if self.skipped.total == self.step:
            begin_moments(module, trainer.optimizers[0])
        bad = [name for seen in self.seen for name in seen.not_finite()]
        self.suspects += bad
        if bad:
            log.warning("step %d is skipped: the loss of %s is not finite", self.step, _listed(bad))
        elif trainer.is_global_zero:
            log.warning("step %d is skipped: a gradient, or another rank's loss, is not finite", self.step)
        if self.skipped.in_a_row >= MOST_IN_A_ROW:
            # where losses are finite and gradients are not, any sample of the last step may be the cause
            samples = [name for seen in self.seen for name in seen.names()]
            gathered = gather((self.suspects, samples))
            names = [n for suspects, _ in gathered for n in suspects] or [n for _, all_ in gathered for n in all_]
            raise RunFailed(
                f"train: {self.skipped.in_a_row} steps in a row, up to {self.step}, had a loss or gradient that is not "
                f"finite; samples: {_listed(names)}. Leave them out where their data are broken; else lower optim.lr "
                "and start anew from an earlier checkpoint (train.init_from)"
            )


def begin_moments(module: One4DModule, optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW the zero moments of its first step, for checkpoints before that step."""
    parameters = [parameter for _, parameter in module.transformer.trainable_parameters()]
    shapes = [parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape for parameter in parameters]
    fill_optimizer(parameters, optimizer, 0, lambda i, moment: torch.zeros(shapes[i]))


def _listed(names: list[str]) -> str:
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - MAX_NAMED} more" if len(unique) > MAX_NAMED else ""
    return ", ".join(unique[:MAX_NAMED]) + more


def gather(mine: Value) -> list[Value]:
    """Collect every rank's value, rank after rank; a collective."""
    if not torch.distributed.is_initialized():
        return [mine]
    values = [mine for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(values, mine)
    return values
