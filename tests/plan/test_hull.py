"""The water level: cheapest harm under a budget, against brute force and theory."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waterfill.plan.hull import at_level, curves, point_near, point_on, smallest, solve_level, tail
from waterfill.registry import find_codec
from waterfill.types import Point, Spec

VERSION = find_codec("trellis").version


def rung(nbytes: float, nats: float, bits: int) -> Point:
    return Point(nbytes, nats, Spec("integer", {"bits": bits}))


def ladder(size: int, sensitivity: float) -> list[Point]:
    """A textbook trellis: six decibels a bit."""
    return [
        Point(
            size * bits / 8,
            sensitivity * 4.0**-bits,
            Spec("trellis", {"step": 2.0**-bits}, VERSION),
        )
        for bits in range(9)
    ]


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 50), st.integers(1, 1000)), min_size=1, max_size=4),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=80, deadline=None)
def test_every_solution_is_on_the_lower_hull(tensors: list[list[tuple[int, int]]]) -> None:
    prices = {
        f"t{i}": [rung(b, d / 1e4, 2 + k) for k, (b, d) in enumerate(points)]
        for i, points in enumerate(tensors)
    }
    c = curves(prices)
    everything = [
        (sum(p.nbytes for p in combo), sum(p.distortion_nats for p in combo))
        for combo in itertools.product(*prices.values())
    ]
    assert smallest(c) == min(b for b, _ in everything)
    for level in (1e-7, 1e-5, 1e-4, 1e-3, 1e-1):
        nbytes, nats, _ = at_level(c, level)
        cost = nats.sum() + level * nbytes.sum()
        assert cost <= min(d + level * b for b, d in everything) * (1 + 1e-9)


def test_continuous_ladders_meet_the_budget_and_share_one_slope() -> None:
    prices = {"a": ladder(1000, 1.0), "b": ladder(4000, 0.01), "c": ladder(500, 7.0)}
    c = curves(prices)
    level = solve_level(c, 2000.0)
    nbytes, nats, pick = at_level(c, level)
    assert nbytes.sum() == pytest.approx(2000, abs=1e-3)
    slopes = nats * c.decay[pick]
    assert slopes == pytest.approx(level, rel=1e-6)
    # Reverse water-filling: harm per weight is the same everywhere.
    assert nats / [1000, 4000, 500] == pytest.approx(nats[0] / 1000, rel=1e-6)
    for i, segment in enumerate(pick):
        point = point_on(c, int(segment), float(nbytes[i]))
        assert point.distortion_nats == pytest.approx(nats[i], rel=1e-6)
        assert point.nbytes == pytest.approx(nbytes[i])
        assert point.spec.id == "trellis" and 0 < point.spec.config["step"] <= 1


def test_more_budget_never_harms_more() -> None:
    c = curves({"a": ladder(1000, 1.0), "b": [rung(100, 0.5, 2), rung(200, 0.1, 3)]})
    harms = [at_level(c, solve_level(c, b))[1].sum() for b in range(150, 1300, 50)]
    assert harms == sorted(harms, reverse=True)


def test_tail_and_points_near() -> None:
    c = curves({"a": ladder(1000, 1.0), "b": ladder(400, 0.1), "c": [rung(10, 0.1, 2)]})
    rest = tail(c, 1)
    assert rest.names == ("b", "c")
    assert at_level(rest, 1e-5)[0] == pytest.approx(at_level(c, 1e-5)[0][1:])
    near = point_near(c, 1, "trellis", 130.0)
    assert near is not None and near.nbytes == pytest.approx(130)
    assert point_near(c, 2, "integer", 10.0) is None


def test_running_scale_is_how_bytes_are_counted() -> None:
    c = curves({"a": ladder(1000, 1.0)})
    level = solve_level(c, 600.0, scale=1.2)
    assert at_level(c, level, 1.2)[0].sum() == pytest.approx(600, abs=1e-3)


def test_zero_distortion_points_are_welcome() -> None:
    c = curves({"a": [*ladder(100, 1.0), Point(150, 0.0, Spec("lossless", {}))]})
    nbytes, nats, pick = at_level(c, solve_level(c, 1e9))
    assert nbytes[0] == 150 and nats[0] < 1e-12 and c.ends[pick[0]][0].spec.id == "lossless"
    assert np.isfinite(at_level(c, 1e-30)[1]).all()
