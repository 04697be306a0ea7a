"""k-means over vectors: what it finds, what weights do, and the coding of indices."""

from __future__ import annotations

import numpy as np
import pytest

from waterfill.coding.kmeans_vectors import assign, decode_indices, encode_indices, kmeans
from waterfill.types import FormatError


def _error(vectors: np.ndarray, centroids: np.ndarray, weights: np.ndarray) -> float:
    gaps = vectors - centroids[assign(vectors, centroids)]
    return float(weights @ np.square(gaps).sum(axis=1))


def test_clusters_that_are_there_are_found() -> None:
    random = np.random.default_rng(0)
    centres = random.normal(0, 10, (20, 3)).astype(np.float32)
    vectors = centres[random.integers(0, 20, 3000)] + random.normal(0, 0.1, (3000, 3))
    found, _ = kmeans(vectors.astype(np.float32), np.ones(3000, np.float32), 20)
    assert np.abs(found[assign(centres, found)] - centres).max() < 0.1
    assert (np.diff(np.square(found).sum(axis=1)) >= 0).all()


def test_scalar_codebooks_of_a_gaussian_are_near_the_best_there_are() -> None:
    values = np.random.default_rng(1).normal(size=(20000, 1)).astype(np.float32)
    weights = np.ones(20000, np.float32)
    # Lloyd-Max for eight levels (Max 1960).
    error = _error(values, kmeans(values, weights, 8)[0], weights) / 20000
    assert error == pytest.approx(0.03454, rel=0.05)


def test_weights_draw_centroids_to_them() -> None:
    random = np.random.default_rng(2)
    vectors = random.normal(size=(5000, 2)).astype(np.float32)
    weights = np.where(vectors[:, 0] > 1, 100, 1).astype(np.float32)
    plain, drawn = (kmeans(vectors, w, 32)[0] for w in (np.ones(5000, np.float32), weights))
    assert _error(vectors, drawn, weights) < 0.5 * _error(vectors, plain, weights)


def test_more_centroids_than_vectors_and_none_to_learn_from() -> None:
    vectors = np.array([[1, 2], [3, 4], [1, 2]], np.float32)
    centroids, _ = kmeans(vectors, np.ones(3, np.float32), 8)
    assert np.array_equal(centroids[assign(vectors, centroids)], vectors)
    assert not kmeans(np.zeros((9, 2), np.float32), np.ones(9, np.float32), 4)[0].any()
    assert np.isfinite(kmeans(vectors, np.zeros(3, np.float32), 2)[0]).all()


def test_a_price_on_bits_buys_more_per_bit() -> None:
    """Entropy-coded, at equal error plus price times bits: what the training minimises."""
    values = np.random.default_rng(3).normal(size=(30000, 1)).astype(np.float32)
    weights = np.ones(30000, np.float32)
    plain, _ = kmeans(values, weights, 8)
    priced, bits = kmeans(values, weights, 24, price=0.06)
    figures = []
    for book, handicaps in ((plain, None), (priced, 0.06 * bits)):
        index = assign(values, book, handicaps)
        share = np.bincount(index) / len(index)
        share = share[share > 0]
        rate = -float(share @ np.log2(share))
        error = float(np.square(values - book[index]).mean())
        figures.append(rate + 0.5 * np.log2(error))  # bits from Shannon's bound
    assert len(priced) <= 24 and figures[1] < figures[0] - 0.05
    assert (
        figures[1] < 0.27
    )  # entropy-coded scalar quantisation: at most 0.254, and a finite sample


@pytest.mark.parametrize("size", [1, 2, 3, 255, 256, 257, 1000, 4096])
def test_indices_there_and_back(size: int) -> None:
    index = np.random.default_rng(size).integers(0, size, (37, 11))
    index[0, 0] = size - 1
    data = encode_indices(index, size)
    assert np.array_equal(decode_indices(data, (37, 11), size), index)
    assert len(data) <= 37 * 11 * np.log2(size) / 8 + 40 + min(size, 256)


@pytest.mark.parametrize("size", [3, 300, 4096])
def test_indices_that_lie_are_refused(size: int) -> None:
    index = np.full((8, 8), size - 1)
    data = encode_indices(index, size)
    with pytest.raises(FormatError):
        decode_indices(data, (8, 8), size - 1 if size < 4096 else 2049)
    with pytest.raises(FormatError):
        decode_indices(data, (8, 9), size - 2)
    with pytest.raises(FormatError):
        decode_indices(b"\0", (1, 1), 1)
