"""What a decode step takes with each method, by length: the whole model's, and a layer's attention alone.

Caches are filled with random keys and values; blocks beyond the first thousand tokens repeat, which takes
as long to read as others. One thread; the ratio is to transformers' own cache, in turns with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from bench.cache import held_out, model_of, statistics_of
from bench.cache.speed import MIDDLE, SHORT, seconds
from bench.harness import Row
from waterfill.runtime.cache.cache import KVCache
from waterfill.runtime.cache.fitting.calibrating import calibrate_cache
from waterfill.runtime.cache.fitting.statistics import CacheStatistics

METHODS = (
    "exact", "transform", "entropy", "channel", "token", "kvquant", "gear", "zipcache", "staircase",
)  # fmt: skip
QUICK = METHODS[:5]
BITS = 4  # a number, everything counted
FILL = 512  # tokens at once


@functools.cache
def wide() -> tuple[Any, CacheStatistics]:
    """A model of two layers with 32 heads over 8 of 128, and its statistics."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=1 << 16,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()
    with torch.enable_grad():
        return model, calibrate_cache(model, torch.randint(0, 256, (4, 256)), protocol={})


def small() -> tuple[Any, CacheStatistics]:
    """english-7m."""
    return model_of("english-7m"), statistics_of("english-7m")


MODELS: dict[str, Callable[[], tuple[Any, CacheStatistics]]] = {
    "english-7m": small,
    "32 heads over 8 of 128": wide,
}


def read(model: Any, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Let a model read some text; each layer's keys and values."""
    name = "english-7m" if model.config.vocab_size > 256 else ""
    ids = held_out(name, 1, tokens) if name else torch.randint(0, 256, (1, tokens))
    exact = DynamicCache()
    model(input_ids=ids, past_key_values=exact, logits_to_keep=1)
    return [(layer.keys, layer.values) for layer in exact.layers]


def fill_stock(states: list[tuple[torch.Tensor, torch.Tensor]], tokens: int) -> Any:
    """Transformers' cache of these keys and values over and over."""
    cache = DynamicCache()
    for i, pair in enumerate(states):
        keys, values = (x.repeat(1, 1, tokens // x.shape[2], 1) for x in pair)
        cache.update(keys, values, i)
    return cache


def fill(cache: Any, states: list[tuple[torch.Tensor, torch.Tensor]], tokens: int) -> Any:
    """A cache of ours, coded once and its blocks then repeated."""
    for layer, (keys, values) in zip(cache.coded_layers, states, strict=True):
        store = layer.store
        for low in range(0, keys.shape[2], FILL):
            store.append(keys[:, :, low : low + FILL], values[:, :, low : low + FILL])
        store.settle()
        tier = max(store.tiers, key=lambda tier: tier.arena.count)
        n = tier.arena.count
        for _ in range(tokens // keys.shape[2] - 1):
            tier.arena.append({k: v.clone() for k, v in tier.arena.blocks(0, n).items()})
        store.track.extend(store.track.tokens, store.tokens - store.track.tokens, None)
        layer.is_initialized, layer.dtype, layer.device = True, keys.dtype, keys.device
    return cache


def step(model: Any, cache: Any) -> Callable[[], None]:
    """One token, which the cache then forgets."""
    ids = torch.zeros((1, 1), dtype=torch.int64)

    def run() -> None:
        model(input_ids=ids, past_key_values=cache)
        cache.crop(-1)

    return run


def rows(quick: bool) -> Iterator[Row]:
    """Milliseconds of a step and its ratio to the exact cache's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for name in MODELS:
                for tokens in (SHORT, MIDDLE):
                    yield from compared(name, tokens, QUICK if quick else METHODS)
    finally:
        torch.set_num_threads(before)


def compared(name: str, tokens: int, methods: tuple[str, ...]) -> Iterator[Row]:
    """Each method's step beside the stock one's."""
    model, statistics = MODELS[name]()
    states = read(model, SHORT)
    calls = {"stock": step(model, fill_stock(states, tokens))}
    for method in methods:
        bits = None if method == "exact" else BITS
        options = {"method": method, "statistics": statistics, "tokens": tokens + 64}
        cache = KVCache(model, bits=bits, guard=None, **options)
        calls[method] = step(model, fill(cache, states, tokens))
    took = seconds(calls, 5)
    for method in methods:
        note = f"{1e3 * took[method]:.2f} ms; stock {1e3 * took['stock']:.2f} ms"
        ratio = took[method] / took["stock"]
        yield Row(f"decode step, {name}, {tokens} tokens, {method}", ratio, "of stock's", note=note)
