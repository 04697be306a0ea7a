"""What a user may get wrong, and what is said: each message names what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from tests.runtime.cache.models import decoder, statistics, tokens
from waterfill.runtime.cache.cache import KVCache
from waterfill.runtime.cache.fitting.calibrating import calibrate_cache
from waterfill.runtime.cache.fitting.statistics import save_statistics
from waterfill.types import BudgetError, FormatError, WaterfillError


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"size": "abc"}, "not a size; write for example"),
        ({"size": 0}, "size=0: a number above 0.*64MB"),
        ({"size": -1}, "size=-1"),
        ({"size": True}, "size=True"),
        ({"bits": 0}, "bits=0"),
        ({"bits": float("nan")}, "bits=nan"),
        ({"bits": "4"}, "bits='4'"),
        ({"bytes_per_token": float("inf")}, "bytes_per_token=inf"),
        ({"bits": 1, "bytes_per_token": 1}, "name one of size.*not bytes_per_token and bits"),
        ({"tokens": 0}, "tokens=0: a whole number, please, of at least 1"),
        ({"tokens": 10.5}, "tokens=10.5"),
        ({"batch": -2}, "batch=-2"),
        ({"sinks": -1}, "sinks=-1: a whole number, please, of at least 0"),
        ({"recent": "8"}, "recent='8'"),
        ({"bits": 4, "recent": 1 << 30}, "the cheapest rungs take.*more for each, or more tokens"),
        ({"size": 99, "tokens": 9}, "of 99 bytes for 9 tokens.*a larger size, or fewer tokens"),
        ({"method": None}, "method=None: the name of a method"),
        ({"statistics": 3}, "statistics=3: what calibrate_cache returned"),
        ({"guard": "x"}, "guard='x': a waterfill.Guard"),
        ({"statistics": "nowhere.safetensors"}, "nowhere.safetensors holds no cache statistics"),
    ],
)
def test_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(WaterfillError, match=said):
        KVCache(decoder(), **arguments)


@pytest.mark.parametrize("family", ["Qwen2Config", "Qwen3Config", "GPT2Config"])
def test_statistics_of_another_model(family: str) -> None:
    with pytest.raises(
        WaterfillError, match=r"of a llama model's cache.*waterfill calibrate-cache"
    ):
        KVCache(decoder(family), bits=8, statistics=statistics())


def test_statistics_of_another_shape() -> None:
    theirs = statistics("Qwen3Config")  # heads of width 32
    theirs.protocol["model_type"] = "llama"  # type: ignore[index]
    try:
        with pytest.raises(WaterfillError, match="layer 0 has 2 heads of width 16, not 2 of 32"):
            KVCache(decoder(), bits=8, statistics=theirs)
    finally:
        theirs.protocol["model_type"] = "qwen3"  # type: ignore[index]
    with pytest.raises(WaterfillError, match="layer 1 is in one of the two alone"):
        KVCache(decoder(layers=1), bits=8, statistics=statistics())


def test_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    save_statistics(statistics(), path)
    assert KVCache(decoder(), bits=8, statistics=path).budget.nbytes
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"damaged.*waterfill calibrate-cache"):
        KVCache(decoder(), bits=8, statistics=str(path))


def test_what_attention_reads_is_not_what_is_cached() -> None:
    model = decoder("DeepseekV3Config")
    try:
        found = calibrate_cache(model, tokens(2, 64))
    except WaterfillError as error:
        assert "choose a method that needs no statistics" in str(error)
    else:  # older transformers caches what attention reads
        assert KVCache(model, bits=12, statistics=found).budget.nbytes


def test_weights_want_no_gradients_for_it_and_get_none() -> None:
    model = decoder()
    wanted = [p.requires_grad for p in model.parameters()]
    calibrate_cache(model, tokens(2, 64))
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())


def test_a_full_cache_says_how_to_have_room() -> None:
    model, ids = decoder(), tokens(2, 101)
    cache = KVCache(model, bits=24, tokens=100, batch=2)
    with torch.no_grad(), pytest.raises(BudgetError, match=r"100 tokens, and 101.*tokens=101"):
        model(input_ids=ids, past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("ids", ["ab", [1.5], [-1], [10**6], [True], [None]])
def test_what_are_no_token_ids(ids: Any) -> None:
    model = decoder()
    cache = KVCache(model)
    with torch.no_grad():
        model(input_ids=tokens(1, 20), past_key_values=cache)
    with pytest.raises(WaterfillError, match="token ids"):
        cache.splice(3, 5, ids)
    with pytest.raises(WaterfillError, match="token ids"):
        KVCache(model).compose([ids], {})
    assert cache.get_seq_length() == 20


def test_a_store_without_a_level(tmp_path: Path) -> None:
    cache = KVCache(decoder())
    with torch.no_grad():
        decoder()(input_ids=tokens(1, 20), past_key_values=cache)
    with pytest.raises(WaterfillError, match="name a level"):
        cache.save(tmp_path / "a.kv", tokens(1, 20), level=[])
    assert not list(tmp_path.iterdir())


def test_what_is_no_decoder() -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(WaterfillError, match="BertModel reads in both directions"):
        KVCache(BertModel(BertConfig(intermediate_size=32, **small)))
    with pytest.raises(
        WaterfillError, match=r"of a transformers model, and this is str.*load_model"
    ):
        KVCache("model")


def test_a_model_without_a_head_has_no_guard_by_itself() -> None:
    assert KVCache(decoder().model, bits=14, tokens=300).guard is None
