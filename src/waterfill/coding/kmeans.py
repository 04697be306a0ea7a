"""Weighted k-means of numbers, on histograms: as fast for a large matrix as for a small one.

Bins lie evenly on ``x / (1 + |x|)`` of numbers whose scale is about one: fine about zero, and no
outlier is beyond them. What bins hold are sums, so a mean of whole bins is exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.types import Floats

__all__ = ["best_levels", "histogram", "lloyd", "rms", "row_levels", "scaled_levels"]

Sums = NDArray[np.float64]
ROW_BINS = 256
CHUNK = 1 << 20  # numbers worked on at a time
ROUNDS = 30


def histogram(x: Any, weights: Any, bins: int, by_row: bool = False) -> Sums:
    """Sums of weights, and of weights times numbers, in each bin: float64 (2, 1 or rows, bins).

    Parameters
    ----------
    x : float32 (rows, count), finite
    weights : broadcastable to x, not negative
    by_row : a histogram for each row, not one for all
    """
    rows, count = x.shape
    held = rows if by_row else 1
    sums = np.zeros((2, held * bins))
    weights = np.broadcast_to(weights, x.shape)
    step = max(1, CHUNK // max(count, 1))
    for first in range(0, rows, step):
        part = x[first : first + step]
        index = _bin(part, bins)
        if by_row:
            index += bins * np.arange(first, first + len(part))[:, None]
        weight = weights[first : first + step].astype(np.float64)
        sums[0] += np.bincount(index.ravel(), weight.ravel(), held * bins)
        sums[1] += np.bincount(index.ravel(), (weight * part).ravel(), held * bins)
    return sums.reshape(2, held, bins)


def best_levels(sums: Sums, k: int) -> Floats:
    """The k levels of least weighted squared error, ascending: exact, but that bins stay whole.

    Parameters
    ----------
    sums : of `histogram`, (2, 1, bins)

    Returns
    -------
    float32 (k,), the last one repeated where there are fewer than k bins in use
    """
    weight, total = sums[:, 0][:, sums[0, 0] > 0]
    if not weight.size:
        return np.zeros(k, np.float32)
    mass, moment = (np.concatenate([[0.0], np.cumsum(v)]) for v in (weight, total))
    # What bins a (columns) to b (rows) gain by a level of their own, over one at zero.
    span = mass[:, None] - mass
    gain = np.square(moment[:, None] - moment) / np.where(span > 0, span, 1)
    gain[span <= 0] = -np.inf
    best, cuts = gain[:, 0], []
    for _ in range(min(k, len(weight)) - 1):
        reached = best + gain
        cuts.append(reached.argmax(axis=1))
        best = np.take_along_axis(reached, cuts[-1][:, None], axis=1)[:, 0]
    borders = [len(weight)]
    for cut in reversed(cuts):
        borders.append(int(cut[borders[-1]]))
    edges = np.array([0, *borders[::-1]])
    means = np.diff(moment[edges]) / np.diff(mass[edges])
    levels: Floats = np.pad(means, (0, k - len(means)), "edge").astype(np.float32)
    return levels


def lloyd(sums: Sums, k: int) -> Floats:
    """As `best_levels` for each histogram of (2, rows, bins), to a local optimum: float32 (rows, k).

    It begins where the density of levels is the cube root of the numbers' (Panter & Dite 1951).
    """
    rows, bins = sums.shape[1:]
    edges = np.arange(1, bins) / bins * 2 - 1
    edges = np.concatenate([[-2.0 * bins], edges / (1 - np.abs(edges)), [2.0 * bins]])
    density = np.cumsum(np.cbrt(sums[0]) * np.cbrt(np.diff(edges)) ** 2, axis=1)
    wanted = (np.arange(k) + 0.5) / k * density[:, -1:]
    start = np.stack([(density < wanted[:, i : i + 1]).sum(axis=1) for i in range(k)], axis=1)
    middle = 0.5 * (edges[1:] + edges[:-1])
    levels = middle[np.minimum(start, bins - 1)]
    below = np.concatenate([np.zeros((2, rows, 1)), np.cumsum(sums, axis=2)], axis=2)
    for _ in range(ROUNDS):
        cut = np.zeros((rows, k + 1), np.int64)
        cut[:, 1:-1] = np.rint((_companded(0.5 * (levels[:, 1:] + levels[:, :-1])) + 1) / 2 * bins)
        cut[:, -1] = bins
        weight, total = np.diff(np.take_along_axis(below, cut[None], axis=2), axis=2)
        levels = np.where(weight > 0, total / np.where(weight > 0, weight, 1), levels)
        levels.sort(axis=1)
    found: Floats = levels.astype(np.float32)
    return found


def scaled_levels(columns: Floats, weights: Any, scales: Floats, group: int, k: int) -> Floats:
    """Levels (k,) that all weights share, each on the scale of its row and group.

    Parameters
    ----------
    columns : float32 (n, m), one row per input column
    weights : what a squared error costs; broadcastable to columns
    scales : float32 (ceil(n / group), m)
    """
    spread = np.repeat(scales, group, axis=0)[: len(columns)]
    x = columns / np.where(spread == 0, np.float32(1), spread)
    bins = min(max(16 * k, 256), 1024)  # many to a level, and the square of them soon worked through
    return best_levels(histogram(x, weights * np.square(spread), bins), k)


def row_levels(columns: Floats, weights: Any, k: int) -> Floats:
    """Levels (k, m), a table for each row of the matrix (column here); weights as above."""
    scale = np.sqrt(np.square(columns).sum(axis=0) / max(len(columns), 1))
    x = columns / np.where(scale == 0, np.float32(1), scale)
    weights = np.broadcast_to(weights, x.shape)
    levels: Floats = lloyd(histogram(x.T, weights.T, ROW_BINS, by_row=True), k).T * scale
    return levels


def rms(columns: Floats, group: int) -> Floats:
    """Root mean square of the groups of columns (n, m): (ceil(n / group), m)."""
    starts = range(0, len(columns), max(group, 1))
    squares = [np.square(columns[a : a + group]).mean(axis=0) for a in starts]
    return np.sqrt(np.array(squares, np.float32).reshape(len(starts), columns.shape[1]))


def _companded(x: Any) -> Any:
    return x / (1 + np.abs(x))


def _bin(x: Any, bins: int) -> NDArray[np.int64]:
    index: NDArray[np.int64] = ((_companded(x) + 1) * (bins / 2)).astype(np.int64)
    return np.minimum(index, bins - 1)
