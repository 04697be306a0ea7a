"""Columns in units of their cost: scales, order, classes, and bits shared by reverse water-filling."""

from __future__ import annotations

import numpy as np
import pytest

from waterfill.coding.columns import (
    energy_order,
    level_classes,
    mean_squares,
    row_scales,
    scaled_columns,
    share_bits,
)
from waterfill.coding.scales import from_grid
from waterfill.types import Weighting


def _layer() -> tuple[np.ndarray, Weighting]:
    random = np.random.default_rng(0)
    inputs = random.normal(size=(100, 40)) * random.lognormal(0, 2, 40)
    weights = random.normal(size=(60, 40)).astype(np.float32)
    return weights, Weighting((inputs.T @ inputs / 100).astype(np.float32))


def test_scaled_columns_cost_the_same_and_are_the_same_matrix() -> None:
    weights, weighting = _layer()
    for carried, scaled in ((True, True), (False, True), (True, False)):
        weight, lower, exponents = scaled_columns(weights.copy(), weighting, 0.01, carried, scaled)
        assert np.allclose(weight * from_grid(exponents, 4)[:, None], weights.T, rtol=1e-6)
        cost = lower if lower.ndim == 1 else lower.diagonal()
        assert (np.abs(np.log2(cost)).max() <= 1 / 8 + 1e-3) == scaled
        assert lower.ndim == 1 + carried


def test_columns_of_most_energy_come_last() -> None:
    weights, weighting = _layer()
    levels, ordered = energy_order(weights, weighting)
    order = np.argsort(levels, kind="stable")
    assert weighting.second_moment is not None and ordered.second_moment is not None
    energy = (weighting.second_moment.diagonal() * np.square(weights).mean(axis=0))[order]
    assert (np.diff(np.log2(energy)) > -1.001).all() and energy[-1] > 100 * energy[0]
    error = np.random.default_rng(1).normal(size=weights.shape).astype(np.float32)
    zero = np.zeros_like(error)
    assert ordered.distortion(error[:, order], zero) == pytest.approx(
        weighting.distortion(error, zero)
    )


def test_row_scales_follow_size_or_weight() -> None:
    weights, _ = _layer()
    rows = np.geomspace(0.01, 100, 60).astype(np.float32)
    weighting = Weighting(None, rows)
    sized = from_grid(row_scales(weights.T * rows, weighting, 0.0), 4)
    assert np.abs(np.log2(sized / rows)).max() < 0.5
    trusted = from_grid(row_scales(weights.T, weighting, 1.0), 4)
    assert np.abs(np.log2(trusted * np.sqrt(rows)).std()) < 0.1
    assert np.isfinite(
        from_grid(row_scales(weights.T * 0, Weighting(None, rows * 0), 0.5), 4)
    ).all()


def test_bits_go_where_the_energy_is_and_no_further() -> None:
    energy = np.repeat([1.0, 4.0, 64.0], 20)
    ids, heights = level_classes(energy, 3)
    assert np.array_equal(ids, np.repeat([0, 1, 2], 20)) and np.allclose(heights, [0, 1, 3])
    counts = np.bincount(ids)
    shared, level = share_bits(heights, counts, np.full(3, 12.0), 2.0)
    assert np.allclose(shared, heights + level) and shared.mean() == pytest.approx(2)
    dry, _ = share_bits(heights, counts, np.full(3, 12.0), 0.5)
    assert np.allclose(dry, [0, 0, 1.5], atol=1e-6)
    full, _ = share_bits(heights, counts, np.array([12.0, 12.0, 3.0]), 2.5)
    assert np.allclose(full, [1.75, 2.75, 3.0])
    most, _ = share_bits(heights, counts, np.ones(3), 2.5)
    assert np.allclose(most, 1)


@pytest.mark.parametrize("size", [1e-35, 1e-3, 1.0, 1e30])
def test_mean_squares_beyond_float32(size: float) -> None:
    values = np.random.default_rng(1).normal(0, size, (50, 7)).astype(np.float32)
    expected = np.square(values, dtype=np.float64).mean(axis=0)
    np.testing.assert_allclose(mean_squares(values), expected, rtol=1e-6)
