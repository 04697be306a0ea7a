"""Interleaved rANS: a matrix of small symbols <-> bytes, one bitstream for every machine.

Use `waterfill.coding.entropy` to code integers or bytes; this is the layer below it, where the
caller has the models already. The bitstream is described in ``docs/format/rans.md``.

Environment
-----------
WATERFILL_SIMD : scalar, avx2, avx512 or numpy forces one implementation; all give the same bytes.
WATERFILL_THREADS : threads to use where the caller names no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import native, rans_numpy
from waterfill.types import FormatError

__all__ = [
    "MAX_ALPHABET",
    "TOTAL",
    "Models",
    "choose_lanes",
    "decode",
    "encode",
    "find",
    "histogram",
]

TOTAL = 4096
MAX_ALPHABET = 256
FAST_ALPHABET = 32

Bytes = NDArray[np.uint8]
Table = NDArray[np.uint16]
Freqs = Sequence[Table] | Table
Buffer = bytes | bytearray | memoryview | Bytes


def encode(
    symbols: Bytes,
    classes: Bytes | None,
    freqs: Freqs,
    lanes: int,
    threads: int | None = None,
) -> bytes:
    """Code a matrix of symbols with given models.

    Parameters
    ----------
    symbols : uint8 (rows, cols)
        Symbols, each below the length of its class's table and of frequency at least 1.
    classes : uint8 (cols,) or None
        Which model each column uses; None where all use the first.
    freqs : sequence of uint16 (A,) or uint16 (classes, A)
        Frequencies of each class, summing to 4096. The longest table sets the slot layout:
        up to 32 symbols the alias layout, which decodes several times faster.
    lanes : int
        Power of two, at most 128: how many states are interleaved (4 bytes each per block).
    threads : int, optional
        Threads over blocks; the bytes do not depend on it.

    Returns
    -------
    bytes
        Empty for an empty matrix. Shape, classes and models are not repeated in it.
    """
    table = _table(freqs)
    symbols = np.ascontiguousarray(symbols, np.uint8)
    classes = _classes(classes, symbols.shape[1])
    core = native.core()
    if core is None:
        return rans_numpy.encode(symbols, classes, table, lanes)
    try:
        coded: bytes = core.rans_encode(symbols, classes, table, lanes, threads or native.threads())
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return coded


def decode(
    data: Buffer,
    rows: int,
    cols: int,
    classes: Bytes | None,
    freqs: Freqs,
    threads: int | None = None,
    lut: Bytes | None = None,
) -> Bytes:
    """Inverse of `encode`.

    Parameters
    ----------
    data : bytes-like
        Exactly what `encode` returned.
    rows, cols, classes, freqs
        As given to `encode`.
    threads : int, optional
        Threads over blocks.
    lut : uint8 (A,), optional
        Output byte of each symbol, for a caller that wants other values than the symbols.

    Returns
    -------
    uint8 (rows, cols)

    Raises
    ------
    FormatError
        On bytes that no encoder wrote: wrong lengths, table sums, or a payload whose lanes do not
        end where an encoder begins.
    """
    table = _table(freqs)
    classes = _classes(classes, cols)
    source = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
    out = np.empty((rows, cols), np.uint8)
    core = native.core()
    if core is None:
        rans_numpy.decode(source, out, classes, table)
        return out if lut is None else lut[out]
    try:
        core.rans_decode(source, out, classes, table, lut, threads or native.threads())
    except RuntimeError as error:
        raise FormatError(str(error)) from None
    return out


class Models:
    """Models that code many streams: what coders look up is made once.

    Parameters
    ----------
    freqs : as of `encode`
    """

    def __init__(self, freqs: Freqs) -> None:
        self.freqs = _table(freqs)

    @cached_property
    def tables(self) -> Any:
        """For the native core, also where others of its coders read such streams."""
        core = native.core()
        assert core is not None
        return core.RansModels(self.freqs)

    def encode(
        self, symbols: Bytes, classes: Bytes, lanes: int, threads: int | None = None
    ) -> bytes:
        """As `encode` under these models."""
        if native.core() is None:
            return encode(symbols, classes, self.freqs, lanes, threads)
        threads = threads or native.threads()
        try:
            coded: bytes = self.tables.encode(symbols, classes, lanes, threads)
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        return coded

    def decode(self, data: Bytes, out: Bytes, classes: Bytes, threads: int | None = None) -> None:
        """As `decode` under these models, into a matrix that is there."""
        if native.core() is None:
            out[:] = decode(data, out.shape[0], out.shape[1], classes, self.freqs, threads)
            return
        try:
            self.tables.decode(data, out, classes, threads or native.threads())
        except RuntimeError as error:
            raise FormatError(str(error)) from None


def histogram(
    symbols: Bytes, classes: Bytes | None = None, n_classes: int = 1
) -> NDArray[np.int64]:
    """Occurrences of each byte in each class of columns, (n_classes, 256)."""
    symbols = np.ascontiguousarray(np.atleast_2d(symbols))
    core = native.core()
    counts = np.zeros((n_classes, MAX_ALPHABET), np.int64)
    if core is not None:
        core.rans_histogram(symbols, classes, counts)
        return counts
    step = max(1, (1 << 20) // max(symbols.shape[1], 1))
    base = 0 if classes is None else classes.astype(np.int64) * MAX_ALPHABET
    flat = counts.reshape(-1)
    for row in range(0, symbols.shape[0], step):
        flat += np.bincount((symbols[row : row + step] + base).reshape(-1), minlength=flat.size)
    return counts


def find(plane: Bytes, value: int) -> NDArray[np.int64]:
    """Where a rare byte occurs in a contiguous array."""
    core = native.core()
    if core is None:
        return np.flatnonzero(plane == value)
    places: NDArray[np.int64] = core.find_byte(plane.reshape(-1), value)
    return places


def choose_lanes(count: int) -> int:
    """Lanes for so many symbols: enough for speed, few enough that states cost little."""
    for least, lanes in ((1 << 20, 128), (1 << 14, 32), (1 << 11, 8), (1 << 8, 4), (1 << 5, 2)):
        if count >= least:
            return lanes
    return 1


def _table(freqs: Freqs) -> Table:
    if isinstance(freqs, np.ndarray) and freqs.ndim == 2:
        return np.ascontiguousarray(freqs, np.uint16)
    width = max((len(f) for f in freqs), default=0)
    table = np.zeros((len(freqs), width), np.uint16)
    for row, f in zip(table, freqs, strict=True):
        row[: len(f)] = f
    return table


def _classes(classes: Bytes | None, cols: int) -> Bytes | None:
    if classes is None:
        return None
    if classes.shape != (cols,):
        raise ValueError(f"classes has shape {classes.shape}, there are {cols} columns")
    ids = np.ascontiguousarray(classes, np.uint8)
    return ids if ids.any() else None
