"""Fills a budget: the lowest water level whose real bytes keep to it, and then what that leaves over.

A point between two rungs takes other bytes than the line between them says, mostly by little, and a level
moves rungs in jumps. So levels are tried until the real sum is near the budget, and rungs that still fit are
taken one by one, the most nats a byte first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from waterfill.plan.hull import Curves, at_level, point_on, solve_level
from waterfill.types import Point

__all__ = ["fill"]

ROUNDS = 24
NEAR = 2000  # parts of the budget, one of which may stay unspent
STEP = 4096  # parts of the budget, the first step back from a level that is too large

Points = Mapping[str, Point]


def fill(
    c: Curves,
    prices: Mapping[str, Sequence[Point]],
    least: Points,
    budget_nbytes: int,
    sizes: Callable[[Points], Mapping[str, int]],
) -> Points:
    """A point for each of the curves.

    Parameters
    ----------
    prices : the rungs that the curves were made of
    least : points that fit
    sizes : real bytes of points
    """
    best = _at_best_level(c, least, budget_nbytes, sizes)
    return _spend(best, prices, budget_nbytes, sizes)


def _at_best_level(
    c: Curves, least: Points, budget_nbytes: int, sizes: Callable[[Points], Mapping[str, int]]
) -> Points:
    best, best_total = least, -1
    room, high, back = float(budget_nbytes), math.inf, budget_nbytes / STEP
    for _ in range(ROUNDS):
        at, _, pick = at_level(c, solve_level(c, room))
        points = {n: point_on(c, int(s), b) for n, s, b in zip(c.names, pick, at, strict=True)}
        left = budget_nbytes - sum(sizes(points).values())
        if left < 0:
            # Steps grow, as some bytes too many may stay the same for long.
            high, back = min(high, room), max(2 * back, -left)
            room -= back
            continue
        if budget_nbytes - left > best_total:
            best, best_total = points, budget_nbytes - left
        if left <= budget_nbytes // NEAR:
            break
        room = room + left if room + left < high else (room + high) / 2
    return best


def _spend(
    best: Points,
    prices: Mapping[str, Sequence[Point]],
    budget_nbytes: int,
    sizes: Callable[[Points], Mapping[str, int]],
) -> Points:
    found: dict[str, Point] = dict(best)
    taken: dict[str, float] = dict(sizes(best))
    left: float = budget_nbytes - sum(taken.values())
    while True:
        better = [
            ((found[name].distortion_nats - one.distortion_nats) / max(more, 1), name, one)
            for name, rungs in prices.items()
            for one in rungs
            if one.distortion_nats < found[name].distortion_nats
            and (more := one.nbytes - taken[name]) <= left
        ]
        if not better:
            return found
        _, name, one = max(better, key=lambda item: item[0])
        left -= one.nbytes - taken[name]
        found[name], taken[name] = one, one.nbytes
