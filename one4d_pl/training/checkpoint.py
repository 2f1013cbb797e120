"""Checkpoints: an adapter folder plus optimiser state and step; safetensors and json, the same under every strategy.

    step-00000100/   rgb/ xyz/ links.safetensors xyz_patch_embedding.safetensors card.json    (models/adapters.py)
                     optimizer.safetensors   AdamW's two moments, named by parameter
                     trainer.json            step, config, sha256 of every other file

Written beside its place and renamed, so a folder named step-* is whole or damaged later, never half-written. The
position in the data follows from the step (data/order.py) and the learning rate too (optim.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from one4d_pl.config import Config, ConfigError
from one4d_pl.data.datamodule import One4DDataModule
from one4d_pl.models.adapters import AdapterCard, save_adapters
from one4d_pl.training.module import One4DModule
from one4d_pl.types import TASKS

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP_FOLDER = re.compile(r"step-(\d{8})")
# what may change between the parts of one run without changing the sequence of updates
FREE_KEYS = (
    "run_dir", "scale", "sampler", "val", "eval", "base.path", "base.negative_prompt", "base.tiny", "data.toy",
    "data.val_sources", "data.num_workers", "data.cache_latents", "data.max_skip_share", "train.max_steps",
    "train.micro_batch_size", "train.strategy", "train.zero_stage", "train.offload", "train.num_nodes",
    "train.devices", "train.activation_checkpointing", "train.init_from", "train.resume", "train.save_every",
    "train.keep_last", "train.log_every", "train.hang_minutes", "train.max_restarts",
    "optim.cooldown_steps",  # with train.max_steps, as long as no cooldown has begun: see refuse_other_run
)  # fmt: skip


COOLDOWN_KEYS = ("optim.cooldown_steps", "train.max_steps")


def checkpoint_folder(run_dir: str, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def newest_checkpoint(run_dir: str) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones are named and passed over."""
    folders = sorted(f for f in (Path(run_dir) / "checkpoints").glob("step-*") if STEP_FOLDER.fullmatch(f.name))
    for folder in reversed(folders):
        fault = _fault(folder)
        if fault is None:
            return folder
        log.warning("checkpoint %s is damaged (%s); trying the one before", folder, fault)
    return None


def read_step(folder: Path) -> int:
    """The optimiser step a checkpoint was taken after."""
    return int(json.loads((folder / "trainer.json").read_text())["step"])


def refuse_other_run(folder: Path, config: Config) -> None:
    """ConfigError naming the keys, if resuming would continue a different sequence of updates."""
    stored = _flatten(json.loads((folder / "trainer.json").read_text())["config"])
    ours = _flatten(_as_dict(config))
    cooling = _cooldown_start(stored) < read_step(folder)
    differing = sorted(
        key
        for key in stored.keys() | ours.keys()
        if stored.get(key) != ours.get(key)
        and ((cooling and key in COOLDOWN_KEYS) or not any(key == f or key.startswith(f"{f}.") for f in FREE_KEYS))
    )
    if not differing and config.optim.cooldown_steps and not cooling and _cooldown_start(ours) < read_step(folder):
        raise ConfigError(
            f"optim.cooldown_steps: {config.optim.cooldown_steps} before train.max_steps={config.train.max_steps} "
            f"begin before step {read_step(folder)}, where {folder.parent.parent} resumes; raise train.max_steps"
        )
    if differing:
        shown = ", ".join(f"{key} ({stored.get(key)} -> {ours.get(key)})" for key in differing)
        raise ConfigError(
            f"run_dir: {folder.parent.parent} holds a run with another config: {shown}; "
            "set another run_dir, or train.init_from to start anew from its adapter"
        )


def load_optimizer(folder: Path, module: One4DModule, optimizer: torch.optim.Optimizer) -> None:
    """Fill a fresh AdamW with a checkpoint's moments."""
    tensors, step = load_file(folder / "optimizer.safetensors"), read_step(folder)
    for name, parameter in module.transformer.trainable_parameters():
        state = {moment: tensors[f"{name}.{moment}"].to(parameter.device) for moment in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(step)), **state}


def save_checkpoint(
    folder: Path, module: One4DModule, optimizer: torch.optim.Optimizer, step: int, data_sources: list[dict[str, str]]
) -> None:
    """Write one checkpoint, atomically."""
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    save_adapters(module.transformer, staging, _card(module, step, data_sources))
    moments: dict[str, Tensor] = {}
    for name, parameter in module.transformer.trainable_parameters():
        for moment in MOMENTS:
            moments[f"{name}.{moment}"] = optimizer.state[parameter][moment].detach().cpu().contiguous()
    save_file(moments, staging / "optimizer.safetensors")
    state = {"step": step, "config": _as_dict(module.config), "sha256": _hashes(staging)}
    (staging / "trainer.json").write_text(json.dumps(state, indent=1) + "\n")
    for file in staging.rglob("*"):
        _flush(file)
    shutil.rmtree(folder, ignore_errors=True)  # only ever a damaged one
    staging.rename(folder)
    _flush(folder.parent)


class StepCheckpoint(Callback):
    """Save every `train.save_every` steps and at the end, keep `train.keep_last`; on resume load the optimiser."""

    def __init__(self, config: Config, resume_from: Path | None) -> None:
        self.config, self.resume_from = config, resume_from

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if self.resume_from is not None:
            assert isinstance(module, One4DModule)
            load_optimizer(self.resume_from, module, trainer.optimizers[0])
        self.saved_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if step % self.config.train.save_every == 0 or step == self.config.train.max_steps:
            self.save(trainer, module)

    def save(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Save at this step, unless that has been done; a collective."""
        assert isinstance(module, One4DModule)
        step = trainer.global_step
        if step == self.saved_step:
            return
        self.saved_step = step
        if trainer.is_global_zero:
            datamodule = trainer.datamodule  # type: ignore[attr-defined]
            assert isinstance(datamodule, One4DDataModule)
            folder = checkpoint_folder(self.config.run_dir, step)
            save_checkpoint(folder, module, trainer.optimizers[0], step, datamodule.describe_sources())
            self._drop_old()
        trainer.strategy.barrier("checkpoint")

    def _drop_old(self) -> None:
        folders = sorted((Path(self.config.run_dir) / "checkpoints").glob("step-*"))
        for folder in folders[: -self.config.train.keep_last]:
            shutil.rmtree(folder)


def _card(module: One4DModule, step: int, data_sources: list[dict[str, str]]) -> AdapterCard:
    config, masking = module.config, module.config.masking
    probs = (masking.text_prob, masking.image_prob, masking.sparse_prob, masking.video_prob)
    return AdapterCard(
        base_path=config.base.path,
        base_fingerprint=module.base_fingerprint,
        rank=config.dlc.rank,
        lora_scale=config.dlc.lora_scale,
        link_blocks=[int(i) for i in module.transformer.links],
        xyz_patch_embedding=config.dlc.xyz_patch_embedding,
        tasks=[task for task, prob in zip(TASKS, probs, strict=True) if prob > 0],
        shift=config.flow.shift,
        step=step,
        data_sources=data_sources,
    )


def _cooldown_start(flat_config: dict[str, object]) -> int:
    """The first step whose learning rate a cooldown lowers; of checkpoints before there was one: never."""
    cooldown, max_steps = (int(str(flat_config.get(key, 0))) for key in COOLDOWN_KEYS)
    return max_steps - cooldown + 1


def _fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        hashes = json.loads((folder / "trainer.json").read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"trainer.json: {error}"
    found = _hashes(folder)
    for name in sorted(hashes.keys() | found.keys()):
        if hashes.get(name) != found.get(name):
            return f"{name} is {'missing' if name not in found else 'not the file that was written'}"
    return None


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "trainer.json")
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def _flush(path: Path) -> None:
    """fsync a file or folder: a rename must not outlive the bytes it promises."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _as_dict(config: Config) -> dict[str, object]:
    """The config as json gives it back (tuples become lists)."""
    return json.loads(json.dumps(OmegaConf.to_container(OmegaConf.structured(config))))


def _flatten(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
