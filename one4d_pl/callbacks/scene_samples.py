"""Scenes sampled from the validation clips while training, once for every callback that measures or draws them."""

from __future__ import annotations

import lightning
from lightning.pytorch.callbacks import Callback

from one4d_pl.config import EvalConfig
from one4d_pl.inference.pipeline import GeneratedScene
from one4d_pl.training.module import One4DModule
from one4d_pl.types import Batch


class SceneSamples(Callback):
    """Samples `eval.clips` scenes, split over the ranks, at the first validation after every `eval.every` steps."""

    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        self.scenes: list[tuple[Batch, GeneratedScene]] = []  # of this rank; empty where none are due
        self.next_step = 0

    def setup(self, trainer: lightning.Trainer, module: lightning.LightningModule, stage: str) -> None:
        # a resumed run goes on with the cadence of the undisturbed one
        self.next_step = -(-trainer.global_step // self.config.every) * self.config.every

    def on_validation_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.scenes = []
        self.due = trainer.global_step >= self.next_step
        if self.due:
            self.next_step = (trainer.global_step // self.config.every + 1) * self.config.every

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(module, One4DModule)
        # validation batches hold one clip; the loader gives clip rank, rank + world, ... to this rank
        if self.due and batch_idx * trainer.world_size + trainer.global_rank < self.config.clips:
            self.scenes.append((batch, module.sample(batch, self.config.steps)))
