"""A learned change of basis of the inputs, around any codec."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Self

import numpy as np

from waterfill.coding.affine import Transform, apply, congruent, learn, undo
from waterfill.coding.rounding import finite
from waterfill.registry import Codec, Inner, codec, make_codec
from waterfill.types import (
    FLOAT_DTYPES,
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
TRIED_ROWS = 128
DAMPING = 0.01  # of the second moment that the transform is learned for, relative to its mean


@codec("affine", version=1)
class Affine(Codec):
    """``W = T B``: T by another codec, B block-diagonal, learned and stored.

    After AffineQuant (Ma et al. 2024), where ``A = B^-1`` is folded into the operation before the
    layer and must be as simple as that allows. Here B goes with the tensor, so every matrix can have
    one, nothing else changes, and its bytes count; and as B is what is stored, it is B that is kept
    strictly diagonally dominant. With blocks of one column it scales columns (AWQ, Lin et al. 2023).
    Where B does not pay for itself on a sample of the rows, it is left out.

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
        object.__setattr__(self, "parts", ("transform", *inner.parts))
        object.__setattr__(self, "shared", ("transform", *inner.shared))

    @classmethod
    def ladder(cls, info: TensorInfo) -> Iterator[Self]:
        """Around integers of two to six bits."""
        if info.dtype in FLOAT_DTYPES and len(info.shape) >= 2 and info.size >= 256:
            for bits in (2, 3, 4, 5, 6):
                yield cls(inner=Inner(f"integer:bits={bits}"))

    def encode(
        self, x: Array, info: TensorInfo, weighting: Weighting
    ) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Bits of `info.shape` -> parts of the codec inside, and ``transform`` where there is one."""
        matrix = finite(info.matrix(x), info.name)
        inner = self.inner.codec
        transform = self._learn(matrix, weighting) if matrix.any() else None
        if transform and not self._pays(transform, matrix, info, weighting):
            transform = None
        parts, extra = _inside(inner, matrix, info, weighting, transform)
        if transform:
            parts["transform"] = transform.to_bytes()
        return parts, {"version": inner.version, "inner": extra}

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
        values = plain.matrix(inner.decode(parts, inner_extra, plain))
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

    def _pays(
        self, transform: Transform, matrix: Floats, info: TensorInfo, weighting: Weighting
    ) -> bool:
        """Whether it saves more on some rows than its bytes would: 6.02 dB to a bit a weight."""
        rows = _spread(len(matrix), TRIED_ROWS)
        weights = weighting.row_weights
        some = Weighting(
            weighting.second_moment, weights if isinstance(weights, float) else weights[rows]
        )
        sample, sampled = matrix[rows], replace(_plain(info), shape=(len(rows), matrix.shape[1]))
        bits, nats = [], []
        for trial in (None, transform):
            parts, extra = _inside(self.inner.codec, sample, sampled, some, trial)
            values = sampled.matrix(self.inner.codec.decode(parts, extra, sampled))
            if trial:
                values = apply(values, trial.blocks())
            nats.append(some.distortion(sample, values))
            bits.append(8 * sum(map(len, parts.values())) / sample.size)
        bits[1] += 8 * len(transform.to_bytes()) / matrix.size
        return 0 < nats[1] * 4 ** (bits[1] - bits[0]) < nats[0]


def _inside(
    inner: Codec,
    matrix: Floats,
    info: TensorInfo,
    weighting: Weighting,
    transform: Transform | None,
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """What the codec inside makes of ``W B^-1``."""
    if transform:
        blocks = transform.blocks()
        moment = congruent(weighting.second_moment, blocks, matrix.shape[1])
        matrix = undo(matrix, blocks)
        if not (np.isfinite(matrix).all() and np.isfinite(moment).all()):
            raise WaterfillError(f"{info.name}: a change of basis takes it out of float32's range")
        weighting = Weighting(moment, weighting.row_weights)
    return inner.encode(matrix, _plain(info), weighting)


def _plain(info: TensorInfo) -> TensorInfo:
    """T as a tensor: float32 (m, n)."""
    return TensorInfo(info.name, info.matrix_shape, "F32", info.kind)


def _spread(count: int, most: int) -> Array:
    """Indices of so many rows at most, evenly spread."""
    return (
        np.linspace(0, count - 1, min(count, most)).astype(np.int64) if count else np.zeros(0, int)
    )
