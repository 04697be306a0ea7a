"""Blocks of about one bit a weight, one on the other: a file that can be cut to any size."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import numpy as np

from waterfill.coding import planes
from waterfill.coding.rounding import finite
from waterfill.coding.scales import LIMIT, decode_grid, encode_grid, from_grid
from waterfill.coding.sections import join, split
from waterfill.registry import Codec, codec
from waterfill.types import (
    DTYPES,
    Array,
    Floats,
    FormatError,
    SpecError,
    TensorInfo,
    Weighting,
    from_float32,
)

GRID, MOST, MUCH = 2, 16, 1e300  # column scales to the octave; blocks; nats beyond counting


@codec("stack", version=1)
class Stack(Codec):
    """Signs times low-rank magnitudes, again and again: cut it anywhere, and the rest decodes.

    BitStack (Wang et al. 2024): with columns scaled by the root mean square of their inputs, a block
    is ``sign(R)``, one bit a weight, and ``|R|`` as a product of `rank`; what it leaves is the next
    block's R. Two departures, both for less harm in the same bytes (docs/format/stack.md has
    figures): signs are chosen for the harm itself, by coordinate descent, and factors are integers.

    Attributes
    ----------
    blocks : float
        How many; of the last one a fraction of the rows. The planner's continuous knob.
    rank : int
        Of the magnitudes: each rank costs `precision` bits for each row and column and block.
    precision : int
        Bits of a number in the factors, 8 or 16.
    sweeps : int
        Of coordinate descent over the signs of a block; 0 keeps the signs of the residual.
    """

    parts = ("columns", *(f"layer{b}" for b in range(1, MOST + 1)))
    shared: ClassVar[tuple[str, ...]] = ("columns",)
    blocks: float = 4.0
    rank: int = 1
    precision: int = 8
    sweeps: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.blocks <= MOST or not 1 <= self.rank <= 64 or not 0 <= self.sweeps <= 64:
            raise SpecError(f"stack: blocks is up to {MOST}, rank 1 to 64, sweeps 0 to 64")
        if self.precision not in (8, 16):
            raise SpecError("stack: precision is 8 or 16")

    @classmethod
    def ladder(cls, info: TensorInfo) -> Iterator[Self]:
        """One block to eight."""
        if info.worth_rounding:
            yield from (cls().at(count) for count in (1, 2, 3, 4, 5, 6, 8))

    def between(self, other: Self, t: float) -> Self:
        """A part of the rows of a block more."""
        return self.at(self.blocks + t * (other.blocks - self.blocks))

    def at(self, count: float) -> Self:
        """With so many blocks."""
        return dataclasses.replace(self, blocks=float(f"{count:.6g}"))

    @property
    def names(self) -> tuple[str, ...]:
        """Parts of as many blocks as there are."""
        return self.parts[: 1 + math.ceil(self.blocks)]

    def encode(
        self, x: Array, info: TensorInfo, weighting: Weighting
    ) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Bits of `info.shape` -> part ``columns`` and a part for each block; the harm after each."""
        matrix = finite(info.matrix(x), info.name)
        m, n = matrix.shape
        nats = [weighting.distortion(matrix, np.broadcast_to(np.float32(0), matrix.shape))]
        if not matrix.size:
            return {"columns": join([b"", b""])}, {"nats": nats}
        grid, moment = planes.input_grid(n, weighting, GRID)
        scale = from_grid(grid, GRID)
        residual = np.ascontiguousarray(matrix.T) / scale[:, None]
        exponents = planes.row_exponents(residual)
        residual = np.ldexp(residual, -exponents)
        weights = np.ldexp(np.float32(weighting.row_weights), 2 * (exponents - exponents.max()))
        rights, parts = [], {"columns": b""}
        for name, rows in zip(self.names[1:], self._rows(m), strict=True):
            right, records, plane = self._block(residual, weights, moment)
            if name == "layer1":
                records = np.c_[exponents.astype(np.int8).view(np.uint8), records]
            rights.append(right)
            parts[name] = records[:rows].tobytes()
            residual[:, :rows] -= plane[:, :rows]
            left = np.ldexp(residual * scale[:, None], exponents).T
            nats.append(weighting.distortion(left, np.broadcast_to(np.float32(0), left.shape)))
        parts["columns"] = join([encode_grid(grid), b"".join(rights)])
        nats = np.nan_to_num(nats, nan=MUCH, posinf=MUCH).tolist()
        return parts, {"nats": [float(f"{x:.4g}") for x in nats]}

    def _rows(self, m: int) -> list[int]:
        """Rows of each block: all, but for the last one."""
        whole = math.ceil(self.blocks)
        return [*[m] * (whole - 1), max(1, round((self.blocks - whole + 1) * m))]

    def _block(
        self, residual: Floats, weights: Floats, moment: Floats | None
    ) -> tuple[bytes, Array, Floats]:
        """Right factor, records of the rows, and the plane (n, m) that they stand for."""
        factor = planes.right_factor(residual, weights, self.rank)
        whole, unit = planes.quantise(factor, self.precision)
        signs, left = planes.fit(residual, whole * unit[:, None], moment, self.sweeps)
        left, left_unit = (a.T for a in planes.quantise(left.T, self.precision))
        unit = (unit * left_unit).astype("<f4")
        packed = np.packbits(signs.T, axis=1, bitorder="little")
        magnitude = (unit[:, None] * whole).T @ left.T
        records = np.concatenate([self._bytes(left), packed], axis=1)
        right = unit.tobytes() + self._bytes(whole).tobytes()
        return right, records, np.where(signs, magnitude, -magnitude)

    def _bytes(self, whole: Floats) -> Array:
        return np.ascontiguousarray(whole, self._dtype).view(np.uint8)

    def decode(
        self, parts: Mapping[str, bytes], extra: Mapping[str, Any], info: TensorInfo
    ) -> Array:
        """Inverse of `encode`, of as many blocks and rows as there are."""
        out = np.empty(info.shape, DTYPES[info.dtype])
        self.decode_into(parts, extra, info, out)
        return out

    def decode_into(
        self, parts: Mapping[str, bytes], extra: Mapping[str, Any], info: TensorInfo, out: Array
    ) -> None:
        """As `decode`, some rows at a time."""
        m, n = info.matrix_shape
        layers, exponents = self._layers(parts, info)
        grid, factors = split(parts["columns"], 2)
        if len(factors) != len(layers) * self._right_nbytes(n):
            raise FormatError(f"{len(factors)} bytes of factors for {len(layers)} blocks")
        scale = from_grid(decode_grid(grid, n, LIMIT * GRID), GRID)
        rights = [self._right(factors, b, n, scale) for b in range(len(layers))]
        matrix = out.reshape(n, m).T if info.transposed else out.reshape(m, n)
        step = max(1, (1 << 18) // max(n, 1))
        for first in range(0, m, step):
            rows = slice(first, min(first + step, m))
            values = np.zeros((rows.stop - first, n), np.float32)
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                for right, layer in zip(rights, layers, strict=True):
                    values[: len(layer[rows])] += self._plane(layer[rows], right)
                values = np.ldexp(values, exponents[rows, None])
                matrix[rows] = from_float32(values, info.dtype)

    def _layers(self, parts: Mapping[str, bytes], info: TensorInfo) -> tuple[list[Array], Array]:
        """Records of each block, uint8 (rows, bytes of a record), and exponents of all rows."""
        m, n = info.matrix_shape
        layers: list[Array] = []
        for name in itertools.takewhile(parts.__contains__, self.names[1:]):
            record = self._record_nbytes(n, len(layers))
            rows, over = divmod(len(parts[name]), record)
            if over or not 0 < rows <= m or any(len(layer) < m for layer in layers):
                raise FormatError(f"{name} is not rows of this tensor on whole blocks")
            layers.append(np.frombuffer(parts[name], np.uint8).reshape(rows, record))
        if len(parts) != 1 + len(layers):
            raise FormatError("a block is missing below another, or there are too many")
        exponents = np.zeros(m, np.int32)
        for first in layers[:1]:
            exponents[: len(first)] = first[:, 0].view(np.int8)
            layers[0] = first[:, 1:]
        return layers, exponents

    def _right(self, factors: bytes, block: int, n: int, scale: Floats) -> Floats:
        """Right factor (rank, n) of a block, in units of the left one's integers."""
        at = block * self._right_nbytes(n)
        unit = np.frombuffer(factors, "<f4", self.rank, at)
        if not np.isfinite(unit).all():
            raise FormatError("a unit of the factors is not finite")
        numbers = np.frombuffer(factors, self._dtype, self.rank * n, at + 4 * self.rank)
        return unit[:, None] * numbers.reshape(self.rank, n).astype(np.float32) * scale

    def _plane(self, records: Array, right: Floats) -> Floats:
        width = self.rank * self.precision // 8
        left = np.ascontiguousarray(records[:, :width]).view(self._dtype)
        return planes.plane(left.astype(np.float32), right, records[:, width:])

    @property
    def _dtype(self) -> str:
        """Of the numbers in the factors."""
        return f"<i{self.precision // 8}"

    def _right_nbytes(self, n: int) -> int:
        return self.rank * (4 + n * self.precision // 8)

    def _record_nbytes(self, n: int, block: int) -> int:
        return (block == 0) + self.rank * self.precision // 8 + -(-n // 8)

    def _blocks(self, sizes: Mapping[str, int], n: int) -> tuple[int, list[tuple[str, int, int]]]:
        """Bytes without any block; of each that is there its name, bytes of a record, and rows."""
        found = []
        for b, name in enumerate(itertools.takewhile(sizes.__contains__, self.names[1:])):
            found.append((name, record := self._record_nbytes(n, b), sizes[name] // record))
        return sizes["columns"] - len(found) * self._right_nbytes(n), found

    def layers(
        self, sizes: Mapping[str, int], extra: Mapping[str, Any], info: TensorInfo
    ) -> list[tuple[int, float]]:
        """Bytes and nats without any block, then with each one more."""
        m, n = info.matrix_shape
        nbytes, blocks = self._blocks(sizes, n)
        told = extra["nats"] if isinstance(extra.get("nats"), list) else []
        nats = [x for x in told if type(x) in (int, float) and abs(x) <= MUCH]
        if len(nats) <= len(blocks) or nbytes < 0:
            raise FormatError(f"{info.name}: its blocks are not as its index says")
        found = [(nbytes, float(nats[0]))]
        for b, (name, _, rows) in enumerate(blocks):
            nbytes += self._right_nbytes(n) + sizes[name]
            share = rows / max(self._rows(m)[b], 1)
            found.append((nbytes, nats[b] + share * (nats[b + 1] - nats[b])))
        return found

    def truncate(
        self, sizes: Mapping[str, int], extra: Mapping[str, Any], info: TensorInfo, nbytes: int
    ) -> dict[str, int]:
        """Whole blocks while they fit, then rows of the next."""
        right = self._right_nbytes(info.matrix_shape[1])
        columns, blocks = self._blocks(sizes, info.matrix_shape[1])
        kept = {"columns": columns}
        for name, record, rows in blocks:
            fit_rows = (nbytes - sum(kept.values()) - right) // record
            if fit_rows <= 0:
                break
            kept["columns"] += right
            kept[name] = min(rows, fit_rows) * record
            if fit_rows < rows:
                break
        return kept
