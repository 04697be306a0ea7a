"""Every bit kept, exponents entropy-coded: for norms, biases and whatever must stay exact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np

from waterfill.coding import lossless
from waterfill.coding.entropy import decode_bytes
from waterfill.coding.sections import split
from waterfill.registry import Codec, codec
from waterfill.types import DTYPES, FLOAT_DTYPES, Array, SpecError, TensorInfo, Weighting


@codec("lossless", version=2)
class Lossless(Codec):
    """Exponents (and up to three mantissa bits) coded, the rest in planes: stored, coded or constant.

    What is constant, sparse or repeats itself takes next to nothing; what is random is stored.
    Entropy-coded exponents: ZipNN (Hershcovitch et al. 2024), DFloat11 (Zhang et al. 2025).
    Mantissa bits beside them: weights thin out within a binade, so these bits are not random.
    """

    usual = True
    lossy = False
    parts = ("stream",)
    coder: str = "auto"

    def __post_init__(self) -> None:
        if self.coder not in lossless.CODERS:
            raise SpecError(f"lossless: coder is X, not {self.coder!r}")

    @classmethod
    def ladder(cls, info: TensorInfo) -> Iterator[Self]:
        """One rung."""
        yield cls()

    def encode(
        self, x: Array, info: TensorInfo, weighting: Weighting
    ) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Bits -> one part ``stream``."""
        return {"stream": lossless.encode(lossless.words_of(x), info.dtype, self.coder)}, {}

    def decode(
        self, parts: Mapping[str, bytes], extra: Mapping[str, Any], info: TensorInfo
    ) -> Array:
        """Inverse of `encode`; version 1 had a part ``planes`` instead."""
        if "planes" in parts:
            return _decode_planes(parts["planes"], info)
        return super().decode(parts, extra, info)

    def decode_into(
        self, parts: Mapping[str, bytes], extra: Mapping[str, Any], info: TensorInfo, out: Array
    ) -> None:
        """Fill a contiguous array of `info.shape` with what `decode` would give."""
        if "planes" in parts:
            out[...] = _decode_planes(parts["planes"], info)
        else:
            lossless.decode(parts["stream"], lossless.words_of(out), info.dtype)


def _decode_planes(data: bytes, info: TensorInfo) -> Array:
    """Version 1: byte planes, most significant first; floats were rotated left by one bit."""
    width = DTYPES[info.dtype].itemsize
    planes = [decode_bytes(p, info.size) for p in split(data, width)]
    words = np.stack(planes[::-1], axis=1).reshape(-1).view(f"<u{width}")
    if info.dtype in FLOAT_DTYPES:
        top = words.dtype.type(8 * width - 1)
        words = (words >> words.dtype.type(1)) | (words << top)
    return words.view(DTYPES[info.dtype]).reshape(info.shape)
