"""Entropy coding of trellis paths: each index under a Gaussian of its own scale, on its own grid.

The scale of an element is the product of its column's and its row's, as levels of a logarithmic
scale: two short vectors in the file stand for the model of every element. Which grid an index is
on the reader knows from the path. The bytes are described in ``docs/format/paths.md``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import gamma, gaussian, native, paths_numpy
from waterfill.coding.envelope import Envelope, fit
from waterfill.coding.scales import decode_grid, encode_grid
from waterfill.coding.sections import join, split
from waterfill.coding.trellis import SEGMENT
from waterfill.types import Array, Floats, FormatError, WaterfillError

__all__ = ["decode", "encode", "levels", "require_plausible", "spread"]

Indices = NDArray[np.int32]
Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Table = NDArray[np.uint16]
COUNTED = 126  # sizes beyond are counted as one when scales are fitted
LIMIT = 4096  # of a level relative to its hint
# Elements below which a coarser scale of levels may pay, and from which a finer one does.
SMALL, LARGE = 1 << 14, 1 << 19
# Elements that a byte may stand for: no model is surer of a symbol than 4094 / 4096, which is 11361.
MOST_PER_BYTE = 1 << 16
NARROWED = 1 << 20  # levels put into bytes at a time
STATE_OVERHEAD = 1 / 1024  # bits an element that the states of the lanes may cost


def encode(
    index: Indices, states: int, octaves: tuple[Array, Array], threads: int | None = None
) -> bytes:
    """Code a matrix of trellis indices.

    Parameters
    ----------
    index : int32 (m, n)
        From `trellis.quantise` with the same number of states.
    states : 1, or a key of `trellis.CODES`
    octaves : float64 (n,), (m,)
        Logarithms to base 2 of how columns and rows were scaled before they were rounded, which
        the reader knows too: a hint of their scales.
    threads : int, optional
        Threads over blocks; the bytes do not depend on it.

    Returns
    -------
    bytes
        Self-contained but for the shape, the number of states and `octaves`.
    """
    core = native.core()
    if core is None:
        raise WaterfillError("encoding needs the native core; install waterfill with its extension")
    if not index.size:
        return b""
    threads = threads or native.threads()
    reach = min(max(int(index.max()), -int(index.min()), 1), COUNTED)
    precisions = (2, 4) if index.size < SMALL else (4,) if index.size < LARGE else (8,)
    candidates = [
        fit(index, states, reach, precision, _hints(octaves, precision)) for precision in precisions
    ]
    envelope = min(candidates, key=lambda e: e.bits)
    hints = _hints(octaves, envelope.precision)
    stream, places = core.paths_encode(
        index,
        envelope.columns,
        envelope.rows,
        *envelope.models(),
        states=states,
        segment=SEGMENT,
        lanes=_lanes(index.size),
        threads=threads,
    )
    escaped = gamma.zigzag(index.reshape(-1)[places])
    order = gamma.best_order(escaped)[0]
    escapes = gamma.varint(escaped.size) + bytes([order]) + gamma.pack(escaped, order)
    kind = envelope.precision.bit_length() - 1 | envelope.border << 2
    kind |= envelope.hinted[0] << 6 | envelope.hinted[1] << 7
    head = bytes([kind, envelope.first])
    levels = zip((envelope.columns, envelope.rows), hints, envelope.hinted, strict=True)
    scales = [encode_grid((v - h if use else v).astype(np.int32)) for v, h, use in levels]
    return join([*scales, head + (escapes if escaped.size else b"\0") + stream])


def decode(
    data: bytes | memoryview,
    states: int,
    step: Floats,
    scale: Floats,
    octaves: tuple[Array, Array],
    bf16: bool = False,
    threads: int | None = None,
) -> Array:
    """Weights of the path: ``level * step * scale``.

    Parameters
    ----------
    data : what `encode` returned
    states : as given to `encode`
    step : float32 (n,), of each column
    scale : float32 (m,), of each row
    octaves : as given to `encode`
    bf16 : round to bfloat16
    threads : int, optional
        Threads over blocks.

    Returns
    -------
    float32 (m, n), or its upper halves as uint16

    Raises
    ------
    FormatError
        On bytes that no encoder wrote.
    """
    m, n = scale.size, step.size
    if m * n == 0:
        if data:
            raise FormatError("bytes where there are no weights")
        return np.zeros((m, n), np.uint16 if bf16 else np.float32)
    require_plausible(data, m * n)
    packed_columns, packed_rows, rest = split(memoryview(data), 3)
    source = np.frombuffer(rest, np.uint8)
    if source.size < 3:
        raise FormatError("a path is cut short")
    envelope = _read_envelope(source, (packed_columns, packed_rows), octaves)
    escaped, at = _read_escapes(source, m * n)
    # Points are counted in halves: 2k on grid 0, 2k - sign k on grid 1.
    unit = step * np.float32(0.5) if states == 1 else step
    model = (envelope.columns, envelope.rows, *envelope.models(), unit, scale)
    out = _decode_stream(source[at:], model, states, bf16, threads)
    bits = out if bf16 else out.view(np.uint32)
    flat, places = bits.reshape(-1), _escaped_places(bits)
    if places.size != escaped.size:
        raise FormatError("escapes and their values differ in number")
    if not escaped.size:
        return out
    grid = (flat[places] & 1).astype(np.int64)
    levels = (2 * escaped - grid * np.sign(escaped)).astype(np.float32)
    with np.errstate(over="ignore"):
        values = levels * unit[places % n] * scale[places // n]
    flat[places] = to_bf16(values) if bf16 else values.view(np.uint32)
    return out


def levels(
    data: bytes | memoryview, states: int, shape: tuple[int, int], octaves: tuple[Array, Array]
) -> Array | None:
    """Integers that `decode` multiplies by step and scale, (m, n) in the narrowest signed type.

    Where there is one state they are the indices, else points of two grids: twice as fine. None where
    one is too large for a float32 to tell it from its neighbour.

    Raises
    ------
    FormatError
        As `decode`.
    """
    m, n = shape
    ones = np.ones(n, np.float32), np.ones(m, np.float32)
    halves = decode(data, states, *ones, octaves, bf16=True)
    # Above this an upper half no longer holds every integer.
    if not _narrow(halves):
        values = decode(data, states, *ones, octaves)
        extreme = max(float(values.max(initial=0)), -float(values.min(initial=0)))
        if extreme >= 1 << 24:
            return None
        return values.astype(np.int16 if extreme < 32768 else np.int32)
    halves.resize((m * n + 1) // 2, refcheck=False)  # hands the other half back
    return halves.view(np.int8)[: m * n].reshape(m, n)


def _narrow(halves: Array) -> bool:
    """Put integers in place of the upper halves of their floats, in the first half of the array.

    False, with the array spoilt, where one does not fit in 8 bits. In place because a layer is large.
    """
    flat = halves.reshape(-1)
    narrow = flat.view(np.int8)
    for first in range(0, flat.size, NARROWED):
        values = np.left_shift(flat[first : first + NARROWED], 16, dtype=np.uint32)
        part = values.view(np.float32)
        if not (np.abs(part) < 128).all():  # nor a NaN
            return False
        narrow[first : first + part.size] = part
    return True


def spread(
    data: bytes | memoryview, states: int, shape: tuple[int, int], octaves: tuple[Array, Array]
) -> Floats:
    """Standard deviation of each column's `levels` by the coder's model, float32 (n,); decodes nothing."""
    m, n = shape
    require_plausible(data, m * n)
    packed_columns, packed_rows, rest = split(memoryview(data), 3)
    source = np.frombuffer(rest, np.uint8)
    if source.size < 3:
        raise FormatError("a path is cut short")
    envelope = _read_envelope(source, (packed_columns, packed_rows), octaves)
    p = envelope.precision
    down = np.exp2(envelope.columns.astype(np.float64) / p)
    across = np.sqrt(np.mean(np.exp2(2 * envelope.rows.astype(np.float64) / p)))
    unit = (1 if states == 1 else 2) * 2.0 ** (envelope.first / p + gaussian.LOWEST)
    scaled: Floats = (unit * across * down).astype(np.float32)
    return scaled


def require_plausible(data: bytes | memoryview, count: int) -> None:
    """FormatError where so few bytes cannot be the path of so many weights."""
    if count > len(data) * MOST_PER_BYTE:
        raise FormatError(f"{len(data)} bytes where {count} weights were promised")


def _escaped_places(bits: Array) -> Ints:
    """Where decoded bits are the NaN that stands for an escaped index."""
    half = bits.dtype == np.uint16
    core = native.core()
    if core is not None:
        places: Ints = core.paths_escapes(None if half else bits, bits if half else None)
        return places
    return np.flatnonzero((bits.reshape(-1) | 1) == (0x7FC1 if half else 0x7FC00001))


def _decode_stream(
    stream: NDArray[np.uint8],
    model: tuple[Bytes, Bytes, Table, int, int, Floats, Floats],
    states: int,
    bf16: bool,
    threads: int | None,
) -> Array:
    core = native.core()
    if core is None:
        values = paths_numpy.decode(stream, *model, states)
        return to_bf16(values) if bf16 else values
    shape = model[1].size, model[0].size
    out = np.empty(shape, np.uint16 if bf16 else np.float32)
    try:
        core.paths_decode(
            stream,
            *model,
            None if bf16 else out,
            out if bf16 else None,
            states=states,
            segment=SEGMENT,
            threads=threads or native.threads(),
        )
    except RuntimeError as error:
        raise FormatError(str(error)) from None
    return out


def to_bf16(values: Floats) -> NDArray[np.uint16]:
    """Upper halves of floats, rounded to nearest even; NaN keeps its upper and lowest bit."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    half: NDArray[np.uint16] = np.where(np.isnan(values), bits >> 16 | bits & 1, rounded).astype(
        np.uint16
    )
    return half


def _lanes(count: int) -> int:
    """Lanes for so many symbols: a state costs two bytes more than it holds."""
    lanes = 1
    while lanes < 128 and 16 * 2 * lanes < count * STATE_OVERHEAD:
        lanes *= 2
    return lanes


def _hints(octaves: tuple[Array, Array], precision: int) -> tuple[Ints, Ints]:
    """Levels to expect, up to a constant."""
    columns, rows = (np.rint(v * precision).astype(np.int64) for v in octaves)
    return columns, rows


def _read_envelope(
    source: NDArray[np.uint8], packed: tuple[memoryview, memoryview], octaves: tuple[Array, Array]
) -> Envelope:
    kind, first = (int(v) for v in source[:2])
    precision, border, hinted = 1 << (kind & 3), kind >> 2 & 15, (kind >> 6 & 1, kind >> 7)
    if border >= len(gaussian.BORDERS):
        raise FormatError("a path of an unknown kind")
    levels = [
        decode_grid(data, hint.size, LIMIT) + (hint if use else 0)
        for data, hint, use in zip(packed, _hints(octaves, precision), hinted, strict=True)
    ]
    highest = first + sum(int(v.max()) for v in levels)
    if min(int(v.min()) for v in levels) != 0 or highest >= gaussian.levels(precision):
        raise FormatError("levels outside their scale")
    columns, rows = (v.astype(np.uint8) for v in levels)
    return Envelope(columns, rows, precision, border, first)


def _read_escapes(source: NDArray[np.uint8], most: int) -> tuple[NDArray[np.int64], int]:
    count, at = gamma.read_varint(source, 2)
    if count == 0:
        return np.zeros(0, np.int64), at
    if at >= source.size or source[at] > gamma.MAX_ORDER or count > min(most, 8 * source.size):
        raise FormatError("escaped values are cut short")
    values, at = gamma.unpack(source, at + 1, count, int(source[at]))
    if int(values.max()) >= 1 << 32:
        raise FormatError("an escaped value does not fit in 32 bits")
    return gamma.unzigzag(values), at
