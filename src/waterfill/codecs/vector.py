"""Vector quantisation: a few weights down a column share one index into a trained codebook."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import numpy as np

from waterfill.coding.books import Books
from waterfill.coding.columns import (
    GRID,
    diagonal,
    level_classes,
    row_scales,
    scaled_columns,
    share_bits,
)
from waterfill.coding.kmeans_vectors import MAX_SIZE, Book, assign, train
from waterfill.coding.rounding import finite, successive
from waterfill.coding.scales import LIMIT, decode_grid, encode_grid, from_grid
from waterfill.coding.sections import join, split
from waterfill.registry import Codec, codec
from waterfill.types import (
    Array,
    Encoded,
    Floats,
    FormatError,
    SpecError,
    TensorInfo,
    Tunable,
    Weighting,
)

MAX_CLASSES = 64
SPARE = 3  # times the centroids that the bits ask for, where those that do not pay are dropped


@codec("vector", version=1)
class Vector(Codec):
    """Columns one after another, each in vectors of `length` rows, from its class's codebook.

    VPTQ (Liu et al. 2024, arXiv 2409.17066): vectors lie down a column, so a column's weight in the
    harm is one number, and errors are carried on to the columns that follow. Its codebook for the
    columns of most energy is here one for each class of columns, sized by reverse water-filling. At
    equal bytes on real layers a residual codebook did 1.7 times the harm at two bits, so it is off; with
    `entropy`, vectors of two or more were no better than single weights (`bench.gallery vector`).

    Attributes
    ----------
    bits : float
        Of the indices, a weight, before entropy coding. The continuous knob.
    length : int
        Weights to a vector, 1 to 16.
    classes : int
        Codebooks, at most, for columns of unlike energy: 1 to 64.
    residual : float
        Share of the bits that a second codebook, of what the first leaves, gets: 0 is none.
    entropy : float
        What a bit counts in choosing centroids, relative to its worth at this rate: 0 takes the
        nearest, as published. Only without a residual.
    passes : int
        Times that codebooks are trained: after the first, on what the columns were rounded to.
    solver : str
        nearest | successive
    weighted : bool
        Train with each column's weight in the harm (no difference where columns are scaled).
    scaled : bool
        Scale columns by their weight in the harm first; published as no.
    rows : float
        Row scales go with the row's weight to the power ``-rows / 2``, for the rest with its size.
    damping : float
        Added to the diagonal of S, relative to its mean.
    """

    parts = ("codes", "scales", "books")
    shared: ClassVar[tuple[str, ...]] = ("books",)

    bits: float = 2.0
    length: int = 3
    classes: int = 8
    residual: float = 0.0
    entropy: float = 1.0
    passes: int = 2
    solver: str = "successive"
    weighted: bool = True
    scaled: bool = True
    rows: float = 0.5
    damping: float = 0.01

    def __post_init__(self) -> None:
        sizes = 0 < self.bits <= 12 and 1 <= self.length <= 16 and 1 <= self.classes <= MAX_CLASSES
        shares = (
            0 <= self.rows <= 1
            and 0 <= self.entropy <= 8
            and 0 <= self.residual < 1
            and 0 <= self.damping < math.inf
        )
        solvers = self.solver in ("nearest", "successive") and 1 <= self.passes <= 8
        if not (sizes and shares and solvers):
            raise SpecError(
                "vector: bits is at most 12, length 1 to 16, classes 1 to 64, residual below 1, passes "
                "1 to 8, rows 0 to 1, damping not negative, solver nearest or successive"
            )

    @classmethod
    def ladder(cls, info: TensorInfo) -> Iterator[Self]:
        """One to six bits, in vectors as long as their codebooks pay."""
        if info.worth_rounding:
            for bits, longest in ((1.0, 4), (1.5, 3), (2.0, 3), (3.0, 2), (4.0, 2), (6.0, 1)):
                fits = [
                    length
                    for length in range(1, longest + 1)
                    if 2 * length * 16 * 2 ** (bits * length) <= 0.005 * bits * info.size / 8
                ]
                yield cls(bits=bits, length=max(fits, default=1))

    def between(self, other: Self, t: float) -> Self | None:
        """Bits in arithmetic progression; the other options are those of the nearer rung."""
        bits = float(f"{self.bits * (1 - t) + other.bits * t:.6g}")
        return dataclasses.replace(self if t < 0.5 else other, bits=bits)

    def encode(
        self, x: Array, info: TensorInfo, weighting: Weighting
    ) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Bits of `info.shape` -> parts ``codes``, ``scales`` and ``books``."""
        if not info.size:
            return dict.fromkeys(self.parts, b""), {}
        matrix = finite(info.matrix(x), info.name)
        weight, lower, column_grid = scaled_columns(
            matrix, weighting, self.damping, self.solver == "successive", self.scaled
        )
        n, m = weight.shape
        row_grid = row_scales(weight, weighting, self.rows)
        tall = -(-m // self.length)
        padded = np.zeros((n, tall * self.length), np.float32)
        np.divide(weight, from_grid(row_grid, GRID), out=padded[:, :m])
        energy = np.square(diagonal(lower))
        ids, heights = level_classes(energy * np.mean(np.square(padded), axis=1), self.classes)
        sizes, price = self._sizes(heights, ids, tall)
        worth = energy if self.weighted else np.ones_like(energy)
        aims, books = padded, list[Book]()
        for _ in range(self.passes if lower.ndim == 2 else 1):
            old: list[Book | None] = [*books] or [None] * len(sizes)
            books = [
                train(
                    aims[ids == c], worth[ids == c], self.length, size, self.residual, price, old[c]
                )
                for c, size in enumerate(sizes)
            ]
            first, second, aims = self._round(padded, lower, books, ids, price / energy)
        made = Books([(book.first, book.second) for book in books], ids, (first.T, second.T))
        columns = [encode_grid(column_grid), encode_grid(ids), made.sizes(), made.entries()]
        scales = encode_grid(row_grid)
        return {"codes": made.streams(), "scales": scales, "books": join(columns)}, {}

    def _round(
        self, weight: Floats, lower: Floats, books: list[Book], ids: Array, prices: Array
    ) -> tuple[Array, Array, Floats]:
        """Indices into both codebooks, uint16 (n, vectors), and what each column was rounded to."""
        first, second = np.zeros((2, len(weight), weight.shape[1] // self.length), np.uint16)
        aims = np.empty_like(weight)

        def round_block(
            start: int, end: int, block: Floats, target: Floats, carry: Floats
        ) -> Floats:
            error = np.empty_like(target)
            for j in range(end - start - 1, -1, -1):
                book = books[ids[start + j]]
                vectors = target[j].reshape(-1, self.length)
                first[start + j] = assign(vectors, book.first, prices[start + j] * book.bits)
                rounded = book.first[first[start + j]]
                if len(book.second):
                    second[start + j] = assign(vectors - rounded, book.second)
                    rounded = rounded + book.second[second[start + j]]
                error[j] = block[j] - rounded.reshape(-1)
                if lower.ndim == 2 and j:
                    target[:j] += carry[j, :j, None] * error[j]
            aims[start:end] = target
            return error

        successive(weight, lower, round_block)
        return first, second, aims

    def _sizes(self, heights: Array, ids: Array, tall: int) -> tuple[Array, float]:
        """Centroids for each class, at least eight vectors to each, and the price of a bit."""
        columns = np.bincount(ids)
        most = np.clip(columns * tall // 8, 1, MAX_SIZE)
        bits = np.log2(most) / self.length / max(self.residual, 1 - self.residual)
        bits, level = share_bits(heights, columns, bits, self.bits)
        sizes = np.rint(2 ** (self.length * bits)).astype(np.int64)
        if self.residual or not self.entropy:
            return sizes, 0.0
        # Noise of 1.42 * 4^-R falls by 2 ln 2 of itself for a bit.
        return np.minimum(SPARE * sizes, most), 2 * self.entropy * 4.0**-level

    def decode(
        self, parts: Mapping[str, bytes], extra: Mapping[str, Any], info: TensorInfo
    ) -> Array:
        """Inverse of `encode`, the same bits on every machine."""
        m, n = info.matrix_shape
        if not info.size:
            if any(parts.values()):
                raise FormatError(f"{info.name}: bytes where there are no weights")
            return info.unmatrix(np.zeros((m, n), np.float32))
        books, row_scale, scale = self._read(parts, info)
        with np.errstate(over="ignore", under="ignore"):
            values = books.values(m) * row_scale[:, None] * scale
        if not np.isfinite(values).all():
            raise FormatError(f"{info.name}: a weight is not finite")
        return info.unmatrix(values)

    def tunable(self, one: Encoded) -> Tunable | None:
        """Indices and codebooks; scales are steps of a grid, and stay."""
        if not one.info.size:
            return None
        books, row_scale, scale = self._read(one.parts, one.info)
        return books.tunable(row_scale, scale)

    def retuned(self, tunable: Tunable, one: Encoded) -> dict[str, bytes]:
        """Other indices and codebooks of the same sizes."""
        books = self._read(one.parts, one.info)[0].retuned(tunable)
        columns = [*split(one.parts["books"], 4)[:3], books.entries()]
        return {**one.parts, "codes": books.streams(), "books": join(columns)}

    def _read(self, parts: Mapping[str, bytes], info: TensorInfo) -> tuple[Books, Floats, Floats]:
        """Indices and codebooks, and the scales of rows and columns."""
        m, n = info.matrix_shape
        columns, coded_ids, coded_sizes, entries = split(parts["books"], 4)
        scale = from_grid(decode_grid(columns, n, LIMIT * GRID), GRID)
        row_scale = from_grid(decode_grid(parts["scales"], m, LIMIT * GRID), GRID)
        ids = decode_grid(coded_ids, n, MAX_CLASSES - 1)
        count = int(ids.max()) + 1
        sizes = decode_grid(coded_sizes, 2 * max(count, 1), MAX_SIZE)
        if ids.min() < 0 or sizes.min() < 0 or sizes[::2].min() < 1:
            raise FormatError(f"{info.name}: a class or the size of its codebook is impossible")
        shape = -(-m // self.length), self.length
        read = Books.read(parts["codes"], entries, sizes.reshape(-1, 2), ids, shape, info)
        return read, row_scale, scale
