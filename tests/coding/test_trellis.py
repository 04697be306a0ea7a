"""The trellis: the cheapest of all paths, the walk that undoes it, and what states are worth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.coding.test_paths import STATES, values_of
from tests.coding.test_rans import COMMON, PATHS
from waterfill.coding import trellis
from waterfill.coding.trellis import CODES, SEGMENT

NATIVE = [p for p in PATHS if p != "numpy"]


def plain(weight: np.ndarray, states: int, step: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Indices and values with columns that do not know each other."""
    n = weight.shape[1]
    steps = np.full(n, step, np.float32)
    index = trellis.quantise(weight, np.ones(n, np.float32), steps, states)
    return index, trellis.walk(index, steps, states)


def nearest(x: float, grid: int, parity: int) -> float:
    """Squared error of the nearest level of this grid whose index has this parity."""
    k = np.arange(-12, 13)
    k = k[(k & 1 == parity) & ((k != 0) | (grid == 0))]
    return float(np.square(x - (2 * k - grid * np.sign(k))).min())


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("states", CODES)
def test_no_path_is_cheaper(monkeypatch: pytest.MonkeyPatch, states: int, path: str) -> None:
    monkeypatch.setenv("WATERFILL_SIMD", path)
    rows, (feedback, source) = 9, CODES[states]
    weight = np.random.default_rng(states).normal(0, 3, (rows, 6)).astype(np.float32)
    _, values = plain(weight, states)
    for x, y in zip(weight.T, values.T, strict=True):
        prices = [[[nearest(float(v), g, p) for p in (0, 1)] for g in (0, 1)] for v in x]
        best = np.inf
        for parities in itertools.product((0, 1), repeat=rows):
            state, cost = 0, 0.0
            for price, parity in zip(prices, parities, strict=True):
                grid = state & 1
                cost += price[grid][parity]
                state = state >> 1 ^ feedback * grid ^ source * parity
            best = min(best, cost)
        assert np.square(x - y).sum(dtype=np.float64) == pytest.approx(best, rel=1e-4)


@COMMON
@given(
    states=st.sampled_from(STATES),
    m=st.integers(1, 50),
    n=st.integers(1, 30),
    extra=st.sampled_from([0, SEGMENT - 25, 2 * SEGMENT]),
    step=st.sampled_from([1e-6, 0.1, 1.0, 30.0]),
)
def test_the_walk_is_that_of_the_format(
    states: int, m: int, n: int, extra: int, step: float
) -> None:
    m = m + extra if n < 4 else m
    weight = np.random.default_rng(m * n).normal(size=(m, n)).astype(np.float32)
    weight = weight.clip(-4e6 * step, 4e6 * step)  # all that an index reaches
    index, values = plain(weight, states, step)
    assert index.shape == values.shape == weight.shape
    steps, ones = np.full(n, step, np.float32), np.ones(m, np.float32)
    assert np.array_equal(values, values_of(index, states, steps, ones))
    # An even index of grid 1 is three steps from zero; float32 holds so many digits of an index.
    most = max(3, 2**-20 * np.abs(index).max())
    assert np.abs(values - weight).max() <= most * step


def test_every_walker_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    index = random.integers(-(2**31), 2**31, (SEGMENT + 9, 7)).astype(np.int32)
    step = random.lognormal(0, 2, 7).astype(np.float32)
    for states in STATES:
        found = set()
        for path in PATHS:
            monkeypatch.setenv("WATERFILL_SIMD", path)
            found.add(trellis.walk(index, step, states).tobytes())
        assert len(found) == 1


@pytest.mark.parametrize("states", CODES)
def test_grid_one_has_no_zero(states: int) -> None:
    weight = np.random.default_rng(3).normal(0, 0.7, (3000, 4)).astype(np.float32)
    index, _ = plain(weight, states)
    feedback, source = CODES[states]
    state = np.zeros(4, np.int64)
    for row, k in enumerate(index):
        state = state * (row % SEGMENT > 0)
        assert k[state & 1 == 1].all()
        state = state >> 1 ^ feedback * (state & 1) ^ source * (k & 1)


def test_segments_know_nothing_of_each_other() -> None:
    weight = np.random.default_rng(4).normal(0, 2, (2 * SEGMENT + 40, 3)).astype(np.float32)
    whole, _ = plain(weight, 32)
    for first in range(0, len(weight), SEGMENT):
        part = slice(first, first + SEGMENT)
        assert np.array_equal(whole[part], plain(weight[part], 32)[0])


def test_more_states_lose_less() -> None:
    """At a fine step the rate hardly depends on the states; half a bit is 3 dB of the error."""
    weight = np.random.default_rng(5).normal(0, 20, (4 * SEGMENT, 16)).astype(np.float32)
    error = {s: np.square(weight - plain(weight, s)[1]).mean(dtype=float) for s in STATES}
    # With states the two grids together are twice as fine a step, at the same number of indices.
    gains = [10 * np.log10(4 * error[1] / error[s]) for s in CODES]
    assert all(b > a - 0.02 for a, b in itertools.pairwise(gains)), gains
    assert 0.8 < gains[0] < 1.1 and 1.2 < gains[-1] < 1.53, gains
