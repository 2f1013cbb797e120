"""Bytes between host memory and a GPU, and the time of a training step in which they may hide."""

from __future__ import annotations

from one4d_pl.costs.flops import BatchShape, TransformerShape, training_flops
from one4d_pl.costs.memory import FLOAT, Layout, count_parameters, frozen_weights, step_activations

PCIE = 20e9  # bytes a second between pinned host memory and a GPU; 4.0 x16 reaches 25


def pass_bytes(shape: TransformerShape, batch: BatchShape, layout: Layout) -> float:
    """Compute the bytes that cross in one forward and backward pass, both directions together."""
    n = count_parameters(shape)
    moved = 2 * step_activations(shape, batch, layout)[2]  # blocks' inputs, there and back
    if layout.zero_stage == 3:
        itemsize = 2 if layout.bfloat16_base else FLOAT
        moved += 2 * itemsize * n.blocks / layout.world if layout.offload else 0.0  # its share, twice
    else:
        moved += 2 * frozen_weights(shape, layout)[2]  # forward, and again for the backward pass
    if layout.offload:
        moved += FLOAT * n.trainable / layout.world  # gradients
    return moved


def step_seconds(
    shape: TransformerShape, batch: BatchShape, layout: Layout, accumulation: int, flops_per_s: float
) -> float:
    """Estimate a training step (s), without encoders and communication between GPUs.

    Copies run beside the work, so of each pass the slower one counts; AdamW on the host waits for
    its weights to return.
    """
    work = training_flops(shape, batch, layout.checkpointing, flash=True).hardware / flops_per_s
    weights = FLOAT * count_parameters(shape).trainable / layout.world / PCIE if layout.offload else 0.0
    return accumulation * max(work, pass_bytes(shape, batch, layout) / PCIE) + weights
