"""Attention of few queries over a cache by the kernel, where it knows all of its pieces.

A step of a layer is then one call, whatever the number of tokens; nothing is decoded to memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from waterfill.coding import native
from waterfill.coding.attention import MAX_WIDTH
from waterfill.runtime.cache.held.arena import Arena
from waterfill.runtime.cache.held.states import View
from waterfill.runtime.cache.held.track import Track
from waterfill.runtime.cache.method import BLOCK, Coder
from waterfill.runtime.weights import KERNEL_DTYPES

__all__ = ["MAX_QUERIES", "attend_natively"]

MAX_QUERIES = 8  # more are a prompt, for which blocks are worth decoding


def attend_natively(
    view: View, queries: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor | None:
    """As `attend` (`waterfill.runtime.cache.held.attending`); None where the kernel cannot do it."""
    core = native.core()
    if core is None or not _fits(view, queries, mask):
        return None
    track = view.store.track
    kept: list[object] = []  # memory that only a tensor made here holds
    coded = []
    for blocks in _blocks(view):
        # Blocks of another store are at the positions of its track, which only they know.
        own = any(tier.arena is blocks.arena for tier in view.store.tiers)
        tokens = _coded(blocks, track, kept) if own else None
        if tokens is None:
            return None
        coded.append(tokens)
    stop, new = view.first + view.tokens, view.keys.shape[2]
    exact = [_exact(stop - new, view.keys, view.values)]
    for piece in view.runs:
        if piece.coded is None:
            # What a coder has decoded may lie otherwise.
            pair = [x if x.stride(3) == 1 else x.contiguous() for x in piece.read()]
            if any(x.dtype != queries.dtype for x in pair):
                return None
            kept.append(pair)
            exact.append(_exact(piece.start, *pair))
    batch, heads, m, width = queries.shape
    first_masked = view.first
    if mask is None and m > 1:
        # The last of the new tokens' queries, each of which sees no later token.
        first_masked = stop - new
        mask = torch.ones((m, new), dtype=torch.bool).tril_(new - m)[None, None]
    if queries.stride(3) != 1:
        queries = queries.contiguous()
    seen: tuple[object, ...] = 0, (0, 0, 0, 0), False, first_masked, 0
    if mask is not None:
        strides = mask.expand(batch, heads, m, mask.shape[3]).stride()
        boolean = mask.dtype == torch.bool
        seen = mask.data_ptr(), strides, boolean, first_masked, mask.shape[3]
    shared, e = view.keys.shape[1], view.values.shape[3]
    out = queries.new_empty((batch, m, heads, e))
    core.attend_cache(
        (batch, heads, shared, m, width, e), KERNEL_DTYPES[queries.dtype], queries.data_ptr(),
        _strides(queries), *seen, scale, exact, coded, out.data_ptr(), native.threads(),
    )  # fmt: skip
    return out


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
        and queries.dtype in KERNEL_DTYPES
        and queries.dtype == view.store.facts.dtype
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


def _coded(blocks: _Blocks, track: Track, kept: list[object]) -> tuple[object, ...] | None:
    """Blocks for the kernel; None where only their coder can read them, or positions jump within one."""
    held = blocks.coder.blocks
    offsets = track.offsets(blocks.start, blocks.stop)
    if held is None or any((at - blocks.start) % BLOCK for at, _ in offsets):
        return None
    parts = list(zip(held.names, held.nbytes, strict=True))
    runs = blocks.arena.addresses(blocks.low, blocks.high, parts)
    kept.append(offsets)
    rows = [(at, offset.data_ptr(), offset.shape[0]) for at, offset in offsets]
    return blocks.start, blocks.seen - blocks.start, held.handle, runs, rows


def _exact(start: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[object, ...]:
    """Tokens as they were, for the kernel."""
    k, v = keys.data_ptr(), values.data_ptr()
    return start, keys.shape[2], k, _strides(keys), v, _strides(values)


def _strides(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """In elements; the last is one, also where there is but one element."""
    a, b, c, _ = tensor.stride()
    return a, b, c, 1
