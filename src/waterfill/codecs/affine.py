"""A learned change of basis of the inputs, around any codec."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np

from waterfill.coding.affine import Transform, apply, congruent, learn, undo
from waterfill.coding.rounding import finite
from waterfill.registry import Codec, Inner, codec, make_codec
from waterfill.types import (
    Array,
    Floats,
    FormatError,
    Spec,
    SpecError,
    TensorInfo,
    WaterfillError,
    Weighting,
)

LEARNED_ROWS = 512
DAMPING = 0.01  # of the second moment that the transform is learned for, relative to its mean


@codec("affine", version=1)
class Affine(Codec):
    """``W = T B``: T by another codec, B block-diagonal, learned and stored.

    After AffineQuant (Ma et al. 2024), where ``A = B^-1`` is folded into the operation before the
    layer and must be as simple as that allows. Here B goes with the tensor, so every matrix can have
    one, nothing else changes, and its bytes count; and as B is what is stored, it is B that is kept
    strictly diagonally dominant. With blocks of one column it scales columns (AWQ, Lin et al. 2023).
    On layers of 128 to 704 rows blocks of four pay for their bytes at three bits (0.92 to 0.96 of the
    harm around `integer`), not at two (1.01 to 1.06); around 1 with blocks of one or eight.

    Attributes
    ----------
    inner : Inner
        A lossy codec, for T under the second moment ``B S B^T``.
    block : int
        1 to 64, columns to a block.
    """

    parts = ("transform",)  # and those of the codec inside

    inner: Inner = Inner("integer:bits=3")
    block: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.block <= 64:
            raise SpecError("affine: block is 1 to 64")
        inner = self.inner.codec
        if not inner.lossy or "transform" in inner.parts:
            raise SpecError("affine: inner is a codec that rounds, and no affine one")
        # As the codec inside has them: what is never written must not be counted in the header.
        object.__setattr__(self, "parts", ("transform", *inner.names))
        object.__setattr__(self, "shared", ("transform", *inner.shared))

    @classmethod
    def ladder(cls, info: TensorInfo) -> Iterator[Self]:
        """Around integers of two to six bits."""
        if info.worth_rounding:
            for bits in (2, 3, 4, 5, 6):
                yield cls(inner=Inner(f"integer:bits={bits}"))

    def encode(
        self, x: Array, info: TensorInfo, weighting: Weighting
    ) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Bits of `info.shape` -> parts of the codec inside, and ``transform`` where there is one."""
        matrix = finite(info.matrix(x), info.name)
        inner = self.inner.codec
        transform = self._learn(matrix, weighting) if matrix.any() else None
        own: dict[str, bytes] = {}
        if transform:
            own["transform"] = transform.to_bytes()
            matrix, weighting = _turned(matrix, weighting, transform.blocks(), info.name)
        parts, extra = inner.encode(matrix, _plain(info), weighting)
        return own | parts, {"version": inner.version, "inner": extra}

    def decode(
        self, parts: Mapping[str, bytes], extra: Mapping[str, Any], info: TensorInfo
    ) -> Array:
        """Inverse of `encode`, the same bits on every machine."""
        match extra:
            case {"version": int(version), "inner": dict(inner_extra)}:
                own = self.inner.codec.spec
                inner = make_codec(Spec(own.id, own.config, version))
            case _:
                raise FormatError(f"{info.name}: no version of the codec inside")
        plain = _plain(info)
        inside = {name: data for name, data in parts.items() if name != "transform"}
        values = plain.matrix(inner.decode(inside, inner_extra, plain))
        if "transform" in parts:
            transform = Transform.from_bytes(parts["transform"], values.shape[1], self.block)
            values = apply(values, transform.blocks())
        return info.unmatrix(values)

    def _learn(self, matrix: Floats, weighting: Weighting) -> Transform:
        n = matrix.shape[1]
        rows = _spread(len(matrix), LEARNED_ROWS)
        weights = np.broadcast_to(np.float32(weighting.row_weights), len(matrix))[rows]
        moment = weighting.second_moment
        if moment is None:
            moment = np.ones(n, np.float32)
        diagonal = moment if moment.ndim == 1 else moment.diagonal()
        level = np.float32(DAMPING * (float(diagonal.mean(dtype=np.float64)) or 1.0))
        damped = moment + (level if moment.ndim == 1 else level * np.eye(n, dtype=np.float32))
        scale = np.sqrt(weights / (weights.max() or 1)) / np.abs(matrix).max()
        return learn(matrix[rows] * scale[:, None], damped, self.block)


def _turned(
    matrix: Floats, weighting: Weighting, blocks: Floats, name: str
) -> tuple[Floats, Weighting]:
    """``W B^-1``, and what errors in it cost."""
    moment = congruent(weighting.second_moment, blocks, matrix.shape[1])
    turned = undo(matrix, blocks)
    if not (np.isfinite(turned).all() and np.isfinite(moment).all()):
        raise WaterfillError(f"{name}: a change of basis takes it out of float32's range")
    return turned, Weighting(moment, weighting.row_weights)


def _plain(info: TensorInfo) -> TensorInfo:
    """T as a tensor: float32 (m, n)."""
    return TensorInfo(info.name, info.matrix_shape, "F32", info.kind)


def _spread(count: int, most: int) -> Array:
    """Indices of so many rows at most, evenly spread."""
    return (
        np.linspace(0, count - 1, min(count, most)).astype(np.int64) if count else np.zeros(0, int)
    )
