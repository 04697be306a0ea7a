"""More bits for blocks with few large weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from waterfill.plan.allocation import Context
from waterfill.plan.hull import Curves
from waterfill.plan.rates import Rates, block_of, graded
from waterfill.types import Point


def allocate(curves: Curves, budget: float, context: Context) -> dict[str, Point]:
    """Blocks in order of their z-score distribution (ZD, Dumitru et al. 2024, arXiv 2406.17415).

    ZD is the share of a block's weights that lie more than one standard deviation above their mean;
    the lowest get the most bits, up to one per weight more than the highest. It needs no text, only
    the weights.
    """
    if "zd" not in context.memory:
        context.memory["zd"] = _importance(curves, context)
    offsets = graded(curves.names, context.memory["zd"])
    return Rates.of(curves, context.infos).fill(offsets, budget)


def _importance(curves: Curves, context: Context) -> dict[str, float]:
    blocks: dict[str, list[str]] = {}
    for name in curves.names:
        info = context.infos[name]
        if len(info.shape) > 1 and block_of(info):
            blocks.setdefault(block_of(info), []).append(name)
    importance = {}
    for names in blocks.values():
        importance.update(dict.fromkeys(names, -large_share(context, names)))
    return importance


def large_share(context: Context, names: Sequence[str]) -> float:
    """Share of weights, of some matrices together, with a z-score above 1."""
    count = sum(context.infos[name].size for name in names)
    total = squares = 0.0
    for name in names:
        matrix = context.matrix(name)
        total += float(matrix.sum(dtype=np.float64))
        squares += float(np.einsum("ij,ij->", matrix, matrix, dtype=np.float64))
    mean = total / count
    limit = mean + np.sqrt(max(squares / count - mean**2, 0.0))
    return sum(int(np.count_nonzero(context.matrix(name) > limit)) for name in names) / count
