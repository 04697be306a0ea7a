"""The stored bytes themselves: for what must not change and does not compress."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np

from waterfill.registry import Codec, codec
from waterfill.types import DTYPES, Array, FormatError, TensorInfo, Weighting


@codec("raw", version=1)
class Raw(Codec):
    """Little-endian bytes as in safetensors, one part ``bytes``."""

    usual = True
    lossy = False
    parts = ("bytes",)

    @classmethod
    def ladder(cls, info: TensorInfo) -> Iterator[Self]:
        """One rung."""
        yield cls()

    def encode(
        self, x: Array, info: TensorInfo, weighting: Weighting
    ) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Bits -> bytes."""
        return {"bytes": np.ascontiguousarray(x).tobytes()}, {}

    def decode(
        self, parts: Mapping[str, bytes], extra: Mapping[str, Any], info: TensorInfo
    ) -> Array:
        """Bytes -> bits."""
        return _view(parts, info).copy()

    def decode_into(
        self, parts: Mapping[str, bytes], extra: Mapping[str, Any], info: TensorInfo, out: Array
    ) -> None:
        """Bytes -> bits in `out`."""
        out[...] = _view(parts, info)


def _view(parts: Mapping[str, bytes], info: TensorInfo) -> Array:
    data = parts["bytes"]
    if len(data) != info.nbytes:
        raise FormatError(f"{info.name}: {len(data)} bytes where {info.nbytes} were expected")
    return np.frombuffer(data, DTYPES[info.dtype]).reshape(info.shape)
