"""A random Hadamard rotation around any other codec: outliers are spread before they are coded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import numpy as np

from waterfill.coding.hadamard import MAX_BLOCK
from waterfill.coding.nested import between, decode_inner, encode_inner
from waterfill.coding.rotation import Rotation
from waterfill.coding.rounding import finite
from waterfill.registry import Codec, Inner, codec
from waterfill.types import Array, SpecError, TensorInfo, Weighting


@codec("rotate", version=1)
class Rotate(Codec):
    """Another codec, given the weights with their input columns rotated: outliers are spread.

    It codes ``W R`` with the second moment ``R^T S R``; ``R^T`` follows decoding. R multiplies blocks of
    input columns by random signs and Walsh-Hadamard matrices (QuaRot, Ashkboos et al. 2024; QuIP#,
    Tseng et al. 2024): each column of W R is a mean over a block, near Gaussian whatever W was, so
    that a grid with one scale for many weights fits. Figures on real layers are in
    docs/format/rotate.md: it helps integers, and not a trellis, whose entropy coder adapts anyway.
    Rotating the outputs too helped nothing.

    Attributes
    ----------
    inner : Inner
        The codec inside, any of the gallery.
    block : int
        Columns to a block, a power of two from 2 to 32768; fewer where there are not so many. Measured
        best from 16 to 128; with blocks of whole rows integers do 5 percent more harm.
    seed : int
        Of the signs, from 0.
    """

    parts: ClassVar[tuple[str, ...]] = ("codes", "shared")
    shared: ClassVar[tuple[str, ...]] = ("shared",)

    inner: Inner = Inner("integer:bits=3")
    block: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.block <= MAX_BLOCK or self.block & (self.block - 1):
            raise SpecError(f"rotate: block is a power of two from 2 to {MAX_BLOCK}")
        if not 0 <= self.seed < 1 << 62:
            raise SpecError("rotate: seed is a number from 0 to 2**62 - 1")

    @classmethod
    def ladder(cls, info: TensorInfo) -> Iterator[Self]:
        """Integers of two to six bits."""
        if info.worth_rounding:
            for bits in (2, 3, 4, 5, 6):
                yield cls(inner=Inner(f"integer:bits={bits},pack=coded"))

    @property
    def names(self) -> tuple[str, ...]:
        """Without ``shared`` where the codec inside has none."""
        return self.parts if self.inner.codec.shared else self.parts[:1]

    @property
    def fair_rows(self) -> int:
        """As the codec inside."""
        return self.inner.codec.fair_rows

    def between(self, other: Self, t: float) -> Self | None:
        """Where the codec inside has something between, that rotated alike."""
        return between(self, other, t)

    def encode(
        self, x: Array, info: TensorInfo, weighting: Weighting
    ) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Bits of `info.shape` -> ``codes`` and ``shared`` of the codec inside."""
        matrix = finite(info.matrix(x), info.name)
        rotation = self._rotation(matrix.shape[1])
        with np.errstate(over="ignore", invalid="ignore"):
            rotation.rotate(matrix)
        turned = rotation.weighting(weighting)
        (codes, shared, notes), _ = encode_inner(self.inner, matrix, info, turned)
        return {"codes": codes, **({"shared": shared} if shared else {})}, notes

    def decode(
        self, parts: Mapping[str, bytes], extra: Mapping[str, Any], info: TensorInfo
    ) -> Array:
        """Inverse of `encode`, the same bits on every machine."""
        coded = parts["codes"], parts.get("shared", b""), dict(extra)
        matrix = decode_inner(self.inner, coded, info)
        with np.errstate(over="ignore", invalid="ignore"):
            self._rotation(matrix.shape[1]).rotate(matrix, inverse=True)
        return info.unmatrix(matrix)

    def _rotation(self, n: int) -> Rotation:
        return Rotation(n, self.block, self.seed)
