"""Bits in closed form, from how sensitive each tensor is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from waterfill.plan.allocation import Context
from waterfill.plan.hull import FLOOR_NATS, Curves
from waterfill.plan.rates import Rates
from waterfill.types import Point

MOST_BITS = 8.0  # per weight: what rungs above say of the ones below is little


def allocate(curves: Curves, budget: float, context: Context) -> dict[str, Point]:
    """``bits_l = mean + 1/2 log2(c_l / geometric mean of c)`` (BAQ, Zhang et al. 2025, arXiv 2506.05664).

    The minimum of ``sum_l n_l c_l 4 ** -bits_l`` over all ways to spend the same bits: every weight is
    then left with the same loss. Where a tensor's ladder ends, the mean of the others moves so that
    the budget is met. Prices are errors weighed by the Hessian, of real encodings: c is read off them.
    Exact if every ladder gains 6.02 dB a bit, which at low rates few do; the hull needs no such law.
    """
    rates = Rates.of(curves, context.infos)
    return rates.fill(0.5 * np.log2(sensitivities(rates)), budget)


def sensitivities(rates: Rates) -> NDArray[np.float64]:
    """c of each tensor, nats per weight: geometric mean over its rungs of ``nats * 4 ** bits``.

    1 on the scale of the geometric mean of all, which is also what a tensor without lossy rungs has.
    """
    c, owner = rates.curves, rates.owner
    bits = 8 * c.b0 / rates.sizes[owner]
    rung = (c.b1 == c.b0) & (c.d0 > FLOOR_NATS) & (bits <= MOST_BITS)
    log_c = np.log(np.maximum(c.d0, FLOOR_NATS) / rates.sizes[owner]) + bits * np.log(4)
    count = np.bincount(owner, rung, len(c.names))
    mean = np.bincount(owner, np.where(rung, log_c, 0.0), len(c.names)) / np.maximum(count, 1)
    known = count > 0
    if known.any():
        mean -= np.average(mean[known], weights=rates.sizes[known])
    return np.exp(np.where(known, mean, 0.0))
