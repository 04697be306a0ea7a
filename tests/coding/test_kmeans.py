"""Levels of least error, against trying every choice of borders."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from waterfill.coding import kmeans


def error(x: np.ndarray, weights: np.ndarray, levels: np.ndarray) -> float:
    return float(weights @ np.square(x[:, None] - levels).min(axis=1))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_no_choice_of_borders_is_better(seed: int, k: int) -> None:
    random = np.random.default_rng(seed)
    x = np.sort(random.standard_t(2, 12))
    weights = random.lognormal(size=12)
    found = kmeans.best_levels(kmeans.histogram(x[None], weights[None], 4096), k)[0]
    best = np.inf
    for borders in itertools.combinations(range(1, 12), k - 1):
        parts = [slice(a, b) for a, b in itertools.pairwise((0, *borders, 12))]
        means = np.array([np.average(x[p], weights=weights[p]) for p in parts])
        best = min(best, error(x, weights, means))
    assert error(x, weights, found) == pytest.approx(best, rel=1e-5)
    assert (np.diff(found) >= 0).all()


def test_rows_are_worked_through_alone_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    x, weights = random.normal(size=(20, 50)), random.random((20, 50))
    whole = kmeans.best_levels(kmeans.histogram(x, weights, 64, by_row=True), 5)
    for row in (0, 19):
        alone = kmeans.histogram(x[row : row + 1], weights[row : row + 1], 64)
        assert np.array_equal(kmeans.best_levels(alone, 5)[0], whole[row])
    monkeypatch.setattr(kmeans, "CHUNK", 200)
    assert np.array_equal(kmeans.best_levels(kmeans.histogram(x, weights, 64, True), 5), whole)


def test_few_numbers_none_or_no_weight() -> None:
    two = kmeans.histogram(np.array([[3.0, -1.0, 3.0]]), 1.0, 64)
    assert sorted({round(float(v), 5) for v in kmeans.best_levels(two, 4)[0]}) == [-1, 3]
    for x, weight in ((np.zeros((1, 0)), 1.0), (np.ones((1, 4)), 0.0)):
        assert kmeans.best_levels(kmeans.histogram(x, weight, 64), 3).tolist() == [[0, 0, 0]]


def test_weights_draw_levels_to_them_and_outliers_are_within_the_bins() -> None:
    columns = np.random.default_rng(1).normal(size=(64, 40)).astype(np.float32)
    columns[0, 0] = 1e6
    weights = np.ones((64, 1), np.float32)
    weights[1:9] = 100
    scales = kmeans.rms(columns, 16)
    assert scales.shape == (4, 40) and scales[1, 3] == pytest.approx(
        np.sqrt(np.mean(columns[16:32, 3] ** 2)), rel=1e-5
    )
    heavy, plain = (
        kmeans.row_levels(columns, w, 4) for w in (weights, np.ones((64, 1), np.float32))
    )
    assert heavy.shape == (4, 40) and plain[-1, 0] == pytest.approx(1e6, rel=1e-3)
    errors = [
        sum(error(columns[1:9, i], np.ones(8), t[:, i]) for i in range(1, 40))
        for t in (heavy, plain)
    ]
    assert errors[0] < 0.6 * errors[1]


def test_levels_that_all_share_are_found_again() -> None:
    random = np.random.default_rng(2)
    table = np.array([-1.5, -0.2, 0.4, 2], np.float32)
    scales = random.uniform(0.5, 2, (3, 10)).astype(np.float32)
    columns = table[random.integers(0, 4, (24, 10))] * np.repeat(scales, 8, axis=0)
    assert np.allclose(kmeans.scaled_levels(columns, 1.0, scales, 8, 4), table, atol=1e-5)
