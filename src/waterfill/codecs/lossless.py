"""Every bit kept, exponents entropy-coded: for norms, biases and whatever must stay exact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np

from waterfill.coding.entropy import decode_bytes, encode_bytes
from waterfill.coding.sections import join, split
from waterfill.registry import Codec, codec
from waterfill.types import DTYPES, FLOAT_DTYPES, Array, TensorInfo, Weighting


@codec("lossless", version=1)
class Lossless(Codec):
    """Byte planes, most significant first, each coded, constant or stored, whichever is fewer bytes.

    Floats are rotated left by one bit first, so that the sign joins the mantissa and the top plane
    holds exponent bits alone (all eight of them for BF16 and F32): that is the plane with structure.
    """

    lossy = False
    parts = ("planes",)

    @classmethod
    def ladder(cls, info: TensorInfo) -> Iterator[Self]:
        """One rung."""
        yield cls()

    def encode(
        self, x: Array, info: TensorInfo, weighting: Weighting
    ) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Bits -> one part ``planes``."""
        return {"planes": join([encode_bytes(p) for p in _planes(x, info.dtype)])}, {}

    def decode(
        self, parts: Mapping[str, bytes], extra: Mapping[str, Any], info: TensorInfo
    ) -> Array:
        """Inverse of `encode`."""
        width = DTYPES[info.dtype].itemsize
        planes = [decode_bytes(p, info.size) for p in split(parts["planes"], width)]
        return _merge(planes, info.dtype).reshape(info.shape)


def _planes(x: Array, dtype: str) -> list[Array]:
    width = DTYPES[dtype].itemsize
    words = np.ascontiguousarray(x).reshape(-1).view(np.dtype(f"<u{width}"))
    if dtype in FLOAT_DTYPES:
        top = words.dtype.type(8 * width - 1)
        words = (words << words.dtype.type(1)) | (words >> top)
    octets = words.view(np.uint8).reshape(-1, width)
    return [np.ascontiguousarray(octets[:, i]) for i in reversed(range(width))]


def _merge(planes: list[Array], dtype: str) -> Array:
    width = DTYPES[dtype].itemsize
    octets = np.stack(planes[::-1], axis=1)
    words = octets.reshape(-1).view(np.dtype(f"<u{width}"))
    if dtype in FLOAT_DTYPES:
        top = words.dtype.type(8 * width - 1)
        words = (words >> words.dtype.type(1)) | (words << top)
    return words.view(DTYPES[dtype])
