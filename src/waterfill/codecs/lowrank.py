"""A low-rank matrix added to what any other codec decodes to, against the errors it makes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import numpy as np

from waterfill.coding.entropy import decode_ints, encode_ints
from waterfill.coding.factors import Factors, fit
from waterfill.coding.nested import Coded, between, decode_inner, encode_inner
from waterfill.coding.rounding import finite
from waterfill.coding.sections import join, split
from waterfill.registry import Codec, Inner, codec
from waterfill.types import (
    Array,
    Floats,
    FormatError,
    SpecError,
    TensorInfo,
    Weighting,
)

MAX_RANK = 1024
BITS_A_WEIGHT = 0.1  # that the factors of a rung take, at most
MOST = 8  # directions of a rung: a sample of 1024 rows tells what those are worth


@codec("lowrank", version=1)
class LowRank(Codec):
    """Another codec, and a matrix of low rank added to what it decodes to, against its errors.

    The error of the codec inside is approximated at a low rank (LoRC of ZeroQuant-V2, Yao et al. 2023), in
    the metric of the inputs' second moment (EoRA, Liu et al. 2024), and here of the row weights
    too. Measured on real layers in docs/format/lowrank.md: each of these beats the one before it at
    equal rank, yet spending the bytes on the codec inside is better unless that rounds to nearest.

    Attributes
    ----------
    inner : Inner
        The codec inside, any of the gallery.
    rank : int
        Of the matrix added, 1 to 1024; a smaller matrix than that has its own.
    method : str
        The metric: lorc (none) | eora (second moment) | harm (second moment and row weights).
    bits : int
        2 to 8, of each number of the factors before entropy coding. The papers have 8; with 5 the
        harm is the same to half a percent.
    rounds : int
        How often the weights less the matrix are coded anew, and the matrix is fitted anew; the
        best round is kept. 0 is what the papers do.
    """

    parts: ClassVar[tuple[str, ...]] = ("codes", "shared")
    shared: ClassVar[tuple[str, ...]] = ("shared",)

    inner: Inner = Inner("integer:bits=3")
    rank: int = 8
    method: str = "harm"
    bits: int = 5
    rounds: int = 2

    def __post_init__(self) -> None:
        if not (1 <= self.rank <= MAX_RANK and 2 <= self.bits <= 8 and 0 <= self.rounds <= 20):
            raise SpecError("lowrank: rank is 1 to 1024, bits 2 to 8, rounds 0 to 20")
        if self.method not in ("lorc", "eora", "harm"):
            raise SpecError("lowrank: method is lorc, eora or harm")

    @classmethod
    def ladder(cls, info: TensorInfo) -> Iterator[Self]:
        """Integers of two to six bits, eight directions or a tenth of a bit a weight for the factors."""
        if info.worth_rounding:
            m, n = info.matrix_shape
            rank = max(1, min(MOST, round(BITS_A_WEIGHT * m * n / (5 * (m + n)))))
            for bits in (2, 3, 4, 5, 6):
                yield cls(inner=Inner(f"integer:bits={bits},pack=coded"), rank=rank)

    @property
    def fair_rows(self) -> int:
        """So many that chance errors which the factors fit lower the price by a few per cent at most."""
        return max(128 * self.rank, self.inner.codec.fair_rows)

    def between(self, other: Self, t: float) -> Self | None:
        """Where the codec inside has something between, that with our rank."""
        return between(self, other, t)

    def encode(
        self, x: Array, info: TensorInfo, weighting: Weighting
    ) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Bits of `info.shape` -> ``codes``, which grow with the rows, and ``shared``, which do not."""
        matrix = finite(info.matrix(x), info.name)
        rounds = self._rounds(matrix, info, weighting)
        return min(rounds, key=lambda found: found[0])[1:]

    def _rounds(
        self, matrix: Floats, info: TensorInfo, weighting: Weighting
    ) -> Iterator[tuple[float, dict[str, bytes], dict[str, Any]]]:
        """Cost, parts and notes of each round."""
        target = matrix
        for _ in range(1 + self.rounds):
            coded, decoded = encode_inner(self.inner, target, info, weighting)
            factors = fit(matrix - decoded, self._metric(weighting), self._rank(info), self.bits)
            added = np.zeros_like(matrix)
            factors.add_to(added)
            target = matrix - added
            decoded += added
            harm = weighting.distortion(matrix, decoded)
            del added, decoded
            parts, notes = self._parts(coded, factors)
            # A bit a weight more is worth a quarter of the harm, as for any fine quantiser.
            spent = 8 * sum(map(len, parts.values())) / max(matrix.size, 1)
            yield math.log2(max(harm, 1e-300)) + 2 * spent, parts, notes

    def decode(
        self, parts: Mapping[str, bytes], extra: Mapping[str, Any], info: TensorInfo
    ) -> Array:
        """Inverse of `encode`, the same bits on every machine."""
        coded, factors = self._read(parts, extra, info)
        matrix = decode_inner(self.inner, coded, info)
        factors.add_to(matrix)
        return info.unmatrix(matrix)

    def _rank(self, info: TensorInfo) -> int:
        return min(self.rank, *info.matrix_shape)

    def _metric(self, weighting: Weighting) -> Weighting:
        if self.method == "harm":
            return weighting
        return Weighting(weighting.second_moment if self.method == "eora" else None)

    def _parts(self, coded: Coded, factors: Factors) -> tuple[dict[str, bytes], dict[str, Any]]:
        codes, shared, notes = coded
        left = encode_ints(factors.left.astype(np.int32))
        right = encode_ints(np.ascontiguousarray(factors.right.T).astype(np.int32))
        scale = factors.scale.astype("<f4").tobytes()
        return {"codes": join([left, codes]), "shared": join([scale, right, shared])}, notes

    def _read(
        self, parts: Mapping[str, bytes], extra: Mapping[str, Any], info: TensorInfo
    ) -> tuple[Coded, Factors]:
        left, codes = split(parts["codes"], 2)
        scale, right, shared = split(parts["shared"], 3)
        (m, n), rank = info.matrix_shape, self._rank(info)
        if len(scale) != 4 * rank:
            raise FormatError(f"{info.name}: {len(scale)} bytes of scales, not {4 * rank}")
        factors = Factors(
            self._integers(left, m, rank, info),
            np.ascontiguousarray(self._integers(right, n, rank, info).T),
            np.frombuffer(scale, "<f4").astype(np.float32),
        )
        if not np.isfinite(factors.scale).all():
            raise FormatError(f"{info.name}: a scale of a factor is not finite")
        return (codes, shared, dict(extra)), factors

    def _integers(self, data: bytes, count: int, rank: int, info: TensorInfo) -> Array:
        numbers = decode_ints(data, count, rank)
        if np.abs(numbers).max(initial=0) >= 1 << (self.bits - 1):
            raise FormatError(f"{info.name}: a number of more than {self.bits} bits in a factor")
        return numbers.astype(np.int8)
