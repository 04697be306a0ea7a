"""Positive scales as whole steps of a logarithmic grid: a few bits each, the same bits everywhere."""

from __future__ import annotations

import numpy as np

from waterfill.coding import gamma
from waterfill.coding.entropy import decode_ints, encode_ints
from waterfill.coding.rounding import Indices
from waterfill.types import Array, Floats, FormatError

# Correctly rounded constants, not libm's pow: a decoder must not depend on the machine.
_FRACTIONS = {
    4: np.array([1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429], np.float32),
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
MODELLED = 255
LIMIT = 126  # octaves either side of one: what float32 holds


def to_grid(scales: Array, per_octave: int) -> Indices:
    """Nearest grid exponents of positive scales (zeros and overflow go to the ends of the grid)."""
    with np.errstate(divide="ignore"):
        exponent = np.log2(scales.astype(np.float64)) * per_octave
    limit = LIMIT * per_octave
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
    around = exponents - middle
    size = gamma.zigzag(around)
    order, bits = gamma.best_order(size)
    coded = bytes([order]) + gamma.pack(size, order)
    if bits > 64:  # a model of its own takes a dozen bytes
        modelled = bytes([MODELLED]) + encode_ints(around.reshape(-1, 1), classes=None)
        coded = min(coded, modelled, key=len)
    return gamma.varint(int(gamma.zigzag(middle))) + coded


def decode_grid(data: bytes | memoryview, count: int, limit: int) -> Indices:
    """Inverse of `encode_grid` for `count` exponents of at most `limit` either way."""
    if not data:
        return np.zeros(count, np.int32)
    source = np.frombuffer(data, np.uint8)
    zigzag, at = gamma.read_varint(source, 0)
    if at >= source.size:
        raise FormatError("scales are cut short")
    kind, at = int(source[at]), at + 1
    if kind == MODELLED:
        exponents = decode_ints(source[at:], count, 1).reshape(-1).astype(np.int64)
    elif kind <= gamma.MAX_ORDER and count <= 8 * source.size:
        size, end = gamma.unpack(source, at, count, kind)
        exponents = gamma.unzigzag(size)
        if end != source.size:
            raise FormatError("bytes left over after the scales")
    else:
        raise FormatError("scales of an unknown kind, or cut short")
    exponents = exponents + int(gamma.unzigzag(zigzag))
    if np.abs(exponents).max(initial=0) > limit:
        raise FormatError("a scale lies outside the grid")
    return exponents.astype(np.int32)
