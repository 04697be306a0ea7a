"""The default: one water level, on the convex hull of every tensor's points."""

from __future__ import annotations

from waterfill.plan.allocation import Context
from waterfill.plan.hull import Curves, at_level, point_on, solve_level
from waterfill.types import Point


def allocate(curves: Curves, budget: float, context: Context) -> dict[str, Point]:
    """Stop every tensor where one more byte saves the same harm (Shoham & Gersho 1988).

    The best there is where ladders are continuous. On rungs alone it may leave bytes over that a
    point off the hull could use.
    """
    nbytes, _, pick = at_level(curves, solve_level(curves, budget))
    chosen = zip(curves.names, pick, nbytes, strict=True)
    return {name: point_on(curves, int(s), float(b)) for name, s, b in chosen}
