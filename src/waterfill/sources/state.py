"""A state in memory: a dict of torch tensors or numpy arrays, or a module's ``state_dict``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from waterfill.sources.memory import bits_of, stored_dtype
from waterfill.types import Array, WaterfillError

__all__ = ["StateSource"]


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
        for name in self.state:
            if not isinstance(name, str):
                raise WaterfillError(f"{name!r}: the name of a tensor must be a string")
        return {n: (stored_dtype(n, t), tuple(t.shape)) for n, t in self.state.items()}

    def read(self, name: str) -> Array:
        """The bits of a tensor in the storage form of `DTYPES`: a view where that is possible."""
        return bits_of(self.state[name], self.tensors[name][0])

    def lies_in(self, name: str, bits: Array) -> bool:
        """Whether bits that were read are the tensor's own memory."""
        own = _place(self.state[name])[0]
        return bool(own == bits.__array_interface__["data"][0] and bits.flags.writeable)

    @cached_property
    def shared(self) -> Mapping[str, str]:
        """Names whose tensor is the very memory of an earlier one -> the name of that one."""
        first: dict[tuple[Any, ...], str] = {}
        found = {}
        for name, (dtype, shape) in self.tensors.items():
            earlier = first.setdefault((*_place(self.state[name]), dtype, shape), name)
            if earlier != name and 0 not in shape:
                found[name] = earlier
        return found


def _place(tensor: Any) -> tuple[Any, ...]:
    if isinstance(tensor, np.ndarray):
        return (tensor.__array_interface__["data"][0], tensor.strides)
    return (tensor.data_ptr(), str(tensor.device), tensor.stride())
