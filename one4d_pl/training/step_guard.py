"""A loss or gradient that is not finite costs its optimiser step, nothing else: the weights stay those before.

1. One4DModule makes every gradient of a loss that is not finite NaN, so the gradients' norm alone
   tells.
2. All ranks share that norm: under single and ddp the gradients are the same everywhere by then,
   and the ZeRO engine sums its norm over all ranks. So all decide alike and no collective is added.
3. A skipped step changes no weight, no moment and none of AdamW's step counters. The position in
   the data and the learning rate follow the global step, which goes on. Checkpoints note how many
   were skipped: resume stays exact.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import lightning
import torch
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

MOST_IN_A_ROW = 5  # then it is no single bad clip: the run has diverged, or its data are broken
NAMED = 8  # samples that an error names


@dataclass
class SkippedSteps:
    """How many optimiser steps of a run were skipped, over all its starts."""

    total: int = 0
    in_a_row: int = 0  # up to now


@dataclass(frozen=True)
class MicroBatch:
    """What names the samples of a micro batch, without their tensors."""

    keys: tuple[str, ...]
    position: Tensor  # [B]
    losses: Tensor  # [2, B], rgb and xyz

    def names(self) -> list[str]:
        return [f"{key} (position {at})" for key, at in zip(self.keys, self.position.tolist(), strict=True)]

    def not_finite(self) -> list[str]:
        finite = self.losses.isfinite().all(0).tolist()
        return [name for name, good in zip(self.names(), finite, strict=True) if not good]


class StepGuard(Callback):
    """Skips steps whose loss or gradient is not finite; logs `train/skipped_steps`, warns with the samples' names.

    RunFailed, which names them, on every rank after MOST_IN_A_ROW steps in a row. Comes before what
    saves.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.skipped = SkippedSteps()
        self.vetoed = False
        # of each micro batch of the step at hand; looked at after a skip only, so that no step
        # waits for the device
        self.seen: list[MicroBatch] = []
        self.suspects: list[str] = []  # this rank's samples whose losses had steps skipped, one after the other

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.step = trainer.global_step

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if isinstance(trainer.strategy, ZeroStrategy):
            return  # the engine looks at its norm, and skips the step itself
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.vetoed = not bool(norm.isfinite())
        if self.vetoed:
            for parameter in parameters:
                parameter.grad = None  # AdamW leaves these alone, with their moments and counters

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        assert isinstance(module, One4DModule) and isinstance(outputs, Mapping)
        losses = torch.stack([outputs[modality] for modality in MODALITIES])
        self.seen.append(MicroBatch(batch.keys, batch.position, losses))
        if trainer.global_step == self.step:
            return  # in the middle of an accumulation
        self.step = trainer.global_step
        if isinstance(trainer.strategy, ZeroStrategy):
            self.vetoed = bool(trainer.strategy.deepspeed_engine.optimizer.overflow)
        if self.vetoed:
            self._note_skip(trainer, module)
        else:
            self.skipped.in_a_row = 0
            self.suspects.clear()
        self.seen.clear()
        if self.step % self.config.log_every == 0:
            for logger in trainer.loggers:
                logger.log_metrics({"train/skipped_steps": float(self.skipped.total)}, self.step)

    def _note_skip(self, trainer: lightning.Trainer, module: One4DModule) -> None:
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
            # where losses are finite and gradients are not, any sample of the last step may have
            # done it
            samples = [name for seen in self.seen for name in seen.names()]
            everyones = gather((self.suspects, samples))
            names = [n for suspects, _ in everyones for n in suspects] or [n for _, all_ in everyones for n in all_]
            raise RunFailed(
                f"train: {self.skipped.in_a_row} steps in a row, up to {self.step}, had a loss or gradient that is not "
                f"finite; samples: {_listed(names)}. Leave them out where their data are broken; else lower optim.lr "
                "and start anew from an earlier checkpoint (train.init_from)"
            )


def begin_moments(module: One4DModule, optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW the zeros that it makes in its first step: a checkpoint before that step holds moments too."""
    parameters = [parameter for _, parameter in module.transformer.trainable_parameters()]
    shapes = [parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape for parameter in parameters]
    fill_optimizer(parameters, optimizer, 0, lambda i, moment: torch.zeros(shapes[i]))


def _listed(names: list[str]) -> str:
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - NAMED} more" if len(unique) > NAMED else ""
    return ", ".join(unique[:NAMED]) + more


def gather(mine: Value) -> list[Value]:
    """Collect every rank's value, rank after rank; a collective."""
    if not torch.distributed.is_initialized():
        return [mine]
    everyone = [mine for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everyone, mine)
    return everyone
