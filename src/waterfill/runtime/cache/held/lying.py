"""Keys and values where they lie: read without a copy, and written where they are kept.

A run is some consecutive tokens' keys and values, (batch, heads, blocks, tokens of a block, width) each, of
any strides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

from waterfill.runtime.cache.held.pieces import Pair, Piece
from waterfill.runtime.cache.held.store import Store
from waterfill.runtime.cache.method import BLOCK, Coded

__all__ = ["Write", "fill", "lies", "receive", "runs_of", "within"]

T = TypeVar("T", bound=Any)
Write = Callable[[list[Pair]], None]


def runs_of(piece: Piece) -> tuple[int, list[Pair]]:
    """Runs that a piece's tokens lie in, and the index of the first token there, which may be before it."""
    if piece.coded is not None:
        coder, arena, low, high = piece.coded
        found = [coder.views(coded) for coded in arena.runs(low, high)]
        if None not in found:
            return piece.stop - (high - low) * BLOCK, [pair for pair in found if pair is not None]
    keys, values = piece.read()
    return piece.start, [(keys[:, :, None], values[:, :, None])]


def lies(piece: Piece) -> bool:
    """Whether `runs_of` a piece are where it is held, in memory here: nothing is decoded or moved."""
    if piece.coded is None:
        return piece.read()[0].device.type == "cpu"
    coder, arena, low, _ = piece.coded
    pair = coder.views(next(arena.runs(low, low + 1)))
    return pair is not None and pair[0].device.type == "cpu"


def within(runs: Iterable[tuple[T, T]], first: int, stop: int) -> Iterator[tuple[T, T]]:
    """Tokens first to stop of consecutive runs, tensors or arrays, whole blocks all in one."""
    start = 0
    for keys, values in runs:
        blocks, size = keys.shape[2:4]
        low, high = first - start, stop - start
        start += blocks * size
        low, high = low if low > 0 else 0, high if high < blocks * size else blocks * size
        while low < high:
            block, at = divmod(low, size)
            whole = 0 if at else (high - low) // size
            n = whole * size or min(size - at, high - low)
            if whole == blocks:
                yield keys, values
            elif whole:
                yield keys[:, :, block : block + whole], values[:, :, block : block + whole]
            else:
                some = slice(block, block + 1), slice(at, at + n)
                yield keys[:, :, *some], values[:, :, *some]
            low += n


def receive(store: Store, like: Pair, tokens: int, write: Write) -> None:
    """Remember tokens that `write` puts into the runs it is given, whose positions the track knows.

    Where blocks are held as they come, runs are their places in the store, else in memory for a while. If
    `write` fails, nothing is remembered.

    Parameters
    ----------
    like : keys and values of no tokens, (batch, heads, 0, width), of the dtype and device to come
    write : is given runs in memory here
    """
    held, least = store.held, store.least_recent
    blocks = (held + tokens - least) // BLOCK
    many = held + tokens > least + BLOCK and blocks * BLOCK >= held
    empty = _as_kept(store, like) if many else None
    if empty is None:
        keys, values = (
            torch.empty((*x.shape[:2], tokens, x.shape[3]), dtype=x.dtype) for x in like
        )
        write([(keys[:, :, None], values[:, :, None])])
        store.append(keys.to(like[0].device), values.to(like[1].device))
        return
    tier = store.tiers[0]
    places = [tier.coder.views(run) for run in tier.arena.reserve(empty, blocks)]
    runs = [pair for pair in places if pair is not None]
    recent = store.recent_states()
    if recent is not None:
        fill(recent, within(runs, 0, held))
    left = held + tokens - blocks * BLOCK
    keys, values = (x.new_empty((*x.shape[:2], least + BLOCK, x.shape[3])) for x in like)
    tail = keys[:, :, None, :left], values[:, :, None, :left]
    write([*within(runs, held, blocks * BLOCK), *within([tail], 0, left)])
    tier.arena.grow(blocks)
    store.recent, store.held = (keys, values), left


def _as_kept(store: Store, like: Pair) -> Coded | None:
    """No blocks, as the next ones of a store are held; None where these are not what comes."""
    if like[0].device.type != "cpu" or len(store.tiers) != 1:
        return None
    if not store.tokens_after_sinks and store.sink_tokens < store.most_sinks:
        return None
    coder, segments = store.tiers[0].coder, store.tiers[0].arena.segments
    if segments:
        empty: Coded = {name: part[:, :0] for name, part in segments[0].items()}
    else:
        empty = coder.encode(*like, store.track.positions(0, 0))
    return None if coder.views(empty) is None else empty


def fill(pair: Pair, runs: Iterable[Pair]) -> None:
    """Copy keys and values, (batch, heads, tokens, width), into runs of as many."""
    start = 0
    for run in runs:
        stop = start + run[0].shape[2] * run[0].shape[3]
        for to, x in zip(run, pair, strict=True):
            to.copy_(x[:, :, start:stop].reshape(to.shape))
        start = stop
