"""Decoding of trellis paths in numpy alone: what every native kernel must agree with.

Vectorised over lanes; a Python loop over rows. See ``docs/format/paths.md``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from waterfill.coding.rans_numpy import LOWER, SCALE_BITS, TOTAL, read_blocks, slot_layout
from waterfill.coding.trellis import CODES, SEGMENT
from waterfill.types import Floats, FormatError

__all__ = ["decode"]

Bytes = NDArray[np.uint8]


def decode(
    stream: Bytes,
    columns: Bytes,
    rows: Bytes,
    freqs: NDArray[np.uint16],
    step: Floats,
    scale: Floats,
    states: int,
    reach: int,
) -> Floats:
    """Weights; an escaped index is the NaN ``0x7FC00000 + grid``."""
    symbol_at, offset_at = slot_layout(freqs)
    table = freqs.astype(np.int64)
    feedback, source = CODES.get(states, (0, 0))
    out = np.empty((rows.size, columns.size), np.float32)
    for (part_rows, part_cols), lanes, x, words in read_blocks(stream, rows.size, columns.size):
        if part_rows.start % SEGMENT:
            raise FormatError("paths: a block begins inside a segment")
        taken = 0
        for col in range(part_cols.start, part_cols.stop, lanes):
            here = slice(col, min(col + lanes, part_cols.stop))
            width = here.stop - col
            level = 2 * columns[here].astype(np.int64)
            machine = np.zeros(width, np.int64)
            for row in range(part_rows.start, part_rows.stop):
                if row % SEGMENT == 0:
                    machine[:] = 0
                grid = machine & 1
                context = level + 2 * int(rows[row]) + grid
                slot = x[:width] & (TOTAL - 1)
                symbol = symbol_at[context, slot]
                state = (
                    table[context, symbol] * (x[:width] >> SCALE_BITS) + offset_at[context, slot]
                )
                low = np.flatnonzero(state < LOWER)
                if taken + low.size > words.size:
                    raise FormatError("rANS: words run out")
                state[low] = state[low] << 16 | words[taken : taken + low.size]
                taken += low.size
                x[:width] = state
                k = symbol - reach
                machine = (machine >> 1) ^ (feedback * grid) ^ (source * (k & 1))
                points = (2 * k - grid * np.sign(k)).astype(np.float32)
                with np.errstate(over="ignore"):
                    values = points * step[here] * scale[row]
                nan = (0x7FC00000 + grid).astype(np.uint32).view(np.float32)
                out[row, here] = np.where(k > reach, nan, values)
        if taken != words.size or (x != LOWER).any():
            raise FormatError("rANS: words left over, or lanes do not end where they began")
    return out
