"""A matrix as signs times magnitudes of low rank: one plane of about one bit a weight.

``A ~ sign * (U V)``: the magnitudes of a trained matrix are close to an outer product, its signs are
not (BitStack, Wang et al. 2024, after OneBit, Xu et al. 2024). Here the fit is made for the harm
``tr(E S E^T)`` rather than for the plain error: signs by coordinate descent, rows of U in closed form.
Matrices are column-first, (n, m), so that a column lies in one piece.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from waterfill.coding.rounding import Indices
from waterfill.coding.scales import LIMIT, from_grid, to_grid
from waterfill.types import Array, Floats, FormatError, Weighting

Bools = NDArray[np.bool_]
BLOCK = 32  # columns between two products with the moment
EXTRA = 4  # directions beyond the rank that the search for the right factor carries along
ITERATIONS = 6
DAMPING = 0.01  # for an input that calibration never saw, relative to the mean
ROWS = 1024  # of the matrix at a time


def input_grid(n: int, weighting: Weighting, per_octave: int) -> tuple[Indices, Floats | None]:
    """Scales that make all inputs of a matrix (m, n) equally large, and their moment then.

    Returns
    -------
    grid : int32 (n,)
        Exponents of the columns' scales, which are the reciprocals of the inputs'.
    moment : float32 (n, n), or None where it is diagonal
        Of inputs multiplied by the scales, ones on its diagonal or nearly so.
    """
    moment = weighting.second_moment
    if moment is None:
        return np.zeros(n, np.int32), None
    diagonal = np.maximum(moment if moment.ndim == 1 else moment.diagonal(), 0)
    level = float(np.mean(diagonal, dtype=np.float64)) or 1.0
    grid = to_grid(1 / np.sqrt(diagonal / level + DAMPING), per_octave)
    if moment.ndim == 1:
        return grid, None
    scale = from_grid(grid, per_octave)
    return grid, moment * (scale[:, None] * (scale / np.float32(level)))


def row_exponents(columns: Floats) -> Indices:
    """Powers of two next above each row's root mean square, of a matrix transposed (n, m)."""
    square = np.einsum("jm,jm->m", columns, columns, dtype=np.float64) / max(len(columns), 1)
    exponents: Indices = np.clip(np.frexp(np.sqrt(square))[1], -LIMIT, LIMIT).astype(np.int32)
    return exponents


def quantise(factor: Floats, bits: int) -> tuple[Floats, Floats]:
    """Factor (k, count) as whole numbers of so many bits, and the unit (k,) of each row of it."""
    top = (1 << (bits - 1)) - 1
    unit = np.abs(factor).max(axis=1, initial=0) / np.float32(top)
    unit[unit == 0] = 1
    return np.rint(factor / unit[:, None]), unit


def right_factor(columns: Floats, row_weights: Floats, rank: int) -> Floats:
    """Right factor of the best approximation of ``|A|`` in the weighted square norm.

    Subspace iteration from a fixed start, so that equal input gives equal output.

    Parameters
    ----------
    columns : float32 (n, m)
        A, transposed.
    row_weights : float32 (m,)
        What the square of an error in each row counts.
    rank : int

    Returns
    -------
    float32 (rank, n)
        Orthonormal rows, the strongest first; rows of zeros beyond min(m, n).
    """
    n, m = columns.shape
    count = min(rank + EXTRA, n, m)
    random = np.random.default_rng(0)
    basis = random.standard_normal((n, count))
    basis[:, 0] = 1.0
    for _ in range(ITERATIONS):
        total = np.zeros((n, count))
        for first in range(0, m, ROWS):
            part = slice(first, first + ROWS)
            magnitude = np.abs(columns[:, part])
            down = row_weights[part, None] * (magnitude.T @ basis.astype(np.float32))
            total += magnitude @ down
        basis, triangle = np.linalg.qr(total)
    order = np.argsort(-np.abs(triangle.diagonal()), kind="stable")[:rank]
    found = np.zeros((rank, n), np.float32)
    found[: len(order)] = basis[:, order].T
    # A singular vector may be turned round; the strongest one of magnitudes is positive.
    found *= np.where(found.sum(axis=1) < 0, -1, 1)[:, None]
    return found


def fit(columns: Floats, right: Floats, moment: Floats | None, sweeps: int) -> tuple[Bools, Floats]:
    """Signs and left factor of some rows for a right factor that is given.

    Parameters
    ----------
    columns : float32 (n, m)
        Rows to approximate, transposed.
    right : float32 (k, n)
    moment : float32 (n, n), or None
        What errors cost beyond their squares; without one, signs are those of the matrix.
    sweeps : int
        Of coordinate descent over all signs, each followed by a new left factor.

    Returns
    -------
    signs : bool (n, m)
        True where positive.
    left : float32 (m, k)
    """
    n, m = columns.shape
    signs, left = np.empty((n, m), np.bool_), np.empty((m, len(right)), np.float32)
    for first in range(0, m, ROWS):
        part = slice(first, first + ROWS)
        signs[:, part], left[part] = _fit(columns[:, part], right, moment, sweeps)
    return signs, left


def _fit(
    columns: Floats, right: Floats, moment: Floats | None, sweeps: int
) -> tuple[Bools, Floats]:
    """As `fit`, of a few rows."""
    signs = columns >= 0
    each = np.where(signs, right[:, :, None], -right[:, :, None])
    left = _left_factor(columns, each, each)
    if moment is not None and sweeps:
        goal = moment @ columns
        weighted = np.stack([moment @ one for one in each])
        for _ in range(sweeps):
            _descend(signs, left, each, weighted, goal, moment)
            left = _left_factor(columns, each, weighted)
    return signs, left


def _left_factor(columns: Floats, each: Floats, weighted: Floats) -> Floats:
    """Left factor (m, k) of least weighted error for given signs: k normal equations for each row.

    `each` are the planes (k, n, m) that it is to weigh, `weighted` their products with the moment.
    """
    k, _, m = each.shape
    normal, target = np.empty((m, k, k)), np.empty((m, k))
    for a in range(k):
        target[:, a] = np.einsum("jm,jm->m", weighted[a], columns)
        for b in range(a + 1):
            normal[:, a, b] = normal[:, b, a] = np.einsum("jm,jm->m", weighted[a], each[b])
    damping = 1e-6 * np.trace(normal, axis1=1, axis2=2) + 1e-30
    normal[:, np.arange(k), np.arange(k)] += damping[:, None]
    return np.linalg.solve(normal, target[:, :, None])[:, :, 0].astype(np.float32)


def _descend(
    signs: Bools, left: Floats, each: Floats, weighted: Floats, goal: Floats, moment: Floats
) -> None:
    """Turn every sign whose turning lessens the harm, column after column, in place.

    Products with the moment are kept up to date, so that a sweep costs one of them.
    """
    n, m = signs.shape
    gradient = goal.copy()
    for k, product in enumerate(weighted):
        gradient -= left[:, k] * product
    for first in range(0, n, BLOCK):
        last = min(first + BLOCK, n)
        turned = np.empty((last - first, m), np.bool_)
        for j in range(first, last):
            change = 2 * np.einsum("mk,km->m", left, each[:, j])
            turned[j - first] = change * (2 * gradient[j] + change * moment[j, j]) < 0
            change *= turned[j - first]
            gradient[j + 1 : last] += moment[j + 1 : last, j, None] * change
        signs[first:last] ^= turned
        each[:, first:last] *= np.where(turned, np.float32(-1), np.float32(1))
        for k, one in enumerate(each):
            more = moment[:, first:last] @ (2 * one[first:last] * turned)
            weighted[k] += more
            gradient[last:] -= left[:, k] * more[last:]


def plane(left: Floats, right: Floats, packed: Array) -> Floats:
    """Signs times magnitudes: ``left @ right``, its products added in order, the same bits everywhere.

    Parameters
    ----------
    left : float32 (m, k)
    right : float32 (k, n)
    packed : uint8 (m, ceil(n / 8))
        A bit for each weight, the lowest first; 1 is positive.

    Raises
    ------
    FormatError
        Where a bit beyond column n is set.
    """
    n = right.shape[1]
    signs = np.unpackbits(packed, axis=1, bitorder="little")
    if signs[:, n:].any():
        raise FormatError("bits that are not zero after the signs of a row")
    magnitude = np.zeros((len(left), n), np.float32)
    for k in range(len(right)):
        magnitude += left[:, k, None] * right[k]
    return np.where(signs[:, :n], magnitude, -magnitude)
