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
    data=st.data(),
)
def test_tables_are_whole(precision: int, border: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, gaussian.levels(precision) - 1))
    last = data.draw(st.integers(first, min(first + 3, gaussian.levels(precision) - 1)))
    table = gaussian.frequencies(precision, border, first, last)
    assert table.shape == (2 * (last - first + 1), 16)
    assert (table.sum(axis=1, dtype=np.int64) == 4096).all()
    assert table[:, -2:].min() >= 1, "any index can be escaped, of either parity"
    assert not table[1::2, 0].any(), "there is no zero on grid 1"
    alone = gaussian.frequencies(precision, border, last, last)
    assert np.array_equal(table[-2:], alone), "a level's model is its own"


def test_frequencies_are_those_of_the_format() -> None:
    """docs/format/paths.md has more of them, and tests/test_reader.py another implementation."""
    low = gaussian.frequencies(2, 7, 0, 0)[0]
    assert np.flatnonzero(low).tolist() == [0, 14, 15] and low[0] == 4094
    table = gaussian.frequencies(2, 7, 9, 9)
    assert table[0, :5].tolist() == [2628, 1327, 137, 2, 0]
    assert table[1, :5].tolist() == [0, 3449, 625, 19, 1]


@pytest.mark.parametrize("precision", gaussian.PRECISIONS)
def test_cells_widen_with_the_scale(precision: int) -> None:
    top = gaussian.levels(precision)
    widening = gaussian.widening(precision, 3)
    shift = [max(0, level - 3 + widening >> precision.bit_length() - 1) for level in range(3, top)]
    scale = gaussian._scales(precision)[3:]
    assert (scale <= 4 * 2.0 ** np.array(shift)).all()
    assert (scale > 2 * 2.0 ** np.array(shift))[np.array(shift) > 0].all()


def test_tails_are_those_of_a_normal() -> None:
    borders = np.linspace(0, 6, 200)
    exact = [math.erfc(b / math.sqrt(2)) for b in borders]
    assert np.abs(gaussian._tail(borders) - exact).max() < 2e-7


@pytest.mark.parametrize("precision", gaussian.PRECISIONS)
def test_frequencies_follow_the_chances(precision: int) -> None:
    level = 7 * precision  # a scale of four
    table = gaussian.frequencies(precision, 0, level, level) / 4096
    k = np.arange(1, 14)

    def beyond(x: float) -> float:
        return math.erfc(x / 4 / math.sqrt(2))

    even = [1 - beyond(0.5)] + [beyond(v - 0.5) - beyond(v + 0.5) for v in k]
    odd = [0] + [beyond(v - 1) - beyond(v) for v in k]
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
    table = gaussian.frequencies(2, 0, 10, 10)
    exact = 12 - np.log2(np.maximum(table[0, :4], 1)) + [0, 1, 1, 1]
    assert np.abs(bits[10, 0, :4] - exact).max() < 0.1
