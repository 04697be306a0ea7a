"""Models of a trellis path's indices: a Gaussian seen through the cells of two grids.

A symbol is 0 for k = 0, 1 to 13 for a cell of ``2**shift`` sizes of k, or an escape: sixteen of them,
so that a level's tables, of both grids, are 256 bytes. Signs, and places within a cell, are bits of
their own.

Weights that were scaled by a row and a column factor are Gaussian to within a hundredth of a bit
(docs/flagship.md), so a model is one number, the level of its scale, and needs no table in the
file. In units of two steps
grid 0 has its points at the integers k and grid 1 at ``k - sign(k) / 2``, k not zero. Cells end half
way between points, but for the cell of zero, where a rate-aware path moves the border; that border
is one of a few, named in the file.

A decoder must build the same integers on every machine, so all arithmetic here is what IEEE 754
rounds in one way: + - * / and the square root, in a fixed order.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from waterfill.coding.models import exp2_of_minus, quantise

__all__ = ["BORDERS", "bits_by_size", "frequencies", "levels", "mean_square", "widening"]

LOWEST, OCTAVES = -5, 16  # scales from 2**-5 to 2**11
PRECISIONS = (1, 2, 4, 8)  # levels to the octave
BORDERS = tuple(n / 40 for n in (20, 16, 18, 19, 21, 22, 24, 26))  # of zero's cell
WEIGHT_BITS = 40
SUPPORT_BITS = 24  # a symbol rarer than 2**-16 is left to the escapes
CELLS = 13  # beside zero
WIDEST = 2  # octave of the scale up to which every size has a cell of its own
LOG2_E = 1.4426950408889634
SQRT_HALF = 0.7071067811865476
# erfc(z) = exp(-z^2) (((((a5 t + a4) t + a3) t + a2) t + a1) t, t = 1 / (1 + p z): Abramowitz and
# Stegun 1964, 7.1.26; within 1.5e-7, far below what 4096 slots can tell apart.
ERFC_P = 0.3275911
ERFC = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)

Table = NDArray[np.uint16]
Floats = NDArray[np.float64]


def levels(precision: int) -> int:
    """How many levels a precision has (never more than the coder's 128 contexts a grid)."""
    return min(OCTAVES * precision, 128)


def widening(precision: int, first: int) -> int:
    """What a level less `first` lacks to its shift: ``max(0, (level + widening) >> log2(precision))``."""
    return first + precision - 1 + (LOWEST - WIDEST) * precision


def _tail(borders: Floats) -> Floats:
    """Chance that a standard normal lies beyond each of some borders, on either side together."""
    z = borders * SQRT_HALF
    t = 1.0 / (1.0 + ERFC_P * z)
    polynomial = np.full_like(t, ERFC[0])
    for coefficient in ERFC[1:]:
        polynomial = polynomial * t + coefficient
    tail: Floats = polynomial * t * exp2_of_minus(np.minimum(z * z * LOG2_E, 60.0))
    return tail


def _scales(precision: int) -> Floats:
    root = 2.0
    for _ in range(precision.bit_length() - 1):
        root = float(np.sqrt(root))
    steps = np.ones(precision)
    for i in range(1, precision):
        steps[i] = steps[i - 1] * root
    level = np.arange(levels(precision))
    return np.ldexp(steps[level % precision], level // precision + LOWEST)


def _masses(scales: Floats, border: int, ends: Floats) -> Floats:
    """Chance of |k| = 0, of ending at each of `ends` (levels, cells), and of more: (levels, 2, cells + 2)."""
    both = np.empty((*ends.shape[:1], 2, ends.shape[1] + 1))
    both[..., 0] = BORDERS[border], 0
    both[:, 0, 1:], both[:, 1, 1:] = ends + 0.5, ends
    tail = _tail(both / scales[:, None, None])
    masses = np.empty((*tail.shape[:2], tail.shape[2] + 1))
    masses[..., 0] = 1.0 - tail[..., 0]
    masses[..., 1:-1] = tail[..., :-1] - tail[..., 1:]
    masses[..., -1] = tail[..., -1]
    return np.maximum(masses, 0.0)


@lru_cache(maxsize=64)
def _by_size(precision: int, border: int, reach: int) -> Floats:
    """Chance of |k| = 0 .. reach and of more, (levels, 2, reach + 2)."""
    ends = np.broadcast_to(np.arange(1.0, reach + 1), (levels(precision), reach))
    return _masses(_scales(precision), border, ends)


@lru_cache(maxsize=64)
def frequencies(precision: int, border: int, first: int, last: int) -> Table:
    """Frequencies of the levels first .. last, uint16 (2 * count, CELLS + 3).

    Symbol 0 is k = 0, then come the cells, then two escapes; context 2 * level + grid.
    """
    shifts = np.arange(last - first + 1) + widening(precision, first) >> precision.bit_length() - 1
    width = np.ldexp(1.0, np.maximum(shifts, 0))
    ends = np.arange(1.0, CELLS + 1) * width[:, None]
    masses = _masses(_scales(precision)[first : last + 1], border, ends)
    weights = np.ldexp(masses, WEIGHT_BITS).astype(np.int64)
    rest = np.maximum(weights[..., -1:] >> 1, 1 << SUPPORT_BITS)
    weights[weights < 1 << SUPPORT_BITS] = 0
    table = np.concatenate([weights[..., :-1], rest, rest], axis=-1)
    return quantise(table.reshape(-1, table.shape[-1]))


@lru_cache(maxsize=64)
def bits_by_size(precision: int, border: int, reach: int) -> Floats:
    """Bits of a symbol of |k| = 0 .. reach - 1 and of reach or more, (levels, 2, reach + 1)."""
    masses = _by_size(precision, border, reach).copy()
    masses[..., -2] += masses[..., -1]
    share = masses[..., :-1]
    share[..., 1:] /= 2
    bits: Floats = -np.log2(np.maximum(share, 2.0**-20))
    return bits


@lru_cache(maxsize=64)
def mean_square(precision: int, border: int) -> Floats:
    """Mean of the squared points under each level, (levels,): rises with the level."""
    reach = 126
    size = np.arange(reach + 2.0)
    points = np.stack([size, np.maximum(size - 0.5, 0.0)])
    mean: Floats = (_by_size(precision, border, reach) * points**2).sum(axis=-1).mean(axis=-1)
    return mean
