"""Small floats: LLM-FP4 (Liu et al. 2023) and ZeroQuant-FP (Wu et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator

from bench.gallery import at_equal_bytes, layers, versus
from bench.harness import Row

PLAIN = "float:search=absmax,solver=nearest"


def rows(quick: bool) -> Iterator[Row]:
    """Search, scales, formats; then floats against integers."""
    chosen = layers()
    searched = "float:solver=nearest"
    yield versus("searched FP4 <= E2M1 absmax, to nearest", searched, PLAIN, chosen)
    yield versus("searched FP4 <= E2M1 absmax", "float", "float:search=absmax", chosen)
    yield versus("format and clip searched <= clip alone", "float", "float:search=clip", chosen)
    for split in ("ebits=1,mbits=2", "ebits=3,mbits=0"):
        claim = f"E2M1 <= {'E1M2' if split[6] == '1' else 'E3M0'}, clips searched"
        yield versus(claim, "float:search=clip", f"float:search=clip,{split}", chosen)
    for rule in ("pow2", "ratio"):
        other = f"float:scales={rule}"
        yield versus(f"free scales <= {rule}", "float", other, chosen)
        ladder = ["float:group=256", "float", "float:group=64", "float:group=32"]
        yield at_equal_bytes(f"{rule} <= free scales at equal bytes", other, ladder, chosen)
    yield versus("ratio <= pow2", "float:scales=ratio", "float:scales=pow2", chosen)
    integers = "integer:bits=4,solver=nearest"
    yield versus("searched FP4 <= integers of 4 bits, to nearest", searched, integers, chosen)
    yield versus("searched FP4 <= integers of 4 bits", "float", "integer:bits=4", chosen)
    coded = [f"integer:bits={bits},pack=coded" for bits in (3, 4, 5)]
    yield at_equal_bytes("the same, both entropy coded", "float:pack=coded", coded, chosen)
    if not quick:
        eight = "float:ebits=4,mbits=3,search=clip"
        yield versus("E4M3 <= integers of 8 bits", eight, "integer:bits=8", chosen)
