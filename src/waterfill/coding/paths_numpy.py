"""Decoding of trellis paths in numpy alone: what every native kernel must agree with.

Vectorised over groups of lanes; Python loops over rows and groups. See ``docs/format/paths.md``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from waterfill.coding.rans_numpy import LOWER, SCALE_BITS, TOTAL, read_blocks, slot_layout
from waterfill.coding.trellis import CODES, SEGMENT
from waterfill.types import Floats, FormatError

__all__ = ["decode"]

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
GROUP = 16  # lanes that take all words after their symbols before any after raw bits
SYMBOLS, ESCAPE = 16, 14
EASY_SHIFT = 3


def decode(
    stream: Bytes,
    columns: Bytes,
    rows: Bytes,
    freqs: NDArray[np.uint16],
    widening: int,
    precision: int,
    step: Floats,
    scale: Floats,
    states: int,
) -> Floats:
    """Weights; an escaped index is the NaN ``0x7FC00000 + grid``."""
    symbol_at, offset_at = slot_layout(freqs, SYMBOLS)
    frequency_at = np.take_along_axis(freqs.astype(np.int64), symbol_at, axis=1)
    feedback, source = CODES.get(states, (0, 0))
    out = np.empty((rows.size, columns.size), np.float32)
    for (part_rows, part_cols), lanes, x, words in read_blocks(stream, rows.size, columns.size):
        if part_rows.start % SEGMENT:
            raise FormatError("paths: a block begins inside a segment")
        supply = _Words(words)
        width, group = part_cols.stop - part_cols.start, min(lanes, GROUP)
        column_levels = columns[part_cols].astype(np.int64)
        machine = np.zeros(width, np.int64)
        for row in range(part_rows.start, part_rows.stop):
            machine *= row % SEGMENT > 0
            grid = machine & 1
            level = column_levels + int(rows[row])
            shift = np.maximum(level + widening >> precision, 0)
            size, negative, escaped = (np.empty(width, np.int64) for _ in range(3))
            for first in range(0, width, group):
                here = slice(first, min(first + group, width))
                context = 2 * level[here] + grid[here]
                state = x[first % lanes : first % lanes + context.size]  # a view
                slot = state & (TOTAL - 1)
                symbol = symbol_at[context, slot]
                state[:] = (
                    frequency_at[context, slot] * (state >> SCALE_BITS) + offset_at[context, slot]
                )
                supply.refill(state, shift[here] > EASY_SHIFT)
                bits = (shift[here] + 1) * (symbol > 0)
                raw = state & ((1 << bits) - 1)
                state >>= bits
                supply.refill(state, True)
                sizes = (symbol - 1 << shift[here]) + (raw >> 1) + 1
                size[here] = np.where(symbol > 0, sizes, 0)
                negative[here], escaped[here] = raw & 1, symbol >= ESCAPE
            machine = (machine >> 1) ^ (feedback * grid) ^ (source * (size & 1))
            points = np.where(size > 0, 2 * size - grid, 0) * np.where(negative > 0, -1, 1)
            with np.errstate(over="ignore"):
                values = points.astype(np.float32) * step[part_cols] * scale[row]
            nan = (0x7FC00000 + grid).astype(np.uint32).view(np.float32)
            out[row, part_cols] = np.where(escaped > 0, nan, values)
        if supply.left or (x != LOWER).any():
            raise FormatError("rANS: words left over, or lanes do not end where they began")
    return out


class _Words:
    """The words of a block, taken in order."""

    def __init__(self, words: Ints) -> None:
        self.words, self.taken = words, 0

    @property
    def left(self) -> int:
        return self.words.size - self.taken

    def refill(self, state: Ints, where: NDArray[np.bool_] | bool) -> None:
        low = np.flatnonzero((state < LOWER) & where)
        if low.size > self.left:
            raise FormatError("rANS: words run out")
        state[low] = state[low] << 16 | self.words[self.taken : self.taken + low.size]
        self.taken += low.size
