"""Weighted k-means of numbers, on histograms: as fast for a large matrix as for a small one.

Bins lie evenly on ``x / (1 + |x|)`` of numbers whose scale is about one: fine about zero, and no
outlier is beyond them. What bins hold are sums, so a mean of whole bins is exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.types import Floats

__all__ = ["best_levels", "histogram", "rms", "row_levels", "scaled_levels"]

Sums = NDArray[np.float64]
BINS, ROW_BINS = 256, 96  # at least; the time goes with their square
CHUNK = 1 << 20  # numbers worked on at a time


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
    """The k levels of least weighted squared error: exact, but that bins stay whole.

    The least error of the first bins on so many levels follows from that on one level fewer
    (Fisher 1958; Bruce 1965); all ends of the last level are tried at once.

    Parameters
    ----------
    sums : of `histogram`, (2, rows, bins)

    Returns
    -------
    float32 (rows, k), ascending; some alike where fewer bins are in use
    """
    rows, bins = sums.shape[1:]
    below = np.concatenate([np.zeros((2, rows, 1)), np.cumsum(sums, axis=2)], axis=2)
    step = max(1, CHUNK // (bins + 1) ** 2)
    found = [_best_borders(below[:, a : a + step], k) for a in range(0, rows, step)]
    borders = np.concatenate([np.zeros((0, k + 1), np.int64), *found])
    mass, moment = np.diff(np.take_along_axis(below, borders[None], axis=2), axis=2)
    with np.errstate(invalid="ignore"):
        means = np.where(mass > 0, moment / np.where(mass > 0, mass, 1), np.nan)
        # A level without weights is a neighbour's.
        means = np.fmax.accumulate(means, axis=1)
        means = np.fmin.accumulate(means[:, ::-1], axis=1)[:, ::-1]
    levels: Floats = np.nan_to_num(means).astype(np.float32)
    return levels


def _best_borders(below: Sums, k: int) -> NDArray[np.int64]:
    """Bins where levels begin and end, int64 (rows, k + 1), given sums below each bin (2, rows, bins + 1)."""
    bins = below.shape[2] - 1
    mass, moment = below[:, :, :, None] - below[:, :, None, :]
    # What one level for bins a (last axis) to b gains over one at zero.
    gain = np.square(moment) / np.where(mass > 0, mass, 1)
    gain += np.triu(np.full(gain.shape[1:], -np.inf), 1)
    best, cuts = gain[:, :, 0], []
    for _ in range(k - 1):
        reached = best[:, None, :] + gain
        cuts.append(reached.argmax(axis=2))
        best = np.take_along_axis(reached, cuts[-1][:, :, None], axis=2)[:, :, 0]
    borders = [np.full(len(best), bins)]
    for cut in reversed(cuts):
        borders.append(np.take_along_axis(cut, borders[-1][:, None], axis=1)[:, 0])
    return np.stack([np.zeros(len(best), np.int64), *borders[::-1]], axis=1)


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
    sums = histogram(x, weights * np.square(spread), max(BINS, 8 * k))
    found: Floats = best_levels(sums, k)[0]
    return found


def row_levels(columns: Floats, weights: Any, k: int) -> Floats:
    """Levels (k, m), a table for each row of the matrix (column here); weights as above."""
    scale = np.sqrt(np.square(columns).sum(axis=0) / max(len(columns), 1))
    x = columns / np.where(scale == 0, np.float32(1), scale)
    weights = np.broadcast_to(weights, x.shape)
    levels: Floats = (
        best_levels(histogram(x.T, weights.T, max(ROW_BINS, 4 * k), by_row=True), k).T * scale
    )
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
