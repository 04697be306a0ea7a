"""Low-rank matrices as two factors of small integers: what an error has in few directions.

The best matrix C of rank r for ``tr(D (E - C) S (E - C)^T)``, with D the weights of the rows and S the
second moment of the inputs, is ``D^-1/2 U U^T D^1/2 E`` where U are the r leading eigenvectors of
``D^1/2 E S E^T D^1/2`` (Eckart & Young 1936 in the metric of S). No root of S is taken, and none inverted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from waterfill.types import Array, Floats, Weighting

ROUNDS = 6  # of subspace iteration: more gain less than a per mille
SPARE = 8  # directions more than wanted are followed
BLOCK = 1 << 16  # numbers added to at a time: they stay in a near cache


@dataclass(frozen=True, eq=False)
class Factors:
    """``sum_k (left[i, k] * scale[k]) * right[k, j]``, in float32 and in that order.

    Attributes
    ----------
    left : int8 (m, rank)
    right : int8 (rank, n)
    scale : float32 (rank,)
    """

    left: Array
    right: Array
    scale: Floats

    def add_to(self, matrix: Floats) -> None:
        """Add to float32 (m, n) in place, the same bits on every machine."""
        right = self.right.astype(np.float32)
        step = max(1, BLOCK // max(matrix.shape[1], 1))
        term = np.empty((min(step, len(matrix)), matrix.shape[1]), np.float32)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            for first in range(0, len(matrix), step):
                rows = slice(first, first + step)
                left = self.left[rows].astype(np.float32) * self.scale
                for k in range(len(right)):
                    matrix[rows] += np.multiply(left[:, k, None], right[k], out=term[: len(left)])


def leading(error: Floats, moment: Floats | None, roots: Floats, rank: int) -> Floats:
    """Leading eigenvectors of ``R E S E^T R`` by subspace iteration (Halko et al. 2011).

    Parameters
    ----------
    error : float32 (m, n)
    moment : float32 (n, n), (n,) or None
        S; the identity where it is None.
    roots : float32 (m,)
        Diagonal of R.
    rank : int
        At most min(m, n).

    Returns
    -------
    float32 (m, rank)
        Orthonormal columns, those of the largest eigenvalues first.
    """
    m = len(error)
    width = min(rank + max(SPARE, rank), m)
    basis: Floats = np.random.default_rng(0).standard_normal((m, width), np.float32)
    weighted: Floats = error * roots[:, None]
    for _ in range(ROUNDS):
        basis = np.linalg.qr(basis)[0]
        basis = weighted @ times(weighted.T @ basis, moment)
    basis = np.linalg.qr(basis)[0]
    inner = weighted.T @ basis
    values, vectors = np.linalg.eigh((inner.T @ times(inner, moment)).astype(np.float64))
    order = np.argsort(-values, kind="stable")[:rank]
    found: Floats = basis @ vectors[:, order].astype(np.float32)
    return found


def times(columns: Floats, moment: Floats | None) -> Floats:
    """``S @ columns`` for a moment of any form."""
    if moment is None:
        return columns
    product: Floats = moment @ columns if moment.ndim == 2 else moment[:, None] * columns
    return product


def fit(error: Floats, weighting: Weighting, rank: int, bits: int) -> Factors:
    """Factors near an error in the metric of a weighting.

    The right factor is rounded first; the left is then the best for what it was rounded to.

    Parameters
    ----------
    error : float32 (m, n)
    weighting : Weighting
    rank : int
        At most min(m, n).
    bits : int
        2 to 8, of each integer.
    """
    m = len(error)
    roots = np.sqrt(np.broadcast_to(np.asarray(weighting.row_weights, np.float32), (m,)))
    # A row that no token ever asked for keeps a floor, for it is divided by its weight.
    roots = np.maximum(roots, 1e-3 * (float(roots.sum()) / max(m, 1) or 1.0)).astype(np.float32)
    peak = np.abs(error).max(initial=0) or np.float32(1)
    error = error / peak  # squares of huge weights would leave float32
    basis = leading(error, weighting.second_moment, roots, rank)
    right, right_scale = _rounded((basis * roots[:, None]).T @ error, bits)
    there = right.astype(np.float32) * right_scale[:, None]
    seen = times(there.T, weighting.second_moment)
    gram = (there @ seen).astype(np.float64)
    ridge = 1e-6 * (np.trace(gram) / max(rank, 1) or 1.0)
    best = np.linalg.solve(gram + ridge * np.eye(rank), (error @ seen).T.astype(np.float64))
    left, left_scale = _rounded(best.astype(np.float32), bits)
    with np.errstate(over="ignore"):
        return Factors(np.ascontiguousarray(left.T), right, left_scale * right_scale * peak)


def _rounded(rows: Floats, bits: int) -> tuple[Array, Floats]:
    """Integers (int8) and a scale for each row."""
    top = (1 << (bits - 1)) - 1
    scale = np.abs(rows).max(axis=1, initial=0) / np.float32(top)
    safe = np.where(scale > 0, scale, 1)
    return np.clip(np.rint(rows / safe[:, None]), -top, top).astype(np.int8), scale
