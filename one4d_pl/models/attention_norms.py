"""Norms of queries and keys in the base's own dtype, as Wan runs them."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

NORMS = ("norm_q", "norm_k", "norm_added_k")  # of a Wan attention; the last one where it has image tokens


class BaseDtypeNorm(nn.RMSNorm):
    """An RMSNorm that autocast leaves alone: what it gives has its weight's dtype.

    CUDA's autocast would run it in float32, and with it everything up to the attention's output projection: twice the
    bytes of a bfloat16 base, for nothing (the kernel itself adds up in float32). Wan's own inference has no autocast.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype))


def keep_base_dtype(base: WanTransformer3DModel) -> None:
    """Replace the norms of queries and keys, in place; their weights stay the same parameters."""
    for block in base.blocks:
        for attention in (block.attn1, block.attn2):
            for name in NORMS:
                norm = getattr(attention, name, None)
                if norm is not None:
                    kept = BaseDtypeNorm(norm.normalized_shape, eps=norm.eps, device="meta")
                    kept.weight = norm.weight
                    setattr(attention, name, kept)
