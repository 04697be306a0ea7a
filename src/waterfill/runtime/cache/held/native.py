"""Attention of few queries over a cache by the kernel, where it knows all of its pieces.

A step of a layer is then one call, whatever the number of tokens; nothing is decoded to memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
import torch

from waterfill.coding import native
from waterfill.coding.attention import MAX_WIDTH
from waterfill.coding.cached_attention import CodedTokens, ExactTokens, Turn, attend_cache
from waterfill.runtime.cache.held.arena import Arena
from waterfill.runtime.cache.held.states import View
from waterfill.runtime.cache.held.track import Track
from waterfill.runtime.cache.method import BLOCK, Coder
from waterfill.runtime.cache.rotary import Rotary
from waterfill.types import Array

__all__ = ["MAX_QUERIES", "attend_natively"]

MAX_QUERIES = 8  # more are a prompt, for which blocks are worth decoding
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def attend_natively(
    view: View, queries: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor | None:
    """As `attend` (`waterfill.runtime.cache.held.attending`); None where the kernel cannot do it."""
    if native.core() is None or not _fits(view, queries, mask):
        return None
    coded = []
    for blocks in _blocks(view):
        own = any(tier.arena is blocks.arena for tier in view.store.tiers)
        # Blocks of another store are at the positions of its track, which only they know.
        tokens = _coded(blocks, view.store.track, view.store.facts.rotary) if own else None
        if tokens is None:
            return None
        coded.append(tokens)
    pairs = [(piece.start, *piece.read()) for piece in view.runs if piece.coded is None]
    exact = [ExactTokens(at, _rows(keys), _rows(values)) for at, keys, values in pairs]
    m, stop = queries.shape[2], view.first + view.tokens
    new = view.keys.shape[2]
    exact.append(ExactTokens(stop - new, _array(view.keys), _array(view.values)))
    first_masked = view.first
    given = None if mask is None else _array(mask)
    if given is None and m > 1:
        # The last of the new tokens' queries, each of which sees no later token.
        first_masked = stop - new
        given = np.tri(m, new, new - m, dtype=np.bool_)[None, None]
    out = attend_cache(_array(queries), exact, coded, scale, given, first_masked)
    return _tensor(out, queries.dtype)


def _fits(view: View, queries: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether the kernel takes such tensors."""
    batch, heads, m, width = queries.shape
    shared, new = view.keys.shape[1], view.keys.shape[2]
    if mask is not None and not (
        mask.dim() == 4
        and mask.is_cpu
        and mask.dtype in (torch.bool, queries.dtype)
        and mask.shape[0] in (1, batch)
        and mask.shape[1] in (1, heads)
        and mask.shape[2] in (1, m)
        and mask.shape[3] >= view.tokens
    ):
        return False
    return (
        all(piece.index is None and piece.bias is None for piece in view.runs)
        and 0 < m <= min(MAX_QUERIES, new)
        and queries.is_cpu
        and queries.dtype in DTYPES
        and view.keys.dtype == view.values.dtype == queries.dtype
        and view.keys.shape[0] == batch
        and heads % shared == 0
        and max(width, view.values.shape[3]) <= MAX_WIDTH
        and view.keys.stride(3) == view.values.stride(3) == 1
        and not (torch.is_grad_enabled() and queries.requires_grad)
        and not torch.compiler.is_compiling()
    )


@dataclass(frozen=True)
class _Blocks:
    """Consecutive blocks of an arena; tokens of the first before index `seen` are not shown."""

    coder: Coder
    arena: Arena
    low: int
    high: int
    start: int
    seen: int

    @property
    def stop(self) -> int:
        return self.start + (self.high - self.low) * BLOCK


def _blocks(view: View) -> list[_Blocks]:
    """All coded pieces of a view, joined where one goes on from another."""
    found: list[_Blocks] = []
    for piece in view.runs:
        if piece.coded is None:
            continue
        coder, arena, low, high = piece.coded
        start = piece.stop - (high - low) * BLOCK
        last = found[-1] if found else None
        if last and last.arena is arena and (last.high, last.stop) == (low, start):
            found[-1] = replace(last, high=high)
        else:
            found.append(_Blocks(coder, arena, low, high, start, piece.start))
    return found


def _coded(blocks: _Blocks, track: Track, rotary: Rotary | None) -> CodedTokens | None:
    """Blocks for the kernel; None where only their coder can read them, or positions jump within one."""
    streams = blocks.coder.streams()
    offsets = track.offsets(blocks.start, blocks.stop)
    if streams is None or any((at - blocks.start) % BLOCK for at, _ in offsets):
        return None
    return CodedTokens(
        blocks.start, blocks.seen - blocks.start, *streams,
        None if rotary is None else _turn(rotary),
        [(run["keys"].numpy(), run["values"].numpy()) for run in blocks.arena.runs(blocks.low, blocks.high)],
        [(at, offset.numpy()) for at, offset in offsets],
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _turn(rotary: Rotary) -> Turn:
    return Turn(rotary.first.numpy(), rotary.second.numpy(), rotary.frequencies.numpy())


def _rows(tensor: torch.Tensor) -> Array:
    """As `_array`, each row in one piece: what a coder has decoded may lie otherwise."""
    return _array(tensor if tensor.stride(3) == 1 else tensor.contiguous())


def _array(tensor: torch.Tensor) -> Array:
    """The same memory; bfloat16 as its bits."""
    tensor = tensor.detach()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return tensor.view(torch.int16).numpy().view(np.uint16)


def _tensor(array: Array, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of `_array`."""
    if dtype != torch.bfloat16:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(dtype)
