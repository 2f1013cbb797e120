"""Why torch sees no GPU: a driver older than torch's CUDA, and which torch fits it."""

from __future__ import annotations

import os
import re
import subprocess

import torch

NVIDIA_SMI_PATIENCE_S = 20.0  # it wakes each GPU first, which takes seconds; with a broken driver it hangs
# "CUDA UMD Version" is what the newest driver alone prints
DRIVER_CUDA = re.compile(r"CUDA (?:UMD )?Version:\s*(\d+)\.(\d+)")
# driver's CUDA -> the PyTorch index whose builds every driver of that major version runs (CUDA's minor version
# compatibility). torch 2.13 is built for these two; no torch that setup.cfg allows is built for CUDA 11.
TORCH_INDEXES = {12: "cu126", 13: "cu130"}


def driver_mismatch() -> str | None:
    """Say in one line that torch sees no GPU because the NVIDIA driver is older than torch's CUDA.

    Returns None otherwise; also where no driver is found, or where CUDA_VISIBLE_DEVICES hides the GPUs on purpose.
    """
    if torch.cuda.is_available() or torch.version.cuda is None:
        return None
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    driver = _driver_cuda()
    # within one major version an older driver runs newer builds
    if driver is None or driver[0] >= int(torch.version.cuda.split(".")[0]):
        return None
    mismatch = (
        f"the NVIDIA driver is of CUDA {driver[0]}.{driver[1]}, torch {torch.__version__} is built for CUDA "
        f"{torch.version.cuda}, so torch sees no GPU; "
    )
    index = TORCH_INDEXES.get(driver[0])
    if index is None:
        return f"{mismatch}get a newer driver: no torch that one4d_pl takes is built for CUDA {driver[0]}"
    return f"{mismatch}get a newer driver, or `make setup TORCH_INDEX=...` with the address of PyTorch's {index} index"


def _driver_cuda() -> tuple[int, int] | None:
    """Ask nvidia-smi for the newest CUDA that this machine's driver runs. Returns None without a working driver."""
    try:
        asked = subprocess.Popen(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:  # not installed, or not executable for this user
        return None
    try:
        shown, _ = asked.communicate(timeout=NVIDIA_SMI_PATIENCE_S)
    except subprocess.TimeoutExpired:
        asked.kill()  # not waited for: a process that hangs inside a broken driver survives even this
        return None
    found = DRIVER_CUDA.search(shown.decode(errors="replace"))
    return (int(found[1]), int(found[2])) if found else None
