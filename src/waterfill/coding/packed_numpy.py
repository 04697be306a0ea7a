"""The numpy twin of the packed kernels: the same bits, by the same sums in the same order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.coding.matrix import array_at
from waterfill.coding.packed_layout import COLUMNS, ROWS, Geometry
from waterfill.types import Array, Floats, from_float32, to_float32

LARGEST, BASE = 127, 255  # of a level of the activations; two levels are digits to this base
SMALLEST = np.float32(2.0**-100)
DIFFERENCE_BITS, COLUMN_SHIFT, DIFFERENCE_ZERO = 10, 14, 512

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
KINDS = {
    "layout": (np.int64,),
    "codes": (np.uint8,),
    "scales": (np.float16, np.float32),
    "order": (np.int32,),
    "steps": (np.float32,),
    "starts": (np.int64,),
    "corrections": (np.uint32,),
    "table": (np.int8,),
}


def require_valid(arrays: Mapping[str, Array]) -> Geometry:
    """ValueError where arrays are no packed matrix."""
    if not {"layout", "codes", "scales"} <= set(arrays) <= set(KINDS):
        raise ValueError(f"not the arrays of a packed matrix: {', '.join(sorted(arrays))}")
    for name, array in arrays.items():
        if array.dtype not in KINDS[name] or not array.flags.c_contiguous:
            raise ValueError(f"{name} is no contiguous array of {np.dtype(KINDS[name][0])}")
    layout = arrays["layout"]
    if layout.ndim != 1 or len(layout) < 5 or len(layout) % 2 == 0 or layout.min() <= 0:
        raise ValueError("a layout is m, n, group, and bits and columns of each segment")
    geometry = Geometry.of_layout(layout)
    segments = geometry.segments
    blocks, groups, n = geometry.blocks, geometry.groups, geometry.n
    starts, corrections = arrays.get("starts"), arrays.get("corrections")
    order, steps, table = arrays.get("order"), arrays.get("steps"), arrays.get("table")
    fits = (
        len(segments) <= 8
        and layout.max() < 1 << 31
        and geometry.group <= n
        and all(2 <= s.bits <= 8 for s in segments)
        and all(s.columns % COLUMNS == 0 for s in segments[:-1])
        and sum(s.columns for s in segments) == n
        and (groups == 1 or (geometry.group % COLUMNS == 0 and len(segments) == 1))
        and arrays["codes"].size == geometry.codes_nbytes
        and arrays["scales"].size == blocks * groups * ROWS
        and (order is None or (order.shape == (n,) and groups == 1))
        and (steps is None or steps.shape == (n,))
        and (starts is None) == (corrections is None)
        and (
            table is None
            or (table.shape == (16,) and starts is None and [s.bits for s in segments] == [4])
        )
    )
    if fits and order is not None:
        fits = bool(np.array_equal(np.sort(order), np.arange(n)))
    if fits and starts is not None and corrections is not None:
        fits = (
            groups == 1
            and starts.shape == (blocks + 1,)
            and starts[0] == 0
            and starts[-1] == corrections.size
            and bool((np.diff(starts) >= 0).all())
            and bool((corrections >> COLUMN_SHIFT < n).all())
        )
    if not fits:
        raise ValueError("arrays of a packed matrix that do not fit its layout")
    return geometry


def planes(bits: int) -> Iterator[tuple[int, int]]:
    """Width of each plane of a tile, and how many bits of a code lie below it."""
    below = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            yield width, below
            below += width


def pack(
    levels: Array, geometry: Geometry, order: Array | None
) -> tuple[Bytes, Ints, NDArray[np.uint32]] | None:
    """Codes, starts and words of the corrections; None where these would take more than float32."""
    m, n = levels.shape
    padded = np.zeros((geometry.blocks * ROWS, -(-n // COLUMNS) * COLUMNS), np.int64)
    padded[:m, :n] = levels if order is None else levels[:, order]
    parts, rests, first = [], [], 0
    for segment in geometry.segments:
        wide = -(-segment.columns // COLUMNS) * COLUMNS
        part, zero = padded[:, first : first + wide], 1 << segment.bits - 1
        kept = np.clip(part, -zero, zero - 1)
        rests.append(part - kept)
        parts.append(_tiles((kept + zero).astype(np.uint8), segment.bits))
        first += wide
    starts, words = _corrections(np.concatenate(rests, axis=1))
    if any(np.diff(starts) > ROWS * n):
        return None
    return np.concatenate(parts, axis=1).reshape(-1), starts, words


def _tiles(codes: Bytes, bits: int) -> Bytes:
    """Codes (blocks * 16, columns) -> (blocks, bytes of a block)."""
    blocks, tiles = len(codes) // ROWS, codes.shape[1] // COLUMNS
    dwords = codes.reshape(blocks, ROWS, tiles, 8, 4).transpose(0, 2, 3, 1, 4)
    out = []
    for width, below in planes(bits):
        fields = 8 // width
        part = dwords.reshape(blocks, tiles, width, fields, 64) >> below & (1 << width) - 1
        shift = np.arange(fields, dtype=np.uint8)[:, None] * np.uint8(width)
        out.append(np.bitwise_or.reduce(part << shift, axis=3).astype(np.uint8))
    return np.concatenate(out, axis=2).reshape(blocks, -1)


def _corrections(rest: Ints) -> tuple[Ints, NDArray[np.uint32]]:
    most = DIFFERENCE_ZERO - 1
    row, column = np.nonzero(rest)
    value = rest[row, column]
    count = -(-np.abs(value) // most)
    if count.sum() > 2 * rest.size:  # far too many: only their number matters
        return np.array([0, count.sum()]), np.zeros(0, np.uint32)
    last = np.cumsum(count)
    row, column = np.repeat(row, count), np.repeat(column, count)
    full = np.repeat(np.sign(value) * most, count)
    full[last - 1] = value - np.sign(value) * most * (count - 1)
    place = column << COLUMN_SHIFT | row % ROWS << DIFFERENCE_BITS
    words = (place | full + DIFFERENCE_ZERO).astype(np.uint32)
    block = row // ROWS
    words = words[np.lexsort((words, block))]
    starts = np.searchsorted(np.sort(block), np.arange(len(rest) // ROWS + 1))
    return starts.astype(np.int64), words


def levels(geometry: Geometry, arrays: Mapping[str, Array], blocks: Ints) -> Ints:
    """Levels of some blocks without their corrections: (count, 16, places), in the order of places."""
    codes = arrays["codes"].reshape(geometry.blocks, -1)[blocks]
    parts, offset = [], 0
    for segment in geometry.segments:
        tiles = -(-segment.columns // COLUMNS)
        size = tiles * segment.bits * 64
        part = codes[:, offset : offset + size].reshape(len(blocks), tiles, segment.bits, 64)
        offset += size
        dwords, vector = np.zeros((len(blocks), tiles, 8, 64), np.int64), 0
        for width, below in planes(segment.bits):
            fields = 8 // width
            plane = part[:, :, vector : vector + width, None, :].astype(np.int64)
            shift = np.arange(fields)[:, None] * width
            field = (plane >> shift & (1 << width) - 1).reshape(len(blocks), tiles, 8, 64)
            dwords |= field << below
            vector += width
        values = dwords.reshape(len(blocks), tiles, 8, ROWS, 4).transpose(0, 3, 1, 2, 4)
        values = values.reshape(len(blocks), ROWS, tiles * COLUMNS)
        zero = 1 << segment.bits - 1
        parts.append(
            arrays["table"][values].astype(np.int64) if "table" in arrays else values - zero
        )
    return np.concatenate(parts, axis=2)


def _differences(arrays: Mapping[str, Array], block: int) -> tuple[Ints, Ints, Ints]:
    """Row of the block, place and difference of each correction of a block."""
    starts = arrays["starts"]
    words = arrays["corrections"][starts[block] : starts[block + 1]].astype(np.int64)
    row = words >> DIFFERENCE_BITS & ROWS - 1
    return row, words >> COLUMN_SHIFT, (words & (1 << DIFFERENCE_BITS) - 1) - DIFFERENCE_ZERO


def weights(geometry: Geometry, arrays: Mapping[str, Array], rows: Ints, dtype: Any) -> Array:
    """Rows of weights, (count, n): float32, or uint16 as bf16 bits."""
    blocks, place = np.unique(rows // ROWS, return_inverse=True)
    whole = levels(geometry, arrays, blocks)
    if "starts" in arrays:
        for i, block in enumerate(blocks.tolist()):
            row, column, difference = _differences(arrays, block)
            np.add.at(whole[i], (row, column), difference)
    picked = whole[place.reshape(-1), rows % ROWS, : geometry.n].astype(np.float32)
    scales = arrays["scales"].reshape(geometry.blocks, geometry.groups, ROWS)
    scale = scales[rows // ROWS, :, rows % ROWS].astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        if "steps" in arrays:
            picked *= arrays["steps"]
        picked *= np.repeat(scale, geometry.group, axis=1)[:, : geometry.n]
    out = picked
    if "order" in arrays:
        out = np.empty_like(picked)
        out[:, arrays["order"]] = picked
    return out if np.dtype(dtype) == np.float32 else from_float32(out, "BF16")


def chunks(geometry: Geometry) -> Iterator[tuple[int, int]]:
    """First place and end of each run of columns whose activations share a scale."""
    first = 0
    for segment in geometry.segments:
        end = first + -(-segment.columns // COLUMNS) * COLUMNS
        for at in range(first, end, geometry.chunk):
            yield at, min(at + geometry.chunk, end)
        first = end


def quantise(values: Floats, planes: int) -> tuple[Ints, Floats]:
    """A chunk (batch, columns) as levels of one or two digits, and a scale for each token (batch,)."""
    most = np.float32(LARGEST if planes == 1 else BASE * LARGEST + LARGEST)
    largest = np.max(np.abs(values), axis=1)
    finite = np.isfinite(largest)
    none = ~finite | (largest < SMALLEST)
    with np.errstate(all="ignore"):
        inverse = np.where(none, 0, most / np.where(none, 1, largest)).astype(np.float32)
        rounded = np.where(none[:, None], 0, np.rint(values * inverse[:, None]))
        scale = np.where(finite, np.where(none, 0, largest / most), np.nan)
    return rounded.astype(np.int64), scale.astype(np.float32)


def matmul(geometry: Geometry, arrays: Mapping[str, Array], x: Floats, planes: int = 1) -> Floats:
    """``x W^T``: float32 (batch, n) -> float32 (batch, m)."""
    m, n = geometry.m, geometry.n
    values = np.zeros((len(x), -(-n // COLUMNS) * COLUMNS), np.float32)
    with np.errstate(all="ignore"):
        values[:, :n] = x[:, arrays["order"]] if "order" in arrays else x
        if "steps" in arrays:
            values[:, :n] *= arrays["steps"]
        whole = levels(geometry, arrays, np.arange(geometry.blocks))
        whole = whole.reshape(geometry.blocks * ROWS, -1)
        stored = arrays["scales"].reshape(geometry.blocks, geometry.groups, ROWS)
        scales = stored.astype(np.float32).transpose(1, 0, 2).reshape(geometry.groups, -1)
        total = np.zeros((len(x), len(whole)), np.float32)
        group = np.zeros_like(total)
        for first, end in chunks(geometry):
            q, scale = quantise(values[:, first:end], planes)
            # Sums of whole numbers below 2^53: a product in float64 is exact, and fast.
            sums = q.astype(np.float64) @ whole[:, first:end].T.astype(np.float64)
            group += sums.astype(np.float32) * scale[:, None]
            if end >= n or (geometry.groups > 1 and end % geometry.group == 0):
                total += group * scales[first // geometry.group]
                group[:] = 0
        if "starts" in arrays:
            total += _corrected(geometry, arrays, values, len(whole)) * scales[0]
    return total[:, :m]


def _corrected(
    geometry: Geometry, arrays: Mapping[str, Array], values: Floats, rows: int
) -> Floats:
    sums = np.zeros((rows, len(values)), np.float32)
    for block in range(geometry.blocks):
        row, column, difference = _differences(arrays, block)
        products = difference.astype(np.float32)[:, None] * values.T[column]
        np.add.at(sums, block * ROWS + row, products)
    return sums.T


def matmul_at(
    geometry: Geometry,
    arrays: Mapping[str, Array],
    x_ptr: int,
    dtype: str,
    y_ptr: int,
    batch: int,
    planes: int,
) -> None:
    """`matmul` at addresses, of activations in `dtype`."""
    x = array_at(x_ptr, (batch, geometry.n), dtype)
    y = array_at(y_ptr, (batch, geometry.m), dtype)
    y[:] = from_float32(matmul(geometry, arrays, to_float32(x, dtype), planes), dtype)
