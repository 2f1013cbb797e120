"""The couplings that One4D compares itself with (Fig. 2-3): one sequence for both branches.

One LoRA adapts the base to both at once, so nothing keeps the base's frames as they were. Only `make nano` uses them.
"""

from __future__ import annotations

import copy

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from one4d_pl.config import DLCConfig
from one4d_pl.models.transformer import CoupledTransformer


class ConcatTransformer(CoupledTransformer):
    """One LoRA, PEFT's own, on every linear that Decoupled LoRA Control adapts. B starts at zero."""

    joined_dim: int  # axis of the output along which frames come first

    def __init__(self, base: WanTransformer3DModel, config: DLCConfig, seed: int, pointmap_power: float = 1.0) -> None:
        super().__init__(base, config, pointmap_power)
        paths = [f"blocks.{name}" for name, module in base.blocks.named_modules() if isinstance(module, nn.Linear)]
        lora = LoraConfig(r=config.rank, lora_alpha=config.rank * config.lora_scale, target_modules=paths)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(lora, base)
        for name, parameter in base.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()  # trainables are float32, whatever the base's dtype
        self.join(base)
        # noted here, since sampling freezes the parameters
        self.adapter_names = frozenset(name for name, _ in self.trainable_parameters())

    def join(self, base: WanTransformer3DModel) -> None:
        """Replace, in place, the layers of the base that the joined sequence needs otherwise."""
        raise NotImplementedError

    def pack(self, noisy_latents: Tensor, condition: Tensor) -> Tensor:
        """Make the base's input, [B, ...], of [2B, C, t, h, w] and [B, 4 + C, t, h, w]."""
        raise NotImplementedError

    def forward(
        self,
        noisy_latents: Tensor,
        condition: Tensor,
        sigma: Tensor,
        prompt_embeds: Tensor,
        image_embeds: Tensor | None,
    ) -> Tensor:
        velocity = self.base(
            hidden_states=self.pack(noisy_latents, condition),
            timestep=1000 * sigma.chunk(2)[0],
            encoder_hidden_states=prompt_embeds,
            encoder_hidden_states_image=image_embeds,
            return_dict=False,
        )[0]
        return torch.cat(velocity.chunk(2, dim=self.joined_dim))


class ChannelTransformer(ConcatTransformer):
    """Branches joined along channels: a token holds a patch of frames and of pointmaps.

    The patch embedding takes 16 more channels, through weights that start at zero; the output layer gives 16 more, from
    a copy of its weights. So at step 0 the frames are the base model's. Half the tokens of Decoupled LoRA Control.
    """

    joined_dim = 1

    def join(self, base: WanTransformer3DModel) -> None:
        base.patch_embedding = _WiderPatchEmbedding(base.patch_embedding, base.config.out_channels)
        base.proj_out = _DoubledHead(base.proj_out, base.config.out_channels)

    def pack(self, noisy_latents: Tensor, condition: Tensor) -> Tensor:  # -> [B, 36 + 16, t, h, w]
        rgb, xyz = noisy_latents.chunk(2)
        return torch.cat([rgb, condition, xyz], dim=1)


class WidthTransformer(ConcatTransformer):
    """Branches joined along the width, frames on the left (4DNeX, arXiv 2508.13154).

    Both halves have the positions of a video of half the width, and a trainable embedding each, zero at step 0, that
    tells them apart. As many tokens as Decoupled LoRA Control, but each attends to both halves.
    """

    joined_dim = -1

    def join(self, base: WanTransformer3DModel) -> None:
        base.patch_embedding = _SidedPatchEmbedding(base.patch_embedding)
        base.rope = _SharedPositions(base.rope, tuple(base.config.patch_size))

    def pack(self, noisy_latents: Tensor, condition: Tensor) -> Tensor:  # -> [B, 36, t, h, 2 w]
        hidden = torch.cat([noisy_latents, torch.cat([condition, torch.zeros_like(condition)])], dim=1)
        return torch.cat(hidden.chunk(2), dim=-1)


class _WiderPatchEmbedding(nn.Module):
    """The frozen patch embedding of the first channels, plus a trainable one of the others.

    The trainable one starts at zero.
    """

    def __init__(self, base: nn.Conv3d, added: int) -> None:
        super().__init__()
        self.base = base
        kernel, stride, device = base.kernel_size, base.stride, base.weight.device
        self.xyz = nn.Conv3d(added, base.out_channels, kernel, stride, bias=False, device=device)  # type: ignore[arg-type]
        nn.init.zeros_(self.xyz.weight)

    def forward(self, hidden: Tensor) -> Tensor:  # [B, C + added, t, h, w] -> [B, D, t, h', w']
        known, added = hidden.split([self.base.in_channels, hidden.shape[1] - self.base.in_channels], dim=1)
        embedded = self.base(known)
        return embedded + self.xyz(added).to(embedded.dtype)


class _DoubledHead(nn.Module):
    """The frozen output layer and a trainable copy, joined along Wan's last axis, channels."""

    def __init__(self, base: nn.Linear, channels: int) -> None:
        super().__init__()
        self.in_features, self.channels = base.in_features, channels
        self.xyz = copy.deepcopy(base).float().requires_grad_(True)
        self.base = base

    def forward(self, hidden: Tensor) -> Tensor:  # [B, L, D] -> [B, L, patch * 2 C]
        rgb, xyz = (head(hidden).unflatten(-1, (-1, self.channels)) for head in (self.base, self.xyz))
        return torch.cat([rgb, xyz.to(rgb.dtype)], dim=-1).flatten(-2)


class _SidedPatchEmbedding(nn.Module):
    """The frozen patch embedding plus a learned vector for each half of the width."""

    def __init__(self, base: nn.Conv3d) -> None:
        super().__init__()
        self.base = base
        self.sides = nn.Parameter(torch.zeros(2, base.out_channels, device=base.weight.device))

    def forward(self, hidden: Tensor) -> Tensor:  # [B, C, t, h, 2 w] -> [B, D, t, h', 2 w']
        embedded = self.base(hidden)
        halves = zip(embedded.chunk(2, dim=-1), self.sides.to(embedded.dtype), strict=True)
        return torch.cat([half + side[:, None, None, None] for half, side in halves], dim=-1)


class _SharedPositions(nn.Module):
    """Rotary positions of a video of half the width, for both halves."""

    def __init__(self, base: nn.Module, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.base, self.patch = base, patch

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:  # [B, C, t, h, 2 w] -> [1, L, 1, d] twice
        grid = [size // patch for size, patch in zip(hidden.shape[2:], self.patch, strict=True)]
        cos, sin = self.base(hidden[..., : hidden.shape[-1] // 2])
        return self._twice(cos, grid), self._twice(sin, grid)

    def _twice(self, angles: Tensor, grid: list[int]) -> Tensor:
        half = angles.unflatten(1, (grid[0] * grid[1], grid[2] // 2))  # [1, t h, w, 1, d]
        return torch.cat([half, half], dim=2).flatten(1, 2)
