"""Descent on a layer's error, on any grid and on integers with scales."""

from __future__ import annotations

import numpy as np
import pytest

from waterfill.coding.adaround import adaround
from waterfill.coding.coordinate import Quadratic, descend
from waterfill.coding.outliers import brief
from waterfill.coding.rounding import factor
from waterfill.coding.uniform import Grid, Rounded, improve, refit, round_successively
from waterfill.types import Floats

N, M = 150, 20


def layer(seed: int = 0) -> tuple[Floats, Floats]:
    """Columns (n, m) with a few large weights, and a moment of correlated inputs, one never seen."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(N, N)) * random.lognormal(0, 1, N)
    inputs = random.normal(size=(400, N)) @ mixing / 10
    inputs[:, 7] = 0
    columns = random.standard_t(4, (N, M)).astype(np.float32)
    return columns, (inputs.T @ inputs / 400).astype(np.float32)


def whole(_: int, target: Floats) -> Floats:
    return np.rint(target)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
@pytest.mark.parametrize("relax", [False, True])
def test_no_row_ends_with_more_harm_and_values_are_on_the_grid(kind: str, relax: bool) -> None:
    columns, moment = layer()
    quadratic = Quadratic(moment if kind == "full" else moment.diagonal().copy(), 0.1)
    start = np.rint(columns + np.random.default_rng(1).normal(size=columns.shape))
    found = descend(columns, start.astype(np.float32), quadratic, whole, relax=relax)
    assert np.abs(found - np.rint(found)).max() < 1e-5
    before, after = quadratic.harms(start - columns), quadratic.harms(found - columns)
    assert (after <= before * (1 + 1e-6)).all() and after.sum() < 0.7 * before.sum()


def test_where_descent_ends_no_single_weight_can_be_bettered() -> None:
    columns, moment = layer()
    quadratic = Quadratic(moment, 0.05)
    end = descend(columns, np.rint(columns), quadratic, whole, sweeps=200, relax=False)
    least = quadratic.harms(end - columns)
    for j in (0, 7, 63, 64, N - 1):
        for step in (-1, 1):
            other = end - columns
            other[j] += step
            assert (quadratic.harms(other) >= least * (1 - 1e-5)).all()


def test_a_column_whose_input_is_never_there_is_left_alone() -> None:
    columns, moment = layer()
    start = np.full_like(columns, 3)
    found = descend(columns, start, Quadratic(moment), whole)
    assert np.allclose(found[7], 3) and (found[8] != 3).any()
    assert np.isfinite(found).all()


def test_harm_is_the_quadratic_form() -> None:
    columns, moment = layer()
    damped = moment.astype(np.float64) + 0.5 * np.eye(N)
    direct = np.einsum("im,ij,jm->m", columns, damped, columns)
    assert np.allclose(Quadratic(moment, 0.5).harms(columns), direct, rtol=1e-5)
    inner = Quadratic(moment, 0.5).within(slice(3, 9)).harms(columns[3:9])
    direct = np.einsum("im,ij,jm->m", columns[3:9], damped[3:9, 3:9], columns[3:9])
    assert np.allclose(inner, direct, rtol=1e-5)
    quadratic = Quadratic.damped(moment, N, 0.1)
    assert np.isclose(quadratic.damping, 0.1 * np.trace(moment) / N)
    assert (Quadratic.damped(None, N, 0.1).harms(columns) == Quadratic(np.ones(N, "f4")).harms(columns)).all()  # fmt: skip


def rounded(share: float = 0.0) -> tuple[Floats, Rounded, Grid, Quadratic]:
    columns, moment = layer(2)
    grid, quadratic = Grid(2, 32), Quadratic.damped(moment, N, 0.01)
    kept = np.abs(columns) > np.quantile(np.abs(columns), 1 - share) if share else None
    return columns, round_successively(columns, factor(moment, 0.01), grid, kept), grid, quadratic


def test_scales_fitted_again_are_float16_and_harm_no_row() -> None:
    columns, start, grid, quadratic = rounded()
    fitted = refit(columns, start, grid, quadratic)
    assert (fitted.scales == fitted.scales.astype(np.float16)).all()
    assert (fitted.scales != start.scales).any()
    assert (fitted.codes(grid) == start.codes(grid)).all()
    spread = grid.spread(fitted.scales, N)
    assert np.allclose(fitted.values, fitted.codes(grid) * spread, rtol=1e-4, atol=1e-5)
    before = quadratic.harms(start.values - columns)
    after = quadratic.harms(fitted.values - columns)
    assert (after <= before * (1 + 1e-5)).all() and after.sum() < before.sum()


@pytest.mark.parametrize("share", [0.0, 0.03])
def test_improved_rounding_harms_less_with_as_many_outliers(share: float) -> None:
    columns, start, grid, quadratic = rounded(share)
    end = improve(columns, start, grid, quadratic)
    before, after = quadratic.harms(start.values - columns), quadratic.harms(end.values - columns)
    assert after.sum() < 0.9 * before.sum()
    if start.kept is None:
        assert end.kept is None and (after <= before * (1 + 1e-5)).all()
        return
    assert end.kept is not None and 0 < end.kept.sum() <= start.kept.sum()
    assert (end.kept != start.kept).any()
    kept = end.values[end.kept]
    assert np.allclose(kept, brief(kept), rtol=1e-6) and not end.codes(grid)[end.kept].any()
    plain = improve(columns, rounded()[1], grid, quadratic)
    assert after.sum() < quadratic.harms(plain.values - columns).sum()


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_rounding_by_gradient_is_to_a_neighbour_and_beats_nearest(kind: str) -> None:
    pytest.importorskip("torch")
    columns, moment = layer(3)
    grid = Grid(4, 50)
    quadratic = Quadratic.damped(moment if kind == "full" else moment.diagonal().copy(), N, 0.01)
    kept = np.zeros(columns.shape, np.bool_)
    kept[3, 5] = True
    start = round_successively(columns, np.sqrt(quadratic.diagonal), grid, kept)
    end = adaround(columns, start, grid, quadratic)
    again = adaround(columns, start, grid, quadratic)
    assert (end.values == again.values).all() and (end.scales == start.scales).all()
    assert end.values[3, 5] == start.values[3, 5]
    step = np.abs(grid.spread(start.scales, N))
    inside = np.abs(start.values - columns) < 0.5 * step
    assert (np.abs(end.values - columns)[inside] <= 1.0001 * step[inside]).all()
    before, after = quadratic.harms(start.values - columns), quadratic.harms(end.values - columns)
    assert (after <= before * (1 + 1e-6)).all()
    if kind == "full":
        assert after.sum() < 0.85 * before.sum()
