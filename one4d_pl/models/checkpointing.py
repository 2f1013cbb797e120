"""Activation checkpointing of the transformer's blocks: recomputed whole, or all but self-attention.

Self-attention is the part of a block that grows with the square of the tokens, and its result is as
small as the block's input: keeping it doubles what is kept of a block and saves a third of what is
recomputed at 18 thousand tokens.

Not torch's create_selective_checkpoint_contexts: since torch 2.13 it wants every operation of the
recomputation to be one of the forward pass, and under ZeRO-3 what is gathered and freed differs
between the two. A compiled block, which ZeRO-3 never has, takes that one: the compiler does not
look through a mode of ours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

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

# those of a block's forward pass and of its recomputation
Contexts = tuple[AbstractContextManager[object], AbstractContextManager[object]]

_aten = torch.ops.aten
FUSED_ATTENTION = (
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def run_checkpointed(block: nn.Module, *inputs: Tensor | tuple[Tensor, Tensor], keep_attention: bool) -> Tensor:
    """The block's result, hooks (links) included; its activations are computed again in the backward pass.

    Non-reentrant, for everything upstream of the first LoRA is frozen.

    Args:
        block: called with `inputs`.
        inputs: hidden state, context, modulation, rotary embedding; as diffusers passes them.
        keep_attention: keep what self-attention gives.
    """
    contexts: Callable[[], Contexts] = _attention_kept_and_reused if keep_attention else noop_context_fn
    return checkpoint(block.__call__, *inputs, use_reentrant=False, context_fn=contexts)


def compile_selective(backend: str) -> Callable[..., Tensor]:
    """`run_checkpointed` with `keep_attention`, compiled as one: the block, its link and what is kept of them."""
    # a link notes its ratio in the forward pass; that the recomputation does not note it again is
    # right
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    # warns once of operations in place, of which a block has none
    logging.getLogger("torch._dynamo.variables.higher_order_ops").setLevel(logging.ERROR)

    def run(block: nn.Module, *inputs: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=_attention_kept_by_policy)

    return torch.compile(run, backend=backend)


def _attention_kept_by_policy() -> Contexts:
    """Contexts of one block that is compiled: its first attention is kept, all else computed again."""
    attentions = {False: 0, True: 0}  # in the forward pass, in the recomputation

    def policy(context: SelectiveCheckpointContext, operation: object, *args: object, **kwargs: object) -> object:
        if operation not in FUSED_ATTENTION:
            return CheckpointPolicy.PREFER_RECOMPUTE
        attentions[context.is_recompute] += 1
        first = attentions[context.is_recompute] == 1
        return CheckpointPolicy.MUST_SAVE if first else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _attention_kept_and_reused() -> Contexts:
    """Contexts of one block's forward pass and of its recomputation."""
    kept: list[object] = []
    return _Keep(kept), _Reuse(kept)


class _Keep(TorchDispatchMode):
    """Keeps what the block's first attention gives, which is Wan's self-attention.

    Attention on the few tokens of text and image is cheap, and its result is as large: it is not
    kept.
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
            self.kept.append(tree_map_only(Tensor, Tensor.detach, result))  # autograd gives the result itself a history
        return result


class _Reuse(_Keep):
    """Gives what was kept instead of attending again."""

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
