"""Packing of values of up to 64 bits: at a fixed width, or below a bound that is no power of two.

Of values below N the upper parts, digits of a radix ``ceil(N / 2**low)``, share words: 10 values of
3.3 bits take 34 bits, not 40.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from waterfill.types import FormatError

__all__ = [
    "Split",
    "best_split",
    "pack_digits",
    "pack_wide",
    "unpack_digits",
    "unpack_wide",
    "wide_nbytes",
]

Words = NDArray[np.uint64]
_WORD = (1 << 64) - 1
CHUNK = 1 << 16  # values spread out to bits at a time; a multiple of eight


def wide_nbytes(count: int, width: int) -> int:
    """Bytes that `count` values take."""
    return -(-count * width // 8)


def pack_wide(values: Words, width: int) -> bytes:
    """uint64 (count,) below ``2**width``, width 0 to 64 -> ``wide_nbytes(count, width)`` bytes."""
    out = []
    for first in range(0, len(values) if width else 0, CHUNK):
        raw = values[first : first + CHUNK].astype("<u8").view(np.uint8).reshape(-1, 8)
        bits = np.unpackbits(raw, axis=1, count=width, bitorder="little")
        out.append(np.packbits(bits.reshape(-1), bitorder="little").tobytes())
    return b"".join(out)


def unpack_wide(data: bytes | memoryview, count: int, width: int) -> Words:
    """Inverse of `pack_wide`; FormatError where the length or the padding is wrong."""
    if len(data) != wide_nbytes(count, width):
        raise FormatError(
            f"{len(data)} bytes of packed values where {wide_nbytes(count, width)} belong"
        )
    raw = np.frombuffer(data, np.uint8)
    values = np.zeros(count, np.uint64)
    for first in range(0, count if width else 0, CHUNK):
        last = min(first + CHUNK, count)
        part = raw[first * width // 8 : wide_nbytes(last, width)]
        bits = np.unpackbits(part, bitorder="little")
        if bits[(last - first) * width :].any():
            raise FormatError("the padding after packed values is not zero")
        rows = bits[: (last - first) * width].reshape(-1, width)
        spread = np.zeros((last - first, 8), np.uint8)
        spread[:, : -(-width // 8)] = np.packbits(rows, axis=1, bitorder="little")
        values[first:last] = spread.view("<u8")[:, 0]
    return values


@dataclass(frozen=True)
class Split:
    """How values are cut: `low` bits as they are, and digits of `radix`, so many to a word."""

    low: int
    radix: int
    digits: int

    @property
    def width(self) -> int:
        """Bits of a word."""
        largest: int = self.radix**self.digits - 1
        return largest.bit_length()

    def nbytes(self, count: int) -> int:
        """Bytes that `count` values take."""
        words = -(-count // self.digits)
        return wide_nbytes(count, self.low) + wide_nbytes(words, self.width)


@lru_cache(maxsize=4096)
def best_split(bound: int, count: int) -> Split:
    """The cut of `count` values below `bound`, at most 2**64, with fewest bytes; ties: fewest low bits, then digits."""
    best = None
    for low in range((bound - 1).bit_length() + 1):
        radix = -(-bound // (1 << low))
        digits = 1
        while radix**digits <= 1 << 64 and digits <= 64:
            split = Split(low, radix, digits)
            if best is None or split.nbytes(count) < best.nbytes(count):
                best = split
            digits += 1
    assert best is not None
    return best


def pack_digits(values: Words, split: Split) -> bytes:
    """uint64 (count,) below the bound of the split -> ``split.nbytes(count)`` bytes."""
    digits = np.zeros((-(-len(values) // split.digits), split.digits), np.uint64)
    # A shift by 64 means nothing to the machine.
    digits.reshape(-1)[: len(values)] = values >> np.uint64(split.low) if split.low < 64 else 0
    words = np.zeros(len(digits), np.uint64)
    for j in reversed(range(split.digits)):
        words = words * np.uint64(split.radix & _WORD) + digits[:, j]
    return pack_wide(values & np.uint64((1 << split.low) - 1), split.low) + pack_wide(
        words, split.width
    )


def unpack_digits(data: bytes | memoryview, count: int, split: Split) -> Words:
    """Inverse of `pack_digits`; FormatError where a word or the padding is wrong."""
    at = wide_nbytes(count, split.low)
    values = unpack_wide(data[:at], count, split.low)
    words = unpack_wide(data[at:], -(-count // split.digits), split.width)
    if split.digits == 1:  # the radix itself may be 2**64
        return values | words << np.uint64(split.low) if split.low < 64 else values
    digits = np.empty((len(words), split.digits), np.uint64)
    for j in range(split.digits):
        words, digits[:, j] = np.divmod(words, np.uint64(split.radix))
    if words.any() or digits.reshape(-1)[count:].any():
        raise FormatError("a word beyond the digits it holds")
    return values | digits.reshape(-1)[:count] << np.uint64(split.low)
