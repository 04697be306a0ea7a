"""Weights that are a scale times one of a few numbers: nearest levels, scales, successive rounding.

What the codecs of floats, of powers and of codebooks share. Matrices are held as (columns, rows):
one column of weights, over all rows, lies together in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.coding.entropy import decode_ints, encode_ints
from waterfill.coding.outliers import brief
from waterfill.coding.packing import pack, unpack
from waterfill.coding.rounding import factor, successive
from waterfill.types import (
    Array,
    Floats,
    FormatError,
    TensorInfo,
    Term,
    Tunable,
    Weighting,
    from_float32,
)

Codes = NDArray[np.uint8]
ScaleOf = Callable[[int, Floats, Floats], Floats]
BLOCK_WEIGHTS = 1 << 16  # decoded at a time, in a near cache
SAMPLE_WEIGHTS = 1 << 15  # enough to choose between grids
CLIPS = np.linspace(0.35, 1.0, 9, dtype=np.float32)  # shares of the largest weight: 27 gain 0.5 %


def nearest(x: Floats, levels: Floats) -> tuple[Codes, Floats]:
    """Index and value of the nearest level, the lower of two alike.

    Parameters
    ----------
    x : float32 (..., m)
    levels : float32 (k,) ascending, k at most 256; or (k, m), a table for each row of the matrix
    """
    half = len(levels) // 2
    if levels.ndim == 1 and half and len(levels) % 2 and not (levels + levels[::-1]).any():
        size, value = nearest(np.abs(x), levels[half:])
        below = x < 0
        return np.where(below, half - size, half + size).astype(np.uint8), np.where(
            below, -value, value
        )
    index = np.zeros(x.shape, np.uint8)
    # Compares run many to an instruction: far ahead of a binary search for so few levels.
    for border in 0.5 * (levels[1:] + levels[:-1]):
        index += x > border
    if levels.ndim == 1:
        return index, levels[index]
    return index, levels[index, np.arange(levels.shape[1])]


def scaled(x: Floats, scale: Floats) -> Floats:
    """``x / scale``, and x itself where the scale is zero."""
    safe: Any = np.where(scale == 0, np.float32(1), scale)
    divided: Floats = x / safe
    return divided


def cost(target: Floats, importance: Floats, levels: Floats, scale: Floats) -> Floats:
    """Weighted squared error (m,) of rounding a group (columns, m) on these scales (m,)."""
    error = nearest(scaled(target, scale), levels)[1] * scale
    error -= target
    total: Floats = importance @ np.square(error, out=error)
    return total


def least(
    target: Floats, importance: Floats, levels: Floats, trials: Floats
) -> tuple[Floats, Floats]:
    """Of the scales (trials, m) for a group (columns, m) the best of each row, and its cost (m,)."""
    scale, lowest = trials[0], np.full(target.shape[1], np.inf, np.float32)
    for trial in trials:
        found = cost(target, importance, levels, trial)
        scale = np.where(found < lowest, trial, scale)
        lowest = np.minimum(found, lowest)
    return scale, lowest


def search_scale(
    target: Floats, importance: Floats, levels: Floats, clips: Floats = CLIPS
) -> tuple[Floats, Floats]:
    """The float16 scale (m,) of least weighted error of a group (columns, m), and that error (m,).

    Tried are clips at shares of the largest weight, then the least-squares scale of the best. Of
    levels that reach further to one side either sign of the scale is tried.
    """
    extreme = target[np.argmax(np.abs(target), axis=0), np.arange(target.shape[1])]
    ends = np.unique(levels[[0, -1]] if levels[0] != -levels[-1] else levels[-1:])
    full = extreme / np.where(ends == 0, 1, ends)[:, None]
    trials = half(clips[:, None, None] * full).reshape(clips.size * len(ends), len(extreme))
    scale, lowest = least(target, importance, levels, trials)
    value = nearest(scaled(target, scale), levels)[1]
    power = importance @ np.square(value)
    fitted = half((importance @ (target * value)) / np.where(power == 0, 1, power))
    found = cost(target, importance, levels, fitted)
    return np.where(found < lowest, fitted, scale), np.minimum(found, lowest)


def halves(x: Floats) -> bytes:
    """As float16, in the file's order."""
    return np.ascontiguousarray(x).astype("<f2").tobytes()


def half(x: Any) -> Floats:
    """Rounded to float16, never to infinity, nor to a negative zero."""
    rounded: Floats = np.clip(x, -65504, 65504).astype(np.float16).astype(np.float32)
    return rounded + np.float32(0)


def metric(n: int, weighting: Weighting, damping: float, solver: str) -> Floats:
    """Factor L of the weighting for `rounding.successive`; its diagonal alone for solver nearest."""
    moment = weighting.second_moment
    if moment is None or not n:
        return np.ones(n, np.float32)
    if solver == "nearest" and moment.ndim == 2:
        return factor(moment.diagonal(), damping)
    return factor(moment, damping)


def importances(lower: Floats) -> Floats:
    """What an error of each column costs once the others have taken over what they can: (n,)."""
    return np.square(lower if lower.ndim == 1 else lower.diagonal())


def round_groups(
    columns: Floats,
    lower: Floats,
    group: int,
    levels: Floats,
    scale_of: ScaleOf,
    exact: NDArray[np.bool_] | None = None,
) -> tuple[Codes, Floats, Floats]:
    """Round every column to levels times scales, each taking over the errors of those before.

    Parameters
    ----------
    columns : float32 (n, m)
    lower : float32 (n, n) or (n,), from `metric`
    group : columns that share a scale
    levels : float32 (k,) or (k, m), ascending
    scale_of : called with the group's first column, its target (columns, m) and importances (columns,);
        returns scales (m,)
    exact : bool (n, m), optional
        Weights that are kept beside the levels, as `outliers.brief` has them.

    Returns
    -------
    codes uint8 (n, m), scales float32 (ceil(n / group), m), and what it all stands for (n, m)
    """
    n, m = columns.shape
    codes = np.empty((n, m), np.uint8)
    values = np.empty((n, m), np.float32)
    scales = np.zeros((-(-n // group), m), np.float32)
    importance = importances(lower)

    def round_block(first: int, last: int, block: Floats, target: Floats, carry: Floats) -> Floats:
        scale = scales[first // group] = scale_of(first, target, importance[first:last])
        for j in range(last - first - 1, -1, -1):
            codes[first + j], value = nearest(scaled(target[j], scale), levels)
            value *= scale
            if exact is not None:
                value = np.where(exact[first + j], brief(target[j]), value)
            values[first + j] = value
            if lower.ndim == 2 and j:
                target[:j] += carry[j, :j, None] * (block[j] - value)
        return block - values[first:last]

    successive(columns, lower, round_block, block=group)
    return codes, scales, values


def sample(columns: Floats, weighting: Weighting) -> tuple[Floats, Floats]:
    """Rows spread evenly over (n, m), as (n, rows), and their weights: to choose a grid by."""
    n, m = columns.shape
    rows = np.linspace(0, m - 1, min(m, max(16, SAMPLE_WEIGHTS // max(n, 1)))).astype(np.int64)
    weights = np.broadcast_to(np.asarray(weighting.row_weights, np.float32), m)
    return np.ascontiguousarray(columns[:, rows]), weights[rows]


def search_scales(
    columns: Floats, importance: Floats, group: int, levels: Floats
) -> tuple[Floats, Floats]:
    """`search_scale` of every group of columns (n, m): scales and costs, (ceil(n / group), m) each."""
    found = [
        search_scale(columns[a : a + group], importance[a : a + group], levels)
        for a in range(0, len(columns), group)
    ]
    scales = np.array([scale for scale, _ in found], np.float32)
    costs = np.array([lowest for _, lowest in found], np.float32)
    shape = len(found), columns.shape[1]
    return scales.reshape(shape), costs.reshape(shape)


def best_table(
    columns: Floats, lower: Floats, weighting: Weighting, group: int, tables: Sequence[Floats]
) -> int:
    """Which of the tables of levels has the least weighted error on a sample of rows; the first of two alike."""
    if not columns.size or len(tables) == 1:
        return 0
    some, weights = sample(columns, weighting)
    importance = importances(lower)
    harms = [
        float((search_scales(some, importance, group, table)[1] @ weights).sum())
        for table in tables
    ]
    return int(np.argmin(harms))


def power_of_two(matrix: Floats) -> int:
    """Power of two that brings weights to where float16 is precise; 0 if they are there."""
    largest = float(np.max(np.abs(matrix), initial=0.0))
    return 0 if largest == 0 or 0.125 <= largest <= 4096 else 10 - math.frexp(largest)[1]


def read_exponent(extra: Any, info: TensorInfo) -> int:
    """The entry ``exponent`` of `extra`; FormatError on one that no writer wrote."""
    exponent = extra.get("exponent", 0)
    if type(exponent) is not int or abs(exponent) > 300:
        raise FormatError(f"{info.name}: the exponent of its scales is no small integer")
    return exponent


def read_half(data: bytes, shape: tuple[int, ...], info: TensorInfo, what: str) -> Floats:
    """Float16 numbers as float32; FormatError where they are too few, too many or not finite."""
    if len(data) != 2 * math.prod(shape):
        raise FormatError(f"{info.name}: {len(data)} bytes of {what}, not {2 * math.prod(shape)}")
    values = np.frombuffer(data, "<f2").reshape(shape).astype(np.float32)
    if not np.isfinite(values).all():
        raise FormatError(f"{info.name}: the {what} are not finite")
    return values


def write_codes(codes: Codes, bits: int, how: str) -> bytes:
    """Codes (m, n) in fields of so many bits (packed), or less half their range through rANS (coded)."""
    if how == "packed":
        return pack(codes, bits)
    return encode_ints(codes.astype(np.int32) - ((1 << (bits - 1)) - 1))


def read_codes(data: bytes, info: TensorInfo, bits: int, how: str, count: int) -> Codes:
    """Inverse of `write_codes`: uint8 (m, n), each below `count`."""
    m, n = info.matrix_shape
    if how == "packed":
        codes = unpack(data, m * n, bits).reshape(m, n)
    else:
        wide = decode_ints(data, m, n)
        wide += (1 << (bits - 1)) - 1
        if wide.size and not 0 <= wide.min() <= wide.max() <= 255:
            raise FormatError(f"{info.name}: a code of more than {bits} bits")
        codes = wide.astype(np.uint8)
    if codes.size and int(codes.max()) >= count:
        raise FormatError(f"{info.name}: a code beyond its {count} levels")
    return codes


def fill(
    out: Array,
    info: TensorInfo,
    values: Callable[[slice], Floats],
    exponent: int,
) -> None:
    """Write float32 rows times ``2**-exponent`` into an array as stored, some rows at a time.

    `values` makes the rows of a slice; they are scaled in place.
    """
    m, n = info.matrix_shape
    matrix = out.reshape(n, m).T if info.transposed else out.reshape(m, n)
    step = max(1, BLOCK_WEIGHTS // max(n, 1))
    for first in range(0, m, step):
        rows = slice(first, min(first + step, m))
        made = values(rows)
        with np.errstate(over="ignore", under="ignore"):
            if exponent:
                np.ldexp(made, -exponent, out=made)
            matrix[rows] = from_float32(made, info.dtype)


def spread(scales: Floats, group: int, n: int) -> Floats:
    """Scales (rows, groups) -> (rows, n)."""
    return np.repeat(scales, group, axis=1)[:, :n]


def floats(ebits: int, mbits: int) -> Floats:
    """Every float of these bits, ascending, the largest between one and two."""
    code = np.arange(1 << (ebits + mbits))
    octave, mantissa = code >> mbits, code & ((1 << mbits) - 1)
    # The lowest octave has no leading one, and the spacing of the next.
    whole = mantissa + np.where(octave > 0, 1 << mbits, 0)
    positive = np.ldexp(whole, np.maximum(octave, 1) - mbits - (1 << ebits) + 1)
    return np.concatenate([-positive[:0:-1], positive]).astype(np.float32)


def tunable(
    codes: Array,
    table: Floats,
    scales: Floats,
    group: int,
    exponent: int,
    learned: Sequence[str],
    how: str,
    fixed: Floats | None = None,
) -> Tunable | None:
    """Codes (m, n) of levels (k,), or (m, k) of a table for each row, on scales, for tuning.

    None where float32 cannot hold the scales times ``2**-exponent``.
    """
    with np.errstate(over="ignore", under="ignore"):
        whole = np.ldexp(scales, -exponent)
        if not codes.size or not np.array_equal(np.ldexp(whole, exponent), scales):
            return None
    books = table.reshape(-1, table.shape[-1], 1, 1)
    book = np.arange(len(books), dtype=np.int32)[:, None]
    term = Term(codes.astype(np.int32), books, book)
    columns = np.ones(codes.shape[1], np.float32)
    coded = how == "coded"
    return Tunable(codes.shape, (term,), whole, group, columns, frozenset(learned), fixed, coded)


def apart(places: Array, kept: Floats, shape: tuple[int, ...], exponent: int) -> Floats:
    """Outliers at these flat places as a matrix for `tunable`: NaN everywhere else."""
    fixed = np.full(shape, np.nan, np.float32)
    with np.errstate(over="ignore", under="ignore"):
        fixed.reshape(-1)[places] = np.ldexp(kept, -exponent)
    return fixed


def retuned_scales(tunable: Tunable, extra: Any) -> bytes:
    """Scales as float16, in the units of the file."""
    with np.errstate(over="ignore", under="ignore"):
        return halves(half(np.ldexp(tunable.scales, extra.get("exponent", 0))))


def retuned(tunable: Tunable, extra: Any, bits: int, how: str) -> dict[str, bytes]:
    """Parts ``codes``, as `write_codes` makes them, and ``scales``."""
    codes = write_codes(tunable.terms[0].codes.astype(np.uint8), bits, how)
    return {"codes": codes, "scales": retuned_scales(tunable, extra)}
