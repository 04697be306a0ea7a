"""Weights that are one of sixteen numbers times a scale: NF4 (Dettmers et al. 2023), LLM-FP4 (Liu et al.
2023), or a codebook that was fitted.

The codebook is kept as int8 with one float step; the kernels look 4-bit codes up in registers, and are
those of `waterfill.coding.packed` otherwise: layout, activations, batches, numpy twin.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.coding.packed import PackedMatrix
from waterfill.types import Floats, Integers

__all__ = ["ENTRIES", "CodebookMatrix", "integers"]

ENTRIES = 16


def integers(codes: NDArray[np.uint8], codebook: Floats, scales: Any, group: int) -> Integers:
    """The matrix ``codebook[codes] * scales`` as integers: the codebook rounded to 255 levels.

    Parameters
    ----------
    codes : uint8 (m, n), below 16
    codebook : float32 (16,), finite
        The largest magnitude becomes 127 steps, so an entry is off by at most 1/254 of it.
    scales : float16 or float32 (m, ceil(n / group))
    group : int
        Columns that share a row's scale.

    Raises
    ------
    ValueError
        On codes, a codebook or scales that are not this.
    """
    if codes.ndim != 2 or codes.dtype != np.uint8 or not codes.size or codes.max() >= ENTRIES:
        raise ValueError(f"codes are a matrix of uint8 below {ENTRIES}, and not empty")
    m, n = codes.shape
    if codebook.shape != (ENTRIES,) or not np.isfinite(codebook).all():
        raise ValueError(f"a codebook is {ENTRIES} finite numbers")
    if group < 1 or scales.shape != (m, -(-n // group)):
        raise ValueError(f"scales of {m} rows and {-(-n // max(group, 1))} groups, please")
    step = np.float32(np.abs(codebook).max() / 127) or np.float32(1)
    table = np.rint(codebook / step).astype(np.int8)
    levels = table[codes]
    columns, rows = np.full(n, step, np.float32), np.ascontiguousarray(scales, np.float32)
    spread = levels.std(axis=0).astype(np.float32)
    return Integers(levels, columns, rows, group, states=1, spread=spread, bits=8)


class CodebookMatrix(PackedMatrix):
    """A `PackedMatrix` whose 4-bit codes stand for the levels of a table."""

    @classmethod
    def build(
        cls,
        integers: Integers,
        dtype: str,
        threads: int | None = None,
    ) -> CodebookMatrix | None:
        """Packed form of levels that are at most sixteen numbers of int8, exact; None for other levels.

        Parameters
        ----------
        integers : with levels
        dtype : F32, BF16 or F16, the tensor's
        """
        levels = integers.levels
        if levels is None:
            raise ValueError("an outline has no levels to pack")
        if levels.dtype != np.int8:
            return None
        used = np.flatnonzero(np.bincount(levels.reshape(-1).view(np.uint8), minlength=256))
        if len(used) > ENTRIES:
            return None
        table = np.zeros(ENTRIES, np.int8)
        table[: len(used)] = used.astype(np.uint8).view(np.int8)
        code = np.zeros(256, np.int8)
        code[used] = np.arange(len(used)) - ENTRIES // 2
        packed = PackedMatrix.build(
            _of_codes(integers, code[levels.view(np.uint8)]), dtype, threads
        )
        return None if packed is None else cls({**packed.arrays, "table": table})

    @classmethod
    def expected_nbytes(cls, outline: Integers, coded_nbytes: int) -> int | None:
        """Bytes that `build` will take, if the levels are at most sixteen numbers."""
        packed = PackedMatrix.expected_nbytes(_of_codes(outline, None), coded_nbytes)
        return None if packed is None else packed + ENTRIES


def _of_codes(integers: Integers, codes: NDArray[np.int8] | None) -> Integers:
    """The same scales with codes of 4 bits in place of levels."""
    return Integers(
        codes, integers.columns, integers.rows, integers.group, 1, integers.spread, bits=4
    )
