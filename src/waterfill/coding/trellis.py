"""Trellis (dependent) quantisation down the rows of a column, and the walk that undoes it.

Two reconstruction grids, ``2k`` and ``2k - sign k`` steps, and a machine of 4 to 256 states driven by
the parity of k that says which of them comes next (as in VVC, Schwarz et al. 2019, but that zero is on
one grid only). One state is plain rounding to ``k`` steps.
"""

from __future__ import annotations

import numpy as np

from waterfill.coding.native import core, device, threads
from waterfill.coding.rounding import Indices, successive
from waterfill.types import Floats, WaterfillError

SEGMENT = 1024
# states: (feedback, input) of the machine; Ungerboeck 1982, confirmed by search (docs/flagship.md).
CODES = {
    4: (2, 1),
    8: (5, 2),
    16: (9, 2),
    32: (18, 4),
    64: (33, 10),
    128: (78, 43),
    256: (166, 121),
}


def quantise(weight: Floats, lower: Floats, step: Floats, states: int) -> Indices:
    """Indices of the cheapest path, column by column, errors carried on.

    Parameters
    ----------
    weight : float32 (m, n)
    lower : float32 (n, n) or (n,) from `rounding.factor`
    step : float32 (n,)
    states : 1 or a key of `CODES`

    Returns
    -------
    int32 (m, n)
    """
    # The path down one segment is sequential: with nothing beside it, a core is the faster place.
    if device() != "cpu" and len(weight) > SEGMENT:
        from waterfill.coding import trellis_torch

        return trellis_torch.quantise(weight, lower, step, states, device())
    native = core()
    if native is None:
        raise WaterfillError("encoding needs the native core; install waterfill with its extension")
    columns = np.ascontiguousarray(weight.T)
    index = np.empty(columns.shape, np.int32)

    def round_block(first: int, last: int, block: Floats, target: Floats, carry: Floats) -> Floats:
        error = np.empty_like(target)
        native.trellis_quantise(
            np.ascontiguousarray(block),
            target,
            carry,
            np.ascontiguousarray(step[first:last]),
            index[first:last],
            error,
            states=states,
            segment=SEGMENT,
            threads=threads(),
        )
        return error

    successive(columns, lower, round_block)
    return np.ascontiguousarray(index.T)


def walk(index: Indices, step: Floats, states: int) -> Floats:
    """Values of a path: int32 (m, n), float32 (n,) -> float32 (m, n). Same bits everywhere."""
    native = core()
    if native is not None:
        out = np.empty(index.shape, np.float32)
        native.trellis_walk(index, step, out, states=states, segment=SEGMENT, threads=threads())
        return out
    if states == 1:
        return index.astype(np.float32) * step
    feedback, source = CODES[states]
    level = np.empty(index.shape, np.int64)
    state = np.zeros(index.shape[1], np.int64)
    for row, k in enumerate(index):
        if row % SEGMENT == 0:
            state[:] = 0
        grid = state & 1
        level[row] = 2 * k.astype(np.int64) - grid * np.sign(k)
        state = (state >> 1) ^ (feedback * grid) ^ (source * (k & 1))
    return level.astype(np.float32) * step
