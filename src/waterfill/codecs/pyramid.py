"""Pyramid vector quantisation: a numbered direction and a gain for each few weights of a row."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import numpy as np

from waterfill.coding.columns import FAR, GRID, energy_order, mean_squares, scaled_columns
from waterfill.coding.entropy import decode_ints, encode_ints
from waterfill.coding.pyramid import (
    counts,
    gain_exponents,
    gains_of,
    most_pulses,
    nearest,
    pack,
    unpack,
)
from waterfill.coding.rounding import finite, successive
from waterfill.coding.scales import LIMIT, decode_grid, encode_grid, from_grid, to_grid
from waterfill.coding.sections import join, split
from waterfill.registry import Codec, codec
from waterfill.types import (
    Array,
    Floats,
    FormatError,
    SpecError,
    TensorInfo,
    Weighting,
)

ROW_GRID, RATES = 2, 64  # row scales to the octave; how far a row's pulses are from the usual
STEPS = 4  # to a pulse: a group's usual number, before the row has its say
MAX_LEVEL = 1 << 16
TINY = 1e-30


@codec("pyramid", version=1)
class Pyramid(Codec):
    """Groups of columns, last to first; each a point with K unit pulses times a gain.

    No codebook: points are enumerated (Fischer 1986; for language models van der Ouderaa et al.
    2024, arXiv 2410.16926). Columns are put in order of energy and scaled by the factor of the second
    moment, and each group gets the pulses that make all pulses about equally long: reverse
    water-filling. Coordinates through rANS took 6 % more than their numbers.

    Attributes
    ----------
    bits : float
        Of the numbers of points, a weight; gains come on top. The continuous knob.
    length : int
        Weights to a point, 2 to 64: one number has at most 64 bits.
    gain : int
        Steps of the gain to the octave, equal ones: 2, 4, 8, 16 or 32.
    solver : str
        nearest | successive
    rows : float
        Pulses go with the row's weight to the power ``rows / 2``: 0 ignores the weights.
    even : bool
        As many pulses for every group and row, on columns as they are: as published.
    damping : float
        Added to the diagonal of S, relative to its mean.
    """

    parts = ("codes", "gains", "columns")
    shared: ClassVar[tuple[str, ...]] = ("columns",)

    bits: float = 3.0
    length: int = 16
    gain: int = 8
    solver: str = "successive"
    rows: float = 0.5
    even: bool = False
    damping: float = 0.01

    def __post_init__(self) -> None:
        if (
            not 0 < self.bits <= 16
            or not 2 <= self.length <= 64
            or self.gain not in (2, 4, 8, 16, 32)
            or not 0 <= self.damping < math.inf
        ):
            raise SpecError(
                "pyramid: bits is at most 16, length 2 to 64, gain 2 to 32, damping not negative"
            )
        if self.solver not in ("nearest", "successive") or not 0 <= self.rows <= 2:
            raise SpecError("pyramid: solver is nearest or successive, rows 0 to 2")

    @classmethod
    def ladder(cls, info: TensorInfo) -> Iterator[Self]:
        """One to six bits: the more of them, the finer the gains, and the shorter a 64-bit number."""
        if info.worth_rounding:
            for bits, length, gain in (
                (1.0, 16, 2),
                (1.5, 16, 4),
                (2.0, 16, 4),
                (3.0, 16, 8),
                (4.0, 12, 16),
                (5.5, 10, 32),
            ):
                yield cls(bits=bits, length=length, gain=gain)

    def between(self, other: Self, t: float) -> Self | None:
        """Bits in arithmetic progression; the other options are those of the nearer rung."""
        bits = float(f"{self.bits * (1 - t) + other.bits * t:.6g}")
        return dataclasses.replace(self if t < 0.5 else other, bits=bits)

    def encode(
        self, x: Array, info: TensorInfo, weighting: Weighting
    ) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Bits of `info.shape` -> parts ``codes``, ``gains`` and ``columns``."""
        if not info.size:
            return dict.fromkeys(self.parts, b""), {}
        matrix = finite(info.matrix(x), info.name)
        energies = np.zeros(matrix.shape[1], np.int32)
        if not self.even:
            energies, weighting = energy_order(matrix, weighting)
        order = np.argsort(energies, kind="stable")
        weight, lower, column_grid = scaled_columns(
            matrix[:, order], weighting, self.damping, self.solver == "successive", not self.even
        )
        n, m = weight.shape
        row_grid, rate_grid = self._rows(weight, weighting)
        weight /= from_grid(row_grid, ROW_GRID)
        levels = self._levels(weight, rate_grid)
        pulses = _pulses(levels, rate_grid, self.length)
        points = np.zeros((n, m), np.int32)
        gains = np.zeros((len(levels), m), np.int32)

        def round_block(
            first: int, last: int, block: Floats, target: Floats, carry: Floats
        ) -> Floats:
            here = np.diag(lower[first:last]) if lower.ndim == 1 else lower[first:last, first:last]
            aim = block + np.linalg.solve((here / here.diagonal()).T, target - block)
            group = first // self.length
            y, gain = self._round(aim.astype(np.float32), pulses[group], here)
            points[first:last], gains[group] = y, gain
            return block - y.astype(np.float32) * gains_of(gain, self.gain)

        successive(weight, lower, round_block, block=self.length)
        columns = join([encode_grid(energies), encode_grid(column_grid), encode_grid(levels)])
        rows = [encode_grid(row_grid), encode_grid(rate_grid), encode_ints(gains.T)]
        return {"codes": self._pack(points, pulses), "gains": join(rows), "columns": columns}, {}

    def _round(self, aim: Floats, pulses: Array, lower: Floats) -> tuple[Array, Array]:
        """Points (d, m) and the grid exponents of their gains (m,)."""
        some = pulses > 0
        step = np.maximum(np.abs(aim).sum(axis=0), TINY) / np.maximum(pulses, 1)
        least = step / 8  # where few pulses are, a gain is below the usual step, but not so far
        for _ in range(2):
            y = nearest(aim, pulses, lower, np.where(some, step, np.inf).astype(np.float32))
            pulled = lower.T @ y.astype(np.float32)
            step = np.einsum("ij,ij->j", pulled, lower.T @ aim)
            step = np.maximum(step / np.maximum(np.square(pulled).sum(axis=0), TINY), least)
        gain: Array = np.where(some, gain_exponents(step, self.gain), 0)
        step = np.where(some, np.maximum(gains_of(gain, self.gain), TINY), np.inf)
        return nearest(aim, pulses, lower, step.astype(np.float32)), gain

    def _rows(self, weight: Floats, weighting: Weighting) -> tuple[Array, Array]:
        """Grid exponents of the row scales, and of how many times the usual pulses a row gets."""
        size = np.sqrt(mean_squares(weight))
        worth = np.broadcast_to(np.asarray(weighting.row_weights, np.float64), size.shape)
        if self.even or not worth.any():
            return to_grid(size, ROW_GRID), np.zeros(size.shape, np.int32)
        step = np.maximum(worth / worth.mean(), 1e-6) ** (-self.rows / 2)
        usual = np.exp(np.log(np.maximum(size / step, TINY)).mean())
        rate_grid = np.clip(to_grid(size / step / usual, ROW_GRID), -RATES, RATES)
        return to_grid(size / from_grid(rate_grid, ROW_GRID), ROW_GRID), rate_grid

    def _levels(self, weight: Floats, rate_grid: Array) -> Array:
        """Pulses of each group of columns in a usual row, in quarters, that spend the bits."""
        n, m = weight.shape
        starts = np.arange(0, n, self.length)
        usual = weight / from_grid(rate_grid, ROW_GRID)
        rates, times = np.unique(rate_grid, return_counts=True)
        level = np.add.reduceat(np.abs(usual).mean(axis=1, dtype=np.float64), starts)
        widths = np.minimum(self.length, n - starts)
        if self.even:
            level = widths / self.length
        cost = np.log2(np.maximum(counts(self.length).astype(np.float64), 1))
        low, high = 1e-9, 1e9
        for _ in range(60):
            middle = math.sqrt(low * high)
            trial = np.minimum(np.rint(level / middle), MAX_LEVEL).astype(np.int64)
            spent = (cost[widths[:, None], _pulses(trial, rates, self.length)] @ times).sum()
            low, high = (low, middle) if spent <= self.bits * n * m else (middle, high)
        return np.minimum(np.rint(level / high), MAX_LEVEL).astype(np.int64)

    def _pack(self, points: Array, pulses: Array) -> bytes:
        whole = len(points) // self.length
        # Rows first: what a row decodes to lies together.
        vectors = points.T[:, : whole * self.length].reshape(-1, self.length)
        coded = pack(vectors, pulses[:whole].T.reshape(-1))
        rest = points.T[:, whole * self.length :]
        return join([coded, pack(rest, pulses[-1]) if rest.size else b""])

    def decode(
        self, parts: Mapping[str, bytes], extra: Mapping[str, Any], info: TensorInfo
    ) -> Array:
        """Inverse of `encode`, the same bits on every machine."""
        m, n = info.matrix_shape
        if not info.size:
            if any(parts.values()):
                raise FormatError(f"{info.name}: bytes where there are no weights")
            return info.unmatrix(np.zeros((m, n), np.float32))
        groups = -(-n // self.length)
        energies, columns, coded_levels = split(parts["columns"], 3)
        rows, rates, coded_gains = split(parts["gains"], 3)
        scale = from_grid(decode_grid(columns, n, LIMIT * GRID), GRID)
        row_scale = from_grid(decode_grid(rows, m, LIMIT * ROW_GRID), ROW_GRID)
        rate_grid = decode_grid(rates, m, LIMIT * ROW_GRID)
        levels = decode_grid(coded_levels, groups, MAX_LEVEL)
        gains = decode_ints(coded_gains, m, groups)
        if levels.min() < 0:
            raise FormatError(f"{info.name}: a group with fewer pulses than none")
        points = self._points(parts["codes"], _pulses(levels, rate_grid, self.length), n)
        with np.errstate(over="ignore", under="ignore"):
            spread = gains_of(gains, self.gain) * row_scale[:, None]
            values = points * np.repeat(spread, self.length, axis=1)[:, :n] * scale
        if not np.isfinite(values).all():
            raise FormatError(f"{info.name}: a weight is not finite")
        order = np.argsort(decode_grid(energies, n, FAR), kind="stable")
        back = np.empty_like(values)
        back[:, order] = values
        return info.unmatrix(back)

    def _points(self, data: bytes, pulses: Array, n: int) -> Floats:
        """Coordinates as float32 (m, n)."""
        whole, m = n // self.length, pulses.shape[1]
        coded, rest = split(memoryview(data), 2)
        out = np.empty((m, n), np.float32)
        points = unpack(coded, pulses[:whole].T.reshape(-1), self.length)
        out[:, : whole * self.length] = points.reshape(m, -1)
        if n % self.length:
            out[:, whole * self.length :] = unpack(rest, pulses[-1], n % self.length)
        elif rest:
            raise FormatError("points beyond the last column")
        return out


def _pulses(levels: Array, rate_grid: Array, length: int) -> Array:
    """Pulses (groups, m) of groups of columns at `levels` in rows at `rate_grid`."""
    wanted = np.rint(levels[:, None] * from_grid(rate_grid, ROW_GRID) / STEPS)
    return np.clip(wanted, 0, most_pulses(length)).astype(np.int64)
