"""The Huffman coder in numpy alone: what every native kernel must agree with, and their stand-in.

Vectorised over segments; a Python loop over the symbols of one. See ``docs/format/huffman.md`` for
the bitstream. How long the codes are is decided here, for the native encoder too.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import gamma
from waterfill.types import FormatError

__all__ = ["block_sizes", "code_lengths", "decode", "encode", "pack_lengths", "segments_in"]

LONGEST = 11
ENTRIES = 1 << LONGEST
BLOCK = 1 << 16
DIVIDED = 1 << 12
SEGMENTS = 5
FIRST_LENGTH = 8
UNUSED = 3
MOST_UNARY = 21

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]


def code_lengths(counts: Ints) -> Bytes:
    """Bits of each byte's code, at most 11, that take the fewest bits in all.

    By package-merge: L. L. Larmore, D. S. Hirschberg, *A fast algorithm for optimal length-limited
    Huffman codes*, J. ACM, 1990.

    Parameters
    ----------
    counts : int64 (256,)
        Occurrences, at least two of them positive.

    Returns
    -------
    uint8 (256,)
        Zero where a byte does not occur.
    """
    used = np.flatnonzero(counts)
    if used.size < 2:
        raise ValueError("Huffman: there are no codes for fewer than two values")
    used = used[np.argsort(counts[used], kind="stable")]
    leaves = counts[used].astype(np.int64)
    weights, is_leaf = leaves, [np.ones(used.size, bool)]
    for _ in range(LONGEST - 1):
        pairs = weights[: weights.size // 2 * 2].reshape(-1, 2).sum(axis=1)
        weights = np.concatenate([leaves, pairs])
        order = np.argsort(weights, kind="stable")
        weights = weights[order]
        is_leaf.append(order < used.size)
    lengths = np.zeros(256, np.uint8)
    taken = 2 * used.size - 2
    for row in reversed(is_leaf):
        chosen = int(np.count_nonzero(row[:taken]))
        lengths[used[:chosen]] += 1
        taken = 2 * (taken - chosen)
    return lengths


def block_sizes(n: int) -> list[int]:
    """Symbols in each block of a stream of n."""
    return [min(BLOCK, n - first) for first in range(0, n, BLOCK)]


def segments_in(count: int) -> int:
    """How many segments a block of so many symbols is cut into."""
    return 1 if count < DIVIDED else SEGMENTS


def _segment_sizes(n: int) -> Ints:
    """Symbols in each segment of each block."""
    sizes = []
    for count in block_sizes(n):
        each = -(-count // segments_in(count))
        sizes += [min(each, count - first) for first in range(0, count, each)]
    return np.array(sizes, np.int64)


def pack_lengths(lengths: Bytes) -> bytes:
    """The range of bytes that have a code, and the length of each of theirs."""
    used = np.flatnonzero(lengths)
    first, last = int(used[0]), int(used[-1])
    numbers = np.full(last - first + 1, UNUSED)
    steps = gamma.zigzag(np.diff(lengths[used].astype(np.int64), prepend=FIRST_LENGTH))
    numbers[used - first] = steps + (steps >= UNUSED)
    return bytes([first, last]) + gamma.pack_unary(numbers)


def _unpack_lengths(data: Bytes) -> tuple[Bytes, int]:
    """Inverse of `pack_lengths`; and the byte where the lengths end."""
    if data.size < 2 or data[0] >= data[1]:
        raise FormatError("Huffman: no range of symbols")
    first, last = int(data[0]), int(data[1])
    numbers, at = gamma.unpack_unary(data, 2, last - first + 1, MOST_UNARY)
    if gamma.pack_unary(numbers) != data[2:at].tobytes():
        raise FormatError("Huffman: bits after the code lengths")
    used = np.flatnonzero(numbers != UNUSED)
    steps = gamma.unzigzag(numbers[used] - (numbers[used] > UNUSED))
    values = FIRST_LENGTH + np.cumsum(steps)
    if ((values < 1) | (values > LONGEST)).any():
        raise FormatError("Huffman: a code of no or too many bits")
    lengths = np.zeros(256, np.uint8)
    lengths[first + used] = values
    if (ENTRIES >> values).sum() != ENTRIES:
        raise FormatError("Huffman: the codes are not complete")
    return lengths, at


def _canonical(lengths: Bytes) -> tuple[Ints, Bytes]:
    """Each byte's code, first bit lowest; and the byte whose code begins each 11 bits."""
    used = np.flatnonzero(lengths)
    used = used[np.argsort(lengths[used], kind="stable")]
    # Counted from the first bit as the highest, each byte owns a run of the numbers of 11 bits.
    spans = ENTRIES >> lengths[used].astype(np.int64)
    number = np.arange(ENTRIES)
    turned = np.zeros(ENTRIES, np.int64)
    for bit in range(LONGEST):
        turned |= (number >> bit & 1) << (LONGEST - 1 - bit)
    codes = np.zeros(256, np.int64)
    codes[used] = turned[np.cumsum(spans) - spans]
    return codes, np.repeat(used, spans)[turned].astype(np.uint8)


def encode(symbols: Bytes, lengths: Bytes) -> bytes:
    """The same bytes as the native encoder."""
    codes, _ = _canonical(lengths)
    coded, ends = [], np.cumsum(_segment_sizes(symbols.size))
    for end, begin in zip(ends, [0, *ends[:-1]], strict=True):
        segment = symbols[begin:end]
        bits = lengths[segment].astype(np.int64)
        if not bits.all():
            raise ValueError("Huffman: a symbol without a code")
        place = np.cumsum(bits) - bits
        shifted = codes[segment] << (place & 7)
        out = np.zeros((int(bits.sum()) + 7) // 8 + 2, np.int64)
        for byte in range(3):
            np.add.at(out, (place >> 3) + byte, shifted >> (8 * byte) & 255)
        coded.append(out[:-2].astype(np.uint8).tobytes())
    sizes = np.array([len(c) for c in coded[:-1]], "<u2")
    return pack_lengths(lengths) + sizes.tobytes() + b"".join(coded)


def decode(data: Bytes, out: Bytes) -> None:
    """Fill `out` (n,) from a stream; FormatError on bytes that no encoder wrote."""
    if not out.size:
        if data.size:
            raise FormatError("Huffman: bytes where there are no symbols")
        return
    lengths, at = _unpack_lengths(data)
    sizes = _segment_sizes(out.size)
    begins, ends = _bounds(data, at, sizes.size)
    _, symbols = _canonical(lengths)
    bits = lengths[symbols].astype(np.int64)
    # The 24 bits from each byte on; past the end there are zeros.
    padded = np.concatenate([data, np.zeros(3, np.uint8)]).astype(np.int32)
    reach = padded[:-2] | padded[1:-1] << 8 | padded[2:] << 16
    place = 8 * begins
    first = np.cumsum(sizes) - sizes
    # Segments in order of length: those that still have symbols are a prefix.
    order = np.argsort(-sizes, kind="stable")
    place, first = place[order], first[order]
    running = np.searchsorted(-sizes[order], -np.arange(int(sizes.max())), side="left")
    for step, count in enumerate(running):
        here = place[:count]
        code = reach[np.minimum(here >> 3, data.size)] >> (here & 7) & (ENTRIES - 1)
        out[first[:count] + step] = symbols[code]
        here += bits[code]
    left = 8 * ends[order] - place
    if (left < 0).any():
        raise FormatError("Huffman: bits run out")
    if (left > 7).any() or (reach[place >> 3] >> (place & 7) & (1 << left) - 1).any():
        raise FormatError("Huffman: bits left over")


def _bounds(data: Bytes, at: int, count: int) -> tuple[Ints, Ints]:
    """The bytes where each segment begins and ends, from its lengths at `at`."""
    first = at + 2 * (count - 1)
    if first > data.size:
        raise FormatError("Huffman: lengths of segments cut short")
    ends = np.empty(count, np.int64)
    ends[:-1] = first + np.cumsum(data[at:first].view("<u2"))
    ends[-1] = data.size
    begins = np.concatenate([[first], ends[:-1]])
    if (begins > ends).any():
        raise FormatError("Huffman: a segment is cut short")
    return begins, ends
