"""What one layer remembers: sinks and a recent window as they were, all between in coded blocks.

A token is coded once, when its block leaves the window, and is never coded again, unless the method says
that blocks age (`Method.tiers`). Tokens lie in order: sinks, the oldest tier, ..., the newest tier, recent.
Where an edit cut blocks apart, a few exact tokens, a patch, lie between them (`splicing`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from waterfill.coding.native import trim_memory
from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.held.arena import Arena
from waterfill.runtime.cache.held.pieces import Pair, Piece, between, exact_piece
from waterfill.runtime.cache.held.track import Track
from waterfill.runtime.cache.method import BLOCK, Coder
from waterfill.runtime.cache.saliency import Probes

__all__ = ["CHUNK", "Patch", "Store", "StoreTier"]

CHUNK = 32  # blocks that are coded or read at once: bounds what that takes in memory


@dataclass
class StoreTier:
    """Blocks of an age: how they are coded, where they are, how many before the oldest ages further."""

    coder: Coder
    most: int | None
    arena: Arena


@dataclass(frozen=True)
class Patch:
    """Exact tokens between coded blocks.

    Attributes
    ----------
    after : coded blocks before it, of all tiers
    """

    after: int
    pair: Pair

    @property
    def tokens(self) -> int:
        return self.pair[0].shape[2]


class Store:
    """A layer's memory.

    Parameters
    ----------
    facts : of the layer
    tiers : newest first; (coder, blocks of that age at most)
    track : positions of tokens, shared by all layers
    sinks, recent : tokens kept as they were, at the beginning and at least at the end
    recent_room : tokens after the last block at most; None: as many as there may be

    Attributes
    ----------
    most_nbytes : that patches may bring this store to; beyond, tokens after the last are coded again; None: any
    whole : whether every token is here that the layer may attend to
    """

    most_nbytes: int | None = None
    whole: ClassVar[bool] = True

    def __init__(
        self,
        facts: LayerFacts,
        tiers: list[tuple[Coder, int | None]],
        track: Track,
        sinks: int,
        recent: int,
        recent_room: int | None = None,
    ) -> None:
        self.facts, self.track = facts, track
        self.recent_room = recent + BLOCK if recent_room is None else recent_room
        self.most_sinks, self.least_recent = sinks, recent
        self.open(tiers)

    def open(self, tiers: list[tuple[Coder, int | None]]) -> None:
        """Forget everything, and code in this way from now on."""
        self.coders = tiers
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.sinks: Pair | None = None
        self.recent: Pair | None = None  # buffers; `held` of their tokens count
        self.held = self.dropped = 0  # dropped: tokens after the sinks that no window sees any more
        self.queries: torch.Tensor | None = None  # of the last tokens, up to index `asked`
        self.asked = 0
        self.patches: list[Patch] = []  # in order
        self.tiers = [StoreTier(coder, most, Arena()) for coder, most in self.coders]

    # -- sizes ---------------------------------------------------------------------------------

    @property
    def coded_tokens(self) -> int:
        """Tokens in coded blocks."""
        return BLOCK * self.blocks

    @property
    def blocks(self) -> int:
        """Coded blocks of all tiers."""
        return sum([tier.arena.count for tier in self.tiers])

    @property
    def patched_tokens(self) -> int:
        """Exact tokens between coded blocks."""
        return sum([patch.tokens for patch in self.patches])

    @property
    def sink_tokens(self) -> int:
        return 0 if self.sinks is None else self.sinks[0].shape[2]

    @property
    def tokens(self) -> int:
        """Tokens so far, also those that were dropped."""
        return self.sink_tokens + self.tokens_after_sinks

    @property
    def batch(self) -> int:
        """Rows of the batch; 0 before the first token."""
        return 0 if self.recent is None else self.recent[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held: exact tokens and the room for more, codes, tables."""
        pairs = (self.sinks, self.recent, *(patch.pair for patch in self.patches))
        exact = [t for pair in pairs if pair is not None for t in pair]
        held = sum(t.numel() * t.element_size() for t in exact)
        return held + sum(tier.coder.nbytes + tier.arena.nbytes for tier in self.tiers)

    # -- reading -------------------------------------------------------------------------------

    def pieces(self, first: int = 0) -> tuple[Piece, ...]:
        """All tokens from index `first` on, in order, few enough in each to be read at once."""
        return tuple(part for run in self.runs(first) for part in self.split(run))

    def runs(self, first: int = 0) -> tuple[Piece, ...]:
        """As `pieces`, blocks of a kind all in one; stays valid while tokens are appended."""
        found, at = [], 0
        if self.sinks is not None:
            found.append(exact_piece(at, self.sinks))
            at = self.sink_tokens
        at += self.dropped
        for part in self.middle():
            if isinstance(part, Patch):
                found.append(exact_piece(at, part.pair))
            else:
                tier, low, high = part
                found.append(self._coded(tier.coder, tier.arena, at, low, high))
            at = found[-1].stop
        if self.held:
            recent = self.recent_states()
            assert recent is not None
            found.append(exact_piece(at, recent))
        return tuple(between(piece, first) for piece in found if piece.stop > first)

    def split(self, run: Piece) -> Iterator[Piece]:
        """A run in parts that are read at once."""
        if run.coded is None:
            yield run
            return
        coder, arena, first, last = run.coded
        start = run.stop - (last - first) * BLOCK
        for low in range(first, last, CHUNK):
            at = start + (low - first) * BLOCK
            yield between(self._coded(coder, arena, at, low, min(low + CHUNK, last)), run.start)

    def middle(self) -> Iterator[Patch | tuple[StoreTier, int, int]]:
        """What lies between sinks and recent tokens, in order: patches, and some blocks of a tier."""
        waiting, done = list(self.patches), 0
        for tier in reversed(self.tiers):
            low = 0
            while low < tier.arena.count or (waiting and waiting[0].after == done):
                if waiting and waiting[0].after == done:
                    yield waiting.pop(0)
                    continue
                cut = low + waiting[0].after - done if waiting else tier.arena.count
                high = min(cut, tier.arena.count)
                yield tier, low, high
                low, done = high, done + high - low

    def _coded(self, coder: Coder, arena: Arena, start: int, low: int, high: int) -> Piece:
        stop = start + (high - low) * BLOCK

        def read() -> Pair:
            return coder.decode(arena.blocks(low, high), self.track.positions(start, stop))

        return Piece(start, stop, read, (coder, arena, low, high))

    def recent_states(self) -> Pair | None:
        """Keys and values of the recent tokens, as they are."""
        if self.recent is None:
            return None
        return self.recent[0][:, :, : self.held], self.recent[1][:, :, : self.held]

    # -- growing -------------------------------------------------------------------------------

    def settle(self, coming: int = 0) -> None:
        """Code what is no longer recent, and let old blocks age: before a forward pass, never within.

        Blocks age by what the pass will bring too, so that it may be coded with all tiers within bounds.
        """
        n = max(0, self.held - self.least_recent) // BLOCK
        later = self._blocks_of(coming, self.held - n * BLOCK)
        self._make_way(n + later)
        if n:
            recent = self.recent_states()
            assert recent is not None and self.recent is not None
            n *= BLOCK
            self._code(*recent, n, later)
            for buffer in self.recent:
                buffer[:, :, : self.held - n] = buffer[:, :, n : self.held].clone()
            self.held -= n

    def _blocks_of(self, coming: int, held: int) -> int:
        """Blocks that `append` codes at once of so many new tokens."""
        coming -= self._sinks_of(coming)
        over = held + coming > self.recent_room
        return (held + coming - self.least_recent) // BLOCK if over else 0

    def _sinks_of(self, coming: int) -> int:
        """How many of so many new tokens are sinks."""
        return 0 if self.tokens_after_sinks else min(self.most_sinks - self.sink_tokens, coming)

    def append(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor | None = None,
        queries: torch.Tensor | None = None,
    ) -> None:
        """Remember new tokens.

        Parameters
        ----------
        keys, values : (batch, heads, tokens, width)
        positions : int64 (batch or 1, tokens); None: as many as there are tokens before
        queries : (batch, query heads, tokens, width) that asked for them; None: unknown
        """
        with torch.no_grad():
            tokens = self.tokens
            self.track.extend(tokens, keys.shape[2], positions)
            if any(t.coder.wants_saliency for t in self.tiers):
                self._probe(queries)
            self.asked = tokens + keys.shape[2]
            self.grow(keys, values)

    def grow(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Remember tokens whose positions the track knows."""
        if self.recent is None:
            self._begin(keys, values)
        if n := self._sinks_of(keys.shape[2]):
            more = keys[:, :, :n].clone(), values[:, :, :n].clone()
            old = self.sinks
            self.sinks = more if old is None else (
                torch.cat([old[0], more[0]], 2), torch.cat([old[1], more[1]], 2)
            )  # fmt: skip
            keys, values = keys[:, :, n:], values[:, :, n:]
        assert self.recent is not None
        room = self.recent[0].shape[2]
        if self.held + keys.shape[2] > room:
            # A prompt: its blocks are coded from where they are, chunk by chunk.
            whole = self.recent_states()
            assert whole is not None
            keys, values = torch.cat([whole[0], keys], 2), torch.cat([whole[1], values], 2)
            n = (keys.shape[2] - self.least_recent) // BLOCK * BLOCK
            self.held = 0
            self._code(keys, values, n)
            keys, values = keys[:, :, n:], values[:, :, n:]
            # A view may still show the old buffer.
            self.recent = torch.empty_like(self.recent[0]), torch.empty_like(self.recent[1])
        stop = self.held + keys.shape[2]
        self.recent[0][:, :, self.held : stop] = keys
        self.recent[1][:, :, self.held : stop] = values
        self.held = stop

    @property
    def tokens_after_sinks(self) -> int:
        return self.dropped + self.coded_tokens + self.patched_tokens + self.held

    def _begin(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        room = self.recent_room
        self.recent = (
            keys.new_empty((*keys.shape[:2], room, keys.shape[3])),
            values.new_empty((*values.shape[:2], room, values.shape[3])),
        )

    def _code(self, keys: torch.Tensor, values: torch.Tensor, n: int, later: int = 0) -> None:
        """Code the first n of these tokens, which `later` blocks will follow; the others stay recent."""
        start = self.tokens - self.held
        probes = self._probes(start, keys)
        places, low = self._by_age(later, n // BLOCK), 0
        youngest = next((i for i, tier in enumerate(self.tiers) if tier.arena.count), None)
        if youngest is not None:  # tokens lie in order
            places[youngest:] = [sum(places[youngest:])]
        for tier, blocks in reversed(list(zip(self.tiers, places, strict=False))):
            stop = low + blocks * BLOCK
            while low < stop:
                some = slice(low, min(low + CHUNK * BLOCK, stop))
                positions = self.track.positions(start + some.start, start + some.stop)
                k = keys[:, :, some]
                looked = None if probes is None else probes.saliency(start + low, k)
                tier.arena.append(tier.coder.encode(k, values[:, :, some], positions, looked))
                low = some.stop
        if n == BLOCK:
            # Growing step by step: what each allocates and frees would leave holes as large as the blocks.
            trim_memory()

    def _by_age(self, younger: int, blocks: int) -> list[int]:
        """Of so many consecutive blocks, with `younger` ones after them, how many belong in each tier."""
        found: list[int] = []
        bound = 0
        for tier in self.tiers:
            bound += tier.most or 0
            last = tier is self.tiers[-1] or tier.most is None
            within = blocks if last else min(blocks, max(0, bound - younger))
            found.append(within - sum(found))
        return found

    def _make_way(self, coming: int) -> None:
        """Move blocks to the tiers they belong in once so many new ones have come."""
        held = [tier.arena.count for tier in self.tiers]
        for at in reversed(range(len(self.tiers) - 1)):
            places = self._by_age(coming + sum(held[:at]), held[at])
            for to in reversed(range(at + 1, len(self.tiers))):
                self._age(at, to, places[to])

    def _age(self, at: int, to: int, blocks: int) -> None:
        """Move the oldest blocks of one tier to the end of an older one."""
        young, old = self.tiers[at], self.tiers[to]
        while blocks:
            before = sum(tier.arena.count for tier in self.tiers[at + 1 :])
            start = self.sink_tokens + self.dropped + before * BLOCK
            start += sum(patch.tokens for patch in self.patches if patch.after <= before)
            patched = [patch.after - before for patch in self.patches if patch.after > before]
            n = min(blocks, CHUNK, *patched)
            positions = self.track.positions(start, start + n * BLOCK)
            keys, values = young.coder.decode(young.arena.blocks(0, n), positions)
            old.arena.append(old.coder.encode(keys, values, positions))
            young.arena.pop_front(n)
            blocks -= n

    def _probe(self, queries: torch.Tensor | None) -> None:
        """Remember the queries of the last tokens."""
        if queries is None or self.asked != self.tokens:
            self.queries = None
        if queries is not None:
            kept = [queries] if self.queries is None else [self.queries, queries]
            self.queries = torch.cat([q[:, :, -BLOCK:] for q in kept], 2)[:, :, -BLOCK:].detach()

    def _probes(self, start: int, keys: torch.Tensor) -> Probes | None:
        """The remembered queries, with what they may look at: sinks, and keys from index `start` on."""
        if self.queries is None:
            return None
        probes = Probes(self.queries, self.asked, self.facts.window)
        probes.look(([] if self.sinks is None else [(0, self.sinks[0])]) + [(start, keys)])
        return probes

    # -- editing -------------------------------------------------------------------------------

    def keep(self, tokens: int) -> None:
        """Forget all but the first so many tokens."""
        gone = self.tokens - tokens
        if gone <= 0:
            return
        if self.queries is not None:
            asked = self.queries.shape[2] - gone
            self.queries = self.queries[:, :, :asked] if asked > 0 else None
        self.asked = tokens
        if self.dropped and self.facts.first_visible(tokens) < self.sink_tokens + self.dropped:
            raise ValueError("tokens that left the window cannot come back")
        if gone > self.held:
            self._reopen(gone - self.held)
        self.held -= min(self.tokens - tokens, self.held)
        if self.sinks is not None and tokens < self.sink_tokens:
            self.sinks = (
                (self.sinks[0][:, :, :tokens], self.sinks[1][:, :, :tokens]) if tokens else None
            )
        self.track.keep(tokens)

    def _reopen(self, gone: int) -> None:
        """Drop what holds the last `gone` tokens before the recent; what remains of a block is recent again."""
        self.held = 0
        while gone > 0 and (self.blocks or self.patches):
            edge = self.patches[-1].after if self.patches else 0
            if self.patches and edge == self.blocks:
                last = self.patches.pop()
                if gone < last.tokens:
                    self._resume(last.pair)
                gone -= last.tokens
                continue
            tier = next(tier for tier in self.tiers if tier.arena.count)
            whole = min(gone // BLOCK, tier.arena.count, self.blocks - edge)
            tier.arena.pop_back(whole)
            gone -= whole * BLOCK
            if not whole:
                stop, count = self.tokens, tier.arena.count
                positions = self.track.positions(stop - BLOCK, stop)
                pair = tier.coder.decode(tier.arena.blocks(count - 1, count), positions)
                tier.arena.pop_back(1)
                self._resume(pair)
                gone -= BLOCK

    def _resume(self, pair: Pair) -> None:
        """Let these be the recent tokens; they fit."""
        self._begin(*pair)
        assert self.recent is not None
        self.held = pair[0].shape[2]
        for buffer, states in zip(self.recent, pair, strict=True):
            buffer[:, :, : self.held] = states

    def drop_before(self, first: int) -> None:
        """Forget coded blocks and patches that lie wholly before a token's index."""
        while self.blocks or self.patches:
            start = self.sink_tokens + self.dropped
            if self.patches and self.patches[0].after == 0:
                gone = self.patches[0].tokens
                if start + gone > first:
                    return
                self.patches.pop(0)
            else:
                arena = next(tier.arena for tier in reversed(self.tiers) if tier.arena.count)
                edge = self.patches[0].after if self.patches else arena.count
                whole = min(max(0, first - start) // BLOCK, arena.count, edge)
                if not whole:
                    return
                arena.pop_front(whole)
                self.patches = [replace(p, after=p.after - whole) for p in self.patches]
                gone = whole * BLOCK
            self.dropped += gone

    def rows(self, index: torch.Tensor) -> None:
        """Take rows of the batch, in this order, any of them more than once."""

        def take(pair: Pair) -> Pair:
            keys, values = (t.index_select(0, index.to(t.device)) for t in pair)
            return keys, values

        self.sinks = None if self.sinks is None else take(self.sinks)
        self.recent = None if self.recent is None else take(self.recent)
        self.patches = [replace(p, pair=take(p.pair)) for p in self.patches]
        if self.queries is not None:
            self.queries = self.queries.index_select(0, index.to(self.queries.device))
        for tier in self.tiers:
            tier.arena = tier.arena.rows(index)
