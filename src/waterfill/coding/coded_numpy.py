"""The twin of the kernels of coded matrices, in numpy: the same bytes, the same weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from waterfill.coding.coded_layout import TILE, Layout
from waterfill.coding.coded_models import LANES, Models, Scales, odd
from waterfill.coding.matrix import array_at
from waterfill.coding.trellis import CODES, SEGMENT
from waterfill.types import Array, Floats, from_float32, to_float32

__all__ = ["count", "encode", "matmul_at", "power", "weights"]

STATES, TOGETHER = 128, 8
STRINGS = LANES // TOGETHER
PLANE_NBYTES = LANES // 8
HEAD = np.dtype([("strings", "<u4", 2), ("patches", "<u4")])
PATCH = np.dtype([("place", "<u2"), ("level", "<i4")])
# The lane of each position.
LANE = np.arange(LANES) // 64 * 64 + np.arange(LANES) % 16 * 4 + np.arange(LANES) % 64 // 16
POSITION = np.argsort(LANE)
Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]


class _Lanes:
    """128 decoders and the strings of bits they read."""

    def __init__(self, states: Bytes, strings: list[Bytes]) -> None:
        self.states = (states & (STATES - 1)).astype(np.int64)
        self.data = [np.concatenate([s, np.zeros(64, np.uint8)]) for s in strings]
        self.lengths = [s.size for s in strings]
        first = [s[:64].view("<u8").astype(np.uint64) for s in strings]
        self.windows = np.concatenate(first)
        self.at = [64, 64]
        self.used = np.zeros(STRINGS, np.int64)

    def take(self, lengths: Ints) -> Ints:
        """So many bits of each lane."""
        inside = lengths.reshape(STRINGS, TOGETHER)
        ends = self.used[:, None] + np.cumsum(inside, axis=1)
        shifted = self.windows[:, None] >> (ends - inside).astype(np.uint64)
        bits = shifted.astype(np.int64) & ((1 << inside) - 1)
        self._refill(ends[:, -1])
        return bits.reshape(LANES)

    def _refill(self, used: Ints) -> None:
        nbytes, self.used = used // 8, used % 8
        for half, data in enumerate(self.data):
            if self.at[half] > self.lengths[half]:
                raise ValueError("coded: bytes run out")
            some = slice(half * STRINGS // 2, (half + 1) * STRINGS // 2)
            fresh = nbytes[some]
            places = self.at[half] + np.cumsum(fresh) - fresh
            next8 = data[places[:, None] + np.arange(8)].copy().view("<u8")[:, 0].astype(np.uint64)
            kept = self.windows[some] >> (8 * fresh).astype(np.uint64)
            # In two shifts, for a shift by all 64 places is none.
            came = (next8 << np.uint64(1)) << (63 - 8 * fresh).astype(np.uint64)
            self.windows[some] = kept | came
            self.at[half] += int(fresh.sum())


def _levels(layout: Layout, arrays: Mapping[str, Array], index: int) -> NDArray[np.int32]:
    """Points of two grids of a block, by position: int32 (rows, panels * 128)."""
    starts, codes = arrays["starts"], arrays["codes"]
    block = codes[starts[index] : starts[index + 1]]
    tiles = layout.tiles(index)
    if block.size < HEAD.itemsize + LANES + 2 * len(tiles):
        raise ValueError("coded: a block's states and counts")
    head = block[: HEAD.itemsize].view(HEAD)[0]
    at = HEAD.itemsize + LANES
    counts = block[at : at + 2 * len(tiles)].view("<u2").astype(np.int64)
    at += 2 * len(tiles)
    patches = block[at : at + PATCH.itemsize * int(head["patches"])].view(PATCH)
    at += patches.nbytes
    strings = []
    for nbytes in head["strings"].tolist():
        strings.append(block[at : at + nbytes])
        at += nbytes
    lanes = _Lanes(block[HEAD.itemsize : HEAD.itemsize + LANES], strings)
    rows, panels = layout.block(index)
    out = np.empty((rows.stop - rows.start, (panels.stop - panels.start) * LANES), np.int32)
    machines = np.zeros((panels.stop - panels.start, LANES), np.int64)
    if block.size != at + _raw_nbytes(layout, arrays, index):
        raise ValueError("coded: blocks as long as their parts")
    patched = 0
    for (part, panel), count in zip(tiles, counts, strict=True):
        first = (panel - panels.start) * LANES
        tile = out[part.start - rows.start : part.stop - rows.start, first : first + LANES]
        for row, line in zip(range(part.start, part.stop), tile, strict=True):
            table = arrays["choice"][int(arrays["row_levels"][row]) + arrays["panel_levels"][panel]]
            shift = int(arrays["shifts"][table])
            raw = block[at : at + shift * PLANE_NBYTES]
            at += raw.size
            machine = machines[panel - panels.start]
            line[:] = _row(lanes, machine, arrays["tables"][table], raw, layout.states)[LANE]
        if count > len(patches) - patched:
            raise ValueError("coded: patches run out")
        for one in patches[patched : patched + count]:
            tile[one["place"] // LANES, one["place"] % LANES] = one["level"]
        patched += int(count)
    if lanes.states.any():
        raise ValueError("coded: lanes do not end where they began")
    return out


def _raw_nbytes(layout: Layout, arrays: Mapping[str, Array], index: int) -> int:
    """Of the raw bits of a block."""
    rows, panels = (
        arrays[k][s].astype(np.int64)
        for k, s in zip(("row_levels", "panel_levels"), layout.block(index), strict=True)
    )
    shifts = arrays["shifts"][arrays["choice"][rows[:, None] + panels]]
    return PLANE_NBYTES * int(shifts.sum(dtype=np.int64))


def _row(lanes: _Lanes, machine: Ints, table: Bytes, raw: Bytes, states: int) -> Ints:
    """Points of one row by lane; moves machines on."""
    feedback, source = CODES.get(states, (0, 0))
    grid = machine & 1
    entry = table[: 2 * STATES][grid * STATES + lanes.states].astype(np.int64)
    base = table[2 * STATES :][grid * STATES + lanes.states].astype(np.int64)
    lanes.states = base | lanes.take(entry >> 5)
    planes = np.unpackbits(raw.reshape(-1, PLANE_NBYTES), axis=1, bitorder="little").astype(
        np.int64
    )
    q = (entry >> 1 & 15) - 8
    for plane in planes[::-1]:
        q = 2 * q + plane
    parity = (entry & 1) ^ (planes[0] if len(planes) else 0)
    machine[:] = machine >> 1 ^ feedback * grid ^ source * parity
    points: Ints = 2 * q + grid
    return points


def weights(
    layout: Layout, arrays: Mapping[str, Array], rows: Ints, dtype: np.dtype[np.generic]
) -> Array:
    """Weights of some rows, float32 (count, n), or uint16 of bf16 bits."""
    out = np.empty((rows.size, layout.n), np.float32)
    for segment in np.unique(rows // SEGMENT):
        wanted = np.flatnonzero(rows // SEGMENT == segment)
        for part in range(layout.across):
            index = int(segment) * layout.across + part
            panels = layout.block(index)[1]
            levels = _levels(layout, arrays, index)[rows[wanted] % SEGMENT]
            places = slice(panels.start * LANES, min(panels.stop * LANES, layout.n))
            levels = levels[:, : places.stop - places.start]
            columns = arrays["order"][places]
            scales = arrays["scales"].astype(np.float32)[columns // layout.group][:, rows[wanted]].T
            with np.errstate(under="ignore"):
                values = levels.astype(np.float32) * arrays["units"][places] * scales
            out[np.ix_(wanted, columns)] = values
    exact = to_float32(from_float32(out, layout.dtype), layout.dtype)
    return from_float32(exact, "BF16") if dtype == np.uint16 else exact


def matmul_at(
    layout: Layout, arrays: Mapping[str, Array], x_ptr: int, x_dtype: str, y_ptr: int, batch: int
) -> None:
    """``y = x W^T`` at addresses."""
    x = array_at(x_ptr, (batch, layout.n), x_dtype)
    y = array_at(y_ptr, (batch, layout.m), x_dtype)
    matrix = weights(layout, arrays, np.arange(layout.m), np.dtype(np.float32))
    y[:] = from_float32(to_float32(x, x_dtype) @ matrix.T, x_dtype)


def power(levels: Array, plain: bool, weights: Floats) -> tuple[Ints, NDArray[np.float64]]:
    """Sums of squared points of each column, and of each row with weighted columns."""
    points = np.minimum(np.abs(levels.astype(np.int64) * (1 + plain)), 1 << 15)
    return np.square(points).sum(axis=0), np.square(points).astype(np.float64) @ weights.astype(
        np.float64
    )


def count(levels: Array, plain: bool, scales: Scales, coarse: Bytes) -> Ints:
    """Occurrences of ``128 + 2 * (q >> coarse) + grid`` by level of scale, int64 (levels, 256)."""
    counts = np.zeros((len(coarse), 256), np.int64)
    panel = np.repeat(scales.panel_levels.astype(np.int64), LANES)[: scales.order.size]
    for level, row in zip(scales.row_levels.astype(np.int64), levels, strict=True):
        points = row[scales.order].astype(np.int64) * (1 + plain)
        scale = level + panel
        q = np.clip((points >> 1) >> coarse[scale], -64, 63)
        np.add.at(counts, (scale, 128 + 2 * q + (points & 1)), 1)
    return counts


class _Encoder:
    """One table turned around, on either grid."""

    def __init__(self, table: Bytes, raw: bool) -> None:
        entries, following = table.reshape(2, 2, STATES).astype(np.int64)
        symbol, bits = entries >> 1 & 15, entries >> 5
        self.slots = np.stack([np.bincount(s, minlength=16) for s in symbol])
        self.states = np.zeros((2, 16, STATES), np.int64)
        self.instead = np.full((2, 16), 16)
        for grid in (0, 1):
            y = (following[grid] + STATES) >> bits[grid]
            self.states[grid, symbol[grid], y - self.slots[grid][symbol[grid]]] = np.arange(STATES)
            parity, there = odd(grid, raw), np.flatnonzero(self.slots[grid])
            for s in range(16):
                alike = there[parity[there] == parity[s]]
                if alike.size:
                    # The nearest, the lower of two.
                    self.instead[grid, s] = min(alike.tolist(), key=lambda o: (abs(o - s), o))

    def push(self, states: Ints, symbols: Ints, grid: Ints) -> tuple[Ints, Ints, Ints]:
        """States before the symbols, the bits they leave, and how many."""
        x, slots = states + STATES, self.slots[grid, symbols]
        lengths = np.zeros(LANES, np.int64)
        for _ in range(7):
            lengths += (x >> lengths) >= 2 * slots
        return self.states[grid, symbols, (x >> lengths) - slots], x & ((1 << lengths) - 1), lengths


def encode(levels: Array, layout: Layout, scales: Scales, models: Models) -> tuple[Ints, Bytes]:
    """Where blocks start, and their bytes."""
    encoders = [_Encoder(t, bool(s)) for t, s in zip(models.tables, models.shifts, strict=True)]
    blocks = [_block(levels, layout, scales, models, encoders, i) for i in range(layout.blocks)]
    starts = np.cumsum([0, *(len(b) for b in blocks)]).astype(np.int64)
    return starts, np.frombuffer(b"".join(blocks), np.uint8)


def _steps(
    levels: Array, layout: Layout, scales: Scales, models: Models, index: int
) -> Iterator[tuple[int, int, int, Ints]]:
    """Tile, row of the tile, table and points by position of each row of each tile."""
    times = 1 + layout.plain
    for number, (rows, panel) in enumerate(layout.tiles(index)):
        columns = scales.order[panel * LANES : (panel + 1) * LANES]
        for row in range(rows.start, rows.stop):
            points = np.zeros(LANES, np.int64)
            points[: columns.size] = levels[row, columns].astype(np.int64) * times
            table = models.choice[int(scales.row_levels[row]) + scales.panel_levels[panel]]
            yield number, row % TILE, int(table), points


def _block(
    levels: Array,
    layout: Layout,
    scales: Scales,
    models: Models,
    encoders: list[_Encoder],
    index: int,
) -> bytes:
    steps, patches, planes = [], [], []
    counts = np.zeros(len(layout.tiles(index)), "<u2")
    for number, row, table, points in _steps(levels, layout, scales, models, index):
        shift, grid, q = int(models.shifts[table]), points & 1, points >> 1
        cell = q >> shift
        s = np.clip(cell, -8, 7)
        if not shift:
            s = np.where((cell - s) % 2 == 0, s, np.where(cell < 0, -7, 6))
        coded = encoders[table].instead[grid, s + 8]
        by_lane = np.empty((3, LANES), np.int64)
        by_lane[:, LANE] = coded, grid, q
        for position in POSITION[(coded - 8 != cell)[POSITION]]:
            if coded[position] == 16:
                raise ValueError("coded: a symbol for each index that occurs")
            patches.append((row * LANES + position, points[position]))
            counts[number] += 1
        bits = (by_lane[2] >> np.arange(shift)[:, None] & 1).astype(np.uint8)
        planes.append(np.packbits(bits, axis=1, bitorder="little").tobytes())
        steps.append((table, by_lane[0], by_lane[1]))
    states = np.zeros(LANES, np.int64)
    pushed = []
    for table, symbols, grid in reversed(steps):
        states, bits, lengths = encoders[table].push(states, symbols, grid)
        pushed.append((bits, lengths))
    strings = _strings(pushed[::-1])
    head = np.array([((len(strings[0]), len(strings[1])), len(patches))], HEAD)
    return b"".join(
        [
            head.tobytes(),
            states.astype(np.uint8).tobytes(),
            counts.tobytes(),
            np.array(patches, PATCH).tobytes(),
            *strings,
            *planes,
        ]
    )


def _strings(pushed: list[tuple[Ints, Ints]]) -> list[bytes]:
    """Bytes of both halves, in the order in which windows take them in."""
    bits = np.stack([b for b, _ in pushed]).reshape(len(pushed), STRINGS, TOGETHER)
    lengths = np.stack([n for _, n in pushed]).reshape(len(pushed), STRINGS, TOGETHER)
    whole, ends = [], np.cumsum(lengths.sum(axis=2), axis=0)
    for k in range(STRINGS):
        value, length = bits[:, k].reshape(-1), lengths[:, k].reshape(-1)
        spread = (value[:, None] >> np.arange(7) & 1)[np.arange(7) < length[:, None]]
        packed = np.packbits(spread.astype(np.uint8), bitorder="little")
        whole.append(np.concatenate([packed, np.zeros(9, np.uint8)]))
    taken = np.diff(ends // 8, axis=0, prepend=0)
    halves = []
    for half in (0, 1):
        some = range(half * STRINGS // 2, (half + 1) * STRINGS // 2)
        parts = [whole[k][:8] for k in some]
        for row, before in zip(taken, ends // 8 - taken, strict=True):
            parts += [whole[k][8 + before[k] : 8 + before[k] + row[k]] for k in some]
        halves.append(np.concatenate(parts).tobytes())
    return halves
