"""Curves of a run: losses per branch and task, gradient norms, link ratios, validation losses."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT

from one4d_pl.config import TrainConfig
from one4d_pl.training.checkpoint import VAL_TOTAL
from one4d_pl.training.module import One4DModule
from one4d_pl.training.zero import ZeroStrategy
from one4d_pl.types import MODALITIES, TASKS, Batch

log = logging.getLogger(__name__)

LINK_RATIO_WARNING = 0.5  # a link that adds half the hidden state's norm overrides the base instead of steering it


class LossCurves(Callback):
    """Logs losses per branch and task, gradient norms, link ratios and validation losses.

    The names are `train/{loss,loss_<task>}/{rgb,xyz}`, `train/grad_norm/*`, `train/link_ratio/*`
    and `val/loss/{rgb,xyz}`. Training losses are means over the finite losses of all ranks' samples
    since the last logged step.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.warned: set[str] = set()
        self.latest: dict[str, float] = {}  # modality -> last logged training loss

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        # [modality, task]: sums and counts in one tensor, so that one all-reduce serves every rank
        self.sums = torch.zeros(2, len(MODALITIES), len(TASKS), dtype=torch.float64)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.step = trainer.global_step

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # under ZeRO no process has whole gradients here; the engine knows their total norm after the step
        if (trainer.global_step + 1) % self.config.log_every or isinstance(trainer.strategy, ZeroStrategy):
            return
        metrics = {
            f"train/grad_norm/{group['name']}": torch.nn.utils.get_total_norm(
                [p.grad for p in group["params"] if p.grad is not None]
            ).item()
            for group in optimizer.param_groups
        }
        _log(trainer, metrics, trainer.global_step + 1)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(module, One4DModule) and isinstance(outputs, Mapping)
        tasks = torch.tensor([TASKS.index(task) for task in batch.tasks])
        for i, modality in enumerate(MODALITIES):
            losses = outputs[modality].double().cpu()
            finite = losses.isfinite()  # training/step_guard.py skips the steps of the others
            self.sums[0, i].index_add_(0, tasks, losses.where(finite, 0))
            self.sums[1, i].index_add_(0, tasks, finite.double())
            module.log(modality, losses.mean().float(), prog_bar=True, logger=False)
        if trainer.global_step == self.step or trainer.global_step % self.config.log_every:
            return
        self.step = trainer.global_step
        # a copy, since with one process reduce() returns its argument itself
        sums, counts = trainer.strategy.reduce(self.sums.clone().to(module.device), reduce_op="sum").cpu()
        self.sums.zero_()
        self.latest = {m: (sums[i].sum() / counts[i].sum()).item() for i, m in enumerate(MODALITIES)}
        metrics = {f"train/loss/{m}": loss for m, loss in self.latest.items()}
        for t in counts[0].nonzero()[:, 0].tolist():
            metrics |= {
                f"train/loss_{TASKS[t]}/{m}": (sums[i, t] / counts[i, t]).item() for i, m in enumerate(MODALITIES)
            }
        if isinstance(trainer.strategy, ZeroStrategy):
            metrics["train/grad_norm/all"] = float(trainer.strategy.deepspeed_engine.get_global_grad_norm() or 0.0)
        _log(trainer, metrics | self._link_ratios(module), self.step)

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, One4DModule)
        metrics = {f"val/loss/{m}": module.val_loss_of(m).compute().item() for m in MODALITIES}
        for modality in MODALITIES:
            module.val_loss_of(modality).reset()
        total = metrics["val/loss/rgb"] + module.config.flow.xyz_weight * metrics["val/loss/xyz"]
        module.log(VAL_TOTAL, total, logger=False, sync_dist=True)  # for training/checkpoint.py
        _log(trainer, metrics, trainer.global_step)
        if trainer.is_global_zero:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            log.info("step %d: %s", trainer.global_step, shown)

    def _link_ratios(self, module: One4DModule) -> dict[str, float]:
        ratios = {block: float(link.get_buffer("ratio")) for block, link in module.transformer.links.items()}
        for block, ratio in ratios.items():
            if ratio > LINK_RATIO_WARNING and block not in self.warned:
                self.warned.add(block)
                log.warning(
                    "control link after block %s adds %.2f of the hidden state's norm; lower optim.lr or "
                    "optim.link_lr_width", block, ratio,
                )  # fmt: skip
        return {f"train/link_ratio/block_{block}": ratio for block, ratio in ratios.items()}


def _log(trainer: Trainer, metrics: dict[str, float], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step)
        logger.save()  # flush, so that a killed run's curves reach as far as its checkpoint
