"""The delta coder's walk in numpy alone: what every native kernel must agree with, and its stand-in.

See ``docs/format/delta.md`` for contexts, gaps, sizes and their symbols.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from waterfill.types import DTYPES, FormatError

__all__ = ["BLOCK", "GAP_SYMBOLS", "Packed", "Words", "apply", "pack", "survey"]

BLOCK = 1 << 20
DIRECT = 16  # values that are symbols of their own; greater ones: an octave and its half
GAP_SYMBOLS = 48
# To choose contexts one run of elements in up to so many is counted; a small tensor is counted whole.
RUN, MOST_EVERY, COUNTED = 1024, 16, 1 << 16

Array = NDArray[Any]
Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Wide = NDArray[np.uint64]


@dataclass(frozen=True)
class Words:
    """How a dtype's bits are ordered, and where its exponent lies.

    Attributes
    ----------
    width : bytes of a word
    signed : whether the top bit is the sign of a magnitude (floats); else words are integers
    shift, mask : the exponent is ``word >> shift & mask``; a mask of 0 means one context for all
    offset : subtracted from the exponent, which is then held to 0..255
    """

    width: int
    signed: bool = False
    shift: int = 0
    mask: int = 0
    offset: int = 0

    @classmethod
    def of(cls, dtype: str) -> Words:
        """What is known of a dtype."""
        known = {
            "F64": cls(8, True, 52, 0x7FF, 831),
            "F32": cls(4, True, 23, 0xFF),
            "F16": cls(2, True, 10, 0x1F),
            "BF16": cls(2, True, 7, 0xFF),
            "F8_E4M3": cls(1, True, 3, 0xF),
            "F8_E5M2": cls(1, True, 2, 0x1F),
        }
        return known.get(dtype) or cls(DTYPES[dtype].itemsize)

    @property
    def unsigned(self) -> np.dtype[Any]:
        """The words as numpy holds them."""
        return np.dtype(f"<u{self.width}")

    @property
    def for_core(self) -> tuple[int, bool, int, int, int]:
        """As the native core takes it."""
        return self.width, self.signed, self.shift, self.mask, self.offset

    @property
    def size_symbols(self) -> int:
        """How many symbols the size of a change may need."""
        return DIRECT + 2 * (8 * self.width - 4)

    def exponents(self, words: Array) -> Bytes:
        """The byte by which an element's context is chosen."""
        if not self.mask:
            return np.zeros(words.size, np.uint8)
        exponent = (words >> words.dtype.type(self.shift)).astype(np.int64) & self.mask
        held: Bytes = np.clip(exponent - self.offset, 0, 255).astype(np.uint8)
        return held

    def differences(self, old: Array, new: Array) -> Wide:
        """Steps from old to new in the order of values, away from zero first: 1, 2, 3, ... ."""
        top = old.dtype.type(8 * self.width - 1)
        one = old.dtype.type(1)
        if self.signed:
            sign = one << top
            flip = old & sign
            x = new ^ flip
            step = np.where(x & sign, ~x, x ^ sign) - (old ^ flip ^ sign)
        else:
            step = new - old
        spread = np.where(step >> top, ~old.dtype.type(0), old.dtype.type(0))
        zigzag: Wide = ((step << one) ^ spread).astype(np.uint64)
        return zigzag

    def step(self, old: Array, differences: Wide) -> Array:
        """Inverse of `differences`: the new words."""
        z = differences.astype(old.dtype)
        one = old.dtype.type(1)
        step = (z >> one) ^ (~(z & one) + one)
        if not self.signed:
            moved: Array = old + step
            return moved
        sign = one << old.dtype.type(8 * self.width - 1)
        flip = old & sign
        x = (old ^ flip ^ sign) + step
        new: Array = np.where(x & sign, x ^ sign, ~x) ^ flip
        return new


def bit_lengths(values: Wide) -> Ints:
    """Bits of each number, exact for all 64."""
    length = np.zeros(values.shape, np.int64)
    rest = values.copy()
    for step in (32, 16, 8, 4, 2, 1):
        large = rest >> np.uint64(step) > 0
        length += step * large
        rest = np.where(large, rest >> np.uint64(step), rest)
    return length + (rest > 0)


def to_symbols(values: Wide) -> tuple[Bytes, Ints]:
    """Symbols of numbers, and the number of bits below that go raw."""
    length = bit_lengths(values)
    width = np.maximum(length - 2, 0)
    half = (values >> width.astype(np.uint64)).astype(np.int64) & 1
    octave = DIRECT + 2 * (length - 5) + half
    large = length > 4
    direct = np.where(large, 0, values).astype(np.int64)
    return np.where(large, octave, direct).astype(np.uint8), np.where(large, width, 0)


def raw_widths(symbols: Bytes) -> Ints:
    """Bits that follow each symbol."""
    return np.where(symbols < DIRECT, 0, (symbols.astype(np.int64) - DIRECT) // 2 + 3)


def from_symbols(symbols: Bytes, raw: Wide) -> Wide:
    """Inverse of `to_symbols`, given the bits below."""
    width = raw_widths(symbols).astype(np.uint64)
    top = np.uint64(2) | (symbols & 1).astype(np.uint64)
    return np.where(symbols < DIRECT, symbols.astype(np.uint64), (top << width) | raw)


def survey(old: Array, new: Array, words: Words) -> tuple[Ints, Ints]:
    """Elements of each exponent, and its changes by the symbol of their size: from a sample."""
    every = min(MOST_EVERY, max(1, old.size // COUNTED))
    runs = np.arange(0, old.size, RUN * every)[:, None] + np.arange(RUN)
    seen = runs[runs < old.size]
    x, y = old[seen], new[seen]
    elements = np.bincount(words.exponents(x), minlength=256) * every
    x, y = x[x != y], y[x != y]
    symbols = to_symbols(words.differences(x, y) - np.uint64(1))[0]
    place = words.exponents(x).astype(np.int64) * words.size_symbols + symbols
    sizes = np.bincount(place, minlength=256 * words.size_symbols).reshape(256, -1) * every
    return elements.astype(np.int64), sizes.astype(np.int64)


def _by_context(old: Array, words: Words, thresholds: Bytes) -> Iterator[Ints]:
    """Places of the elements of each context."""
    context = np.searchsorted(thresholds, words.exponents(old), side="right")
    for k in range(thresholds.size + 1):
        yield np.flatnonzero(context == k)


class Packed(NamedTuple):
    """Changes as symbols.

    Attributes
    ----------
    counts : int64 (contexts, blocks)
    gap_counts, size_counts : int64 (contexts, 256), how often a context has each symbol
    gaps, sizes : uint8, context by context, each block by block
    raw : bytes, block by block
    """

    counts: Ints
    gap_counts: Ints
    size_counts: Ints
    gaps: Bytes
    sizes: Bytes
    raw: Bytes


def pack(old: Array, new: Array, words: Words, thresholds: Bytes) -> Packed:
    """The symbols of all changes."""
    blocks = -(-old.size // BLOCK)
    contexts = thresholds.size + 1
    counts = np.zeros((contexts, blocks), np.int64)
    symbols: list[list[Array]] = [[] for _ in range(contexts)]
    raw = [b""]
    for block in range(blocks):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        x, y = old[part], new[part]
        fields, widths = [], []
        for k, places in enumerate(_by_context(x, words, thresholds)):
            rank = np.flatnonzero(x[places] != y[places])
            at = places[rank]
            gap = (np.diff(rank, prepend=-1) - 1).astype(np.uint64)
            values = np.stack([gap, words.differences(x[at], y[at]) - np.uint64(1)], axis=1)
            found, width = to_symbols(values)
            counts[k, block] = rank.size
            symbols[k].append(found)
            fields.append(values.reshape(-1))
            widths.append(width.reshape(-1))
        raw.append(_pack_bits(np.concatenate(fields), np.concatenate(widths)))
    joined = [np.concatenate(parts) for parts in symbols]
    gap_counts, size_counts = (
        np.stack([np.bincount(own[:, i], minlength=256) for own in joined]) for i in (0, 1)
    )
    gaps, sizes = (np.ascontiguousarray(np.concatenate(joined)[:, i]) for i in (0, 1))
    flat = np.frombuffer(b"".join(raw), np.uint8)
    return Packed(counts, gap_counts, size_counts, gaps, sizes, flat)


def _pack_bits(fields: Wide, widths: Ints) -> bytes:
    bits = np.zeros(int(widths.sum()), np.uint8)
    starts = np.cumsum(widths) - widths
    for weight in range(int(widths.max(initial=0))):
        wide = np.flatnonzero(widths > weight)
        bits[starts[wide] + weight] = (fields[wide] >> np.uint64(weight)).astype(np.uint8) & 1
    return np.packbits(bits, bitorder="little").tobytes()


def _unpack_bits(raw: Bytes, widths: Ints) -> Wide:
    bits = np.unpackbits(raw, bitorder="little")
    total = int(widths.sum())
    if bits[total:].any():
        raise FormatError("delta: the padding after raw bits is not zero")
    starts = np.cumsum(widths) - widths
    fields = np.zeros(widths.size, np.uint64)
    for weight in range(int(widths.max(initial=0))):
        wide = np.flatnonzero(widths > weight)
        fields[wide] |= bits[starts[wide] + weight].astype(np.uint64) << np.uint64(weight)
    return fields


def apply(
    old: Array,
    out: Array,
    words: Words,
    thresholds: Bytes,
    counts: Ints,
    gaps: Bytes,
    sizes: Bytes,
    raw: Bytes,
) -> None:
    """Fill `out` (which may be `old`) with the new words; FormatError on what `pack` never made."""
    ends = np.cumsum(counts.reshape(-1)).reshape(counts.shape)
    at = 0
    for block in range(counts.shape[1]):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        x, y = old[part].copy(), out[part]
        y[:] = x
        own = np.concatenate(
            [np.arange(e - n, e) for e, n in zip(ends[:, block], counts[:, block], strict=True)]
        )
        symbols = np.stack([gaps[own], sizes[own]], axis=1)
        widths = raw_widths(symbols.reshape(-1))
        end = at + (int(widths.sum()) + 7) // 8
        if end > raw.size:
            raise FormatError("delta: raw bits run out")
        values = from_symbols(symbols.reshape(-1), _unpack_bits(raw[at:end], widths)).reshape(-1, 2)
        at = end
        first = 0
        for k, places in enumerate(_by_context(x, words, thresholds)):
            mine = values[first : first + counts[k, block]]
            first += counts[k, block]
            rank = np.cumsum(mine[:, 0].astype(np.int64) + 1) - 1
            if rank.size and rank[-1] >= places.size:
                raise FormatError("delta: a change beyond its block")
            y[places[rank]] = _moved(x[places[rank]], mine[:, 1], words)
    if at != raw.size:
        raise FormatError("delta: raw bits left over")


def _moved(old: Array, beyond: Wide, words: Words) -> Array:
    # All ones would be a step of nothing: one more wraps to zero.
    if (beyond >= np.uint64((1 << 8 * words.width) - 1)).any():
        raise FormatError("delta: a change of nothing")
    return words.step(old, beyond + np.uint64(1))
