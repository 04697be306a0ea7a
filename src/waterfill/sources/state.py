"""A state in memory: a dict of torch tensors or numpy arrays, or a module's ``state_dict``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from waterfill.sources.aliases import Span
from waterfill.sources.memory import bits_of, require_array, stored_dtype
from waterfill.types import Array, WaterfillError

__all__ = ["StateSource", "span_of"]


class StateSource:
    """Named tensors in memory, read without a copy wherever they lie in one piece on the CPU.

    Unlike a `ModuleSource` it has every name, those that share memory too.

    Parameters
    ----------
    state : name -> torch tensor or numpy array
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.state = state
        self.path: Path | None = None

    @cached_property
    def tensors(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Tensor name -> (dtype, shape), in the order of the state."""
        found = {}
        for name, tensor in self.state.items():
            if not isinstance(name, str):
                raise WaterfillError(f"{name!r}: the name of a tensor must be a string")
            dtype = stored_dtype(name, tensor)
            require_array(tensor, name)
            found[name] = dtype, tuple(tensor.shape)
        return found

    def read(self, name: str) -> Array:
        """The bits of a tensor in the storage form of `DTYPES`: a view where that is possible."""
        return bits_of(self.state[name], self.tensors[name][0])

    def lies_in(self, name: str, bits: Array) -> bool:
        """Whether bits that were read are the tensor's own memory."""
        own = span_of(self.state[name]).at
        return bool(own == bits.__array_interface__["data"][0] and bits.flags.writeable)

    @cached_property
    def shared(self) -> Mapping[str, str]:
        """Names whose tensor is the very memory of an earlier one -> the name of that one."""
        first: dict[tuple[Any, ...], str] = {}
        found = {}
        for name, (dtype, shape) in self.tensors.items():
            earlier = first.setdefault((span_of(self.state[name]), dtype), name)
            if earlier != name and 0 not in shape:
                found[name] = earlier
        return found


def span_of(tensor: Any) -> Span:
    """Where a torch tensor or numpy array lies."""
    if isinstance(tensor, np.ndarray):
        at = tensor.__array_interface__["data"][0]
        return Span("cpu", at, tensor.strides, tensor.shape, tensor.itemsize)
    itemsize = tensor.element_size()
    strides = tuple(itemsize * step for step in tensor.stride())
    return Span(str(tensor.device), tensor.data_ptr(), strides, tuple(tensor.shape), itemsize)
