"""The peer: transformers' own quantised cache, with either backend that is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

BACKENDS = {"quanto": "optimum.quanto", "hqq": "hqq"}


def backends() -> list[str]:
    """Those that can be imported here."""
    found = []
    for name, module in BACKENDS.items():
        top = module.partition(".")[0]
        if importlib.util.find_spec(top) is not None:
            found.append(name)
    return found


def maker(model: Any, backend: str, bits: int, residual: int) -> Callable[[], Any]:
    """Makes stock caches; all but the bits and the residual as transformers has it."""
    from transformers import QuantizedCache

    return lambda: QuantizedCache(backend, model.config, nbits=bits, residual_length=residual)


def nbytes_of(cache: Any) -> int:
    """Bytes of codes, scales, zeros and the residual."""
    return sum(
        _nbytes(state)
        for layer in cache.layers
        for state in (layer.keys, layer.values, layer._quantized_keys, layer._quantized_values)
    )


def _nbytes(state: Any) -> int:
    if isinstance(state, (tuple, list)):
        return sum(map(_nbytes, state))
    if isinstance(state, dict):
        return sum(map(_nbytes, state.values()))
    if type(state) is torch.Tensor:
        return state.numel() * state.element_size()
    if isinstance(state, torch.Tensor):  # quanto's, of tensors within
        names, _ = state.__tensor_flatten__()
        return sum(_nbytes(getattr(state, name)) for name in names)
    return 0
