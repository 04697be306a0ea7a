"""Levels that crowd about zero as a power law does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np

from waterfill.coding import levels
from waterfill.coding.rounding import finite
from waterfill.registry import Codec, codec
from waterfill.types import (
    Array,
    Encoded,
    Floats,
    FormatError,
    SpecError,
    TensorInfo,
    Tunable,
    Weighting,
)

EXPONENTS = tuple(step / 20 for step in range(8, 23))  # tried where none is given: 0.4 to 1.1


@codec("power", version=1)
class Power(Codec):
    """A uniform grid for ``sign(w) |w|^a``, a scale for each row and group of input columns.

    The exponent is that of the tensor (NUPES, Yvinec et al. 2023); it is searched for the least
    weighted error, and so are the scales. What is stored is the table of levels, so that no reader
    computes a power. Rounding is to nearest, or successive (GPTQ, Frantar et al. 2022).

    Attributes
    ----------
    bits : int
        2 to 8: levels reach one step further down than up, and scales have a sign.
    exponent : float
        Of the weights before the uniform grid, 0.1 to 2; 1 is uniform. 0 to search for it.
    group : int
        Input columns that share a scale.
    solver : str
        nearest | successive
    pack : str
        packed: fixed width; coded: the same codes through rANS.
    damping : float
        Added to the diagonal of S, relative to its mean.
    """

    parts = ("codes", "scales", "levels")
    shared = ("levels",)

    bits: int = 4
    exponent: float = 0.0
    group: int = 128
    solver: str = "successive"
    pack: str = "packed"
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not (
            2 <= self.bits <= 8
            and (self.exponent == 0 or 0.1 <= self.exponent <= 2)
            and 8 <= self.group <= 65536
            and 0 <= self.damping < np.inf
        ):
            raise SpecError(
                "power: bits is 2 to 8, exponent 0 or 0.1 to 2, group 8 to 65536, damping not negative"
            )
        if self.solver not in ("nearest", "successive") or self.pack not in ("packed", "coded"):
            raise SpecError("power: solver is nearest or successive, pack is packed or coded")

    @classmethod
    def ladder(cls, info: TensorInfo) -> Iterator[Self]:
        """Two to six bits."""
        if info.worth_rounding:
            for bits in (2, 3, 4, 5, 6):
                yield cls(bits=bits, pack="coded")

    def encode(
        self, x: Array, info: TensorInfo, weighting: Weighting
    ) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Bits of `info.shape` -> parts ``codes``, ``scales`` and ``levels``."""
        matrix = finite(info.matrix(x), info.name)
        exponent = levels.power_of_two(matrix)
        columns = np.ascontiguousarray(np.ldexp(matrix, exponent).T)
        lower = levels.metric(len(columns), weighting, self.damping, self.solver)
        tried = [self.exponent] if self.exponent else EXPONENTS
        tables = [power_levels(self.bits, exponent) for exponent in tried]
        table = tables[levels.best_table(columns, lower, weighting, self.group, tables)]

        def scale_of(_: int, target: Floats, importance: Floats) -> Floats:
            return levels.search_scale(target, importance, table)[0]

        codes, scales, _ = levels.round_groups(columns, lower, self.group, table, scale_of)
        return {
            "codes": levels.write_codes(codes.T, self.bits, self.pack),
            "scales": levels.halves(scales.T),
            "levels": levels.halves(-table[: len(table) // 2][::-1]),
        }, {"exponent": exponent} if exponent else {}

    def decode_into(
        self, parts: Mapping[str, bytes], extra: Mapping[str, Any], info: TensorInfo, out: Array
    ) -> None:
        """As `decode`, some rows at a time."""
        n = info.matrix_shape[1]
        codes, table, scales, exponent = self._read(parts, extra, info)

        def values(rows: slice) -> Floats:
            return table[codes[rows]] * levels.spread(scales[rows], self.group, n)

        levels.fill(out, info, values, exponent)

    def tunable(self, one: Encoded) -> Tunable | None:
        """Codes and scales; the levels are those of the power."""
        codes, table, scales, exponent = self._read(one.parts, one.extra, one.info)
        return levels.tunable(codes, table, scales, self.group, exponent, ["scales"], self.pack)

    def retuned(self, tunable: Tunable, one: Encoded) -> dict[str, bytes]:
        """Other codes and scales, the same levels."""
        return {**one.parts, **levels.retuned(tunable, one.extra, self.bits, self.pack)}

    def _read(
        self, parts: Mapping[str, bytes], extra: Mapping[str, Any], info: TensorInfo
    ) -> tuple[Array, Floats, Floats, int]:
        """Codes, levels, scales and their exponent."""
        m, n = info.matrix_shape
        exponent = levels.read_exponent(extra, info)
        scales = levels.read_half(parts["scales"], (m, -(-n // self.group)), info, "scales")
        table = _both_signs(
            levels.read_half(parts["levels"], (1 << (self.bits - 1),), info, "levels")
        )
        if (np.diff(table) < 0).any():
            raise FormatError(f"{info.name}: the levels are not in order")
        codes = levels.read_codes(parts["codes"], info, self.bits, self.pack, len(table))
        return codes, table, scales, exponent


def power_levels(bits: int, exponent: float) -> Floats:
    """What a uniform grid of so many bits stands for before the power: ascending, from -1."""
    top = 1 << (bits - 1)
    return _both_signs(levels.half(((np.arange(1, top + 1) / top) ** (1 / exponent)).astype("f4")))


def _both_signs(size: Floats) -> Floats:
    """Magnitudes of one step to all -> levels; the negative side has one more, as integers have."""
    return np.concatenate([-size[::-1], np.zeros(1, np.float32), size[:-1]])
