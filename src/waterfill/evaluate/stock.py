"""transformers' own quantised caches, to compare with: those whose backend is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

__all__ = ["backends", "cache_nbytes", "exact_cache", "stock_cache", "stock_caches"]

BACKENDS = {"quanto": "optimum.quanto", "hqq": "hqq.core.quantize"}
BITS = (4, 2)
GROUP, RECENT = 64, 128  # transformers' own defaults


def stock_caches(model: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and maker of each `QuantizedCache` that can be made here, at 4 and 2 bits."""
    for backend in backends():
        for bits in BITS:
            yield f"transformers {backend}, {bits} bits", partial(stock_cache, model, backend, bits)


def backends() -> list[str]:
    """Those that are installed."""
    return [name for name, package in BACKENDS.items() if _installed(package)]


def stock_cache(model: Any, backend: str, bits: int, recent: int = RECENT) -> Any:
    """A `QuantizedCache`, all but its bits and its exact tokens as transformers has it."""
    from transformers import QuantizedCache

    return QuantizedCache(
        backend, model.config, nbits=bits, q_group_size=GROUP, residual_length=recent
    )


def exact_cache(model: Any) -> Any:
    """The cache that transformers takes where nothing else is said."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def cache_nbytes(cache: Any) -> int:
    """Bytes of every tensor that a cache holds, each counted once, however deep it lies."""
    seen: dict[int, int] = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            _count(value, seen)
    return sum(seen.values())


def _count(value: Any, seen: dict[int, int]) -> None:
    if isinstance(value, torch.Tensor):
        parts = getattr(value, "__tensor_flatten__", None)
        if parts is None:
            storage = value.untyped_storage()
            seen[storage.data_ptr()] = min(storage.nbytes(), value.numel() * value.element_size())
        else:  # a tensor made of others
            for name in parts()[0]:
                _count(getattr(value, name), seen)
    elif isinstance(value, dict):
        for one in value.values():
            _count(one, seen)
    elif isinstance(value, (tuple, list)):
        for one in value:
            _count(one, seen)
