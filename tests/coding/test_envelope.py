"""Envelopes: the scales of rows and columns found again, at nearly the bits they promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.coding.test_rans import COMMON
from waterfill.coding import envelope, gaussian, paths, trellis


def drawn(columns: Any, rows: Any, seed: int = 0) -> np.ndarray:
    """Indices of plain rounding whose scales are 2 to these powers."""
    shape = len(rows), len(columns)
    normal = np.random.default_rng(seed).normal(size=shape)
    return np.rint(normal * 2.0 ** (columns + rows[:, None])).astype(np.int32)


def nothing(m: int, n: int) -> tuple[Any, Any]:
    return np.zeros(n, np.int64), np.zeros(m, np.int64)


@pytest.mark.parametrize("precision", [2, 4])
def test_levels_are_found_again(precision: int) -> None:
    random = np.random.default_rng(1)
    columns, rows = random.uniform(-0.5, 3, 300), random.uniform(-1, 1, 400)
    index = drawn(columns, rows)
    found = envelope.fit(index, 1, 60, precision, nothing(400, 300))
    level = found.first + found.columns[None].astype(int) + found.rows[:, None]
    scale = level / precision - 5
    error = scale - (columns + rows[:, None])
    assert np.abs(error).mean() < 0.6 / precision


def test_hints_are_taken_where_they_say_more_than_nothing() -> None:
    random = np.random.default_rng(2)
    columns = random.integers(-1, 4, 500).astype(float)
    index = drawn(columns, np.zeros(400))
    hints = (4 * columns).astype(np.int64), np.zeros(400, np.int64)
    assert envelope.fit(index, 1, 60, 4, hints).hinted[0]
    wrong = random.permutation(hints[0]), hints[1]
    assert not envelope.fit(index, 1, 60, 4, wrong).hinted[0]
    plain, good = (
        len(paths.encode(index, 1, (h / 4, np.zeros(400)))) for h in (0 * columns, hints[0])
    )
    assert good < plain


@pytest.mark.parametrize("states", [1, 4, 64])
def test_bits_are_nearly_those_of_the_stream(states: int) -> None:
    weight = (
        np.random.default_rng(6).normal(size=(512, 256)) * 2.0 ** np.linspace(-1, 1, 512)[:, None]
    )
    step = (2.0 ** np.linspace(-3, 0, 256)).astype(np.float32)
    index = trellis.quantise(weight.astype(np.float32), np.ones(256, np.float32), step, states)
    found = envelope.fit(index, states, 60, 4, nothing(512, 256))
    data = paths.encode(index, states, (np.zeros(256), np.zeros(512)))
    assert abs(8 * len(data) / found.bits - 1) < 0.02


@COMMON
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    precision=st.sampled_from(gaussian.PRECISIONS),
    reach=st.sampled_from([1, 14, 126]),
    scale=st.sampled_from([0.0, 0.1, 2.0, 300.0, 2e9]),
    seed=st.integers(0, 99),
)
def test_levels_stay_on_their_scale(
    m: int, n: int, precision: int, reach: int, scale: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    values = random.standard_t(1, size=(m, n)) * scale
    index = values.clip(-(2**31), 2**31 - 1).astype(np.int32)
    hints = random.integers(-900, 900, n), random.integers(-900, 900, m)
    found = envelope.fit(index, 8, reach, precision, hints)
    assert found.columns.min() == found.rows.min() == 0 <= found.first
    last = found.first + int(found.columns.max()) + int(found.rows.max())
    assert last < gaussian.levels(precision)
    assert found.models()[0].shape == (2 * (last - found.first + 1), 16)
