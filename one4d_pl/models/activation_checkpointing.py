"""Activation checkpointing of blocks: recomputed whole, or all but self-attention.

The cost of self-attention grows with the square of the number of tokens, and its result is as small as the block's
input. Keeping it doubles the memory kept per block and saves a third of the recomputation at 18 thousand tokens.

torch's create_selective_checkpoint_contexts does not serve here: since torch 2.13 it requires every operation of the
recomputation to be one of the forward pass, and under ZeRO-3 the two gather and free different weights. A compiled
block, which ZeRO-3 never has, does use it: the compiler cannot trace a dispatch mode of ours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from one4d_pl.models.host_memory import WaitingInputs

# the contexts of a block's forward pass and of its recomputation
Contexts = tuple[AbstractContextManager[object], AbstractContextManager[object]]

_aten = torch.ops.aten
FUSED_ATTENTION = (
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def run_checkpointed(
    block: nn.Module,
    *inputs: Tensor | tuple[Tensor, Tensor],
    keep_attention: bool = False,
    waiting: WaitingInputs | None = None,
) -> Tensor:
    """Run a block, hooks (links) included; the backward pass computes its activations again.

    Non-reentrant, because the first block's input needs no gradient: all before the first LoRA is frozen.

    Args:
        block: called with `inputs`.
        inputs: hidden state, context, modulation, rotary embedding; as diffusers passes them.
        keep_attention: keep the result of self-attention.
        waiting: keeps the hidden state in host memory; None = on the device.
    """
    contexts: Callable[[], Contexts] = _attention_kept_and_reused if keep_attention else noop_context_fn
    hidden = inputs[0]
    assert isinstance(hidden, Tensor)
    with nullcontext() if waiting is None else waiting.keeping(hidden):
        return checkpoint(block.__call__, *inputs, use_reentrant=False, context_fn=contexts)


def compile_selective(backend: str) -> Callable[..., Tensor]:
    """Compile `run_checkpointed` with `keep_attention`: the block and its link as one."""
    # a link stores its ratio in the forward pass; the recomputation need not store it again
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    # it warns once about in-place operations, of which a block has none
    logging.getLogger("torch._dynamo.variables.higher_order_ops").setLevel(logging.ERROR)

    def run(block: nn.Module, *inputs: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=_attention_kept_by_policy)

    return torch.compile(run, backend=backend)


def _attention_kept_by_policy() -> Contexts:
    """Make the contexts of one compiled block, of which the first attention is kept."""
    attentions = {False: 0, True: 0}  # how many so far: in the forward pass, in the recomputation

    def policy(context: SelectiveCheckpointContext, operation: object, *args: object, **kwargs: object) -> object:
        if operation not in FUSED_ATTENTION:
            return CheckpointPolicy.PREFER_RECOMPUTE
        attentions[context.is_recompute] += 1
        first = attentions[context.is_recompute] == 1
        return CheckpointPolicy.MUST_SAVE if first else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _attention_kept_and_reused() -> Contexts:
    """Make the contexts of one block's forward pass and of its recomputation."""
    kept: list[object] = []
    return _Keep(kept), _Reuse(kept)


class _Keep(TorchDispatchMode):
    """Keeps the result of the block's first attention, which is Wan's self-attention.

    Cross-attention to the few tokens of text and image is cheap, but its result is as large: it is not kept.
    """

    def __init__(self, kept: list[object]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(
        self,
        operation: Callable[..., object],
        types: tuple[type, ...],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = operation(*args, **(kwargs or {}))
        if operation in FUSED_ATTENTION and not self.kept:
            # detached: autograd is about to add the result itself to its graph
            self.kept.append(tree_map_only(Tensor, Tensor.detach, result))
        return result


class _Reuse(_Keep):
    """Returns the kept result instead of attending again."""

    def __torch_dispatch__(
        self,
        operation: Callable[..., object],
        types: tuple[type, ...],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if operation in FUSED_ATTENTION and self.kept:
            return self.kept.pop()
        return operation(*args, **(kwargs or {}))
