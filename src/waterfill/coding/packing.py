"""Fixed-width packing: value i takes bits [i*width, (i+1)*width) of a little-endian bit string."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from waterfill.types import FormatError

Bytes = NDArray[np.uint8]


def pack(values: Bytes, width: int) -> bytes:
    """uint8 values below ``2**width`` (any shape) -> ``ceil(size * width / 8)`` bytes."""
    flat = values.reshape(-1)
    if width == 8:
        return flat.tobytes()
    bits = np.empty((flat.size, width), np.uint8)
    for b in range(width):
        bits[:, b] = (flat >> b) & 1
    return np.packbits(bits.reshape(-1), bitorder="little").tobytes()


def unpack(data: bytes, count: int, width: int) -> Bytes:
    """Inverse of `pack`: uint8 (count,); FormatError where the length or the padding is wrong."""
    if len(data) != -(-count * width // 8):
        raise FormatError(
            f"{len(data)} bytes of packed values where {-(-count * width // 8)} belong"
        )
    raw = np.frombuffer(data, np.uint8)
    if width == 8:
        return raw.copy()
    # Eight values fill `width` bytes: one of the eight at a time, nothing is spread out to bits.
    groups = np.zeros((-(-count // 8), width), np.uint8)
    groups.reshape(-1)[: raw.size] = raw
    values = np.empty((len(groups), 8), np.uint8)
    for k in range(8):
        byte, shift = divmod(k * width, 8)
        value = groups[:, byte] >> np.uint8(shift)
        if shift + width > 8:
            value |= groups[:, byte + 1] << np.uint8(8 - shift)
        values[:, k] = value & np.uint8((1 << width) - 1)
    flat = values.reshape(-1)
    if flat[count:].any():
        raise FormatError("the padding after packed values is not zero")
    return flat[:count]
