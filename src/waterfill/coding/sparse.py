"""A few weights apart from the others: where they are, through rANS, and what they are, in float16."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from waterfill.coding.entropy import decode_ints, encode_ints
from waterfill.coding.sections import join, split
from waterfill.types import Floats, FormatError, TensorInfo

__all__ = ["largest", "read", "write"]

Mask = NDArray[np.bool_]


def largest(costs: Floats, share: float) -> Mask:
    """The given share of the elements, rounded down: those of the greatest cost, of two alike the first."""
    count = int(share * costs.size)
    flat = costs.reshape(-1)
    chosen = np.zeros(flat.size, np.bool_)
    if count:
        border = np.partition(flat, flat.size - count)[flat.size - count]
        chosen[flat > border] = True
        alike = np.flatnonzero(flat == border)
        chosen[alike[: count - int(chosen.sum())]] = True
    return chosen.reshape(costs.shape)


def write(chosen: Mask, values: Floats) -> bytes:
    """The chosen of the values (m, n), as gaps between them in the order of rows, and float16."""
    places = np.flatnonzero(chosen)
    gaps = np.diff(places, prepend=-1) - 1
    return join([encode_ints(gaps[:, None], classes=None), values[chosen].astype("<f2").tobytes()])


def read(data: bytes, info: TensorInfo) -> tuple[NDArray[np.int64], Floats]:
    """Inverse of `write`: places in the matrix, ascending, and the values there."""
    coded, halves = split(data, 2)
    values = np.frombuffer(halves[: len(halves) // 2 * 2], "<f2").astype(np.float32)
    if len(halves) % 2 or values.size > info.size or not np.isfinite(values).all():
        raise FormatError(f"{info.name}: the outliers are of another tensor, or not finite")
    gaps = decode_ints(coded, values.size, 1).reshape(-1).astype(np.int64)
    places = np.cumsum(gaps + 1) - 1
    if gaps.size and (gaps.min() < 0 or places[-1] >= info.size):
        raise FormatError(f"{info.name}: an outlier lies outside the matrix")
    return places, values
