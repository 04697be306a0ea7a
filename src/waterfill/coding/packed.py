"""A matrix of small integers as vectors multiply it: 2 to 8 bits a weight, with int8 activations.

Weights are exact: the integers and scales a codec holds, without the last rounding to the tensor's
dtype. Activations are rounded, to int8 in chunks of at most 128 columns with a scale of their own, or to
15 bits (``activations="int16"``). ``docs/packed.md`` has the layout and the error measured.

The numpy twin of the kernels is `waterfill.coding.packed_numpy`; both give the same bits, with any
number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np

from waterfill.coding import native, packed_numpy
from waterfill.coding.matrix import FLOATS, MAX_BATCH, KernelMatrix, aligned
from waterfill.coding.packed_layout import (
    CORRECTION_NBYTES,
    MAX_COLUMNS,
    Geometry,
    misfits,
    segments_of,
)
from waterfill.types import DTYPES, Array, Floats, Integers, SpecError

__all__ = ["MAX_BATCH", "PackedMatrix"]

PLANES = {"int8": 1, "int16": 2}


@dataclass(frozen=True, eq=False)
class PackedMatrix(KernelMatrix):
    """Weights (m, n) that stay packed in memory; `matmul` and `rows` read them as they are.

    Attributes
    ----------
    arrays : name -> array
        All it holds: ``layout`` int64 (m, n, group, then bits and columns of each segment); ``codes``
        uint8; ``scales`` float16 or float32 (blocks, groups, 16); and where they are needed ``order``
        int32 (n,), ``steps`` float32 (n,), ``starts`` int64 (blocks + 1,), ``corrections`` uint32; ``table``
        int8 (16,), levels that codes of 4 bits stand for (see `waterfill.coding.codebook`).
    activations : str
        As the environment says, WATERFILL_ACTIVATIONS, or int8.
        int8: fast; outputs are off by about 0.7 % of their root mean square for Gaussian activations.
        int16: 15 bits, 0.003 %, where activations rounded to bf16 are off by 0.16 %.
    """

    arrays: Mapping[str, Array]
    activations: str = field(default_factory=native.activations)

    def __post_init__(self) -> None:
        if self.activations not in PLANES:
            raise SpecError(f"activations are int8 or int16, not {self.activations!r}")
        packed_numpy.require_valid(self.arrays)

    @classmethod
    def build(
        cls,
        integers: Integers,
        dtype: str,
        threads: int | None = None,
    ) -> PackedMatrix | None:
        """Packed form of what a codec holds, exact; None where there is none.

        That is where groups do not end with tiles of 32 columns, and where so many levels lie beyond
        8 bits that this would take more than the tensor itself (both of whole tiles).

        Parameters
        ----------
        integers : with levels
        dtype : F32, BF16 or F16, the tensor's
        """
        plan = _Plan.of(integers, dtype)
        if plan is None:
            return None
        if integers.levels is None:
            raise ValueError("an outline has no levels to pack")
        found = _pack(integers.levels, plan, threads or native.threads())
        if found is None:
            return None
        codes, starts, corrections = found
        arrays = plan.arrays | {"codes": codes}
        if corrections.size:
            if plan.geometry.groups > 1:
                return None
            arrays |= {"starts": starts, "corrections": corrections}
        if sum(a.nbytes for a in arrays.values()) > plan.most:
            return None
        return cls(arrays)

    @classmethod
    def expected_nbytes(cls, outline: Integers, coded_nbytes: int) -> int | None:
        """Bytes that `build` will take, known without levels to about 2 %; None where it gives none."""
        plan = _Plan.of(outline, "F32")
        if plan is None:
            return None
        nbytes = plan.geometry.codes_nbytes + sum(a.nbytes for a in plan.arrays.values())
        corrections = plan.expected_corrections
        if corrections >= 1:
            nbytes += round(CORRECTION_NBYTES * corrections) + 8 * (plan.geometry.blocks + 1)
        return nbytes

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> PackedMatrix:
        """The matrix that holds these arrays, without a copy; ValueError where they do not fit."""
        return cls(dict(arrays))

    def using(self, activations: str) -> Self:
        """The same weights with another rounding of activations."""
        return type(self)(self.arrays, activations)

    @cached_property
    def geometry(self) -> Geometry:
        """Shape, segments and strides."""
        return Geometry.of_layout(self.arrays["layout"])

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs m, inputs n)."""
        return self.geometry.m, self.geometry.n

    @cached_property
    def _native(self) -> Any:
        core, arrays = native.core(), self.arrays
        assert core is not None
        scales = arrays["scales"]
        half = scales.dtype == np.float16
        names = ("order", "steps", "starts", "corrections", "table")
        optional = (arrays.get(name) for name in names)
        codes = arrays["codes"].reshape(-1)
        return core.Packed(
            arrays["layout"], codes, scales.reshape(-1).view(np.uint8), half, *optional
        )

    def matmul(self, x_ptr: int, x_dtype: str, y_ptr: int, batch: int, threads: int) -> None:
        """``y = x W^T`` at addresses: x (batch, n) and y (batch, m), contiguous, both of `x_dtype`.

        `x_dtype` is F32, BF16 or F16; `batch` 1 to `MAX_BATCH`. Nothing is checked but that.
        """
        planes = PLANES[self.activations]
        if native.core() is not None:
            self._native.matmul(x_ptr, x_dtype, y_ptr, batch, planes, threads)
        else:
            if x_dtype not in FLOATS or not 1 <= batch <= MAX_BATCH:
                raise ValueError("packed: F32, BF16 or F16, and a batch of 1 to 16")
            packed_numpy.matmul_at(self.geometry, self.arrays, x_ptr, x_dtype, y_ptr, batch, planes)

    def rows(self, first: int, last: int, out: Array) -> None:
        """Weights of rows first .. last - 1 into `out` (last - first, n): float32, or uint16 as bf16 bits."""
        if not 0 <= first <= last <= self.shape[0]:
            raise ValueError(f"rows {first} to {last} of {self.shape[0]}")
        self._require_out(out, last - first)
        if native.core() is not None:
            flat = out.reshape(-1).view(np.uint8)
            self._native.rows(first, last, flat, out.dtype == np.uint16, native.threads())
        else:
            out[:] = packed_numpy.weights(
                self.geometry, self.arrays, np.arange(first, last), out.dtype
            )

    def gather(self, indices: Array, out: Array) -> None:
        """Weights of the rows at `indices` (int64) into `out` (count, n), as in `rows`."""
        indices = np.ascontiguousarray(indices, np.int64).reshape(-1)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.shape[0]:
            raise ValueError(f"an index beyond the {self.shape[0]} rows")
        self._require_out(out, indices.size)
        if native.core() is not None:
            flat = out.reshape(-1).view(np.uint8)
            self._native.gather(indices, flat, out.dtype == np.uint16, native.threads())
        else:
            out[:] = packed_numpy.weights(self.geometry, self.arrays, indices, out.dtype)


@dataclass(frozen=True, eq=False)
class _Plan:
    """Everything but codes and corrections."""

    geometry: Geometry
    arrays: dict[str, Array]
    expected_corrections: float
    most: int

    @classmethod
    def of(cls, integers: Integers, dtype: str) -> _Plan | None:
        m, n = integers.shape
        if dtype not in FLOATS or not m or not 0 < n <= MAX_COLUMNS:
            return None
        numbers = (integers.columns, integers.rows, integers.spread)
        if not all(np.isfinite(a).all() for a in numbers):
            return None
        order, segments = segments_of(integers.spread, integers.bits, integers.states)
        groups = integers.rows.shape[1]
        if groups > 1 and (integers.group % 32 or len(segments) > 1):
            return None
        geometry = Geometry(m, n, integers.group if groups > 1 else n, segments)
        arrays = {"layout": geometry.layout, "scales": _scales(integers.rows, geometry)}
        if order is not None:
            arrays["order"] = order
        if (integers.columns != 1).any():
            arrays["steps"] = integers.columns if order is None else integers.columns[order]
        expected = 0.0 if integers.bits else _expected(integers, order, geometry)
        most = geometry.padded_size * DTYPES[dtype].itemsize
        known = geometry.codes_nbytes + sum(a.nbytes for a in arrays.values())
        if known + CORRECTION_NBYTES * expected > most:
            return None
        return cls(geometry, arrays, expected, most)


def _expected(integers: Integers, order: Array | None, geometry: Geometry) -> float:
    """Corrections that the spread of the columns lets expect."""
    spread = integers.spread if order is None else integers.spread[order]
    total, first = 0.0, 0
    for segment in geometry.segments:
        part = spread[first : first + segment.columns]
        total += geometry.m * float(misfits(part, segment.bits, integers.states).sum())
        first += segment.columns
    return total


def _scales(rows: Floats, geometry: Geometry) -> Array:
    """Scales (m, groups) as (blocks, groups, 16); float16 where that is exact."""
    with np.errstate(over="ignore"):
        half = rows.astype(np.float16)
    exact = np.array_equal(half.astype(np.float32), rows)
    padded = np.zeros((geometry.blocks * 16, geometry.groups), np.float16 if exact else np.float32)
    padded[: geometry.m] = half if exact else rows
    blocks = padded.reshape(geometry.blocks, 16, geometry.groups)
    return np.ascontiguousarray(blocks.transpose(0, 2, 1))


def _pack(levels: Array, plan: _Plan, threads: int) -> tuple[Array, Array, Array] | None:
    core = native.core()
    levels = np.ascontiguousarray(levels)
    order = plan.arrays.get("order")
    if core is None:
        return packed_numpy.pack(levels, plan.geometry, order)
    codes = aligned(plan.geometry.codes_nbytes)
    flat = levels.reshape(-1).view(np.uint8)
    found = core.packed_pack(plan.geometry.layout, flat, levels.itemsize, order, codes, threads)
    return None if found is None else (codes, *found)
