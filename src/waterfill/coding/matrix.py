"""What packed and coded matrices have in common: the product in numpy's terms, and what it checks."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import native
from waterfill.types import DTYPES, Array, Floats

__all__ = ["FLOATS", "MAX_BATCH", "KernelMatrix", "aligned", "array_at"]

MAX_BATCH = 16
FLOATS = ("F32", "BF16", "F16")  # in the order of the kernels'


class KernelMatrix(ABC):
    """A matrix (m outputs, n inputs) that kernels multiply as it lies in memory.

    Attributes
    ----------
    arrays : name -> array
        All it holds.
    """

    arrays: Mapping[str, Array]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(outputs m, inputs n)."""

    @abstractmethod
    def matmul(self, x_ptr: int, x_dtype: str, y_ptr: int, batch: int, threads: int) -> None:
        """``y = x W^T`` at addresses: x (batch, n) and y (batch, m), contiguous, both of `x_dtype`.

        `x_dtype` is F32, BF16 or F16; `batch` 1 to `MAX_BATCH`. Nothing is checked but that.
        """

    @abstractmethod
    def rows(self, first: int, last: int, out: Array) -> None:
        """Weights of rows first .. last - 1 into `out` (last - first, n): float32, or uint16 as bf16 bits."""

    @abstractmethod
    def gather(self, indices: Array, out: Array) -> None:
        """Weights of the rows at `indices` (int64) into `out` (count, n), as in `rows`."""

    @property
    def nbytes(self) -> int:
        """Bytes it keeps in memory."""
        return sum(a.nbytes for a in self.arrays.values())

    def apply(self, x: Floats) -> Floats:
        """``x W^T``: float32 (batch, n) -> float32 (batch, m), any batch."""
        m, n = self.shape
        if x.ndim != 2 or x.shape[1] != n or x.dtype != np.float32:
            raise ValueError(f"activations are float32 (batch, {n}), not {x.dtype} {x.shape}")
        x = np.ascontiguousarray(x)
        y = np.empty((len(x), m), np.float32)
        for first in range(0, len(x), MAX_BATCH):
            part, out = x[first : first + MAX_BATCH], y[first : first + MAX_BATCH]
            self.matmul(part.ctypes.data, "F32", out.ctypes.data, len(part), native.threads())
        return y

    def _require_out(self, out: Array, count: int) -> None:
        shape = (count, self.shape[1])
        if out.shape != shape or out.dtype not in (np.float32, np.uint16):
            raise ValueError(f"out is float32 or uint16 {shape}, not {out.dtype} {out.shape}")
        if not (out.flags.c_contiguous and out.flags.writeable):
            raise ValueError("out must be contiguous and writeable")


def array_at(address: int, shape: tuple[int, int], dtype: str) -> Array:
    """The stored bits at an address, as the kernels see them; DTYPES of `dtype`, `shape`."""
    kind = DTYPES[dtype]
    memory = (ctypes.c_uint8 * (shape[0] * shape[1] * kind.itemsize)).from_address(address)
    array: Array = np.ctypeslib.as_array(memory).view(kind).reshape(shape)
    return array


def aligned(nbytes: int) -> NDArray[np.uint8]:
    """Bytes that begin where four cache lines do: 15 % faster with 4 bits than a line further on."""
    memory = np.empty(nbytes + 255, np.uint8)
    return memory[-memory.ctypes.data % 256 :][:nbytes]
