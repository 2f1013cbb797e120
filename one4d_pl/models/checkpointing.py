"""Activation checkpointing of the transformer's blocks: recomputed whole, or all but self-attention.

Self-attention is the part of a block that grows with the square of the tokens, and its result is as small as the
block's input: keeping it doubles what is kept of a block and saves a third of what is recomputed at 18 thousand tokens.

Not torch's create_selective_checkpoint_contexts: since torch 2.13 it wants every operation of the recomputation to be
one of the forward pass, and under ZeRO-3 what is gathered and freed differs between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, noop_context_fn

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
    contexts = _attention_kept_and_reused if keep_attention else noop_context_fn
    return checkpoint(block.__call__, *inputs, use_reentrant=False, context_fn=contexts)


def _attention_kept_and_reused() -> tuple[_Keep, _Reuse]:
    """Contexts of one block's forward pass and of its recomputation."""
    kept: list[object] = []
    return _Keep(kept), _Reuse(kept)


class _Keep(TorchDispatchMode):
    """Keeps what the block's first attention gives, which is Wan's self-attention.

    Attention on the few tokens of text and image is cheap, and its result is as large: it is not kept.
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
