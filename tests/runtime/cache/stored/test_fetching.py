"""A real file over a simulated link: levels and recomputation mixed, and the cache goes on from there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runtime.cache.models import decoder, tokens
from waterfill.coding.cachegen_file import Reader
from waterfill.runtime.cache.cache import KVCache
from waterfill.runtime.cache.stored import link
from waterfill.runtime.cache.stored.fetching import fetch
from waterfill.runtime.cache.stored.link import RECOMPUTE, Choice
from waterfill.types import FormatError, WaterfillError

TOKENS = 4140  # three chunks
LEVELS = ["exact", 1e-7, 1e-4]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, torch.Tensor, Path]:
    model, ids = decoder(), tokens(1, TOKENS)
    cache = KVCache(model, method="exact")
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    path = tmp_path_factory.mktemp("stored") / "prefix.kv"
    cache.save(path, ids, LEVELS)
    return model, ids, path


def steady(rate: float) -> Callable[[bytes], tuple[bytes, float]]:
    return lambda data: (data, len(data) / rate)


def run(
    stored: tuple[Any, torch.Tensor, Path], carry: Any, **options: Any
) -> tuple[KVCache, list[Choice]]:
    model, ids, path = stored
    stream = KVCache.stream(model, token_ids=ids)
    with Reader(path) as reader:
        choices = fetch(reader, stream, carry, **options)
    return stream.cache, choices


@torch.no_grad()
def follows(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, past_key_values=cache).logits
    return logits


def test_with_time_enough_all_comes_bit_for_bit(stored: tuple[Any, torch.Tensor, Path]) -> None:
    model, _, path = stored
    cache, choices = run(stored, steady(1e9), deadline=60.0, bandwidth=1e9)
    assert [c.level for c in choices] == [0, 0, 0] and cache.get_seq_length() == TOKENS
    loaded = KVCache.load(path, model)
    more = tokens(1, 5)
    assert torch.equal(follows(model, cache, more), follows(model, loaded, more))


@pytest.mark.parametrize(
    "levels", [(0, 1, 2), (2, 0, 1), (1, RECOMPUTE, 2), (RECOMPUTE, 2, RECOMPUTE)]
)
@pytest.mark.parametrize("family", ["LlamaConfig", "GPTNeoXConfig"])
def test_any_mixture_of_levels_is_a_cache(
    levels: tuple[int, ...], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = decoder(family), tokens(2, TOKENS)
    cache = KVCache(model, method="exact")
    want = follows(model, cache, ids)
    cache.save(tmp_path / "a.kv", ids, LEVELS)
    left = iter(levels)
    monkeypatch.setattr(link, "choose", lambda *_: next(left))
    found, choices = run(
        (model, ids, tmp_path / "a.kv"), steady(1e6), deadline=9.0, bandwidth=1e6,
        prefill_tokens_per_second=1e4,
    )  # fmt: skip
    assert tuple(c.level for c in choices) == levels
    assert found.get_seq_length() == TOKENS
    more = tokens(2, 4)
    near, exact = follows(model, found, more), follows(model, cache, more)
    assert float((near - exact).abs().max()) < 0.3 * float(want.std())


def test_a_slow_link_gets_coarser_levels_in_time(stored: tuple[Any, torch.Tensor, Path]) -> None:
    path = stored[2]
    with Reader(path) as reader:
        offers, order = link.offers_of(reader)
    least = sum(offer.nbytes[order[-1]] for offer in offers)
    cache, choices = run(stored, steady(least), deadline=1.5, bandwidth=least)
    assert choices[0].level != 0 and choices[-1].done <= 1.5
    assert cache.get_seq_length() == TOKENS


def test_what_comes_damaged_or_is_of_another_text_is_refused(
    stored: tuple[Any, torch.Tensor, Path],
) -> None:
    model, ids, path = stored

    def flipped(data: bytes) -> tuple[bytes, float]:
        return (bytes([data[0] ^ 1]) + data[1:] if len(data) > 50_000 else data), 0.1

    with pytest.raises(FormatError, match="fails its checksum"):
        run(stored, flipped, deadline=9.0, bandwidth=1e9)
    with pytest.raises(WaterfillError, match="another text"):
        run((model, ids.flip(1), path), steady(1e9), deadline=9.0, bandwidth=1e9)


def test_layers_that_lost_their_first_tokens_are_not_computed_again(tmp_path: Path) -> None:
    model, ids = decoder("MistralConfig"), tokens(1, TOKENS)
    cache = KVCache(model, method="exact")
    for some in ids.split(TOKENS // 2, 1):
        follows(model, cache, some)
    cache.save(tmp_path / "a.kv", ids, LEVELS)
    found, choices = run(
        (model, ids, tmp_path / "a.kv"), steady(1e3), deadline=0.1, bandwidth=1e3,
        prefill_tokens_per_second=1e9,
    )  # fmt: skip
    assert [c.level for c in choices] == [2, 2, 2] and found.get_seq_length() == TOKENS
    more = tokens(1, 4)
    near, exact = follows(model, found, more), follows(model, cache, more)
    assert float((near - exact).abs().max()) < 0.3 * float(exact.std())
