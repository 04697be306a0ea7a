"""Successive rounding: columns one after another, each absorbing the errors of those before.

With S = L L^T the harm of an error e is ``||e L||^2`` per row. Going through the columns last to
first, the target ``t_j = w_j + sum_{k>j} e_k L_kj / L_jj`` turns that into
``sum_j L_jj^2 (t_j - q_j)^2``: columns become independent, each rounded on its own. This is GPTQ
(Frantar et al. 2022), LDLQ (Chee et al. 2023) and successive interference cancellation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from waterfill.types import Floats, WaterfillError, Weighting

Indices = NDArray[np.int32]


@functools.lru_cache(maxsize=1)
def factor(weighting: Weighting, damping: float) -> Floats:
    """Lower Cholesky factor of the damped second moment.

    Parameters
    ----------
    weighting : Weighting
        Cached by identity: the planner asks for the same layer at many rates.
    damping : float
        Added to the diagonal, relative to its mean; raised tenfold until the factorisation
        succeeds, so a dead input or a rank-deficient sample never ends in NaN.

    Returns
    -------
    float32 (n, n) lower triangular, or (n,) where the second moment is diagonal.
    """
    moment = weighting.second_moment
    assert moment is not None
    if moment.ndim == 1:
        level = float(np.mean(moment, dtype=np.float64)) or 1.0
        return np.sqrt(np.maximum(moment, 0) + damping * level).astype(np.float32)
    level = float(np.trace(moment, dtype=np.float64)) / max(len(moment), 1) or 1.0
    while damping < 1e6:
        damped = moment.astype(np.float64)
        np.einsum("ii->i", damped)[:] += damping * level
        try:
            _cholesky(damped)
        except np.linalg.LinAlgError:
            pass  # raised damping below is the answer
        else:
            lower = damped.astype(np.float32)
            if np.isfinite(lower).all() and lower.diagonal().min(initial=1) > 0:
                return lower
        damping = max(damping * 10, 1e-8)
    raise WaterfillError("the second moment of a layer's inputs is not finite; calibrate again")


def _cholesky(a: NDArray[np.float64], block: int = 512) -> None:
    """Lower Cholesky factor in place: numpy's own takes three matrices more, 8 n^2 bytes each."""
    n = len(a)
    for i in range(0, n, block):
        j = min(i + block, n)
        a[i:, i:j] -= a[i:, :i] @ a[i:j, :i].T
        a[i:j, i:j] = np.linalg.cholesky(a[i:j, i:j])
        a[j:, i:j] = np.linalg.solve(a[i:j, i:j], a[j:, i:j].T).T
        a[i:j, j:] = 0


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
