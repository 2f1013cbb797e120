"""From files to a model, for training, sampling and evaluation: a base gets its adapter here."""

from __future__ import annotations

from pathlib import Path

import torch

from one4d_pl.config import DLCConfig
from one4d_pl.models.adapters import AdapterCard, load_adapters
from one4d_pl.models.coupling import couple
from one4d_pl.models.transformer import CoupledTransformer
from one4d_pl.models.wan import fingerprint, load_transformer
from one4d_pl.models.weights import Partitioner


def open_model(
    path: str,
    dtype: str,
    dlc: DLCConfig,
    pointmap_power: float,
    adapters: Path | None,
    seed: int = 0,
    device: torch.device | None = None,
    partitioner: Partitioner | None = None,
) -> tuple[CoupledTransformer, AdapterCard | None]:
    """Open a base and put an adapter around it, both on their device.

    Args:
        path: base folder in either layout, or a hub id in the local cache.
        dtype: dtype of the frozen weights; the adapter's own are float32.
        dlc: shape of the adapter.
        pointmap_power: data.pointmap_power, for the codec.
        adapters: adapter folder to load; None = a fresh adapter, which leaves the base as it is.
        seed: seeds a fresh adapter's LoRA A.
        device: where the model is put; None = CPU.
        partitioner: shards the blocks over processes as they are read (ZeRO stage 3).

    Raises ConfigError where the adapter is of another base or another shape.
    """
    base = load_transformer(path, dtype, device, partitioner)
    transformer = couple(base, dlc, seed, pointmap_power)
    card = None if adapters is None else load_adapters(transformer, adapters, fingerprint(path))
    return transformer, card
