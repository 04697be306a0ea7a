"""Entropy coding of integers and of bytes: what codecs call.

Don't overthink it: `encode_ints` for quantised weights (a matrix whose columns may differ in
scale), `encode_bytes` for a plane of floats' exponents or anything else that is bytes. Both choose
alphabet, classes and models by counting real bytes, and both store what does not compress.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import gamma, rans
from waterfill.coding.classes import choose_classes, pack_classes, read_classes
from waterfill.coding.models import Alphabet, fit, read_models
from waterfill.types import FormatError

__all__ = ["decode_bytes", "decode_ints", "encode_bytes", "encode_ints"]

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]

STORED, CONSTANT, CODED, FLAT, ESCAPES = 0, 1, 2, 4, 8
# A small alphabet decodes several times faster: worth so much in bytes.
INTS_TOLERANCE, BYTES_TOLERANCE = 1.001, 1.002
CHUNK = 1 << 20
REACH = 1 << 15


def encode_ints(
    values: NDArray[Any], classes: Bytes | Literal["auto"] | None = "auto", threads: int | None = None
) -> bytes:
    """Code a matrix of signed integers of any size.

    Parameters
    ----------
    values : integer (rows, cols)
        Within int32. Cheapest near zero, or near any one value.
    classes : "auto", None or uint8 (cols,)
        Columns of one class share a model. "auto" groups columns by magnitude wherever that saves
        bytes; None takes all columns alike.
    threads : int, optional
        Threads over blocks; the bytes do not depend on it.

    Returns
    -------
    bytes
        Self-contained but for the shape, which the reader must know.
    """
    rows, cols = values.shape
    if not values.size:
        return b""
    least, most = int(values.min()), int(values.max())
    if least < -(2**31) or most >= 2**31:
        raise ValueError("integers must fit in 32 bits")
    if least == most:
        return bytes([CONSTANT]) + gamma.varint(int(gamma.zigzag(least)))
    alphabet = _choose_alphabet(values, least, most)
    symbols, escaped = _to_symbols(values, alphabet)
    if isinstance(classes, str):
        ids = choose_classes(values, symbols, alphabet)
    else:
        ids = None if classes is None else np.unique(classes, return_inverse=True)[1].astype(np.uint8)
    n_classes = 1 if ids is None else int(ids.max()) + 1
    if n_classes == 1:
        ids, symbols = None, symbols.reshape(1, -1)
    counts = rans.histogram(symbols, ids, n_classes)[:, : alphabet.size]
    models = fit(counts, alphabet)
    lanes = min(rans.choose_lanes(values.size), 1 << (symbols.shape[1] - 1).bit_length())
    kind = CODED | (FLAT if ids is None else 0) | (ESCAPES if alphabet.escape else 0)
    parts = [
        bytes([kind]),
        gamma.varint(int(gamma.zigzag(alphabet.low))),
        bytes([alphabet.size - 1]),
        b"" if ids is None else pack_classes(ids, n_classes),
        models.data,
        _pack_escapes(escaped, alphabet) if alphabet.escape else b"",
        rans.encode(symbols, ids, models.freqs, lanes, threads),
    ]
    return b"".join(parts)


def decode_ints(
    data: rans.Buffer, rows: int, cols: int, threads: int | None = None
) -> NDArray[np.int32]:
    """Inverse of `encode_ints`: int32 (rows, cols); FormatError on bytes that lie."""
    source = np.frombuffer(data, np.uint8)
    if rows * cols == 0:
        if source.size:
            raise FormatError("bytes where there are no integers")
        return np.zeros((rows, cols), np.int32)
    kind, at = _kind(source), 1
    low, at = gamma.read_varint(source, at)
    low = _int32(int(gamma.unzigzag(low)))
    if kind == CONSTANT:
        if at != source.size:
            raise FormatError("bytes left over after a constant")
        return np.full((rows, cols), low, np.int32)
    if kind & ~(FLAT | ESCAPES) != CODED or at >= source.size:
        raise FormatError(f"integers of an unknown kind {kind}")
    alphabet = Alphabet(low, int(source[at]) + 1, bool(kind & ESCAPES))
    _int32(low + alphabet.direct)
    at += 1
    ids, n_classes = None, 1
    if not kind & FLAT:
        ids, n_classes, at = read_classes(source, at, cols)
    freqs, at = read_models(source, at, n_classes, alphabet.size, alphabet)
    escaped = np.zeros(0, np.int64)
    if alphabet.escape:
        escaped, at = _read_escapes(source, at, alphabet, rows * cols)
    shape = (1, rows * cols) if kind & FLAT else (rows, cols)
    symbols = rans.decode(source[at:], *shape, ids, freqs, threads)
    out = symbols.astype(np.int32)
    if alphabet.escape:
        where = np.flatnonzero(symbols == alphabet.size - 1)
        if where.size != escaped.size:
            raise FormatError("escapes and their values differ in number")
    out += np.int32(low)
    if escaped.size:
        out.reshape(-1)[where] = escaped
    return out.reshape(rows, cols)


def encode_bytes(plane: Bytes, threads: int | None = None) -> bytes:
    """Code bytes whose values are unevenly frequent; stores them where coding does not pay.

    Parameters
    ----------
    plane : uint8 (n,)
    threads : int, optional
        Threads over blocks; the bytes do not depend on it.
    """
    plane = np.ascontiguousarray(plane, np.uint8).reshape(1, -1)
    n = plane.size
    if not n:
        return b""
    counts = rans.histogram(plane)[0]
    present = np.flatnonzero(counts)
    if present.size == 1:
        return bytes([CONSTANT, present[0]])
    direct, escape = present, False
    if present.size > rans.FAST_ALPHABET:
        top = np.sort(np.argsort(-counts, kind="stable")[: rans.FAST_ALPHABET - 1])
        rest = n - int(counts[top].sum())
        fast = float(fit(np.append(counts[top], rest)[None]).bits[0]) + 8 * rest
        if fast <= BYTES_TOLERANCE * float(fit(counts[present][None]).bits[0]):
            direct, escape = top, True
    to_symbol = np.full(256, direct.size if escape else 0, np.uint8)
    to_symbol[direct] = np.arange(direct.size)
    symbols = np.frombuffer(plane.tobytes().translate(to_symbol.tobytes()), np.uint8).reshape(1, -1)
    rest_count = n - int(counts[direct].sum())
    of_symbol = np.append(counts[direct], rest_count) if escape else counts[direct]
    models = fit(of_symbol[None])
    coded = b"".join(
        (
            bytes([CODED | (ESCAPES if escape else 0), direct.size - 1, direct[0]]),
            gamma.pack(np.diff(direct) - 1, 0),
            models.data,
            plane[symbols == direct.size].tobytes() if escape else b"",
            rans.encode(symbols, None, models.freqs, rans.choose_lanes(n), threads),
        )
    )
    return coded if len(coded) <= n else bytes([STORED]) + plane.tobytes()


def decode_bytes(data: rans.Buffer, n: int, threads: int | None = None) -> Bytes:
    """Inverse of `encode_bytes`: uint8 (n,); FormatError on bytes that lie."""
    source = np.frombuffer(data, np.uint8)
    if not n:
        if source.size:
            raise FormatError("bytes where there are none to decode")
        return np.zeros(0, np.uint8)
    kind = _kind(source)
    if kind == STORED:
        if source.size != n + 1:
            raise FormatError(f"{source.size - 1} stored bytes where {n} were promised")
        return source[1:].copy()
    if kind == CONSTANT:
        if source.size != 2:
            raise FormatError("a constant takes one byte")
        return np.full(n, source[1], np.uint8)
    if kind & ~ESCAPES != CODED or source.size < 3:
        raise FormatError(f"bytes of an unknown kind {kind}")
    direct = int(source[1]) + 1
    gaps, at = gamma.unpack(source, 3, direct - 1, 0)
    values = int(source[2]) + np.concatenate([[0], np.cumsum(gaps + 1)])
    if values[-1] > 255:
        raise FormatError("a value above 255")
    lut = values.astype(np.uint8)
    escape = bool(kind & ESCAPES)
    if escape and direct == 256:
        raise FormatError("nothing is left to escape")
    freqs, at = read_models(source, at, 1, direct + escape)
    if not escape:
        return rans.decode(source[at:], 1, n, None, freqs, threads, lut).reshape(-1)
    # The escape is decoded to a byte that no symbol stands for, and found again by it.
    marker = np.setdiff1d(np.arange(256), values)[0]
    count, at = gamma.read_varint(source, at)
    if count > source.size - at:
        raise FormatError("escaped bytes are cut short")
    escaped, at = source[at : at + count], at + count
    out = rans.decode(source[at:], 1, n, None, freqs, threads, np.append(lut, np.uint8(marker)))
    where = np.flatnonzero(out == marker)
    if where.size != count:
        raise FormatError("escapes and their values differ in number")
    out = out.reshape(-1)
    out[where] = escaped
    return out


def _kind(source: Bytes) -> int:
    if not source.size:
        raise FormatError("empty where values were promised")
    return int(source[0])


def _int32(value: int) -> int:
    if not -(2**31) <= value < 2**31:
        raise FormatError(f"{value} does not fit in 32 bits")
    return value


def _chunks(values: NDArray[Any]) -> list[slice]:
    step = max(1, CHUNK // max(values.shape[1], 1))
    return [slice(row, row + step) for row in range(0, len(values), step)]


def _choose_alphabet(values: NDArray[Any], least: int, most: int) -> Alphabet:
    """The alphabet with the fewest estimated bytes, of those that a stream can have."""
    if most - least < rans.FAST_ALPHABET:
        return Alphabet(least, most - least + 1, False)
    # Values far from the bulk are all alike here: they will be escaped in any case.
    middle = int(np.median(values[:: max(1, len(values) // 64)]))
    first, last = max(least, middle - REACH), min(most, middle + REACH)
    counts = np.zeros(last - first + 1, np.int64)
    for part in _chunks(values):
        near = np.clip(values[part].astype(np.int64), first, last) - first
        counts += np.bincount(near.reshape(-1), minlength=counts.size)
    best, fewest = None, np.inf
    for size in (rans.FAST_ALPHABET, rans.MAX_ALPHABET):
        if most - least < size:
            choice, start = Alphabet(least, most - least + 1, False), least - first
        else:
            sums = np.cumsum(np.concatenate([[0], counts]))
            width = min(size - 1, counts.size)
            start = int(np.argmax(sums[width:] - sums[:-width]))
            choice = Alphabet(first + start, width + 1, True)
        inside = counts[start : start + choice.direct]
        rest = counts.copy()
        rest[start : start + choice.direct] = 0
        places = np.flatnonzero(rest)
        excess = _excess(places, start, start + choice.direct)
        share = np.append(inside, rest.sum())
        share = share[share > 0] / counts.sum()
        bits = -counts.sum() * float((share * np.log2(share)).sum())
        bits += gamma.best_order(excess, rest[places])[1]
        if bits * INTS_TOLERANCE < fewest:
            best, fewest = choice, bits
    assert best is not None
    return best


def _excess(values: Ints, low: int, end: int) -> Ints:
    """Values outside [low, end) as 0, 1, 2, ...: odd below, even above, by distance."""
    return np.where(values < low, 2 * (low - 1 - values) + 1, 2 * (values - end))


def _to_symbols(values: NDArray[Any], alphabet: Alphabet) -> tuple[Bytes, Ints]:
    """Symbols of a matrix, and the values that have none of their own."""
    symbols = np.empty(values.shape, np.uint8)
    escaped = [np.zeros(0, np.int64)]
    for part in _chunks(values):
        place = values[part].astype(np.int64) - alphabet.low
        if alphabet.escape:
            outside = (place < 0) | (place >= alphabet.direct)
            escaped.append(place[outside] + alphabet.low)
            place[outside] = alphabet.direct
        symbols[part] = place
    return symbols, np.concatenate(escaped)


def _pack_escapes(escaped: Ints, alphabet: Alphabet) -> bytes:
    excess = _excess(escaped, alphabet.low, alphabet.low + alphabet.direct)
    order = gamma.best_order(excess)[0]
    return gamma.varint(escaped.size) + bytes([order]) + gamma.pack(excess, order)


def _read_escapes(source: Bytes, at: int, alphabet: Alphabet, most: int) -> tuple[Ints, int]:
    count, at = gamma.read_varint(source, at)
    if at >= source.size or source[at] > 30 or count > most or count > 8 * source.size:
        raise FormatError("escaped values are cut short")
    excess, at = gamma.unpack(source, at + 1, count, int(source[at]))
    below = alphabet.low - 1 - (excess >> 1)
    values = np.where(excess & 1, below, alphabet.low + alphabet.direct + (excess >> 1))
    if values.size and (int(values.min()) < -(2**31) or int(values.max()) >= 2**31):
        raise FormatError("an escaped value does not fit in 32 bits")
    return values, at
