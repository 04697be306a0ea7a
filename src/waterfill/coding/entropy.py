"""Entropy coding of integers and of bytes: what codecs call.

Don't overthink it: `encode_ints` for quantised weights (a matrix whose columns may differ in
scale), `encode_bytes` for a plane of floats' exponents or anything else that is bytes. Both choose
alphabet, classes and models by counting real bytes, and both store what does not compress.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import gamma, native, rans
from waterfill.coding.alphabets import (
    RARE,
    choose_alphabet,
    pack_escapes,
    read_escapes,
    to_symbols,
)
from waterfill.coding.classes import choose_classes, pack_classes, read_classes
from waterfill.coding.models import Alphabet, fit, read_models
from waterfill.types import FormatError

__all__ = ["decode_bytes", "decode_ints", "encode_bytes", "encode_ints"]

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]

STORED, CONSTANT, CODED, FLAT, ESCAPES = 0, 1, 2, 4, 8
# A small alphabet decodes several times faster: worth so much in bytes.
TOLERANCE = 1.002


def encode_ints(
    values: NDArray[Any],
    classes: Bytes | Literal["auto"] | None = "auto",
    threads: int | None = None,
    alphabet: Alphabet | None = None,
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
    alphabet : Alphabet, optional
        That has all values; None looks for the one that takes the fewest bytes.

    Returns
    -------
    bytes
        Self-contained but for the shape, which the reader must know.
    """
    if values.ndim != 2:
        raise ValueError(f"a matrix of integers, please, not an array of {values.ndim} dimensions")
    if not values.size:
        return b""
    least, most = int(values.min()), int(values.max())
    if least < -(2**31) or most >= 2**31:
        raise ValueError("integers must fit in 32 bits")
    if least == most:
        return bytes([CONSTANT]) + gamma.varint(int(gamma.zigzag(least)))
    alphabet = alphabet or choose_alphabet(values, least, most)
    symbols = to_symbols(values, alphabet)
    if isinstance(classes, str):
        ids = choose_classes(values, symbols, alphabet)
    else:
        ids = None if classes is None else _renumber(classes, values.shape[1])
    n_classes = 1 if ids is None else int(ids.max()) + 1
    order, packed_ids = None, b""
    if ids is None or n_classes == 1:
        ids, symbols = None, symbols.reshape(1, -1)
    else:
        packed_ids = pack_classes(ids, n_classes)
        # Side by side, columns of one class are decoded from registers instead of by gathering.
        order = np.argsort(ids, kind="stable")
        ids, symbols = ids[order], np.take(symbols, order, axis=1)
    models = fit(rans.histogram(symbols, ids, n_classes)[:, : alphabet.size], alphabet)
    escapes = b""
    if alphabet.escape:
        places = _unsorted(rans.find(symbols, alphabet.size - 1), order)
        escapes = pack_escapes(values.reshape(-1)[places].astype(np.int64), alphabet)
    lanes = min(rans.choose_lanes(values.size), 1 << (symbols.shape[1] - 1).bit_length())
    kind = CODED | (FLAT if ids is None else 0) | (ESCAPES if alphabet.escape else 0)
    parts = [
        bytes([kind]),
        gamma.varint(int(gamma.zigzag(alphabet.low))),
        bytes([alphabet.size - 1]),
        packed_ids,
        models.data,
        escapes,
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
    _int32(low + max(alphabet.direct, 1) - 1)
    at += 1
    ids, order, n_classes = None, None, 1
    if not kind & FLAT:
        ids, n_classes, at = read_classes(source, at, cols)
        order = np.argsort(ids, kind="stable")
        ids = ids[order]
    freqs, at = read_models(source, at, n_classes, alphabet.size, alphabet)
    escaped = np.zeros(0, np.int64)
    if alphabet.escape:
        escaped, at = read_escapes(source, at, alphabet, rows * cols)
    shape = (1, rows * cols) if kind & FLAT else (rows, cols)
    symbols = rans.decode(source[at:], *shape, ids, freqs, threads)
    out = _to_values(symbols, order, low, threads)
    if alphabet.escape:
        places = rans.find(symbols, alphabet.size - 1)
        if places.size != escaped.size:
            raise FormatError("escapes and their values differ in number")
        out.reshape(-1)[_unsorted(places, order)] = escaped
    return out.reshape(rows, cols)


def _unsorted(places: Ints, order: Ints | None) -> Ints:
    """Places in a matrix whose columns were put in `order` -> places in the matrix as it was."""
    if order is None:
        return places
    return places // order.size * order.size + order[places % order.size]


def _to_values(
    symbols: Bytes, order: Ints | None, low: int, threads: int | None
) -> NDArray[np.int32]:
    if order is None:
        return np.add(symbols, np.int32(low), dtype=np.int32)
    out = np.empty(symbols.shape, np.int32)
    core = native.core()
    if core is None:
        out[:, order] = symbols
        out += np.int32(low)
    else:
        core.place_columns(symbols, order, low, out, threads or native.threads())
    return out


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
    direct, escape = _direct_bytes(counts, present)
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
            gamma.varint(rest_count) + plane[symbols == direct.size].tobytes() if escape else b"",
            rans.encode(symbols, None, models.freqs, rans.choose_lanes(n), threads),
        )
    )
    return coded if len(coded) <= n else bytes([STORED]) + plane.tobytes()


def _direct_bytes(counts: Ints, present: Ints) -> tuple[Ints, bool]:
    """Which bytes get symbols of their own, and whether others are left to escape."""
    by_count = present[np.argsort(-counts[present], kind="stable")]
    common = int(np.count_nonzero(counts[present] > counts.sum() // RARE))
    sizes = {present.size, common, min(common, rans.FAST_ALPHABET - 1)}
    if len(sizes) == 1:
        return present, False
    options = []
    for few in sizes:
        direct = np.sort(by_count[:few])
        rest = int(counts.sum() - counts[direct].sum())
        if rest and few == 256:
            continue
        table = np.append(counts[direct], rest) if rest else counts[direct]
        handicap = 1.0 if table.size <= rans.FAST_ALPHABET else TOLERANCE
        options.append((handicap * (float(fit(table[None]).bits[0]) + 8 * rest), few, rest > 0))
    _, few, escape = min(options)
    return np.sort(by_count[:few]), escape


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
    taken = np.zeros(256, bool)
    taken[values] = True
    marker = int(taken.argmin())
    count, at = gamma.read_varint(source, at)
    if count > source.size - at:
        raise FormatError("escaped bytes are cut short")
    escaped, at = source[at : at + count], at + count
    out = rans.decode(source[at:], 1, n, None, freqs, threads, np.append(lut, np.uint8(marker)))
    where = rans.find(out, marker)
    if where.size != count:
        raise FormatError("escapes and their values differ in number")
    out = out.reshape(-1)
    out[where] = escaped
    return out


def _renumber(classes: Bytes, cols: int) -> Bytes:
    if classes.shape != (cols,):
        raise ValueError(f"classes has shape {classes.shape}, there are {cols} columns")
    ids: Bytes = np.unique(classes, return_inverse=True)[1].astype(np.uint8)
    return ids


def _kind(source: Bytes) -> int:
    if not source.size:
        raise FormatError("empty where values were promised")
    return int(source[0])


def _int32(value: int) -> int:
    if not -(2**31) <= value < 2**31:
        raise FormatError(f"{value} does not fit in 32 bits")
    return value
