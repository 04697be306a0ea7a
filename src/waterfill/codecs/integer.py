"""Group-wise integers with a searched scale: the field's common ground, and our peer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np

from waterfill.coding import levels
from waterfill.coding.adaround import adaround
from waterfill.coding.coordinate import Quadratic
from waterfill.coding.entropy import decode_ints, encode_ints
from waterfill.coding.outliers import Outliers, decode_outliers, encode_outliers, worst
from waterfill.coding.packing import pack, unpack
from waterfill.coding.rounding import factor, finite
from waterfill.coding.uniform import Grid, Rounded, improve, round_successively
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

SOLVERS = ("nearest", "successive", "coordinate", "adaround")


@codec("integer", version=2)
class Integer(Codec):
    """``q * scale``, one float16 scale for each row and group of input columns.

    The scale is searched: the clip, and the sign of the scale, that minimise the weighted error of
    its group. Then it is rounded, as a rule better the later in this list:

    - nearest: each weight by itself;
    - successive: columns last to first, errors carried on (GPTQ, Frantar et al. 2022);
    - coordinate: from there coordinate descent (QuantEase, Behdin et al. 2023), scales fitted again;
    - adaround: from nearest, up or down by gradient (AdaRound, Nagel et al. 2020), then descent as
      in coordinate. Needs torch to encode.

    Attributes
    ----------
    bits : int
        2 to 8; values run from ``-2**(bits-1)`` to ``2**(bits-1) - 1``.
    group : int
        Input columns that share a scale.
    solver : str
        nearest | successive | coordinate | adaround
    pack : str
        packed: fixed width, as kernels read it; coded: the same integers through rANS.
    damping : float
        Added to the diagonal of S, relative to its mean.
    outliers : float
        Share of the weights kept to eight significant bits beside the integers: about 19 bits each
        where they are 1 %. Those largest by their weight in the harm; `coordinate` chooses them
        again between descents (QuantEase's outlier-aware form).
    """

    usual = True
    parts = ("codes", "scales", "outliers")

    bits: int = 4
    group: int = 128
    solver: str = "successive"
    pack: str = "packed"
    damping: float = 0.01
    outliers: float = 0.0

    def __post_init__(self) -> None:
        if (
            not 2 <= self.bits <= 8
            or not 8 <= self.group <= 65536
            or not 0 <= self.damping < math.inf
            or not 0 <= self.outliers <= 0.5
        ):
            raise SpecError(
                "integer: bits is 2 to 8, group 8 to 65536, damping not negative, outliers 0 to 0.5"
            )
        if self.solver not in SOLVERS or self.pack not in ("packed", "coded"):
            raise SpecError(
                f"integer: solver is one of {', '.join(SOLVERS)}, pack is packed or coded"
            )

    @classmethod
    def ladder(cls, info: TensorInfo) -> Iterator[Self]:
        """Two to eight bits."""
        if info.worth_rounding:
            for bits in (2, 3, 4, 6, 8):
                yield cls(bits=bits)

    @property
    def names(self) -> tuple[str, ...]:
        """Without ``outliers`` where none are asked for."""
        return self.parts if self.outliers else self.parts[:2]

    def encode(
        self, x: Array, info: TensorInfo, weighting: Weighting
    ) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Bits of `info.shape` -> parts ``codes``, ``scales`` and, if there are any, ``outliers``."""
        matrix = finite(info.matrix(x), info.name)
        exponent = levels.power_of_two(matrix)
        extra = {"exponent": exponent} if exponent else {}
        rounded = self._round(np.ascontiguousarray(np.ldexp(matrix, exponent).T), weighting)
        parts = {
            "codes": self._pack(rounded.codes(Grid(self.bits, self.group)).T),
            "scales": rounded.scales.astype("<f2").T.tobytes(),
        }
        if rounded.kept is not None and rounded.kept.any():
            parts["outliers"] = encode_outliers(rounded.values.T, rounded.kept.T)
        return parts, extra

    def _round(self, columns: Floats, weighting: Weighting) -> Rounded:
        grid, row_weights = Grid(self.bits, self.group), weighting.row_weights
        lower = self._lower(len(columns), weighting)
        quadratic = Quadratic.damped(weighting.second_moment, len(columns), self.damping)
        kept, count = None, int(self.outliers * columns.size)
        if count:
            kept = worst(np.square(columns) * quadratic.diagonal[:, None] * row_weights, count)
        rounded = round_successively(columns, lower, grid, kept)
        if self.solver == "adaround":
            rounded = adaround(columns, rounded, grid, quadratic)
        if self.solver in ("coordinate", "adaround"):
            rounded = improve(columns, rounded, grid, quadratic, row_weights)
        return rounded

    def decode_into(
        self, parts: Mapping[str, bytes], extra: Mapping[str, Any], info: TensorInfo, out: Array
    ) -> None:
        """As `decode`, some rows at a time: as float32 a large matrix would take twice its room."""
        n = info.matrix_shape[1]
        scales, exponent = self._scales(parts["scales"], extra, info)
        held = self._integers(self._levels(parts["codes"], info), scales, n)
        kept = Outliers.of(parts, info)

        def values(rows: slice) -> Floats:
            found = held.values(rows.start, rows.stop)
            kept.put(found, rows)
            return found

        levels.fill(out, info, values, exponent)

    def integers(
        self,
        parts: Mapping[str, bytes],
        extra: Mapping[str, Any],
        info: TensorInfo,
        outline: bool = False,
    ) -> Integers | None:
        """Codes and scales as they are, where the scales can take the exponent and are all there is."""
        if "outliers" in parts:
            return None
        scales, exponent = self._scales(parts["scales"], extra, info)
        with np.errstate(over="ignore", under="ignore"):
            whole = np.ldexp(scales, -exponent)
            if not np.array_equal(np.ldexp(whole, exponent), scales):
                return None
        codes = None if outline else self._levels(parts["codes"], info)
        return self._integers(codes, whole, info.matrix_shape[1])

    def tunable(self, one: Encoded) -> Tunable | None:
        """Integers and scales; outliers stay."""
        (m, n), top, fixed = one.info.matrix_shape, 1 << (self.bits - 1), None
        scales, exponent = self._scales(one.parts["scales"], one.extra, one.info)
        if "outliers" in one.parts:
            places, kept = decode_outliers(one.parts["outliers"], m * n)
            fixed = levels.apart(places, kept, (m, n), exponent)
        codes = self._levels(one.parts["codes"], one.info).astype(np.int16) + top
        table = np.arange(-top, top, dtype=np.float32)
        return levels.tunable(
            codes, table, scales, self.group, exponent, ["scales"], self.pack, fixed
        )

    def retuned(self, tunable: Tunable, one: Encoded) -> dict[str, bytes]:
        """Parts of the same form."""
        codes = self._pack(tunable.terms[0].codes - (1 << (self.bits - 1)))
        scales = levels.retuned_scales(tunable, one.extra)
        return {**one.parts, "codes": codes, "scales": scales}

    def _integers(self, codes: Array | None, scales: Floats, n: int) -> Integers:
        spread = np.full(n, 2.0**self.bits / 4, np.float32)
        return Integers(codes, np.ones(n, np.float32), scales, self.group, 1, spread, self.bits)

    def _scales(
        self, data: bytes, extra: Mapping[str, Any], info: TensorInfo
    ) -> tuple[Floats, int]:
        m, n = info.matrix_shape
        scales = levels.read_half(data, (m, -(-n // self.group)), info, "scales")
        return scales, levels.read_exponent(extra, info)

    def _levels(self, data: bytes, info: TensorInfo) -> Array:
        m, n = info.matrix_shape
        top = 1 << (self.bits - 1)
        if self.pack == "coded":
            codes = decode_ints(data, m, n)
            if codes.size and not -top <= codes.min() <= codes.max() < top:
                raise FormatError(f"{info.name}: an integer of more than {self.bits} bits")
            return codes.astype(np.int8)
        # Wraps around for 8 bits, which is what a signed byte wants.
        fields = unpack(data, m * n, self.bits)
        fields -= np.uint8(top)
        return fields.view(np.int8).reshape(m, n)

    def _lower(self, n: int, weighting: Weighting) -> Floats:
        moment = weighting.second_moment
        if moment is None:
            return np.ones(n, np.float32)
        if self.solver in ("nearest", "adaround") and moment.ndim == 2:
            return np.sqrt(np.maximum(moment.diagonal(), 1e-12))
        return factor(moment, self.damping)

    def _pack(self, codes: Array) -> bytes:
        if self.pack == "coded":
            return encode_ints(codes.astype(np.int32))
        return pack((codes.astype(np.int16) + (1 << (self.bits - 1))).astype(np.uint8), self.bits)
