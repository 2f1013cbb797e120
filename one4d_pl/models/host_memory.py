"""What waits in host memory while the GPU does not need it: weights of blocks, inputs of blocks.

Copies run on a stream of their own, one block ahead of the work. On a CPU the same code copies from
host memory to host memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from one4d_pl.models.quantisation import QuantisedLinear

Slot = tuple[dict[str, Tensor | None], str]  # a module's parameters or buffers, and a name among them


class Copies:
    """Copies between host and device, beside the work of the device's current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, tensors: list[Tensor], device: torch.device) -> Moving:
        """Begin to copy tensors to the device or from it, after all work that was given to it so far.

        Memory of the GPU is taken and freed by the current stream, so it is not used again too early.
        """
        pinned = device.type == "cpu" and self.stream is not None
        made = [torch.empty(t.shape, dtype=t.dtype, device=device, pin_memory=pinned) for t in tensors]
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            for copy, tensor in zip(made, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
                if tensor.is_cuda and self.stream is not None:
                    tensor.record_stream(self.stream)
        return Moving(made, None if self.stream is None else self.stream.record_event())


@dataclass
class Moving:
    """Tensors that are being copied."""

    tensors: list[Tensor]
    copied: torch.cuda.Event | None

    def arrive(self) -> list[Tensor]:
        """Let the current stream wait for the copy; return the tensors."""
        if self.copied is not None:
            self.copied.wait()
        return self.tensors


class VisitingBlocks:
    """Frozen blocks whose linears' weights lie in host memory, and visit the device for their block's work.

    Weights have no gradient, so nothing returns. A step that computes its blocks a second time for the
    backward pass fetches each block twice, but the last one once. While a block is away its weights
    are None, so that no strategy or optimiser finds them.

    Args:
        device: where the blocks work.
    """

    def __init__(self, device: torch.device) -> None:
        self.copies = Copies(device)
        self._hosts: list[list[Tensor]] = []
        self._slots: list[list[Slot]] = []
        self._moving: dict[int, Moving] = {}  # blocks that are on the device or on their way
        self._present: set[int] = set()  # blocks whose weights are in their slots

    def park(self, block: nn.Module) -> None:
        """Move a block's weights to the host; blocks are given in the order of their work."""
        slots: list[Slot] = []
        for module in block.modules():
            if isinstance(module, QuantisedLinear):
                slots += [(module._buffers, "quantised"), (module._buffers, "scale")]
            elif isinstance(module, nn.Linear):
                slots.append((module._parameters, "weight"))  # type: ignore[arg-type]  # None is allowed there
        weights = [tensors[name] for tensors, name in slots]
        held = [weight.detach() for weight in weights if weight is not None]
        self._hosts.append(self.copies.start(held, torch.device("cpu")).arrive())
        self._slots.append(slots)
        index = len(self._hosts) - 1
        self._leave(index)
        block.register_forward_pre_hook(partial(self._before, index))
        block.register_forward_hook(partial(self._after, index))

    def _before(self, index: int, block: nn.Module, inputs: object) -> None:
        again = torch._C._current_graph_task_id() != -1  # the backward pass computes the block a second time
        if again:  # where torch stops such a computation early, the hook after it does not run
            for other in self._present - {index}:
                self._leave(other)
            if not self._present:
                torch.autograd.Variable._execution_engine.queue_callback(self._leave_all)
        if index not in self._present:
            self._fetch(index)
            for (tensors, name), weight in zip(self._slots[index], self._moving[index].arrive(), strict=True):
                tensors[name] = nn.Parameter(weight, requires_grad=False) if name == "weight" else weight
            self._present.add(index)
        following = index - 1 if again else index + 1
        if 0 <= following < len(self._hosts):
            self._fetch(following)

    def _after(self, index: int, block: nn.Module, inputs: object, result: Tensor) -> None:
        if torch.is_grad_enabled() and index == len(self._hosts) - 1:
            return  # the backward pass begins with it
        if torch._C._current_graph_task_id() == -1:
            self._leave(index)

    def _fetch(self, index: int) -> None:
        if index not in self._moving:
            self._moving[index] = self.copies.start(self._hosts[index], self.copies.device)

    def _leave(self, index: int) -> None:
        for tensors, name in self._slots[index]:
            tensors[name] = None
        self._present.discard(index)
        if moving := self._moving.pop(index, None):
            moving.arrive()  # its memory may be used again from here on

    def _leave_all(self) -> None:
        for index in list(self._moving):
            self._leave(index)


class _Waiting:
    """A block's input in host memory."""

    def __init__(self, moving: Moving, device: torch.device) -> None:
        self.on_host, self.device = moving, device
        self.returning: Moving | None = None


class WaitingInputs:
    """The inputs of checkpointed blocks, which wait in host memory until the backward pass.

    A block's input returns while the block after it is computed again.
    """

    def __init__(self) -> None:
        self._copies: Copies | None = None
        self._waiting: list[weakref.ref[_Waiting]] = []  # in the order of the forward pass

    @contextmanager
    def keeping(self, hidden: Tensor) -> Iterator[None]:
        """Keep this one tensor on the host where autograd would keep it on the device."""

        # autograd holds these functions, which therefore must not hold the tensor
        storage, shape = hidden.untyped_storage()._cdata, hidden.shape

        def pack(tensor: Tensor) -> Tensor | _Waiting:
            same = tensor.untyped_storage()._cdata == storage and tensor.shape == shape
            return self._send(tensor) if same else tensor

        def unpack(kept: Tensor | _Waiting) -> Tensor:
            return self._return(kept) if isinstance(kept, _Waiting) else kept

        with saved_tensors_hooks(pack, unpack):
            yield

    def _send(self, tensor: Tensor) -> _Waiting:
        if self._copies is None:
            self._copies = Copies(tensor.device)
        waiting = _Waiting(self._copies.start([tensor.detach()], torch.device("cpu")), tensor.device)
        self._waiting = [*(reference for reference in self._waiting if reference() is not None), weakref.ref(waiting)]
        return waiting

    def _return(self, waiting: _Waiting) -> Tensor:
        self._begin(waiting)
        moving, waiting.returning = waiting.returning, None
        assert moving is not None
        alive = [one for one in (reference() for reference in self._waiting) if one is not None]
        if (before := alive.index(waiting) - 1) >= 0:
            self._begin(alive[before])
        return moving.arrive()[0]

    def _begin(self, waiting: _Waiting) -> None:
        assert self._copies is not None
        if waiting.returning is None:
            waiting.returning = self._copies.start(waiting.on_host.arrive(), waiting.device)
