"""What every test shares: one thread, DeepSpeed on the CPU, a tiny base (the hang guard stands in setup.cfg)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

# Read when deepspeed is first imported: on a machine with a GPU it would pick CUDA for the CPU tests too.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from one4d_pl.config import TinyWanConfig
from one4d_pl.models.tiny import build_tiny_wan, seeded_vae
from one4d_pl.models.wan import WanEncoders, load_transformer

# One thread: toy sizes gain nothing from more, the order of float additions is the same on every machine, and OpenMP
# does not stall where another process holds the second core.
torch.set_num_threads(1)


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
    return _build(tmp_path_factory.mktemp("base") / "wan", request.param)


@pytest.fixture(scope="session")
def tiny_base_plain(tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    """The one without image tokens, for tests that training makes slow."""
    return _build(tmp_path_factory.mktemp("base") / "wan", False)


def _build(folder: Path, image_tokens: bool) -> TinyBase:
    config = TinyWanConfig(
        num_layers=5, num_heads=2, head_dim=12, ffn_dim=48, vae_dim=4, text_dim=16, image_tokens=image_tokens
    )
    calibration = torch.rand(2, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    build_tiny_wan(folder, config, seeded_vae(config, calibration))
    return TinyBase(str(folder), image_tokens)
