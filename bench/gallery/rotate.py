"""What a Hadamard rotation is worth to integers and to a trellis, as layers are and with outliers.

Outliers: one weight in a thousand made ten times as large.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from bench.gallery import Layer, at_equal_bytes, layers, versus
from bench.harness import Row

INTEGERS = ("integer:bits=3", "integer:bits=3,solver=nearest", "integer:bits=2,group=32")


def rows(quick: bool) -> Iterator[Row]:
    """Orderings of QuaRot and QuIP#."""
    plain = layers()
    spiked = tuple(with_outliers(layer) for layer in plain)
    for inner in INTEGERS[: 2 if quick else 3]:
        rotated = f"rotate:inner=({inner})"
        for label, chosen in (("", plain), (", with outliers", spiked)):
            yield versus(f"rotated <= {inner}{label}", rotated, inner, chosen)
    finer = [f"trellis:step={step}" for step in (0.6, 0.5, 0.4)]
    for label, chosen in (("", plain), (", with outliers", spiked)):
        claim = f"rotated <= trellis at equal bytes{label}"
        yield at_equal_bytes(claim, "rotate:inner=(trellis:step=0.5)", finer, chosen)
    for block in (16, 32768):
        other = f"rotate:inner=(integer:bits=3),block={block}"
        yield versus(f"blocks of 128 <= {block}", "rotate:inner=(integer:bits=3)", other, plain)


def with_outliers(layer: Layer) -> Layer:
    """The layer with one weight in a thousand ten times as large."""
    info = layer.info
    matrix = info.matrix(layer.bits)
    chosen = np.random.default_rng(0).random(matrix.shape) < 1e-3
    matrix[chosen] *= 10
    return dataclasses.replace(layer, bits=info.unmatrix(matrix))
