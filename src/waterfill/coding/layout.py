"""How words are cut into a field and planes, and what the symbols of a field stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Field", "Layout", "Planes"]

# For each plane its bytes, or the number that all of them are.
Planes = Sequence[NDArray[np.uint8] | int]


@dataclass(frozen=True)
class Layout:
    """How words of `width` bytes are cut: a field of `field_bits` (0 to 16, 0 for none), and the rest."""

    width: int
    field_bits: int

    @property
    def rest_bits(self) -> int:
        """Bits of a word that are not in the field."""
        return 8 * self.width - self.field_bits

    @property
    def planes(self) -> int:
        """How many planes the rest has."""
        return (self.rest_bits + 7) // 8

    @property
    def first_bits(self) -> int:
        """Bits of the first plane, 1 to 8."""
        return self.rest_bits - 8 * (self.planes - 1)

    def plane_nbytes(self, plane: int, count: int) -> int:
        """Bytes of a plane of `count` words as stored."""
        return count if plane else (count * self.first_bits + 7) // 8


@dataclass(frozen=True)
class Field:
    """What the symbols of a field stand for: `low` and the values above it, the last one for others.

    Attributes
    ----------
    low : value of symbol 0
    size : number of symbols
    escape : whether the last symbol stands for every other value
    freqs : uint16 (size,), the model of a rANS stream; None where the stream is a Huffman stream
    """

    low: int
    size: int
    escape: bool
    freqs: NDArray[np.uint16] | None

    @property
    def direct(self) -> int:
        """How many symbols stand for a value of their own."""
        return self.size - self.escape
