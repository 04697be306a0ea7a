"""Attention of few queries over many keys, and root-mean-square norms: a token's work beside its weights.

Numbers are float32, float16, or bfloat16 as uint16 of its bits; arithmetic is in float32. The kernels
give the same bits with every instruction set and any number of threads; the numpy twins agree to
within the rounding of float32 sums.
"""

from __future__ import annotations

import numpy as np

from waterfill.coding import native
from waterfill.types import Array, Floats, from_float32, to_float32

__all__ = ["MAX_WIDTH", "attend", "rms_norm"]

MAX_WIDTH = 512
NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.uint16): "BF16"}


def attend(q: Array, k: Array, v: Array, scale: float, mask: Array | None = None) -> Array:
    """``softmax(scale q k^T + mask) v``, query heads sharing key heads in consecutive groups.

    Parameters
    ----------
    q : (batch, heads, queries, d) float32, float16, or uint16 of bfloat16 bits
    k : (batch, shared, keys, d) of the same dtype; `heads` is a multiple of `shared`
    v : (batch, shared, keys, e) of the same dtype; d and e at most `MAX_WIDTH`
    scale : multiplies the products first
    mask : broadcast to (batch, heads, queries, keys); bool, False where a key is hidden, or of the
        dtype of q, to be added. A query that sees no key gives zeros

    Returns
    -------
    (batch, queries, heads, e) of the dtype of q

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit.
    """
    batch, heads, queries, d = q.shape
    shared, keys, e = k.shape[1], k.shape[2], v.shape[3]
    if k.shape != (batch, shared, keys, d) or v.shape != (batch, shared, keys, e):
        raise ValueError(f"keys {k.shape} and values {v.shape} do not fit queries {q.shape}")
    if q.dtype not in NAMES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"no attention of {q.dtype}, {k.dtype} and {v.dtype}")
    if not shared or heads % shared or not keys or not 0 < d <= MAX_WIDTH or e > MAX_WIDTH:
        raise ValueError(f"no attention of queries {q.shape} over keys {k.shape}, values {v.shape}")
    if mask is not None:
        if mask.dtype != np.bool_ and mask.dtype != q.dtype:
            raise ValueError(f"a mask is bool or {q.dtype}, not {mask.dtype}")
        mask = np.broadcast_to(mask, (batch, heads, queries, keys))
    core = native.core()
    if core is None:
        return _attend_numpy(q, k, v, scale, mask)
    q, k, v = (a if a.strides[3] == a.itemsize else np.ascontiguousarray(a) for a in (q, k, v))
    out = np.empty((batch, queries, heads, e), q.dtype)
    if out.size:
        core.attend(
            (batch, heads, shared, queries, keys, d, e), NAMES[q.dtype], *_at(q), *_at(k), *_at(v),
            *((0, (0, 0, 0, 0)) if mask is None else _at(mask, unit=False)),
            mask is not None and mask.dtype == np.bool_, scale, out.ctypes.data, native.threads(),
        )  # fmt: skip
    return out


def rms_norm(
    x: Array, weight: Array, epsilon: float, offset: float = 0.0, rounds_first: bool = False
) -> Array:
    """``x / sqrt(mean(x^2) + epsilon) * (offset + weight)`` over the last axis.

    Parameters
    ----------
    x : (..., n) float32, float16, or uint16 of bfloat16 bits
    weight : (n,) of the same dtype
    offset : 1 where weights are stored as differences from one
    rounds_first : to the dtype, before the product with the weight; the product is rounded in any case

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit.
    """
    if x.dtype not in NAMES or weight.dtype != x.dtype or x.shape[-1:] != weight.shape:
        raise ValueError(f"no norm of {x.dtype} {x.shape} by {weight.dtype} {weight.shape}")
    core = native.core()
    if core is None:
        return _norm_numpy(x, weight, epsilon, offset, rounds_first)
    x, weight = np.ascontiguousarray(x), np.ascontiguousarray(weight)
    y = np.empty_like(x)
    if x.size:
        core.rms_norm(
            x.ctypes.data, weight.ctypes.data, y.ctypes.data, x.size // len(weight), len(weight),
            NAMES[x.dtype], epsilon, offset, rounds_first, native.threads(),
        )  # fmt: skip
    return y


def _at(array: Array, unit: bool = True) -> tuple[int, tuple[int, ...]]:
    """Address, and strides in elements; the last is one, also where there is but one element."""
    strides = tuple(s // array.itemsize for s in array.strides)
    return array.ctypes.data, (*strides[:3], 1) if unit else strides


def _floats(x: Array) -> Floats:
    return to_float32(x, NAMES[x.dtype])


def _attend_numpy(q: Array, k: Array, v: Array, scale: float, mask: Array | None) -> Array:
    batch, heads, queries, d = q.shape
    shared, keys = k.shape[1:3]
    grouped = _floats(q).reshape(batch, shared, -1, d)
    scores = (grouped @ _floats(k).swapaxes(2, 3)).reshape(batch, heads, queries, keys)
    scores = scores * np.float32(scale)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + _floats(mask)
    greatest = scores.max(3, keepdims=True)
    weights = np.exp(scores - np.where(np.isneginf(greatest), 0, greatest)).astype(np.float32)
    total = weights.sum(3, keepdims=True)
    sums = (weights.reshape(batch, shared, -1, keys) @ _floats(v)).reshape(*q.shape[:3], -1)
    out = sums / np.where(total == 0, np.float32(1), total)
    return from_float32(out.swapaxes(1, 2), NAMES[q.dtype])


def _norm_numpy(x: Array, weight: Array, epsilon: float, offset: float, first: bool) -> Array:
    values = _floats(x)
    mean: Floats = np.mean(values * values, axis=-1, keepdims=True, dtype=np.float32)
    normal: Floats = values * (1 / np.sqrt(mean + np.float32(epsilon)))
    if first:
        normal = _floats(from_float32(normal, NAMES[x.dtype]))
    return from_float32(normal * (np.float32(offset) + _floats(weight)), NAMES[x.dtype])
