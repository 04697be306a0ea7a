"""Random sequences of operations against a plain reference; `bench.cache.safety` plays many more."""

from __future__ import annotations

from functools import cache

import pytest

from tests.runtime.cache.models import decoder, tokens
from tests.runtime.cache.operations import LOSSLESS, play
from waterfill.runtime.cache.cache import KVCache
from waterfill.runtime.cache.fitting.calibrating import calibrate_cache
from waterfill.runtime.cache.fitting.statistics import CacheStatistics
from waterfill.runtime.cache.method import method_ids


@cache
def one_layer_statistics() -> CacheStatistics:
    return calibrate_cache(decoder(layers=1), tokens(8, 128))


@pytest.mark.parametrize("method", method_ids())
def test_every_method_keeps_count(method: str) -> None:
    held = KVCache(decoder(layers=1), method=method, statistics=one_layer_statistics(), guard=None)
    for seed in range(6):
        play(held, seed)


@pytest.mark.parametrize(
    ("method", "within"), [("exact", LOSSLESS), ("channel:bits=8", 0.05), ("token:bits=8", 0.05)]
)
def test_values_are_those_of_the_reference(method: str, within: float) -> None:
    held = KVCache(decoder(layers=1), method=method, guard=None)
    for seed in range(10):
        play(held, seed, within=within)


@pytest.mark.parametrize("family", ["GPTNeoXConfig", "Qwen2Config", "MistralConfig"])
def test_every_kind_of_layer_keeps_its_values(family: str) -> None:
    held = KVCache(decoder(family, layers=1), method="exact", guard=None)
    refused = sum(play(held, seed, within=LOSSLESS).refused for seed in range(8))
    assert (refused > 0) == (family == "MistralConfig")


def test_a_full_size_is_kept_through_all_of_it() -> None:
    model = decoder(layers=1)
    for method in ("channel", "token"):
        held = KVCache(model, bits=12, tokens=400, batch=4, method=method, guard=None)
        assert held.budget.nbytes is not None
        for seed in range(6):
            run = play(held, seed)
            assert run.cache.nbytes <= held.budget.nbytes == run.cache.budget.nbytes
