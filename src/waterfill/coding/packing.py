"""Fixed-width packing: value i takes bits [i*width, (i+1)*width) of a little-endian bit string."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import native
from waterfill.types import FormatError

Bytes = NDArray[np.uint8]


def pack(values: Bytes, width: int) -> bytes:
    """uint8 values below ``2**width`` (any shape) -> ``ceil(size * width / 8)`` bytes."""
    flat = np.ascontiguousarray(values, np.uint8).reshape(-1)
    if width == 8:
        return flat.tobytes()
    core = native.core()
    if core is None:
        return _pack(flat, width)
    data = np.empty(_nbytes(flat.size, width), np.uint8)
    core.pack(flat, width, data, native.threads())
    return data.tobytes()


def unpack(data: bytes | memoryview, count: int, width: int) -> Bytes:
    """Inverse of `pack`: uint8 (count,); FormatError where the length or the padding is wrong."""
    if len(data) != _nbytes(count, width):
        raise FormatError(
            f"{len(data)} bytes of packed values where {_nbytes(count, width)} belong"
        )
    raw = np.frombuffer(data, np.uint8)
    if width == 8:
        return raw.copy()
    padding = -count * width % 8
    if padding and raw[-1] >> (8 - padding):
        raise FormatError("the padding after packed values is not zero")
    core = native.core()
    if core is None:
        return _unpack(raw, count, width)
    values = np.empty(count, np.uint8)
    core.unpack(raw, width, values, native.threads())
    return values


def _nbytes(count: int, width: int) -> int:
    return -(-count * width // 8)


def _pack(flat: Bytes, width: int) -> bytes:
    bits = np.empty((flat.size, width), np.uint8)
    for b in range(width):
        bits[:, b] = (flat >> b) & 1
    return np.packbits(bits.reshape(-1), bitorder="little").tobytes()


def _unpack(raw: Bytes, count: int, width: int) -> Bytes:
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
    return values.reshape(-1)[:count]
