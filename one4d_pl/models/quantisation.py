"""Frozen linears with one byte per weight and one scale per output; activations keep their precision.

The scales are those of torchao's Int8WeightOnlyConfig and Float8WeightOnlyConfig. torchao itself is
not used: diffusers imports it wherever it is installed, which costs every command two seconds and
some warnings; autograd would keep its products' floating-point weights, two bytes each, until the
backward pass; and it rounds in the weight's own dtype, which adds 5 % to the error from bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.functional import linear

INT8_HALF_RANGE = 127.5  # of -128 to 127
EPSILON = torch.finfo(torch.float32).eps  # the smallest scale, for an output whose weights are all 0
FLOAT8 = torch.float8_e4m3fn


def quantise_linears(module: nn.Module, kind: str) -> None:
    """Replace every linear below `module` by a QuantisedLinear, in place.

    Args:
        module: frozen, with its values on the device that is to compute the scales.
        kind: "int8" or "fp8" (base.quantisation).
    """
    for path, inner in list(module.named_modules()):
        if isinstance(inner, nn.Linear):
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, QuantisedLinear(inner, kind))


class QuantisedLinear(nn.Linear):
    """A frozen linear whose weight is one byte per number; its bias stays as it is.

    The weight is two buffers, not a parameter: an optimiser or a strategy that looks for parameters
    would not know what to do with bytes.
    """

    quantised: Tensor  # [D', D], int8 or float8
    scale: Tensor  # [D', 1] float32

    def __init__(self, base: nn.Linear, kind: str) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.register_parameter("bias", base.bias)
        quantised, scale = quantise(base.weight.detach(), kind)
        self.register_buffer("quantised", quantised, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:  # [..., D] -> [..., D']
        device = hidden.device.type
        if torch.is_autocast_enabled(device):  # it does not reach into an autograd function
            hidden = hidden.to(torch.get_autocast_dtype(device))
        return _FrozenProduct.apply(hidden, self.quantised, self.scale, self.bias)


class _FrozenProduct(torch.autograd.Function):
    """A product whose backward pass makes the floating-point weight again instead of keeping it."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, quantised: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(quantised, scale)
        if bias is not None:
            bias = bias.to(hidden.dtype)
        return linear(hidden, dequantise(quantised, scale, hidden.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        quantised, scale = ctx.saved_tensors
        return gradient @ dequantise(quantised, scale, gradient.dtype), None, None, None


def quantise(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:  # [D', D] -> the same in bytes, [D', 1]
    """Round a weight to int8 or float8 (e4m3), so that each output's largest weight is at its limit."""
    largest = weight.abs().amax(dim=1, keepdim=True).float()
    if kind == "int8":
        scale = (largest / INT8_HALF_RANGE).clamp_min(EPSILON)
        return (weight / scale).round_().clamp_(-128, 127).to(torch.int8), scale
    limit = torch.finfo(FLOAT8).max
    scale = (largest / limit).clamp_min(EPSILON)
    return (weight / scale).clamp_(-limit, limit).to(FLOAT8), scale


def dequantise(quantised: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:  # [D', D]
    """Return the weight in `dtype`: bytes fit bfloat16 exactly, so it is rounded only once, after scaling."""
    return quantised.to(dtype).mul_(scale)
