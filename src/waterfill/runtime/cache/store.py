"""What one layer remembers: sinks and a recent window as they were, all between in coded blocks.

A token is coded once, when its block leaves the window, and is never coded again, unless the method says
that blocks age (`Method.tiers`). Tokens lie in order: sinks, the oldest tier, ..., the newest tier, recent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from waterfill.runtime.cache.arena import Arena
from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.method import BLOCK, Coder
from waterfill.runtime.cache.track import Track

__all__ = ["Blocks", "Piece", "Store", "StoreTier"]

CHUNK = 32  # blocks that are coded or read at once: bounds what that takes in memory

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Blocks:
    """Some consecutive blocks of an arena.

    Attributes
    ----------
    low, high : counted from the first that the arena holds
    start : index of the first token
    """

    coder: Coder
    arena: Arena
    track: Track
    low: int
    high: int
    start: int

    def read(self) -> Pair:
        """Keys and values."""
        stop = self.start + (self.high - self.low) * BLOCK
        positions = self.track.positions(self.start, stop)
        return self.coder.decode(self.arena.blocks(self.low, self.high), positions)


@dataclass(frozen=True)
class Piece:
    """Some consecutive tokens: their index, and where their keys and values are.

    Attributes
    ----------
    exact : tokens as they were; None where they are coded
    coded : blocks whose last token is the piece's; its first may lie within the first block
    """

    start: int
    stop: int
    exact: Pair | None
    coded: Blocks | None = None

    def read(self) -> Iterator[tuple[int, Pair]]:
        """Index of the first token, keys and values, of so many at once as memory is meant for."""
        if self.exact is not None:
            yield self.start, self.exact
        if self.coded is not None:
            for low in range(self.coded.low, self.coded.high, CHUNK):
                start = self.coded.start + (low - self.coded.low) * BLOCK
                high = min(low + CHUNK, self.coded.high)
                keys, values = replace(self.coded, low=low, high=high, start=start).read()
                skip = max(0, self.start - start)
                yield start + skip, (keys[:, :, skip:], values[:, :, skip:])


@dataclass
class StoreTier:
    """Blocks of an age: how they are coded, where they are, how many before the oldest ages further."""

    coder: Coder
    most: int | None
    arena: Arena


class Store:
    """A layer's memory.

    Parameters
    ----------
    facts : of the layer
    tiers : newest first; (coder, blocks of that age at most)
    track : positions of tokens, shared by all layers
    sinks, recent : tokens kept as they were, at the beginning and at least at the end
    """

    def __init__(
        self,
        facts: LayerFacts,
        tiers: list[tuple[Coder, int | None]],
        track: Track,
        sinks: int,
        recent: int,
    ) -> None:
        self.facts, self.track = facts, track
        self.most_sinks, self.least_recent = sinks, recent
        self.tiers = [StoreTier(coder, most, Arena()) for coder, most in tiers]
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.sinks: Pair | None = None
        self.recent: Pair | None = None  # buffers; `held` of their tokens count
        self.held = self.dropped = 0  # dropped: tokens after the sinks that no window sees any more
        self.queries: torch.Tensor | None = None
        for tier in self.tiers:
            tier.arena = Arena()

    # -- sizes ---------------------------------------------------------------------------------

    @property
    def coded_tokens(self) -> int:
        """Tokens in coded blocks."""
        return BLOCK * sum(tier.arena.count for tier in self.tiers)

    @property
    def sink_tokens(self) -> int:
        return 0 if self.sinks is None else self.sinks[0].shape[2]

    @property
    def tokens(self) -> int:
        """Tokens so far, also those that were dropped."""
        return self.sink_tokens + self.dropped + self.coded_tokens + self.held

    @property
    def batch(self) -> int:
        """Rows of the batch; 0 before the first token."""
        return 0 if self.recent is None else self.recent[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held: exact tokens, codes, tables."""
        exact = [t for pair in (self.sinks, self._recent()) if pair is not None for t in pair]
        tables = [t for tier in self.tiers for t in tier.coder.tables.values()]
        held = sum(t.numel() * t.element_size() for t in exact + tables)
        return held + sum(tier.arena.nbytes for tier in self.tiers)

    # -- reading -------------------------------------------------------------------------------

    def pieces(self, first: int = 0) -> tuple[Piece, ...]:
        """All tokens from index `first` on, in order; stays valid while tokens are appended."""
        found, at = [], 0
        if self.sinks is not None:
            found.append(_exact(at, self.sinks))
            at = self.sink_tokens
        at += self.dropped
        for tier in reversed(self.tiers):
            blocks = tier.arena.count
            if blocks:
                coded = Blocks(tier.coder, tier.arena, self.track, 0, blocks, at)
                found.append(Piece(at, at + blocks * BLOCK, None, coded))
                at += blocks * BLOCK
        if self.held:
            recent = self._recent()
            assert recent is not None
            found.append(_exact(at, recent))
        return tuple(_from(piece, first) for piece in found if piece.stop > first)

    def _recent(self) -> Pair | None:
        if self.recent is None:
            return None
        return self.recent[0][:, :, : self.held], self.recent[1][:, :, : self.held]

    # -- growing -------------------------------------------------------------------------------

    def settle(self) -> None:
        """Code what is no longer recent, and let old blocks age: before a forward pass, never within."""
        spare = self.held - self.least_recent
        if spare >= BLOCK:
            recent = self._recent()
            assert recent is not None and self.recent is not None
            n = spare // BLOCK * BLOCK
            self._code(recent[0][:, :, :n], recent[1][:, :, :n])
            for buffer in self.recent:
                buffer[:, :, : self.held - n] = buffer[:, :, n : self.held].clone()
            self.held -= n
        for young, old in zip(self.tiers, self.tiers[1:], strict=False):
            while young.most is not None and young.arena.count > young.most:
                self._age(young, old)

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
            self.track.extend(self.tokens, keys.shape[2], positions)
            if queries is not None and any(t.coder.wants_saliency for t in self.tiers):
                self.queries = queries[:, :, -BLOCK:].detach().clone()
            self._append(keys, values)

    def _append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self.recent is None:
            self._begin(keys, values)
        n = max(
            0,
            min(self.most_sinks - self.sink_tokens, keys.shape[2])
            if not self.tokens_after_sinks
            else 0,
        )
        if n:
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
            whole = self._recent()
            assert whole is not None
            keys, values = torch.cat([whole[0], keys], 2), torch.cat([whole[1], values], 2)
            n = (keys.shape[2] - self.least_recent) // BLOCK * BLOCK
            self.held = 0
            self._code(keys[:, :, :n], values[:, :, :n])
            keys, values = keys[:, :, n:], values[:, :, n:]
            # A view may still show the old buffer.
            self.recent = torch.empty_like(self.recent[0]), torch.empty_like(self.recent[1])
        stop = self.held + keys.shape[2]
        self.recent[0][:, :, self.held : stop] = keys
        self.recent[1][:, :, self.held : stop] = values
        self.held = stop

    @property
    def tokens_after_sinks(self) -> int:
        return self.dropped + self.coded_tokens + self.held

    def _begin(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        room = self.least_recent + BLOCK
        self.recent = (
            keys.new_empty((*keys.shape[:2], room, keys.shape[3])),
            values.new_empty((*values.shape[:2], room, values.shape[3])),
        )

    def _code(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        start = self.sink_tokens + self.dropped + self.coded_tokens
        newest = self.tiers[0]
        for low in range(0, keys.shape[2], CHUNK * BLOCK):
            some = slice(low, min(low + CHUNK * BLOCK, keys.shape[2]))
            positions = self.track.positions(start + some.start, start + some.stop)
            k = keys[:, :, some]
            newest.arena.append(
                newest.coder.encode(k, values[:, :, some], positions, self._saliency(k))
            )

    def _age(self, young: StoreTier, old: StoreTier) -> None:
        start = self.sink_tokens + self.dropped
        for tier in reversed(self.tiers):
            if tier is young:
                break
            start += tier.arena.count * BLOCK
        positions = self.track.positions(start, start + BLOCK)
        keys, values = young.coder.decode(young.arena.blocks(0, 1), positions)
        old.arena.append(old.coder.encode(keys, values, positions))
        young.arena.pop_front(1)

    def _saliency(self, keys: torch.Tensor) -> torch.Tensor | None:
        """Mean attention that late queries pay to these keys among themselves, for each head."""
        if self.queries is None:
            return None
        q = self.queries.float()
        scores = q.reshape(q.shape[0], keys.shape[1], -1, q.shape[3]) @ keys.float().transpose(2, 3)
        mean: torch.Tensor = (scores * q.shape[3] ** -0.5).softmax(-1).mean(2)
        return mean

    # -- editing -------------------------------------------------------------------------------

    def keep(self, tokens: int) -> None:
        """Forget all but the first so many tokens."""
        gone = self.tokens - tokens
        if gone <= 0:
            return
        if tokens < self.sink_tokens + self.dropped and self.dropped:
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
        """Drop coded blocks that hold the last `gone` coded tokens; what remains of one is recent again."""
        self.held = 0
        for tier in self.tiers:
            whole = min(gone // BLOCK, tier.arena.count)
            tier.arena.pop_back(whole)
            gone -= whole * BLOCK
            if 0 < gone < BLOCK and tier.arena.count:
                stop = self.sink_tokens + self.dropped + self.coded_tokens
                last = tier.arena.count
                keys, values = tier.coder.decode(
                    tier.arena.blocks(last - 1, last), self.track.positions(stop - BLOCK, stop)
                )
                tier.arena.pop_back(1)
                self._begin(keys, values)
                assert self.recent is not None
                self.held = BLOCK
                self.recent[0][:, :, :BLOCK], self.recent[1][:, :, :BLOCK] = keys, values
                return

    def drop_before(self, first: int) -> None:
        """Forget coded blocks that lie wholly before a token's index."""
        for tier in reversed(self.tiers):
            start = self.sink_tokens + self.dropped
            blocks = min(max(0, first - start) // BLOCK, tier.arena.count)
            tier.arena.pop_front(blocks)
            self.dropped += blocks * BLOCK
            if tier.arena.count:
                return

    def rows(self, index: torch.Tensor) -> None:
        """Take rows of the batch, in this order, any of them more than once."""

        def take(pair: Pair | None) -> Pair | None:
            if pair is None:
                return None
            return tuple(t.index_select(0, index.to(t.device)) for t in pair)  # type: ignore[return-value]

        self.sinks, self.recent = take(self.sinks), take(self.recent)
        if self.queries is not None:
            self.queries = self.queries.index_select(0, index.to(self.queries.device))
        for tier in self.tiers:
            tier.arena = tier.arena.rows(index)


def _exact(start: int, pair: Pair) -> Piece:
    return Piece(start, start + pair[0].shape[2], pair)


def _from(piece: Piece, first: int) -> Piece:
    """A piece without its tokens before index `first`."""
    skip = first - piece.start
    if skip <= 0:
        return piece
    if piece.coded is None:
        assert piece.exact is not None
        keys, values = piece.exact
        return Piece(first, piece.stop, (keys[:, :, skip:], values[:, :, skip:]))
    gone = skip // BLOCK
    start, low = piece.coded.start + gone * BLOCK, piece.coded.low + gone
    return Piece(first, piece.stop, None, replace(piece.coded, low=low, start=start))
