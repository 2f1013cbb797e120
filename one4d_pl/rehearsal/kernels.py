"""The kernels that a GPU would choose, for fake tensors: a CPU's need other amounts of memory."""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten
FLASH_WIDTH = 256  # channels of a head that flash attention takes at most


def attend(
    query: Tensor,  # [..., L, D]
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Replace scaled_dot_product_attention by torch's kernels: flash in half precision without mask, else efficient."""
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"attention of {query.dtype} queries, {key.dtype} keys and {value.dtype} values")
    half, narrow = query.dtype in (torch.bfloat16, torch.float16), query.shape[-1] <= FLASH_WIDTH
    if half and narrow and attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    saved = any(tensor.requires_grad for tensor in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, saved, dropout_p, is_causal, scale=scale
    )[0]


def rms_norm(
    hidden: Tensor,  # [..., D]
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Replace rms_norm, which is one kernel on CUDA if input and weight are of one dtype."""
    if torch.is_autocast_enabled("cuda"):
        hidden, weight = hidden.float(), None if weight is None else weight.float()
    if weight is None or weight.dtype != hidden.dtype:
        return torch.rms_norm(hidden, normalized_shape, weight, eps)
    return _FusedNorm.apply(hidden, weight)


class _FusedNorm(torch.autograd.Function):
    """An RMS norm with frozen weights; reads its input once, and saves it and a number per row."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, weight: Tensor) -> Tensor:
        result, row_scale = torch.ops.one4d_rehearsal.rms_norm(hidden, weight)
        ctx.save_for_backward(hidden, weight, row_scale)
        return result

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.ops.one4d_rehearsal.rms_norm_backward(gradient, *ctx.saved_tensors), None  # type: ignore[attr-defined]


@torch.library.custom_op("one4d_rehearsal::rms_norm", mutates_args=())
def _forward(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("for fake tensors")


@_forward.register_fake
def _(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), hidden.new_empty(*hidden.shape[:-1], 1, dtype=torch.float32)


@torch.library.custom_op("one4d_rehearsal::rms_norm_backward", mutates_args=())
def _backward(gradient: Tensor, hidden: Tensor, weight: Tensor, row_scale: Tensor) -> Tensor:
    raise NotImplementedError("for fake tensors")


@_backward.register_fake
def _(gradient: Tensor, hidden: Tensor, weight: Tensor, row_scale: Tensor) -> Tensor:
    return torch.empty_like(hidden)
