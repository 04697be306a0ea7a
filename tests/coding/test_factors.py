"""Low-rank factors: the optimum where it is known, and one result everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from waterfill.coding.factors import Factors, fit, leading, times
from waterfill.types import Weighting


def layer(m: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    error = random.standard_normal((m, n)).astype(np.float32)
    inputs = random.standard_normal((3 * n, n)) * np.exp(random.uniform(-2, 2, n))
    moment = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    return error, moment, random.lognormal(0, 1, m).astype(np.float32)


def least(error: np.ndarray, moment: np.ndarray, rows: np.ndarray, rank: int) -> float:
    """Harm that the best matrix of a rank leaves, by the singular values (Eckart & Young)."""
    root = np.linalg.cholesky(moment.astype(np.float64))
    values = np.linalg.svd(np.sqrt(rows)[:, None] * error @ root, compute_uv=False)
    return float(0.5 * np.square(values[rank:]).sum())


def left_over(error: np.ndarray, weighting: Weighting, factors: Factors) -> float:
    added = np.zeros_like(error)
    factors.add_to(added)
    return weighting.distortion(error, added)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (200, 30)])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_the_harm_left_is_the_least_of_any_matrix_of_the_rank(
    shape: tuple[int, int], rank: int
) -> None:
    error, moment, rows = layer(*shape)
    best = least(error, moment, rows, rank)
    harm = left_over(error, Weighting(moment, rows), fit(error, Weighting(moment, rows), rank, 8))
    assert best * (1 - 1e-4) <= harm <= best * 1.03


def test_a_metric_that_knows_more_of_the_harm_does_better() -> None:
    error, moment, rows = layer(80, 50)
    full = Weighting(moment, rows)
    metrics = (full, Weighting(moment), Weighting())
    harms = [left_over(error, full, fit(error, metric, 4, 8)) for metric in metrics]
    assert harms[0] < 0.99 * harms[1] < 0.97 * harms[2]


def test_a_diagonal_is_the_matrix_it_stands_for() -> None:
    error, moment, rows = layer(30, 20)
    diagonal = moment.diagonal().copy()
    thin = fit(error, Weighting(diagonal, rows), 3, 8)
    full = fit(error, Weighting(np.diag(diagonal), rows), 3, 8)
    assert np.allclose(
        left_over(error, Weighting(), thin), left_over(error, Weighting(), full), rtol=1e-3
    )
    assert np.array_equal(times(error.T, None), error.T)


def test_leading_directions_are_orthonormal_and_in_order() -> None:
    error, moment, rows = layer(50, 30)
    basis = leading(error, moment, np.sqrt(rows), 6)
    assert np.allclose(basis.T @ basis, np.eye(6), atol=1e-5)
    inner = (np.sqrt(rows)[:, None] * error).T @ basis
    energy = np.einsum("ij,ij->j", inner, moment @ inner)
    assert (np.diff(energy) <= 1e-4 * energy[0]).all()


def test_sums_are_taken_in_the_order_that_the_page_gives() -> None:
    random = np.random.default_rng(2)
    left = random.integers(-127, 128, (70, 9)).astype(np.int8)
    right = random.integers(-127, 128, (9, 3000)).astype(np.int8)
    scale = np.exp(random.uniform(-9, 9, 9)).astype(np.float32)
    matrix = random.standard_normal((70, 3000)).astype(np.float32)
    want = matrix.copy()
    for k in range(9):
        term = np.float32(left[:, k, None].astype(np.float32) * scale[k]) * right[k].astype(
            np.float32
        )
        want = want + term
    Factors(left, right, scale).add_to(matrix)
    assert matrix.tobytes() == want.tobytes()


@pytest.mark.parametrize("weights", [0.0, 1.0])
def test_nothing_to_correct_is_corrected_by_nothing(weights: float) -> None:
    factors = fit(np.zeros((6, 5), np.float32), Weighting(None, weights), 2, 8)
    assert not factors.left.any() and np.isfinite(factors.scale).all()


@pytest.mark.parametrize("peak", [1e-30, 1e30])
def test_errors_of_any_size_are_corrected(peak: float) -> None:
    error, moment, rows = layer(24, 16)
    scaled = (error * np.float32(peak)).astype(np.float32)
    added = np.zeros_like(scaled)
    fit(scaled, Weighting(moment, rows), 4, 8).add_to(added)
    left = Weighting(moment, rows).distortion(error, added / np.float32(peak))
    assert left < 1.01 * least(error, moment, rows, 4)
