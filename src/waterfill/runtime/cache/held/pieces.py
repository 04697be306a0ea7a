"""Some consecutive tokens of a layer, and how to get at their keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from waterfill.runtime.cache.method import BLOCK, Coder

if TYPE_CHECKING:
    from waterfill.runtime.cache.held.arena import Arena

__all__ = ["Pair", "Piece", "between", "exact_piece"]

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Piece:
    """Some tokens.

    Attributes
    ----------
    start, stop : index of the first, and after the last
    read : gives keys and values
    coded : blocks first to last of an arena, if they are that; the first may begin before the piece
    index : int32 (batch, heads, n), each head's own tokens, -1: none; None: all from start to stop
    bias : float32 (batch, heads, n), to be added to the scores of `index`
    """

    start: int
    stop: int
    read: Callable[[], Pair]
    coded: tuple[Coder, Arena, int, int] | None = None
    index: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def exact_piece(start: int, pair: Pair) -> Piece:
    """Tokens from index `start` on that need no decoding."""
    return Piece(start, start + pair[0].shape[2], lambda: pair)


def between(piece: Piece, first: int, stop: int | None = None) -> Piece:
    """A piece without its tokens before index `first`, and from `stop` on."""
    low, high = max(first, piece.start), min(piece.stop, piece.stop if stop is None else stop)
    if (low, high) == (piece.start, piece.stop):
        return piece
    some = slice(low - piece.start, high - piece.start)

    def read() -> Pair:
        keys, values = piece.read()
        return keys[:, :, some], values[:, :, some]

    if piece.coded is None or high < piece.stop:
        return Piece(low, high, read)
    coder, arena, first_block, last_block = piece.coded
    start = piece.stop - (last_block - first_block) * BLOCK
    return Piece(low, high, read, (coder, arena, first_block + (low - start) // BLOCK, last_block))
