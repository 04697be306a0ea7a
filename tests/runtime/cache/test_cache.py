"""The cache under transformers: what it gives, what it holds, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.runtime.cache.models import FAMILIES, decoder, statistics, tokens
from waterfill.runtime.cache.cache import KVCache
from waterfill.types import BudgetError, SpecError, WaterfillError


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, cache: Any, steps: tuple[int, ...]) -> torch.Tensor:
    found, at = [], 0
    for step in steps:
        found.append(model(input_ids=ids[:, at : at + step], past_key_values=cache).logits)
        at += step
    return torch.cat(found, 1)


STEPS = (70, 1, 1, 1, 40, 1, 33, 1, 1, 2, 49)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_blocks_are_the_stock_cache(family: str) -> None:
    model, ids = decoder(family), tokens(2, sum(STEPS))
    mine = logits(model, ids, KVCache(model, method="exact"), STEPS)
    stock = logits(model, ids, DynamicCache(config=model.config), STEPS)
    torch.testing.assert_close(mine, stock, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("method", ["exact", "channel:bits=8"])
def test_generate_writes_the_same(method: str) -> None:
    model, ids = decoder(), tokens(2, 60)
    options = {"max_new_tokens": 60, "do_sample": False, "num_beams": 3}
    mine = model.generate(ids, past_key_values=KVCache(model, method=method), **options)
    assert torch.equal(mine, model.generate(ids, **options))


def test_padded_rows_have_positions_of_their_own() -> None:
    model, ids = decoder(), tokens(2, 90)
    mask = torch.ones_like(ids)
    mask[1, :13], ids[1, :13] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False}
    cache = KVCache(model, method="channel:bits=8")
    mine = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(mine, model.generate(ids, **options))
    assert cache.track.positions(80, 81).tolist() == [[80], [67]]


@pytest.mark.parametrize("method", ["channel", "transform"])
@pytest.mark.parametrize("bits", [8.0, 5.5])
def test_the_size_is_kept_at_every_length(method: str, bits: float) -> None:
    model = decoder(dtype=torch.bfloat16)
    own = statistics() if method == "transform" else None
    cache = KVCache(model, bits=bits, tokens=400, batch=2, method=method, statistics=own)
    numbers = 2 * 2 * (16 + 16)
    assert cache.budget.nbytes == int(bits * numbers / 8 * 400 * 2)
    most, at = 0, 0
    ids = tokens(2, 400)
    for step in (100, *[1] * 40, 100, *[7] * 20, 20):
        logits(model, ids[:, at : at + step], cache, (step,))
        at, most = at + step, max(most, cache.nbytes)
    assert at == 400 and most <= cache.budget.nbytes
    with pytest.raises(BudgetError, match="planned for 400 tokens"):
        logits(model, ids[:, :1], cache, (1,))


@pytest.mark.parametrize("length", [1, 4, 5, 20, 37, 38, 39, 70])
def test_short_caches_keep_to_the_least_size_that_is_named(length: int) -> None:
    model, ids = decoder(), tokens(1, length)
    with pytest.raises(BudgetError, match=r"a cache of 1 bytes .* is too small") as raised:
        KVCache(model, 1, tokens=length)
    found = re.search(r"take ([\d,]+)", str(raised.value))
    assert found is not None
    least = int(found[1].replace(",", ""))
    cache, most = KVCache(model, least, tokens=length, guard=None), 0
    for i in range(length):
        logits(model, ids[:, i : i + 1], cache, (1,))
        most = max(most, cache.nbytes)
    assert most <= least
    with pytest.raises(BudgetError, match=f"take {least:,};"):
        KVCache(model, least - 1, tokens=length)


def test_more_bytes_harm_less() -> None:
    model, ids = decoder(), tokens(1, 300)
    exact = logits(model, ids, DynamicCache(), (100, *[20] * 10)).log_softmax(-1)
    harms = []
    for bits in (6, 8, 10):
        cache = KVCache(model, bits=bits, tokens=300, method="transform", statistics=statistics())
        coded = logits(model, ids, cache, (100, *[20] * 10)).log_softmax(-1)
        harms.append(float((exact.exp() * (exact - coded)).sum(-1).mean()))
        assert sum(c.nats for c in cache.choices.values() if c.nats is not None) > 0
    assert harms[0] > harms[1] > harms[2] > 0


def test_cropped_and_reset() -> None:
    model, ids = decoder(), tokens(1, 200)
    cache = KVCache(model, method="exact")
    logits(model, ids, cache, (200,))
    cache.crop(131)
    assert cache.get_seq_length() == 131
    cache.crop(-31)
    assert cache.get_seq_length() == 100
    again = logits(model, ids[:, 100:], cache, (60, 1, 39))
    torch.testing.assert_close(
        again, logits(model, ids, DynamicCache(), (200,))[:, 100:], atol=2e-4, rtol=2e-3
    )
    cache.reset()
    assert cache.get_seq_length() == 0
    logits(model, ids, cache, (40, 1))
    assert cache.get_seq_length() == 41


def test_attention_of_others_gets_tensors() -> None:
    model = decoder("Qwen2Config")
    ids = tokens(1, 150)
    cache = KVCache(model, method="exact")
    logits(model, ids, cache, (100,))
    for config in {
        id(m.config): m.config for m in model.modules() if hasattr(m, "config")
    }.values():
        config._attn_implementation = "eager"
    try:
        mine = logits(model, ids[:, 100:], cache, (1, 49))
        stock = logits(model, ids, DynamicCache(), (150,))[:, 100:]
    finally:
        model.set_attn_implementation("sdpa")
    torch.testing.assert_close(mine, stock, atol=2e-4, rtol=2e-3)
    assert cache.get_seq_length() == 150


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"size": 1000}, BudgetError, "the cheapest rungs take"),
        ({"size": "1MB", "bits": 3}, WaterfillError, "one of size"),
        ({"method": "nothing"}, SpecError, "no cache method"),
        ({"method": "channel:bits=9"}, SpecError, "bits must be"),
        ({"method": "channel:colour=9"}, SpecError, "not an option"),
        ({"method": "transform"}, WaterfillError, "needs statistics"),
    ],
)
def test_misuse_is_told(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        KVCache(decoder(), **arguments)
