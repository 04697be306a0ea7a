"""Few weights kept beside a grid: which ones, and how they go in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import gamma
from waterfill.coding.entropy import decode_bytes, decode_ints, encode_bytes, encode_ints
from waterfill.coding.packing import pack, unpack
from waterfill.coding.sections import join, split
from waterfill.types import Array, Floats, FormatError, TensorInfo

MODELLED = (
    3  # bits of a distance that have a model, above the mean; those below are as good as noise
)
LARGEST = np.float32(65280)  # of eight significant bits, in float16


def brief(values: Floats) -> Floats:
    """Values rounded to eight significant bits, as bfloat16 has, where float16 holds them."""
    bits = np.clip(values, -LARGEST, LARGEST).astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32).astype(np.float16).astype(np.float32)


def worst(scores: Floats, count: int) -> NDArray[np.bool_]:
    """Mask of so many of the largest scores, of those above 0; ties go to the first."""
    flat = scores.reshape(-1)
    if not count:
        return np.zeros(scores.shape, np.bool_)
    least = np.partition(flat, -count)[-count]
    kept: NDArray[np.bool_] = flat > least
    kept[np.flatnonzero(flat == least)[: count - int(kept.sum())]] = True
    kept &= flat > 0
    return kept.reshape(scores.shape)


def encode_outliers(matrix: Floats, kept: Array) -> bytes:
    """Places and float16 values of the kept weights of a matrix (m, n) -> bytes."""
    places = np.flatnonzero(kept)
    gaps = np.diff(places, prepend=-1) - 1
    low = _low_bits(kept.size, places.size)
    planes = matrix.reshape(-1)[places].astype("<f2").view(np.uint8).reshape(-1, 2)
    return join(
        [
            gamma.varint(places.size),
            encode_ints((gaps >> low).reshape(-1, 1), classes=None),
            pack((gaps & ((1 << low) - 1)).astype(np.uint8), low) if low else b"",
            encode_bytes(planes[:, 1]),
            encode_bytes(planes[:, 0]),
        ]
    )


def decode_outliers(data: bytes, size: int) -> tuple[NDArray[np.int64], Floats]:
    """Inverse of `encode_outliers` for a matrix of so many weights: places in order, and values.

    Raises
    ------
    FormatError
        Where a place lies outside the matrix, a value is not finite, or the bytes are damaged.
    """
    head, high, low, first, second = split(data, 5)
    count, end = gamma.read_varint(np.frombuffer(head, np.uint8), 0)
    if end != len(head) or count > size:
        raise FormatError(f"{count} outliers among {size} weights")
    width = _low_bits(size, count)
    if not width and low:
        raise FormatError("bytes where distances have no low bits")
    gaps = decode_ints(high, count, 1).reshape(-1).astype(np.int64) << width
    if width:
        gaps |= unpack(low, count, width)
    if gaps.min(initial=0) < 0:
        raise FormatError("a negative distance between outliers")
    places = np.cumsum(gaps + 1) - 1
    planes = np.stack([decode_bytes(second, count), decode_bytes(first, count)], axis=1)
    values = planes.view("<f2").reshape(-1).astype(np.float32)
    if not np.isfinite(values).all():
        raise FormatError("an outlier is not finite")
    # Sums of distances may wrap around, but not without a step back.
    if count and (places[-1] >= size or gaps.max() >= size):
        raise FormatError("an outlier lies outside the matrix")
    return places, values


@dataclass(frozen=True, eq=False)
class Outliers:
    """Weights that replace those of a grid.

    Attributes
    ----------
    places : int64 (count,) ascending, in the matrix row by row
    values : float32 (count,)
    """

    places: NDArray[np.int64]
    values: Floats

    @classmethod
    def of(cls, parts: Mapping[str, bytes], info: TensorInfo) -> Self:
        """Those of the part ``outliers`` of a tensor; none where there is no such part."""
        if "outliers" not in parts:
            return cls(np.zeros(0, np.int64), np.zeros(0, np.float32))
        return cls(*decode_outliers(parts["outliers"], info.size))

    def put(self, matrix: Floats, rows: slice) -> None:
        """Replace what they replace in these rows of the matrix, (rows, n)."""
        first, last = (row * matrix.shape[1] for row in (rows.start, rows.stop))
        some = slice(*np.searchsorted(self.places, (first, last)))
        matrix.reshape(-1)[self.places[some] - first] = self.values[some]


def _low_bits(size: int, count: int) -> int:
    """Bits of each distance that are stored as they are."""
    mean = size // max(count, 1)
    return min(max(mean.bit_length() - 1 - MODELLED, 0), 8)
