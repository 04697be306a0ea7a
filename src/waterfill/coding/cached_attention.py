"""Attention of few queries over a cache of which most is coded, without decoding it to memory.

What blocks hold is said by their kind (`waterfill.coding.cached_blocks`); most hold components, and a head's
key or value is ``mean + components @ rows``. Keys are coded as they are before their rotary position (Su et
al. 2021, arXiv 2104.09864): the kernel turns each by its place in the block, and the queries to where the
block begins. Values are summed as components and only the sum is multiplied. The softmax runs over chunks,
rescaled whenever a larger score comes (Milakov and Gimelshein 2018, arXiv 1805.02867).

The kernel takes rows of keys in whole bits as integers of 16 bits, and gives the same bits with every instruction
set and any number of threads; the numpy twin agrees to within that rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import native
from waterfill.coding.attention import MAX_WIDTH, NAMES
from waterfill.coding.cached_blocks import Blocks
from waterfill.types import Array, Floats, from_float32, to_float32

__all__ = ["CodedTokens", "ExactTokens", "attend_cache"]

I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]


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
    blocks : how they are coded
    segments : parts uint8 (batch, blocks, bytes) of some blocks each, blocks contiguous
    offsets : index of a block's first token, and int64 (batch or 1,): from there on, how much positions
        are ahead of indices; the first is `start`
    """

    start: int
    hidden: int
    blocks: Blocks
    segments: Sequence[Sequence[U8]]
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
        heads, _, e = coded[0].blocks.shape
        return heads, e
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
        if part.blocks.shape != (shared, d, e):
            raise ValueError("coded keys and values do not fit the queries")
        for segment in part.segments:
            for codes, n in zip(segment, part.blocks.nbytes, strict=True):
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
        (segment[0].shape[1], [(part.ctypes.data, part.strides[0]) for part in segment])
        for segment in tokens.segments
    ]
    offsets = [(start, rows.ctypes.data, len(rows)) for start, rows in tokens.offsets]
    return tokens.start, tokens.hidden, tokens.blocks.handle, runs, offsets


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
    parts = [np.concatenate(codes, 1) for codes in zip(*tokens.segments, strict=True)]
    keys, values = tokens.blocks.vectors(parts)
    turn = tokens.blocks.turn
    if turn is not None:
        index = np.arange(tokens.start, tokens.start + keys.shape[2])
        ahead = np.zeros((max(len(rows) for _, rows in tokens.offsets), len(index)), np.int64)
        for start, rows in tokens.offsets:
            ahead[:, start - tokens.start :] = rows[:, None]
        angles = (index + ahead)[:, None, :, None] * turn.frequencies
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        a, b = keys[..., turn.first], keys[..., turn.second]
        keys[..., turn.first], keys[..., turn.second] = (
            a * cos - b * sin,
            a * sin + b * cos,
        )
    seen = slice(tokens.hidden, None)
    return tokens.start + tokens.hidden, keys[:, :, seen], values[:, :, seen]
