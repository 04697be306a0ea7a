"""Exponential-Golomb codes of whole arrays: for the few numbers too rare to deserve a model.

A value v of order k is ``u = v + 2**k`` with n bits: n - 1 - k in unary, then the n - 1 bits below
the topmost. All unary parts come first, then all others; each of the two is padded to a byte.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.types import FormatError

__all__ = [
    "MAX_ORDER",
    "best_order",
    "bit_lengths",
    "pack",
    "pack_fixed",
    "pack_unary",
    "read_varint",
    "unpack",
    "unpack_fixed",
    "unpack_unary",
    "unzigzag",
    "varint",
    "zigzag",
]

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]
MAX_BITS = 40
MAX_ORDER = 32
MANY = 1 << 12  # fields that are laid out at once


def zigzag(values: Any) -> Ints:
    """0, -1, 1, -2, 2, ... -> 0, 1, 2, 3, 4, ..."""
    v = np.asarray(values, np.int64)
    return (v << 1) ^ (v >> 63)


def unzigzag(values: Any) -> Ints:
    """Inverse of `zigzag`."""
    v = np.asarray(values, np.int64)
    return (v >> 1) ^ -(v & 1)


def varint(value: int) -> bytes:
    """Seven bits a byte, least first, the top bit set on all but the last."""
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def read_varint(data: Bytes, at: int) -> tuple[int, int]:
    """A `varint` at `at`, and where it ends."""
    value = 0
    for shift in range(0, 42, 7):
        if at >= data.size:
            raise FormatError("a number is cut short")
        byte = int(data[at])
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise FormatError("a number has too many digits")


def bit_lengths(values: Any) -> Ints:
    """Bits of each value up to 2**53: 0 of 0, 1 of 1, 2 of 2 and 3, ..."""
    return np.frexp(np.asarray(values, np.float64))[1].astype(np.int64)


def pack_unary(values: Ints) -> bytes:
    """Each value as so many zeros and a one."""
    ends = np.cumsum(values + 1)
    bits = np.zeros(int(ends[-1]) if values.size else 0, np.uint8)
    bits[ends - 1] = 1
    return np.packbits(bits).tobytes()


def unpack_unary(data: Bytes, at: int, count: int, most: int) -> tuple[Ints, int]:
    """`count` values of at most `most` each, from byte `at`; and the byte where they end."""
    if count == 0:
        return np.zeros(0, np.int64), at
    reach = data[at : at + (count * (most + 1) + 7) // 8]
    ones = np.flatnonzero(np.unpackbits(reach))
    if ones.size < count:
        raise FormatError("unary numbers are cut short")
    ends = ones[:count].astype(np.int64)
    values = np.diff(ends, prepend=-1) - 1
    if (values > most).any():
        raise FormatError("a unary number is too large")
    return values, at + int(ends[-1]) // 8 + 1


def pack_fixed(values: Ints, widths: Ints) -> bytes:
    """The lowest `widths[i]` bits of each value, at most 64, highest first."""
    size = _word(widths)
    found = [
        np.unpackbits(_rows(values[some].astype(f">u{size}")), axis=1)[_low(widths[some], size)]
        for some in _slices(widths)
    ]
    return np.packbits(np.concatenate(found)).tobytes() if found else b""


def unpack_fixed(data: Bytes, at: int, widths: Ints) -> tuple[Ints, int]:
    """Inverse of `pack_fixed`, from byte `at`; and the byte where the fields end."""
    total = int(widths.sum())
    end = at + (total + 7) // 8
    if end > data.size:
        raise FormatError("packed numbers are cut short")
    bits, start, size = np.unpackbits(data[at:end], count=total), 0, _word(widths)
    values = np.zeros(widths.size, np.int64)
    for some in _slices(widths):
        low = _low(widths[some], size)
        laid = np.zeros(low.shape, np.uint8)
        stop = start + int(widths[some].sum())
        laid[low] = bits[start:stop]
        values[some] = np.packbits(laid, axis=1).view(f">u{size}")[:, 0]
        start = stop
    return values, end


def _word(widths: Ints) -> int:
    """Bytes of the smallest word that has as many bits as the widest field."""
    most = int(widths.max(initial=0))
    return 2 if most <= 16 else 4 if most <= 32 else 8


def _slices(widths: Ints) -> list[slice]:
    """Fields few enough that a byte for each of their words' bits is little."""
    return [slice(at, at + MANY) for at in range(0, widths.size, MANY)]


def _rows(words: NDArray[Any]) -> Bytes:
    """Bytes of each word."""
    return words.view(np.uint8).reshape(words.size, words.itemsize)


def _low(widths: Ints, size: int) -> NDArray[np.bool_]:
    """Which bits of words of so many bytes are the fields', highest first: (fields, 8 * size)."""
    return np.arange(8 * size) >= 8 * size - widths[:, None]


def pack(values: Ints, order: int) -> bytes:
    """Non-negative values below 2**39 as exponential-Golomb codes."""
    raised = values + (1 << order)
    below = bit_lengths(raised) - 1
    return pack_unary(below - order) + pack_fixed(raised, below)


def unpack(data: Bytes, at: int, count: int, order: int) -> tuple[Ints, int]:
    """Inverse of `pack`, from byte `at`; and the byte where the codes end."""
    extra, at = unpack_unary(data, at, count, MAX_BITS - order)
    below = extra + order
    values, at = unpack_fixed(data, at, below)
    return values + (np.int64(1) << below) - (1 << order), at


def best_order(values: Ints, weights: Ints | None = None) -> tuple[int, int]:
    """The order with the fewest bits for values that occur `weights` times each, and the bits."""
    times = np.ones_like(values) if weights is None else weights
    orders = range(MAX_ORDER + 1)
    sizes = [int((times * (2 * bit_lengths(values + (1 << k)) - 1 - k)).sum()) for k in orders]
    order = int(np.argmin(sizes))
    return order, sizes[order]
