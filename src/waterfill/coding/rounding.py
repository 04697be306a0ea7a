"""Successive rounding: columns one after another, each absorbing the errors of those before.

With S = L L^T the harm of an error e is ``||e L||^2`` per row. Going through the columns last to
first, the target ``t_j = w_j + sum_{k>j} e_k L_kj / L_jj`` turns that into
``sum_j L_jj^2 (t_j - q_j)^2``: columns become independent, each rounded on its own. This is GPTQ
(Frantar et al. 2022), LDLQ (Chee et al. 2023) and successive interference cancellation.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from waterfill.types import Floats, WaterfillError

Indices = NDArray[np.int32]
BLOCK = 128  # rows or columns factored at a time


def factor(moment: Floats, damping: float) -> Floats:
    """Lower Cholesky factor of a damped second moment.

    Parameters
    ----------
    moment : float32 (n, n), or (n,) where it is diagonal
    damping : float
        Added to the diagonal, relative to its mean; raised tenfold until the factorisation
        succeeds, so a dead input or a rank-deficient sample never ends in NaN.

    Returns
    -------
    float32 (n, n) lower triangular, or (n,)
    """
    if moment.ndim == 1:
        level = float(np.mean(moment, dtype=np.float64)) or 1.0
        return np.sqrt(np.maximum(moment, 0) + damping * level).astype(np.float32)
    level = float(np.trace(moment, dtype=np.float64)) / max(len(moment), 1) or 1.0
    while damping < 1e6:
        lower = moment.copy()
        lower.flat[:: len(lower) + 1] += np.float32(damping * level)
        try:
            _factorise(lower)
        except np.linalg.LinAlgError:
            pass  # raised damping below is the answer
        else:
            if np.isfinite(lower).all() and lower.diagonal().min(initial=1) > 0:
                return lower
        damping = max(damping * 10, 1e-8)
    raise WaterfillError("the second moment of a layer's inputs is not finite; calibrate again")


def _factorise(a: Floats) -> None:
    """Lower Cholesky factor in place: numpy's own takes three matrices more, in float64.

    Panels are computed in float64 and kept as float32: an error as small as the moment's own.
    """
    n = len(a)
    for i in range(0, n, BLOCK):
        j = min(i + BLOCK, n)
        panel = a[i:, i:j].astype(np.float64)
        done = a[i:j, :i].T.astype(np.float64)
        for k in range(0, n - i, BLOCK):
            panel[k : k + BLOCK] -= a[i + k : i + k + BLOCK, :i] @ done
        corner = np.linalg.cholesky(panel[: j - i])
        a[i:j, i:j] = corner
        a[j:, i:j] = panel[j - i :] @ np.linalg.inv(corner).T
        a[i:j, j:] = 0


def solve(lower: Floats, b: Floats) -> None:
    """Solve ``L L^T x = b`` for float32 (n, k) in place: numpy's own takes three copies."""
    n = len(lower)
    blocks = [(i, min(i + BLOCK, n)) for i in range(0, n, BLOCK)]
    # Small inverses, and products with them: many times as fast as solving for many columns.
    inverses = [
        np.linalg.inv(lower[i:j, i:j].astype(np.float64)).astype(b.dtype) for i, j in blocks
    ]
    for (i, j), inverse in zip(blocks, inverses, strict=True):
        b[i:j] = inverse @ (b[i:j] - lower[i:j, :i] @ b[:i])
    for (i, j), inverse in zip(reversed(blocks), reversed(inverses), strict=True):
        b[i:j] = inverse.T @ (b[i:j] - lower[j:, i:j].T @ b[j:])


def mean_square(matrix: Floats) -> float:
    """Mean square, summed in float64 without a copy of that width."""
    total = np.einsum("ij,ij->", matrix, matrix, dtype=np.float64)
    return float(total) / max(matrix.size, 1)


def finite(matrix: Floats, name: str) -> Floats:
    """The matrix itself; WaterfillError if a weight is NaN or infinite."""
    if not np.isfinite(matrix).all():
        raise WaterfillError(
            f"{name} holds weights that are NaN, infinite or beyond float32 and cannot be rounded; "
            "mend the checkpoint or --keep it"
        )
    return matrix


def successive(
    weight: Floats,
    lower: Floats,
    round_block: Callable[[int, int, Floats, Floats, Floats], Floats],
    block: int = 128,
) -> None:
    """Drive `round_block` over blocks of columns, last to first, with lazy matrix updates.

    Parameters
    ----------
    weight : float32 (n, m), one row per input column.
    lower : float32 (n, n) from `factor`, or (n,) for a diagonal second moment.
    round_block : called with (first, last, weight rows, target rows, carry within the block);
        returns the error ``weight - reconstruction`` (last - first, m) of its columns.
    block : columns to a block; blocks start at multiples of it.
    """
    n, m = weight.shape
    independent = lower.ndim == 1
    error = np.zeros((0 if independent else n, m), np.float32)
    for first in reversed(range(0, n, block)):
        last = min(n, first + block)
        rows = weight[first:last]
        if independent:
            round_block(first, last, rows, rows.copy(), np.zeros((last - first,) * 2, np.float32))
            continue
        inverse = 1.0 / lower.diagonal()[first:last]
        target = rows + (lower[last:, first:last] * inverse).T @ error[last:]
        carry = np.ascontiguousarray(lower[first:last, first:last] * inverse)
        error[first:last] = round_block(first, last, rows, np.ascontiguousarray(target), carry)
