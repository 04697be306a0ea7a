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


def gaussian(level, on_grid, precision, border, reach):
    """Frequencies of k = -reach .. reach and of the two escapes."""
    root = {1: 2.0, 2: math.sqrt(2), 4: math.sqrt(math.sqrt(2))}
    root = root.get(precision, math.sqrt(math.sqrt(math.sqrt(2))))
    scale = math.ldexp(math.prod([root] * (level % precision)), level // precision - 5)
    size = np.arange(1, reach + 1)
    ends = np.append(0, size) if on_grid else np.append(BORDERS[border], size + 0.5)
    beyond = tail(ends / scale)
    chance = np.concatenate([1 - beyond[:1], beyond[:-1] - beyond[1:], beyond[-1:]])
    w = np.ldexp(np.maximum(chance, 0), 40).astype(int) >> np.minimum(np.arange(reach + 2), 1)
    w[w < 1 << 24] = 0
    rest = max(w[-1], 1 << 24)
    return frequencies(np.concatenate([w[-2:0:-1], w[:-1], [rest, rest]]))


def paths(data, states, unit, scale, octaves):
    """Values of a path; octaves: of columns and rows, what the hints are made of."""
    m, n = scale.size, unit.size
    need(np.isfinite(unit).all(), "a gain that is not finite")
    if m * n == 0:
        need(not data, "bytes for no weights")
        return np.zeros((m, n), "f4")
    *packed, rest = sections(data, 3)
    source = Source(rest)
    kind, reach, first = source.take(3).tolist()
    precision, border, hinted = 1 << (kind & 3), kind >> 2 & 15, (kind >> 6 & 1, kind >> 7)
    levels = [
        grid(part, hint.size, 4096) + use * np.rint(hint * precision).astype(int)
        for part, hint, use in zip(packed, octaves, hinted, strict=True)
    ]
    last = first + levels[0].max() + levels[1].max()
    need(min(v.min() for v in levels) == 0 and last < 16 * precision, "levels outside their scale")
    need(border < len(BORDERS) and 0 < reach <= 126, "kind of a path")
    count = source.varint()
    escaped = unzigzag(source.golomb(count, source.byte())) if count else np.zeros(0, int)
    places = range(first, last + 1)
    table = [gaussian(at, g, precision, border, reach) for at in places for g in (0, 1)]
    feedback, driven = CODES[states]
    k, odd_grid = np.empty((m, n), int), np.empty((m, n), int)
    for block, rows, panel in blocks(source, m, n, np.array(table)):
        need(rows[0] % 1024 == 0, "a block inside a segment")
        state = np.zeros(panel.stop - panel.start, int)
        for row in rows:
            state = state * (row % 1024 > 0)
            on_grid = state & 1
            symbol = block.row(2 * (levels[0][panel] + levels[1][row]) + on_grid)
            k[row, panel], odd_grid[row, panel] = symbol - reach, on_grid
            state = state >> 1 ^ feedback * on_grid ^ driven * (symbol - reach & 1)
    need((abs(2 * escaped + 1) < 1 << 32).all(), "an escaped value beyond 32 bits")
    need((k > reach).sum() == escaped.size, "number of escapes")
    k[k > reach] = escaped
    unit = unit * np.float32(0.5) if states == 1 else unit
    return (2 * k - odd_grid * np.sign(k)).astype("f4") * unit * scale[:, None]
