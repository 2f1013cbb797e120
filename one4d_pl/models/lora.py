"""One frozen linear, two LoRAs: the decoupled half of Decoupled LoRA Control (One4D, Eq. 5-8).

The two branches are the two halves of the batch, rgb first. Attention never crosses samples, so
stacking decouples them for free, every frozen weight is read once for both, and no adapter is ever
switched (switching under activation checkpointing gives wrong gradients).
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from one4d_pl.types import MODALITIES


class BranchLinear(nn.Module):
    """A frozen linear with one LoRA per modality. The rgb branch is the first half of the batch, xyz the second."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, generator: Generator, device: torch.device) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = scale  # alpha / rank
        # float32, whatever the base's dtype, so that training needs no separate master weights
        self.lora_A = nn.ModuleDict(
            {m: nn.Linear(base.in_features, rank, bias=False, device="meta", dtype=torch.float32) for m in MODALITIES}
        ).to_empty(device=device)
        self.lora_B = nn.ModuleDict(
            {m: nn.Linear(rank, base.out_features, bias=False, device="meta", dtype=torch.float32) for m in MODALITIES}
        ).to_empty(device=device)
        for modality in MODALITIES:
            # PEFT's convention: A starts as nn.Linear does, B at zero, so at step 0 both branches are plain Wan
            _kaiming_uniform(_weight(self.lora_A[modality]), generator)
            nn.init.zeros_(_weight(self.lora_B[modality]))

    def forward(self, hidden: Tensor) -> Tensor:  # [2B, L, D] -> [2B, L, D']
        low = torch.stack([self.lora_A[m](half) for m, half in zip(MODALITIES, hidden.chunk(2), strict=True)])
        if self.scale != 1:  # applied here, to `rank` numbers a token instead of D'
            low = self.scale * low
        base = self.base(hidden)
        up = torch.stack([_weight(self.lora_B[m]) for m in MODALITIES]).transpose(1, 2)  # [2, rank, D']
        # one product adds the LoRAs of both branches: the D' numbers of a token are read and written once
        return torch.baddbmm(base.unflatten(0, (2, -1)).flatten(1, 2), low.flatten(1, 2), up).view(base.shape)


class BranchPatchEmbedding(nn.Module):
    """The frozen patch embedding for rgb and a trainable copy of it for xyz.

    The copy is our reading of the paper's 250.7 M control parameters. It keeps the base's 36 input channels; the 20
    conditioning channels are fed zeros ("zero pad", One4D, Fig. 4) and so never get a gradient.
    """

    def __init__(self, base: nn.Conv3d) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.xyz = nn.Conv3d(
            base.in_channels,
            base.out_channels,
            base.kernel_size,  # type: ignore[arg-type]
            base.stride,  # type: ignore[arg-type]
            device=base.weight.device,
            dtype=torch.float32,
        )
        with torch.no_grad():
            self.xyz.weight.copy_(base.weight)
            if base.bias is not None and self.xyz.bias is not None:
                self.xyz.bias.copy_(base.bias)

    def forward(self, noisy: Tensor) -> Tensor:  # [2B, 36, t, h, w] -> [2B, D, t, h', w']
        # Each convolution computes the whole batch, of which one half is kept: a kernel may round
        # differently at another batch size, and at step 0 the rgb half has to equal plain Wan bit
        # for bit. That costs little: a patch embedding is 1e-3 of a block.
        rgb, _ = self.base(noisy).chunk(2)
        _, xyz = self.xyz(noisy).chunk(2)
        return torch.cat([rgb, xyz.to(rgb.dtype)])


def wrap_linears(blocks: nn.Module, rank: int, scale: float, generator: Generator, device: torch.device) -> list[str]:
    """Replace every linear below `blocks` by a BranchLinear, in place, with its LoRAs on the device.

    Return their paths in module order.
    """
    paths = [name for name, module in blocks.named_modules() if isinstance(module, nn.Linear)]
    for path in paths:
        parent_path, _, name = path.rpartition(".")
        parent = blocks.get_submodule(parent_path)
        base = parent.get_submodule(name)
        assert isinstance(base, nn.Linear)
        setattr(parent, name, BranchLinear(base, rank, scale, generator, device))
    return paths


def _weight(linear: nn.Module) -> Tensor:
    """Return the weight of a linear in a ModuleDict, whose items are typed as plain modules."""
    assert isinstance(linear, nn.Linear)
    return linear.weight


def _kaiming_uniform(weight: Tensor, generator: Generator) -> None:
    """Initialise as nn.Linear does, from numbers drawn on the generator's device, the CPU.

    The default device has no say, so the same seed gives the same weights everywhere. Meta tensors are left alone.
    """
    if weight.is_meta:
        return
    bound = 1 / math.sqrt(weight.shape[1])
    drawn = torch.empty(weight.shape, device=generator.device).uniform_(-bound, bound, generator=generator)
    with torch.no_grad():
        weight.copy_(drawn)
