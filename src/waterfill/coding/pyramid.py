"""Points of the pyramid ``{y in Z^d : sum |y_j| = K}``: counted, numbered, and the nearest one found.

Pyramid vector quantisation (Fischer 1986): a direction in d dimensions is a point with K unit
pulses, a direction needs no codebook, and its number takes ``log2 N(d, K)`` bits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.coding.wide import best_split, pack_digits, unpack_digits
from waterfill.types import Floats, FormatError, WaterfillError

__all__ = [
    "MAX_PULSES",
    "counts",
    "gain_exponents",
    "gains_of",
    "most_pulses",
    "nearest",
    "number",
    "pack",
    "point",
    "unpack",
]

MAX_PULSES = 1023
LARGEST, NONE = 126, -24  # octaves of the largest gain, and of what stands for none
CHUNK = 1 << 16  # points decoded at a time
Numbers = NDArray[np.uint64]
Points = NDArray[np.int32]


def most_pulses(length: int) -> int:
    """Most pulses, up to `MAX_PULSES`, for which every number of a point fits in 64 bits."""
    return len(_exact(length)[length]) - 1


@lru_cache(maxsize=64)
def _exact(length: int) -> tuple[tuple[int, ...], ...]:
    rows = [[1] + [0] * MAX_PULSES]
    for _ in range(length):
        above, row = rows[-1], [1]
        for k in range(1, MAX_PULSES + 1):
            row.append(above[k] + above[k - 1] + row[k - 1])
        rows.append(row)
    fits = sum(count < 2**64 for count in rows[-1])
    return tuple(tuple(row[:fits]) for row in rows)


@lru_cache(maxsize=64)
def counts(length: int) -> Numbers:
    """``N(l, k)``, how many points there are: uint64 (length + 1, most_pulses(length) + 1).

    ``N(l, k) = N(l-1, k) + N(l-1, k-1) + N(l, k-1)``, N(0, 0) = N(l, 0) = 1, N(0, k) = 0.
    """
    table: Numbers = np.array(_exact(length), np.uint64)
    table.flags.writeable = False
    return table


def number(points: Points) -> Numbers:
    """The number of each point in the pyramid that it lies on.

    The first coordinate counts most, in the order 0, 1, -1, 2, -2, ...

    Parameters
    ----------
    points : int32 (count, d)
        The sum of magnitudes of each is at most ``most_pulses(d)``.

    Returns
    -------
    uint64 (count,), each below ``counts(d)[d, sum of magnitudes]``
    """
    length = points.shape[1]
    table = counts(length)
    sums = np.cumsum(table, axis=1)
    left = np.abs(points).sum(axis=1)
    numbers = np.zeros(len(points), np.uint64)
    for j in range(length):
        below, total = table[length - j - 1], sums[length - j - 1]
        value = points[:, j]
        size = np.abs(value)
        # Points with a smaller first coordinate: those with 0, and twice each magnitude between.
        between = total[np.maximum(left - 1, 0)] - total[left - size]
        before = below[left] + (between << np.uint64(1))
        before += np.where(value < 0, below[left - size], np.uint64(0))
        numbers += np.where(size > 0, before, np.uint64(0))
        left = left - size
    return numbers


def point(numbers: Numbers, pulses: NDArray[np.int64], length: int) -> Points:
    """Inverse of `number`.

    Parameters
    ----------
    numbers : uint64 (count,)
    pulses : int64 (count,)
        Sum of magnitudes of each point, 0 to ``most_pulses(length)``.
    length : dimensions d

    Returns
    -------
    int32 (count, length)

    Raises
    ------
    FormatError
        Where there are fewer points than a number says.
    """
    table = counts(length)
    sums = np.cumsum(table, axis=1)
    if (numbers >= table[length, pulses]).any():
        raise FormatError("a number beyond the points of its pyramid")
    left, rest = pulses.astype(np.int64), numbers.copy()
    out = np.zeros((len(numbers), length), np.int32)
    for j in range(length):
        below, total = table[length - j - 1], sums[length - j - 1]
        some = np.flatnonzero(rest >= below[left])
        before, k = rest[some] - below[left[some]], left[some]
        # The largest magnitude a with 2 (total[k-1] - total[k-a]) <= before.
        most = total[k - 1]
        kept = np.searchsorted(total, most - (before >> np.uint64(1)))
        before -= (most - total[kept]) << np.uint64(1)
        negative = before >= below[kept]
        out[some, j] = np.where(negative, kept - k, k - kept)
        rest[some] = before - np.where(negative, below[kept], np.uint64(0))
        left[some] = kept
    return out


def gain_exponents(gains: NDArray[Any], per_octave: int) -> Points:
    """Nearest grid exponents, int32, of gains that are not negative; see `gains_of`."""
    mantissa, octave = np.frexp(gains)
    steps = np.rint((2 * mantissa - 1) * per_octave).astype(np.int32)
    exponents: Points = (octave - 1) * per_octave + steps
    small = gains < 2.0 ** (NONE + 1)
    return np.where(small, NONE * per_octave, np.minimum(exponents, LARGEST * per_octave))


def gains_of(exponents: Points, per_octave: int) -> Floats:
    """``(1 + r / p) 2^q`` of each exponent ``p q + r``, exact in float32; 0 of the lowest, ``p NONE``.

    Steps within an octave are equal: what a rounding of gains near one value wants, and no tables.

    Raises
    ------
    FormatError
        For an exponent below the lowest or beyond the largest.
    """
    least, most = exponents.min(initial=0), exponents.max(initial=0)
    if least < NONE * per_octave or most > LARGEST * per_octave:
        raise FormatError("a gain lies outside its grid")
    part = (exponents % per_octave).astype(np.float32) / np.float32(per_octave)
    gains: Floats = np.ldexp(np.float32(1) + part, exponents // per_octave)
    gains[exponents == NONE * per_octave] = 0
    return gains


def nearest(target: Floats, pulses: NDArray[np.int64], lower: Floats, step: Floats) -> Points:
    """A point near the target after weighting: rounded successively, then mended greedily.

    Parameters
    ----------
    target : float32 (d, m)
        A column for each vector.
    pulses : int64 (m,)
        Sum of magnitudes of each point.
    lower : float32 (d, d)
        The harm of an error e is ``||e L||^2``, L lower triangular.
    step : float32 (m,)
        Length of a pulse: near ``sum |target| / pulses``, positive; infinite where there is none.

    Returns
    -------
    int32 (d, m)

    Raises
    ------
    WaterfillError
        Where float32 cannot hold the pulses, or what pulls at them.
    """
    wanted = target / step
    carry = lower / lower.diagonal()
    aim, points = wanted.copy(), np.empty(target.shape, np.float32)
    for j in reversed(range(len(target))):
        points[j] = np.rint(np.clip(aim[j], -pulses, pulses))
        aim[:j] += carry[j, :j, None] * (wanted[j] - points[j])
    if not np.isfinite(points).all():
        raise WaterfillError("weights or inputs so unlike in size that float32 cannot hold both")
    _mend(points, (lower @ lower.T) @ (wanted - points), lower @ lower.T, pulses)
    return points.astype(np.int32)


def _mend(points: Floats, pull: Floats, gram: Floats, pulses: NDArray[np.int64]) -> None:
    """Add or take pulses, each time the one that costs least, until there are `pulses`.

    A pulse more in coordinate j costs ``G_jj - 2 |G e|_j`` where it points along the pull ``G e``.
    """
    excess = np.abs(points).sum(axis=0) - pulses
    off = np.flatnonzero(excess)
    diagonal = gram.diagonal()[:, None]
    while off.size:
        y, r = points[:, off], pull[:, off]
        sign, more = np.sign(y), excess[off] < 0
        way = np.where(more, np.where(sign == 0, np.where(r < 0, -1, 1), sign), -sign)
        best = np.where(way == 0, np.inf, diagonal - 2 * way * r).argmin(axis=0)
        moved = way[best, np.arange(off.size)].astype(np.float32)
        points[best, off] += moved
        pull[:, off] = r - gram[:, best] * moved
        excess[off] += np.where(more, 1, -1)
        off = off[excess[off] != 0]


def pack(points: Points, pulses: NDArray[np.int64]) -> bytes:
    """Points (count, d) -> their numbers; those of equal pulses together, fewest pulses first."""
    order = np.argsort(pulses, kind="stable")
    numbers = number(points[order])
    table = counts(points.shape[1])[-1]
    ends = np.cumsum(np.bincount(pulses, minlength=len(table)))
    out = []
    for k in np.flatnonzero(np.diff(ends, prepend=0)):
        own = numbers[ends[k - 1] if k else 0 : ends[k]]
        out.append(pack_digits(own, best_split(int(table[k]), len(own))))
    return b"".join(out)


def unpack(data: bytes | memoryview, pulses: NDArray[np.int64], length: int) -> Points:
    """Inverse of `pack`: int32 (count, length); FormatError on bytes that lie."""
    order = np.argsort(pulses, kind="stable")
    table = counts(length)[-1]
    sizes = np.bincount(pulses, minlength=len(table))
    classes = [(int(c), best_split(int(table[k]), int(c))) for k, c in enumerate(sizes) if c]
    if sum(split.nbytes(count) for count, split in classes) != len(data):
        raise FormatError(f"{len(data)} bytes of points, which is not what their pulses take")
    numbers = np.empty(len(pulses), np.uint64)
    at = done = 0
    for count, split in classes:
        part = data[at : at + split.nbytes(count)]
        numbers[done : done + count] = unpack_digits(part, count, split)
        at, done = at + len(part), done + count
    out = np.empty((len(pulses), length), np.int32)
    for first in range(0, len(pulses), CHUNK):
        own = order[first : first + CHUNK]
        out[own] = point(numbers[first : first + CHUNK], pulses[own], length)
    return out
