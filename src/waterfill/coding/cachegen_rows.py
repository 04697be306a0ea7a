"""Rows of keys and values on their way to a file and back: dtypes, and the rotation of keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import native
from waterfill.types import Array, Floats, from_float32, to_float32

__all__ = ["UNTURNED", "Turn", "read_rows", "turn_of", "write_rows"]

NONE = np.zeros(0, np.int32)


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


def turn_of(
    first: Any, second: Any, frequencies: NDArray[np.float64], positions: NDArray[np.int64]
) -> Turn:
    """The rotation to positions, int64 (batch or 1, tokens), at so many radians per token."""
    angles = positions[..., None] * frequencies
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return Turn(np.asarray(first, np.int32), np.asarray(second, np.int32), cos, sin)


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
