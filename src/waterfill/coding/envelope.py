"""The scale of every element of a matrix as the product of its column's and its row's.

Scales are levels of a logarithmic scale: an element's level is the sum of its column's and its
row's. The fit minimises the bits that the indices will take, side information included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import gaussian, native
from waterfill.coding.trellis import SEGMENT

__all__ = ["Envelope", "fit"]

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
ROUNDS, SMALL = 2, 1 << 16  # turns that pay on a matrix this small; one is enough for others
PLAIN_BORDER = 0  # half way: to begin with
SAMPLE = 256  # rows (or columns) enough to know roughly a column's (or row's) scale
SAMPLED = 8  # segments
CHUNK = SEGMENT  # rows tallied at a time: bounded memory on a tall matrix


@dataclass(frozen=True)
class Envelope:
    """Levels of columns and rows, and the family of models they choose from.

    Attributes
    ----------
    columns, rows : uint8 (n,), (m,)
        Level ``first + columns[j] + rows[i]`` of `gaussian`, at this precision and border.
    precision : levels to the octave
    border : index of `gaussian.BORDERS`
    first : int
    hinted : whether the columns' levels, and the rows', are said relative to the caller's hints
    bits : float
        About what the indices and the levels take; for an encoder's choice.
    """

    columns: Bytes
    rows: Bytes
    precision: int
    border: int
    first: int
    hinted: tuple[bool, bool] = (False, False)
    bits: float = 0.0

    def models(self) -> tuple[NDArray[np.uint16], int, int]:
        """Frequencies of each context ``2 * level + grid``; and what makes the shift of a level."""
        last = self.first + int(self.columns.max()) + int(self.rows.max())
        table = gaussian.frequencies(self.precision, self.border, self.first, last)
        widening = gaussian.widening(self.precision, self.first)
        return table, widening, self.precision.bit_length() - 1


def fit(
    index: NDArray[np.int32],
    states: int,
    reach: int,
    precision: int,
    hints: tuple[Ints, Ints],
) -> Envelope:
    """Levels that code the indices in few bits: moments first, then turns of maximum likelihood.

    Parameters
    ----------
    index : int32 (m, n)
    states : 1, or a key of `trellis.CODES`
    reach : sizes from which on \\|k\\| are counted as one
    precision : levels to the octave
    hints : int64 (n,), (m,)
        Levels that the reader can expect, but for one number that all share: a level is said
        relative to its hint where that takes fewer bits.
    """
    border = PLAIN_BORDER
    levels = list(_by_moments(index, precision, border, plain=states == 1))
    hinted = [_entropy(v - h) < _entropy(v) for v, h in zip(levels, hints, strict=True)]
    expected = [h if used else np.zeros_like(h) for h, used in zip(hints, hinted, strict=True)]
    counts = np.zeros(0)
    rounds = ROUNDS if index.size < SMALL else 1
    for turn in range(2 * rounds):
        axis = turn % 2
        levels[axis], counts = _improve(
            index, (levels[0], levels[1]), expected[axis], axis, states, reach, precision, border
        )
    costs = [
        float((counts * gaussian.bits_by_size(precision, b, reach)).sum())
        for b in range(len(gaussian.BORDERS))
    ]
    side = sum(_entropy(v - e) for v, e in zip(levels, expected, strict=True))
    columns, rows = levels
    return Envelope(
        (columns - columns.min()).astype(np.uint8),
        (rows - rows.min()).astype(np.uint8),
        precision,
        int(np.argmin(costs)),
        int(columns.min() + rows.min()),
        (hinted[0], hinted[1]),
        min(costs) + side,
    )


def _by_moments(
    index: NDArray[np.int32], precision: int, border: int, plain: bool
) -> tuple[Ints, Ints]:
    """A rank-one fit of the mean squares, as levels; the rows' are around zero."""
    m, n = index.shape
    some_rows = np.unique(np.linspace(0, m - 1, min(m, SAMPLE)).astype(np.int64))
    some_columns = np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64))
    tall, wide = _squares(index[some_rows], plain), _squares(index[:, some_columns], plain)
    row = np.ones(m)
    column = np.ones(n)
    for _ in range(3):
        column = _floored((1 / row[some_rows]) @ tall / len(some_rows))
        row = _floored(wide @ (1 / column[some_columns]) / len(some_columns))
        row /= np.exp(np.log(row).mean())
    log_mean = np.log2(gaussian.mean_square(precision, border))
    levels = np.arange(log_mean.size)
    at = np.rint(np.interp(np.log2(column), log_mean, levels)).astype(np.int64)
    around = np.rint(np.log2(row) * precision / 2).astype(np.int64)
    spread = gaussian.levels(precision) // 3
    around = np.clip(around, -spread, spread)
    return np.clip(at, -around.min(), levels[-1] - around.max()), around


def _squares(index: NDArray[np.int32], plain: bool) -> NDArray[np.float32]:
    """Squared points in units of two steps, the two grids taken together."""
    size = np.abs(index.astype(np.float32))
    return size * size if plain else np.maximum(size * size - 0.5 * size, 0)


def _floored(means: Floats) -> Floats:
    floor = 1e-4 * (means.mean() or 1.0)
    return np.maximum(means, floor)


def _improve(
    index: NDArray[np.int32],
    levels: tuple[Ints, Ints],
    expected: Ints,
    axis: int,
    states: int,
    reach: int,
    precision: int,
    border: int,
) -> tuple[Ints, Floats]:
    """The likeliest levels of the columns (axis 0) or the rows (1); and counts by level.

    A level that few others have costs more bits to say: the choice counts them.
    """
    mine, other = levels[axis], levels[1 - axis]
    bits = gaussian.bits_by_size(precision, border, reach)
    low, high = int(mine.min()) - 2 * precision, int(mine.max()) + 2 * precision
    low, high = max(low, -int(other.min())), min(high, len(bits) - 1 - int(other.max()))
    candidates = np.arange(low, high + 1)
    inside = np.arange(int(other.min()), int(other.max()) + 1)
    table = bits[candidates[None, :] + inside[:, None]]  # (other levels, candidates, 2, reach + 1)
    weights = table.transpose(0, 2, 3, 1).reshape(-1, candidates.size).astype(np.float32)
    said = mine - expected
    saying = _saying(
        said, int((candidates[0] - expected).min()), int((candidates[-1] - expected).max())
    )
    chosen = np.empty_like(mine)
    total = np.zeros((len(bits), 2, reach + 1))
    for part, counts in _tallies(index, levels, axis, states, reach):
        cost = counts.astype(np.float32) @ weights
        cost += saying[
            candidates[None, :] - expected[part, None] - (candidates[0] - expected).min()
        ]
        best = candidates[cost.argmin(axis=1)]
        chosen[part] = best
        by_level = counts.reshape(len(best), inside.size, 2, reach + 1)
        for level in np.unique(best):
            total[level + inside] += by_level[best == level].sum(axis=0)
    return chosen, total


def _saying(said: Ints, low: int, high: int) -> NDArray[np.float32]:
    """Bits to say each number from low to high, where `said` is what was said last time."""
    prior = np.bincount(said - low, minlength=high - low + 1) + 0.5
    bits: NDArray[np.float32] = np.log2(prior.sum() / prior).astype(np.float32)
    return bits


def _tallies(
    index: NDArray[np.int32], levels: tuple[Ints, Ints], axis: int, states: int, reach: int
) -> Iterator[tuple[slice, NDArray[np.uint32]]]:
    """Occurrences of each (level of the other axis, grid, size), by column or by row."""
    core = native.core()
    assert core is not None  # the encoder asked for it first
    columns, rows = ((v - v.min()).astype(np.uint8) for v in levels)
    width = (int(levels[1 - axis].max() - levels[1 - axis].min()) + 1) * 2 * (reach + 1)

    def tally(part: slice, counts: NDArray[np.uint32]) -> None:
        core.paths_tally(
            index[part],
            columns,
            rows[part],
            states=states,
            segment=SEGMENT,
            reach=reach,
            by_row=axis == 1,
            counts=counts,
        )

    if axis == 1:
        for first in range(0, len(rows), CHUNK):
            part = slice(first, first + CHUNK)
            counts = np.zeros((len(rows[part]), width), np.uint32)
            tally(part, counts)
            yield part, counts
        return
    # Whole segments, as paths begin anew with each; enough of them to judge a column by.
    counts = np.zeros((len(columns), width), np.uint32)
    segments = -(-len(rows) // SEGMENT)
    for segment in np.unique(np.linspace(0, segments - 1, min(segments, SAMPLED)).astype(int)):
        tally(slice(segment * SEGMENT, (segment + 1) * SEGMENT), counts)
    yield slice(None), counts


def _entropy(levels: Ints) -> float:
    """Bits of a vector of levels, about what its coder will need."""
    counts = np.bincount(levels - levels.min())
    counts = counts[counts > 0]
    return float((counts * np.log2(levels.size / counts)).sum()) + 8 * counts.size
