"""Levels of weighted k-means, and outliers apart: SqueezeLLM (Kim et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator

from bench.gallery import at_equal_bytes, layers, versus
from bench.harness import Row

NEAREST = "solver=nearest"


def rows(quick: bool) -> Iterator[Row]:
    """Weights of k-means, tables, outliers, solvers; then against other grids."""
    chosen = layers()
    for table in ("row", "tensor"):
        for bits in (3,) if quick else (3, 4):
            base = f"codebook:bits={bits},table={table},{NEAREST}"
            claim = f"weighted <= plain k-means, a table for each {table}, {bits} bits"
            yield versus(claim, base, f"{base},weighted=no", chosen)
    yield versus("successive <= nearest", "codebook", f"codebook:{NEAREST}", chosen)
    ladder = [f"codebook:bits={bits}" for bits in (2, 3, 4, 5)]
    for share in (0.005,) if quick else (0.001, 0.005, 0.02):
        for bits in (3, 4):
            claim = f"{share:.1%} outliers <= none at equal bytes, {bits} bits"
            yield at_equal_bytes(claim, f"codebook:bits={bits},outliers={share}", ladder, chosen)
    rounded = [f"{text},{NEAREST}" for text in ladder]
    claim = "0.5% outliers <= none at equal bytes, 3 bits, to nearest"
    yield at_equal_bytes(claim, f"codebook:bits=3,outliers=0.005,{NEAREST}", rounded, chosen)
    claim = "the same, a table for each row"
    by_row = [f"{text},table=row" for text in rounded]
    yield at_equal_bytes(claim, f"{by_row[1]},outliers=0.005", by_row, chosen)
    claim = "a table for each row <= one for all at equal bytes, 3 bits"
    yield at_equal_bytes(claim, "codebook:bits=3,table=row", ladder, chosen)
    integers = [f"integer:bits={bits}" for bits in (2, 3, 4, 5)]
    yield at_equal_bytes(
        "codebook <= integers at equal bytes, packed", "codebook", integers, chosen
    )
    coded = [f"{text},pack=coded" for text in integers]
    yield at_equal_bytes("the same, both entropy coded", "codebook:pack=coded", coded, chosen)
