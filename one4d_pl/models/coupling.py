"""The transformer that `dlc.coupling` asks for."""

from __future__ import annotations

from collections.abc import Callable

from diffusers import WanTransformer3DModel

from one4d_pl.config import DLCConfig
from one4d_pl.models.concat import ChannelTransformer, WidthTransformer
from one4d_pl.models.transformer import CoupledTransformer, One4DTransformer

COUPLINGS: dict[str, Callable[[WanTransformer3DModel, DLCConfig, int, float], CoupledTransformer]] = {
    "decoupled": One4DTransformer,
    "channel": ChannelTransformer,
    "width": WidthTransformer,
}


def couple(
    base: WanTransformer3DModel, config: DLCConfig, seed: int, pointmap_power: float = 1.0
) -> CoupledTransformer:
    """Put a fresh adapter around the base, which is changed in place."""
    return COUPLINGS[config.coupling](base, config, seed, pointmap_power)
