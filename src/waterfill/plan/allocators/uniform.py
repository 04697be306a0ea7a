"""Every tensor alike: the baseline of most papers."""

from __future__ import annotations

import numpy as np

from waterfill.plan.allocation import Context
from waterfill.plan.hull import Curves
from waterfill.plan.rates import Rates
from waterfill.types import Point


def allocate(curves: Curves, budget: float, context: Context) -> dict[str, Point]:
    """The same rung, or the same bits per weight, for all tensors: the largest that fits.

    On rungs alone this may leave much of the budget over.
    """
    return Rates.of(curves, context.infos).fill(np.zeros(len(curves.names)), budget)
