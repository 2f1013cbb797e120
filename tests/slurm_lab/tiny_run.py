"""What the lab's jobs train: the method at toy size for eight processes, and how two runs are compared."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml

from one4d_pl.config import TinyWanConfig, ToyConfig
from one4d_pl.data.datamodule import write_toy_world
from one4d_pl.models.tiny import build_tiny_wan
from tests.seeded_vae import seeded_vae

MODALITIES = ("rgb", "xyz")


def prepare(folder: Path) -> Path:
    """A tiny base, toy shards and the yaml of a run in `folder`; returns the yaml."""
    config = TinyWanConfig(num_layers=2, num_heads=2, head_dim=12, ffn_dim=48, text_dim=16)
    calibration = torch.rand(2, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    build_tiny_wan(folder / "wan", config, seeded_vae(4, config.seed, calibration))
    write_toy_world(ToyConfig(str(folder / "toy"), train_synthetic=12, train_real=4, val=8), 9, 32, 48)
    tree = {
        "scale": "lab",
        "base": {"path": str(folder / "wan"), "max_text_tokens": 16, "tiny": None},
        "dlc": {"rank": 4, "num_links": 2},
        "optim": {"warmup_steps": 2},
        "data": {
            "sources": [{"path": str(folder / "toy/train_synthetic")}, {"path": str(folder / "toy/train_real")}],
            "val_sources": [{"path": str(folder / "toy/val")}],
            "toy": None, "num_frames": 9, "height": 32, "width": 48, "num_workers": 0,
        },
        "train": {
            "max_steps": 20, "global_batch_size": 8, "micro_batch_size": 1, "save_every": 5, "log_every": 1,
            "precision": "32-true",
        },
        "eval": {"every": 0, "video_every": 0},
        "val": {"every": 1000, "clips": 8, "sigmas": [0.5]},
    }  # fmt: skip
    path = folder / "lab.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def losses(run_dir: Path) -> dict[tuple[int, str], float]:
    """(step, modality) -> training loss, the last value written for each."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[tuple[int, str], float] = {}
    for file in sorted((run_dir / "tensorboard").glob("events*")):
        events = EventAccumulator(str(file)).Reload()
        for modality in MODALITIES:
            if (tag := f"train/loss/{modality}") in events.Tags()["scalars"]:
                found |= {(event.step, modality): event.value for event in events.Scalars(tag)}
    return found


def last_step(run_dir: Path) -> int:
    """Of the newest checkpoint; 0 where there is none."""
    folders = sorted((run_dir / "checkpoints").glob("step-*/trainer.json"))
    return json.loads(folders[-1].read_text())["step"] if folders else 0
