"""Levels of their own for each tensor or row, by weighted k-means, and outliers beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import kmeans, levels
from waterfill.coding.outliers import Outliers, decode_outliers, encode_outliers, worst
from waterfill.coding.rounding import finite
from waterfill.registry import Codec, codec
from waterfill.types import (
    Array,
    Encoded,
    Floats,
    SpecError,
    TensorInfo,
    Tunable,
    Weighting,
)

Mask = NDArray[np.bool_]
ROUNDS = 2  # of scales and levels fitted in turn


@codec("codebook", version=1)
class Codebook(Codec):
    """Each weight the index of a level; the levels are those of weighted k-means.

    An error's weight is what the layer's output makes of it: that of its input, times that of its
    row (SqueezeLLM, Kim et al. 2023, which weighs by the diagonal of the Fisher matrix). The
    weights that the levels fit worst can be kept beside them (dense and sparse, ibid.). Rounding is
    to nearest, or successive (GPTQ, Frantar et al. 2022).

    Attributes
    ----------
    bits : int
        1 to 6: there are ``2**bits`` levels.
    table : str
        tensor: one table, and a float16 scale for each row and group; row: a table for each row.
    group : int
        Input columns that share a scale.
    outliers : float
        Share of the weights that are kept to eight significant bits, 0 to 0.1.
    weighted : bool
        Whether k-means knows what errors cost.
    solver : str
        nearest | successive
    pack : str
        packed: fixed width; coded: the same indices through rANS.
    damping : float
        Added to the diagonal of S, relative to its mean.
    """

    parts = ("codes", "scales", "levels", "tables", "outliers")
    shared = ("levels",)

    bits: int = 4
    table: str = "tensor"
    group: int = 128
    outliers: float = 0.0
    weighted: bool = True
    solver: str = "successive"
    pack: str = "packed"
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not (
            1 <= self.bits <= 6
            and 8 <= self.group <= 65536
            and 0 <= self.outliers <= 0.1
            and 0 <= self.damping < np.inf
        ):
            raise SpecError(
                "codebook: bits is 1 to 6, group 8 to 65536, outliers 0 to 0.1, damping not negative"
            )
        for value, known in (
            (self.table, ("tensor", "row")),
            (self.solver, ("nearest", "successive")),
            (self.pack, ("packed", "coded")),
        ):
            if value not in known:
                raise SpecError(f"codebook: {value!r} is not {' or '.join(known)}")

    @classmethod
    def ladder(cls, info: TensorInfo) -> Iterator[Self]:
        """Two to six bits."""
        if info.worth_rounding:
            for bits in (2, 3, 4, 5, 6):
                yield cls(bits=bits, pack="coded")

    @property
    def names(self) -> tuple[str, ...]:
        """Tables or levels and scales, and outliers where they are asked for."""
        own = ("codes", "tables") if self.table == "row" else ("codes", "scales", "levels")
        return (*own, "outliers") if self.outliers else own

    def encode(
        self, x: Array, info: TensorInfo, weighting: Weighting
    ) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Bits of `info.shape` -> parts ``codes``, ``scales`` and ``levels``, or ``tables``; ``outliers``."""
        matrix = finite(info.matrix(x), info.name)
        exponent = levels.power_of_two(matrix)
        columns = np.ascontiguousarray(np.ldexp(matrix, exponent).T)
        lower = levels.metric(len(columns), weighting, self.damping, self.solver)
        importance = levels.importances(lower)
        weights = importance[:, None]
        if self.weighted:
            weights = weights * np.broadcast_to(np.float32(weighting.row_weights), matrix.shape[:1])
        exact = None
        table = self._fit(columns, weights if self.weighted else 1, importance)
        if self.outliers:
            # Levels and outliers are chosen in turn: weights kept apart have no say in the levels.
            exact = self._worst(columns, weights, importance, table)
            table = self._fit(columns, np.where(exact, 0, weights), importance)

        def scale_of(first: int, target: Floats, importance: Floats) -> Floats:
            if self.table == "row":
                return np.ones(target.shape[1], np.float32)
            if exact is not None:
                target = np.where(exact[first : first + len(target)], 0, target)
            return levels.search_scale(target, importance, table)[0]

        codes, scales, values = levels.round_groups(
            columns, lower, self.group, table, scale_of, exact
        )
        parts = {"levels": levels.halves(table), "scales": levels.halves(scales.T)}
        if self.table == "row":
            parts = {"tables": levels.halves(table.T)}
        if exact is not None and exact.any():
            # What is kept has no use for its code: the commonest is the cheapest.
            codes[exact] = np.bincount(codes.ravel()).argmax()
            parts["outliers"] = encode_outliers(values.T, exact.T)
        parts["codes"] = levels.write_codes(codes.T, self.bits, self.pack)
        return parts, {"exponent": exponent} if exponent else {}

    def decode_into(
        self, parts: Mapping[str, bytes], extra: Mapping[str, Any], info: TensorInfo, out: Array
    ) -> None:
        """As `decode`, some rows at a time."""
        n = info.matrix_shape[1]
        exponent = levels.read_exponent(extra, info)
        codes, table, scales = self._read(parts, info)
        kept = Outliers.of(parts, info)

        def values(rows: slice) -> Floats:
            if self.table == "row":
                found = np.take_along_axis(table[rows], codes[rows].astype(np.intp), axis=1)
            else:
                found = table[codes[rows]] * levels.spread(scales[rows], self.group, n)
            kept.put(found, rows)
            return found

        levels.fill(out, info, values, exponent)

    def tunable(self, one: Encoded) -> Tunable | None:
        """Codes, levels and scales; outliers stay."""
        exponent, fixed = levels.read_exponent(one.extra, one.info), None
        codes, table, scales = self._read(one.parts, one.info)
        if "outliers" in one.parts:
            places, kept = decode_outliers(one.parts["outliers"], one.info.size)
            fixed = levels.apart(places, kept, codes.shape, exponent)
        group = self.group if self.table == "tensor" else max(codes.shape[1], 1)
        learned = ["tables", "scales"] if self.table == "tensor" else ["tables"]
        return levels.tunable(codes, table, scales, group, exponent, learned, self.pack, fixed)

    def retuned(self, tunable: Tunable, one: Encoded) -> dict[str, bytes]:
        """Other codes and levels, and scales if there are any."""
        table = levels.halves(levels.half(tunable.terms[0].table))
        made = {"tables": table, "levels": table} | levels.retuned(
            tunable, one.extra, self.bits, self.pack
        )
        return {name: made.get(name, data) for name, data in one.parts.items()}

    def _read(
        self, parts: Mapping[str, bytes], info: TensorInfo
    ) -> tuple[levels.Codes, Floats, Floats]:
        """Codes, levels (k,) or (m, k), and scales: a one for each row that has a table."""
        m, n = info.matrix_shape
        count = 1 << self.bits
        scales: Floats = np.broadcast_to(np.float32(1), (m, 1))
        if self.table == "row":
            table = levels.read_half(parts["tables"], (m, count), info, "tables")
        else:
            table = levels.read_half(parts["levels"], (count,), info, "levels")
            groups = -(-n // self.group)
            scales = levels.read_half(parts["scales"], (m, groups), info, "scales")
        codes = levels.read_codes(parts["codes"], info, self.bits, self.pack, count)
        return codes, table, scales

    def _fit(self, columns: Floats, weights: Any, importance: Floats) -> Floats:
        """Levels (k,) or (k, m) of columns (n, m), given what errors cost (broadcastable to them)."""
        count = 1 << self.bits
        if self.table == "row":
            return levels.half(kmeans.row_levels(columns, weights, count))
        scales = kmeans.rms(columns, self.group)
        for _ in range(ROUNDS):
            table = levels.half(kmeans.scaled_levels(columns, weights, scales, self.group, count))
            scales = levels.search_scales(columns, importance, self.group, table)[0]
        return table

    def _worst(self, columns: Floats, weights: Floats, importance: Floats, table: Floats) -> Mask:
        """The share of weights (n, m) whose rounding costs most."""
        scales = np.ones((1, 1), np.float32)
        if self.table == "tensor":
            scales = levels.search_scales(columns, importance, self.group, table)[0]
            scales = np.repeat(scales, self.group, axis=0)[: len(columns)]
        error = levels.nearest(levels.scaled(columns, scales), table)[1] * scales - columns
        return worst(np.square(error) * weights, int(self.outliers * error.size))
