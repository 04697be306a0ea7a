"""Successive trellis rounding with water-filled steps and an entropy coder: the flagship."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

import numpy as np

from waterfill.coding import paths, trellis
from waterfill.coding.prior import aim
from waterfill.coding.rounding import factor, finite, mean_square
from waterfill.coding.scales import LIMIT, decode_grid, encode_grid, from_grid, to_grid
from waterfill.coding.sections import join, split
from waterfill.registry import Codec, codec
from waterfill.types import (
    DTYPES,
    Array,
    Floats,
    FormatError,
    Integers,
    SpecError,
    TensorInfo,
    WaterfillError,
    Weighting,
)

ROW_GRID = 2  # row scales to the octave
_SPREADS: WeakKeyDictionary[Weighting, dict[float, float]] = WeakKeyDictionary()


@codec("trellis", version=2)
class Trellis(Codec):
    """Each column rounded on its own step ``a / L_jj`` along a trellis path, errors carried on.

    With the second moment of the inputs ``S = L L^T`` all columns then cost the same noise after
    weighting, which is what reverse water-filling asks for (WaterSIC, 2026); the path through two
    interleaved grids (dependent quantisation, Schwarz et al. 2019) gains most of the 1.53 dB that
    scalar rounding loses; rANS turns each column's own entropy into bytes.

    Attributes
    ----------
    step : float
        Step relative to the layer's own scale, ``rms(W) * geometric mean of L_jj``: about
        ``log2(1 / step) + 1.4`` bits per weight below one half. The planner's continuous knob.
    states : int
        Of the trellis: 4 to 256, or 1 for plain rounding. Decoding is as fast with any.
    mmse : float
        Noise that the target is shrunk for, in squared steps; 0 is none. For Gaussian weights a
        third (the noise itself) is best; trained ones want less.
    gains : bool
        Fit one gain per column by least squares afterwards (2 bytes a column).
    rows : float
        Row steps go with the row's weight to the power ``-rows / 2``: 1 trusts the weights fully, 0
        ignores them. In between because they are estimates: on held-out text 0.5 beat both ends.
    damping : float
        Added to the diagonal of S, relative to its mean.
    """

    usual = True
    oldest: ClassVar[int] = 2  # version 1 was never released
    step: float = 0.25
    states: int = 64
    mmse: float = 0.05
    gains: bool = False
    rows: float = 0.5
    damping: float = 0.01

    def __post_init__(self) -> None:
        if (
            self.states not in (1, *trellis.CODES)
            or not 0 < self.step < 1e6
            or min(self.mmse, self.damping, self.rows) < 0
        ):
            raise SpecError(
                "trellis: states is 1 or a power of two from 4 to 256, step positive, "
                "the other numbers not negative"
            )

    @classmethod
    def ladder(cls, info: TensorInfo) -> Iterator[Self]:
        """From a fraction of a bit to where exact coding is cheaper (float32: to 16 bits)."""
        if info.worth_rounding:
            wide = info.dtype in ("F32", "F64")
            for half_octaves in (
                5,
                4,
                3,
                2,
                1,
                0,
                -2,
                -4,
                -7,
                -10,
                -13,
                -17,
                *((-22, -28) if wide else ()),
            ):
                yield cls(step=2.0 ** (half_octaves / 2))

    def between(self, other: Self, t: float) -> Self:
        """Steps in geometric progression."""
        # Six digits: far finer than any budget asks for, and short where people read it.
        step = float(f"{self.step ** (1 - t) * other.step**t:.6g}")
        return dataclasses.replace(self, step=step)

    def encode(
        self, x: Array, info: TensorInfo, weighting: Weighting
    ) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Bits of `info.shape` -> one part ``codes``."""
        if not info.size:
            return {"codes": join([b"", b"", b"", b""])}, {}
        row_grid = self._row_exponents(info.matrix_shape[0], weighting)
        lower, target, column_grid = self._prepare(_scaled(x, info, row_grid), weighting)
        step = from_grid(column_grid, _column_grid(len(row_grid)))
        octaves = _octaves(column_grid, row_grid)
        index = trellis.quantise(target, lower, step, self.states)
        del lower, target  # as large as the weights in float32, which they are made from
        gains = b""
        if self.gains:
            values = trellis.walk(index, step, self.states)
            gains = _fit_gains(_scaled(x, info, row_grid), values, weighting).tobytes()
        columns, rows = encode_grid(column_grid), encode_grid(row_grid)
        return {
            "codes": join([columns, rows, gains, paths.encode(index, self.states, octaves)])
        }, {}

    def decode(
        self, parts: Mapping[str, bytes], extra: Mapping[str, Any], info: TensorInfo
    ) -> Array:
        """Inverse of `encode`, the same bits on every machine."""
        if not info.size:
            if any(split(parts["codes"], 4)):
                raise FormatError(f"{info.name}: bytes where there are no weights")
            return np.zeros(info.shape, DTYPES[info.dtype])
        codes, step, scale, octaves = self._read(parts["codes"], info)
        if info.dtype == "BF16":
            return info.arrange(paths.decode(codes, self.states, step, scale, octaves, bf16=True))
        return info.unmatrix(paths.decode(codes, self.states, step, scale, octaves))

    def integers(
        self,
        parts: Mapping[str, bytes],
        extra: Mapping[str, Any],
        info: TensorInfo,
        outline: bool = False,
    ) -> Integers | None:
        """Levels of the path on the step of their column and the scale of their row."""
        if not info.size:
            return None
        codes, step, scale, octaves = self._read(parts["codes"], info)
        levels = None if outline else paths.levels(codes, self.states, info.matrix_shape, octaves)
        if levels is None and not outline:
            return None
        spread = paths.spread(codes, self.states, info.matrix_shape, octaves)
        return Integers(levels, step, scale[:, None], len(step), self.states, spread)

    def _read(
        self, data: bytes, info: TensorInfo
    ) -> tuple[memoryview, Floats, Floats, tuple[Array, Array]]:
        """Path, steps of the columns, scales of the rows, and hints for the path."""
        m, n = info.matrix_shape
        columns, rows, gains, codes = split(memoryview(data), 4)
        paths.require_plausible(codes, m * n)  # before anything of that size is made
        per_octave = _column_grid(m)
        column_grid = decode_grid(columns, n, LIMIT * per_octave)
        step = from_grid(column_grid, per_octave)
        if gains:
            if len(gains) != 2 * n:
                raise FormatError(f"{info.name}: {len(gains)} bytes of gains where {2 * n} belong")
            with np.errstate(over="ignore", invalid="ignore"):
                step = step * np.frombuffer(gains, "<f2").astype(np.float32)
            if not np.isfinite(step).all():
                raise FormatError(f"{info.name}: a gain is not finite")
        row_grid = decode_grid(rows, m, LIMIT * ROW_GRID)
        return codes, step, from_grid(-row_grid, ROW_GRID), _octaves(column_grid, row_grid)

    def _row_exponents(self, m: int, weighting: Weighting) -> Array:
        weights = weighting.row_weights
        if not self.rows or isinstance(weights, float) or not np.any(weights):
            return np.zeros(m, np.int32)
        if not np.isfinite(weights).all():
            raise WaterfillError("row weights are not finite; calibrate again")
        # A row that no token ever asked for keeps a floor, or it would be lost altogether.
        relative = np.maximum(weights / np.mean(weights), 1e-6)
        relative = relative / np.exp(np.mean(np.log(relative)))
        return to_grid(relative ** (self.rows / 2), ROW_GRID)

    def _prepare(self, scaled: Floats, weighting: Weighting) -> tuple[Floats, Floats, Array]:
        """Factor, target and column steps on their grid."""
        moment = weighting.second_moment
        a = self.step * (np.sqrt(mean_square(scaled)) or 1.0) * _spread(weighting, self.damping)
        if moment is None:
            lower, target = np.ones(scaled.shape[1], np.float32), scaled
        elif self.mmse and moment.ndim == 2:
            lower, target = aim(scaled, moment, self.damping, self.mmse * a**2)
        else:
            lower, target = factor(moment, self.damping), scaled
        return lower, target, to_grid(a / _diagonal(lower), _column_grid(len(scaled)))


def _scaled(x: Array, info: TensorInfo, row_grid: Array) -> Floats:
    """The weights as a matrix, each row on its scale."""
    matrix = finite(info.matrix(x), info.name)
    matrix *= from_grid(row_grid, ROW_GRID)[:, None]
    return matrix


def _diagonal(lower: Floats) -> Floats:
    return lower if lower.ndim == 1 else lower.diagonal()


def _spread(weighting: Weighting, damping: float) -> float:
    """Geometric mean of the diagonal of S's factor: the planner asks for it at many rates."""
    known = _SPREADS.setdefault(weighting, {})
    if damping not in known:
        moment = weighting.second_moment
        diagonal = np.ones(1) if moment is None else _diagonal(factor(moment, damping))
        known[damping] = float(np.exp(np.log(diagonal, dtype=np.float64).mean()))
    return known[damping]


def _column_grid(m: int) -> int:
    """Column steps to the octave: finer where many rows share the bit it costs."""
    return 8 if m >= 512 else 4


def _octaves(column_grid: Array, row_grid: Array) -> tuple[Array, Array]:
    """How weights were scaled before rounding, as logarithms to base 2."""
    return -column_grid / _column_grid(len(row_grid)), row_grid / ROW_GRID


def _fit_gains(weight: Floats, values: Floats, weighting: Weighting) -> Array:
    """Least-squares gain per column under S: ``(Q^T Q * S) g = diag(Q^T W S)``; float16 (n,)."""
    moment = weighting.second_moment
    n = weight.shape[1]
    if moment is None or moment.ndim == 1:
        top, bottom = np.sum(values * weight, axis=0), np.sum(values * values, axis=0)
        gains = np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1), 1)
    else:
        left = (values.T @ values).astype(np.float64) * moment
        right = np.einsum("ij,ij->j", values, weight @ moment, dtype=np.float64)
        ridge = 1e-6 * (np.trace(left) / max(n, 1) or 1.0)
        gains = 1 + np.linalg.solve(left + ridge * np.eye(n), right - left.sum(axis=1))
    fitted: Array = np.clip(np.nan_to_num(gains, nan=1.0), 0.25, 4.0).astype("<f2")
    return fitted
