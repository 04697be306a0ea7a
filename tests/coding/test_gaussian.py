"""Gaussian models: the same integers everywhere, near the chances they stand for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waterfill.coding import gaussian


@settings(deadline=None, max_examples=60)
@given(
    precision=st.sampled_from(gaussian.PRECISIONS),
    border=st.integers(0, len(gaussian.BORDERS) - 1),
    reach=st.integers(1, 126),
    data=st.data(),
)
def test_tables_are_whole(precision: int, border: int, reach: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, gaussian.levels(precision) - 1))
    last = data.draw(st.integers(first, min(first + 3, gaussian.levels(precision) - 1)))
    table = gaussian.frequencies(precision, border, reach, first, last)
    assert table.shape == (2 * (last - first + 1), 2 * reach + 3)
    assert (table.sum(axis=1, dtype=np.int64) == 4096).all()
    assert table[:, -2:].min() >= 1, "any index can be escaped, of either parity"
    assert not table[1::2, reach].any(), "there is no zero on grid 1"
    # Alike on both sides, but for what rounding leaves over.
    gap = np.abs(table[:, :reach].astype(int) - table[:, 2 * reach : reach : -1])
    assert gap.max(initial=0) <= 8
    alone = gaussian.frequencies(precision, border, reach, last, last)
    assert np.array_equal(table[-2:], alone), "a level's model is its own"


def test_frequencies_are_those_of_the_format() -> None:
    """docs/format/paths.md has more of them, and tests/test_reader.py another implementation."""
    low = gaussian.frequencies(2, 7, 14, 0, 0)[0]
    assert np.flatnonzero(low).tolist() == [14, 29, 30] and low[14] == 4094
    table = gaussian.frequencies(2, 7, 14, 9, 9)
    assert table[0, 11:18].tolist() == [1, 69, 663, 2628, 663, 69, 1]
    assert table[1, 11:18].tolist() == [10, 312, 1725, 0, 1725, 312, 10]


def test_tails_are_those_of_a_normal() -> None:
    borders = np.linspace(0, 6, 200)
    exact = [math.erfc(b / math.sqrt(2)) for b in borders]
    assert np.abs(gaussian._tail(borders) - exact).max() < 2e-7


@pytest.mark.parametrize("precision", gaussian.PRECISIONS)
def test_frequencies_follow_the_chances(precision: int) -> None:
    level = 7 * precision  # a scale of four
    table = gaussian.frequencies(precision, 0, 40, level, level) / 4096
    k = np.arange(-40, 41)

    def cdf(x: float) -> float:
        return 0.5 * math.erfc(-x / 4 / math.sqrt(2))

    even = [cdf(v + 0.5) - cdf(v - 0.5) for v in k]
    odd = [0 if v == 0 else cdf(abs(v)) - cdf(abs(v) - 1) for v in k]
    assert np.abs(table[0, :-2] - even).max() < 1e-3
    assert np.abs(table[1, :-2] - odd).max() < 1e-3


@pytest.mark.parametrize("precision", gaussian.PRECISIONS)
def test_scales_rise_evenly(precision: int) -> None:
    scale = gaussian._scales(precision)
    assert scale.size == gaussian.levels(precision) <= 128
    exact = 2.0 ** (np.arange(scale.size) / precision - 5)
    assert np.allclose(scale, exact, rtol=1e-14)
    assert (scale[::precision] == exact[::precision]).all()
    assert (np.diff(gaussian.mean_square(precision, 0)) >= 0).all()


def test_bits_are_those_of_the_tables() -> None:
    bits = gaussian.bits_by_size(2, 0, 14)
    table = gaussian.frequencies(2, 0, 14, 10, 10)
    exact = 12 - np.log2(np.maximum(table[0, 14:18], 1))
    assert np.abs(bits[10, 0, :4] - exact).max() < 0.1
