"""Nearest levels, scales and successive rounding onto them, against the plain way of each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waterfill.coding import levels
from waterfill.types import FormatError, TensorInfo, Weighting

INFO = TensorInfo("w", (3, 5), "F32", "linear")


@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 40), symmetric=st.booleans())
@settings(max_examples=60, deadline=None)
def test_nearest_is_the_nearest(seed: int, k: int, symmetric: bool) -> None:
    random = np.random.default_rng(seed)
    table = np.sort(random.normal(size=k)).astype(np.float32)
    if symmetric:
        table = np.concatenate([-np.abs(table), [0], np.abs(table)]).astype(np.float32)
        table.sort()
    x = random.normal(0, 1.5, (7, 11)).astype(np.float32)
    index, value = levels.nearest(x, table)
    assert np.array_equal(table[index], value)
    assert np.allclose(np.abs(x - value), np.abs(x[:, :, None] - table).min(axis=2))


def test_nearest_of_a_table_for_each_row() -> None:
    random = np.random.default_rng(0)
    tables = np.sort(random.normal(size=(8, 11)), axis=0).astype(np.float32)
    x = random.normal(size=(7, 11)).astype(np.float32)
    index, value = levels.nearest(x, tables)
    for row in range(11):
        single = levels.nearest(x[:, row], tables[:, row].copy())
        assert np.array_equal(index[:, row], single[0]) and np.array_equal(value[:, row], single[1])


def test_a_searched_scale_beats_the_largest_weight_and_finds_an_exact_one() -> None:
    random = np.random.default_rng(1)
    table = np.arange(-4, 4, dtype=np.float32)
    target = random.standard_t(3, (64, 50)).astype(np.float32)
    importance = random.lognormal(size=64).astype(np.float32)
    scale, lowest = levels.search_scale(target, importance, table)
    assert np.array_equal(lowest, levels.cost(target, importance, table, scale))
    assert np.array_equal(scale, scale.astype(np.float16))
    plain = levels.half(np.abs(target).max(axis=0) / 4)
    assert lowest.sum() < 0.7 * levels.cost(target, importance, table, plain).sum()
    assert (scale < 0).any() and (scale > 0).any()  # the longer end serves either sign
    exact = table[random.integers(0, 8, (64, 50))] * 0.375
    assert not levels.search_scale(exact, importance, table)[1].any()


def test_successive_rounding_harms_less_and_says_what_it_stands_for() -> None:
    random = np.random.default_rng(2)
    inputs = random.normal(size=(300, 48)) @ random.normal(size=(48, 48))
    weighting = Weighting((inputs.T @ inputs / 300).astype(np.float32))
    columns = random.normal(size=(48, 30)).astype(np.float32)
    table = np.arange(-4, 4, dtype=np.float32)
    harms = {}
    for solver in ("nearest", "successive"):
        lower = levels.metric(48, weighting, 0.01, solver)
        codes, scales, values = levels.round_groups(
            columns, lower, 16, table, lambda _, t, i: levels.search_scale(t, i, table)[0]
        )
        assert np.array_equal(values, table[codes] * np.repeat(scales, 16, axis=0))
        harms[solver] = weighting.distortion(columns.T, values.T)
    assert harms["successive"] < 0.6 * harms["nearest"]


def test_what_is_kept_takes_over_errors_to_eight_bits() -> None:
    random = np.random.default_rng(3)
    lower = np.tril(random.normal(size=(8, 8)), -1).astype(np.float32) + np.eye(8, dtype="f4")
    columns = random.normal(size=(8, 6)).astype(np.float32)
    exact = random.random((8, 6)) < 0.5
    table, one = np.array([-1, 1], np.float32), np.ones(6, np.float32)
    values = levels.round_groups(columns, lower, 8, table, lambda *_: one, exact)[2]
    error = columns - values
    wanted = columns + np.stack([lower[j + 1 :, j] @ error[j + 1 :] for j in range(8)])
    assert np.allclose(values[exact], wanted[exact], rtol=2**-8)
    assert np.isin(values[~exact], (-1, 1)).all()


def test_the_best_table_is_that_of_least_error_and_the_first_of_two() -> None:
    random = np.random.default_rng(4)
    columns = random.uniform(-1, 1, (32, 40)).astype(np.float32)
    lower = np.ones(32, np.float32)
    uniform = np.linspace(-1, 1, 9, dtype=np.float32)
    tables = [np.sign(uniform) * uniform**2, uniform, uniform.copy()]
    assert levels.best_table(columns, lower, Weighting(), 16, tables) == 1
    assert levels.best_table(np.zeros((0, 3), np.float32), lower, Weighting(), 16, tables) == 0


@pytest.mark.parametrize("how", ["packed", "coded"])
def test_codes_come_back_and_those_beyond_the_levels_are_refused(how: str) -> None:
    codes = np.random.default_rng(5).integers(0, 7, (3, 5)).astype(np.uint8)
    codes[0, 0] = 6
    data = levels.write_codes(codes, 3, how)
    assert np.array_equal(levels.read_codes(data, INFO, 3, how, 7), codes)
    with pytest.raises(FormatError, match="beyond its 6 levels"):
        levels.read_codes(data, INFO, 3, how, 6)


@pytest.mark.parametrize("exponent", [1.0, True, 301, "1", None])
def test_exponents_that_no_writer_wrote(exponent: object) -> None:
    with pytest.raises(FormatError, match="no small integer"):
        levels.read_exponent({"exponent": exponent}, INFO)
