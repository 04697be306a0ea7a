"""Powers before a uniform grid: NUPES (Yvinec et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator

from bench.gallery import at_equal_bytes, harm, layers, ordering, versus
from bench.harness import Row

EXPONENTS = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)


def rows(quick: bool) -> Iterator[Row]:
    """Against the uniform grid at the same bytes, and against integers."""
    chosen = layers()
    for bits in (4,) if quick else (2, 3, 4, 5):
        uniform = f"power:bits={bits},exponent=1.0"
        yield versus(f"power <= uniform, {bits} bits", f"power:bits={bits}", uniform, chosen)
    nearest = "solver=nearest"
    yield versus(
        "power <= uniform, 4 bits, to nearest",
        f"power:{nearest}",
        f"power:exponent=1.0,{nearest}",
        chosen,
    )
    integers = [f"integer:bits={bits}" for bits in (2, 3, 4, 5)]
    yield at_equal_bytes("power <= integers at equal bytes, packed", "power", integers, chosen)
    coded = [f"{text},pack=coded" for text in integers]
    yield at_equal_bytes("the same, both entropy coded", "power:pack=coded", coded, chosen)
    if not quick:
        searched = sum(harm("power", layer)[1] for layer in chosen)
        ideal = sum(
            min(harm(f"power:exponent={a}", layer)[1] for a in EXPONENTS) for layer in chosen
        )
        note = "what learning the exponent together with the weights could gain at most"
        yield ordering(
            "best exponent of each layer after rounding <= searched", ideal / searched, note
        )
