"""Norms of queries and keys without autocast, as Wan runs them."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

NORMS = ("norm_q", "norm_k", "norm_added_k")  # of a Wan attention; the last one where it has image tokens


class InputDtypeNorm(nn.RMSNorm):
    """An RMSNorm that autocast leaves alone: its output has its input's dtype.

    CUDA's autocast would make it float32, and with it everything up to the attention's output projection: twice the
    bytes of bfloat16 for no gain in precision, since the kernel itself accumulates in float32. Wan's own inference has
    no autocast. On a CPU, whose autocast does not know this norm, nothing changes.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype)).type_as(hidden)


def norm_without_autocast(base: WanTransformer3DModel) -> None:
    """Replace the norms of queries and keys, in place; their weights stay the same parameters."""
    for block in base.blocks:
        for attention in (block.attn1, block.attn2):
            for name in NORMS:
                norm = getattr(attention, name, None)
                if norm is not None:
                    kept = InputDtypeNorm(norm.normalized_shape, eps=norm.eps, device="meta")
                    kept.weight = norm.weight
                    setattr(attention, name, kept)
