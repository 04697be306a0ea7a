"""Which column of a packed matrix takes how many bits, and where its codes lie."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.types import Floats

__all__ = ["CORRECTION_NBYTES", "MAX_COLUMNS", "Geometry", "Segment", "misfits", "segments_of"]

ROWS, COLUMNS = 16, 32  # of a tile
WIDTHS = tuple(range(2, 9))
MAX_COLUMNS = 1 << 18  # a correction has so many bits for its column
CORRECTION_NBYTES = 4
# What a correction is priced at, in bits: its own 32 and those of codes read in about half its time of 1 ns.
CORRECTION_BITS = 128.0

Doubles = NDArray[np.float64]
Order = NDArray[np.int32]


@dataclass(frozen=True)
class Segment:
    """Consecutive columns of one width."""

    bits: int
    columns: int


@dataclass(frozen=True)
class Geometry:
    """Shape of a packed matrix: blocks of 16 rows, tiles of 32 columns, segments of tiles.

    Attributes
    ----------
    group : int
        Columns that share a row's scale: n, or a multiple of 32.
    segments : only the last may end within a tile
    """

    m: int
    n: int
    group: int
    segments: tuple[Segment, ...]

    @classmethod
    def of_layout(cls, layout: Any) -> Geometry:
        """Inverse of `layout`."""
        m, n, group, *rest = (int(v) for v in layout)
        segments = tuple(map(Segment, rest[::2], rest[1::2]))
        return cls(m, n, group, segments)

    @property
    def layout(self) -> NDArray[np.int64]:
        """m, n, group, then bits and columns of each segment."""
        flat = [v for s in self.segments for v in (s.bits, s.columns)]
        return np.array([self.m, self.n, self.group, *flat], np.int64)

    @property
    def blocks(self) -> int:
        """Blocks of rows."""
        return -(-self.m // ROWS)

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return -(-self.n // self.group)

    @cached_property
    def block_nbytes(self) -> int:
        """Bytes of a block's codes."""
        return sum(-(-s.columns // COLUMNS) * s.bits * 64 for s in self.segments)

    @property
    def codes_nbytes(self) -> int:
        """Bytes of all codes."""
        return self.blocks * self.block_nbytes

    @property
    def padded_size(self) -> int:
        """Weights that tiles have room for."""
        return self.blocks * ROWS * -(-self.n // COLUMNS) * COLUMNS

    @property
    def chunk(self) -> int:
        """Columns that share a scale of the activations, at most: those of 1 to 4 tiles."""
        tiles = self.group // COLUMNS if self.groups > 1 else 4
        return COLUMNS * next(c for c in (4, 3, 2, 1) if tiles % c == 0)


def misfits(spread: Any, bits: int, states: int = 1) -> Doubles:
    """Share of levels that so many bits cannot hold.

    Half way between a Gaussian and a Student t of five degrees of freedom of the same standard
    deviation: real columns lie between, for their rows differ in scale. The levels of a trellis
    path lie on two grids of every other integer, so what is rounded to one is up to 1 from it.
    """
    half = 2.0 ** (bits - 1)
    spread = np.maximum(np.asarray(spread, np.float64), 1e-30)
    if states == 1:
        return _tail((half + 0.5) / spread) + _tail((half - 0.5) / spread)
    ends = _tail((half - 1) / spread) + _tail((half + 1) / spread)
    return _tail(half / spread) + ends / 2


def _tail(x: Doubles) -> Doubles:
    """Chance of more than x, the mean of both distributions'."""
    distinct, places = np.unique(np.minimum(x, 40.0), return_inverse=True)
    gauss = np.array([math.erfc(v / math.sqrt(2)) / 2 for v in distinct.tolist()])
    t = distinct / math.sqrt(3)  # t / sqrt(5) at unit variance: sqrt(5/3) x / sqrt(5)
    share = 1 / (1 + t * t)
    student = 0.5 - (t * share * (1 + 2 / 3 * share) + np.arctan(t)) / math.pi
    tails: Doubles = ((gauss + np.maximum(student, 0)) / 2)[places.reshape(-1)]
    return tails


def widths_of(spread: Floats, states: int = 1) -> NDArray[np.int64]:
    """Bits of each column: fewest together with what its corrections cost."""
    cost = np.stack([b + CORRECTION_BITS * misfits(spread, b, states) for b in WIDTHS])
    widths: NDArray[np.int64] = np.array(WIDTHS)[np.argmin(cost, axis=0)]
    return widths


def segments_of(
    spread: Floats, bits: int = 0, states: int = 1
) -> tuple[Order | None, tuple[Segment, ...]]:
    """Order of the columns (None: as they are) and their segments, narrow ones first.

    With `bits`, which all levels fit in, there is one segment. A segment that would end within a
    tile gives its last columns to the next.
    """
    n = len(spread)
    if 0 < bits <= 8:
        return None, (Segment(max(bits, 2), n),)
    widths = widths_of(spread, states)
    order = np.argsort(widths, kind="stable").astype(np.int32)
    segments, first = [], 0
    for width in WIDTHS:
        end = int(np.count_nonzero(widths <= width))
        end = n if end == n else end // COLUMNS * COLUMNS
        if end > first:
            segments.append(Segment(width, end - first))
        first = max(first, end)
    identity = np.array_equal(order, np.arange(n))
    return None if identity else order, tuple(segments)
