"""The base transformer's weights, streamed: tensor by tensor into place, block by block, never two copies.

1. The module is built with empty (meta) parameters; its buffers are real.
2. Each block's tensors are read from the safetensors files, cast, and put on the device.
3. Where a `Partitioner` shards the model (ZeRO-3), it takes each block as soon as it is whole, so no process ever
   holds more than its share and one block. Only one process reads then; the others receive.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from one4d_pl.config import ConfigError


class Partitioner(Protocol):
    """What shards the frozen blocks over the processes (training/strategy.py)."""

    reads: bool  # whether this process reads the files; the others receive what it read

    def partition(self, module: nn.Module) -> None:
        """Collective: spread the reading process's values of a module's parameters over all processes."""


class TensorFiles:
    """The tensors of a folder of safetensors files by name; ConfigError names the file that cannot be read."""

    def __init__(self, folder: Path) -> None:
        self._files = {}
        self._shapes: dict[str, list[int]] = {}
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ConfigError(f"base.path: {folder} holds no .safetensors file")
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{path}: cannot be read, it is damaged or cut short ({error})") from None
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                self._files[name] = file
                self._shapes[name] = file.get_slice(name).get_shape()

    def refuse_other(self, expected: dict[str, torch.Size], folder: Path, unused: list[str] | None) -> None:
        """ConfigError unless exactly these tensors are there, in these shapes; `unused` ones may be, too."""
        found = {name for name in self._shapes if not any(part in name for part in unused or ())}
        if differing := sorted(expected.keys() ^ found):
            what = "is missing" if differing[0] in expected else "is unexpected"
            raise ConfigError(f"{folder}: {len(differing)} tensors differ; {differing[0]} {what}")
        for name, shape in expected.items():
            if list(shape) != self._shapes[name]:
                raise ConfigError(f"{folder}: {name} is {self._shapes[name]}, config.json says {list(shape)}")

    def read(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)


def stream_transformer(
    folder: Path,  # with config.json and the safetensors files, diffusers' names
    dtype: torch.dtype,  # but norms, time embedder and modulation, which diffusers keeps in float32
    device: torch.device,
    partitioner: Partitioner | None,
) -> WanTransformer3DModel:
    """The frozen base; ConfigError names what is damaged, missing or of another shape."""
    try:
        config = WanTransformer3DModel.load_config(folder)
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{folder}: no readable config.json ({error})") from None
    with init_empty_weights(include_buffers=False):
        model = WanTransformer3DModel.from_config(config)
    files = TensorFiles(folder)
    files.refuse_other(
        {name: p.shape for name, p in model.named_parameters()}, folder, model._keys_to_ignore_on_load_unexpected
    )
    kept = model._keep_in_fp32_modules or []

    def fill(module: nn.Module, prefix: str) -> None:
        for name, empty in list(module.named_parameters()):
            if not empty.is_meta:
                continue
            path = f"{prefix}{name}"
            wanted = torch.float32 if any(part in path.split(".") for part in kept) else dtype
            if partitioner is None or partitioner.reads:
                tensor = files.read(path).to(device, wanted, copy=True)
            else:
                tensor = torch.empty(empty.shape, dtype=wanted, device=device)
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))

    for i, block in enumerate(model.blocks):
        fill(block, f"blocks.{i}.")
        if partitioner is not None:
            partitioner.partition(block)
    fill(model, "")
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    return model.eval()
