"""A budget is filled, whatever real bytes do between rungs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from waterfill.plan.hull import cheapest, curves
from waterfill.runtime.cache.fitting.filling import fill
from waterfill.types import Point, Spec

BUDGET = 1_000_000


@dataclass(frozen=True)
class Knob:
    """A method whose only option is how many bytes it takes, if any number will do."""

    nbytes: float
    any: bool

    @property
    def spec(self) -> Spec:
        return Spec("knob", {"nbytes": self.nbytes, "any": self.any})

    def between(self, other: Knob, t: float) -> Knob | None:
        return Knob(self.nbytes + t * (other.nbytes - self.nbytes), True) if self.any else None


def _ladder(least: int, bits: list[int], any_number: bool) -> list[Point]:
    return [Point(least * b, 4.0**-b, Knob(least * b, any_number).spec) for b in bits]


def _filled(
    prices: dict[str, list[Point]], step: int, more: int
) -> tuple[Mapping[str, Point], int]:
    """Points, and bytes in all where these come in steps, and `more` is added between rungs."""
    rungs = {name: {p.nbytes for p in points} for name, points in prices.items()}

    def sizes(points: Mapping[str, Point]) -> dict[str, int]:
        return {
            n: int(p.nbytes) if p.nbytes in rungs[n] else int(-(-p.nbytes // step) * step) + more
            for n, p in points.items()
        }

    c = curves(prices, lambda spec: Knob(**spec.config))
    found = fill(c, prices, cheapest(c), BUDGET, sizes)
    return found, sum(sizes(found).values())


# The last is eight bytes too many over a long stretch of levels.
@pytest.mark.parametrize(
    ("step", "more"), [(1, 0), (1, 9_000), (480, 0), (480, -9_000), (15_360, -6_876)]
)
def test_a_level_is_found(step: int, more: int) -> None:
    prices = {n: _ladder(100_000, [1, 8], True) for n in ("a", "b")}
    _, total = _filled(prices, step, more)
    assert BUDGET - 2 * step - BUDGET // 1000 <= total <= BUDGET


def test_what_rungs_leave_over_is_spent() -> None:
    prices = {
        "a": _ladder(100_000, [1, 6], False),
        "b": _ladder(100_000, [1, 2, 3, 5], False),
        "c": _ladder(10_000, [1, 2, 3, 4], False),
    }
    found, total = _filled(prices, 1, 0)
    assert total <= BUDGET
    left = BUDGET - total
    for name, points in prices.items():
        better = [p for p in points if p.distortion_nats < found[name].distortion_nats]
        assert all(p.nbytes - found[name].nbytes > left for p in better)
    assert total > 0.9 * BUDGET
