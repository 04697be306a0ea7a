"""The cache in every way that transformers writes a text: each the same as with its own cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.runtime.cache.models import FAMILIES, MIXED, decoder, tokens
from waterfill.runtime.cache.cache import KVCache
from waterfill.types import BudgetError, WaterfillError

# Beyond the windows of those that have them, in coded blocks; the last is read by others' attention.
KINDS = [
    kind
    for kind in ("LlamaConfig", "Gemma2Config", "Qwen2Config sliding", "GPTNeoConfig", *MIXED[:1])
    if kind in FAMILIES
]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "beam samples": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
}


def write(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    given = {} if cache is None else {"past_key_values": cache}
    options = {"max_new_tokens": 50, "do_sample": False, **options}
    return model.generate(ids, **given, **options)  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_text(kind: str, mode: str) -> None:
    model, ids = decoder(kind), tokens(2, 100)
    mask = torch.ones_like(ids)
    if "Next" not in kind:  # padding goes through the states of linear attention
        mask[1, :13], ids[1, :13] = 0, 0
    options = {"attention_mask": mask, **MODES[mode]}
    cache = KVCache(model, method="exact")
    assert torch.equal(write(model, ids, cache, **options), write(model, ids, None, **options))
    assert any(layer.store.coded_tokens for layer in cache.coded_layers)


@pytest.mark.parametrize("kind", ["LlamaConfig", "GPTNeoConfig"])
@pytest.mark.parametrize("way", ["lookup", "assistant"])
def test_drafts_are_taken_back(kind: str, way: str) -> None:
    model = decoder(kind)
    ids = tokens(1, 30).repeat(1, 4)
    options = {"lookup": {"prompt_lookup_num_tokens": 4}, "assistant": {"assistant_model": model}}
    # Older transformers takes drafts only where a token ends the text.
    mine = write(model, ids, KVCache(model, method="exact"), eos_token_id=0, **options[way])
    assert torch.equal(mine, write(model, ids, None, eos_token_id=0))


def test_a_window_that_records_goes_back_and_stays_small() -> None:
    model, ids = decoder("MistralConfig"), tokens(1, 400)
    cache = KVCache(model, method="exact")
    with torch.no_grad():
        model(input_ids=ids[:, :200], past_key_values=cache)
        for layer in cache.coded_layers:
            layer.record_past = True
        model(input_ids=ids[:, 200:260], past_key_values=cache)
        cache.crop(-60)
        assert cache.get_seq_length() == 200
        mine = model(input_ids=ids[:, 200:], past_key_values=cache).logits
        whole = model(input_ids=ids, past_key_values=DynamicCache(config=model.config)).logits
    torch.testing.assert_close(mine, whole[:, 200:], atol=2e-4, rtol=2e-3)
    cache.crop(-1)
    assert all(layer.store.coded_tokens <= 48 + 32 for layer in cache.coded_layers)


def test_what_left_a_window_is_not_made_up() -> None:
    model, ids = decoder("MistralConfig"), tokens(1, 300)
    cache = KVCache(model, method="exact")
    with torch.no_grad():
        for some in ids.split(50, 1):
            model(input_ids=some, past_key_values=cache)
    with pytest.raises(WaterfillError, match="cannot come back"):
        cache.crop(100)
    assert cache.get_seq_length() == 300


def test_a_conversation_goes_on() -> None:
    model, first, more = decoder(), tokens(1, 80), tokens(1, 20, seed=1)
    mine, own = KVCache(model, method="exact"), DynamicCache(config=model.config)
    texts = []
    for cache in (mine, own):
        text = write(model, first, cache)
        texts.append(write(model, torch.cat([text, more], 1), cache))
    assert torch.equal(*texts) and mine.get_seq_length() == own.get_seq_length()


def test_rows_are_repeated_and_chosen() -> None:
    model, ids = decoder(), tokens(2, 120)
    more = tokens(4, 5, seed=1)
    out = []
    for cache in (KVCache(model, method="exact"), DynamicCache(config=model.config)):
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache)
            cache.batch_repeat_interleave(3)
            cache.batch_select_indices(torch.tensor([0, 2, 3, 5]))
            out.append(model(input_ids=more, past_key_values=cache).logits)
    torch.testing.assert_close(*out, atol=2e-4, rtol=2e-3)


def test_a_loop_under_autograd_writes_the_same() -> None:
    model, ids = decoder(), tokens(1, 120)
    mine, own = KVCache(model, method="exact"), DynamicCache(config=model.config)
    for some in (ids[:, :90], ids[:, 90:91], ids[:, 91:]):
        found, want = (
            model(input_ids=some, past_key_values=cache).logits.detach() for cache in (mine, own)
        )
        torch.testing.assert_close(found, want, atol=2e-4, rtol=2e-3)
    assert mine.nbytes == sum(layer.store.nbytes for layer in mine.coded_layers) + mine.track.nbytes


def test_more_rows_than_were_planned_for() -> None:
    model = decoder()
    cache = KVCache(model, bits=12, tokens=200)
    with pytest.raises(BudgetError, match=r"planned for rows: 1, and 3 come.*batch=3"):
        write(model, tokens(1, 40), cache, num_beams=3)
