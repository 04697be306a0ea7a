"""Codebooks of short vectors: weighted k-means, the nearest centroid, and coded indices."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from waterfill.coding.entropy import decode_ints, encode_ints
from waterfill.coding.packing import pack, unpack
from waterfill.types import Array, Floats, FormatError

__all__ = [
    "MAX_SIZE",
    "Book",
    "assign",
    "decode_indices",
    "encode_indices",
    "half",
    "kmeans",
    "train",
]

Buffer = bytes | memoryview

MAX_SIZE = 4096

Indices = NDArray[np.int64]
PER_CENTROID = 24  # vectors that train each: more changes little
FEWEST = 1 << 13
PASSES = (6, 32)
WORK = 1 << 25  # distances computed in all, about: small codebooks can afford more passes
CHUNK = 1 << 21  # distances held at a time
ENTRY_BITS = 16  # of a centroid, each of its coordinates


def assign(vectors: Floats, centroids: Floats, handicaps: Floats | None = None) -> Indices:
    """Index of the nearest centroid of each vector.

    Parameters
    ----------
    vectors : float32 (count, d)
    centroids : float32 (K, d)
    handicaps : (K,), added to the squared distances from each centroid

    Returns
    -------
    int64 (count,)
    """
    # |v - c|^2 but for |v|^2, which all centroids share.
    half = 0.5 * np.einsum("ij,ij->i", centroids, centroids)
    if handicaps is not None:
        half += 0.5 * handicaps
    turned = np.ascontiguousarray(centroids.T)
    out = np.empty(len(vectors), np.int64)
    step = max(1, CHUNK // len(centroids))
    for first in range(0, len(vectors), step):
        near = vectors[first : first + step] @ turned
        near -= half
        out[first : first + step] = near.argmax(axis=1)
    return out


def kmeans(
    vectors: Floats,
    weights: Floats,
    size: int,
    price: float = 0.0,
    start: Floats | None = None,
    seed: int = 0,
) -> tuple[Floats, Floats]:
    """Centroids of least weighted squared error, or of least error and bits together.

    Lloyd's passes; with a price they are those of entropy-constrained vector quantisation (Chou,
    Lookabaugh and Gray 1989), and a centroid pays for its own bytes too, so that rare ones go.

    Parameters
    ----------
    vectors : float32 (count, d)
        A sample of them is used where there are very many.
    weights : float32 (count,)
        What an error of each costs; not negative.
    size : number of centroids K, at most
    price : of a bit, in squared error
    start : float32 (K', d) to begin with; None is k-means++
    seed : of the sample and of the start

    Returns
    -------
    centroids : float32 (K, d), shortest first. Without a price there are `size`, and fewer vectors
        than that leave some at zero; with one, those that are used.
    bits : float32 (K,), what an index of each takes
    """
    random = np.random.default_rng(seed)
    count, many = len(vectors), max(PER_CENTROID * size, FEWEST)
    if count > many:
        chosen = np.sort(random.choice(count, many, replace=False))
        vectors, weights = vectors[chosen], weights[chosen]
    centroids = _start(vectors, weights, size, random) if start is None else start.copy()
    bits = np.zeros(len(centroids), np.float32)
    for _ in range(min(PASSES[1], max(PASSES[0], WORK // (size * len(vectors) + 1)))):
        nearest = assign(vectors, centroids, price * bits)
        mass = np.bincount(nearest, weights, len(centroids))
        for k in range(vectors.shape[1]):
            total = np.bincount(nearest, weights * vectors[:, k], len(centroids))
            centroids[:, k] = total / np.where(mass > 0, mass, 1)
        if price:
            share = np.bincount(nearest, minlength=len(centroids)) / len(nearest)
            centroids, share = centroids[share > 0], share[share > 0]
            own = ENTRY_BITS * vectors.shape[1] / (share * count)
            bits = (own - np.log2(share)).astype(np.float32)
        else:
            _revive(centroids, mass, vectors, weights, nearest)
    order = np.argsort(np.einsum("ij,ij->i", centroids, centroids), kind="stable")
    return centroids[order], bits[order]


class Book(NamedTuple):
    """A codebook (K, d), what its indices cost in bits (K,), and a codebook of what it leaves."""

    first: Floats
    bits: Floats
    second: Floats


def train(
    columns: Floats,
    worth: Floats,
    length: int,
    size: int,
    residual: float,
    price: float,
    old: Book | None,
) -> Book:
    """Codebooks for the vectors of some columns, rounded to float16 as a reader will see them.

    Parameters
    ----------
    columns : float32 (columns, rows), the rows a multiple of `length`
    worth : float32 (columns,), what errors in a column cost
    length : elements to a vector
    size : centroids, or the product of those of both codebooks
    residual : share of the bits that go to the second codebook
    price : of a bit, in error times worth
    old : what was trained before on similar vectors
    """
    vectors = columns.reshape(-1, length)
    weights = np.repeat(worth, len(vectors) // len(columns))
    second = round(size**residual)
    start = old.first if old and price else None
    fair = price / max(float(worth.mean()), 1e-30)
    first, bits = kmeans(vectors, weights, max(1, round(size / second)), fair, start)
    first, rest = half(first), np.zeros((0, length), np.float32)
    if second > 1:
        rest = half(kmeans(vectors - first[assign(vectors, first)], weights, second)[0])
    return Book(first, bits, rest)


def half(book: Floats) -> Floats:
    """As a reader will see it."""
    return np.clip(book, -65504, 65504).astype(np.float16).astype(np.float32)


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


def decode_indices(data: Buffer, shape: tuple[int, int], size: int) -> NDArray[np.int32]:
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
