"""From files to a model, for training, sampling and evaluation: a base gets its adapter here."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from one4d_pl.config import Config
from one4d_pl.models.adapters import AdapterCard, load_adapters
from one4d_pl.models.coupling import couple
from one4d_pl.models.transformer import CoupledTransformer
from one4d_pl.models.wan import fingerprint, load_transformer
from one4d_pl.models.weights import Partitioner

log = logging.getLogger("one4d_pl")


def open_model(
    config: Config, adapters: Path | None, device: torch.device | None = None, partitioner: Partitioner | None = None
) -> tuple[CoupledTransformer, AdapterCard | None]:
    """Open a run's base and put an adapter around it, both on their device.

    Args:
        config: `base`, `dlc`, `data.pointmap_power` and, for a fresh adapter, `train.seed` are read.
        adapters: adapter folder to load; None = a fresh adapter, which leaves the base as it is.
        device: where the model is put; None = CPU.
        partitioner: shards the blocks over processes as they are read (ZeRO stage 3).

    Raises ConfigError where the adapter is of another base or another shape.
    """
    wan = config.base
    base = load_transformer(wan.path, wan.dtype, device, partitioner, wan.quantisation, wan.offload)
    transformer = couple(base, config.dlc, config.train.seed, config.data.pointmap_power)
    card = None if adapters is None else load_adapters(transformer, adapters, fingerprint(config.base.path))
    if card is not None and card.base_quantisation != wan.quantisation:
        log.info(
            "%s: trained on a base with quantisation %s; this one has %s",
            adapters, card.base_quantisation, wan.quantisation,
        )  # fmt: skip
    return transformer, card
