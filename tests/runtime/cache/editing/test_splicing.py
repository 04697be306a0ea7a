"""Edits in place. With one layer, keys and values do not depend on what is before: a splice is a full reading."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.runtime.cache.models import decoder, tokens
from waterfill.runtime.cache.cache import KVCache
from waterfill.runtime.cache.fitting.calibrating import calibrate_cache
from waterfill.runtime.cache.patching import Turned
from waterfill.types import BudgetError, WaterfillError

EDITS = ((50, 60, 5), (0, 3, 10), (100, 180, 40), (10, 10, 100), (250, 260, 0), (200, 200, 3))
CLOSE = {"atol": 3e-4, "rtol": 3e-3}


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, past_key_values=cache).logits
    return found


def edited(ids: torch.Tensor, start: int, stop: int, new: torch.Tensor) -> torch.Tensor:
    return torch.cat([ids[:, :start], new.expand(len(ids), -1), ids[:, stop:]], 1)


def states(cache: KVCache, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and values of a layer."""
    store = cache.coded_layers[layer].store
    parts = [piece.read() for piece in store.pieces()]
    return torch.cat([k for k, _ in parts], 2), torch.cat([v for _, v in parts], 2)


def stock_states(cache: DynamicCache, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    one = cache.layers[layer]
    assert one.keys is not None and one.values is not None
    return one.keys, one.values


@pytest.mark.parametrize("family", ["LlamaConfig", "Qwen3Config", "GPTNeoXConfig", "CohereConfig"])
@pytest.mark.parametrize("rows", [1, 2])
def test_one_layer_after_splices_is_a_full_reading(family: str, rows: int) -> None:
    model = decoder(family, layers=1)
    ids, after = tokens(rows, 300), tokens(rows, 40, seed=5)
    cache = KVCache(model, method="exact")
    read(model, ids, cache)
    for seed, (start, stop, count) in enumerate(EDITS):
        new = tokens(1, count, seed)
        cache.splice(start, stop, new[0] if seed % 2 else new[0].tolist())
        ids = edited(ids, start, stop, new)
        assert cache.get_seq_length() == ids.shape[1]
    stock = DynamicCache(config=model.config)
    read(model, ids, stock)
    for mine, theirs in zip(states(cache), stock_states(stock, 0), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    torch.testing.assert_close(read(model, after, cache), read(model, after, stock), **CLOSE)


@pytest.mark.parametrize("method", ["token:bits=8", "channel:bits=8", "transform:level=1e-9"])
def test_coded_blocks_that_stay_whole_are_not_coded_again(method: str) -> None:
    model, ids = decoder(layers=1), tokens(2, 300)
    own = calibrate_cache(model, tokens(8, 128)) if method.startswith("transform") else None
    cache = KVCache(model, method=method, statistics=own)
    read(model, ids, cache)
    store = cache.coded_layers[0].store
    before = [
        {k: v.clone() for k, v in store.tiers[0].arena.blocks(i, i + 1).items()} for i in range(8)
    ]
    keys, values = states(cache)
    cache.splice(50, 60, tokens(1, 5)[0])
    # Tokens 4 to 36 are block 0; the cut and its rest, 27 tokens, are exact; block 2 is now block 1.
    assert [(patch.after, patch.tokens) for patch in store.patches] == [(1, 27)]
    for old, new in ((0, 0), *((i, i - 1) for i in range(2, 8))):
        for name, part in store.tiers[0].arena.blocks(new, new + 1).items():
            assert name == "turned" or torch.equal(part, before[old][name])
    # Keys turn by -5, values stay.
    rotary = store.facts.rotary
    assert rotary is not None
    moved_keys, moved_values = states(cache)
    torch.testing.assert_close(moved_values[:, :, 55:], values[:, :, 60:])
    torch.testing.assert_close(
        moved_keys[:, :, 55:],
        rotary.turn(keys[:, :, 60:], torch.full((1, 240), -5)),
        atol=1e-5,
        rtol=1e-4,
    )
    assert isinstance(store.tiers[0].coder, Turned) == method.startswith("token")


def test_out_and_in_again_changes_nothing_but_the_context() -> None:
    model, ids = decoder(), tokens(1, 200)
    cache = KVCache(model, method="exact")
    read(model, ids, cache)
    whole = states(cache, 1)
    cache.splice(90, 130, [])
    assert cache.get_seq_length() == 160
    cache.splice(90, 90, ids[0, 90:130])
    assert cache.get_seq_length() == 200
    assert torch.equal(cache.track.positions(0, 200)[0], torch.arange(200))
    # What came back was read over the same prefix; what follows kept what it knew.
    for mine, before in zip(states(cache, 1), whole, strict=True):
        torch.testing.assert_close(mine, before, **CLOSE)


def test_new_tokens_are_read_over_what_is_before_them_only() -> None:
    model, ids, new = decoder(), tokens(1, 150), tokens(1, 20, 3)
    cache = KVCache(model, method="exact")
    read(model, ids, cache)
    cache.splice(70, 80, new[0])
    stock = DynamicCache()
    read(model, torch.cat([ids[:, :70], new], 1), stock)
    for mine, theirs in zip(states(cache, 1), stock_states(stock, 1), strict=True):
        torch.testing.assert_close(mine[:, :, :90], theirs, **CLOSE)


def test_padded_rows_keep_positions_of_their_own() -> None:
    model, ids = decoder(layers=1), tokens(2, 120)
    mask = torch.ones_like(ids)
    mask[1, :13], ids[1, :13] = 0, 0
    cache, new = KVCache(model, method="channel:bits=8"), tokens(2, 9, 4)
    model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2, do_sample=False
    )
    cache.splice(60, 64, new)
    assert cache.track.positions(100, 101).tolist() == [[100], [87]]
    short = torch.cat([ids[1:, 13:60], new[1:], ids[1:, 64:]], 1)
    stock = DynamicCache()
    read(model, short, stock)
    mine = states(cache)[0][1:, :, 13:]
    torch.testing.assert_close(
        mine[:, :, : short.shape[1]], stock.layers[0].keys, atol=0.05, rtol=0.05
    )


def test_many_patches_stay_within_the_size() -> None:
    model = decoder(dtype=torch.bfloat16)
    for method in ("channel", "token"):
        cache = KVCache(model, bits=6, tokens=400, method=method)
        read(model, tokens(1, 390), cache)
        assert cache.budget.nbytes is not None
        for at in range(300, 20, -40):
            cache.splice(at, at + 3, tokens(1, 4)[0])
            assert cache.nbytes <= cache.budget.nbytes
        assert cache.get_seq_length() == 397
        for _ in range(3):
            read(model, tokens(1, 1), cache)
            assert cache.nbytes <= cache.budget.nbytes
        with pytest.raises(BudgetError, match="planned for 400 tokens"):
            cache.splice(10, 10, [5])


def test_a_window_is_edited_where_nothing_is_forgotten() -> None:
    model, ids = decoder("MistralConfig", layers=1), tokens(1, 46)
    cache, new, after = KVCache(model, method="exact"), tokens(1, 30, 3), tokens(1, 30, 4)
    read(model, ids, cache)
    cache.splice(20, 22, new[0])
    assert cache.get_seq_length() == 74
    stock = DynamicCache(config=model.config)
    whole = torch.cat([edited(ids, 20, 22, new), after], 1)
    torch.testing.assert_close(
        read(model, after, cache), read(model, whole, stock)[:, 74:], **CLOSE
    )
    read(model, tokens(1, 120), cache)
    read(model, tokens(1, 1), cache)
    with pytest.raises(WaterfillError, match="has forgotten"):
        cache.splice(150, 160, [])


@pytest.mark.parametrize(
    ("family", "span", "match"),
    [
        ("GPT2Config", (3, 5), "do not turn"),
        ("LlamaConfig", (3, 101), "no tokens"),
        ("LlamaConfig", (5, 3), "no tokens"),
    ],
)
def test_what_cannot_be_edited_is_said(family: str, span: tuple[int, int], match: str) -> None:
    model = decoder(family)
    cache = KVCache(model, method="exact")
    read(model, tokens(2, 100), cache)
    with pytest.raises(WaterfillError, match=match):
        cache.splice(*span, [7])


def test_rows_and_a_past_are_needed() -> None:
    model = decoder()
    cache = KVCache(model, method="exact")
    with pytest.raises(WaterfillError, match="an empty cache"):
        cache.splice(0, 0, [])
    read(model, tokens(2, 20), cache)
    with pytest.raises(WaterfillError, match="3 rows"):
        cache.splice(0, 0, tokens(3, 4))
