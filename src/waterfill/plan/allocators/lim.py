"""More bits for blocks that change what passes through them."""

from __future__ import annotations

from waterfill.plan.allocation import Context
from waterfill.plan.hull import Curves
from waterfill.plan.rates import Rates, graded
from waterfill.types import Point


def allocate(curves: Curves, budget: float, context: Context) -> dict[str, Point]:
    """Blocks in order of their layer input modification (LIM, Dumitru et al. 2024, arXiv 2406.17415).

    LIM is 1 minus the cosine between what goes into a block and what comes out, mean over tokens; the
    highest get the most bits, up to one per weight more than the lowest. All tensors of a block are
    alike.
    """
    if "lim" not in context.memory:
        context.memory["lim"] = context.influence()
    found = context.memory["lim"]
    own = {name: context.infos[name].tensor for name in curves.names}
    importance = {name: found[tensor] for name, tensor in own.items() if tensor in found}
    return Rates.of(curves, context.infos).fill(graded(curves.names, importance), budget)
