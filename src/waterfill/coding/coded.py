"""A matrix of integers times scales that stays entropy-coded in memory and is multiplied as it is.

Weights are bit for bit those that `decompress` gives; products are summed in float32. Levels are coded
anew when a model is loaded, by a coder made for the matrix-vector product: ``docs/coded.md`` has the layout,
the exactness and the speed.

The numpy twin of the kernels is `waterfill.coding.coded_numpy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from waterfill.coding import coded_numpy, native
from waterfill.coding.coded_build import arrays_of, expected_nbytes, fits
from waterfill.coding.coded_layout import Layout, require_valid
from waterfill.coding.matrix import FLOATS, MAX_BATCH, KernelMatrix
from waterfill.types import Array, Integers

__all__ = ["MAX_BATCH", "CodedMatrix"]


@dataclass(frozen=True, eq=False)
class CodedMatrix(KernelMatrix):
    """Weights (m, n) that stay entropy-coded in memory; `matmul` and `rows` decode them as they go.

    Attributes
    ----------
    arrays : name -> array
        All it holds; ``docs/coded.md`` describes each.
    """

    arrays: Mapping[str, Array]

    def __post_init__(self) -> None:
        require_valid(self.arrays)

    @classmethod
    def build(
        cls, integers: Integers, dtype: str, threads: int | None = None
    ) -> CodedMatrix | None:
        """Coded form of what a codec holds; None where weights cannot be exact.

        Parameters
        ----------
        integers : with levels
        dtype : F32, BF16 or F16, the tensor's: what weights are rounded to
        threads : int, optional
            The bytes do not depend on it.
        """
        if not fits(integers, dtype):
            return None
        arrays = arrays_of(integers, dtype, threads or native.threads())
        return None if arrays is None else cls(arrays)

    @classmethod
    def expected_nbytes(cls, outline: Integers, coded_nbytes: int) -> int | None:
        """About what `build` will take, from the tensor's bytes in the file; None where it gives none."""
        return expected_nbytes(outline, coded_nbytes) if fits(outline, "F32") else None

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> CodedMatrix:
        """The matrix that holds these arrays, without a copy; ValueError where they do not fit."""
        return cls(dict(arrays))

    @cached_property
    def layout(self) -> Layout:
        """Shape and how it is cut."""
        return Layout.of_array(self.arrays["layout"])

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs m, inputs n)."""
        return self.layout.m, self.layout.n

    @cached_property
    def _native(self) -> Any:
        core = native.core()
        assert core is not None
        a = self.arrays
        scales = a["scales"].reshape(-1).view(np.uint8), a["scales"].dtype == np.float16
        alike = a["row_levels"], a["panel_levels"], a["choice"], a["shifts"]
        tables = a["tables"].reshape(-1)
        return core.Coded(
            a["layout"], a["order"], a["units"], *scales, *alike, tables, a["starts"], a["codes"]
        )

    def matmul(self, x_ptr: int, x_dtype: str, y_ptr: int, batch: int, threads: int) -> None:
        """``y = x W^T`` at addresses: x (batch, n) and y (batch, m), contiguous, both of `x_dtype`.

        `x_dtype` is F32, BF16 or F16; `batch` 1 to `MAX_BATCH`. Nothing is checked but that.
        """
        if native.core() is not None:
            self._native.matmul(x_ptr, x_dtype, y_ptr, batch, threads)
            return
        if x_dtype not in FLOATS or not 1 <= batch <= MAX_BATCH:
            raise ValueError("coded: F32, BF16 or F16, and a batch of 1 to 16")
        coded_numpy.matmul_at(self.layout, self.arrays, x_ptr, x_dtype, y_ptr, batch)

    def rows(self, first: int, last: int, out: Array) -> None:
        """Weights of rows first .. last - 1 into `out` (last - first, n): float32, or uint16 as bf16 bits.

        Rows are decoded from the last multiple of 1024 on: ranges that begin there cost least.
        """
        if not 0 <= first <= last <= self.shape[0]:
            raise ValueError(f"rows {first} to {last} of {self.shape[0]}")
        self._rows(np.arange(first, last, dtype=np.int64), out)

    def gather(self, indices: Array, out: Array) -> None:
        """Weights of the rows at `indices` (int64) into `out` (count, n), as in `rows`.

        Each costs the decoding of all rows from the last multiple of 1024 on, once for all of them.
        """
        indices = np.asarray(indices, np.int64).reshape(-1)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.shape[0]:
            raise ValueError(f"an index beyond the {self.shape[0]} rows")
        unique, inverse = np.unique(indices, return_inverse=True)
        if np.array_equal(unique, indices):
            self._rows(unique, out)
            return
        self._require_out(out, indices.size)
        some = np.empty((unique.size, self.shape[1]), out.dtype)
        self._rows(unique, some)
        np.take(some, inverse, axis=0, out=out)

    def _rows(self, rows: Array, out: Array) -> None:
        self._require_out(out, rows.size)
        if native.core() is not None:
            flat = out.reshape(-1).view(np.uint8)
            self._native.rows(rows, flat, out.dtype == np.uint16, native.threads())
        else:
            out[:] = coded_numpy.weights(self.layout, self.arrays, rows, out.dtype)
