"""Pasts composed of segments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.runtime.cache.editing.test_splicing import CLOSE, read
from tests.runtime.cache.models import decoder, tokens
from waterfill.runtime.cache.cache import KVCache
from waterfill.runtime.cache.editing.composing import positions_of
from waterfill.types import BudgetError, WaterfillError

LENGTHS = (50, 70, 40, 33)
GRAPH = {2: [0, 1], 3: [1]}


def segments() -> list[torch.Tensor]:
    return [tokens(1, n, seed)[0] for seed, n in enumerate(LENGTHS)]


def test_sources_share_positions_and_targets_follow_the_longest() -> None:
    starts = positions_of(LENGTHS, GRAPH)
    assert [start - starts[0] for start in starts] == [0, 0, 70, 70]
    # The next token, at index 193, is at position 193: 110 after the sources' first.
    assert starts[0] + 110 == sum(LENGTHS)
    assert positions_of((5, 6, 7), {1: [0], 2: [1]}) == [0, 5, 11]


def test_a_chain_is_a_reading_in_order() -> None:
    model, after = decoder(), tokens(1, 30, 9)
    cache, stock = KVCache(model, method="exact"), DynamicCache()
    cache.compose(segments(), {i: range(i) for i in range(4)})
    read(model, torch.cat(segments())[None], stock)
    torch.testing.assert_close(read(model, after, cache), read(model, after, stock), **CLOSE)


@pytest.mark.parametrize("family", ["LlamaConfig", "Qwen3Config", "GPTNeoXConfig"])
def test_the_graph_is_a_block_mask_with_shared_positions(family: str) -> None:
    model, after = decoder(family), tokens(1, 20, 9)
    cache = KVCache(model, method="exact")
    cache.compose(segments(), GRAPH)
    total = sum(LENGTHS)
    assert cache.get_seq_length() == total and cache.coded_layers[0].store.blocks == 5
    mine = read(model, after, cache)
    assert cache.track.positions(total, total + 1).item() == total

    owner = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))
    owner = torch.cat([owner, torch.full((20,), 4)])
    graph = {**GRAPH, 4: [0, 1, 2, 3]}
    sees = torch.tensor([[i == j or j in graph.get(i, ()) for j in range(5)] for i in range(5)])
    mask = torch.ones(total + 20, total + 20, dtype=torch.bool).tril() & sees[owner][:, owner]
    starts = torch.tensor(positions_of(LENGTHS, GRAPH))
    own = torch.cat([torch.arange(n) for n in LENGTHS]) + starts[owner[:total]]
    positions = torch.cat([own, torch.arange(total, total + 20)])
    ids = torch.cat([*segments(), after[0]])[None]
    with torch.no_grad():
        whole = model(
            input_ids=ids, position_ids=positions[None], attention_mask=mask[None, None]
        ).logits
    torch.testing.assert_close(mine, whole[:, total:], **CLOSE)


def test_generation_goes_on() -> None:
    model, question = decoder(), tokens(1, 10, 9)
    ids = torch.cat([*segments(), question[0]])[None]
    options = {"max_new_tokens": 20, "do_sample": False}
    written: list[Any] = []
    for method in ("exact", "channel:bits=8"):
        cache = KVCache(model, method=method)
        cache.compose(segments(), GRAPH)
        written.append(model.generate(ids, past_key_values=cache, **options))
        assert cache.get_seq_length() == ids.shape[1] + 19
    assert torch.equal(*written)


def test_composed_and_then_edited() -> None:
    model, after = decoder(), tokens(1, 20, 9)
    cache = KVCache(model, method="exact")
    cache.compose(segments(), GRAPH)
    before = cache.track.positions(0, sum(LENGTHS))[0]
    cache.splice(60, 80, [])
    assert read(model, after, cache).isfinite().all()
    positions = cache.track.positions(0, cache.get_seq_length())[0]
    # Segments before the edit stay where they are; what follows, and what is read now, is 20 earlier.
    assert torch.equal(positions[:60], before[:60])
    assert torch.equal(positions[60:-20], before[80:] - 20)
    assert torch.equal(positions[-20:], torch.arange(20) + sum(LENGTHS) - 20)


@pytest.mark.parametrize(
    ("family", "graph", "options", "error", "match"),
    [
        ("LlamaConfig", {0: [1]}, {}, WaterfillError, "are before it"),
        ("LlamaConfig", {9: [1]}, {}, WaterfillError, "are before it"),
        ("GPT2Config", {}, {}, WaterfillError, "do not turn"),
        ("MistralConfig", {}, {}, WaterfillError, "attends to 48 tokens"),
        ("LlamaConfig", {}, {"bits": 24, "tokens": 100}, BudgetError, "planned for 100"),
    ],
)
def test_what_cannot_be_composed_is_said(
    family: str, graph: Any, options: Any, error: type[Exception], match: str
) -> None:
    cache = KVCache(decoder(family), method="channel" if options else "exact", **options)
    with pytest.raises(error, match=match):
        cache.compose(segments(), graph)


def test_only_an_empty_cache_is_composed() -> None:
    model = decoder()
    cache = KVCache(model, method="exact")
    with pytest.raises(WaterfillError, match="without tokens"):
        cache.compose([[]], {})
    cache.compose([[5, 6, 7]], {})
    with pytest.raises(WaterfillError, match="empty cache"):
        cache.compose([[5, 6, 7]], {})
