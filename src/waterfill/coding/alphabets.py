"""Which integers get a symbol of their own, and what becomes of the others.

An alphabet is a run of neighbouring values, up to 255 of them with one symbol more as an escape;
escaped values travel in a list of their own, in the order in which their escapes are coded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import gamma, rans
from waterfill.coding.models import Alphabet, fit
from waterfill.types import FormatError

__all__ = ["RARE", "choose_alphabet", "pack_escapes", "read_escapes", "to_symbols"]

# A symbol rarer than this takes more from the others, by its frequency of at least 1/4096, than it
# would cost as one of a rest: n / 4096 * log2(e) bits against 8 or so an occurrence.
RARE = 23_000
# An alphabet of 32 decodes several times faster: worth so much in bytes.
TOLERANCE = 1.001
CHUNK = 1 << 20
REACH = 1 << 15

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]


def _chunks(count: int) -> list[slice]:
    return [slice(at, at + CHUNK) for at in range(0, count, CHUNK)]


def choose_alphabet(values: NDArray[Any], least: int, most: int) -> Alphabet:
    """The alphabet with the fewest estimated bytes, of those that a stream can have."""
    if most - least < rans.FAST_ALPHABET:
        return Alphabet(least, most - least + 1, False)
    # Values far from the bulk are all alike here: they will be escaped in any case.
    sample = np.sort(values.reshape(-1)[:: values.size // 4096 + 1])
    middle = int(sample[sample.size // 2])
    first, last = max(least, middle - REACH), min(most, middle + REACH)
    counts = np.zeros(last - first + 1, np.int64)
    flat = values.reshape(-1)
    for part in _chunks(flat.size):
        near = np.clip(flat[part].astype(np.int64), first, last) - first
        counts += np.bincount(near, minlength=counts.size)
    sums = np.cumsum(np.concatenate([[0], counts]))
    common = np.flatnonzero(counts > values.size // RARE)
    spans = [(first, last, True)] if most - least < rans.MAX_ALPHABET else []
    if common.size:
        spans.append((first + int(common[0]), first + int(common[-1]), False))
    options = []
    for size in (rans.FAST_ALPHABET, rans.MAX_ALPHABET):
        windows = {(a, b - a + 1) for a, b, whole in spans if b - a + 1 <= size - (not whole)}
        width = min(size - 1, counts.size)
        windows.add((first + int(np.argmax(sums[width:] - sums[:-width])), width))
        for low, direct in windows:
            start = low - first
            rest = counts.copy()
            rest[start : start + direct] = 0
            escaped = np.flatnonzero(rest)
            choice = Alphabet(low, direct + (escaped.size > 0), escaped.size > 0)
            table = counts[start : start + direct]
            table = np.append(table, rest.sum()) if escaped.size else table
            excess = _excess(escaped, start, start + direct)
            bits = float(fit(table[None], choice).bits[0])
            bits += gamma.best_order(excess, rest[escaped])[1]
            handicap = 1.0 if choice.size <= rans.FAST_ALPHABET else TOLERANCE
            options.append((handicap * bits, choice.size, low, choice))
    return min(options)[-1]


def _excess(values: Ints, low: int, end: int) -> Ints:
    """Values outside [low, end) as 0, 1, 2, ...: odd below, even above, by distance."""
    return np.where(values < low, 2 * (low - 1 - values) + 1, 2 * (values - end))


def to_symbols(values: NDArray[Any], alphabet: Alphabet) -> Bytes:
    """Symbols of a matrix."""
    symbols = np.empty(values.size, np.uint8)
    flat = values.reshape(-1)
    for part in _chunks(flat.size):
        place = flat[part].astype(np.int64) - alphabet.low
        if alphabet.escape:
            place[(place < 0) | (place >= alphabet.direct)] = alphabet.direct
        symbols[part] = place
    return symbols.reshape(values.shape)


def pack_escapes(escaped: Ints, alphabet: Alphabet) -> bytes:
    """Number of escaped values, order of their codes, and the codes."""
    excess = _excess(escaped, alphabet.low, alphabet.low + alphabet.direct)
    order = gamma.best_order(excess)[0]
    return gamma.varint(escaped.size) + bytes([order]) + gamma.pack(excess, order)


def read_escapes(source: Bytes, at: int, alphabet: Alphabet, most: int) -> tuple[Ints, int]:
    """Inverse of `pack_escapes`, from byte `at`, of at most `most` values; and where they end."""
    count, at = gamma.read_varint(source, at)
    if at >= source.size or source[at] > gamma.MAX_ORDER or count > most or count > 8 * source.size:
        raise FormatError("escaped values are cut short")
    excess, at = gamma.unpack(source, at + 1, count, int(source[at]))
    below = alphabet.low - 1 - (excess >> 1)
    values = np.where(excess & 1, below, alphabet.low + alphabet.direct + (excess >> 1))
    if values.size and (int(values.min()) < -(2**31) or int(values.max()) >= 2**31):
        raise FormatError("an escaped value does not fit in 32 bits")
    return values, at
