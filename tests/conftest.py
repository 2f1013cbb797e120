"""What every test shares: one thread, DeepSpeed on the CPU, a tiny base (the hang guard stands in setup.cfg)."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Read when deepspeed is first imported: on a machine with a GPU it would pick CUDA for the CPU tests too.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
import yaml
from diffusers import WanTransformer3DModel
from torch import Tensor

from one4d_pl.commands.command import USER_ERROR, Command
from one4d_pl.config import Config, TinyWanConfig, ToyConfig, load_config
from one4d_pl.data.datamodule import write_toy_world
from one4d_pl.models.tiny import build_tiny_wan
from one4d_pl.models.wan import WanEncoders, load_transformer
from tests.seeded_vae import seeded_vae

# One thread: toy sizes gain nothing from more, the order of float additions is the same on every machine, and OpenMP
# does not stall where another process holds the second core.
torch.set_num_threads(1)

REPO = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class TinyBase:
    """A real Wan at toy size in diffusers layout, and how to open it."""

    path: str
    image_tokens: bool

    @property
    def max_text_tokens(self) -> int:
        return 512 if self.image_tokens else 16  # diffusers' Wan fixes 512 where it has image tokens

    def transformer(self) -> WanTransformer3DModel:
        return load_transformer(self.path, "float32")

    def encoders(self) -> WanEncoders:
        return WanEncoders(self.path, "float32", self.max_text_tokens)

    def inputs(self, batch: int, seed: int = 0) -> TransformerInputs:
        """Random inputs of the One4D transformer for two latent frames of 4x6."""
        g = torch.Generator().manual_seed(seed)
        image = torch.randn(batch, 17, 32, generator=g) if self.image_tokens else None
        return TransformerInputs(
            noisy_latents=torch.randn(2 * batch, 16, 2, 4, 6, generator=g),
            condition=torch.randn(batch, 20, 2, 4, 6, generator=g),
            sigma=torch.rand(batch, generator=g).repeat(2),
            prompt_embeds=torch.randn(batch, self.max_text_tokens, 16, generator=g),
            image_embeds=image,
        )


@dataclass(frozen=True)
class TransformerInputs:
    noisy_latents: Tensor
    condition: Tensor
    sigma: Tensor
    prompt_embeds: Tensor
    image_embeds: Tensor | None

    def one4d(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        return self.noisy_latents, self.condition, self.sigma, self.prompt_embeds, self.image_embeds

    def plain(self) -> dict[str, Tensor | bool | None]:
        """The same stacked batch for the unmodified diffusers transformer: 36 channels, xyz zero-padded."""
        condition = torch.cat([self.condition, torch.zeros_like(self.condition)])
        return {
            "hidden_states": torch.cat([self.noisy_latents, condition], dim=1),
            "timestep": 1000 * self.sigma,
            "encoder_hidden_states": torch.cat([self.prompt_embeds] * 2),
            "encoder_hidden_states_image": None if self.image_embeds is None else torch.cat([self.image_embeds] * 2),
            "return_dict": False,
        }


@pytest.fixture(scope="session", params=[False, True], ids=["no-image-tokens", "image-tokens"])
def tiny_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    """Five blocks of width 24, with and without image tokens: laws proved without them prove nothing for the 14B."""
    return build_tiny_base(tmp_path_factory.mktemp("base") / "wan", request.param)


@pytest.fixture(scope="session")
def tiny_base_plain(tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    """The one without image tokens, for tests that training makes slow."""
    return build_tiny_base(tmp_path_factory.mktemp("base") / "wan", False)


def build_tiny_base(folder: Path, image_tokens: bool) -> TinyBase:
    """Write a seeded base with calibrated latents."""
    config = TinyWanConfig(num_layers=5, num_heads=2, head_dim=12, ffn_dim=48, text_dim=16, image_tokens=image_tokens)
    calibration = torch.rand(2, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    build_tiny_wan(folder, config, seeded_vae(4, config.seed, calibration))
    return TinyBase(str(folder), image_tokens)


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training clips of two domains and four for validation, 17 frames of 32x48."""
    return write_toy_shards(tmp_path_factory.mktemp("toy"))


def write_toy_shards(root: Path) -> Path:
    """The shards of `toy_root`."""
    write_toy_world(ToyConfig(str(root), train_synthetic=8, train_real=4, val=4), 17, 32, 48)
    return root


@pytest.fixture
def run_config(tmp_path: Path, toy_root: Path, tiny_base_plain) -> Callable[..., Config]:
    """`configs/dlc.yaml` at toy size; takes overrides, and returns a fresh config with its own run folder."""
    return small_run_config(tmp_path, tiny_base_plain, toy_root)


def small_run_config(folder: Path, base: TinyBase, toy_root: Path) -> Callable[..., Config]:
    """What `run_config` gives, outside of a test; small.yaml is left in the folder."""
    small = {
        "run_dir": str(folder / "run"),
        "base": {"path": base.path, "max_text_tokens": base.max_text_tokens, "tiny": None},
        # plain pointmaps, since a module without a trainer has no latents to measure; test_resume.py trains the tiny
        # scale's own, bent and standardised, test_zero.py standardised ones
        "dlc": {"rank": 4, "standardise_xyz": False},
        "sampler": {"steps": 2},
        "optim": {"warmup_steps": 2, "cooldown_steps": 0},  # a run that cools down may not be made longer
        "data": {
            "sources": [
                {"path": str(toy_root / "train_synthetic"), "weight": 0.75},
                {"path": str(toy_root / "train_real"), "weight": 0.25},
            ],
            "val_sources": [{"path": str(toy_root / "val")}],
            "toy": None,
            "pointmap_power": 1.0,
            "num_frames": 17,
            "height": 32,
            "width": 48,
            "num_workers": 0,
        },
        "train": {
            "max_steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "save_every": 2, "log_every": 1,
            "precision": "32-true",
        },
        "eval": {"every": 0, "steps": 2},
        "val": {"every": 3, "clips": 3, "sigmas": [0.3, 0.7]},
    }  # fmt: skip
    small_yaml = folder / "small.yaml"
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


def scalars(run_dir: str | Path) -> dict[str, dict[int, float]]:
    """Every curve that a run has logged: tag -> step -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes a second

    (file,) = (Path(run_dir) / "tensorboard").glob("events*")
    events = EventAccumulator(str(file)).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command on arguments that it refuses: one line and exit code 2. Returns the line."""

    def refuse(command: Command, *arguments: str | Path) -> str:
        capsys.readouterr()
        assert command([str(word) for word in arguments]) == USER_ERROR
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return refuse


@pytest.fixture
def fit_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
