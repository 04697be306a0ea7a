"""Codebooks of short vectors: weighted k-means, the nearest centroid, and coded indices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from waterfill.coding.entropy import decode_ints, encode_ints
from waterfill.coding.packing import pack, unpack
from waterfill.types import Array, Floats, FormatError

__all__ = ["MAX_SIZE", "assign", "decode_indices", "encode_indices", "kmeans"]

MAX_SIZE = 4096

Indices = NDArray[np.int64]
PER_CENTROID = 24  # vectors that train each: more changes little
FEWEST = 1 << 14
WORK = 1 << 28  # distances computed in all, about: small codebooks can afford more passes
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
    many = max(PER_CENTROID * size, FEWEST)
    if len(vectors) > many:
        chosen = np.sort(random.choice(len(vectors), many, replace=False))
        vectors, weights = vectors[chosen], weights[chosen]
    centroids = _start(vectors, weights, size, random)
    for _ in range(min(40, max(6, WORK // (size * len(vectors) + 1)))):
        nearest = assign(vectors, centroids)
        mass = np.bincount(nearest, weights, size)
        for k in range(vectors.shape[1]):
            total = np.bincount(nearest, weights * vectors[:, k], size)
            centroids[:, k] = total / np.where(mass > 0, mass, 1)
        _revive(centroids, mass, vectors, weights, nearest)
    order = np.argsort(np.einsum("ij,ij->i", centroids, centroids), kind="stable")
    return centroids[order]


def _start(vectors: Floats, weights: Floats, size: int, random: np.random.Generator) -> Floats:
    """k-means++ (Arthur and Vassilvitskii 2007) on four vectors for each centroid."""
    if len(vectors) > 4 * size:
        chosen = random.choice(len(vectors), 4 * size, replace=False)
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
    centroids: Floats, mass: Array, vectors: Floats, weights: Floats, nearest: Indices
) -> None:
    """Send centroids that nothing is near to where the error is largest."""
    lost = np.flatnonzero(mass <= 0)
    if lost.size:
        gap = vectors - centroids[nearest]
        worst = np.argsort(-weights * np.einsum("ij,ij->i", gap, gap), kind="stable")[: lost.size]
        centroids[lost[: worst.size]] = vectors[worst]


def encode_indices(index: Array, size: int) -> bytes:
    """Indices (rows, cols) below `size`, at most 2**16: eight bits modelled, the lower ones as they are.

    Nothing where there is no choice.
    """
    if size <= 1:
        return b""
    width = _plain_bits(size)
    high = encode_ints((index >> width).astype(np.int32), classes=None)
    if not width:
        return high
    return high + pack((index & ((1 << width) - 1)).astype(np.uint8), width)


def decode_indices(
    data: bytes | memoryview, shape: tuple[int, int], size: int
) -> NDArray[np.int32]:
    """Inverse of `encode_indices`: int32 of `shape`; FormatError on bytes that lie."""
    if size <= 1:
        if len(data):
            raise FormatError("indices where there is no choice")
        return np.zeros(shape, np.int32)
    width = _plain_bits(size)
    at = len(data) - -(-shape[0] * shape[1] * width // 8)
    if at < 0:
        raise FormatError("indices are cut short")
    index = decode_ints(data[:at], *shape)
    if index.min() < 0 or index.max() > (size - 1) >> width:
        raise FormatError(f"an index beyond a codebook of {size}")
    if width:
        low = unpack(bytes(data[at:]), index.size, width).reshape(shape)
        index = index << width | low
        if index.max() >= size:
            raise FormatError(f"an index beyond a codebook of {size}")
    return index


def _plain_bits(size: int) -> int:
    """Lower bits that are not modelled."""
    return max(0, (size - 1).bit_length() - 8)
