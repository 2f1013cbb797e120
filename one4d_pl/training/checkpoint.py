"""Checkpoints: an adapter folder plus optimiser state and step, the same under every strategy.

    step-00000100/   rgb/ xyz/ links.safetensors xyz_patch_embedding.safetensors card.json
                                             the adapter (models/adapters.py)
                     optimizer.safetensors   AdamW's two moments, named by parameter
                     weights.safetensors     with optim.ema_decay; the adapter is their average
                     trainer.json            step, config, every other file's sha256

Under every strategy whole tensors are gathered to rank 0 (training/zero.py), so a run can be resumed with any other
strategy and number of processes. Rank 0 writes them while training goes on, into a temporary folder that is then
renamed: a folder named step-* may be damaged later, but is never half-written. The position in the data
(data/sample_order.py) and the learning rate (optim.py) follow from the step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from one4d_pl.config import Config, ConfigError, as_dict, changeable, changes, flatten
from one4d_pl.data.datamodule import One4DDataModule, datamodule_of
from one4d_pl.data.latent_stats import LatentStats
from one4d_pl.data.masking import trained_tasks
from one4d_pl.data.tar_set import FLAGGED_NAME
from one4d_pl.errors import RunFailed
from one4d_pl.files import settle, sync
from one4d_pl.models.adapters import AdapterCard, adapter_tensors, save_adapters
from one4d_pl.models.transformer import CoupledTransformer
from one4d_pl.training.checkpoint_files import (
    STATE,
    checkpoint_folder,
    discard,
    discard_leftovers,
    hash_files,
    new_staging,
    read_step,
    superfluous,
    write_score,
)
from one4d_pl.training.module import WEIGHTS, One4DModule
from one4d_pl.training.step_guard import SkippedSteps, gather
from one4d_pl.training.weight_average import WeightAverage
from one4d_pl.training.zero import MOMENTS, fill_optimizer, link_moments, whole_moment, whole_parameter

VAL_TOTAL = "val/loss/total"  # the metric, by Lightning's name, that decides which checkpoints are the best
COOLDOWN_KEYS = ("optim.cooldown_steps", "train.max_steps")


def refuse_other_run(folder: Path, config: Config) -> None:
    """Raise ConfigError, naming the keys, if resuming would continue another sequence of updates.

    A knob that the checkpoint does not hold did not exist then; its default is what was done.
    """
    defaults, ours = flatten(as_dict(Config())), flatten(as_dict(config))
    stored = defaults | flatten(json.loads((folder / STATE).read_text())["config"])
    cooling = _cooldown_start(stored) < read_step(folder)
    may_change = changeable(Config)
    differing = changes(stored, ours, ignore=lambda key: may_change(key) and not (cooling and key in COOLDOWN_KEYS))
    if not differing and config.optim.cooldown_steps and not cooling and _cooldown_start(ours) < read_step(folder):
        raise ConfigError(
            f"optim.cooldown_steps: {config.optim.cooldown_steps} before train.max_steps={config.train.max_steps} "
            f"begin before step {read_step(folder)}, where {folder.parent.parent} resumes; raise train.max_steps"
        )
    if differing:
        raise ConfigError(
            f"run_dir: {folder.parent.parent} holds a run with another config: {', '.join(map(str, differing))}; "
            "set another run_dir, or train.init_from to start anew from its adapter"
        )


def refuse_other_clips(folder: Path, config: Config, clips_per_source: list[int]) -> None:
    """Raise ConfigError where a source has more or fewer clips now: another order would follow."""
    stored = json.loads((folder / STATE).read_text()).get("clips", clips_per_source)  # older checkpoints do not say
    for source, before, now in zip(config.data.sources, stored, clips_per_source, strict=True):
        if before != now:
            raise ConfigError(
                f"data.sources: {source.path} had {before} clips to train on at step {read_step(folder)}, now {now}; "
                f"put its {FLAGGED_NAME} back as it was, or set another run_dir and train.init_from={folder}"
            )


def read_skipped(folder: Path) -> SkippedSteps:
    """Read how many steps were skipped up to a checkpoint; 0 in checkpoints that do not say."""
    return SkippedSteps(**json.loads((folder / STATE).read_text()).get("skipped_steps", {}))


def load_optimizer(folder: Path, module: One4DModule, optimizer: torch.optim.Optimizer, made_steps: int) -> None:
    """Fill a fresh AdamW with a checkpoint's moments; `made_steps` excludes skipped steps."""
    names, parameters = zip(*module.transformer.trainable_parameters(), strict=True)
    with safe_open(folder / "optimizer.safetensors", framework="pt") as file:
        fill_optimizer(
            list(parameters), optimizer, made_steps, lambda i, moment: file.get_tensor(f"{names[i]}.{moment}")
        )


@dataclass(frozen=True)
class Snapshot:
    """Everything a checkpoint holds, on the CPU."""

    adapters: dict[str, dict[str, Tensor]]  # file -> name -> value
    weights: dict[str, Tensor]  # only where the adapter is their average
    moments: dict[str, Tensor]
    card: AdapterCard
    state: dict[str, object]  # of trainer.json


def take_snapshot(
    module: One4DModule,
    optimizer: torch.optim.Optimizer,
    step: int,
    skipped: SkippedSteps,
    datamodule: One4DDataModule,
    average: WeightAverage | None,
) -> Snapshot | None:
    """Copy what is trained to rank 0, a collective; return None on the other ranks."""
    first = module.global_rank == 0

    def keep(whole: Tensor, into: dict[str, Tensor], name: str) -> None:
        if first:
            into[name] = whole.detach().to("cpu", copy=True).contiguous()

    adapters: dict[str, dict[str, Tensor]] = {}
    for file, parameters in adapter_tensors(module.transformer).items():
        adapters[file] = {}
        for name, parameter in parameters.items():
            keep(average.whole(parameter) if average else whole_parameter(parameter), adapters[file], name)
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    link_moments(optimizer)
    for name, parameter in module.transformer.trainable_parameters():
        if average:
            keep(whole_parameter(parameter), weights, name)
        for moment in MOMENTS:
            keep(whole_moment(parameter, optimizer, moment), moments, f"{name}.{moment}")
    if not first:
        return None
    # on rank 0 alone, since this reads manifests and some clips
    card = _card(module, step, datamodule.describe_latents(), datamodule.describe_sources())
    state = {"step": step, "skipped_steps": asdict(skipped), "config": as_dict(module.config)}
    state["clips"] = datamodule.clips_per_source
    return Snapshot(adapters, weights, moments, card, state)


def write_checkpoint(folder: Path, snapshot: Snapshot, transformer: CoupledTransformer) -> None:
    """Write one checkpoint, atomically; remove what a killed writer of this run has left."""
    discard_leftovers(folder.parent)
    staging = new_staging(folder)
    staging.mkdir(parents=True)
    try:
        save_adapters(transformer, staging, snapshot.card, snapshot.adapters)
        save_file(snapshot.moments, staging / "optimizer.safetensors")
        if snapshot.weights:
            save_file(snapshot.weights, staging / WEIGHTS)
        state = {**snapshot.state, "sha256": hash_files(staging)}
        (staging / STATE).write_text(json.dumps(state, indent=1) + "\n")
        settle(staging)
        damaged = folder.exists() or folder.is_symlink()  # it is: a run never saves a step that it could resume
        if damaged:
            folder.rename(new_staging(folder))
        staging.rename(folder)
    except Exception:  # an error of the system, or of safetensors
        shutil.rmtree(staging, ignore_errors=True)  # the disk may be full
        raise
    sync(folder.parent)
    if damaged:
        discard_leftovers(folder.parent)


class BackgroundWriter:
    """A thread that runs one job at a time; a job's error is raised at the next call."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._job: Future[None] | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Start a job once the one before is done, so that memory holds one snapshot at most."""
        self.wait()
        self._job = self._executor.submit(job)

    def wait(self) -> None:
        """Wait until the job is done; raise what it raised."""
        job, self._job = self._job, None
        if job is not None:
            job.result()


class StepCheckpoint(Callback):
    """Saves every `train.save_every` steps and at the end; loads the optimiser on resume.

    It keeps the newest checkpoints and the best: those with the lowest validation loss
    (rgb + flow.xyz_weight * xyz) at their own step.
    """

    def __init__(
        self, config: Config, resume_from: Path | None, skipped: SkippedSteps, average: WeightAverage | None
    ) -> None:
        self.config, self.resume_from, self.skipped, self.average = config, resume_from, skipped, average
        self.writer = BackgroundWriter()

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Raise RunFailed where ranks found different newest checkpoints: file systems may lag."""
        steps = gather(trainer.global_step)
        if len(set(steps)) > 1:
            raise RunFailed(
                f"run_dir: the ranks see different checkpoints in {self.config.run_dir}: rank 0 goes on from step "
                f"{steps[0]}, rank {next(r for r, s in enumerate(steps) if s != steps[0])} from step "
                f"{next(s for s in steps if s != steps[0])}; start again"
            )

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, One4DModule)
        if self.resume_from is not None:
            refuse_other_clips(self.resume_from, self.config, datamodule_of(trainer).clips_per_source)
            skipped = read_skipped(self.resume_from)
            self.skipped.total, self.skipped.in_a_row = skipped.total, skipped.in_a_row
            load_optimizer(self.resume_from, module, trainer.optimizers[0], trainer.global_step - skipped.total)
        elif module.adapters is None:
            refuse_started_adapter(module.transformer)
        self.saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.config.train.save_every == 0 or step == self.config.train.max_steps:
            self.save(trainer, module)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        loss = trainer.callback_metrics.get(VAL_TOTAL)
        if trainer.is_global_zero and loss is not None and not trainer.sanity_checking:
            write_score(self.config.run_dir, trainer.global_step, float(loss))

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.writer.wait()

    def save(self, trainer: Trainer, module: LightningModule) -> None:
        """Save the present step, if it is not saved already: a collective; files are written in the background."""
        assert isinstance(module, One4DModule)
        step = trainer.global_step
        if step <= self.saved_step:
            return
        self.saved_step = step
        data = datamodule_of(trainer)
        snapshot = take_snapshot(module, trainer.optimizers[0], step, self.skipped, data, self.average)
        if snapshot is not None:
            self.writer.submit(partial(self._write, snapshot, step, module.transformer))

    def _write(self, snapshot: Snapshot, step: int, transformer: CoupledTransformer) -> None:
        write_checkpoint(checkpoint_folder(self.config.run_dir, step), snapshot, transformer)
        train = self.config.train
        for folder in superfluous(self.config.run_dir, train.keep_last, train.keep_best, step):
            discard(folder)


def refuse_started_adapter(transformer: CoupledTransformer) -> None:
    """Raise RuntimeError unless LoRA B and links are zero before the first step: it would train from noise."""
    for name, parameter in transformer.trainable_parameters():
        if (".lora_B." in name or name.startswith("links.")) and bool(whole_parameter(parameter).any()):
            raise RuntimeError(f"{name} is not zero before the first step: the strategy lost its initialisation")


def _card(
    module: One4DModule, step: int, latents: LatentStats | None, data_sources: list[dict[str, str]]
) -> AdapterCard:
    config, transformer = module.config, module.transformer
    return AdapterCard(
        base_path=config.base.path,
        base_fingerprint=module.base_fingerprint,
        rank=config.dlc.rank,
        lora_scale=config.dlc.lora_scale,
        link_blocks=[int(i) for i in transformer.links],
        tasks=[*trained_tasks(config.masking)],
        shift=config.flow.shift,
        step=step,
        num_frames=config.data.num_frames,
        height=config.data.height,
        width=config.data.width,
        max_text_tokens=config.base.max_text_tokens,
        negative_prompt=config.base.negative_prompt,
        sampler=asdict(config.sampler),
        latent_statistics=None if latents is None else asdict(latents),
        data_sources=data_sources,
        coupling=config.dlc.coupling,
        pointmap_power=transformer.codec.power,
        xyz_statistics=transformer.codec.statistics,
        base_quantisation=config.base.quantisation,
    )


def _cooldown_start(flat_config: dict[str, object]) -> int:
    """Return the first step whose learning rate the cooldown lowers; beyond the end without one."""
    cooldown, max_steps = (int(str(flat_config.get(key, 0))) for key in COOLDOWN_KEYS)
    return max_steps - cooldown + 1
