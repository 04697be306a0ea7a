"""What the name of a stored cache's level means: bit for bit, a water level, or a size."""

from __future__ import annotations

import math
from dataclasses import replace

from waterfill.coding.cachegen_header import Level
from waterfill.plan.budget import parse_size
from waterfill.runtime.cache.stored.saving import LEVEL, Saving, counted
from waterfill.types import BudgetError, WaterfillError

__all__ = ["level_of"]

COARSEST = 1e6  # a step beyond anything
CLOSE = 0.99  # of a size is filled at least
SOME, TRIES = 4, 6  # layers and chunks looked at to come near a size, and how often
SIZES = 8 / 16  # bits for each number that a halved step costs, about


def level_of(named: float | str, saving: Saving) -> Level:
    """The level that a name means for a cache.

    Raises
    ------
    WaterfillError
        If it means nothing.
    BudgetError
        If it is a size that is too small.
    """
    name = f"{named:g}" if isinstance(named, float) else str(named)
    if name == "exact":
        return Level(name, None)
    if name.isdecimal():
        return Level(name, _step_for(saving, int(name)))
    try:
        nats = float(name)
    except ValueError:
        return Level(name, _step_for(saving, _nbytes(name, saving)))
    if not 0 < nats < COARSEST:
        raise WaterfillError(f"a level of {name} nats per number: it must be above 0")
    return Level(name, math.sqrt(12 * nats))


def _nbytes(name: str, saving: Saving) -> int:
    if not name.endswith("bits"):
        return parse_size(name)
    try:
        return int(float(name.removesuffix("bits")) * saving.numbers / 8)
    except ValueError:
        raise WaterfillError(f"{name!r} is no number of bits") from None


def _step_for(saving: Saving, nbytes: int) -> float:
    """The finest step at which the cache takes at most so many bytes, to about a hundredth."""

    def size(step: float, some: int | None) -> int:
        return counted(replace(saving, levels=(Level("size", step),)), some)

    least = size(COARSEST, None)
    if least > nbytes:
        raise BudgetError(
            f"{nbytes:,} bytes are too few for this cache: it takes {least:,} at least"
        )
    step, aim = math.sqrt(12 * LEVEL), (1 + CLOSE) / 2 * nbytes

    def other(step: float, got: int) -> float:
        change = max(-4.0, min(4.0, (got - aim) / (SIZES * saving.numbers / 8)))
        return min(step * math.exp2(change), COARSEST)

    for _ in range(TRIES):
        got = size(step, SOME)
        if CLOSE * nbytes <= got <= nbytes:
            break
        step = other(step, got)
    fine, coarse = 0.0, COARSEST  # too large at the one, small enough at the other
    for _ in range(2 * TRIES):
        got = size(step, None)
        if got > nbytes:
            fine = max(fine, step)
        else:
            coarse = min(coarse, step)
            if got >= CLOSE * nbytes:
                break
        step = other(step, got)
        if not fine < step < coarse:
            step = math.sqrt(max(fine, coarse / 16) * coarse)
    return coarse
