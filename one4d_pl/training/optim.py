"""AdamW with a group per part of the adapter, and a learning rate that follows from the step."""

from __future__ import annotations

import torch
from torch import nn

from one4d_pl.config import OptimConfig
from one4d_pl.models.transformer import CoupledTransformer, adapter_part


def build_optimizer(transformer: CoupledTransformer, config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW with those groups lora, links, xyz_patch_embedding that are not empty, each with its `base_lr`."""
    width = transformer.base.proj_out.in_features
    parts: dict[str, list[nn.Parameter]] = {"lora": [], "links": [], "xyz_patch_embedding": []}
    for name, parameter in transformer.trainable_parameters():
        parts[adapter_part(name)].append(parameter)
    groups = []
    for part, parameters in parts.items():
        # at step 1 Adam on a zero D x D matrix moves its output by lr |x|_1, which grows with D: so
        # scale the links' lr
        lr = config.lr * min(1.0, config.link_lr_width / width) if part == "links" else config.lr
        # no decay: the patch embedding starts as a copy of the base's, and its zero-fed channels
        # get no gradient, so decay would only pull it away from the base
        decay = 0.0 if part == "xyz_patch_embedding" else config.weight_decay
        if parameters:
            groups.append({"params": parameters, "name": part, "base_lr": lr, "lr": lr, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=config.betas)


def lr_share(step: int, max_steps: int, config: OptimConfig) -> float:
    """Return the share of the base lr at an optimiser step: up to 1, constant, then down towards 0 at max_steps."""
    warm = (step + 1) / max(1, config.warmup_steps)
    left = (max_steps - step) / max(1, config.cooldown_steps)
    return min(1.0, warm, left)


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, max_steps: int, config: OptimConfig) -> None:
    """Set every group's lr by the step alone, so that a resumed run needs no scheduler state."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * lr_share(step, max_steps, config)
