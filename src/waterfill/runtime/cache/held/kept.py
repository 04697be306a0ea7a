"""A layer's memory that holds some tokens of each head, and not the others.

Each row of the batch and each head of keys has its own tokens, in the order of their index. A slot may stand
for several tokens that were merged: its weight says how many, and adds its logarithm to the scores. Which
tokens stay is the method's to say (`evicting.Evictor`); what attention they received is counted here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.held.attending import SCORES
from waterfill.runtime.cache.held.pieces import Piece
from waterfill.runtime.cache.held.store import Store
from waterfill.runtime.cache.held.track import Track
from waterfill.runtime.cache.method import BLOCK

__all__ = ["SLOT_NBYTES", "Held", "KeptStore", "Moment", "attention_received", "batch_of"]

SLOT_NBYTES = 16  # of a head's slot, beside key and value: index, weight, mass, late
NONE = -1  # index of a slot without a token


@dataclass(frozen=True, eq=False)
class Held:
    """Slots of all rows and heads, in the order of their index.

    Attributes
    ----------
    keys, values : (batch, heads, slots, width)
    index : int32 (batch, heads, slots), of the token; -1: none
    weight : float32 (batch, heads, slots), tokens it stands for, at least 1
    mass : float32 (batch, heads, slots), attention received since it came, summed over queries
    late : float32 (batch, heads, slots), mean attention of the last queries
    """

    keys: torch.Tensor
    values: torch.Tensor
    index: torch.Tensor
    weight: torch.Tensor
    mass: torch.Tensor
    late: torch.Tensor

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor, start: int) -> Held:
        """New tokens, the first of which has index `start`."""
        batch, heads, n, _ = keys.shape
        index = torch.arange(start, start + n, dtype=torch.int32, device=keys.device)
        weight = keys.new_ones((batch, heads, n), dtype=torch.float32)
        zeros = torch.zeros_like(weight)
        shape = (batch, heads, n)
        return cls(keys, values, index.expand(shape), weight, zeros, zeros.clone())

    @property
    def slots(self) -> int:
        """Slots of each head."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Of each attribute."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Held:
        """With a change to each tensor."""
        return Held(*(change(t) for t in self.tensors()))

    def take(self, slots: torch.Tensor) -> Held:
        """These slots, int64 (batch, heads, n), of each head, as they are ordered."""
        return self.each(
            lambda t: t.gather(
                2, slots if t.dim() == 3 else slots[..., None].expand(-1, -1, -1, t.shape[3])
            )
        )

    def first(self, slots: int) -> Held:
        """A view of the first so many slots."""
        return self.each(lambda t: t[:, :, :slots])

    def room_for(self, slots: int) -> Held:
        """A copy with room for so many slots in all, those beyond its own undefined."""

        def copy(t: torch.Tensor) -> torch.Tensor:
            made = t.new_empty((*t.shape[:2], slots, *t.shape[3:]))
            made[:, :, : t.shape[2]] = t
            return made

        return self.each(copy)

    def followed_by(self, more: Held) -> Held:
        """With other slots behind."""
        pairs = zip(self.tensors(), more.tensors(), strict=True)
        return Held(*(torch.cat(pair, 2) for pair in pairs))


@dataclass(frozen=True, eq=False)
class Moment:
    """What a method may know when it evicts.

    Attributes
    ----------
    keep : slots that stay
    prompt : whether several tokens came at once
    forced : bool (batch, heads, slots), sinks and recent tokens, which stay as they are
    gone : bool (batch, heads, slots), padding, tokens that no window sees any more, empty slots
    age : int32 (batch, heads, slots), tokens since each
    """

    keep: int
    prompt: bool
    forced: torch.Tensor
    gone: torch.Tensor
    age: torch.Tensor

    def ranked(self, importance: torch.Tensor) -> torch.Tensor:
        """Importance, not below 0, with what stays above all others, and what goes below, oldest last."""
        high = importance.masked_fill(self.forced, torch.inf)
        return torch.where(self.gone, -1.0 - self.age, high)


def batch_of(capacity: int) -> int:
    """Tokens that are evicted at once: blocks, or less where capacity is a few blocks only."""
    return min(BLOCK, max(1, capacity // 16))


class KeptStore(Store):
    """Holds at most so many slots of each head.

    Cropped, it forgets the tokens after; those that were evicted from before do not come back, and what was
    merged stays merged.

    Parameters
    ----------
    facts : of the layer
    evict : which slots stay, and what becomes of the others
    track : positions of tokens, shared by all layers
    capacity : slots of each head, at most
    sinks, recent : tokens that stay as they are, at the beginning and at the end
    late : last queries whose attention is told apart
    """

    whole = False

    def __init__(
        self,
        facts: LayerFacts,
        evict: Callable[[Held, Moment], Held],
        track: Track,
        capacity: int,
        sinks: int,
        recent: int,
        late: int,
    ) -> None:
        self.evict, self.capacity, self.late = evict, capacity, late
        super().__init__(facts, [], track, sinks, recent)

    def clear(self) -> None:
        """Forget everything."""
        super().clear()
        self.count = 0  # tokens so far
        self.room: Held | None = None  # its first `used` slots count
        self.used = 0

    @property
    def kept(self) -> Held | None:
        """The slots in use; None before the first token."""
        return None if self.room is None else self.room.first(self.used)

    @property
    def tokens(self) -> int:
        """Tokens so far, also those that were evicted."""
        return self.count

    @property
    def batch(self) -> int:
        """Rows of the batch; 0 before the first token."""
        return 0 if self.room is None else self.room.keys.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots that there is room for."""
        return 0 if self.room is None else self.room.nbytes

    # -- reading -------------------------------------------------------------------------------

    def runs(self, first: int = 0) -> tuple[Piece, ...]:
        """All slots as one piece, whatever `first`: attention hides what lies before it."""
        kept = self.kept
        if kept is None or not self.used:
            return ()
        pair = kept.keys, kept.values
        return (Piece(0, self.count, lambda: pair, index=kept.index, bias=kept.weight.log()),)

    # -- growing -------------------------------------------------------------------------------

    def settle(self, coming: int = 0) -> None:
        """Nothing: room is made as tokens come."""

    def append(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor | None = None,
        queries: torch.Tensor | None = None,
    ) -> None:
        """Take new tokens, and evict others where there are more than there is room for.

        Parameters
        ----------
        keys, values : (batch, heads, tokens, width)
        positions : int64 (batch or 1, tokens); None: as many as there are tokens before
        queries : (batch, query heads, tokens, width) that asked for them, to be scaled by width ** -0.5;
            None: unknown, and no attention is counted
        """
        with torch.no_grad():
            start, m = self.count, keys.shape[2]
            self.track.extend(start, m, positions)
            self.count += m
            joined = self._joined(Held.of(keys, values, start))
            if queries is not None:
                self._observe(joined, queries, start)
            if joined.slots > self.capacity:
                self._hold(self.evict(joined, self._moment(joined, m > 1)))

    def _joined(self, more: Held) -> Held:
        """All slots, the new ones behind; where there are too many, they are in no room yet."""
        n, kept = self.used + more.slots, self.kept
        if n > self.capacity:
            return more if kept is None else kept.followed_by(more)
        if self.room is None or n > self.room.slots:
            # A view may still show the old room, so that is left as it is.
            self._hold(more if kept is None else kept.followed_by(more))
        else:
            for own, new in zip(self.room.tensors(), more.tensors(), strict=True):
                own[:, :, self.used : n] = new
            self.used = n
        kept = self.kept
        assert kept is not None
        return kept

    def _hold(self, held: Held) -> None:
        """From now on these slots, with an eighth to spare."""
        spare = held.slots // 8 + BLOCK
        self.room = held.room_for(min(self.capacity, held.slots + spare))
        self.used = held.slots

    def _padding(self, device: torch.device) -> torch.Tensor:
        """int64 (batch or 1, 1, 1), tokens of padding that each row begins with."""
        return self.track.padding().to(device)[:, None, None]

    def _observe(self, held: Held, queries: torch.Tensor, start: int) -> None:
        """Count what attention the slots receive from queries, the first of which has index `start`."""
        total, late = attention_received(
            held, queries, start, self._padding(held.index.device), self.facts.window, self.late
        )
        held.mass.add_(total)
        m = min(queries.shape[2], self.late)
        held.late.mul_(1 - m / self.late).add_(late / self.late)

    def _moment(self, held: Held, prompt: bool) -> Moment:
        age = self.count - held.index
        place = held.index - self._padding(held.index.device)
        gone = (held.index < 0) | (place < 0)
        if self.facts.window is not None:
            gone |= age >= self.facts.window
        forced = (place < self.most_sinks) | (age <= self.least_recent)
        return Moment(self.capacity - batch_of(self.capacity), prompt, forced, gone, age)

    # -- editing -------------------------------------------------------------------------------

    def keep(self, tokens: int) -> None:
        """Forget all but the first so many tokens; what was evicted or merged before stays so."""
        if tokens >= self.count:
            return
        kept, self.count = self.kept, tokens
        self.track.keep(tokens)
        if kept is not None:
            stays = (kept.index >= 0) & (kept.index < tokens)
            most = int(stays.sum(2).max())
            # Heads lost different numbers: empty slots come first, so that the order stays.
            order = stays.to(torch.int8).argsort(dim=2, stable=True)[:, :, kept.slots - most :]
            found = kept.take(order)
            found.index.masked_fill_(~stays.gather(2, order), NONE)
            self._hold(found)

    def drop_before(self, first: int) -> None:
        """Nothing: tokens that no window sees any more are the first to be evicted."""

    def rows(self, index: torch.Tensor) -> None:
        """Take rows of the batch, in this order, any of them more than once."""
        if self.room is not None:
            self.room = self.room.each(lambda t: t.index_select(0, index.to(t.device)))


def attention_received(
    held: Held,
    queries: torch.Tensor,
    start: int,
    padding: torch.Tensor,
    window: int | None,
    late: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention that each slot receives, a mean over the query heads that share its head of keys.

    Parameters
    ----------
    queries : (batch, query heads, m, width), the first of which has index `start`
    padding : int64 (batch or 1, 1, 1), tokens that each row begins with and that do not count
    window : tokens that a query sees, its own included; None: all
    late : last queries that are told apart

    Returns
    -------
    float32 (batch, heads, slots) twice: the sum over all queries, and over the last `late` of them
    """
    batch, heads, slots = held.index.shape
    m, width = queries.shape[2:]
    grouped = queries.reshape(batch, heads, -1, m, width)
    keys, bias = held.keys.float().transpose(2, 3), held.weight.log()[:, :, None, None]
    total, last = torch.zeros_like(held.mass), torch.zeros_like(held.mass)
    most = max(1, SCORES // max(1, batch * queries.shape[1] * slots))
    split = max(0, m - late)
    edges = sorted({*range(0, m, most), split, m})
    index = held.index[:, :, None]
    for low, high in itertools.pairwise(edges):
        at = torch.arange(start + low, start + high, device=keys.device)[:, None]
        hidden = (index > at) | (index < padding[..., None])
        if window is not None:
            hidden |= index <= at - window
        # Queries of a group lie behind each other, so that keys are not repeated for each.
        q = grouped[:, :, :, low:high].flatten(2, 3).float() * width**-0.5
        scores = (q @ keys).view(batch, heads, -1, high - low, slots).add_(bias)
        scores = scores.masked_fill_(hidden[:, :, None], -torch.inf)
        # A query of padding sees nothing at all.
        received = scores.softmax(-1).nan_to_num_(0.0).mean(2).sum(2)
        total += received
        if low >= split:
            last += received
    return total, last
