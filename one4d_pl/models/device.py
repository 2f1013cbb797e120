"""The device of a process; a configuration made for GPUs never falls back to a CPU unasked."""

from __future__ import annotations

import os

import torch

from one4d_pl.config import Config, ConfigError
from one4d_pl.models.cuda_driver import driver_mismatch


def device_of(config: Config) -> torch.device:
    """Choose a GPU where there is one, else the CPU.

    Raises ConfigError where train.accelerator=gpu and there is none.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    if config.train.accelerator == "gpu":
        if mismatch := driver_mismatch():
            raise ConfigError(f"train.accelerator: {config.scale} is made for GPUs; {mismatch}")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
        raise ConfigError(
            f"train.accelerator: {config.scale} is made for GPUs, but torch {torch.__version__} finds no CUDA device"
            f"{seen}; in SLURM ask for GPUs per node (--gpus-per-node), see whether nvidia-smi finds one, or set "
            "train.accelerator=auto to run on the CPU"
        )
    return torch.device("cpu")
