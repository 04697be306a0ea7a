"""The basis in which a stream of vectors is coded, and how finely each component.

Vectors have covariance C, and an error e costs ``e' W e`` nats. With ``W = L L'`` and ``L' C L = U D U'``
the components ``U' L' x`` are uncorrelated, their variances D are in nats, and errors in them cost what
their squares add up to. One water level then serves all components of all streams (reverse
water-filling: Shannon 1959; Berger 1971).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from waterfill.types import Floats

__all__ = ["Basis", "basis_of", "components_kept"]

F64 = NDArray[np.float64]
RIDGE = 1e-4  # of the mean harm: no direction is free
ALIKE = 100.0  # condition of a basis: beyond, its rows in small integers may be none any more
SURE = 0.9  # part of it below which no rounding matters


@dataclass(frozen=True, eq=False)
class Basis:
    """Of each head.

    Attributes
    ----------
    analysis : float64 (heads, width, width), vectors times it are components, largest variance first
    synthesis : float64 (heads, width, width), its inverse
    variances : float64 (heads, width), nats
    """

    analysis: F64
    synthesis: F64
    variances: F64


def basis_of(covariance: Floats, harm: Floats) -> Basis:
    """The basis of vectors with this covariance under this harm, or one a little rounder.

    Parameters
    ----------
    covariance, harm : (heads, width, width), symmetric and not negative
    """
    harm = harm.astype(np.float64)
    eye = np.eye(harm.shape[1])
    mean = np.trace(harm, axis1=1, axis2=2)[:, None, None] / len(eye)
    ridge = RIDGE
    while True:
        basis = _basis(covariance.astype(np.float64), harm + (ridge * mean + 1e-30) * eye)
        if _round(basis):
            return basis
        # Where every direction costs the same, rows are at right angles.
        ridge *= 10


def _basis(covariance: F64, harm: F64) -> Basis:
    lower = np.linalg.cholesky(harm)
    variances, turn = np.linalg.eigh(lower.swapaxes(1, 2) @ covariance @ lower)
    variances, turn = np.maximum(variances[:, ::-1], 0.0), turn[:, :, ::-1]
    analysis = lower @ turn
    return Basis(analysis, np.linalg.inv(analysis), variances)


def _round(basis: Basis) -> bool:
    """Whether the worst head's condition is low enough, were all rows of the same length."""
    lengths = np.linalg.norm(basis.synthesis, axis=2, keepdims=True)
    rows, inverse = basis.synthesis / lengths, basis.analysis * lengths.swapaxes(1, 2)
    # The condition is at most this, and far less work.
    most = _square(rows) * _square(inverse.swapaxes(1, 2))
    return bool(most.max() < (SURE * ALIKE) ** 2) or bool(np.linalg.cond(rows).max() < ALIKE)


def _square(rows: F64) -> F64:
    """Of each head, at least the square of the largest singular value: rows times themselves add up to it."""
    found: F64 = np.abs(rows @ rows.swapaxes(1, 2)).sum(axis=2).max(axis=1)
    return found


def components_kept(coded: NDArray[np.bool_]) -> int:
    """How many components to keep of every head, at least one, so that all coded ones (heads, width) are."""
    return max(1, int(np.flatnonzero(coded.sum(0)).max(initial=0)) + 1)
