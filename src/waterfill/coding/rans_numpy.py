"""The rANS coder in numpy alone: what every native kernel must agree with, and their stand-in.

Vectorised over lanes; Python loops over rows. See ``docs/format/rans.md`` for the bitstream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.types import FormatError

__all__ = ["alias_buckets", "decode", "encode", "read_blocks", "slot_layout"]

SCALE_BITS = 12
TOTAL = 1 << SCALE_BITS
LOWER = 1 << 16
BUCKETS = 32
BLOCK_STEPS = 1 << 14
MAX_LANES = 128

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Table = NDArray[np.uint16]


def alias_buckets(freqs: Table, buckets: int = BUCKETS) -> tuple[Ints, Ints, Ints]:
    """Walker's alias method in integers, for as many symbols as there are buckets, or fewer.

    Returns
    -------
    cut, alias, start : int64 (buckets,)
        Slots ``r < cut[b]`` of bucket b belong to symbol b at offset r; the others to symbol
        ``alias[b]`` at offset ``start[b] + r - cut[b]``.
    """
    slots = TOTAL // buckets
    rest = np.zeros(buckets, np.int64)
    rest[: len(freqs)] = freqs
    alias = np.arange(buckets)
    small = [int(b) for b in np.flatnonzero(rest < slots)]
    large = [int(b) for b in np.flatnonzero(rest > slots)]
    donor = 0
    for bucket in small:  # grows while it is walked
        source = large[donor]
        alias[bucket] = source
        rest[source] -= slots - rest[bucket]
        if rest[source] <= slots:
            donor += 1
        if rest[source] < slots:
            small.append(source)
    start = np.zeros(buckets, np.int64)
    following = rest.copy()
    for bucket in range(buckets):
        if alias[bucket] != bucket:
            start[bucket] = following[alias[bucket]]
            following[alias[bucket]] += slots - rest[bucket]
    return rest, alias, start


def slot_layout(table: Table, buckets: int = BUCKETS) -> tuple[Ints, Ints]:
    """For each class and each of its 4096 slots: the symbol, and the offset within that symbol."""
    n_classes, alphabet = table.shape
    symbol = np.empty((n_classes, TOTAL), np.int64)
    offset = np.empty((n_classes, TOTAL), np.int64)
    slot = np.arange(TOTAL)
    bucket, r = slot * buckets // TOTAL, slot % (TOTAL // buckets)
    for k, freqs in enumerate(table):
        if alphabet <= buckets:
            cut, alias, start = alias_buckets(freqs, buckets)
            own = r < cut[bucket]
            symbol[k] = np.where(own, bucket, alias[bucket])
            offset[k] = np.where(own, r, start[bucket] + r - cut[bucket])
        else:
            symbol[k] = np.repeat(np.arange(alphabet), freqs)
            offset[k] = slot - (np.cumsum(freqs) - freqs)[symbol[k]]
    return symbol, offset


@dataclass(frozen=True)
class Geometry:
    """How a matrix is cut into blocks; they are numbered down each stripe of panels first."""

    rows: int
    cols: int
    lanes: int
    block_rows: int
    block_panels: int

    @classmethod
    def choose(cls, rows: int, cols: int, lanes: int) -> Geometry:
        """The encoder's choice: blocks of about 16384 steps of all lanes, or a little more."""
        panels = -(-cols // lanes)
        if rows >= 2 * BLOCK_STEPS:
            return cls(rows, cols, lanes, -(-rows // (rows // BLOCK_STEPS)), 1)
        across = max(1, panels // -(-BLOCK_STEPS // rows))
        return cls(rows, cols, lanes, rows, -(-panels // across))

    def parts(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of each block."""
        width = self.block_panels * self.lanes
        for col in range(0, self.cols, width):
            for row in range(0, self.rows, self.block_rows):
                yield (
                    slice(row, min(row + self.block_rows, self.rows)),
                    slice(col, min(col + width, self.cols)),
                )


def _panels(block: Bytes, ids: Ints, lanes: int) -> list[tuple[Bytes, Ints]]:
    """Panels of a block with the classes of their columns, first to last."""
    cols = block.shape[1]
    whole = cols // lanes * lanes
    if block.shape[0] == 1 and whole and not ids.any():
        # One-row panels of one class follow each other as the rows of a matrix do.
        parts = [(block[:, :whole].reshape(-1, lanes), ids[:lanes])]
        return parts if whole == cols else [*parts, (block[:, whole:], ids[whole:])]
    return [(block[:, c : c + lanes], ids[c : c + lanes]) for c in range(0, cols, lanes)]


def encode(symbols: Bytes, classes: Bytes | None, table: Table, lanes: int) -> bytes:
    """The same bytes as the native encoder."""
    _check(table, ValueError)
    rows, cols = symbols.shape
    if lanes not in (1, 2, 4, 8, 16, 32, 64, 128):
        raise ValueError("rANS: lanes must be a power of two, at most 128")
    if not symbols.size:
        return b""
    ids = np.zeros(cols, np.int64) if classes is None else classes.astype(np.int64)
    alphabet = table.shape[1]
    if ids.max() >= len(table):
        raise ValueError("rANS: a class without a model")
    known = np.zeros((len(table), 256), bool)
    known[:, :alphabet] = table > 0
    if not known[ids, symbols].all():
        raise ValueError("rANS: a symbol that its class's model does not know")
    symbol, offset = slot_layout(table)
    base = np.cumsum(table, axis=1, dtype=np.int64) - table
    slots = np.empty_like(symbol)
    for k in range(len(table)):
        slots[k, base[k, symbol[k]] + offset[k]] = np.arange(TOTAL)
    freqs, first, inverse = table.astype(np.int64).ravel(), base.ravel(), slots.ravel()

    geometry = Geometry.choose(rows, cols, lanes)
    blocks, lengths = [], []
    for part in geometry.parts():
        x = np.full(lanes, LOWER, np.int64)
        words: list[Any] = []
        for panel, panel_ids in reversed(_panels(symbols[part], ids[part[1]], lanes)):
            width = panel.shape[1]
            at = panel_ids * alphabet
            for row in panel[::-1]:
                f = freqs[at + row]
                y = x[:width]
                full = y >= f << (32 - SCALE_BITS)
                words.append((y[full] & 0xFFFF).astype("<u2"))
                y = np.where(full, y >> 16, y)
                place = panel_ids * TOTAL + first[at + row] + y % f
                x[:width] = (y // f << SCALE_BITS) | inverse[place]
        coded = np.concatenate(words[::-1]).tobytes()
        used = min(lanes, part[1].stop - part[1].start)
        blocks.append(x[:used].astype("<u4").tobytes() + coded)
        lengths.append(len(coded) // 2)
    head = lanes.bit_length() - 1
    if len(blocks) == 1:
        return bytes([head]) + blocks[0]
    sizes = np.array([geometry.block_rows, geometry.block_panels, *lengths], "<u4").tobytes()
    return bytes([head | 0x10]) + sizes + b"".join(blocks)


def decode(data: Bytes, out: Bytes, classes: Bytes | None, table: Table) -> None:
    """Fill `out` (rows, cols) from a stream; FormatError on bytes that no encoder wrote."""
    rows, cols = out.shape
    if not out.size:
        if data.size:
            raise FormatError("rANS: bytes where there are no symbols")
        return
    _check(table, FormatError)
    ids = np.zeros(cols, np.int64) if classes is None else classes.astype(np.int64)
    if ids.max() >= len(table):
        raise FormatError("rANS: a class has no model")
    symbol, offset = slot_layout(table)
    freqs = np.take_along_axis(table.astype(np.int64), symbol, axis=1).ravel()
    symbols, offsets = symbol.astype(np.uint8).ravel(), offset.ravel()
    for part, lanes, x, words in read_blocks(data, rows, cols):
        read, length = 0, words.size
        for panel, panel_ids in _panels(out[part], ids[part[1]], lanes):
            width = panel.shape[1]
            base = panel_ids * TOTAL
            for row in panel:
                place = base + (x[:width] & (TOTAL - 1))
                y = freqs[place] * (x[:width] >> SCALE_BITS) + offsets[place]
                low = np.flatnonzero(y < LOWER)
                if read + low.size > length:
                    raise FormatError("rANS: words run out")
                y[low] = y[low] << 16 | words[read : read + low.size]
                read += low.size
                x[:width] = y
                row[:] = symbols[place]
        if read != length:
            raise FormatError("rANS: words left over")
        if (x != LOWER).any():
            raise FormatError("rANS: lanes do not end where they began")


def read_blocks(
    data: Bytes, rows: int, cols: int
) -> Iterator[tuple[tuple[slice, slice], int, Ints, Ints]]:
    """Rows and columns, lanes, first states and words of each block of a stream."""
    geometry, lengths, at = _header(data, rows, cols)
    for part, length in zip(geometry.parts(), lengths, strict=True):
        used = min(geometry.lanes, part[1].stop - part[1].start)
        x = data[at : at + 4 * used].view("<u4").astype(np.int64)
        words = data[at + 4 * used : at + 4 * used + 2 * length].view("<u2").astype(np.int64)
        at += 4 * used + 2 * length
        if (x < LOWER).any():
            raise FormatError("rANS: a state below 2^16")
        yield part, geometry.lanes, x, words


def _header(data: Bytes, rows: int, cols: int) -> tuple[Geometry, list[int], int]:
    """Geometry, words in each block, and where the first block begins; every length checked."""
    if not data.size:
        raise FormatError("rANS: empty where symbols were promised")
    if data[0] & 0xE8:
        raise FormatError(f"rANS: unknown header byte {data[0]}")
    lanes = 1 << int(data[0] & 7)
    panels = -(-cols // lanes)
    geometry = Geometry(rows, cols, lanes, rows, panels)
    if not data[0] & 0x10:
        left = data.size - 1 - 4 * min(lanes, cols)
        if left < 0:
            raise FormatError("rANS: states of block 0 cut short")
        if left % 2:
            raise FormatError("rANS: bytes left over after the last block")
        return geometry, [left // 2], 1
    if data.size < 9:
        raise FormatError("rANS: header cut short")
    block_rows, block_panels = (int(v) for v in data[1:9].view("<u4"))
    if not (0 < block_rows <= rows and 0 < block_panels <= panels):
        raise FormatError("rANS: blocks larger than the matrix, or empty")
    count = -(-rows // block_rows) * -(-panels // block_panels)
    if count < 2:
        raise FormatError("rANS: one block announced as several")
    if 9 + 4 * count > data.size:
        raise FormatError("rANS: header cut short")
    geometry = Geometry(rows, cols, lanes, block_rows, block_panels)
    lengths = [int(v) for v in data[9 : 9 + 4 * count].view("<u4")]
    used = (min(lanes, part[1].stop - part[1].start) for part in geometry.parts())
    expected = 9 + 4 * count + sum(4 * u + 2 * n for u, n in zip(used, lengths, strict=True))
    if expected != data.size:
        raise FormatError("rANS: block lengths do not add up to the stream's")
    return geometry, lengths, 9 + 4 * count


def _check(table: Table, error: type[Exception]) -> None:
    n_classes, alphabet = table.shape
    if not (0 < n_classes <= 256 and 0 < alphabet <= 256):
        raise error("rANS: between 1 and 256 classes of 1 to 256 symbols")
    if (table.sum(axis=1, dtype=np.int64) != TOTAL).any():
        raise error("rANS: frequencies do not sum to 4096")
