"""Attention of few queries over a cache of which most is coded, without decoding it to memory.

A head's key or value is ``mean + components @ rows``, a component being its code less
``2**(bits - 1) - 1/2``. Keys are coded as they are before their rotary position (Su et al. 2021, arXiv
2104.09864): the kernel turns each by its place in the block, and the queries to where the block begins.
Values are summed as components and only the sum is multiplied. The softmax runs over chunks,
rescaled whenever a larger score comes (Milakov and Gimelshein 2018, arXiv 1805.02867).

The kernel takes keys' rows as integers of 16 bits, and gives the same bits with every instruction
set and any number of threads; the numpy twin agrees to within that rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import native
from waterfill.coding.attention import MAX_WIDTH, NAMES
from waterfill.types import Array, Floats, from_float32, to_float32

__all__ = ["BLOCK", "CodedStream", "CodedTokens", "ExactTokens", "Turn", "attend_cache"]

BLOCK = 32  # tokens that are coded together
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class CodedStream:
    """How keys or values are coded.

    Attributes
    ----------
    kept : components of a head at most
    mean : float16 (heads, width)
    place : int32 (components,), head * kept + component of the head, of those that are coded
    rows, scale : int8 (components, width), float16 (components, 1): what a component is multiplied with
    groups : bits 1 to 8, and how many of the components, in order, have so many; their codes lie in this
        order, `BLOCK` of each, as fields of 8, 4, 2 and 1 bits that make up a code, highest first; byte j
        of a field of w bits has tokens j, j + 4 w, j + 8 w and so on, lowest bits first
    """

    kept: int
    mean: NDArray[np.float16]
    place: NDArray[np.int32]
    rows: NDArray[np.int8]
    scale: NDArray[np.float16]
    groups: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        width, n = self.mean.shape[1], len(self.place)
        shapes = (self.place.shape, self.rows.shape, self.scale.shape)
        if shapes != ((n,), (n, width), (n, 1)) or sum(k for _, k in self.groups) != n:
            raise ValueError(f"means {self.mean.shape} do not fit rows {self.rows.shape}")
        arrays = (self.mean, self.place, self.rows, self.scale)
        if [str(a.dtype) for a in arrays] != ["float16", "int32", "int8", "float16"]:
            raise ValueError("means and scales are float16, places int32, rows int8")
        if not all(a.flags.c_contiguous for a in arrays):
            raise ValueError("means, places, rows and scales are contiguous")
        if not 0 < self.kept <= width or any(not 1 <= bits <= 8 for bits, _ in self.groups):
            raise ValueError("codes have 1 to 8 bits, heads as many components as numbers at most")

    @property
    def block_nbytes(self) -> int:
        """Bytes of a block, of all heads."""
        return sum(bits * n * BLOCK // 8 for bits, n in self.groups)

    @functools.cached_property
    def raw(self) -> tuple[Any, ...]:
        """For the binding."""
        arrays = (self.mean, self.place, self.rows, self.scale)
        return self.kept, self.block_nbytes, *(a.ctypes.data for a in arrays), list(self.groups)


@dataclass(frozen=True, eq=False)
class Turn:
    """Pairs of columns that turn with the position.

    Attributes
    ----------
    first, second : int64 (pairs,)
    frequencies : float64 (pairs,), radians per token
    """

    first: I64
    second: I64
    frequencies: NDArray[np.float64]

    def __post_init__(self) -> None:
        arrays = (self.first, self.second, self.frequencies)
        if len({a.shape for a in arrays}) != 1 or not all(a.flags.c_contiguous for a in arrays):
            raise ValueError("columns and frequencies do not fit each other")
        if [str(a.dtype) for a in arrays] != ["int64", "int64", "float64"]:
            raise ValueError("columns are int64, frequencies float64")

    @functools.cached_property
    def raw(self) -> tuple[int, ...]:
        """For the binding."""
        arrays = (self.first, self.second, self.frequencies)
        return (len(self.first), *(a.ctypes.data for a in arrays))


@dataclass(frozen=True, eq=False)
class ExactTokens:
    """Tokens as they were.

    Attributes
    ----------
    start : index of the first
    keys, values : (batch, shared, tokens, d or e) of the queries' dtype, the last axis contiguous
    """

    start: int
    keys: Array
    values: Array


@dataclass(frozen=True, eq=False)
class CodedTokens:
    """Blocks of coded tokens.

    Attributes
    ----------
    start : index of the first token
    hidden : so many tokens of the first block, less than `BLOCK`, nobody sees
    keys, values : how they are coded
    turn : how keys turn; None: they do not
    segments : keys' and values' uint8 (batch, blocks, bytes), blocks contiguous
    offsets : index of a block's first token, and int64 (batch or 1,): from there on, how much positions
        are ahead of indices; the first is `start`
    """

    start: int
    hidden: int
    keys: CodedStream
    values: CodedStream
    turn: Turn | None
    segments: Sequence[tuple[U8, U8]]
    offsets: Sequence[tuple[int, I64]]


def attend_cache(
    q: Array,
    exact: Sequence[ExactTokens],
    coded: Sequence[CodedTokens],
    scale: float,
    mask: Array | None = None,
    first_masked: int = 0,
) -> Array:
    """``softmax(scale q k' + mask) v`` over all pieces, query heads sharing key heads in groups.

    Parameters
    ----------
    q : (batch, heads, queries, d) float32, float16, or uint16 of bfloat16 bits
    mask : broadcast to (batch, heads, queries, keys) over the keys from index `first_masked` on; bool,
        False where a key is hidden, or of the dtype of q, to be added. No piece lies on both sides of
        `first_masked`. A query that sees no key gives zeros

    Returns
    -------
    (batch, queries, heads, e) of the dtype of q

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit.
    """
    batch, heads, queries, d = q.shape
    shared, e = _heads_of(exact, coded)
    _check(q, exact, coded, shared, e)
    if mask is not None:
        if mask.dtype != np.bool_ and mask.dtype != q.dtype:
            raise ValueError(f"a mask is bool or {q.dtype}, not {mask.dtype}")
        mask = np.broadcast_to(mask, (batch, heads, queries, mask.shape[3]))
    core = native.core()
    if core is None:
        return _attend_numpy(q, exact, coded, scale, mask, first_masked)
    if q.strides[3] != q.itemsize:
        q = np.ascontiguousarray(q)
    out = np.empty((batch, queries, heads, e), q.dtype)
    if out.size:
        core.attend_cache(
            (batch, heads, shared, queries, d, e), NAMES[q.dtype], *_at(q),
            *((0, (0, 0, 0, 0)) if mask is None else _at(mask, unit=False)),
            mask is not None and mask.dtype == np.bool_, first_masked,
            0 if mask is None else mask.shape[3], scale,
            [(t.start, t.keys.shape[2], *_at(t.keys), *_at(t.values)) for t in exact],
            [_raw(t) for t in coded], out.ctypes.data, native.threads(),
        )  # fmt: skip
    return out


def _heads_of(exact: Sequence[ExactTokens], coded: Sequence[CodedTokens]) -> tuple[int, int]:
    """Key heads and a value's width."""
    if coded:
        return coded[0].values.mean.shape
    if not exact:
        raise ValueError("there is no key to attend to")
    return exact[0].values.shape[1], exact[0].values.shape[3]


def _check(
    q: Array, exact: Sequence[ExactTokens], coded: Sequence[CodedTokens], shared: int, e: int
) -> None:
    batch, heads, _, d = q.shape
    if q.dtype not in NAMES:
        raise ValueError(f"no attention of {q.dtype}")
    if not shared or heads % shared or not 0 < d <= MAX_WIDTH or not 0 < e <= MAX_WIDTH:
        raise ValueError(f"no attention of queries {q.shape} over {shared} heads, values of {e}")
    for piece in exact:
        shapes = [(batch, shared, piece.keys.shape[2], n) for n in (d, e)]
        if [piece.keys.shape, piece.values.shape] != shapes:
            raise ValueError(f"keys {piece.keys.shape} and values {piece.values.shape} do not fit")
        for a in (piece.keys, piece.values):
            if a.dtype != q.dtype or a.strides[3] != a.itemsize:
                raise ValueError(f"keys and values are {q.dtype}, the last axis contiguous")
    for part in coded:
        if part.keys.mean.shape != (shared, d) or part.values.mean.shape != (shared, e):
            raise ValueError("coded keys and values do not fit the queries")
        for segment in part.segments:
            for codes, stream in zip(segment, (part.keys, part.values), strict=True):
                n = stream.block_nbytes
                fits = codes.dtype == np.uint8 and codes.shape == (batch, segment[0].shape[1], n)
                if not fits or not codes[:1].flags.c_contiguous:
                    raise ValueError(f"codes {codes.shape} do not fit blocks of {n} bytes")


def _at(array: Array, unit: bool = True) -> tuple[int, tuple[int, ...]]:
    """Address, and strides in elements; the last is one, also where there is but one element."""
    strides = tuple(s // array.itemsize for s in array.strides)
    return array.ctypes.data, (*strides[:3], 1) if unit else strides


def _raw(tokens: CodedTokens) -> tuple[Any, ...]:
    """For the binding."""
    runs = [
        (k.ctypes.data, k.strides[0], v.ctypes.data, v.strides[0], k.shape[1])
        for k, v in tokens.segments
    ]
    offsets = [(start, rows.ctypes.data, len(rows)) for start, rows in tokens.offsets]
    turn = (0, 0, 0, 0) if tokens.turn is None else tokens.turn.raw
    return tokens.start, tokens.hidden, tokens.keys.raw, tokens.values.raw, turn, runs, offsets


def _floats(x: Array) -> Floats:
    return to_float32(x, NAMES[x.dtype])


def _attend_numpy(
    q: Array,
    exact: Sequence[ExactTokens],
    coded: Sequence[CodedTokens],
    scale: float,
    mask: Array | None,
    first_masked: int,
) -> Array:
    pieces = [(t.start, _floats(t.keys), _floats(t.values)) for t in exact]
    pieces += [_decoded(t) for t in coded]
    batch, heads, queries, d = q.shape
    shared, e = pieces[0][1].shape[1], pieces[0][2].shape[3]
    grouped = (_floats(q) * np.float32(scale)).reshape(batch, shared, -1, d)
    top = np.full((batch, heads, queries, 1), -np.inf, np.float32)
    total = np.zeros_like(top)
    sums = np.zeros((batch, heads, queries, e), np.float32)
    for start, keys, values in pieces:
        scores = (grouped @ keys.swapaxes(2, 3)).reshape(batch, heads, queries, -1)
        if mask is not None and start >= first_masked:
            part = mask[..., start - first_masked :][..., : keys.shape[2]]
            hides = mask.dtype == bool
            scores = np.where(part, scores, -np.inf) if hides else scores + _floats(part)
        new = np.maximum(top, scores.max(3, keepdims=True, initial=-np.inf))
        safe = np.where(np.isneginf(new), np.float32(0), new)
        weights, decay = np.exp(scores - safe), np.exp(top - safe)
        more = weights.reshape(batch, shared, -1, keys.shape[2]) @ values
        total = total * decay + weights.sum(3, keepdims=True)
        sums, top = sums * decay + more.reshape(sums.shape), new
    out: Floats = (sums / np.where(total == 0, np.float32(1), total)).astype(np.float32)
    return from_float32(out.swapaxes(1, 2), NAMES[q.dtype])


def _decoded(tokens: CodedTokens) -> tuple[int, Floats, Floats]:
    """Index of the first token that is seen, keys and values, float32 (batch, heads, tokens, width)."""
    parts = (np.concatenate(codes, 1) for codes in zip(*tokens.segments, strict=True))
    keys, values = (
        _vectors(c, s) for c, s in zip(parts, (tokens.keys, tokens.values), strict=True)
    )
    if tokens.turn is not None:
        index = np.arange(tokens.start, tokens.start + keys.shape[2])
        ahead = np.zeros((max(len(rows) for _, rows in tokens.offsets), len(index)), np.int64)
        for start, rows in tokens.offsets:
            ahead[:, start - tokens.start :] = rows[:, None]
        angles = (index + ahead)[:, None, :, None] * tokens.turn.frequencies
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        a, b = keys[..., tokens.turn.first], keys[..., tokens.turn.second]
        keys[..., tokens.turn.first], keys[..., tokens.turn.second] = (
            a * cos - b * sin,
            a * sin + b * cos,
        )
    seen = slice(tokens.hidden, None)
    return tokens.start + tokens.hidden, keys[:, :, seen], values[:, :, seen]


def _vectors(codes: U8, stream: CodedStream) -> Floats:
    """float32 (batch, heads, blocks * BLOCK, width)."""
    (heads, width), kept = stream.mean.shape, stream.kept
    batch, blocks, _ = codes.shape
    z, at, done = np.zeros((batch, blocks, heads * kept, BLOCK), np.float32), 0, 0
    for bits, n in stream.groups:
        nbytes = n * BLOCK * bits // 8
        part = codes[:, :, at : at + nbytes].reshape(batch, blocks, n, -1)
        place = stream.place[done : done + n]
        z[:, :, place] = _unpacked(part, bits) - np.float32(2 ** (bits - 1) - 0.5)
        at, done = at + nbytes, done + n
    ordered = z.reshape(batch, blocks, heads, kept, BLOCK).transpose(0, 2, 1, 4, 3)
    table = np.zeros((heads * kept, width), np.float32)
    table[stream.place] = stream.rows.astype(np.float32) * stream.scale.astype(np.float32)
    components = ordered.reshape(batch, heads, -1, kept)
    mean = stream.mean.astype(np.float32)
    out: Floats = components @ table.reshape(heads, kept, width) + mean[:, None]
    return out


def _unpacked(packed: U8, bits: int) -> NDArray[np.float32]:
    """Codes (..., BLOCK) of bytes (..., 4 * bits)."""
    out, at, left = np.zeros((*packed.shape[:-1], BLOCK), np.uint8), 0, bits
    for width in (8, 4, 2, 1):
        if left >= width:
            left -= width
            part = packed[..., at : at + 4 * width]
            shifted = [part >> (i * width) & ((1 << width) - 1) for i in range(8 // width)]
            out |= np.concatenate(shifted, -1) << left
            at += 4 * width
    return out.astype(np.float32)
