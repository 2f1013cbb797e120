"""A pretended CUDA device, for fake tensors under a CPU build of torch.

1. `load_device` builds fake_cuda.cpp and loads it. This comes before torch is imported, since torch
   looks up its hooks only once.
2. `pretend` makes torch's Python side report the device, too, while a rehearsal lasts.

Nothing is ever computed: tensors have a device, a dtype and a shape, and no bytes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING
from unittest.mock import patch

from one4d_pl.config import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from one4d_pl.rehearsal.watch import Watch

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILER = "g++"
LIBRARIES = ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so")
NAME = "a GPU that is not there"


def load_device() -> None:
    """Register the device with torch's C++ side. ConfigError says why that fails and what would help."""
    if "torch" in sys.modules:
        raise RuntimeError("load_device: torch is imported already, and has looked for its CUDA hooks")
    root = _torch_folder()
    version = re.search(r"^cuda[^=]*= *(.*)$", (root / "version.py").read_text(), re.MULTILINE)
    if version is not None and version[1] != "None":
        return  # a CUDA build has its own device; `pretend` checks that there is a GPU
    if shutil.which(COMPILER) is None:
        raise ConfigError(f"rehearse: no {COMPILER} here, and a CPU build of torch needs it for a device to pretend")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "libfake_cuda.so"
        command = [COMPILER, "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root / 'include'}", str(SOURCE)]
        command += [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root / 'lib'}", "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
            raise ConfigError(f"rehearse: {COMPILER} cannot build {SOURCE.name} against this torch: {first}")
        for name in LIBRARIES:
            ctypes.CDLL(str(root / "lib" / name), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(built))


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("rehearse: torch is not installed; see `make setup`")
    return Path(found.submodule_search_locations[0])


@contextmanager
def pretend(watch: Watch) -> Iterator[torch.device]:
    """Enter fake tensors and a `torch.cuda` of one device whose peak memory is the watch's; yield the device.

    Raises ConfigError under a CUDA build of torch without a GPU: its own device cannot be replaced.
    """
    import torch
    from torch._subclasses import fake_tensor

    from one4d_pl.models import encoder_files, weights
    from one4d_pl.rehearsal import kernels

    if torch.version.cuda is not None and not torch.cuda.is_available():
        raise ConfigError(
            "rehearse: this torch is a CUDA build, which needs a GPU even for fake tensors; rehearse on a machine with "
            "one, or with a CPU build of torch (make setup VENV=.venv-cpu TORCH_INDEX=<pip's index of CPU builds>)"
        )
    device = torch.device("cuda", 0)
    with ExitStack() as stack:
        if torch.version.cuda is None:
            for name, value in _python_side(watch).items():
                stack.enter_context(patch.object(torch.cuda, name, value))
            stack.enter_context(patch.object(fake_tensor, "init_gpu_context", lambda device: None))
            # makes torch.tensor(..., device="cuda") on the CPU and then moves it as a fake tensor
            stack.enter_context(patch.object(fake_tensor.FakeTensorMode, "avoid_device_init", True))
            stack.enter_context(patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None))
        # tensors without bytes cannot be pinned
        stack.enter_context(patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor))
        stack.enter_context(patch.object(torch.nn.Module, "_apply", _apply))
        stack.enter_context(patch.object(torch.nn.functional, "scaled_dot_product_attention", kernels.attend))
        stack.enter_context(patch.object(torch.nn.functional, "rms_norm", kernels.rms_norm))
        stack.enter_context(patch.object(fake_tensor.FakeTensor, "__deepcopy__", _deepcopy))
        stack.enter_context(patch.object(fake_tensor.FakeTensor, "data", _data_property(), create=True))
        for module in (weights, encoder_files):
            stack.enter_context(patch.object(module, "init_empty_weights", _empty_weights))
        stack.enter_context(patch.object(weights, "_open", _open_header))
        stack.enter_context(fake_tensor.FakeTensorMode(allow_non_fake_inputs=True))
        yield device


def _python_side(watch: Watch) -> dict[str, object]:
    """List replacements of torch.cuda's functions, whose C++ module a CPU build lacks."""
    properties = SimpleNamespace(name=NAME, total_memory=2**62, major=9, minor=0, multi_processor_count=132)

    def answer(value: object) -> object:
        return lambda *args, **kwargs: value

    class Stream:
        """A stream, and an event of it: nothing is ever computed, so nothing is waited for."""

        def __init__(self, *args: object) -> None:
            pass

        wait_stream = wait = answer(None)

        def record_event(self) -> Stream:
            return self

    silent = ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "manual_seed", "manual_seed_all")
    return {
        "is_available": answer(True),
        "is_initialized": answer(True),
        "is_bf16_supported": answer(True),
        "device_count": answer(1),
        "current_device": answer(0),
        "get_device_name": answer(NAME),
        "get_device_capability": answer((9, 0)),
        "get_device_properties": answer(properties),
        "Stream": Stream,
        "current_stream": Stream,
        "stream": nullcontext,
        "max_memory_allocated": lambda *args: watch.peak,
        **dict.fromkeys(silent, answer(None)),
    }


def _apply(self: torch.nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
    """Replace Module._apply, which changes parameters in place: fake ones have to be made anew."""
    import torch

    for child in self.children() if recurse else ():
        child._apply(fn)
    with torch.no_grad():
        for name, parameter in self._parameters.items():
            if parameter is not None and (moved := fn(parameter)) is not parameter:
                self._parameters[name] = torch.nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = fn(buffer)
    return self


def _data_property() -> property:
    """Replace Tensor.data: assigning to a fake tensor's changes its bytes, but not its device."""
    import torch

    plain = torch.Tensor.data

    def assign(tensor: Tensor, value: Tensor) -> None:
        plain.__set__(tensor, value)  # type: ignore[attr-defined]
        tensor.fake_device = value.device  # type: ignore[attr-defined]

    return property(plain.__get__, assign)  # type: ignore[attr-defined]


@contextmanager
def _empty_weights(include_buffers: bool) -> Iterator[None]:
    """Replace accelerate's init_empty_weights, which mistakes fake parameters for empty ones."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    register = torch.nn.Module.register_parameter

    def register_empty(self: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        register(self, name, parameter)
        if parameter is not None:
            with unset_fake_temporarily():
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                self._parameters[name] = torch.nn.Parameter(empty, parameter.requires_grad)

    with patch.object(torch.nn.Module, "register_parameter", register_empty):
        yield


def _open_header(path: Path) -> tuple[dict[str, list[int]], Callable[[str], Tensor]]:
    """Replace models/weights.py's `_open`: a skeleton has shapes, but no bytes."""
    import torch

    from one4d_pl.models.base_files import safetensors_header

    shapes = {name: tensor["shape"] for name, tensor in safetensors_header(path).items()}
    return shapes, lambda name: torch.empty(shapes[name], dtype=torch.bfloat16, device="cpu")


def _deepcopy(self: Tensor, memo: dict[int, Tensor]) -> Tensor:
    """Replace Tensor.__deepcopy__, which copies the storage that a fake tensor does not have."""
    import torch

    if id(self) not in memo:
        copy = self.detach().clone()
        memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if getattr(self, "_is_param", False) else copy
    return memo[id(self)]
