"""Minimum-mean-square-error targets under a prior that is fitted to the weights themselves.

Rounding adds noise; in directions where the noise would outweigh the weights it is better to aim
lower. With rows of covariance C and noise of c squared units, the target ``W S (S + c C^-1)^-1``
and the factor of ``S + c C^-1`` minimise the harm at equal rate (theory: docs/flagship.md).
"""

from __future__ import annotations

import numpy as np

from waterfill.coding.rounding import factor, mean_square, solve
from waterfill.types import Floats

__all__ = ["aim"]

MOST_COLUMNS = 8192  # a fitted prior takes two n x n matrices; beyond, the isotropic one


def aim(weight: Floats, moment: Floats, damping: float, noise: float) -> tuple[Floats, Floats]:
    """Factor to round with, and the target to round.

    Parameters
    ----------
    weight : float32 (m, n)
    moment : float32 (n, n), second moment of the inputs
    damping : added to the diagonal of `moment`, relative to its mean
    noise : variance that rounding adds to a column of weight one, times the mean square weight

    Returns
    -------
    lower : float32 (n, n), Cholesky factor
    target : float32 (m, n), its columns contiguous: that is how they are rounded
    """
    n = weight.shape[1]
    level = float(np.trace(moment, dtype=np.float64)) / n
    energy = mean_square(weight) or 1.0
    precision = _precision(weight, energy, noise)
    given_up = precision @ weight.T
    precision += moment
    precision.flat[:: n + 1] += np.float32(damping * level)
    lower = factor(precision, 0.0)
    solve(lower, given_up)
    return lower, np.subtract(weight.T, given_up, out=given_up).T


def _precision(weight: Floats, energy: float, noise: float) -> Floats:
    """Inverse of the covariance of the rows, times the noise."""
    n = weight.shape[1]
    if n > MOST_COLUMNS:
        return np.diag(np.full(n, noise / energy, np.float32))
    lower = factor(_covariance(weight, energy), 0.0)
    precision = np.diag(np.full(n, noise, np.float32))
    solve(lower, precision)
    return precision


def _covariance(weight: Floats, energy: float) -> Floats:
    """Covariance of the rows, shrunk towards an isotropic one: oracle approximating shrinkage.

    Source: Chen, Wiesel, Eldar and Hero 2010. From few rows, or from weights without structure,
    little but the mean is left.
    """
    m, n = weight.shape
    covariance: Floats = weight.T @ weight
    covariance *= np.float32(1 / m)
    squares = mean_square(covariance) * n * n
    trace = n * energy
    excess = squares - trace**2 / n
    wanted = (1 - 2 / n) * squares + trace**2
    share = 1.0 if n == 1 or excess <= 0 else min(1.0, wanted / ((m + 1 - 2 / n) * excess))
    covariance *= np.float32(1 - share)
    covariance.flat[:: n + 1] += np.float32(share * energy)
    return covariance
