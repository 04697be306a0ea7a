"""How a coded matrix is cut into panels, segments and blocks, and what its arrays must satisfy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from waterfill.coding.coded_models import LANES
from waterfill.coding.trellis import CODES, SEGMENT
from waterfill.types import Array, Integers

__all__ = ["FLOATS", "TILE", "Layout", "require_valid"]

FLOATS = ("F32", "BF16", "F16")
TILE = 32  # rows of a panel before those of the next
LARGE, SMALL = 1 << 19, 1 << 18  # weights of a block
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
        # Large blocks have less overhead; a small matrix still wants several, for threads.
        weights = min(LARGE, max(SMALL, m * n // 16))
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
        if not (0 < m < 1 << 31 and 0 < n < 1 << 31 and states in (1, *CODES)):
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


def require_valid(arrays: Mapping[str, Array]) -> None:
    """ValueError unless the arrays have the types and sizes of one coded matrix."""
    names = {
        "layout": np.int64,
        "order": np.int32,
        "units": np.float32,
        "row_levels": np.uint8,
        "panel_levels": np.uint8,
        "choice": np.uint8,
        "shifts": np.uint8,
        "tables": np.uint8,
        "starts": np.int64,
        "codes": np.uint8,
    }
    missing = {*names, "scales"} - arrays.keys()
    if missing:
        raise ValueError(f"coded: arrays are missing: {', '.join(sorted(missing))}")
    for name, dtype in names.items():
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
        "tables": (tables, 512),
        "starts": (layout.blocks + 1,),
        "codes": (arrays["codes"].size,),
    }
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f"coded: {name} is {shape}, not {arrays[name].shape}")
