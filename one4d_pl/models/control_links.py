"""Control links: the control half of Decoupled LoRA Control (One4D, Eq. 9)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from one4d_pl.config import ConfigError


class ControlLink(nn.Module):
    """An exchange of features, token by token: rgb' = rgb + A xyz, xyz' = xyz + B rgb."""

    ratio: Tensor  # |what the link adds| / |hidden| of the last forward pass

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        # zero: at step 0 the branches are independent and rgb is exactly the base model
        self.xyz_to_rgb = _zero_linear(width, device)
        self.rgb_to_xyz = _zero_linear(width, device)
        self.register_buffer("ratio", torch.zeros((), device=device), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:  # [2B, L, D] -> [2B, L, D]
        rgb, xyz = hidden.chunk(2)
        # both directions read the hidden state from before the exchange
        exchanged = torch.cat([self.xyz_to_rgb(xyz), self.rgb_to_xyz(rgb)])
        with torch.no_grad():  # dtype=float32 sums in float32 without a float32 copy of the hidden state
            added, present = (torch.linalg.vector_norm(x, dtype=torch.float32) for x in (exchanged, hidden))
            self.ratio = added / present.clamp_min(1e-12)
        return hidden + exchanged.to(hidden.dtype)


def link_positions(num_blocks: int, num_links: int) -> list[int]:
    """List the blocks that a link follows: the centres of `num_links` equal spans.

    The paper does not say where its links sit; 40 blocks and 5 links give 3, 11, 19, 27, 35.
    """
    if num_links > num_blocks:
        raise ConfigError(f"dlc.num_links: {num_links} links need as many blocks, the base has {num_blocks}")
    span = num_blocks / num_links if num_links else 0
    return [int(i * span + (span - 1) / 2) for i in range(num_links)]


def _zero_linear(width: int, device: torch.device) -> nn.Linear:
    linear = nn.Linear(width, width, bias=False, device="meta", dtype=torch.float32).to_empty(device=device)
    nn.init.zeros_(linear.weight)
    return linear
