"""Positive scales as whole steps of a logarithmic grid: a few bits each, the same bits everywhere."""

from __future__ import annotations

import numpy as np

from waterfill.coding.entropy import decode_ints, encode_ints
from waterfill.coding.rounding import Indices
from waterfill.types import Array, Floats, FormatError

# Correctly rounded constants, not libm's pow: a decoder must not depend on the machine.
_FRACTIONS = {
    2: np.array([1.0, 1.4142135623730951], np.float32),
    8: np.array(
        [
            1.0,
            1.0905077326652577,
            1.189207115002721,
            1.2968395546510096,
            1.4142135623730951,
            1.5422108254079407,
            1.681792830507429,
            1.8340080864093424,
        ],
        np.float32,
    ),
}
_LIMIT = 126  # octaves either side of one: what float32 holds


def to_grid(scales: Array, per_octave: int) -> Indices:
    """Nearest grid exponents of positive scales (zeros and overflow go to the ends of the grid)."""
    with np.errstate(divide="ignore"):
        exponent = np.log2(scales.astype(np.float64)) * per_octave
    limit = _LIMIT * per_octave
    grid: Indices = np.clip(np.rint(exponent), -limit, limit).astype(np.int32)
    return grid


def from_grid(exponents: Indices, per_octave: int) -> Floats:
    """``2 ** (exponent / per_octave)`` as float32, exact to the bit on any machine."""
    fraction = _FRACTIONS[per_octave][exponents % per_octave]
    return np.ldexp(fraction, exponents // per_octave).astype(np.float32)


def encode_grid(exponents: Indices) -> bytes:
    """Exponents -> bytes; nothing at all where every one is zero."""
    if not exponents.any():
        return b""
    middle = int(np.median(exponents))
    coded = encode_ints((exponents - middle).reshape(-1, 1), classes=None)
    return middle.to_bytes(2, "little", signed=True) + coded


def decode_grid(data: bytes, count: int, per_octave: int) -> Indices:
    """Inverse of `encode_grid` for `count` exponents."""
    if not data:
        return np.zeros(count, np.int32)
    exponents = decode_ints(data[2:], count, 1).reshape(-1).astype(np.int64)
    exponents += int.from_bytes(data[:2], "little", signed=True)
    if np.abs(exponents).max(initial=0) > _LIMIT * per_octave:
        raise FormatError("a scale lies outside the grid")
    return exponents.astype(np.int32)
