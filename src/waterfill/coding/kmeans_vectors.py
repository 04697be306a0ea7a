"""Weighted k-means over short vectors: codebooks, and the nearest centroid."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from waterfill.types import Floats

__all__ = ["assign", "kmeans"]

Indices = NDArray[np.int64]
PER_CENTROID = 64  # vectors that train each: more changes little
PASSES = 12
CHUNK = 1 << 21  # distances held at a time


def assign(vectors: Floats, centroids: Floats) -> Indices:
    """Index of the nearest centroid (K, d) of each vector (count, d): int64 (count,)."""
    # |v - c|^2 but for |v|^2, which all centroids share.
    half = 0.5 * np.einsum("ij,ij->i", centroids, centroids)
    turned = np.ascontiguousarray(centroids.T)
    out = np.empty(len(vectors), np.int64)
    step = max(1, CHUNK // len(centroids))
    for first in range(0, len(vectors), step):
        near = vectors[first : first + step] @ turned
        near -= half
        out[first : first + step] = near.argmax(axis=1)
    return out


def kmeans(vectors: Floats, weights: Floats, size: int, seed: int = 0) -> Floats:
    """Centroids of least weighted squared error: Lloyd's passes from a k-means++ start.

    Parameters
    ----------
    vectors : float32 (count, d)
        A sample of them is used where there are very many.
    weights : float32 (count,)
        What an error of each costs; not negative.
    size : number of centroids K
    seed : of the sample and of the start

    Returns
    -------
    float32 (size, d), shortest first. Fewer vectors than centroids leave some at zero.
    """
    random = np.random.default_rng(seed)
    many = PER_CENTROID * max(size, 64)
    if len(vectors) > many:
        chosen = np.sort(random.choice(len(vectors), many, replace=False))
        vectors, weights = vectors[chosen], weights[chosen]
    centroids = _start(vectors, weights, size, random)
    for _ in range(PASSES):
        nearest = assign(vectors, centroids)
        mass = np.bincount(nearest, weights, size)
        for k in range(vectors.shape[1]):
            total = np.bincount(nearest, weights * vectors[:, k], size)
            centroids[:, k] = total / np.where(mass > 0, mass, 1)
        _revive(centroids, mass, vectors, weights, nearest)
    order = np.argsort(np.einsum("ij,ij->i", centroids, centroids), kind="stable")
    return centroids[order]


def _start(vectors: Floats, weights: Floats, size: int, random: np.random.Generator) -> Floats:
    """k-means++ (Arthur and Vassilvitskii 2007) on a few vectors for each centroid."""
    if len(vectors) > 8 * size:
        chosen = random.choice(len(vectors), 8 * size, replace=False)
        vectors, weights = vectors[chosen], weights[chosen]
    centroids = np.zeros((size, vectors.shape[1]), np.float32)
    far = np.einsum("ij,ij->i", vectors, vectors)
    for k in range(min(size, len(vectors))):
        chance = np.cumsum(far * weights, dtype=np.float64)
        if chance[-1] <= 0:
            break
        at = min(int(np.searchsorted(chance, random.random() * chance[-1])), len(vectors) - 1)
        centroids[k] = vectors[at]
        gap = vectors - centroids[k]
        far = np.minimum(far, np.einsum("ij,ij->i", gap, gap))
    return centroids


def _revive(
    centroids: Floats, mass: Floats, vectors: Floats, weights: Floats, nearest: Indices
) -> None:
    """Send centroids that nothing is near to where the error is largest."""
    lost = np.flatnonzero(mass <= 0)
    if lost.size:
        gap = vectors - centroids[nearest]
        worst = np.argsort(-weights * np.einsum("ij,ij->i", gap, gap), kind="stable")[: lost.size]
        centroids[lost[: worst.size]] = vectors[worst]
