"""The Walsh-Hadamard transform of rows: spreads outliers over a block at n log n additions.

H is Sylvester's matrix: ``H(1) = [1]``, ``H(2n) = [[H, H], [H, -H]]``, over sqrt(n); symmetric and its own
inverse. With random signs D first, ``x -> H D x`` is the rotation of QuaRot (Ashkboos et al. 2024) and
of QuIP# (Tseng et al. 2024). Numbers are scaled, then added in one order, on every machine the same
bits.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import native
from waterfill.types import Array, Floats

MAX_BLOCK = 1 << 15

Signs = NDArray[np.int8]


def hadamard(
    x: Floats,
    block: int | None = None,
    signs: Signs | None = None,
    inverse: bool = False,
    out: Floats | None = None,
    threads: int | None = None,
) -> Floats:
    """Each block of each row transformed, orthonormally.

    Parameters
    ----------
    x : float32 (rows, n), contiguous
    block : int, optional
        A power of two from 2 to `MAX_BLOCK` that divides n; n itself where it is not given.
    signs : int8 (n,) of 1 and -1, optional
        Multiply the columns first; with `inverse`, last.
    inverse : bool
        Undo the transform with the same block and signs.
    out : float32 (rows, n), contiguous, optional
        Where to; may be `x`, and must not overlap it otherwise.
    threads : int, optional
        `waterfill.coding.native.threads` by default; the result is the same for any.

    Returns
    -------
    float32 (rows, n)
        `out`, where it is given.

    Raises
    ------
    ValueError
        On another shape, dtype or layout, a block that is no power of two or does not divide n, or
        signs other than 1 and -1.
    """
    _check("x", x, np.float32, 2)
    n = x.shape[1]
    block = _block(n, block)
    if out is None:
        out = np.empty_like(x)
    _check("out", out, np.float32, 2)
    if out.shape != x.shape or not out.flags.writeable:
        raise ValueError(f"out must be a writeable array of shape {x.shape}")
    if out.ctypes.data != x.ctypes.data and np.may_share_memory(x, out):
        raise ValueError("out must be x itself, or not overlap it")
    if signs is not None:
        _check("signs", signs, np.int8, 1)
        if signs.shape != (n,) or not (np.abs(signs) == 1).all():
            raise ValueError(f"signs must be {n} numbers that are 1 or -1")
    core = native.core()
    if core is None:
        _twin(x, block, signs, inverse, out)
    else:
        core.hadamard(x, out, block, signs, inverse, threads or native.threads())
    return out


def _check(name: str, array: Array, dtype: type, ndim: int) -> None:
    if array.dtype != dtype or array.ndim != ndim or not array.flags.c_contiguous:
        kind = np.dtype(dtype).name
        raise ValueError(f"{name} must be a contiguous {kind} array of {ndim} axes")


def _block(n: int, block: int | None) -> int:
    size = n if block is None else block
    if not 2 <= size <= MAX_BLOCK or size & (size - 1) or n % size:
        best = min(n & -n, MAX_BLOCK)
        hint = f"the largest that fits is {best}" if best > 1 else "none fits"
        raise ValueError(
            f"a block must be a power of two from 2 to {MAX_BLOCK} that divides the row; "
            f"of {size}, in rows of {n}, it is not: {hint}"
        )
    return size


def _twin(x: Floats, block: int, signs: Signs | None, inverse: bool, out: Floats) -> None:
    scaled = x * np.float32(1 / math.sqrt(block))
    if signs is not None and not inverse:
        scaled *= signs
    distance = 1
    with np.errstate(all="ignore"):
        while distance < block:
            pairs = scaled.reshape(-1, 2, distance)
            a, b = pairs[:, 0], pairs[:, 1]
            scaled = np.stack([a + b, a - b], axis=1)
            distance *= 2
    out[:] = scaled.reshape(x.shape)
    if signs is not None and inverse:
        out *= signs
