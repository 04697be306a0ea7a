"""Spend a budget exactly: real encodes, a running correction, then the slack in a few tensors.

Prices are estimates (tall matrices are sampled, curves interpolated), so the encoder watches the
ratio of actual to predicted bytes and re-solves the water level for what is left. What then remains,
a fraction of a percent, is spent by re-encoding a tensor or two a little finer or coarser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from waterfill.plan.hull import Curves, at_level, point_near, point_on, solve_level, tail
from waterfill.types import BudgetError, Point

RESOLVES = 64  # how often the water level is solved again on the way
PASSES = 3  # more, over all tensors, where the first was far off
AIMS = 8
ROUNDS = 40
GIVE = 0.03  # of the budget: how far off the sizes of a plan may be


@dataclass(frozen=True)
class Coded:
    """A tensor as it was really encoded."""

    point: Point
    nbytes: int


Choose = Callable[[int], Mapping[str, Point]]
Encode = Callable[[str, Point], int]
FileSize = Callable[[Mapping[str, Coded]], int]


def fill(
    c: Curves, budget: int, overhead: int, encode: Encode, file_nbytes: FileSize
) -> dict[str, Coded]:
    """Encode every tensor so that the file stays within the budget and nearly reaches it.

    Parameters
    ----------
    c : curves, largest tensors first (so that many small ones correct the big ones' surprises)
    budget : bytes of the file
    overhead : estimate of the bytes that are not payload
    encode : (name, point) -> payload bytes; remembers its result by name and specification
    file_nbytes : exact size of the file that these tensors make

    Returns
    -------
    name -> Coded. The file may exceed the budget only if no continuous codec is in play; the caller
    checks.
    """
    coded = _first_pass(c, budget - overhead, encode)
    slack = budget - file_nbytes(coded)
    best, best_slack = coded, slack
    margin = 0.0
    for _ in range(PASSES):
        if -0.002 * budget <= best_slack <= 0.01 * budget:
            break
        margin += max(-best_slack, 0)  # rungs may not give way by just as much as was asked
        coded = _next_pass(c, coded, slack - margin, encode)
        slack = budget - file_nbytes(coded)
        if _better(slack, best_slack):
            best, best_slack = coded, slack
    return _settle(c, best, budget, encode, file_nbytes)


def follow(
    c: Curves,
    choose: Choose,
    budget: int,
    encode: Encode,
    file_nbytes: FileSize,
) -> dict[str, Coded]:
    """Encode what an allocator chooses, and aim it anew where real sizes are not what they were priced at.

    What is left over is spent as in `fill`, where there is a continuous codec to spend it with.

    Parameters
    ----------
    choose : bytes of a file -> a point for every tensor
    c, budget, encode, file_nbytes : as of `fill`
    """
    aim, tried, slack = budget, None, 0
    best: dict[str, Coded] = {}
    best_slack = 0
    for _ in range(AIMS):
        points = choose(aim)
        if points == tried:
            if slack >= 0:
                break
            slack *= 2  # rungs do not give way by just as little as was asked
            aim += slack
            continue
        tried = points
        coded = {name: Coded(points[name], encode(name, points[name])) for name in c.names}
        slack = budget - file_nbytes(coded)
        if not best or _better(slack, best_slack):
            best, best_slack = coded, slack
        if 0 <= slack <= 0.01 * budget:
            break
        unforeseen = sum(one.nbytes - one.point.nbytes for one in coded.values())
        aim = aim + slack if slack < 0 else int(max(aim, budget - unforeseen))
    return _settle(c, best, budget, encode, file_nbytes)


def keep_to(
    c: Curves,
    points: Mapping[str, Point],
    budget: int,
    encode: Encode,
    file_nbytes: FileSize,
) -> dict[str, Coded]:
    """Encode every tensor at a point chosen before.

    What fits is left as it is, slack and all. Sizes in a plan are estimates, though: where they were
    a little too kind, a tensor or two give way, as in `fill`, and all others stay.

    Raises
    ------
    BudgetError
        If the choices ask for much more than the budget.
    """
    coded = {name: Coded(points[name], encode(name, points[name])) for name in c.names}
    total = file_nbytes(coded)
    if total > (1 + GIVE) * budget:
        raise BudgetError(
            f"the choices of the plan take {total:,} bytes, but its budget is {budget:,}: plan again, "
            "or change one or the other in it"
        )
    return coded if total <= budget else _settle(c, coded, budget, encode, file_nbytes)


def refill(
    c: Curves,
    coded: Mapping[str, Coded],
    budget: int,
    encode: Encode,
    file_nbytes: FileSize,
) -> dict[str, Coded]:
    """As `fill`, from what was chosen before: for tensors that have changed a little since."""
    again = {name: Coded(one.point, encode(name, one.point)) for name, one in coded.items()}
    return _settle(c, again, budget, encode, file_nbytes)


def _first_pass(c: Curves, budget: float, encode: Encode) -> dict[str, Coded]:
    coded: dict[str, Coded] = {}
    spent, predicted = 0, 0.0
    every = max(1, len(c.names) // RESOLVES)
    points: list[Point] = []
    for i, name in enumerate(c.names):
        if i % every == 0:
            scale = float(np.clip(spent / predicted, 0.8, 1.25)) if predicted else 1.0
            rest = tail(c, i)
            nbytes, _, pick = at_level(rest, solve_level(rest, budget - spent, scale), scale)
            points = [
                point_on(rest, int(s), b / scale)
                for s, b in zip(pick[:every], nbytes[:every], strict=True)
            ]
        point = points[i % every]
        coded[name] = Coded(point, encode(name, point))
        spent += coded[name].nbytes
        predicted += point.nbytes
    return coded


def _next_pass(
    c: Curves, coded: Mapping[str, Coded], slack: float, encode: Encode
) -> dict[str, Coded]:
    """All tensors once more, with what each one's price turned out to be worth.

    For models of many tiny tensors, whose prices are rough and whose slack no single one can take.
    """
    ratio = np.array([coded[n].nbytes / max(coded[n].point.nbytes, 1.0) for n in c.names])
    scale = np.repeat(np.clip(ratio, 0.25, 4.0), np.diff([*c.start, len(c.b0)]))
    room = sum(x.nbytes for x in coded.values()) + slack
    nbytes, _, pick = at_level(c, solve_level(c, room, scale), scale)
    points = [point_on(c, int(s), b / scale[s]) for s, b in zip(pick, nbytes, strict=True)]
    return {n: Coded(p, encode(n, p)) for n, p in zip(c.names, points, strict=True)}


def _settle(
    c: Curves, coded: dict[str, Coded], budget: int, encode: Encode, file_nbytes: FileSize
) -> dict[str, Coded]:
    """Re-encode single tensors until the slack is within tolerance; the best result under budget."""
    tolerance = max(24, budget // 4000)
    total = file_nbytes(coded)
    best, best_slack = dict(coded), budget - total
    tries: dict[str, int] = {}
    for _ in range(ROUNDS):
        slack = budget - total
        if 0 <= slack <= tolerance:
            break
        choice = _pick(c, coded, slack, tries)
        if choice is None:
            break
        tensor, name = choice
        tries[name] = tries.get(name, 0) + 1
        now = coded[name]
        wanted = (now.nbytes + slack - tolerance / 2) * now.point.nbytes / max(now.nbytes, 1)
        point = point_near(c, tensor, now.point.spec.id, wanted)
        if point is None or point.spec == now.point.spec:
            tries[name] = ROUNDS
            continue
        coded[name] = Coded(point, encode(name, point))
        total = file_nbytes(coded)
        if _better(budget - total, best_slack):
            best, best_slack = dict(coded), budget - total
    return best


def _better(slack: int, than: int) -> bool:
    """Under budget beats over; then the smaller slack."""
    if (slack >= 0) != (than >= 0):
        return slack >= 0
    return abs(slack) < abs(than)


def _pick(
    c: Curves, coded: Mapping[str, Coded], slack: int, tries: Mapping[str, int]
) -> tuple[int, str] | None:
    """The smallest tensor that can take the slack in a small change; else the largest there is."""
    able = [
        (coded[name].nbytes, i, name)
        for i, name in enumerate(c.names)
        if tries.get(name, 0) < 6 and point_near(c, i, coded[name].point.spec.id, 0.0) is not None
    ]
    if not able:
        return None
    gentle = [a for a in able if a[0] >= 10 * abs(slack)]
    _, tensor, name = min(gentle) if gentle else max(able)
    return tensor, name
