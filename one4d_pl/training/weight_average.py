"""An exponential moving average of the trainables, to validate, sample and export.

Each process averages what it holds of every trainable: the whole of it, or at ZeRO stage 3 its
share. During a validation, averages and weights are swapped. A checkpoint's adapter is the average;
the weights that training goes on with lie beside it (training/checkpoint.py).
"""

from __future__ import annotations

from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torch import Tensor, nn

from one4d_pl.models.adapters import adapter_tensors
from one4d_pl.training.module import One4DModule
from one4d_pl.training.step_guard import StepGuard
from one4d_pl.training.zero import cut_share, gather_share, local_share, show_shares


class WeightAverage(Callback):
    """Updates the average after every step that was not skipped; a callback between `StepGuard` and the checkpoints.

    The n-th update's decay is min(decay, (1 + n) / (10 + n)), so that the start is soon forgotten. `resume_from` is the
    checkpoint to resume; None = begin with the adapter as it is.
    """

    def __init__(self, decay: float, guard: StepGuard, resume_from: Path | None) -> None:
        self.decay, self.guard, self.resume_from = decay, guard, resume_from

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, One4DModule)
        self.parameters = [parameter for _, parameter in module.transformer.trainable_parameters()]
        self.averages = {parameter: local_share(parameter).clone() for parameter in self.parameters}
        self.step = trainer.global_step
        if self.resume_from is None:
            return
        for file, parameters in adapter_tensors(module.transformer).items():
            stored = load_file(self.resume_from / file)
            for name, parameter in parameters.items():
                self.averages[parameter].copy_(cut_share(parameter, stored[name]))

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            return  # in the middle of an accumulation
        self.step = trainer.global_step
        if self.guard.skips_step:
            return
        made = self.step - self.guard.skipped.total
        decay = min(self.decay, (1 + made) / (10 + made))
        shares = [local_share(parameter) for parameter in self.parameters]
        torch._foreach_lerp_(list(self.averages.values()), shares, 1 - decay)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Swap averages and weights; a collective at stage 3."""
        # Lightning validates in inference mode; training could not use tensors made in it
        with torch.inference_mode(False), torch.no_grad():
            for parameter, average in self.averages.items():
                share = local_share(parameter)
                kept = share.clone()
                share.copy_(average)
                average.copy_(kept)
            show_shares(self.parameters, trainer.optimizers[0])

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.on_validation_start(trainer, module)  # swap back

    def whole(self, parameter: Tensor) -> Tensor:
        """Gather a trainable's whole average, outside of validations; a collective if sharded."""
        assert isinstance(parameter, nn.Parameter)
        return gather_share(parameter, self.averages[parameter])
