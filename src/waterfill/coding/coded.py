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
from waterfill.coding.coded_layout import FLOATS, Layout, require_valid
from waterfill.coding.coded_models import LANES, Models, Scales, coarse_shifts, models_of, scales_of
from waterfill.types import Array, Floats, Integers

__all__ = ["MAX_BATCH", "CodedMatrix"]

MAX_BATCH = 16
LARGEST = 1 << 24  # level that float32 tells from its neighbour
# Products of these must be normal numbers, as must a unit after a shift by eight places.
SMALLEST_UNIT, SMALLEST = 2.0**-110, 2.0**-125
BLOCK_NBYTES = 12 + 128 + 128  # of a block, beside its symbols: head, states, windows


@dataclass(frozen=True, eq=False)
class CodedMatrix:
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
        if not _fits(integers, dtype):
            return None
        levels = integers.levels
        if levels is None:
            raise ValueError("an outline has no levels to code")
        levels = np.ascontiguousarray(levels)
        # On a weight's way to its dtype no number may be infinite.
        extreme = max(int(levels.max()), -int(levels.min()), 1)
        largest = float(np.abs(integers.columns).max()) * float(np.abs(integers.rows).max())
        limit = 65504.0 if dtype == "F16" else 3.38e38
        if extreme >= LARGEST or extreme * max(largest, float(np.abs(integers.columns).max())) > limit:
            return None
        threads = threads or native.threads()
        layout = Layout.of(integers, dtype)
        scales, models = _plan(levels, integers, layout, threads)
        starts, codes = _encode(levels, layout, scales, models, threads)
        unit = integers.columns * np.float32(0.5) if layout.states == 1 else integers.columns
        units = np.zeros(layout.panels * LANES, np.float32)
        units[: layout.n] = unit[scales.order]
        return cls(
            {
                "layout": layout.array,
                "order": scales.order,
                "units": units,
                "scales": _narrow(np.ascontiguousarray(integers.rows.T)),
                "row_levels": scales.row_levels,
                "panel_levels": scales.panel_levels,
                "choice": models.choice,
                "shifts": models.shifts,
                "tables": models.tables,
                "starts": starts,
                "codes": codes,
            }
        )

    @classmethod
    def expected_nbytes(cls, outline: Integers, coded_nbytes: int) -> int | None:
        """About what `build` will take, from the tensor's bytes in the file; None where it gives none."""
        if not _fits(outline, "F32"):
            return None
        layout = Layout.of(outline, "F32")
        m, n = layout.m, layout.n
        groups = outline.rows.shape[1]
        scales = m * groups * _narrow(outline.rows).itemsize
        fixed = 8 * n + scales + m + 8 * layout.blocks + 20 * 513
        symbols = _expected_bits(outline, coded_nbytes) / 8
        return round(fixed + symbols + layout.blocks * BLOCK_NBYTES + m * n / 2048)

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

    @property
    def nbytes(self) -> int:
        """Bytes it keeps in memory."""
        # The kernels' copy of the tables, which begins at a cache line.
        return sum(a.nbytes for a in self.arrays.values()) + self.arrays["tables"].nbytes

    @cached_property
    def _native(self) -> Any:
        assert native._core is not None
        a = dict(self.arrays)
        scales = a["scales"]
        return native._core.Coded(
            a["layout"],
            a["order"],
            a["units"],
            scales.reshape(-1).view(np.uint8),
            scales.dtype == np.float16,
            a["row_levels"],
            a["panel_levels"],
            a["choice"],
            a["shifts"],
            a["tables"].reshape(-1),
            a["starts"],
            a["codes"],
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

    def _require_out(self, out: Array, count: int) -> None:
        shape = (count, self.shape[1])
        if out.shape != shape or out.dtype not in (np.float32, np.uint16):
            raise ValueError(f"out is float32 or uint16 {shape}, not {out.dtype} {out.shape}")
        if not (out.flags.c_contiguous and out.flags.writeable):
            raise ValueError("out must be contiguous and writeable")


def _fits(integers: Integers, dtype: str) -> bool:
    """Whether weights can be exact, as far as scales tell."""
    m, n = integers.shape
    if dtype not in FLOATS or not m or not n or max(m, n) >= 1 << 31:
        return False
    if integers.rows.shape[1] > 1 and integers.group % LANES:
        return False
    columns = np.abs(integers.columns[integers.columns != 0])
    finite = np.isfinite(integers.columns).all() and np.isfinite(integers.rows).all()
    return bool(finite and (not columns.size or columns.min() >= SMALLEST_UNIT))


def _plan(
    levels: Array, integers: Integers, layout: Layout, threads: int
) -> tuple[Scales, Models]:
    m, n = layout.m, layout.n
    spread = integers.spread.astype(np.float64)
    known = np.isfinite(spread) & (spread > 0)
    weights = np.where(known, 1 / np.square(np.where(known, spread, 1)), 0).astype(np.float32)
    columns, rows = np.empty(n, np.int64), np.empty(m, np.float64)
    plain = layout.states == 1
    core = native.core()
    flat = levels.reshape(-1).view(np.uint8)
    if core is None:
        columns, rows = coded_numpy.power(levels, plain, weights)
    else:
        core.coded_power(flat, levels.itemsize, plain, weights, columns, rows, threads)
    scales = scales_of(columns, rows, layout.group)
    coarse = coarse_shifts(scales)
    alike = scales.order, scales.row_levels, scales.panel_levels
    counts = np.empty(len(coarse) * 256, np.int64)
    if core is None:
        counts = coded_numpy.count(levels, plain, scales, coarse)
    else:
        core.coded_count(flat, levels.itemsize, plain, *alike, coarse, counts, threads)
    counts = counts.reshape(-1, 256)
    # Lanes beyond the last column hold zeros.
    np.add.at(counts[:, 128], scales.row_levels.astype(np.int64) + scales.panel_levels[-1], -n % LANES)
    return scales, models_of(counts, coarse)


def _encode(
    levels: Array, layout: Layout, scales: Scales, models: Models, threads: int
) -> tuple[Array, Array]:
    core = native.core()
    if core is None:
        return coded_numpy.encode(levels, layout, scales, models)
    starts, codes = core.coded_encode(
        levels.reshape(-1).view(np.uint8),
        levels.itemsize,
        layout.array,
        scales.order,
        scales.row_levels,
        scales.panel_levels,
        models.choice,
        models.shifts,
        models.tables.reshape(-1),
        threads,
    )
    return starts, codes


def _narrow(scales: Floats) -> Array:
    """As float16 where that is exact."""
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), scales) else scales


def _expected_bits(outline: Integers, coded_nbytes: int) -> float:
    m, n = outline.shape
    return 8.0 * coded_nbytes
