"""One point for each tensor by an integer program: the best that rungs alone allow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.plan.allocation import Context
from waterfill.plan.allocators.hull import allocate as on_the_hull
from waterfill.plan.hull import Curves, point_on, segments_of
from waterfill.types import Point, WaterfillError

PARTS = 4  # points tried on each stretch between two rungs of a continuous codec
SECONDS = 60.0
GAP = 1e-4  # of the optimum: as near as is looked for
MARGIN = 1e-6  # of the budget, as the solver takes bounds not quite to the letter


def allocate(curves: Curves, budget: float, context: Context) -> dict[str, Point]:
    """Least predicted harm under the budget, one point per tensor (AdaQuant, Hubara et al. 2020).

    Solved by HiGHS (arXiv 2006.10518 has the program); beats the hull where ladders are rungs with
    wide gaps, since it also sees points off the hull. Never worse than the hull: what that chooses is
    among the candidates.

    Raises
    ------
    WaterfillError
        If SciPy is not installed.
    """
    fallback = on_the_hull(curves, budget, context)
    candidates = [list(_candidates(curves, t, fallback[n])) for t, n in enumerate(curves.names)]
    nbytes = np.array([p.nbytes for points in candidates for p in points], np.float64)
    nats = np.array([p.distortion_nats for points in candidates for p in points], np.float64)
    counts = np.array([len(points) for points in candidates])
    pick = _solve(nbytes / budget, nats / max(nats.max(initial=0.0), 1e-300), counts)
    if pick is None or nbytes[pick].sum() > budget:
        return fallback
    if nats[pick].sum() > sum(p.distortion_nats for p in fallback.values()):
        return fallback
    flat = [p for points in candidates for p in points]
    return {name: flat[i] for name, i in zip(curves.names, pick, strict=True)}


def _candidates(c: Curves, tensor: int, also: Point) -> Iterator[Point]:
    """Points of a tensor that no other of its points beats in both bytes and harm."""
    points = [also]
    for s in segments_of(c, tensor):
        parts = np.linspace(c.b0[s], c.b1[s], PARTS + 1)[1:-1] if c.b1[s] > c.b0[s] else [c.b0[s]]
        points += [point_on(c, s, float(at)) for at in parts]
    least = np.inf
    for point in sorted(points, key=lambda p: (p.nbytes, p.distortion_nats)):
        if point.distortion_nats < least:
            least = point.distortion_nats
            yield point


def _solve(
    nbytes: NDArray[np.float64], nats: NDArray[np.float64], counts: NDArray[np.intp]
) -> NDArray[np.intp] | None:
    """Index of the candidate taken in each group; None if none was found in time.

    Parameters
    ----------
    nbytes : float64 (candidates,) as shares of the budget
    nats : float64 (candidates,) largest 1
    counts : int (groups,) candidates in each group
    """
    optimize, sparse = _scipy()
    group = np.repeat(np.arange(len(counts)), counts)
    one_each = sparse.csr_array(
        (np.ones(len(group)), (group, np.arange(len(group)))), shape=(len(counts), len(group))
    )
    found = optimize.milp(
        nats,
        integrality=np.ones(len(group)),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(nbytes[None], -np.inf, 1 - MARGIN),
        ],
        options={"time_limit": SECONDS, "mip_rel_gap": GAP},
    )
    if found.x is None:
        return None
    order = np.lexsort((-found.x, group))
    first: NDArray[np.intp] = order[np.cumsum(counts) - counts]
    return first


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy import optimize, sparse
    except ImportError as error:
        raise WaterfillError(
            f"the integer program needs SciPy ({error}): pip install 'waterfill[program]', or let "
            "another allocator plan"
        ) from error
    return optimize, sparse
