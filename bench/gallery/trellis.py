"""The flagship against integers: what all others are measured beside."""

from __future__ import annotations

from collections.abc import Iterator

from bench.gallery import at_equal_bytes, layers
from bench.harness import Row


def rows(quick: bool) -> Iterator[Row]:
    """At about two, three and four bits."""
    integers = [f"integer:bits={bits},pack=coded" for bits in (2, 3, 4, 5, 6)]
    for step in (0.65, 0.33, 0.16)[: 2 if quick else 3]:
        claim = f"trellis:step={step} <= coded integers at equal bytes"
        yield at_equal_bytes(claim, f"trellis:step={step}", integers, layers())
