"""How fast a model writes with one cache or another."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from waterfill.runtime.cache.naming import as_argument

__all__ = ["decode_pace"]


@torch.no_grad()
def decode_pace(
    model: Any, tokens: torch.Tensor, makes: list[Callable[[], Any]], *, steps: int = 32
) -> list[float]:
    """Tokens per second, one at a time, at the end of a text; the caches take turns.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokens : int64 (count,), more than `steps` of them; what comes before the last `steps` is a prompt
    makes : of each cache, one of one row
    steps : tokens that are timed
    """
    row = tokens[None].to(model.device)
    caches = [make() for make in makes]
    for cache in caches:
        model(input_ids=row[:, :-steps], use_cache=True, **as_argument(model, cache))
    seconds = [0.0] * len(caches)
    for at in range(row.shape[1] - steps, row.shape[1]):
        for i, cache in enumerate(caches):
            start = time.perf_counter()
            model(input_ids=row[:, at : at + 1], use_cache=True, **as_argument(model, cache))
            seconds[i] += time.perf_counter() - start
    return [steps / max(one, 1e-9) for one in seconds]
