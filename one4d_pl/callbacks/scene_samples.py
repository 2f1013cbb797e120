"""Scenes sampled while training, shared by the callbacks that measure or draw them."""

from __future__ import annotations

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from one4d_pl.callbacks.cadence import Cadence
from one4d_pl.config import EvalConfig
from one4d_pl.inference.pipeline import GeneratedScene
from one4d_pl.training.module import One4DModule
from one4d_pl.types import Batch


class SceneSamples(Callback):
    """Samples `eval.clips` scenes at the first validation after every `eval.every` steps.

    They are split over the ranks. Every rank samples equally often, since under ZeRO-3 a forward
    pass is a collective; surplus scenes are dropped.
    """

    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        self.scenes: list[tuple[Batch, GeneratedScene]] = []  # of this rank; empty where none are due
        self.cadence = Cadence(config.every)

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self.cadence.start(trainer.global_step)

    def on_validation_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.scenes = []
        self.due = self.cadence.due(trainer.global_step)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(module, One4DModule)
        # a validation batch holds one clip; this rank has clips rank, rank + world, ...
        first = batch_idx * trainer.world_size
        if not self.due or first >= self.config.clips:
            return
        scene = module.sample(batch, self.config.steps)
        if first + trainer.global_rank < self.config.clips and batch.counted.all():
            self.scenes.append((batch, scene))
