"""What VPTQ (Liu et al. 2024, arXiv 2409.17066) claims of its parts, and what ours add."""

from __future__ import annotations

from collections.abc import Iterator

from bench.gallery import at_equal_bytes, layers, versus
from bench.harness import Row

# One codebook, unscaled columns, trained once: the published method without its extras.
PUBLISHED = "scaled=no,classes=1,passes=1,rows=0.0"


def rows(quick: bool) -> Iterator[Row]:
    """Second order, weights, residual, outliers; then classes, and others at equal bytes."""
    chosen = layers(count=3 if quick else 6)
    single = [f"vector:bits={bits},length=3,{PUBLISHED}" for bits in (1.5, 2.0, 2.5)]
    base = single[1]
    yield versus("second-order <= plain k-means", base, f"{base},solver=nearest", chosen)
    yield versus("weighted <= unweighted k-means", base, f"{base},weighted=no", chosen)
    yield at_equal_bytes(
        "a residual codebook <= a single one at equal bytes",
        f"vector:bits=2.0,length=4,residual=0.5,{PUBLISHED}", single, chosen,
    )  # fmt: skip
    yield at_equal_bytes(
        "a codebook for columns of most energy <= one for all at equal bytes",
        base.replace("classes=1", "classes=2"), single, chosen,
    )  # fmt: skip
    twice = base.replace("passes=1", "passes=2")
    yield versus("trained again on what was rounded <= once", twice, base, chosen)
    full = [f"vector:bits={bits},length=2" for bits in (1.0, 2.0, 3.0)]
    yield at_equal_bytes(
        "scaled columns in eight classes <= as published at equal bytes", full[1], single, chosen
    )
    integers = [f"integer:bits={bits}" for bits in (2, 3, 4, 5)]
    steps = [f"trellis:states=1,step={step}" for step in (2.0, 1.2, 0.8, 0.5, 0.3)]
    for text in full[1 : 2 if quick else 3]:
        yield at_equal_bytes(f"{text} <= integers at equal bytes", text, integers, chosen)
        yield at_equal_bytes(
            f"{text} <= scalar rounding through rANS at equal bytes", text, steps, chosen
        )
    yield at_equal_bytes(
        f"{full[0]} <= scalar rounding through rANS at equal bytes", full[0], steps, chosen
    )
