"""The record of a rehearsal: live bytes, traffic, waits for the GPU, errors of CUDA."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from one4d_pl.rehearsal.known import Known

aten = torch.ops.aten
PACKAGE = Path(__file__).parents[1]
COMMANDS = (PACKAGE, PACKAGE / "commands", Path(__file__).parent)  # folders of commands and of the rehearsal itself
WAITS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default)
# an operation whose name holds one of these does no elementwise work
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution", "_scaled_dot_product")


@dataclass
class Phase:
    """The record of one phase of a step."""

    peak: int = 0  # bytes alive on the GPU
    block_bytes: int = 0  # read and written by operations within the blocks
    block_elementwise: int = 0  # of these, by other operations than products and attention
    waits: Counter[str] = field(default_factory=Counter)  # place -> times the CPU waited for the GPU
    uploads: int = 0  # copies from the host to the GPU
    # (kind of module, operation) -> wide float32 results
    wide: Counter[tuple[str, str]] = field(default_factory=Counter)
    by_operation: Counter[str] = field(default_factory=Counter)  # bytes of blocks' operations


class Watch(TorchDispatchMode):
    """A mode that sees every operation of a rehearsal; `begin` names the phase that it counts for.

    `wide`: float32 results within the blocks are noted from so many elements on (tokens x width).
    """

    def __init__(self, wide: int = sys.maxsize) -> None:
        super().__init__()
        self.wide = wide
        self.known = Known()
        self.now = self.peak = 0
        self.phases: dict[str, Phase] = {}
        self.phase, self.current = "", Phase()
        self.failed_in = ""  # the module in which an error was raised
        self.at_peak: dict[int, tuple[int, str]] = {}
        self._alive: dict[int, tuple[int, str]] = {}
        self._gone: dict[int, weakref.ref[object]] = {}
        self._names: dict[int, str] = {}
        self._stack: list[nn.Module] = []
        self._in_blocks = False

    def begin(self, name: str) -> None:
        """Begin the phase of this name."""
        self.phase = name
        self.current = self.phases.setdefault(name, Phase())
        self.current.peak = max(self.current.peak, self.now)
        self._in_blocks = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch every operation and module call of this section."""
        handles = [
            module_hooks.register_module_forward_pre_hook(self._enter),
            module_hooks.register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def name(self, root: nn.Module, part: str) -> None:
        """Name modules by their paths below `root`, and its parameters' memory by the part."""
        self._names |= {id(module): name for name, module in root.named_modules()}
        for parameter in root.parameters():
            key = _key(parameter)
            if key in self._alive:
                kind = "trained" if parameter.requires_grad else "frozen"
                self._alive[key] = (self._alive[key][0], f"{kind} weights of the {part}")

    @property
    def where(self) -> str:
        """Return the name of the innermost named module that is running; "" where none is."""
        return next((self._names[id(m)] for m in reversed(self._stack) if id(m) in self._names), "")

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: tuple[type, ...],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        if is_composite(func):
            with self:  # inference mode passes composite operations whole: watch their parts instead
                return func.decompose(*args, **kwargs)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in WAITS and any(tensor.is_cuda for tensor in read):
            self._wait(func)
        if func is aten._local_scalar_dense.default:
            return self.known.item(read[0])
        if func is aten.nonzero.default:
            return self.known.nonzero(read[0])
        args = self._without_masks(func, args)
        try:
            result = func(*args, **kwargs)
            made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            refuse_generator(func, kwargs.get("generator"), made)
        except Exception:
            self.failed_in = self.where  # noted here: hooks leave the module before the error is caught
            raise
        self.known.follow(func, args, kwargs, made)
        # a copy into pinned memory that nobody waits for
        beside = func is aten.copy_.default and (kwargs.get("non_blocking") or args[2:3] == (True,))
        self._count(func, read, made, waits=not beside)
        return result

    def _without_masks(self, func: OpOverload, args: tuple[object, ...]) -> tuple[object, ...]:
        """Replace masks by indices: fake tensors do not know how many elements are true."""
        if func not in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            return args
        indices: list[object] = []
        assert isinstance(args[1], list | tuple)
        for index in args[1]:
            if isinstance(index, Tensor) and index.dtype == torch.bool:
                if index.is_cuda:
                    self._wait(func)
                indices += self.known.indices(index)
            else:
                indices.append(index)
        return (args[0], indices, *args[2:])

    def _count(self, func: OpOverload, read: list[Tensor], made: list[Tensor], waits: bool) -> None:
        name = str(func)
        if "copy" in name and len({tensor.device.type for tensor in [*read[:2], *made]}) > 1:
            if made[0].is_cuda:
                self.current.uploads += 1
            elif waits:
                self._wait(func)
        storages = {_key(tensor) for tensor in read}
        mutable = func._schema.is_mutable
        view = not mutable and any(_key(tensor) in storages for tensor in made)
        for tensor in made:
            self._track(tensor, f"{self.where or self.phase} {name} {list(tensor.shape)} {str(tensor.dtype)[6:]}")
        if view or not made or name.startswith(("aten.empty", "aten.new_empty", "aten.detach", "aten.alias")):
            return
        if not self._in_blocks:
            return
        moved = sum(_bytes(tensor) for tensor in [*read, *made] if tensor.is_cuda)
        self.current.block_bytes += moved
        self.current.by_operation[name] += moved
        if not any(part in name for part in PRODUCTS):
            self.current.block_elementwise += moved
        if any(tensor.dtype == torch.float32 and tensor.numel() >= self.wide for tensor in made if tensor.is_cuda):
            kind = type(self._stack[-1]).__name__ if self._stack else "backward"
            self.current.wide[kind, name] += 1

    def _wait(self, func: OpOverload) -> None:
        self.current.waits[f"{place()} ({str(func).removeprefix('aten.').partition('.')[0]})"] += 1

    def _track(self, tensor: Tensor, label: str) -> None:
        if not tensor.is_cuda:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = (storage.nbytes(), label)
        self._gone[key] = weakref.ref(storage, lambda _: self._drop(key))
        self.now += storage.nbytes()
        self.current.peak = max(self.current.peak, self.now)
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, dict(self._alive)

    def _drop(self, key: int) -> None:
        self.now -= self._alive.pop(key)[0]
        del self._gone[key]

    def _enter(self, module: nn.Module, inputs: object) -> None:
        self._stack.append(module)
        if _is_block(module):
            self._in_blocks = True

    def _leave(self, module: nn.Module, inputs: object, result: object) -> None:
        if result is not None:
            self.failed_in = ""
        elif not self.failed_in:  # an error of a check that came before any operation
            self.failed_in = self.where
        if self._stack:
            self._stack.pop()
        if _is_block(module):
            # a recomputed block: its backward pass follows
            self._in_blocks = torch._C._current_graph_task_id() != -1
            if isinstance(result, Tensor) and result.requires_grad:
                result.register_hook(self._backward_begins)

    def _backward_begins(self, gradient: Tensor) -> None:
        self._in_blocks = True


def refuse_generator(func: OpOverload, generator: object, made: list[Tensor]) -> None:
    """Raise RuntimeError for a generator of another device, as CUDA's kernels do."""
    if not isinstance(generator, torch.Generator):
        return
    for tensor in made:
        if tensor.device.type != generator.device.type:
            raise RuntimeError(
                f"{func}: expected a '{tensor.device.type}' device type for generator but found "
                f"'{generator.device.type}'"
            )


def place() -> str:
    """Find the innermost running line of this package, but for the rehearsal's, as `models/lora.py:93`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if (found := place_of(frame.f_code.co_filename, frame.f_lineno)) is not None:
            return found
        frame = frame.f_back
    return "other libraries"


def place_of(file: str, line: int) -> str | None:
    """Write a line of this package as `models/lora.py:93`. Returns None for others and for the rehearsal's."""
    path = Path(file)
    if PACKAGE not in path.parents or path.parent in COMMANDS or path.name == "signals.py":
        return None  # commands and their callers
    return f"{path.relative_to(PACKAGE)}:{line}"


@cache
def is_composite(func: OpOverload) -> bool:
    """Tell whether an operation is made of others."""
    return func.namespace == "aten" and func._can_decompose()


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    """Count the bytes that reading a tensor moves; an expanded one is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _is_block(module: nn.Module) -> bool:
    return type(module).__name__ == "WanTransformerBlock"
