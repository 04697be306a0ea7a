"""Composes a past from segments that each read only what a graph lets them.

Wang et al. 2025, Graph-KV, arXiv 2506.07334. A segment attends to itself and to the segments that are
listed as its sources, which is the block mask of the graph. Segments without sources share a range of
positions; a target's begin where its longest source ends. So no source is nearer to its target than
another, and long contexts take few positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from waterfill.runtime.cache.editing.replaying import Past, ids_of, read_tokens
from waterfill.runtime.cache.editing.splicing import editable
from waterfill.runtime.cache.held.pieces import Pair
from waterfill.runtime.cache.layer import CodedSlidingLayer
from waterfill.types import WaterfillError

if TYPE_CHECKING:
    from waterfill.runtime.cache.cache import KVCache

__all__ = ["compose", "positions_of"]


def positions_of(lengths: Sequence[int], graph: Mapping[int, Sequence[int]]) -> list[int]:
    """Position of the first token of each segment.

    All are moved so that the token after the last segment has as its position how many there are before
    it, as it would have by itself; only distances count.

    Parameters
    ----------
    lengths : tokens of each segment
    graph : segment -> its sources, all before it
    """
    starts: list[int] = []
    for i, _ in enumerate(lengths):
        ends = [starts[j] + lengths[j] for j in graph.get(i, ())]
        starts.append(max(ends, default=0))
    span = max(start + length for start, length in zip(starts, lengths, strict=True))
    return [start + sum(lengths) - span for start in starts]


def compose(
    cache: KVCache,
    segments: Sequence[Sequence[int] | torch.Tensor],
    graph: Mapping[int, Sequence[int]],
) -> None:
    """Fill an empty cache with segments, each read once over its sources.

    What is generated then attends to all of them, and has the positions it would have by itself.

    Parameters
    ----------
    segments : tokens of each, in the order in which they will lie in the cache
    graph : index of a segment -> indices of its sources, all before it; absent: it reads only itself

    Raises
    ------
    WaterfillError
        If the cache is not empty, the graph is none of this kind, keys of a layer turn in no known way,
        or its window is shorter than all segments together.
    BudgetError
        If the tokens are more than the cache was planned for.
    """
    ids = [ids_of(cache.model, s).reshape(1, -1) for s in segments]
    lengths = [one.shape[1] for one in ids]
    total = sum(lengths)
    _check(cache, lengths, graph)
    cache.check_room(total)
    stores = {store.facts.index: store for store in editable(cache)}
    for index, store in stores.items():
        window = store.facts.window
        if window is not None and total > window:
            raise WaterfillError(f"layer {index} attends to {window} tokens, fewer than {total}")
    starts = positions_of(lengths, graph)
    places = [torch.arange(n)[None] + start for n, start in zip(lengths, starts, strict=True)]
    last_use = {j: i for i in sorted(graph) for j in graph[i]}
    exact: dict[int, dict[int, Pair]] = {}
    for i, one in enumerate(ids):
        sources = sorted(set(graph.get(i, ())))
        pasts = {index: Past(store.facts) for index, store in stores.items()}
        for j in sources:
            for index, past in pasts.items():
                past.show(exact[j][index])
        positions = torch.cat([*(places[j] for j in sources), places[i]], 1)
        read_tokens(cache.model, pasts, cache.layers, one, positions)
        exact[i] = {
            index: past.states(past.tokens - lengths[i], past.tokens)
            for index, past in pasts.items()
        }
        for index, store in stores.items():
            store.append(*exact[i][index], places[i])
        for j in [j for j in exact if last_use.get(j, -1) <= i]:
            del exact[j]
    for layer in cache.coded_layers:
        if isinstance(layer, CodedSlidingLayer):
            layer.cumulative_length += total


def _check(cache: KVCache, lengths: Sequence[int], graph: Mapping[int, Sequence[int]]) -> None:
    if cache.get_seq_length():
        raise WaterfillError("segments are composed in an empty cache")
    if not lengths or not all(lengths):
        raise WaterfillError("segments without tokens cannot be composed")
    for target, sources in graph.items():
        if not 0 <= target < len(lengths) or not all(0 <= j < target for j in sources):
            raise WaterfillError(f"sources of segment {target} are before it, not {list(sources)}")
