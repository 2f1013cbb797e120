"""The speed that a device reaches on bfloat16 matrix products and attention, Wan's among them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention


def measure_ceiling(device: torch.device, tiny: bool) -> dict[str, float]:
    """Measure the TFLOP/s of bfloat16 matrix products and of attention, by name.

    Each is a median of five runs of ten calls.
    """
    if tiny:
        products, attention = [(64, 64, 64), (96, 64, 96)], (1, 2, 72, 16)
    else:
        rows = 2 * 21 * 22 * 39  # both branches
        products = [(4096,) * 3, (8192,) * 3, (16384,) * 3]
        products += [(rows, 5120, 5120), (rows, 5120, 13824), (rows, 13824, 5120), (rows, 1536, 8960)]
        attention = (2, 40, rows // 2, 128)
    found = {}
    for m, k, n in products:
        a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        b = torch.randn(n, k, device=device, dtype=torch.bfloat16)
        found[f"{m} x {k} x {n}"] = 2 * m * k * n / _repeated(partial(linear, a, b), device) / 1e12
    query, key, value = (torch.randn(attention, device=device, dtype=torch.bfloat16) for _ in range(3))
    samples, heads, tokens, width = attention
    product = 2 * samples * heads * tokens * tokens * width

    def attend() -> Tensor:
        return scaled_dot_product_attention(query, key, value)

    found[f"attention {tokens} x {heads} x {width}, forward"] = 2 * product / _repeated(attend, device) / 1e12
    for tensor in (query, key, value):
        tensor.requires_grad_()
    # five products in the backward pass, one of them the scores again
    both = _repeated(lambda: torch.autograd.grad(attend().sum(), (query, key, value)), device)
    found[f"attention {tokens} x {heads} x {width}, forward and backward"] = 7 * product / both / 1e12
    return found


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time one call (s, wall clock), the device idle before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _repeated(work: Callable[[], object], device: torch.device) -> float:
    """Time one call (s): median of five runs of ten calls, after three to warm up."""

    def ten() -> None:
        for _ in range(10):
            work()

    for _ in range(3):
        work()
    return statistics.median(seconds(ten, device) / 10 for _ in range(5))
