"""Better than any prediction: try the model itself, again and again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.plan.allocation import Context, Trial
from waterfill.plan.hull import Curves, point_on, segments_of
from waterfill.types import Point, SpecError, TensorInfo

STARTS_FROM = "hull"
OFFSPRING = 8
STAGES = ((512, 3), (2048, 1))  # tokens that offspring are tried on, and how many are kept
SWITCHES = 3  # tensors a level up in one offspring, at most
STEP_BITS = 0.25  # per weight, from level to level of a continuous codec
PAYMENTS = 8  # more tensors that go down, where real sizes are above the estimates

Levels = NDArray[np.intp]


def allocate(curves: Curves, budget: float, context: Context) -> dict[str, Point]:
    """Evolutionary search on the KL of the really decoded model (EvoPress, Sieberling et al. 2024).

    Predictions are sums over tensors; at low rates errors meet, and the sum is wrong. So (arXiv
    2410.14649): from a parent come `OFFSPRING` children, each with a few tensors a level up and others
    a level down, at the same bytes. All are tried on a few tokens, the best of them on more, the last
    one on all; whoever does no less harm than the parent on the same tokens is out, and who gets
    through takes its place. What is drawn hangs on the seed and the number of the generation only, so
    a search goes on where it stopped.

    Sizes are those of real encodings, and the budget is the trial's.

    Raises
    ------
    SpecError
        Where there is no model at hand.
    """
    trial = context.trial
    if trial is None:
        raise SpecError(
            "evolutionary runs the model itself, so it cannot plan without encoding: use "
            "`waterfill compress --allocate evolutionary`, whose artifact is a plan for --plan"
        )
    search = _Search.of(curves, context.infos, trial)
    state = trial.kept() or {
        "generation": 0,
        "parent": search.start.tolist(),
        "harms": trial.harms(trial.start, range(trial.windows)),
    }
    while not trial.is_over(state["generation"]):
        following = _generation(search, state)
        if following is None:
            break
        state = following
        trial.keep(state)
    return search.choices(np.array(state["parent"], np.intp))


def _generation(search: _Search, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state after one more generation; None if the time was up before its end."""
    trial, number = search.trial, state["generation"]
    parent = np.array(state["parent"], np.intp)
    children = []
    for i in range(OFFSPRING):
        if trial.is_over(number):
            return None
        child = search.child(parent, np.random.default_rng([trial.seed, number, i]))
        children += [] if child is None else [child]
    order = np.random.default_rng([trial.seed, number]).permutation(trial.windows)
    for tokens, survivors in (*STAGES, (trial.window * trial.windows, 1)):
        windows = np.sort(order[: -(-tokens // trial.window)]).tolist()
        found = []
        for child in children:
            if trial.is_over(number):
                return None
            found.append(trial.harms(search.choices(child), windows))
        bar = np.mean([state["harms"][i] for i in windows])
        means = np.array([np.mean(harms) for harms in found])
        fit = [int(i) for i in np.argsort(means, kind="stable")[:survivors] if means[i] < bar]
        children = [children[i] for i in fit]
        if fit and len(windows) == trial.windows:
            state = {"parent": children[0].tolist(), "harms": found[fit[0]]}
            break
    return {**state, "generation": number + 1}


@dataclass(frozen=True)
class _Search:
    """Levels of every tensor, by size.

    Attributes
    ----------
    trial : Trial
    names : tensors
    points : of each tensor, one per level; more bytes, less harm as predicted
    nbytes : float64 (levels,) of each tensor: as estimated, true to the encoding it starts from
    start : int (tensors,) levels of what the search starts from
    room : estimated bytes that all tensors together may have
    """

    trial: Trial
    names: tuple[str, ...]
    points: tuple[tuple[Point, ...], ...]
    nbytes: tuple[NDArray[np.float64], ...]
    start: Levels
    room: float

    @classmethod
    def of(cls, c: Curves, infos: Mapping[str, TensorInfo], trial: Trial) -> _Search:
        """From curves, and the file that is to be bettered."""
        points, nbytes, start, spent = [], [], [], 0
        for t, name in enumerate(c.names):
            begin = trial.start[name]
            points.append(_levels(c, t, infos[name].size, begin))
            real = trial.nbytes(name, begin)
            scale = real / begin.nbytes if begin.nbytes else 1.0
            nbytes.append(scale * np.array([p.nbytes for p in points[-1]]))
            start.append(points[-1].index(begin))
            spent += real
        room = spent + trial.slack(trial.start)
        return cls(trial, c.names, tuple(points), tuple(nbytes), np.array(start, np.intp), room)

    def choices(self, levels: Levels) -> dict[str, Point]:
        """The points at these levels."""
        each = zip(self.names, self.points, levels, strict=True)
        return {name: points[level] for name, points, level in each}

    def child(self, parent: Levels, random: np.random.Generator) -> Levels | None:
        """A few tensors up, others down so that they are paid for; None where nothing can pay."""
        levels = parent.copy()
        for _ in range(int(min(random.integers(1, SWITCHES + 1, 2)))):
            able = [t for t, points in enumerate(self.points) if levels[t] + 1 < len(points)]
            if not able:
                return None
            levels[random.choice(able)] += 1
        raised = levels > parent
        while self._estimate(levels) > self.room:
            if not self._lower(levels, raised, random):
                return None
        self._spend(levels, levels >= parent, random)
        for _ in range(PAYMENTS):
            if self.trial.slack(self.choices(levels)) >= 0:
                return levels
            if not self._lower(levels, raised, random):
                return None
        return None

    def _lower(
        self, levels: Levels, raised: NDArray[np.bool_], random: np.random.Generator
    ) -> bool:
        able = np.flatnonzero(~raised & (levels > 0))
        if len(able):
            levels[random.choice(able)] -= 1
        return len(able) > 0

    def _spend(self, levels: Levels, able: NDArray[np.bool_], random: np.random.Generator) -> None:
        """What paying has left over goes to others that it is enough for."""
        left = self.room - self._estimate(levels)
        for t in random.permutation(np.flatnonzero(able)):
            sizes = self.nbytes[t]
            if levels[t] + 1 < len(sizes) and sizes[levels[t] + 1] - sizes[levels[t]] <= left:
                left -= sizes[levels[t] + 1] - sizes[levels[t]]
                levels[t] += 1

    def _estimate(self, levels: Levels) -> float:
        return float(sum(sizes[at] for sizes, at in zip(self.nbytes, levels, strict=True)))


def _levels(c: Curves, tensor: int, size: int, start: Point) -> tuple[Point, ...]:
    """Points of a tensor from small to large, each of less harm than the one before; one is `start`."""
    points = []
    for s in segments_of(c, tensor):
        parts = int(np.ceil(8 * (c.b1[s] - c.b0[s]) / (STEP_BITS * max(size, 1))))
        inner = np.linspace(c.b0[s], c.b1[s], parts + 1)[1:-1] if parts else [c.b0[s]]
        points += [point_on(c, s, float(at)) for at in inner]
    smaller = [
        p for p in points if p.nbytes < start.nbytes and p.distortion_nats > start.distortion_nats
    ]
    larger = [
        p for p in points if p.nbytes > start.nbytes and p.distortion_nats < start.distortion_nats
    ]
    return (*_efficient(smaller), start, *_efficient(larger))


def _efficient(points: list[Point]) -> list[Point]:
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.nbytes, p.distortion_nats)):
        if not kept or point.distortion_nats < kept[-1].distortion_nats:
            kept.append(point)
    return kept
