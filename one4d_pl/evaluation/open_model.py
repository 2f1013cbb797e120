"""From a config and an adapter folder to something that can be sampled."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch

from one4d_pl.config import Config
from one4d_pl.inference.pipeline import One4DPipeline
from one4d_pl.models.adapters import AdapterCard
from one4d_pl.models.wan import fingerprint


def open_pipeline(config: Config, adapters: Path, device: torch.device) -> tuple[One4DPipeline, AdapterCard]:
    """The base with an adapter. All that belongs to the adapter is its card's: the config says where the base lies."""
    card = AdapterCard.read(adapters)
    flow, data = replace(config.flow, shift=card.shift), replace(config.data, pointmap_power=card.pointmap_power)
    pipeline = One4DPipeline.open(replace(config, dlc=card.dlc, flow=flow, data=data), adapters)
    pipeline.transformer.to(device).eval().requires_grad_(False)
    pipeline.encoders.to(device)
    return pipeline, card


def describe(config: Config, adapters: Path | None, card: AdapterCard | None) -> dict[str, object]:
    """What must be equal for stored predictions to be of the same model."""
    model: dict[str, object] = {"base": config.base.path, "base_fingerprint": fingerprint(config.base.path)}
    if card is not None:
        model |= {"adapters": str(adapters), "step": card.step, "shift": card.shift}
        model |= {"sampler": asdict(config.sampler), "precision": config.train.precision}
    return model
