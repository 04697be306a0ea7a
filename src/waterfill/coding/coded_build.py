"""From what a codec holds to the arrays of a coded matrix."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import coded_numpy, native
from waterfill.coding.coded_layout import MAX_COLUMNS, Layout
from waterfill.coding.coded_models import (
    FLOOR,
    LANES,
    Models,
    Scales,
    coarse_shifts,
    models_of,
    scales_of,
)
from waterfill.coding.matrix import FLOATS
from waterfill.types import Array, Floats, Integers

__all__ = ["arrays_of", "expected_nbytes", "fits"]

LARGEST_LEVEL = 1 << 24  # that float32 tells from its neighbour
# No number on the way to a weight may be infinite; where the tensor's dtype is, that is refused too.
LARGEST = {"F32": 3.4e38, "BF16": 3.38e38, "F16": 65504.0}
SMALLEST_UNIT = 2.0**-110  # a unit a little smaller must still be a normal number
BLOCK_NBYTES = 12 + 128 + 128 + 8  # of a block, beside its symbols: head, states, windows, start
TABLE_NBYTES = 512
# Bits a weight of integers of so many bits, whose scales were searched, of Gaussian weights.
INTEGER_ENTROPY = (2, 3, 4, 6, 8), (1.82, 2.78, 3.69, 5.575, 7.555)

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]


def fits(integers: Integers, dtype: str) -> bool:
    """Whether weights can be exact, as far as shape and scales tell."""
    m, n = integers.shape
    if dtype not in FLOATS or not 0 < m < 1 << 31 or not 0 < n <= MAX_COLUMNS:
        return False
    if integers.rows.shape[1] > 1 and integers.group % LANES:
        return False
    if not (np.isfinite(integers.columns).all() and np.isfinite(integers.rows).all()):
        return False
    used = np.abs(integers.columns[integers.columns != 0])
    return not used.size or bool(used.min() >= SMALLEST_UNIT)


def arrays_of(integers: Integers, dtype: str, threads: int) -> dict[str, Array] | None:
    """Arrays of the coded form of what `fits`; None where a weight or a level is too large."""
    if integers.levels is None:
        raise ValueError("an outline has no levels to code")
    levels = np.ascontiguousarray(integers.levels)
    columns = float(np.abs(integers.columns).max())
    extreme = max(int(levels.max()), -int(levels.min()))
    largest = extreme * columns * max(1.0, float(np.abs(integers.rows).max()))
    if extreme >= LARGEST_LEVEL or largest > LARGEST[dtype]:
        return None
    layout = Layout.of(integers, dtype)
    scales, models = _models(levels, integers, layout, threads)
    starts, codes = _encode(levels, layout, scales, models, threads)
    # Points of the two grids are twice as fine as integers.
    step = integers.columns * np.float32(0.5) if layout.plain else integers.columns
    units = np.zeros(layout.panels * LANES, np.float32)
    units[: layout.n] = step[scales.order]
    return {
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


def expected_nbytes(outline: Integers, coded_nbytes: int) -> int:
    """About how many bytes `arrays_of` takes for what has so many in the file."""
    layout = Layout.of(outline, "F32")
    m, n = layout.m, layout.n
    scales = outline.rows.size * _narrow(outline.rows).itemsize
    tables = 1 if outline.bits else min(24, 1 + m * n // (1 << 18))
    tiles = m * n / 2048
    fixed = 6 * n + m + scales + tables * TABLE_NBYTES + layout.blocks * BLOCK_NBYTES + tiles
    return round(fixed + _expected_symbols(outline, coded_nbytes))


def _expected_symbols(outline: Integers, coded_nbytes: int) -> float:
    m, n = outline.shape
    if not outline.bits:
        return 1.011 * coded_nbytes + m * _unlike(outline.spread) / 8
    codes = coded_nbytes - 2 * outline.rows.size
    if 8 * codes < outline.bits * m * n:
        return 1.003 * codes
    return m * n / 8 * float(np.interp(outline.bits, *INTEGER_ENTROPY))


def _unlike(spread: Floats) -> float:
    """Bits that one row's symbols take more because the columns of a panel differ in scale."""
    widest = np.sort(np.maximum(spread.astype(np.float64), FLOOR))[::-1]
    padded = np.full(-(-spread.size // LANES) * LANES, FLOOR)
    padded[: spread.size] = widest
    squares = np.square(padded.reshape(-1, LANES))
    power = squares.mean(axis=1, keepdims=True)
    # Little where levels are nearly all zero.
    return float((0.5 * np.log2(power / squares) * (power / (power + 1))).sum())


def _models(
    levels: Array, integers: Integers, layout: Layout, threads: int
) -> tuple[Scales, Models]:
    """Which rows and columns are alike, from sums of squares; then tables from counts."""
    spread = integers.spread.astype(np.float64)
    known = np.isfinite(spread) & (spread > 0)
    weights = np.where(known, 1 / np.square(np.where(known, spread, 1)), 0).astype(np.float32)
    scales = scales_of(*_power(levels, layout.plain, weights, threads), layout.group)
    coarse = coarse_shifts(scales)
    counts = _count(levels, layout.plain, scales, coarse, threads)
    # Lanes beyond the last column hold zeros.
    last = scales.row_levels.astype(np.int64) + scales.panel_levels[-1]
    np.add.at(counts[:, 128], last, -layout.n % LANES)
    return scales, models_of(counts, coarse)


def _power(
    levels: Array, plain: bool, weights: Floats, threads: int
) -> tuple[Ints, NDArray[np.float64]]:
    core = native.core()
    if core is None:
        return coded_numpy.power(levels, plain, weights)
    m, n = levels.shape
    columns, rows = np.empty(n, np.int64), np.empty(m, np.float64)
    core.coded_power(_flat(levels), levels.itemsize, plain, weights, columns, rows, threads)
    return columns, rows


def _count(levels: Array, plain: bool, scales: Scales, coarse: Bytes, threads: int) -> Ints:
    core = native.core()
    if core is None:
        return coded_numpy.count(levels, plain, scales, coarse)
    counts = np.empty((len(coarse), 256), np.int64)
    alike = scales.order, scales.row_levels, scales.panel_levels
    core.coded_count(
        _flat(levels), levels.itemsize, plain, *alike, coarse, counts.reshape(-1), threads
    )
    return counts


def _encode(
    levels: Array, layout: Layout, scales: Scales, models: Models, threads: int
) -> tuple[Ints, Bytes]:
    core = native.core()
    if core is None:
        return coded_numpy.encode(levels, layout, scales, models)
    alike = scales.order, scales.row_levels, scales.panel_levels
    coder = models.choice, models.shifts, models.tables.reshape(-1)
    starts, codes = core.coded_encode(
        _flat(levels), levels.itemsize, layout.array, *alike, *coder, threads
    )
    return starts, codes


def _flat(levels: Array) -> Bytes:
    return levels.reshape(-1).view(np.uint8)


def _narrow(scales: Floats) -> Array:
    """As float16 where that is exact."""
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), scales) else scales
