"""Where the network runs under bfloat16 autocast: one rule for training, sampling and evaluation."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

import torch

from one4d_pl.config import Config

# values of ONEDNN_MAX_CPU_ISA that leave oneDNN its bfloat16 instructions
BFLOAT16_ISAS = ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT")


def computes_bfloat16(device: torch.device) -> bool:
    """Tell whether the device has bfloat16 arithmetic.

    A processor without it converts every number to float32 and back, which takes 12 to 20 times as long as float32.
    """
    if device.type != "cpu":
        return True
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    return (
        torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        and any(isa in limit for isa in BFLOAT16_ISAS)
    )


def uses_bfloat16(config: Config, device: torch.device) -> bool:
    """Tell whether the network runs under bfloat16 autocast on this device.

    Where the processor has no bfloat16 arithmetic, train.precision=bf16-mixed means float32. A base whose weights are
    bfloat16 needs autocast everywhere, since the adapter's own weights are float32.
    """
    if config.train.precision != "bf16-mixed":
        return False
    return config.base.dtype == "bfloat16" or computes_bfloat16(device)


def autocast(config: Config, device: torch.device) -> AbstractContextManager[object]:
    """Enter the precision of training, for what Lightning does not wrap."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(config, device))


def describe_precision(config: Config, device: torch.device) -> str:
    """Say in which precision the network runs, and why where it is not the one that was asked for."""
    if uses_bfloat16(config, device):
        return "bf16-mixed"
    if config.train.precision == "bf16-mixed":
        return "float32 (this processor has no bfloat16 arithmetic)"
    return "float32"
