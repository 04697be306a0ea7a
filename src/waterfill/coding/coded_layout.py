"""How a coded matrix is cut into panels, segments and blocks, and what its arrays must satisfy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from waterfill.coding.coded_models import LANES, STATES
from waterfill.coding.matrix import FLOATS
from waterfill.coding.trellis import CODES, SEGMENT
from waterfill.types import Array, Integers

__all__ = ["MAX_COLUMNS", "TILE", "Layout", "require_valid"]

MAX_COLUMNS = 1 << 16
MAX_LEVELS = 512
MAX_SHIFT = 20
TILE = 32  # rows of a panel before those of the next
LARGE, SMALL = 1 << 19, 1 << 18  # weights of a block
MOST_BLOCKS = 128  # about
SMALLEST = 2.0**-118  # weight beyond which none is subnormal, nor its way there


@dataclass(frozen=True)
class Layout:
    """Shape and cuts.

    Attributes
    ----------
    m, n : int
    states : int
        Of the trellis machine.
    dtype : str
        F32, BF16 or F16: what weights are rounded to.
    group : int
        Columns that share a row's scale; `n` or more where all do.
    chunk : int
        Panels of a block.
    tiny : bool
        Whether a weight may be a subnormal number.
    """

    m: int
    n: int
    states: int
    dtype: str
    group: int
    chunk: int
    tiny: bool

    @classmethod
    def of(cls, integers: Integers, dtype: str) -> Layout:
        """The cuts for what a codec holds."""
        m, n = integers.shape
        panels = -(-n // LANES)
        # Large blocks have less overhead; a small matrix still wants several, for threads, and a huge
        # one few, for each leaves sums to be added.
        weights = max(min(LARGE, max(SMALL, m * n // 16)), m * n // MOST_BLOCKS)
        chunk = min(panels, -(-weights // (min(m, SEGMENT) * LANES)))
        columns, rows = (np.abs(a[a != 0]) for a in (integers.columns, integers.rows))
        smallest = float(columns.min(initial=1)) * float(rows.min(initial=1))
        group = n if integers.rows.shape[1] == 1 else integers.group
        return cls(m, n, integers.states, dtype, group, chunk, smallest < SMALLEST)

    @classmethod
    def of_array(cls, array: NDArray[np.int64]) -> Layout:
        """Inverse of `array`; ValueError where it is none."""
        if array.shape != (7,) or array.dtype != np.int64:
            raise ValueError("coded: a layout of seven numbers")
        m, n, states, dtype, group, chunk, tiny = (int(v) for v in array)
        panels = -(-n // LANES)
        if not (0 < m < 1 << 31 and 0 < n <= MAX_COLUMNS and states in (1, *CODES)):
            raise ValueError("coded: a layout of no matrix")
        if not (0 <= dtype < len(FLOATS) and tiny in (0, 1) and 0 < chunk <= panels):
            raise ValueError("coded: a layout of no matrix")
        if group <= 0 or (group < n and group % LANES):
            raise ValueError("coded: groups of whole panels")
        return cls(m, n, states, FLOATS[dtype], group, chunk, bool(tiny))

    @property
    def array(self) -> NDArray[np.int64]:
        """As it is kept, int64 (7,)."""
        dtype = FLOATS.index(self.dtype)
        return np.array(
            [self.m, self.n, self.states, dtype, self.group, self.chunk, self.tiny], np.int64
        )

    @property
    def plain(self) -> bool:
        """Whether all levels are on the even grid."""
        return self.states == 1

    @property
    def panels(self) -> int:
        """Of 128 columns each."""
        return -(-self.n // LANES)

    @property
    def across(self) -> int:
        """Blocks beside each other."""
        return -(-self.panels // self.chunk)

    @property
    def blocks(self) -> int:
        """Of all segments of 1024 rows."""
        return -(-self.m // SEGMENT) * self.across

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return -(-self.n // self.group)

    def block(self, index: int) -> tuple[slice, slice]:
        """Rows and panels of a block."""
        row, panel = index // self.across * SEGMENT, index % self.across * self.chunk
        return slice(row, min(row + SEGMENT, self.m)), slice(
            panel, min(panel + self.chunk, self.panels)
        )

    def tiles(self, index: int) -> list[tuple[slice, int]]:
        """Rows and panel of each tile of a block, in the order of decoding."""
        rows, panels = self.block(index)
        return [
            (slice(first, min(first + TILE, rows.stop)), panel)
            for first in range(rows.start, rows.stop, TILE)
            for panel in range(panels.start, panels.stop)
        ]


TYPES = {
    "layout": np.int64,
    "order": np.uint16,
    "units": np.float32,
    "row_levels": np.uint8,
    "panel_levels": np.uint8,
    "choice": np.uint8,
    "shifts": np.uint8,
    "tables": np.uint8,
    "starts": np.int64,
    "codes": np.uint8,
}


def require_valid(arrays: Mapping[str, Array]) -> None:
    """ValueError unless the arrays have the types, sizes and values of one coded matrix.

    What is inside of blocks is seen when they are decoded.
    """
    missing = {*TYPES, "scales"} - arrays.keys()
    if missing:
        raise ValueError(f"coded: arrays are missing: {', '.join(sorted(missing))}")
    for name, dtype in TYPES.items():
        if arrays[name].dtype != dtype:
            raise ValueError(f"coded: {name} is {np.dtype(dtype)}, not {arrays[name].dtype}")
    if arrays["scales"].dtype not in (np.float16, np.float32):
        raise ValueError("coded: scales are float16 or float32")
    if not all(a.flags.c_contiguous for a in arrays.values()):
        raise ValueError("coded: arrays must be contiguous")
    layout = Layout.of_array(arrays["layout"])
    tables = arrays["shifts"].size
    shapes = {
        "order": (layout.n,),
        "units": (layout.panels * LANES,),
        "scales": (layout.groups, layout.m),
        "row_levels": (layout.m,),
        "panel_levels": (layout.panels,),
        "choice": (arrays["choice"].size,),
        "shifts": (tables,),
        "tables": (tables, 4 * STATES),
        "starts": (layout.blocks + 1,),
        "codes": (arrays["codes"].size,),
    }
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f"coded: {name} is {shape}, not {arrays[name].shape}")
    _require_values(arrays)


def _require_values(arrays: Mapping[str, Array]) -> None:
    order, choice, starts = arrays["order"], arrays["choice"], arrays["starts"]
    highest = int(arrays["row_levels"].max()) + int(arrays["panel_levels"].max())
    rules = {
        "order is a permutation": (np.bincount(order, minlength=order.size) == 1).all(),
        "a table for each level": highest < choice.size <= MAX_LEVELS,
        "no table beyond the last": choice.max(initial=0) < arrays["shifts"].size,
        "shifts are at most 20": arrays["shifts"].max(initial=0) <= MAX_SHIFT,
        "states are below 128": (arrays["tables"][:, 2 * STATES :] < STATES).all(),
        "blocks are in order": starts[0] == 0 and (np.diff(starts) >= 0).all(),
        "codes end where the last block does": starts[-1] == arrays["codes"].size,
    }
    for rule, kept in rules.items():
        if not kept:
            raise ValueError(f"coded: {rule}")
