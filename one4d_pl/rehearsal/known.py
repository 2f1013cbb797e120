"""Real values of small fake tensors, so that control flow which depends on them is the real run's.

Masks, positions, sigmas and lengths are computed twice: as fake tensors on their device, and for real on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

SMALL = 4096  # elements
aten = torch.ops.aten


class Known:
    """The real twins of small fake tensors."""

    def __init__(self) -> None:
        self._twins = WeakTensorKeyDictionary()

    def twin(self, tensor: Tensor) -> Tensor | None:
        """Return the real value on the CPU; None where it is not known."""
        if not isinstance(tensor, FakeTensor):
            return tensor if tensor.numel() <= SMALL and tensor.device.type == "cpu" else None
        return self._twins.get(tensor)

    def follow(
        self, func: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object], made: list[Tensor]
    ) -> None:
        """Compute an operation's results for real if they are small and its inputs known."""
        if not made or any(tensor.numel() > SMALL for tensor in made) or "one4d_rehearsal" in str(func):
            return
        if any(isinstance(leaf, Tensor) and self.twin(leaf) is None for leaf in tree_leaves((args, kwargs))):
            self._forget(func, args)
            return
        with unset_fake_temporarily(), torch.no_grad():
            real = func(*tree_map(self._real, args), **{k: self._real_device(k, v) for k, v in kwargs.items()})
        for fake, value in zip(made, (leaf for leaf in tree_leaves(real) if isinstance(leaf, Tensor)), strict=True):
            if isinstance(fake, FakeTensor):
                self._twins[fake] = value

    def item(self, tensor: Tensor) -> object:
        """Return the tensor's only element; True or 1 where it is not known."""
        value = self.twin(tensor)
        with unset_fake_temporarily():
            return (tensor.dtype == torch.bool or 1) if value is None else value.item()

    def indices(self, mask: Tensor) -> list[Tensor]:
        """Find where a mask is true, one index per dimension. A mask that is not known counts as true."""
        found = self._found(mask)
        with unset_fake_temporarily():
            columns = found.unbind(1)
        return [self._fake(index, mask.device) for index in columns]

    def nonzero(self, tensor: Tensor) -> Tensor:
        """Return aten.nonzero's result."""
        return self._fake(self._found(tensor), tensor.device)

    def _found(self, tensor: Tensor) -> Tensor:
        value = self.twin(tensor)
        with unset_fake_temporarily():
            return torch.ones(tensor.shape, device="cpu").nonzero() if value is None else value.nonzero()

    def _fake(self, value: Tensor, device: torch.device) -> Tensor:
        fake = torch.empty(value.shape, dtype=value.dtype, device=device)
        self._twins[fake] = value
        return fake

    def _real(self, leaf: object) -> object:
        if isinstance(leaf, Tensor):
            return self.twin(leaf)
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    def _real_device(self, name: str, value: object) -> object:
        if name == "device":
            return torch.device("cpu")
        return False if name == "pin_memory" else tree_map(self._real, value)

    def _forget(self, func: Callable[..., object], args: tuple[object, ...]) -> None:
        """Forget the value of a tensor that is overwritten with something unknown."""
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable and args and isinstance(args[0], Tensor):
            self._twins.pop(args[0], None)
