"""One water level for the whole model: the Lagrangian over every tensor's operating points.

Minimising total nats under a byte budget means that at the optimum every tensor has the same slope
(Shoham & Gersho 1988): for one multiplier, the *water level* in nats per byte, each tensor takes the
point that minimises ``nats + level * bytes``. Between two rungs of a continuous codec the curve is
``nats = D0 * exp(-c (bytes - B0))``, straight in the logarithm as rate-distortion theory has it, and
the minimum is where its slope meets the level.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.registry import make_codec
from waterfill.types import Point, Spec

F64 = NDArray[np.float64]
FLOOR_NATS = 1e-18


@dataclass(frozen=True)
class Curves:
    """All segments of all tensors, flat; a lone point is a segment without length.

    Attributes
    ----------
    names : tensors, in order
    start : int (tensors,) first segment of each tensor
    b0, d0, b1, d1 : float64 (segments,) ends of each segment, bytes and nats
    ends : the two Points of each segment
    make : what a Point's specification is of: something with `between` and `spec`
    """

    names: tuple[str, ...]
    start: NDArray[np.intp]
    b0: F64
    d0: F64
    b1: F64
    d1: F64
    ends: tuple[tuple[Point, Point], ...]
    make: Callable[[Spec], Any] = make_codec

    @property
    def decay(self) -> F64:
        """c of each segment, nats to nats per byte; 0 for a lone point."""
        length = self.b1 - self.b0
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(length > 0, np.log(self.d0 / self.d1) / length, 0.0)


def curves(
    prices: Mapping[str, Sequence[Point]], make: Callable[[Spec], Any] = make_codec
) -> Curves:
    """Arrange priced ladders for `at_level`; `make` as of `Curves`."""
    start: list[int] = []
    ends: list[tuple[Point, Point]] = []
    for points in prices.values():
        start.append(len(ends))
        ends += [(p, p) for p in points]
        ordered = sorted(points, key=lambda p: (p.spec.id, p.nbytes))
        for a, b in itertools.pairwise(ordered):
            joined = (
                a.spec.id == b.spec.id
                and b.nbytes > a.nbytes
                and a.distortion_nats > b.distortion_nats > 0
            )
            if joined and make(a.spec).between(make(b.spec), 0.5) is not None:
                ends.append((a, b))
    nbytes = np.array([(a.nbytes, b.nbytes) for a, b in ends], np.float64).reshape(-1, 2)
    nats = np.array([(a.distortion_nats, b.distortion_nats) for a, b in ends], np.float64).reshape(
        -1, 2
    )
    nats = np.maximum(nats, FLOOR_NATS)
    first = np.array(start, np.intp)
    return Curves(
        tuple(prices), first, nbytes[:, 0], nats[:, 0], nbytes[:, 1], nats[:, 1], tuple(ends), make
    )


def at_level(
    c: Curves, level: float, scale: float | F64 = 1.0
) -> tuple[F64, F64, NDArray[np.intp]]:
    """Bytes, nats and segment of every tensor at one water level.

    `scale` multiplies predicted bytes: the ratio of actual to predicted that an encoder has seen,
    one for all or one for each segment.
    """
    scale = np.broadcast_to(np.asarray(scale, np.float64), c.b0.shape)
    decay = c.decay
    with np.errstate(divide="ignore"):
        nats = np.where(decay > 0, np.clip(level * scale / decay, c.d1, c.d0), c.d0)
        nbytes = np.where(
            decay > 0, c.b0 + np.log(c.d0 / nats) / np.where(decay > 0, decay, 1), c.b0
        )
    cost = nats + level * scale * nbytes
    lowest = np.minimum.reduceat(cost, c.start)
    owner = np.repeat(np.arange(len(c.names)), np.diff([*c.start, len(cost)]))
    # The first segment that reaches its tensor's lowest cost.
    hit = np.flatnonzero(cost <= lowest[owner])
    _, first = np.unique(owner[hit], return_index=True)
    pick = hit[first]
    return nbytes[pick] * scale[pick], nats[pick], pick


def solve_level(c: Curves, budget_nbytes: float, scale: float | F64 = 1.0) -> float:
    """The smallest water level whose total stays within the budget (bisection on its logarithm)."""
    low, high = -120.0, 40.0
    for _ in range(80):
        middle = (low + high) / 2
        if at_level(c, float(np.exp(middle)), scale)[0].sum() > budget_nbytes:
            low = middle
        else:
            high = middle
    return float(np.exp(high))


def point_on(c: Curves, segment: int, nbytes: float) -> Point:
    """The operating point at so many (unscaled) bytes along a segment."""
    a, b = c.ends[segment]
    if a is b or nbytes <= a.nbytes:
        return a
    if nbytes >= b.nbytes:
        return b
    t = (nbytes - a.nbytes) / (b.nbytes - a.nbytes)
    between = c.make(a.spec).between(c.make(b.spec), t)
    assert between is not None
    nats = a.distortion_nats ** (1 - t) * b.distortion_nats**t
    return Point(nbytes, nats, between.spec)


def smallest(c: Curves) -> float:
    """Fewest bytes any choice of points can take."""
    return float(np.minimum.reduceat(c.b0, c.start).sum())


def cheapest(c: Curves) -> dict[str, Point]:
    """The point of fewest bytes of each tensor."""
    stops = [*c.start[1:], len(c.b0)]
    return {
        name: c.ends[int(first + np.argmin(c.b0[first:stop]))][0]
        for name, first, stop in zip(c.names, c.start, stops, strict=True)
    }


def tail(c: Curves, first: int) -> Curves:
    """The curves of the tensors from `first` on."""
    at = int(c.start[first])
    return Curves(
        c.names[first:],
        c.start[first:] - at,
        c.b0[at:],
        c.d0[at:],
        c.b1[at:],
        c.d1[at:],
        c.ends[at:],
        c.make,
    )


def segments_of(c: Curves, tensor: int) -> range:
    """Indices of one tensor's segments."""
    stop = c.start[tensor + 1] if tensor + 1 < len(c.names) else len(c.b0)
    return range(int(c.start[tensor]), int(stop))


def point_near(c: Curves, tensor: int, codec_id: str, nbytes: float) -> Point | None:
    """The point at so many bytes on a continuous codec's curve; None if the codec has rungs only."""
    inside = [
        s for s in segments_of(c, tensor) if c.b1[s] > c.b0[s] and c.ends[s][0].spec.id == codec_id
    ]
    if not inside:
        return None
    nearest = min(inside, key=lambda s: max(c.b0[s] - nbytes, nbytes - c.b1[s], 0.0))
    return point_on(c, nearest, nbytes)
