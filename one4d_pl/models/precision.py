"""bfloat16 autocast of the network, and what a processor suits: attention kernels, the compiler."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from one4d_pl.config import TEMPORAL_FACTOR, Config

SHORT = 1024  # tokens; up to so many a CPU is faster with the whole matrix of scores than with it block by block
# values of ONEDNN_MAX_CPU_ISA that leave oneDNN its bfloat16 instructions
BFLOAT16_ISAS = ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT")


def computes_bfloat16(device: torch.device) -> bool:
    """Tell whether the device has bfloat16 arithmetic.

    A processor without it converts every number to float32 and back, which makes bfloat16 12 to 20
    times slower than float32.
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


def training_attention(config: Config, device: torch.device) -> str:
    """Choose training's attention kernels: base.attention, or faster ones on this device.

    On a CPU in bfloat16 the backward pass of torch's fused attention takes three times as long as
    two products and a softmax, whose memory grows with the square of the tokens: so for short clips
    only. Selective checkpointing knows only fused kernels.
    """
    data, chosen = config.data, config.base.attention
    # an upper bound: patches hold several latent pixels
    tokens = ((data.num_frames - 1) // TEMPORAL_FACTOR + 1) * (data.height // 8) * (data.width // 8)
    plain = chosen == "native" and device.type == "cpu" and uses_bfloat16(config, device) and tokens <= SHORT
    return "_native_math" if plain and config.train.activation_checkpointing != "selective" else chosen


def can_compile(device: torch.device) -> bool:
    """Tell whether torch.compile can generate code for the device: a CPU needs a C++ compiler."""
    if device.type != "cpu":
        return True
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


def autocast(bfloat16: bool, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of bfloat16 autocast, for what Lightning does not wrap.

    Where it is not asked for, the context does nothing.
    """
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()


def describe_precision(config: Config, device: torch.device) -> str:
    """Say in which precision the network runs, and why, where it is not the one asked for."""
    if uses_bfloat16(config, device):
        return "bf16-mixed"
    if config.train.precision == "bf16-mixed":
        return "float32 (this processor has no bfloat16 arithmetic)"
    return "float32"
