"""Pyramid vector quantisation against integers (van der Ouderaa et al. 2024, arXiv 2410.16926)."""

from __future__ import annotations

from collections.abc import Iterator

from bench.gallery import at_equal_bytes, layers, versus
from bench.harness import Row

AS_PUBLISHED = {2: "bits=2.0,gain=4", 3: "bits=3.0,gain=8", 4: "bits=3.6,gain=16"}


def rows(quick: bool) -> Iterator[Row]:
    """At about two, three and four bits; as published, then with pulses water-filled."""
    chosen = layers(count=3 if quick else 6)
    nearest = [f"integer:bits={bits},group=64,solver=nearest" for bits in (2, 3, 4, 5, 6)]
    packed = [f"integer:bits={bits}" for bits in (2, 3, 4, 5, 6)]
    coded = [f"{text},pack=coded" for text in packed]
    for bits in (2, 3) if quick else (2, 3, 4):
        even = f"pyramid:{AS_PUBLISHED[bits]},even=yes"
        filled = f"pyramid:{AS_PUBLISHED[bits]}"
        plain = f"{even},solver=nearest"
        yield at_equal_bytes(
            f"{bits} bits, nothing weighted: points <= integers at equal bytes",
            plain, nearest, chosen,
        )  # fmt: skip
        yield versus(f"{bits} bits: Hessian-weighted <= plain points", even, plain, chosen)
        yield at_equal_bytes(
            f"{bits} bits: weighted points <= GPTQ's integers at equal bytes", even, packed, chosen
        )
        yield at_equal_bytes(
            f"{bits} bits: water-filled points <= coded integers at equal bytes",
            filled, coded, chosen,
        )  # fmt: skip
        steps = [f"trellis:states=1,step={step}" for step in (1.0, 0.6, 0.4, 0.25, 0.15)]
        yield at_equal_bytes(
            f"{bits} bits: water-filled points <= scalar rounding through rANS at equal bytes",
            filled, steps, chosen,
        )  # fmt: skip
