"""Trellis paths (docs/format/paths.md), for reader.py: short and slow."""

import math

import numpy as np
from reader_coding import EXP2, Source, blocks, frequencies, grid, need, sections, unzigzag

CODES = {1: (0, 0), 4: (2, 1), 8: (5, 2), 16: (9, 2)}
CODES |= {32: (18, 4), 64: (33, 10), 128: (78, 43), 256: (166, 121)}
BORDERS = [20 / 40, 16 / 40, 18 / 40, 19 / 40, 21 / 40, 22 / 40, 24 / 40, 26 / 40]
ERFC = [1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592]


def tail(border):
    """Chance that a standard normal lies beyond a border, on either side."""
    z = border * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    e = np.minimum(z * z * 1.4426950408889634, 60.0)
    return np.polyval(ERFC, t) * t * np.ldexp(np.polyval(EXP2[::-1], e % 1), -e.astype(int))


def gaussian(level, on_grid, precision, border):
    """Frequencies of zero, of 13 cells and of two escapes."""
    root = {1: 2.0, 2: math.sqrt(2), 4: math.sqrt(math.sqrt(2))}
    root = root.get(precision, math.sqrt(math.sqrt(math.sqrt(2))))
    scale = math.ldexp(math.prod([root] * (level % precision)), level // precision - 5)
    size = np.arange(1, 14) << shift(level, precision)
    ends = np.append(0, size) if on_grid else np.append(BORDERS[border], size + 0.5)
    beyond = tail(ends / scale)
    chance = np.concatenate([1 - beyond[:1], beyond[:-1] - beyond[1:], beyond[-1:] / 2])
    w = np.ldexp(np.maximum(chance, 0), 40).astype(int)
    rest = max(w[-1], 1 << 24)
    w[w < 1 << 24] = 0
    return frequencies(np.append(w[:-1], [rest, rest]))


def shift(level, precision):
    return np.maximum(-(-level // precision) - 7, 0)


def indices(block, k, first, context, shifts):
    """The next few of a row, in a group of lanes; k gets them, escapes as if they were cells."""
    lanes = np.arange(first, first + context.size)
    symbol = block.symbols(lanes, context)
    block.refill(lanes[shifts > 3])
    bits = np.where(symbol, shifts + 1, 0)
    raw = block.x[lanes] % (1 << bits)
    block.x[lanes] >>= bits
    block.refill(lanes)
    size = np.where(symbol, (symbol - 1 << shifts) + (raw >> 1) + 1, 0)
    k[:] = np.where(raw & 1, -size, size)
    return symbol >= 14


def paths(data, states, unit, scale, octaves):
    """Values of a path; octaves: of columns and rows, what the hints are made of."""
    m, n = scale.size, unit.size
    need(np.isfinite(unit).all(), "a gain that is not finite")
    if m * n == 0:
        need(not data, "bytes for no weights")
        return np.zeros((m, n), "f4")
    *packed, rest = sections(data, 3)
    source = Source(rest)
    kind, first = source.take(2).tolist()
    precision, border, hinted = 1 << (kind & 3), kind >> 2 & 15, (kind >> 6 & 1, kind >> 7)
    levels = [
        grid(part, hint.size, 4096) + use * np.rint(hint * precision).astype(int)
        for part, hint, use in zip(packed, octaves, hinted, strict=True)
    ]
    last = first + levels[0].max() + levels[1].max()
    need(min(v.min() for v in levels) == 0 and last < 16 * precision, "levels outside their scale")
    need(border < len(BORDERS), "kind of a path")
    count = source.varint()
    escaped = unzigzag(source.golomb(count, source.byte())) if count else np.zeros(0, int)
    table = [gaussian(at, g, precision, border) for at in range(first, last + 1) for g in (0, 1)]
    feedback, driven = CODES[states]
    k, odd_grid, hidden = (np.empty((m, n), int) for _ in range(3))
    for block, down, across, lanes in blocks(source, m, n, np.array(table), buckets=16):
        need(down[0] % 1024 == 0, "a block inside a segment")
        state, here = np.zeros(len(across), int), slice(across.start, across.stop)
        for row in down:
            state = state * (row % 1024 > 0)
            on_grid = odd_grid[row, here] = state & 1
            level = levels[0][here] + levels[1][row]
            for at in range(0, len(across), min(lanes, 16)):
                part = slice(at, at + min(lanes, 16))
                context, shifts = (
                    2 * level[part] + on_grid[part],
                    shift(first + level[part], precision),
                )
                hidden[row, here][part] = indices(
                    block, k[row, here][part], at % lanes, context, shifts
                )
            state = state >> 1 ^ feedback * on_grid ^ driven * (k[row, here] & 1)
    need((abs(2 * escaped + 1) < 1 << 32).all(), "an escaped value beyond 32 bits")
    need(hidden.sum() == escaped.size, "number of escapes")
    k[hidden > 0] = escaped
    unit = unit * np.float32(0.5) if states == 1 else unit
    return (2 * k - odd_grid * np.sign(k)).astype("f4") * unit * scale[:, None]
