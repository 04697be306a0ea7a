"""Bases of least harm."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from waterfill.coding.components import ALIKE, RIDGE, basis_of

F64 = NDArray[np.float64]


def moments(seed: int, spread: float) -> F64:
    """Symmetric matrices (2, 16, 16) whose axes differ by so many nepers, turned at random."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(2, 16, 16)))[0]
    return (turn * np.exp(-spread * np.arange(16) / 15)) @ turn.swapaxes(1, 2)


def test_components_are_uncorrelated_and_cost_what_their_squares_add_up_to() -> None:
    covariance, harm = moments(0, 3), moments(1, 2)
    basis = basis_of(covariance, harm)
    seen = basis.analysis.swapaxes(1, 2) @ covariance @ basis.analysis
    np.testing.assert_allclose(seen, basis.variances[:, :, None] * np.eye(16), atol=1e-9)
    cost = basis.synthesis @ harm @ basis.synthesis.swapaxes(1, 2)
    np.testing.assert_allclose(cost, np.broadcast_to(np.eye(16), cost.shape), atol=10 * RIDGE)


def test_rows_stay_apart_where_vectors_vary_most_in_what_nothing_reads() -> None:
    harm = np.broadcast_to(np.diag([0.0] + [1.0] * 15), (2, 16, 16))
    large = np.diag([1e2] + [1.0] * 15)
    rows = basis_of(large @ moments(2, 3) @ large, harm).synthesis
    whole = np.rint(127 * rows / np.abs(rows).max(2, keepdims=True))
    assert np.linalg.cond(rows / np.linalg.norm(rows, axis=2, keepdims=True)).max() < ALIKE
    assert np.linalg.cond(whole).max() < 2 * ALIKE
