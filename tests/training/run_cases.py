"""A rank of one launch: `torchrun ... run_cases.py a.yaml b.yaml ...` runs `fit` for one config after the other.

Starting processes costs more than the runs themselves, so a matrix of strategies shares one launch. The word
`gathers:a.yaml:out.json` counts instead what ZeRO-3 gathers of the frozen base; `cuda-autocast:a.yaml` is `fit` where
the engine sees the autocast around it, as it does on CUDA; after `poison:3,17` the noise of the samples at these
positions is NaN.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import deepspeed
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import Tensor

from one4d_pl.config import Config, load_config
from one4d_pl.fit import fit
from one4d_pl.models.transformer import One4DTransformer
from one4d_pl.models.wan import load_transformer
from one4d_pl.training.module import One4DModule
from one4d_pl.training.zero import BlockKeeper, StagePartitioner, engine_config, skip_compilation
from one4d_pl.types import Batch

AUTOCAST = "cuda-autocast:"
GATHER = "_PartitionedParameterCoordinator__all_gather_params_"


def count_gathers(config: Config) -> dict[str, float]:
    """Gathered bytes of frozen parameters over their own bytes, for one micro-step with activation checkpointing.

    Two ways through the same wrapped model: the stacked batch, and one pass per branch before a common backward.
    The engine keeps nothing for reuse, or this tiny base would be gathered once and never again.
    """
    zero = engine_config(config.train, bfloat16=False)
    zero["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    skip_compilation()
    deepspeed.init_distributed("gloo")
    base = load_transformer(
        config.base.path, "float32", partitioner=StagePartitioner(zero, torch.distributed.get_rank() == 0)
    )
    transformer = One4DTransformer(base, config.dlc, seed=0)
    transformer.set_activation_checkpointing("full")
    frozen = [p for p in transformer.parameters() if not p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=transformer,
        config=zero,
        optimizer=torch.optim.AdamW([p for p in transformer.parameters() if p.requires_grad], lr=1e-3),
        dist_init_required=False,
    )
    BlockKeeper(engine.optimizer.parameter_offload.get_param_coordinator()).watch(base.blocks)
    gathered = 0
    plain_gather = getattr(PartitionedParameterCoordinator, GATHER)

    def counting(self: object, params: list, forward: bool, quantize: bool = False) -> None:
        nonlocal gathered
        absent = [p for p in params if p.ds_status.name == "NOT_AVAILABLE" and not p.requires_grad]
        gathered += sum(p.ds_numel * p.element_size() for p in absent)
        plain_gather(self, params, forward, quantize)

    setattr(PartitionedParameterCoordinator, GATHER, counting)
    generator = torch.Generator().manual_seed(0)

    def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:  # of a stacked batch of 2 * batch
        latents = torch.randn(2 * batch, 16, 2, 4, 6, generator=generator)
        condition = torch.randn(batch, 20, 2, 4, 6, generator=generator)
        prompts = torch.randn(batch, config.base.max_text_tokens, base.config.text_dim, generator=generator)
        return latents, condition, torch.full((2 * batch,), 0.5), prompts, None

    bytes_frozen = sum(p.ds_numel * p.element_size() for p in frozen)
    shares = {}
    for way, passes, batch in (("stacked", 1, 2), ("separate", 2, 1)):
        for _ in range(2):  # the first step of a kind records the order of the modules
            gathered = 0
            loss = sum(engine(*inputs(batch)).square().mean() for _ in range(passes))
            engine.backward(loss)
            engine.step()
        shares[way] = gathered / bytes_frozen
    return shares


def fit_as_on_cuda(config: Config) -> None:
    """The engine asks for autocast without naming a device, which means CUDA's: let it see the CPU's."""
    asked = torch.is_autocast_enabled
    with patch.object(torch, "is_autocast_enabled", lambda device="cpu": asked(device)):
        fit(config)


def at(positions: set[int], change: Callable[[Tensor, list[int]], None]) -> Callable[..., Tensor]:
    """A `draw_noise` that changes the noise of the samples at these positions: rows of both branches."""
    draw_noise = One4DModule.draw_noise

    def changed(self: One4DModule, batch: Batch, purpose: str) -> Tensor:
        noise = draw_noise(self, batch, purpose)
        hit = [i for i, position in enumerate(batch.position.tolist()) if position in positions and purpose == "noise"]
        change(noise, [row for i in hit for row in (i, i + len(batch))])
        return noise

    return changed


def to_nan(noise: Tensor, rows: list[int]) -> None:
    noise[rows] = torch.nan


if __name__ == "__main__":
    torch.set_num_threads(1)
    for word in sys.argv[1:]:
        if word.startswith("gathers:"):
            _, path, target = word.split(":")
            shares = count_gathers(load_config([path], []))
            if torch.distributed.get_rank() == 0:
                Path(target).write_text(json.dumps(shares))
        elif word.startswith(AUTOCAST):
            fit_as_on_cuda(load_config([word.removeprefix(AUTOCAST)], []))
        elif word.startswith("poison:"):
            One4DModule.draw_noise = at({int(position) for position in word.removeprefix("poison:").split(",")}, to_nan)
        else:
            fit(load_config([word], []))
            torch.distributed.barrier()  # the next word may go on from the checkpoint that rank 0 has written
