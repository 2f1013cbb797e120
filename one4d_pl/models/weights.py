"""The base's weights, streamed into place tensor by tensor, never in two copies.

1. The module is built with empty (meta) parameters; its buffers are real.
2. Each tensor is read from the files (diffusers' or Wan's own names), cast, and put on the device.
3. Where a `Partitioner` shards the transformer (ZeRO-3), it takes each block as soon as it is whole, so no process ever
   holds more than its share and one block. Only one process then reads the files; the others receive from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from one4d_pl.config import ConfigError
from one4d_pl.errors import LFS_HINT, is_lfs_pointer
from one4d_pl.models.base_files import is_original, transformer_config, weight_files
from one4d_pl.models.original_names import Source, same_name, transformer_source

Module = TypeVar("Module", bound=nn.Module)


class Partitioner(Protocol):
    """Shards the frozen blocks over the processes (training/zero.py)."""

    reads: bool  # whether this process reads the files; the others receive what it read

    def partition(self, module: nn.Module) -> None:
        """Spread the reading process's values of a module's parameters over all processes. This is a collective."""


class TensorFiles:
    """The tensors of some files, by our names; ConfigError names the file that cannot be read.

    Args:
        paths: .safetensors and .pth files. Of a .pth file nothing but tensors is unpickled; it is
            memory-mapped, so that its tensors cost no memory until they are used.
        where: their folder, for messages.
        source_of: maps our name of a tensor to its place in the files.
    """

    def __init__(self, paths: Sequence[Path], where: Path, source_of: Callable[[str], Source] = same_name) -> None:
        self.where, self.source_of = where, source_of
        self._path: dict[str, Path] = {}
        self._shape: dict[str, list[int]] = {}
        self._read: dict[str, Callable[[str], Tensor]] = {}
        if not paths:
            raise ConfigError(f"base.path: {where} holds no weights (.safetensors, .pth)")
        for path in paths:
            shapes, read = _open(path)
            for key, shape in shapes.items():
                self._path[key], self._shape[key], self._read[key] = path, shape, read

    def __contains__(self, key: str) -> bool:
        return key in self._shape

    def shape(self, key: str) -> list[int]:
        """Return the shape of a tensor by its name in the files. Raises ConfigError where it is missing."""
        if key not in self._shape:
            raise ConfigError(f"{self._missing_from(key)}: {key} is missing")
        return self._shape[key]

    def count(self, pattern: str) -> int:
        """Count the tensors that are named `pattern` with 0, 1, 2, ... for its #."""
        i = 0
        while pattern.replace("#", str(i)) in self._shape:
            i += 1
        return i

    def refuse_other(self, expected: dict[str, torch.Size], unused: Sequence[str]) -> None:
        """Raise ConfigError unless exactly these tensors (our names) are there, in these shapes.

        Tensors whose names hold one of `unused` may be there, too. The error names the file and the
        tensor by the file's own name for it.
        """
        sources = {name: self.source_of(name) for name in expected}
        needed = {source.key for source in sources.values()}
        found = {key for key in self._shape if key in needed or not any(part in key for part in unused)}
        if differing := sorted(needed ^ found):
            key = differing[0]
            fault = f"{key} is missing" if key in needed else f"{key} is unexpected"
            more = f" ({len(differing)} tensors differ)" if len(differing) > 1 else ""
            raise ConfigError(f"{self._path.get(key) or self._missing_from(key)}: {fault}{more}")
        for name, shape in expected.items():
            source = sources[name]
            stored = self._shape[source.key]
            if stored != [1] * source.leading + [source.parts * shape[0], *shape[1:]]:
                raise ConfigError(f"{self._path[source.key]}: {source.key} is {stored}, {name} should be {list(shape)}")

    def read(self, name: str) -> Tensor:
        """Read a tensor by our name, in the file's dtype; it may still lie in the mapped file."""
        source = self.source_of(name)
        tensor = self._read[source.key](source.key)
        return tensor.flatten(0, source.leading).chunk(source.parts)[source.part]

    def _missing_from(self, key: str) -> Path:
        """Return the shard that should hold a tensor by the index, else the only file or folder."""
        for index in self.where.glob("*.index.json"):
            if shard := json.loads(index.read_text()).get("weight_map", {}).get(key):
                return self.where / shard
        paths = set(self._path.values())
        return paths.pop() if len(paths) == 1 else self.where


def stream(
    model: Module,  # with meta parameters
    files: TensorFiles,
    dtype: torch.dtype,
    device: torch.device,
    float32: Sequence[str] = (),  # parts of names that stay in float32
    unused: Sequence[str] = (),  # parts of names in the files that the model does not have
    blocks: nn.ModuleList | None = None,  # filled first, and each given to the partitioner
    partitioner: Partitioner | None = None,
    after_block: Callable[[nn.Module], None] = lambda block: None,  # called with each filled block
) -> Module:
    """Fill the model, frozen and in eval mode. ConfigError names the file and the tensor that does not fit."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    files.refuse_other({name: parameter.shape for name, parameter in model.named_parameters()}, unused)

    def fill(module: nn.Module) -> None:
        for inner, empty in list(module.named_parameters()):
            if not empty.is_meta:
                continue
            path = names[id(empty)]
            wanted = torch.float32 if any(part in path.split(".") for part in float32) else dtype
            if partitioner is None or partitioner.reads:
                tensor = files.read(path).to(device, wanted, copy=True)
            else:
                tensor = torch.empty(empty.shape, dtype=wanted, device=device)
            owner, _, leaf = inner.rpartition(".")
            setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))

    for block in blocks or ():
        fill(block)
        if partitioner is not None:
            partitioner.partition(block)
        after_block(block)
    fill(model)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    return model.eval()


def stream_transformer(
    folder: Path,  # of the base
    dtype: torch.dtype,  # of all but norms, time embedder and modulation, which diffusers keeps in float32
    device: torch.device,
    partitioner: Partitioner | None,
    after_block: Callable[[nn.Module], None],
) -> WanTransformer3DModel:
    """Load the frozen transformer. ConfigError names what is damaged, missing or of another shape."""
    config = transformer_config(folder)
    with init_empty_weights(include_buffers=False):
        model = WanTransformer3DModel.from_config(config)
    original = is_original(folder)
    files = TensorFiles(
        weight_files(folder, "transformer"),
        folder if original else folder / "transformer",
        transformer_source if original else same_name,
    )
    return stream(
        model,
        files,
        dtype,
        device,
        float32=model._keep_in_fp32_modules or (),
        unused=model._keys_to_ignore_on_load_unexpected or (),
        blocks=model.blocks,
        partitioner=partitioner,
        after_block=after_block,
    )


def _open(path: Path) -> tuple[dict[str, list[int]], Callable[[str], Tensor]]:
    """Return the shapes of a file's tensors, and a function that reads one."""
    if is_lfs_pointer(path):
        raise ConfigError(f"{path}: {LFS_HINT}")
    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt")
            names = list(file.keys())  # safe_open's object cannot be iterated itself
            return {name: file.get_slice(name).get_shape() for name in names}, file.get_tensor
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError:
        raise ConfigError(f"{path}: holds more than tensors, or is no file of torch; it is not opened") from None
    except (OSError, EOFError, RuntimeError, SafetensorError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{path}: cannot be read, it is damaged or cut short ({first})") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ConfigError(f"{path}: is no table of tensors by name")
    return {name: list(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__
