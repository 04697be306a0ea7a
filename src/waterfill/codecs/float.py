"""Small floats: exponent, mantissa and clip searched, scales free or powers of two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np

from waterfill.coding import levels
from waterfill.coding.entropy import decode_ints, encode_ints
from waterfill.coding.rounding import finite
from waterfill.coding.sections import join, split
from waterfill.registry import Codec, codec
from waterfill.types import (
    Array,
    Encoded,
    Floats,
    FormatError,
    Integers,
    SpecError,
    TensorInfo,
    Tunable,
    Weighting,
)

EXPONENTS = 126  # powers of two that a scale may be, either way
RATIOS = 15  # octaves that a group's scale may lie below the row's
NEAR = np.arange(-2, 2)  # octaves tried about the smallest power of two that clips nothing


@codec("float", version=1)
class Float(Codec):
    """Floats of a few bits, a scale for each row and group of input columns.

    A scale is the real-valued exponent bias of LLM-FP4 (Liu et al. 2023): it is searched, and with
    it which of the bits are exponent, for the least weighted error of the layer's output.
    ZeroQuant-FP (Wu et al. 2023) asks for scales that are powers of two, so that a cast is a shift.
    Rounding is to nearest, or successive (GPTQ, Frantar et al. 2022). There is no infinity and no
    NaN: every code is a number.

    Attributes
    ----------
    ebits, mbits : int
        Bits of exponent (1 to 5) and mantissa (0 to 6); with the sign 2 to 8.
    group : int
        Input columns that share a scale.
    search : str
        absmax: the largest weight of a group becomes the largest float; clip: the scale of least
        error; format: that, and the split of ``ebits + mbits`` that is best for the tensor.
    scales : str
        free: float16; pow2: powers of two; ratio: powers of two below a float16 of the row.
    solver : str
        nearest | successive
    pack : str
        packed: fixed width; coded: the same codes through rANS.
    damping : float
        Added to the diagonal of S, relative to its mean.
    """

    parts = ("codes", "scales")

    ebits: int = 2
    mbits: int = 1
    group: int = 128
    search: str = "format"
    scales: str = "free"
    solver: str = "successive"
    pack: str = "packed"
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not (
            1 <= self.ebits <= 5
            and 0 <= self.mbits <= 6
            and self.bits <= 8
            and 8 <= self.group <= 65536
            and 0 <= self.damping < np.inf
        ):
            raise SpecError(
                "float: ebits is 1 to 5, mbits 0 to 6, both at most 7, group 8 to 65536, damping not negative"
            )
        for value, known in (
            (self.search, ("absmax", "clip", "format")),
            (self.scales, ("free", "pow2", "ratio")),
            (self.solver, ("nearest", "successive")),
            (self.pack, ("packed", "coded")),
        ):
            if value not in known:
                raise SpecError(f"float: {value!r} is not one of {', '.join(known)}")

    @property
    def bits(self) -> int:
        """Of a weight, the sign included."""
        return 1 + self.ebits + self.mbits

    @classmethod
    def ladder(cls, info: TensorInfo) -> Iterator[Self]:
        """Two to six bits."""
        if info.worth_rounding:
            for ebits, mbits in ((1, 0), (1, 1), (2, 1), (2, 2), (2, 3)):
                yield cls(ebits=ebits, mbits=mbits, pack="coded")

    def encode(
        self, x: Array, info: TensorInfo, weighting: Weighting
    ) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Bits of `info.shape` -> parts ``codes`` and ``scales``."""
        matrix = finite(info.matrix(x), info.name)
        exponent = levels.power_of_two(matrix)
        columns = np.ascontiguousarray(np.ldexp(matrix, exponent).T)
        lower = levels.metric(len(columns), weighting, self.damping, self.solver)
        tables = [levels.floats(ebits, self.bits - 1 - ebits) for ebits in self._splits()]
        chosen = levels.best_table(columns, lower, weighting, self.group, tables)
        ebits, signed = self._splits()[chosen], tables[chosen]
        caps = self._row_caps(columns, lower, signed)

        def scale_of(number: int, target: Floats, importance: Floats) -> Floats:
            return self._scale(target, importance, signed, caps)

        codes, scales, _ = levels.round_groups(columns, lower, self.group, signed, scale_of)
        extra = {"exponent": exponent} if exponent else {}
        extra |= {"ebits": ebits} if ebits != self.ebits else {}
        return {
            "codes": levels.write_codes(codes.T, self.bits, self.pack),
            "scales": self._write_scales(scales.T, caps),
        }, extra

    def decode_into(
        self, parts: Mapping[str, bytes], extra: Mapping[str, Any], info: TensorInfo, out: Array
    ) -> None:
        """As `decode`, some rows at a time."""
        table, scales, exponent = self._numbers(parts, extra, info)
        codes = self._codes(parts["codes"], info, table)
        n = info.matrix_shape[1]

        def values(rows: slice) -> Floats:
            return table[codes[rows]] * levels.spread(scales[rows], self.group, n)

        levels.fill(out, info, values, exponent)

    def tunable(self, one: Encoded) -> Tunable | None:
        """Codes and scales, where these are free."""
        if self.scales != "free":
            return None
        table, scales, exponent = self._numbers(one.parts, one.extra, one.info)
        codes = self._codes(one.parts["codes"], one.info, table)
        return levels.tunable(codes, table, scales, self.group, exponent, ["scales"], self.pack)

    def retuned(self, tunable: Tunable, one: Encoded) -> dict[str, bytes]:
        """Other codes and scales."""
        return levels.retuned(tunable, one.extra, self.bits, self.pack)

    def integers(
        self,
        parts: Mapping[str, bytes],
        extra: Mapping[str, Any],
        info: TensorInfo,
        outline: bool = False,
    ) -> Integers | None:
        """Floats as whole steps of the smallest of them, where these fit a signed byte."""
        table, scales, exponent = self._numbers(parts, extra, info)
        step = table[len(table) // 2 + 1]
        with np.errstate(over="ignore", under="ignore"):
            rows = np.ldexp(scales, -exponent)
            if table.max() > 127 * step or not np.array_equal(np.ldexp(rows, exponent), scales):
                return None
        whole = None
        if not outline:
            whole = (table / step).astype(np.int8)[self._codes(parts["codes"], info, table)]
        n = info.matrix_shape[1]
        bits = int(table.max() / step).bit_length() + 1
        deviation = np.full(n, 0.4 * table.max() / step, np.float32)
        return Integers(whole, np.full(n, step), rows, self.group, 1, deviation, bits, len(table))

    def _splits(self) -> list[int]:
        """Bits of exponent to try."""
        return (
            list(range(1, min(5, self.bits - 1) + 1)) if self.search == "format" else [self.ebits]
        )

    def _row_caps(self, columns: Floats, lower: Floats, signed: Floats) -> Floats:
        """What scales are powers of two times: the largest of each row's, or one."""
        n, m = columns.shape
        caps = np.full(m, float(self.scales != "ratio"), np.float32)
        importance = levels.importances(lower)
        for first in range(0, n if self.scales == "ratio" else 0, self.group):
            part = slice(first, first + self.group)
            caps = np.maximum(caps, self._free(columns[part], importance[part], signed))
        return caps

    def _free(self, target: Floats, importance: Floats, signed: Floats) -> Floats:
        if self.search == "absmax":
            return levels.half(np.abs(target).max(axis=0, initial=0) / signed[-1])
        # The levels are symmetric.
        return np.abs(levels.search_scale(target, importance, signed)[0])

    def _scale(self, target: Floats, importance: Floats, signed: Floats, caps: Floats) -> Floats:
        if self.scales == "free":
            return self._free(target, importance, signed)
        safe = np.where(caps == 0, np.float32(1), caps)
        fraction, octave = np.frexp(np.abs(target).max(axis=0, initial=0) / signed[-1] / safe)
        octave = np.where(fraction == 0.5, octave - 1, octave)
        near = NEAR if self.search != "absmax" else NEAR[NEAR == 0]
        lowest, highest = (-EXPONENTS, EXPONENTS) if self.scales == "pow2" else (-RATIOS, 0)
        trials = np.ldexp(caps, np.clip(octave + near[:, None], lowest, highest))
        return levels.least(target, importance, signed, trials.astype(np.float32))[0]

    def _write_scales(self, scales: Floats, caps: Floats) -> bytes:
        if self.scales == "free":
            return levels.halves(scales)
        safe = np.where(caps == 0, np.float32(1), caps)[:, None]
        octaves = encode_ints(np.where(scales == 0, 0, np.frexp(scales / safe)[1] - 1))
        return octaves if self.scales == "pow2" else join([levels.halves(caps), octaves])

    def _read_scales(self, data: bytes, info: TensorInfo) -> Floats:
        m, n = info.matrix_shape
        groups = -(-n // self.group)
        if self.scales == "free":
            return levels.read_half(data, (m, groups), info, "scales")
        caps, lowest, highest = np.broadcast_to(np.float32(1), (m, 1)), -EXPONENTS, EXPONENTS
        if self.scales == "ratio":
            halves, data = split(data, 2)
            caps, lowest, highest = levels.read_half(halves, (m, 1), info, "scales"), -RATIOS, 0
        octaves = decode_ints(data, m, groups)
        if octaves.size and not lowest <= octaves.min() <= octaves.max() <= highest:
            raise FormatError(f"{info.name}: a scale lies outside its range")
        return np.ldexp(caps, octaves)

    def _numbers(
        self, parts: Mapping[str, bytes], extra: Mapping[str, Any], info: TensorInfo
    ) -> tuple[Floats, Floats, int]:
        """The number of each code, ascending; scales and their exponent."""
        ebits = extra.get("ebits", self.ebits)
        if type(ebits) is not int or not 1 <= ebits <= min(5, self.bits - 1):
            raise FormatError(f"{info.name}: {ebits!r} bits of exponent of {self.bits}")
        table = levels.floats(ebits, self.bits - 1 - ebits)
        return table, self._read_scales(parts["scales"], info), levels.read_exponent(extra, info)

    def _codes(self, data: bytes, info: TensorInfo, table: Floats) -> Array:
        return levels.read_codes(data, info, self.bits, self.pack, len(table))
