"""What a low-rank matrix added to a codec is worth: by metric, and against more bits of that codec."""

from __future__ import annotations

from collections.abc import Iterator

from bench.gallery import at_equal_bytes, layers, versus
from bench.harness import Row

RANK = 4  # a tenth of a bit a weight for these layers
# A codec inside, and it alone at more bytes.
INNERS = {
    "integer:bits=3,group=64,solver=nearest,pack=coded": [
        f"integer:bits={bits},group=64,solver=nearest,pack=coded" for bits in (2, 3, 4)
    ],
    "integer:bits=2,group=64,pack=coded": [
        f"integer:bits={bits},group=64,pack=coded" for bits in (2, 3)
    ],
    "trellis:step=1.0": [f"trellis:step={step}" for step in (1.0, 0.8, 0.6)],
}


def rows(quick: bool) -> Iterator[Row]:
    """Orderings of ZeroQuant-V2 and EoRA, and of what is ours."""
    chosen = layers()
    for inner, finer in list(INNERS.items())[: 2 if quick else 3]:
        around = f"lowrank:inner=({inner}),rank={RANK}"
        lorc, eora, harm = (
            f"{around},bits=8,rounds=0,method={method}" for method in ("lorc", "eora", "harm")
        )
        few, default = f"{around},rounds=0", around
        yield versus(f"LoRC <= {inner} alone, more bytes", lorc, inner, chosen)
        yield versus("EoRA <= LoRC at equal rank", eora, lorc, chosen)
        yield versus("row weights too <= EoRA", harm, eora, chosen)
        wide = [f"lowrank:inner=({inner}),rank={rank},bits=8,rounds=0" for rank in (2, 3, 4)]
        yield at_equal_bytes("factors of 5 bits <= 8 bits, equal bytes", few, wide, chosen)
        yield versus("two rounds <= none", default, few, chosen)
        yield at_equal_bytes("rank <= more bits inside, equal bytes", default, finer, chosen)
