"""A tiny run that is real in every part: base, shards, loaders, trainer."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from one4d_pl.config import Config, ToyConfig, load_config
from one4d_pl.data.datamodule import write_toy_world

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training clips of two domains and four for validation, 17 frames of 32x48."""
    root = tmp_path_factory.mktemp("toy")
    write_toy_world(ToyConfig(str(root), train_synthetic=8, train_real=4, val=4), 17, 32, 48)
    return root


@pytest.fixture
def run_config(tmp_path: Path, toy_root: Path, tiny_base_plain) -> Callable[..., Config]:
    """`configs/dlc.yaml` at toy size; takes overrides, and returns a fresh config with its own run folder."""
    small = {
        "run_dir": str(tmp_path / "run"),
        "base": {"path": tiny_base_plain.path, "max_text_tokens": tiny_base_plain.max_text_tokens, "tiny": None},
        "dlc": {"rank": 4},
        "sampler": {"steps": 2},
        "optim": {"warmup_steps": 2},
        "data": {
            "sources": [
                {"path": str(toy_root / "train_synthetic"), "weight": 0.75},
                {"path": str(toy_root / "train_real"), "weight": 0.25},
            ],
            "val_sources": [{"path": str(toy_root / "val")}],
            "toy": None,
            "num_frames": 17,
            "height": 32,
            "width": 48,
            "num_workers": 0,
        },
        "train": {
            "max_steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "save_every": 2, "log_every": 1,
        },
        "val": {"every": 3, "clips": 3, "sigmas": [0.3, 0.7]},
    }  # fmt: skip
    small_yaml = tmp_path / "small.yaml"
    small_yaml.write_text(yaml.safe_dump(small))

    def make(*overrides: str) -> Config:
        return load_config([str(REPO / "configs" / "dlc.yaml"), str(small_yaml)], list(overrides))

    return make


@pytest.fixture
def fit_command(tmp_path: Path, run_config) -> Callable[..., list[str]]:
    """The command line of the same run, for tests that need a process of their own."""

    def make(*overrides: str) -> list[str]:
        configs = ["--config", str(REPO / "configs" / "dlc.yaml"), "--config", str(tmp_path / "small.yaml")]
        return [sys.executable, "-m", "one4d_pl.fit", *configs, *overrides]

    return make


@pytest.fixture
def fit_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
