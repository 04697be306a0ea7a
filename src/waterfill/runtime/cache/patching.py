"""Cuts a store open at a span of tokens, and closes it again with others in their place.

What a cut touches becomes exact: the rest of the blocks at its two ends, the new tokens, patches beside
it. Whole blocks of these are coded, the few tokens left over lie between blocks as a patch. Blocks that
follow stay as they are coded: keys coded before their rotation get other positions (`Coder.position_free`),
others say with each block how far to turn what is decoded (`Turned`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.held.pieces import Pair
from waterfill.runtime.cache.held.store import CHUNK, Patch, Store, StoreTier
from waterfill.runtime.cache.method import BLOCK, Coded, Coder

__all__ = ["Cut", "Turned", "cut_out", "fit", "put_in"]

TURN = "turned"


@dataclass(frozen=True, eq=False)
class Turned(Coder):
    """Blocks whose keys were coded at positions that they no longer have.

    Parameters
    ----------
    coder : made them, for positions of then
    facts : of the layer
    """

    coder: Coder
    facts: LayerFacts

    def __post_init__(self) -> None:
        object.__setattr__(self, "wants_saliency", self.coder.wants_saliency)

    @property
    def tables(self) -> Mapping[str, torch.Tensor]:
        return self.coder.tables

    def encode(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        saliency: torch.Tensor | None = None,
    ) -> Coded:
        coded = self.coder.encode(keys, values, positions, saliency)
        like = next(iter(coded.values()))
        turned = torch.zeros(like.shape[:2], dtype=torch.int32, device=like.device)
        return {**coded, TURN: turned}

    def decode(self, coded: Coded, positions: torch.Tensor) -> Pair:
        own = {name: part for name, part in coded.items() if name != TURN}
        turned = coded[TURN].cpu().long().repeat_interleave(BLOCK, 1)
        keys, values = self.coder.decode(own, positions - turned)
        return _turn(self.facts, keys, turned), values


@dataclass(frozen=True, eq=False)
class Cut:
    """An open store.

    Attributes
    ----------
    blocks : that lie before the opening
    before, after : exact tokens on either side of it that no block holds any more
    """

    blocks: int
    before: list[Pair]
    after: list[Pair]


def cut_out(store: Store, start: int, stop: int) -> Cut:
    """Take tokens start to stop out, and what is left of their blocks; positions are still the old ones."""
    recent = store.recent_states()
    if store.sinks is not None and start <= store.sink_tokens and start < store.most_sinks:
        store.patches.insert(0, Patch(0, store.sinks))
        store.sinks = None
    if recent is not None and store.held and stop >= store.tokens - store.held:
        store.patches.append(Patch(store.blocks, recent))
        store.held = 0
    low, skip = _blocks_before(store, start)
    whole, into = _blocks_before(store, stop)
    high = whole + (into > 0)
    before, after = [], []
    for at, patch in _patches(store):
        if low <= patch.after <= high:
            before.append(_some(patch.pair, 0, start - at))
            after.append(_some(patch.pair, stop - at, patch.tokens))
    if skip:
        before.append(_some(_block(store, low, start - skip), 0, skip))
    if into:
        after.insert(0, _some(_block(store, whole, stop - into), into, BLOCK))
    store.patches = [
        patch if patch.after < low else replace(patch, after=patch.after - (high - low))
        for patch in store.patches
        if not low <= patch.after <= high
    ]
    _remove(store, low, high)
    return Cut(low, before, after)


def put_in(store: Store, cut: Cut, new: Pair, moved: int) -> None:
    """Close an open store over new tokens.

    Parameters
    ----------
    new : keys and values, keys turned to the positions that the track has by now
    moved : how much later all that follows is than before
    """
    facts = store.facts
    run = _joined([*cut.before, new, *(_later(facts, pair, moved) for pair in cut.after)])
    store.patches = [
        patch if patch.after < cut.blocks else replace(patch, pair=_later(facts, patch.pair, moved))
        for patch in store.patches
    ]
    recent = store.recent_states()
    if recent is not None and store.held:
        store.recent = _fresh(store, _later(facts, recent, moved))
    if cut.blocks == store.blocks:
        recent = store.recent_states()
        store.held = 0
        store.grow(*(run if recent is None else _joined([run, recent])))
        return
    first = not cut.blocks and store.sinks is None and not store.dropped
    if first and min(store.most_sinks, run[0].shape[2]):
        sinks = _some(run, 0, store.most_sinks)
        store.sinks = (sinks[0].clone(), sinks[1].clone())
        run = _some(run, store.most_sinks, run[0].shape[2])
    _turn_blocks(store, cut.blocks, moved)
    _insert(store, cut.blocks, run)


def fit(store: Store, more: int = 0) -> None:
    """Where patches take too much, code the tokens from the last of them on again, once for each.

    Parameters
    ----------
    more : tokens that will come before this is asked again
    """
    if store.most_nbytes is None or not _edited(store):
        return
    token = store.batch * store.facts.token_nbytes
    block = max(tier.arena.block_nbytes for tier in store.tiers)
    coming = min(more, store.recent_room) * token + -(-more // BLOCK) * block
    while store.patches and store.nbytes + coming > store.most_nbytes:
        _close_last(store)
    if store.nbytes > store.most_nbytes:
        _settle_turns(store)


def _close_last(store: Store) -> None:
    """Move the last patch's tokens to the end of all blocks, each block taking some of the one before."""
    patch = store.patches.pop()
    carry, gap = patch.pair, patch.tokens
    for tier, low, high, at in _from_block(store, patch.after):
        n = (high - low) * BLOCK
        old = store.track.positions(at + gap, at + gap + n)
        joined = _joined([carry, tier.coder.decode(tier.arena.blocks(low, high), old)])
        keys, values = _some(joined, 0, n)
        coded = tier.coder.encode(keys, values, store.track.positions(at, at + n))
        tier.arena.overwrite(low, coded)
        carry = _some(joined, n, n + gap)
    recent = store.recent_states()
    store.held = 0
    store.grow(*(carry if recent is None else _joined([carry, recent])))


def _settle_turns(store: Store) -> None:
    """Code blocks that moved again, where they are, so that none has to say that it did."""
    for tier, low, high, at in _from_block(store, 0):
        if isinstance(tier.coder, Turned):
            positions = store.track.positions(at, at + (high - low) * BLOCK)
            pair = tier.coder.decode(tier.arena.blocks(low, high), positions)
            tier.arena.overwrite(low, tier.coder.coder.encode(*pair, positions))
    for tier in store.tiers:
        if isinstance(tier.coder, Turned):
            tier.arena.drop_part(TURN)
            tier.coder = tier.coder.coder


def _insert(store: Store, block: int, run: Pair) -> None:
    """Code whole blocks of exact tokens in front of a block; the rest becomes a patch."""
    n = run[0].shape[2] // BLOCK
    start = store.sink_tokens + store.dropped + block * BLOCK
    start += sum(patch.tokens for patch in store.patches if patch.after < block)
    tier, local = _tier_of(store, block)
    parts = []
    for low in range(0, n * BLOCK, CHUNK * BLOCK):
        high = min(low + CHUNK * BLOCK, n * BLOCK)
        keys, values = _some(run, low, high)
        parts.append(
            tier.coder.encode(keys, values, store.track.positions(start + low, start + high))
        )
    if parts:
        coded = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
        tier.arena.replace(local, local, coded)
    patches = [
        patch if patch.after < block else replace(patch, after=patch.after + n)
        for patch in store.patches
    ]
    left = _some(run, n * BLOCK, run[0].shape[2])
    if left[0].shape[2]:
        patch = Patch(block + n, (left[0].clone(), left[1].clone()))
        patches.insert(sum(p.after < block for p in store.patches), patch)
    store.patches = patches


def _turn_blocks(store: Store, block: int, moved: int) -> None:
    """Have the blocks from this one on say that they moved, where their coders must be told."""
    if not moved:
        return
    for tier in {id(tier): tier for tier, *_ in _from_block(store, block)}.values():
        if not tier.coder.position_free and not isinstance(tier.coder, Turned):
            tier.coder = Turned(tier.coder, store.facts)
            tier.arena.add_part(TURN, torch.int32)
    for tier, low, high, _ in _from_block(store, block):
        if isinstance(tier.coder, Turned):
            for run in tier.arena.runs(low, high):
                run[TURN].add_(moved)


def _from_block(store: Store, block: int) -> Iterator[tuple[StoreTier, int, int, int]]:
    """Blocks from this one on, some of a tier at a time: tier, first and last there, index of the first token."""
    at, done = store.sink_tokens + store.dropped, 0
    for part in store.middle():
        if isinstance(part, Patch):
            at += part.tokens
            continue
        tier, low, high = part
        skip = min(max(0, block - done), high - low)
        for some in range(low + skip, high, CHUNK):
            yield tier, some, min(some + CHUNK, high), at + (some - low) * BLOCK
        at, done = at + (high - low) * BLOCK, done + high - low


def _tier_of(store: Store, block: int) -> tuple[StoreTier, int]:
    """The tier that holds a block, and the block's place there."""
    for tier in reversed(store.tiers):
        if block < tier.arena.count:
            return tier, block
        block -= tier.arena.count
    raise IndexError(block)


def _block(store: Store, block: int, start: int) -> Pair:
    """Exact keys and values of one block whose first token is at index `start`."""
    tier, local = _tier_of(store, block)
    positions = store.track.positions(start, start + BLOCK)
    keys, values = tier.coder.decode(tier.arena.blocks(local, local + 1), positions)
    return keys.clone(), values.clone()  # they may be the arena's own


def _remove(store: Store, low: int, high: int) -> None:
    for tier in reversed(store.tiers):
        count = tier.arena.count
        first, last = max(0, min(low, count)), max(0, min(high, count))
        if first < last:
            tier.arena.replace(first, last, None)
        low, high = low - count, high - count


def _edited(store: Store) -> bool:
    return bool(store.patches) or any(isinstance(tier.coder, Turned) for tier in store.tiers)


def _patches(store: Store) -> Iterator[tuple[int, Patch]]:
    """Patches, each with the index of its first token."""
    at, done = store.sink_tokens + store.dropped, 0
    for patch in store.patches:
        at += (patch.after - done) * BLOCK
        yield at, patch
        at, done = at + patch.tokens, patch.after


def _blocks_before(store: Store, index: int) -> tuple[int, int]:
    """How many blocks end before a token, and how many tokens of its own block do."""
    at, done = store.sink_tokens + store.dropped, 0
    for first, patch in _patches(store):
        if index < first:
            break
        at, done = first + patch.tokens, patch.after
        if index < at:
            return done, 0
    whole, into = divmod(index - at, BLOCK)
    return done + whole, into


def _later(facts: LayerFacts, pair: Pair, moved: int) -> Pair:
    """Exact tokens at positions so much later."""
    if not moved:
        return pair
    return _turn(facts, pair[0], torch.full((1, pair[0].shape[2]), moved)), pair[1]


def _turn(facts: LayerFacts, keys: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    if facts.rotary is None or not angle.any():
        return keys
    return facts.rotary.turn(keys.float(), angle).to(keys.dtype)


def _fresh(store: Store, pair: Pair) -> Pair:
    """New buffers for recent tokens: a view may still show the old."""
    assert store.recent is not None
    buffers = torch.empty_like(store.recent[0]), torch.empty_like(store.recent[1])
    for buffer, states in zip(buffers, pair, strict=True):
        buffer[:, :, : states.shape[2]] = states
    return buffers


def _some(pair: Pair, low: int, high: int) -> Pair:
    """Tokens low to high, as far as there are any."""
    some = slice(max(0, low), max(0, high))
    return pair[0][:, :, some], pair[1][:, :, some]


def _joined(pairs: list[Pair]) -> Pair:
    keys, values = zip(*pairs, strict=True)
    return torch.cat(keys, 2), torch.cat(values, 2)
