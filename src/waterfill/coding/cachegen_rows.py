"""Rows of keys and values on their way to a file and back: dtypes, and the rotation of keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import native
from waterfill.types import Array, Floats, from_float32, to_float32

__all__ = ["UNTURNED", "Runs", "Turn", "joined", "one_run", "read_rows", "turn_of", "write_rows"]

F64 = NDArray[np.float64]
Runs = Sequence[Array]  # consecutive tokens, each (batch, heads, blocks, tokens of a block, width)
NONE = np.zeros(0, np.int32)
FEW = 64  # consecutive positions that share a base


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

    An angle is rounded where it is large. What its two parts are missing for that comes on top, so that cosine
    and sine are those of the very angle, as nearly as doubles can be.
    """
    rows, tokens = positions.shape
    more = _angles(np.arange(FEW), frequencies)
    cos, sin = np.empty((2, rows, tokens, frequencies.size), np.float32)
    for row in range(rows):
        bases = _angles(positions[row, ::FEW], frequencies)
        _add(positions[row], frequencies, bases, more, cos[row], sin[row])
    return cos, sin


def _angles(positions: NDArray[np.int64], frequencies: F64) -> F64:
    """Angles, their cosines and their sines, (3, positions, pairs)."""
    angles = positions[:, None] * frequencies
    return np.stack([angles, np.cos(angles), np.sin(angles)])


def _add(
    positions: NDArray[np.int64], frequencies: F64, bases: F64, more: F64, cos: Floats, sin: Floats
) -> None:
    """Fill cosines and sines, (positions, pairs), by the addition theorem."""
    core = native.core()
    if core is not None:
        core.cachegen_angles(int(positions[0]), frequencies, bases, more, cos, sin)
        return
    base = bases.repeat(FEW, axis=1)[:, : len(positions)]
    some = np.tile(more, (1, bases.shape[1], 1))[:, : len(positions)]
    c = base[1] * some[1] - base[2] * some[2]
    s = base[1] * some[2] + base[2] * some[1]
    missing = positions[:, None] * frequencies - base[0] - some[0]
    cos[...] = c - missing * s
    sin[...] = s + c * missing


def one_run(words: Array) -> Runs:
    """All tokens of (batch, heads, tokens, width)."""
    return [words[:, :, None]]


def joined(runs: Runs) -> Array:
    """All tokens in one, (batch, heads, tokens, width)."""
    return np.concatenate([x.reshape(*x.shape[:2], -1, x.shape[4]) for x in runs], axis=2)


def read_rows(runs: Runs, dtype: str, turn: Turn = UNTURNED) -> Floats:
    """Words as floats, turned: (heads, batch * tokens, width)."""
    batch, heads, _, _, width = runs[0].shape
    tokens = sum(x.shape[2] * x.shape[3] for x in runs)
    out = np.empty((heads, batch * tokens, width), np.float32)
    core = native.core()
    if core is not None:
        core.cachegen_read(list(runs), dtype, turn.first, turn.second, turn.cos, turn.sin, out)
        return out
    x = out.reshape(heads, batch, tokens, width).swapaxes(0, 1)
    x[:] = to_float32(joined(runs), dtype)
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
