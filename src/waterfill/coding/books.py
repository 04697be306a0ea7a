"""Codebooks of vectors, a pair for each class of columns: their bytes, and what tuning may change."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from waterfill.coding.kmeans_vectors import decode_indices, encode_indices, half
from waterfill.coding.scales import encode_grid
from waterfill.coding.sections import join, split
from waterfill.types import Array, Floats, FormatError, TensorInfo, Term, Tunable

__all__ = ["Books"]


@dataclass(frozen=True, eq=False)
class Books:
    """Vectors down columns as indices into their class's codebook, and into that of what it leaves.

    Attributes
    ----------
    pairs : for each class two codebooks, float32 (size, length); the second may have no entries
    ids : (n,), the class of each column
    indices : two arrays (vectors, n) of integers
    """

    pairs: Sequence[tuple[Floats, Floats]]
    ids: Array
    indices: tuple[Array, Array]

    @classmethod
    def read(
        cls, streams: bytes, entries: bytes, sizes: Array, ids: Array, shape: tuple[int, int],
        info: TensorInfo,
    ) -> Books:  # fmt: skip
        """Inverse of `streams` and `entries`.

        Parameters
        ----------
        sizes : (classes, 2), entries of the codebooks
        shape : (vectors down a column, weights to a vector)

        Raises
        ------
        FormatError
            On bytes of another length, numbers that are not finite, and indices beyond their book.
        """
        tall, length = shape
        if len(entries) != 2 * length * int(sizes.sum()):
            raise FormatError(f"{info.name}: the codebooks are cut short or too long")
        every = np.frombuffer(entries, "<f2").astype(np.float32).reshape(-1, length)
        if not np.isfinite(every).all():
            raise FormatError(f"{info.name}: a centroid is not finite")
        books = np.split(every, np.cumsum(sizes.reshape(-1))[:-1])
        indices = np.zeros((2, tall, len(ids)), np.int32)
        for number, stream in enumerate(split(memoryview(streams), len(books))):
            own = np.flatnonzero(ids == number // 2)
            size = len(books[number])
            indices[number % 2][:, own] = decode_indices(stream, (tall, own.size), size)
        pairs = list(zip(books[::2], books[1::2], strict=True))
        return cls(pairs, ids, (indices[0], indices[1]))

    def streams(self) -> bytes:
        """The indices: a stream for each codebook."""
        return join(
            [
                encode_indices(index[:, self.ids == c], len(book))
                for c, pair in enumerate(self.pairs)
                for index, book in zip(self.indices, pair, strict=True)
            ]
        )

    def sizes(self) -> bytes:
        """How many entries the codebooks have."""
        return encode_grid(np.array([len(book) for pair in self.pairs for book in pair]))

    def entries(self) -> bytes:
        """The codebooks, float16."""
        return b"".join(book.astype("<f2").tobytes() for pair in self.pairs for book in pair)

    def values(self, m: int) -> Floats:
        """Float32 (m, n) of the vectors."""
        length = self.pairs[0][0].shape[1]
        values = np.empty((m, len(self.ids)), np.float32)
        for c, pair in enumerate(self.pairs):
            own = np.flatnonzero(self.ids == c)
            picked = np.zeros((len(self.indices[0]), own.size, length), np.float32)
            for book, index in zip(pair, self.indices, strict=True):
                picked = picked + book[index[:, own]] if len(book) else picked
            values[:, own] = picked.transpose(0, 2, 1).reshape(-1, own.size)[:m]
        return values

    def tunable(self, rows: Floats, columns: Floats) -> Tunable | None:
        """With scales of rows (m,) and columns (n,), which stay: a term for each of the pair.

        None where some classes have a second codebook, and others none.
        """
        sizes = np.array([[len(book) for book in pair] for pair in self.pairs])
        if sizes[:, 1].any() and not sizes[:, 1].all():
            return None
        found = []
        for which in (0, 1) if sizes[:, 1].any() else (0,):
            books = [pair[which] for pair in self.pairs]
            table = np.full((len(books), sizes[:, which].max(), books[0].shape[1], 1), np.nan, "f4")
            for c, book in enumerate(books):
                table[c, : len(book), :, 0] = book
            ids = self.ids[None].astype(np.int32)
            found.append(Term(self.indices[which].astype(np.int32), table, ids))
        shape, learned = (len(rows), len(columns)), frozenset(["tables"])
        scales = rows[:, None]
        return Tunable(shape, tuple(found), scales, shape[1], columns, learned, coded=True)

    def retuned(self, tunable: Tunable) -> Books:
        """With the codes and entries that tuning made of `tunable`."""
        terms = tunable.terms
        pairs = [list(pair) for pair in self.pairs]
        for which, term in enumerate(terms):
            for c, pair in enumerate(pairs):
                pair[which] = half(term.table[c, : len(pair[which]), :, 0])
        codes = [term.codes for term in terms]
        indices = codes[0], codes[-1] if len(codes) > 1 else self.indices[1]
        return dataclasses.replace(self, pairs=[(a, b) for a, b in pairs], indices=indices)
