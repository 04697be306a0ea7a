"""Integer grids with a scale for each group of columns: scales searched, rounded on, and fitted again.

Matrices are transposed here, (n columns, m rows), so that a column of the layer is contiguous. Values on a
grid are ``code * scale``, codes from ``-2**(bits-1)`` to ``2**(bits-1) - 1``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from waterfill.coding.coordinate import SWEEPS, Quadratic, descend
from waterfill.coding.levels import importances
from waterfill.coding.outliers import brief, worst
from waterfill.coding.rounding import successive
from waterfill.types import Floats

# Clips tried, as shares of the largest weight.
SHRINKS = np.linspace(0.35, 1.0, 27, dtype=np.float32)
LARGEST = np.float32(65504)  # in float16
CHOICES = 2  # times that outliers are chosen again

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Grid:
    """What of a grid is known before its scales: `bits` to a code, columns to a `group`."""

    bits: int
    group: int

    @property
    def ends(self) -> tuple[int, int]:
        """Least and greatest code."""
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1

    def codes(self, target: Floats, scale: Floats) -> Floats:
        """Codes, as float32, of the values nearest to a target; shapes broadcast."""
        return np.clip(np.rint(target / np.where(scale == 0, 1, scale)), *self.ends)

    def spread(self, scales: Floats, n: int) -> Floats:
        """Scales (groups, m) as a matrix (n, m)."""
        return np.repeat(scales, self.group, axis=0)[:n]

    def search(self, target: Floats, importance: Floats) -> Floats:
        """Scale (m,) of least weighted error for a group (columns, m), rounded to float16.

        The clip is searched, and the sign of the scale; `importance` (columns,) is what a squared
        error costs.
        """
        extreme = target[np.argmax(np.abs(target), axis=0), np.arange(target.shape[1])]
        best = np.full(target.shape[1], np.inf, np.float32)
        scale = np.zeros(target.shape[1], np.float32)
        for shrink in SHRINKS:
            # The negative end has one level more, so either sign of the scale may serve better.
            for end in self.ends:
                trial = (extreme * shrink / end).astype(np.float16).astype(np.float32) + 0.0
                cost = importance @ np.square(target - self.codes(target, trial) * trial)
                better = cost < best
                best = np.where(better, cost, best)
                scale = np.where(better, trial, scale)
        return scale


@dataclass(frozen=True, eq=False)
class Rounded:
    """A matrix on a grid.

    Attributes
    ----------
    values : float32 (n, m)
    scales : float32 (ceil(n / group), m), each a float16
    kept : bool (n, m), or None
        Weights that are stored beside the grid, as `outliers.brief` values.
    """

    values: Floats
    scales: Floats
    kept: Mask | None = None

    def codes(self, grid: Grid) -> Floats:
        """Codes as float32 (n, m), 0 for what is kept beside the grid."""
        codes = grid.codes(self.values, grid.spread(self.scales, len(self.values)))
        return codes if self.kept is None else np.where(self.kept, 0, codes)


def round_successively(
    columns: Floats, lower: Floats, grid: Grid, kept: Mask | None = None
) -> Rounded:
    """Round columns last to first, scales searched on the way; see `rounding.successive`.

    Parameters
    ----------
    columns : float32 (n, m)
    lower : float32 (n, n) or (n,) from `rounding.factor`
    kept : bool (n, m) or None, weights to keep beside the grid
    """
    n, m = columns.shape
    values = np.empty((n, m), np.float32)
    scales = np.zeros((-(-n // grid.group), m), np.float32)
    importance = importances(lower)
    carried = lower.ndim == 2

    def round_block(first: int, last: int, block: Floats, target: Floats, carry: Floats) -> Floats:
        mask = None if kept is None else kept[first:last]
        held = target if mask is None else np.where(mask, 0, target)
        scales[first // grid.group] = scale = grid.search(held, importance[first:last])
        error = np.empty_like(target)
        for j in range(last - first - 1, -1, -1):
            value = grid.codes(target[j], scale) * scale
            if mask is not None:
                value = np.where(mask[j], brief(target[j]), value)
            values[first + j] = value
            error[j] = block[j] - value
            if carried and j:
                target[:j] += carry[j, :j, None] * error[j]
        return error

    successive(columns, lower, round_block, block=grid.group)
    return Rounded(values, scales, kept)


def improve(
    columns: Floats,
    rounded: Rounded,
    grid: Grid,
    quadratic: Quadratic,
    row_weights: Floats | float = 1.0,
) -> Rounded:
    """Coordinate descent on codes, outliers and scales in turn; never ends with more harm.

    With outliers this is QuantEase's outlier-aware form (Behdin et al. 2023): between descents the
    weights whose return to the grid would harm most are chosen again, as many as there were. The
    paper thresholds a gradient step by size; weighing it with S and the rows takes more off.

    Parameters
    ----------
    columns : float32 (n, m)
    row_weights : float32 (m,) or one for all: what a row's harm counts among the others'
    """
    rounded = best = _descend(columns, rounded, grid, quadratic)
    for _ in range(0 if rounded.kept is None else CHOICES):
        rounded = _choose_again(columns, rounded, grid, quadratic, row_weights)
        rounded = _descend(columns, rounded, grid, quadratic)
        best = min(
            (best, rounded),
            key=lambda r: np.sum(quadratic.harms(r.values - columns) * row_weights),
        )
    best = refit(columns, best, grid, quadratic)
    return _descend(columns, best, grid, quadratic, sweeps=3, relax=False)


def _descend(
    columns: Floats,
    rounded: Rounded,
    grid: Grid,
    quadratic: Quadratic,
    sweeps: int = SWEEPS,
    relax: bool = True,
) -> Rounded:
    def nearest(j: int, target: Floats) -> Floats:
        scale = rounded.scales[j // grid.group]
        value = grid.codes(target, scale) * scale
        return value if rounded.kept is None else np.where(rounded.kept[j], brief(target), value)

    values = descend(columns, rounded.values, quadratic, nearest, sweeps, relax)
    return replace(rounded, values=values)


def _choose_again(
    columns: Floats,
    rounded: Rounded,
    grid: Grid,
    quadratic: Quadratic,
    row_weights: Floats | float,
) -> Rounded:
    """Outliers by what it would cost to have each weight on the grid, the others as they are."""
    assert rounded.kept is not None
    pivots = quadratic.diagonal[:, None]
    slopes = quadratic.products(rounded.values - columns)
    free = rounded.values - np.divide(slopes, pivots, out=slopes, where=pivots > 0)
    scale = grid.spread(rounded.scales, len(columns))
    held = grid.codes(free, scale) * scale
    scores = np.square(free - held) * pivots * row_weights
    kept = worst(scores, int(rounded.kept.sum()))
    return Rounded(np.where(kept, brief(free), held), rounded.scales, kept)


def refit(columns: Floats, rounded: Rounded, grid: Grid, quadratic: Quadratic) -> Rounded:
    """The same codes on better scales: each in turn set to what harms its row least.

    A scale stays as it is where float16 has none better, so no row ends with more harm.
    """
    error, scales = rounded.values - columns, rounded.scales.copy()
    codes = rounded.codes(grid)
    for t, old in enumerate(scales):
        some = slice(t * grid.group, min(len(columns), (t + 1) * grid.group))
        own = codes[some]
        slope = np.einsum("jm,jm->m", own, quadratic.products(error, some))
        curve = np.einsum("jm,jm->m", own, quadratic.within(some).products(own))
        ideal = np.clip(old - slope / np.where(curve > 0, curve, 1), -LARGEST, LARGEST)
        step = ideal.astype(np.float16).astype(np.float32) - old
        step = np.where((curve > 0) & (2 * step * slope + step * step * curve < 0), step, 0)
        scales[t] += step
        error[some] += own * step
    return replace(rounded, values=columns + error, scales=scales)
