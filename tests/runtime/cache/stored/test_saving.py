"""Caches stored and loaded: what comes back, what is refused, and what a link makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.runtime.cache.models import FAMILIES, decoder, statistics, tokens
from waterfill.coding.cachegen_file import Reader
from waterfill.runtime.cache.cache import KVCache
from waterfill.runtime.cache.stored import loading, saving
from waterfill.runtime.cache.stored.fingerprint import model_fingerprint
from waterfill.types import BudgetError, FormatError, WaterfillError


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, cache: Any = None, **options: Any) -> Any:
    """A cache of a text."""
    cache = KVCache(model, method="exact", **options) if cache is None else cache
    model(input_ids=ids, past_key_values=cache)
    return cache


@torch.no_grad()
def go_on(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    found = [model(input_ids=ids[:, :20], past_key_values=cache).logits]
    found += [
        model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(20, 25)
    ]
    return torch.cat(found, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 3, 150])
def test_exact_goes_on_as_if_never_stored(family: str, count: int, tmp_path: Path) -> None:
    model, ids = decoder(family), tokens(2, count + 25)
    cache = read(model, ids[:, :count])
    path = tmp_path / "prefix.kv"
    if any(one is None for one in cache.facts):
        with pytest.raises(WaterfillError, match="something else than keys and values"):
            cache.save(path, ids[:, :count], "exact")
        return
    assert cache.save(path, ids[:, :count], "exact") == path.stat().st_size
    loaded = KVCache.load(path, model, token_ids=ids)
    assert loaded.get_seq_length() == count
    for x, y in zip(values_of(cache), values_of(loaded), strict=True):
        assert torch.equal(x, y)
    torch.testing.assert_close(
        go_on(model, loaded, ids[:, count:]),
        go_on(model, cache, ids[:, count:]),
        atol=1e-5,
        rtol=1e-5,
    )


def test_generate_goes_on(tmp_path: Path) -> None:
    model, ids = decoder(), tokens(1, 90)
    read(model, ids[:, :80]).save(tmp_path / "a.kv", ids[:, :80], "exact")
    loaded = KVCache.load(tmp_path / "a.kv", model)
    options = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(
        model.generate(ids, past_key_values=loaded, **options), model.generate(ids, **options)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("calibrated", [False, True])
def test_levels_are_ordered_by_size_and_error(
    dtype: torch.dtype, calibrated: bool, tmp_path: Path
) -> None:
    model, ids = decoder(dtype=dtype), tokens(2, 200)
    cache = read(model, ids, statistics=statistics() if calibrated else None)
    path, names = tmp_path / "a.kv", ("1e-07", "1e-05", "0.001")
    cache.save(path, ids, [*(float(n) for n in names), "exact"])
    truth, errors, sizes = values_of(cache), [], []
    for name in ("exact", *names):
        found = values_of(KVCache.load(path, model, level=name))
        errors.append(sum(float((x - y).square().sum()) for x, y in zip(truth, found, strict=True)))
        sizes.append(cache.save(tmp_path / "one.kv", ids, name))
    assert errors[0] == 0 and errors == sorted(errors) and len(set(errors)) == 4
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    finest = values_of(KVCache.load(path, model))
    assert all(torch.equal(x, y) for x, y in zip(truth, finest, strict=True))


def values_of(cache: KVCache) -> list[torch.Tensor]:
    found = []
    for layer in cache.coded_layers:
        layer.commit()
        pairs = [piece.read() for piece in layer.store.pieces()]
        found += [torch.cat(parts, 2).float() for parts in zip(*pairs, strict=True)]
    return found


@pytest.mark.parametrize("size", ["4bits", "2.5bits", 14_000, "20KB"])
def test_a_size_is_met_from_below(size: Any, tmp_path: Path) -> None:
    model, ids = decoder(dtype=torch.bfloat16), tokens(2, 300)
    cache = read(model, ids, statistics=statistics())
    numbers = 2 * 300 * 2 * 2 * 32
    wanted = {"4bits": numbers // 2, "2.5bits": int(numbers * 2.5 / 8), "20KB": 20_000}.get(
        size, size
    )
    nbytes = cache.save(tmp_path / "a.kv", ids, size)
    assert 0.97 * wanted <= nbytes <= wanted


def test_a_size_that_cannot_be_is_refused(tmp_path: Path) -> None:
    model, ids = decoder(), tokens(1, 100)
    cache = read(model, ids)
    with pytest.raises(BudgetError, match="too few for this cache: it takes"):
        cache.save(tmp_path / "a.kv", ids, 500)
    with pytest.raises(WaterfillError, match="not a size"):
        cache.save(tmp_path / "a.kv", ids, "fine")
    with pytest.raises(WaterfillError, match="above 0"):
        cache.save(tmp_path / "a.kv", ids, -1.0)
    assert not list(tmp_path.iterdir())


def test_padded_rows_and_later_turns_keep_their_positions(tmp_path: Path) -> None:
    model, ids = decoder(), tokens(2, 120)
    mask = torch.ones_like(ids)
    mask[1, :13], ids[1, :13] = 0, 0
    cache = KVCache(model, method="exact")
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        more = torch.arange(200, 240)[None]
        model(input_ids=ids[:, :40], position_ids=more, past_key_values=cache)
    every = torch.cat([ids, ids[:, :40]], 1)
    cache.save(tmp_path / "a.kv", every, 1e-9)
    loaded = KVCache.load(tmp_path / "a.kv", model, positions=cache.track.positions(0, 160))
    assert torch.equal(loaded.track.positions(0, 160), cache.track.positions(0, 160))
    for x, y in zip(values_of(cache), values_of(loaded), strict=True):
        torch.testing.assert_close(x, y, atol=0.02, rtol=0.02)
    with pytest.raises(WaterfillError, match="other positions"):
        KVCache.load(tmp_path / "a.kv", model, positions=torch.arange(160))


def test_a_window_is_stored_from_where_it_begins(tmp_path: Path) -> None:
    model, ids = decoder("MistralConfig"), tokens(1, 300)
    cache = KVCache(model, method="channel:bits=8")
    for at in range(0, 300, 20):
        read(model, ids[:, at : at + 20], cache)
    cache.save(tmp_path / "a.kv", ids, "exact")
    with Reader(tmp_path / "a.kv") as reader:
        assert all(layer.start > 150 for layer in reader.header.layers)
    loaded = KVCache.load(tmp_path / "a.kv", model)
    more = tokens(1, 25, seed=2)
    torch.testing.assert_close(
        go_on(model, loaded, more), go_on(model, cache, more), atol=2e-3, rtol=1e-2
    )


def test_what_does_not_fit_is_refused_and_named(tmp_path: Path) -> None:
    model, ids = decoder(), tokens(1, 90)
    cache = read(model, ids)
    path = tmp_path / "a.kv"
    cache.save(path, ids, 1e-5, tokenizer=Tokenizer("ab"))
    with pytest.raises(WaterfillError, match="another model"):
        KVCache.load(path, decoder("Qwen2Config"))
    with pytest.raises(WaterfillError, match="another tokenizer"):
        KVCache.load(path, model, tokenizer=Tokenizer("ba"))
    assert KVCache.load(path, model, tokenizer=Tokenizer("ab")).get_seq_length() == 90
    other = ids.clone()
    other[0, 57] += 1
    with pytest.raises(WaterfillError, match="another text: token ids differ from token 57 on"):
        KVCache.load(path, model, token_ids=other)
    with pytest.raises(WaterfillError, match="do not begin with them"):
        KVCache.load(path, model, token_ids=ids[0, :40])
    with pytest.raises(WaterfillError, match="no level is called"):
        KVCache.load(path, model, level="exact")
    with pytest.raises(BudgetError, match="planned for 64"):
        KVCache.load(path, model, size="1MB", tokens=64)
    with pytest.raises(FormatError, match="no such file"):
        KVCache.load(tmp_path / "b.kv", model)
    with pytest.raises(WaterfillError, match="for a cache of 1 x 90"):
        cache.save(path, ids[:, :89])
    with pytest.raises(WaterfillError, match="nothing to store"):
        KVCache(model, method="exact").save(path, ids[:, :0])


def test_caches_that_evict_are_refused(tmp_path: Path) -> None:
    model, ids = decoder(), tokens(1, 60)
    cache = read(model, ids, KVCache(model, method="elastic"))
    with pytest.raises(WaterfillError, match="evicted tokens"):
        cache.save(tmp_path / "a.kv", ids)


class Tokenizer:
    """As much of one as is asked of it."""

    def __init__(self, letters: str) -> None:
        self.letters = letters
        self.special_tokens_map = {"eos_token": "</s>"}

    def get_vocab(self) -> dict[str, int]:
        return {letter: i for i, letter in enumerate(self.letters)}


def test_a_changed_weight_is_another_model(tmp_path: Path) -> None:
    import copy

    model, ids = copy.deepcopy(decoder()), tokens(1, 40)
    read(model, ids).save(tmp_path / "a.kv", ids, "exact")
    before = model_fingerprint(model)
    assert model_fingerprint(copy.deepcopy(model)) == before == model_fingerprint(model)
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1
    assert model_fingerprint(model) != before
    with pytest.raises(WaterfillError, match="another model"):
        KVCache.load(tmp_path / "a.kv", model)


@pytest.mark.parametrize("level", ["exact", "1e-06"])
def test_layers_come_while_bytes_arrive(level: str, tmp_path: Path) -> None:
    model, ids = decoder(), tokens(2, 150)
    read(model, ids).save(tmp_path / "a.kv", ids, ["exact", "1e-06", 1e-3])
    data = (tmp_path / "a.kv").read_bytes()
    stream = KVCache.stream(model, level=level, token_ids=ids)
    ready = []
    for at in range(0, len(data), 997):
        ready.append(stream.feed(data[at : at + 997]))
    assert [i for some in ready for i in some] == [0, 1]
    assert [0] in ready  # before the end
    whole = KVCache.load(tmp_path / "a.kv", model, level=level)
    for x, y in zip(values_of(stream.finish()), values_of(whole), strict=True):
        assert torch.equal(x, y)
    short = KVCache.stream(model, level=level)
    short.feed(data[:-1])
    with pytest.raises(FormatError, match="cut short"):
        short.finish()


@pytest.mark.parametrize(
    ("level", "rows", "size"),
    [
        ("exact", 1, None),
        ("1e-06", 1, None),
        ("exact", 2, None),
        ("1e-06", 2, None),
        ("exact", 1, 90_000),
    ],
)
def test_chunks_are_taken_some_at_a_time_or_one_by_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, level: str, rows: int, size: int | None
) -> None:
    model, ids = decoder(dtype=torch.bfloat16), tokens(rows, 470)
    options: Any = {} if size is None else {"size": size, "tokens": 500}
    monkeypatch.setattr(saving, "MOST_TOKENS", 64)
    read(model, ids).save(tmp_path / "a.kv", ids, level)
    stream = KVCache.stream(model, **options)
    stream.feed((tmp_path / "a.kv").read_bytes())
    one_by_one = values_of(stream.finish())
    for numbers in (1, 3 * 64 * rows * 64, 1 << 22):
        monkeypatch.setattr(loading, "NUMBERS", numbers)
        found = values_of(KVCache.load(tmp_path / "a.kv", model, **options))
        assert all(torch.equal(x, y) for x, y in zip(found, one_by_one, strict=True))


def test_a_loaded_cache_may_be_held_to_a_size_and_stored_again(tmp_path: Path) -> None:
    model, ids = decoder(), tokens(2, 150)
    cache = read(model, ids)
    cache.save(tmp_path / "a.kv", ids, "exact")
    small = KVCache.load(tmp_path / "a.kv", model, size=80_000, tokens=200, batch=2)
    assert small.nbytes < cache.nbytes / 1.5
    small.save(tmp_path / "b.kv", ids, "exact")
    again = KVCache.load(tmp_path / "b.kv", model)
    assert all(torch.equal(x, y) for x, y in zip(values_of(small), values_of(again), strict=True))


def test_stock_and_loaded_caches_agree(tmp_path: Path) -> None:
    model, ids = decoder(), tokens(1, 145)
    read(model, ids[:, :120]).save(tmp_path / "a.kv", ids[:, :120], 1e-9)
    stock = DynamicCache(config=model.config)
    read(model, ids[:, :120], stock)
    mine = go_on(model, KVCache.load(tmp_path / "a.kv", model), ids[:, 120:])
    torch.testing.assert_close(mine, go_on(model, stock, ids[:, 120:]), atol=0.02, rtol=0.02)
