"""A learned change of basis against the codec inside it, which spends its bytes on bits instead."""

from __future__ import annotations

from collections.abc import Iterator

from bench.gallery import at_equal_bytes, layers, versus
from bench.harness import Row


def rows(quick: bool) -> Iterator[Row]:
    """At equal grid, then at equal bytes, for scaled columns and for blocks."""
    solvers = ("nearest",) if quick else ("nearest", "successive", "coordinate")
    for block in (1, 4, 8):
        for solver in solvers:
            for bits in (2, 3) if block == 4 else (3,):
                inner = f"integer:bits={bits},solver={solver}"
                left = f"affine:block={block},inner=({inner})"
                yield versus(f"{left} <= {inner}", left, inner, layers())
                others = [f"integer:bits={b},solver={solver}" for b in (bits, bits + 1)]
                yield at_equal_bytes(f"{left} at equal bytes", left, others, layers())
