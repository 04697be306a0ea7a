"""Rows of keys and values on their way to a file and back: dtypes, and the rotation of keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import native
from waterfill.types import Array, Floats, from_float32, to_float32

__all__ = ["UNTURNED", "Turn", "read_rows", "turn_of", "write_rows"]

F64 = NDArray[np.float64]
NONE = np.zeros(0, np.int32)
FEW = 64  # consecutive positions that share a base
NEAR = 1 << 13  # doubles that stay in the nearest caches


@dataclass(frozen=True, eq=False)
class Turn:
    """A rotation of some tokens' keys.

    Attributes
    ----------
    first, second : int32 (pairs,), dimensions that turn together
    cos, sin : float32 (batch or 1, tokens, pairs); None: nothing turns
    """

    first: NDArray[np.int32]
    second: NDArray[np.int32]
    cos: Floats | None
    sin: Floats | None

    @property
    def back(self) -> Turn:
        """Its inverse."""
        return self if self.sin is None else replace(self, sin=-self.sin)


UNTURNED = Turn(NONE, NONE, None, None)


def turn_of(first: Any, second: Any, frequencies: F64, positions: NDArray[np.int64]) -> Turn:
    """The rotation to positions, int64 (batch or 1, tokens), at so many radians per token."""
    consecutive = positions.shape[1] > FEW and bool((np.diff(positions) == 1).all())
    cos, sin = (_added if consecutive else _plain)(positions, frequencies)
    return Turn(np.asarray(first, np.int32), np.asarray(second, np.int32), cos, sin)


def _plain(positions: NDArray[np.int64], frequencies: F64) -> tuple[Floats, Floats]:
    """Cosines and sines of positions (rows, tokens), float32 (rows, tokens, pairs)."""
    angles = positions[..., None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _added(positions: NDArray[np.int64], frequencies: F64) -> tuple[Floats, Floats]:
    """As `_plain`, of consecutive positions: each is one of a few bases and a few more.

    An angle is rounded where it is large; what its two parts are without that, at most 2**-50 of it, comes on
    top, so that the sum is as near to the angle's own cosine and sine as a double can be.
    """
    rows, tokens = positions.shape
    blocks, pairs = -(-tokens // FEW), frequencies.size
    every = (positions[:, :1] + np.arange(blocks * FEW)).reshape(rows, blocks, FEW, 1)
    base, more = every[:, :, :1] * frequencies, np.arange(FEW)[:, None] * frequencies
    (base_cos, base_sin), (more_cos, more_sin) = ((np.cos(x), np.sin(x)) for x in (base, more))
    found = np.empty((2, rows, blocks, FEW, pairs), np.float32)
    some = max(1, NEAR // (FEW * max(1, pairs)))
    for part in (np.s_[:, at : at + some] for at in range(0, blocks, some)):
        cos = base_cos[part] * more_cos
        cos -= base_sin[part] * more_sin
        sin = base_cos[part] * more_sin
        sin += base_sin[part] * more_cos
        missing = every[part] * frequencies
        missing -= base[part]
        missing -= more
        np.subtract(cos, missing * sin, out=found[0][part], casting="same_kind")
        cos *= missing
        np.add(sin, cos, out=found[1][part], casting="same_kind")
    both = found.reshape(2, rows, blocks * FEW, pairs)[:, :, :tokens]
    return np.ascontiguousarray(both[0]), np.ascontiguousarray(both[1])


def read_rows(words: Array, dtype: str, turn: Turn = UNTURNED) -> Floats:
    """Words (batch, heads, tokens, width) as floats, turned: (heads, batch * tokens, width)."""
    batch, heads, tokens, width = words.shape
    out = np.empty((heads, batch * tokens, width), np.float32)
    core = native.core()
    if core is not None:
        core.cachegen_read(words, dtype, turn.first, turn.second, turn.cos, turn.sin, out)
        return out
    x = out.reshape(heads, batch, tokens, width).swapaxes(0, 1)
    x[:] = to_float32(words, dtype)
    _turn(x, turn)
    return out


def write_rows(x: Floats, dtype: str, shape: tuple[int, ...], turn: Turn = UNTURNED) -> Array:
    """Inverse of `read_rows`: words of a shape."""
    batch, heads, tokens, width = shape
    y = x.reshape(heads, batch, tokens, width).swapaxes(0, 1).copy()
    _turn(y, turn)
    return from_float32(y, dtype).reshape(shape)


def _turn(x: Floats, turn: Turn) -> None:
    """In place."""
    if turn.cos is None or turn.sin is None:
        return
    cos, sin = turn.cos[:, None], turn.sin[:, None]
    a, b = x[..., turn.first], x[..., turn.second]
    x[..., turn.first] = a * cos - b * sin
    x[..., turn.second] = a * sin + b * cos
