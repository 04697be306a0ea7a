"""Which columns and rows share a model in a coded matrix, and the tables that models become.

A symbol's cost is known only by counting: `scales_of` gives rows and panels of columns a level each from
sums of squares, `models_of` makes tables from the counts of each sum of two levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from waterfill.coding.matrix import aligned
from waterfill.types import Array

__all__ = [
    "FLOOR",
    "LANES",
    "STATES",
    "Models",
    "Scales",
    "coarse_shifts",
    "decoding_table",
    "models_of",
    "odd",
    "scales_of",
]

LANES, STATES, SYMBOLS = 128, 128, 16
PATCH_BITS = 48
PER_OCTAVE = 8  # levels
COLUMN_OCTAVES, ROW_OCTAVES = 18, 10
FLOOR = 2.0**-6  # of a panel's root mean square
BINS = 256  # of a level: 128 + 2 q + grid, q from -64 to 63 after a coarse shift
FINER = 4  # shifts tried from the coarse one on
TABLE_NBYTES = 4 * STATES + 1
# A symbol this much rarer is cheaper as a patch than as one slot of 128, which costs all others 1 / 88 bit.
RARE = 1 / (STATES * np.log(2) * PATCH_BITS)

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Scales:
    """What is alike.

    Attributes
    ----------
    order : uint16 (n,)
        The column of each position.
    row_levels : uint8 (m,), panel_levels : uint8 (panels,)
        Eighths of octaves of scale; an element has the sum of two.
    zero : float
        Logarithm to base 2 of the standard deviation of levels (integers) whose sum is 0.
    """

    order: NDArray[np.uint16]
    row_levels: Bytes
    panel_levels: Bytes
    zero: float

    @property
    def levels(self) -> int:
        """How many sums of two levels there may be."""
        return int(self.row_levels.max()) + int(self.panel_levels.max()) + 1


def scales_of(columns: Ints, rows: NDArray[np.float64], group: int) -> Scales:
    """Order of columns and levels of rows and panels.

    Parameters
    ----------
    columns : int64 (n,)
        Sums of squared levels of each column.
    rows : float64 (m,)
        Sums of squares of each row, each column on about the same scale.
    group : int
        Columns are ordered within groups of so many.
    """
    m, n = rows.size, columns.size
    order = np.lexsort((-columns, np.arange(n) // group))
    padded = np.zeros(-(-n // LANES) * LANES)
    padded[:n] = columns[order] / m
    power = padded.reshape(-1, LANES).sum(axis=1) / np.minimum(
        LANES, n - LANES * np.arange(len(padded) // LANES)
    )
    panel = np.log2(np.maximum(np.sqrt(power), FLOOR))
    mean = float(np.mean(rows))
    relative = rows / mean if mean else np.ones(m)
    row = 0.5 * np.log2(np.maximum(relative, 4.0**-ROW_OCTAVES))
    panel_levels, panel_zero = _levels(panel, COLUMN_OCTAVES)
    row_levels, row_zero = _levels(row, ROW_OCTAVES)
    return Scales(order.astype(np.uint16), row_levels, panel_levels, panel_zero + row_zero)


def _levels(octaves: NDArray[np.float64], most: int) -> tuple[Bytes, float]:
    grid = np.rint(octaves * PER_OCTAVE)
    first = max(grid.min(), grid.max() - most * PER_OCTAVE)
    return np.maximum(grid - first, 0).astype(np.uint8), float(first) / PER_OCTAVE


def coarse_shifts(scales: Scales) -> Bytes:
    """Shift of each level of scale with which nearly all of its q lie from -64 to 63, uint8 (levels,)."""
    # The same for all of a band, whose models may be merged.
    top = (np.arange(scales.levels) // PER_OCTAVE + 1) + scales.zero - 1
    shifts: Bytes = np.clip(np.ceil(top) - 4, 0, 17).astype(np.uint8)
    return shifts


@dataclass(frozen=True, eq=False)
class Models:
    """Tables, and which one an element uses.

    Attributes
    ----------
    choice : uint8 (levels,)
        The table of each level of scale.
    shifts : uint8 (tables,)
        Low bits of q that are stored as they are.
    tables : uint8 (tables, 512)
    """

    choice: Bytes
    shifts: Bytes
    tables: Bytes


def models_of(counts: Ints, coarse: Bytes) -> Models:
    """The cheapest tables for these counts.

    Parameters
    ----------
    counts : int64 (levels, 256)
        Occurrences of ``128 + 2 * (q >> coarse) + grid`` at each level of scale.
    coarse : uint8 (levels,)
    """
    used = np.flatnonzero(counts.any(axis=1))
    candidates = []
    for width in (1, 2, 4, PER_OCTAVE, 512):
        starts = _starts(used, coarse, width)
        merged = np.add.reduceat(counts[used], starts, axis=0)
        cost = np.stack(
            [_cost(*_fold(merged, f, coarse[used[starts]] == 0), f) for f in range(FINER)]
        )
        cost += coarse[used[starts]] * merged.sum(axis=1)
        total = cost.min(axis=0).sum() / 8 + TABLE_NBYTES * starts.size
        candidates.append((total, starts, merged, cost.argmin(axis=0)))
    _, starts, merged, finer = min(candidates, key=lambda c: c[0])
    first = coarse[used[starts]]
    shifts = (first + finer).astype(np.uint8)
    symbols = np.zeros((starts.size, 2, SYMBOLS), np.int64)
    for f in range(FINER):
        some = finer == f
        symbols[some] = _fold(merged[some], f, first[some] == 0)[0]
    # A level that does not occur has the table of the next one below.
    choice = np.searchsorted(used[starts], np.arange(len(counts)), side="right") - 1
    tables = aligned(starts.size * 4 * STATES).reshape(-1, 4 * STATES)
    for table, c, s in zip(tables, symbols, shifts, strict=True):
        table[:] = decoding_table(c, bool(s))
    return Models(np.maximum(choice, 0).astype(np.uint8), shifts, tables)


def _starts(used: Ints, coarse: Bytes, width: int) -> Ints:
    """Where among the levels in use each group of neighbours begins."""
    key = used // width * 32 + coarse[used]
    return np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))


def _fold(counts: Ints, finer: int, plain: Array) -> tuple[Ints, Ints]:
    """Counts of symbols (groups, 2, 16) of a shift so much beyond the coarse one, and how many have none."""
    q = np.arange(BINS) // 2 - 64
    cell = q >> finer
    s = np.clip(cell, -8, 7)
    missing = (cell != s) | (q == -64) | (q == 63)
    # Without raw bits parity stays.
    kept = np.where((cell - s) % 2 == 0, s, np.where(s < 0, s + 1, s - 1))
    symbols = np.zeros((len(counts), 2 * SYMBOLS), np.int64)
    for rows, to in ((plain, kept if finer == 0 else s), (~plain, s)):
        place = (np.arange(BINS) % 2) * SYMBOLS + to + 8
        one_hot = (place[:, None] == np.arange(2 * SYMBOLS)).astype(np.float64)
        symbols[rows] = np.rint(counts[rows].astype(np.float64) @ one_hot).astype(np.int64)
    return symbols.reshape(-1, 2, SYMBOLS), counts @ missing.astype(np.int64)


def _cost(symbols: Ints, missing: Ints, finer: int) -> NDArray[np.float64]:
    """About how many bits these symbols take, patches and raw bits beyond the coarse ones included."""
    total = symbols.sum(axis=2, keepdims=True)
    share = symbols / np.maximum(total, 1)
    kept = share >= RARE
    rounded = np.where(kept, np.maximum(share, 1 / STATES), 0)
    rounded /= np.maximum(rounded.sum(axis=2, keepdims=True), 1e-9)
    bits = np.where(kept, -np.log2(np.maximum(rounded, 1e-9)), PATCH_BITS)
    cost: NDArray[np.float64] = (symbols * bits).sum(axis=(1, 2)) + PATCH_BITS * missing
    cost += finer * total.sum(axis=(1, 2))
    return cost


def odd(grid: int, raw: bool) -> Array:
    """Whether k is odd for each symbol, bool (16,); with raw bits, whether it is where the lowest is even."""
    s = np.arange(SYMBOLS)
    parity: Array = ((s >= 8) & bool(grid)) ^ ((s % 2 == 1) & (not raw))
    return parity


def decoding_table(counts: Ints, raw: bool) -> Bytes:
    """What states decode to, from the counts of symbols on either grid: int64 (2, 16) -> uint8 (512,)."""
    table = np.empty((2, 2, STATES), np.uint8)
    for grid in (0, 1):
        parity = odd(grid, raw)
        slots = _slots(counts[grid], parity)
        symbol = _spread(counts[grid], slots)
        # The i-th state of a symbol stands for slots + i before bits are added.
        nth = np.empty(STATES, np.int64)
        nth[np.argsort(symbol, kind="stable")] = np.concatenate([np.arange(c) for c in slots])
        y = slots[symbol] + nth
        bits = 7 - np.floor(np.log2(y)).astype(np.int64)
        table[0, grid] = bits << 5 | symbol << 1 | parity[symbol]
        table[1, grid] = (y << bits) - STATES
    return table.reshape(-1)


def _slots(counts: Ints, parity: Array) -> Ints:
    """States of each symbol, 128 together; none for one that is cheaper as a patch, int64 (16,)."""
    total = counts.sum()
    if not total:
        return np.where(np.arange(SYMBOLS) == 8, STATES, 0)
    kept = counts >= RARE * total
    for some in (parity, ~parity):
        # A patch stands for another symbol with which the machine goes the same way.
        if counts[some].any() and not (kept & some).any():
            kept[np.argmax(np.where(some, counts, -1))] = True
    weight = np.where(kept, np.maximum(counts, 1), 0).astype(np.float64)
    slots = np.where(kept, np.maximum(np.floor(weight * STATES / weight.sum()), 1), 0)
    while (missing := STATES - int(slots.sum())) != 0:
        with np.errstate(divide="ignore", invalid="ignore"):
            if missing > 0:
                slots[np.argmax(np.where(kept, weight * np.log2((slots + 1) / slots), -1))] += 1
            else:
                loss = np.where(slots > 1, weight * np.log2(slots / (slots - 1)), np.inf)
                slots[np.argmin(loss)] -= 1
    return slots.astype(np.int64)


def _spread(counts: Ints, slots: Ints) -> Ints:
    """Symbol of each state, int64 (128,), so that states come up about as often as their symbols want.

    A symbol of probability p wants its state x where ``1 / (p log(1 + 1 / x))`` falls (Duda, 2021).
    """
    symbol = np.repeat(np.arange(SYMBOLS), slots)
    x = np.concatenate([np.arange(c, 2 * c) for c in slots])
    share = np.maximum(counts, 1) / max(int(counts.sum()), 1)
    key = 1 / (share[symbol] * np.log1p(1 / x))
    return symbol[np.argsort(key, kind="stable")]
