"""Solvers of one grid against each other, and outliers against the bytes they cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bench.gallery import Layer, at_equal_bytes, layers, versus
from bench.harness import Row


def rows(quick: bool) -> Iterator[Row]:
    """At equal grid for solvers, at equal bytes for outliers."""
    for model in ("english-7m",) if quick else ("english-7m", "stories260K"):
        chosen = layers(model)
        for bits in (2, 3):
            yield from _solvers(model, f"integer:bits={bits}", chosen)
        yield from _outliers(model, chosen)


def _solvers(model: str, grid: str, chosen: tuple[Layer, ...]) -> Iterator[Row]:
    for better, worse in (
        ("successive", "nearest"),
        ("coordinate", "successive"),
        ("adaround", "nearest"),
        ("adaround", "coordinate"),
    ):
        claim = f"{model}, {grid}: {better} <= {worse}"
        left, right = f"{grid},solver={better}", f"{grid},solver={worse}"
        row = versus(claim, left, right, chosen)
        yield replace(row, bar=1.0) if better == "coordinate" else row


def _outliers(model: str, chosen: tuple[Layer, ...]) -> Iterator[Row]:
    """Against smaller groups, and against more bits for some layers, which is what a planner can do."""
    for bits, share in ((2, 0.01), (3, 0.005)):
        left = f"integer:bits={bits},solver=coordinate,outliers={share}"
        groups = [f"integer:bits={bits},solver=coordinate,group={g}" for g in (128, 64, 32, 16)]
        yield at_equal_bytes(f"{model}, {left} <= smaller groups", left, groups, chosen)
        other = [f"integer:bits={b},solver=coordinate" for b in (bits, bits + 1)]
        yield at_equal_bytes(f"{model}, {left} <= more bits", left, other, chosen)
