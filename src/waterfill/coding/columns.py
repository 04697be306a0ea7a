"""Columns in units of what an error in them costs, for codecs that round them one after another."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from waterfill.coding.kmeans_vectors import assign, kmeans
from waterfill.coding.rounding import factor
from waterfill.coding.scales import from_grid, to_grid
from waterfill.types import Array, Floats, Weighting

Floats64 = NDArray[np.float64]

__all__ = [
    "GRID",
    "diagonal",
    "energy_order",
    "level_classes",
    "mean_squares",
    "row_scales",
    "scaled_columns",
    "share_bits",
]

GRID = 4  # column scales to the octave
TINY = 1e-30
PLAIN = 50  # octaves either side of one that squares leave float32 room for
FAR = 24  # beyond these a column is as good as nothing, or alone


def diagonal(lower: Floats) -> Floats:
    """Of a factor, which may be stored as nothing else: float32 (n,)."""
    return lower if lower.ndim == 1 else lower.diagonal()


def mean_squares(matrix: Floats) -> Floats64:
    """Mean square of each column, float64 (n,), where float32 cannot hold the squares too."""
    octave = int(np.frexp(np.abs(matrix).max(initial=0))[1])
    octave = octave if abs(octave) > PLAIN else 0
    squares = np.square(np.ldexp(matrix, -octave) if octave else matrix)
    means: Floats64 = np.mean(squares, axis=0, dtype=np.float64)
    return means * 4.0**octave


def scaled_columns(
    matrix: Floats, weighting: Weighting, damping: float, carried: bool, scaled: bool
) -> tuple[Floats, Floats, Array]:
    """A matrix whose columns all cost the same, its factor, and the scales that were taken out.

    Parameters
    ----------
    matrix : float32 (m, n); it may be overwritten
    weighting : its second moment S counts
    damping : added to the diagonal of S, relative to its mean
    carried : whether errors will be carried on; without, only the diagonal of S counts
    scaled : whether to scale at all

    Returns
    -------
    weight : float32 (n, m), one row for each column of the matrix, divided by its scale
    lower : float32 (n, n) or (n,), the factor of S in the new units: its diagonal is near 1 if scaled
    exponents : int32 (n,), the scales on their grid of `GRID` steps to the octave
    """
    moment, n = weighting.second_moment, matrix.shape[1]
    if moment is None:
        lower = np.ones(n, np.float32)
    elif carried or moment.ndim == 1:
        lower = factor(moment, damping)
    else:
        lower = factor(np.ascontiguousarray(moment.diagonal()), damping)
    exponents = to_grid(1 / diagonal(lower), GRID) if scaled else np.zeros(n, np.int32)
    scale = from_grid(exponents, GRID)[:, None]
    weight = np.ascontiguousarray(matrix.T)
    weight /= scale
    return weight, lower * (scale[:, 0] if lower.ndim == 1 else scale), exponents


def energy_order(matrix: Floats, weighting: Weighting) -> tuple[Array, Weighting]:
    """Columns of like energy together, those of most last.

    Parameters
    ----------
    matrix : float32 (m, n)
    weighting : its second moment S tells what each column costs

    Returns
    -------
    levels : int32 (n,), energy of each column in half octaves around the median; ``np.argsort(levels,
        kind="stable")`` is the order
    weighting : for the matrix in that order
    """
    moment = weighting.second_moment
    cost: Floats | float = 1.0
    if moment is not None:
        cost = moment if moment.ndim == 1 else moment.diagonal()
    energy = cost * mean_squares(matrix)
    level = np.log2(np.maximum(energy, TINY))
    levels: Array = np.clip(np.rint(level - np.median(level)), -FAR, FAR).astype(np.int32)
    order = np.argsort(levels, kind="stable")
    if moment is not None:
        moment = moment[order] if moment.ndim == 1 else moment[np.ix_(order, order)]
    return levels, Weighting(moment, weighting.row_weights)


def row_scales(weight: Floats, weighting: Weighting, trust: float) -> Array:
    """Grid exponents, int32 (m,), of scales for the rows of a matrix stored as (n, m).

    At `trust` 0 rows come to the same size, at 1 to the same cost: scales go with the row's weight to
    the power minus one half; in between, geometrically.
    """
    size = np.maximum(np.sqrt(mean_squares(weight)), TINY)
    worth = np.broadcast_to(np.asarray(weighting.row_weights, np.float64), size.shape)
    log_size, log_worth = np.log(size), np.log(np.maximum(worth, 1e-6 * worth.mean() + TINY))
    wanted = log_size.mean() - (log_worth - log_worth.mean()) / 2
    return to_grid(np.exp((1 - trust) * log_size + trust * wanted), GRID)


def level_classes(energy: Array, most: int) -> tuple[Array, Array]:
    """Columns of like energy together.

    Parameters
    ----------
    energy : (n,), variance of each column times what it costs
    most : classes, at most

    Returns
    -------
    ids : int64 (n,), every class has columns
    heights : float64 (classes,), mean of ``log2(energy) / 2``: the bits that a class deserves
    """
    level = np.log2(np.maximum(energy, TINY, dtype=np.float64)) / 2
    above = (level - level.min())[:, None].astype(np.float32)
    centres, _ = kmeans(above, np.ones(len(above), np.float32), most)
    ids: Array = np.unique(assign(above, centres), return_inverse=True)[1]
    return ids, np.bincount(ids, level) / np.bincount(ids)


def share_bits(heights: Array, counts: Array, most: Array, bits: float) -> tuple[Array, float]:
    """Reverse water-filling: bits of each class, within 0 and its most, that spend `bits` on average.

    Parameters
    ----------
    heights : (classes,), see `level_classes`
    counts : (classes,), columns in each
    most : (classes,), bits that a class can take
    bits : mean over the columns; less where the classes cannot take so many

    Returns
    -------
    bits of each class, and the level: a class gets its height and the level
    """
    low, high = -float(heights.max()), bits + float(np.max(most) - heights.min())
    for _ in range(50):
        middle = (low + high) / 2
        enough = counts @ np.clip(heights + middle, 0, most) >= bits * counts.sum()
        low, high = (low, middle) if enough else (middle, high)
    return np.clip(heights + high, 0, most), high
