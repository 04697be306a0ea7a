"""Edits what a model has read, in place: a span of tokens out, others in.

What follows is not read again: its keys are turned to their new positions (He et al. 2024, positional
integrity encoding, arXiv 2407.03157). New tokens are read by the model over what comes before them. What
follows keeps what it took from the old text, so the result is near a full reading, not equal to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from waterfill.runtime.cache.editing.replaying import Past, ids_of, read_tokens
from waterfill.runtime.cache.held.pieces import Pair
from waterfill.runtime.cache.held.store import Store
from waterfill.runtime.cache.layer import CodedLayer, CodedSlidingLayer
from waterfill.runtime.cache.patching import cut_out, fit, put_in
from waterfill.types import WaterfillError

if TYPE_CHECKING:
    from waterfill.runtime.cache.cache import KVCache

__all__ = ["editable", "splice"]


def splice(cache: KVCache, start: int, stop: int, new_tokens: Sequence[int] | torch.Tensor) -> None:
    """Put other tokens in the place of tokens `start` to `stop` of a cache.

    Parameters
    ----------
    start, stop : indices of tokens; equal: nothing is taken out
    new_tokens : int (tokens,) for all rows alike, or (batch, tokens); none: nothing is put in

    Raises
    ------
    WaterfillError
        If the span is not within the cache, or a layer cannot be edited: its keys turn in no known way,
        it is of another kind, or its window would show tokens that it has forgotten.
    BudgetError
        If the tokens are then more than the cache was planned for.
    """
    tokens = cache.get_seq_length()
    if not 0 <= start <= stop <= tokens:
        raise WaterfillError(f"no tokens {start} to {stop} in a cache of {tokens}")
    stores = editable(cache)
    batch = max(store.batch for store in stores)
    if not batch:
        raise WaterfillError("an empty cache has nothing to edit")
    ids = ids_of(cache.model, new_tokens)
    ids = ids.reshape(1, -1) if ids.dim() < 2 else ids
    if len(ids) not in (1, batch):
        raise WaterfillError(f"{len(ids)} rows of new tokens for a cache of {batch}")
    count = ids.shape[1]
    moved = count - (stop - start)
    cache.check_room(tokens + moved)
    for store in stores:
        _check_window(store, start, tokens + moved)
    if start == stop and not count:
        return
    track = cache.track.copy()
    track.splice(start, stop, count)
    new: list[Pair] = [_nothing(store) for store in stores]
    if count:
        pasts = {store.facts.index: Past.of(store, start) for store in stores}
        read_tokens(
            cache.model,
            pasts,
            cache.layers,
            ids.expand(batch, -1),
            track.positions(0, start + count),
        )
        new = [pasts[store.facts.index].states(start, start + count) for store in stores]
    cuts = [cut_out(store, start, stop) for store in stores]
    cache.track.splice(start, stop, count)
    for store, cut, states in zip(stores, cuts, new, strict=True):
        put_in(store, cut, states, moved)
        fit(store)
    for layer in cache.coded_layers:
        if isinstance(layer, CodedSlidingLayer):
            layer.cumulative_length += moved


def editable(cache: KVCache) -> list[Store]:
    """Stores of all layers, committed; or a word on what cannot be edited."""
    stores = []
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, (CodedLayer, CodedSlidingLayer)):
            raise WaterfillError(f"layer {index} keeps a state that cannot be edited")
        layer.commit()
        if layer.store.facts.rotary is None:
            raise WaterfillError(f"keys of layer {index} do not turn with positions in a known way")
        if not layer.store.whole:
            raise WaterfillError(f"layer {index} has evicted tokens, so it cannot be edited")
        stores.append(layer.store)
    return stores


def _check_window(store: Store, start: int, after: int) -> None:
    """Refuse what would show tokens that a layer with a window has forgotten, before or after the edit."""
    first = store.sink_tokens + store.dropped
    facts = store.facts
    if store.dropped and (
        start < first or min(facts.first_visible(start), facts.first_visible(after)) < first
    ):
        raise WaterfillError(
            f"layer {facts.index} attends to {facts.window} tokens and has forgotten those before "
            f"{first:,}, which it would have to see again"
        )


def _nothing(store: Store) -> Pair:
    assert store.recent is not None
    keys, values = store.recent
    return keys[:, :, :0], values[:, :, :0]
