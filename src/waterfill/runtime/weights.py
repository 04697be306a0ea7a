"""What a torch module multiplies with when its weight is not a dense tensor."""

from __future__ import annotations

import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from waterfill.coding.matrix import MAX_BATCH, KernelMatrix
from waterfill.coding.native import threads
from waterfill.runtime.residency import TILE_ROWS
from waterfill.runtime.streaming import StreamMatrix
from waterfill.runtime.tensors import to_torch
from waterfill.types import Array, WaterfillError

__all__ = [
    "KERNEL_DTYPES",
    "LazyWeight",
    "MatrixWeight",
    "Scratch",
    "StreamWeight",
    "Weight",
    "unchangeable",
]

KERNEL_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Scratch:
    """One buffer for all weights of a model that need room for a moment; `lock` it while in use.

    Attributes
    ----------
    owner : whose numbers are in it, if anyone will want to find them there
    view : the array of them; kept here and not by the owner, or the buffer could not grow
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.owner: object = None
        self.view: Array | None = None
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> torch.Tensor:
        """Uint8 tensor of at least so many bytes; what was in it is lost, its owner too."""
        self.owner = self.view = None
        if len(self._bytes) < nbytes:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new comes
            self._bytes = torch.empty(nbytes, dtype=torch.uint8)
        return self._bytes

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return len(self._bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return Scratch, ()


class Weight(ABC):
    """A matrix (m, n) that gives its rows as torch tensors when asked; modules may share it.

    Attributes
    ----------
    buffers : tensors over the memory that it keeps, by name
    max_batch : most vectors that `matmul` takes at a time; 0 if there is no such kernel
    matmul : product with up to `max_batch` vectors, by address: x, its dtype, y, batch, threads
    """

    max_batch = 0
    matmul: Callable[[int, str, int, int, int], None]

    def __init__(self, matrix: Any, scratch: Scratch) -> None:
        self.matrix, self.scratch, self.threads = matrix, scratch, threads()
        self.shape: tuple[int, int] = matrix.shape
        self.buffers = {name: _shared(array) for name, array in matrix.arrays.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), type(self.matrix), dict(self.matrix.arrays), self.scratch)

    @abstractmethod
    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(first, last, rows (last - first, n)) from top to bottom; hold the scratch's lock meanwhile.

        A tile is good until the next is asked for.
        """

    @abstractmethod
    def gather(self, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows (k, n) at int64 indices (k,), all of them valid."""

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole matrix (m, n)."""
        out = torch.empty(self.shape, dtype=dtype)
        with self.scratch.lock:
            for first, last, tile in self.tiles(dtype):
                out[first:last] = tile
        return out


class MatrixWeight(Weight):
    """A packed or coded matrix."""

    max_batch = MAX_BATCH
    matrix: KernelMatrix

    def __init__(self, matrix: KernelMatrix, scratch: Scratch) -> None:
        super().__init__(matrix, scratch)
        self.matmul = matrix.matmul

    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[int, int, torch.Tensor]]:
        m, n = self.shape
        kernel = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        step = min(TILE_ROWS, m)
        room = self.scratch.take(step * n * kernel.itemsize)
        for first in range(0, m, step):
            last = min(first + step, m)
            tile = room[: (last - first) * n * kernel.itemsize].view(kernel).view(-1, n)
            self.matrix.rows(first, last, _array(tile))
            yield first, last, tile.to(dtype)

    def gather(self, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        kernel = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        out = torch.empty(len(indices), self.shape[1], dtype=kernel)
        self.matrix.gather(indices.numpy(), _array(out))
        return out.to(dtype)


class StreamWeight(Weight):
    """A weight that is decoded for each use; the last one used is found decoded."""

    matrix: StreamMatrix

    def _bits(self) -> torch.Tensor:
        """All of it as stored (m, n), in the scratch buffer, which must be locked."""
        scratch, matrix = self.scratch, self.matrix
        if scratch.owner is not self or scratch.view is None:
            scratch.view = matrix.decode(scratch.take(matrix.scratch_nbytes).numpy())
            scratch.owner = self
        return to_torch(scratch.view, matrix.encoded.info.dtype)

    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[int, int, torch.Tensor]]:
        bits = self._bits()
        m, _ = self.shape
        step = m if bits.dtype == dtype else TILE_ROWS
        for first in range(0, m, step):
            last = min(first + step, m)
            yield first, last, bits[first:last].to(dtype)

    def gather(self, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        with self.scratch.lock:
            return self._bits()[indices].to(dtype)


def _restore(kind: Any, form: Any, arrays: Mapping[str, Array], scratch: Scratch) -> Weight:
    restored: Weight = kind(form.from_arrays(arrays), scratch)
    return restored


def _array(tensor: torch.Tensor) -> Array:
    """A float32 tensor, or the bits of a bfloat16 one, as an array over the same memory."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def _shared(array: Array) -> torch.Tensor:
    """A tensor over the array's memory. Nobody writes to it, though torch warns that one could."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writ", category=UserWarning)
        return torch.from_numpy(array)


class LazyWeight(torch.Tensor):
    """Says its shape, dtype and device at no cost, and is decoded by whatever computes with it.

    Some models look at ``linear.weight.dtype``, and a few multiply with ``linear.weight`` themselves.
    What would change it is refused: it would change a decoded copy.
    """

    # torch makes the class itself behave as a tensor; these are ours.
    _weight: Weight
    _transposed: bool

    @staticmethod
    def __new__(
        cls, weight: Weight, transposed: bool, dtype: torch.dtype, device: torch.device
    ) -> LazyWeight:
        shape = weight.shape[::-1] if transposed else weight.shape
        made: LazyWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device
        )
        made._weight, made._transposed = weight, transposed
        return made

    def __init__(self, *_: Any) -> None:
        pass

    def decoded(self) -> torch.Tensor:
        """As a plain tensor of its own."""
        dense = self._weight.dense(self.dtype)
        return (dense.T if self._transposed else dense).to(self.device)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.__setitem__, torch.Tensor.data.__set__):  # type: ignore[attr-defined]
            raise unchangeable()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        from torch.utils._pytree import tree_map_only

        written = (s for s in func._schema.arguments if s.alias_info and s.alias_info.is_write)
        named = {s.name: a for s, a in zip(func._schema.arguments, args, strict=False)}
        given = {**named, **(kwargs or {})}
        if any(isinstance(given.get(s.name), LazyWeight) for s in written):
            raise unchangeable()
        args, kwargs = tree_map_only(LazyWeight, LazyWeight.decoded, (args, dict(kwargs or {})))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyWeight({list(self.shape)}, {self.dtype})"


def unchangeable() -> WaterfillError:
    """What is said to whoever would change a weight."""
    return WaterfillError(
        "weights that stay packed or coded cannot be changed; to change a model, load it with "
        'residency="dense"'
    )
