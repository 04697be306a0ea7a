"""What a user may say of a cache, and what is refused before anything is planned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from waterfill.plan.budget import parse_size
from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.fitting.statistics import CacheStatistics
from waterfill.runtime.cache.guard import Guard
from waterfill.types import BudgetError, WaterfillError

__all__ = ["check_counts", "check_kinds", "check_statistics", "total_nbytes"]


def check_counts(tokens: int | None, batch: int, sinks: int, recent: int) -> None:
    """WaterfillError for numbers of tokens and rows that are none."""
    least = {"tokens": (tokens, 1), "batch": (batch, 1), "sinks": (sinks, 0), "recent": (recent, 0)}
    for name, (value, lowest) in least.items():
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < lowest
        ):
            raise WaterfillError(f"{name}={value!r}: a whole number, please, of at least {lowest}")


def check_kinds(method: Any, statistics: Any, guard: Any) -> None:
    """WaterfillError for arguments of `KVCache` that are not what they are called."""
    if not isinstance(method, str):
        raise WaterfillError(f"method={method!r}: the name of a method, please, such as auto")
    if not (statistics is None or isinstance(statistics, (CacheStatistics, str, Path))):
        raise WaterfillError(
            f"statistics={statistics!r}: what calibrate_cache returned, please, or its file"
        )
    if not (guard is None or guard == "auto" or isinstance(guard, Guard)):
        raise WaterfillError(f'guard={guard!r}: a waterfill.Guard, "auto" or None, please')


def total_nbytes(
    size: int | float | str | None,
    bytes_per_token: float | None,
    bits: float | None,
    numbers: int,
    tokens: int,
) -> int | None:
    """Bytes of the whole cache; None where no size is named.

    Parameters
    ----------
    size, bytes_per_token, bits : as of `KVCache`
    numbers : in keys and values of a token of a row
    tokens : of all rows
    """
    given = {"size": size, "bytes_per_token": bytes_per_token, "bits": bits}
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) > 1:
        raise WaterfillError(
            "name one of size, bytes_per_token and bits, not " + " and ".join(named)
        )
    if isinstance(size, str):
        return parse_size(size)
    for name, value in named.items():
        if not _above_zero(value):
            text = ", or text such as 64MB" if name == "size" else ""
            raise BudgetError(f"{name}={value!r}: a number above 0, please{text}")
    if bits is not None:
        bytes_per_token = bits * numbers / 8
    if bytes_per_token is not None:
        return int(bytes_per_token * tokens)
    return None if size is None else int(size)


def _above_zero(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value < math.inf


def check_statistics(statistics: CacheStatistics, facts: Sequence[LayerFacts], config: Any) -> None:
    """WaterfillError if statistics are clearly of another model's cache."""
    again = "make them with this model: waterfill calibrate-cache, or waterfill.calibrate_cache"
    own, theirs = config.model_type, statistics.protocol.get("model_type", config.model_type)
    if own != theirs:
        raise WaterfillError(
            f"these statistics are of a {theirs} model's cache, and this is {own}: {again}"
        )
    known = {one.index: one for one in facts}
    if missing := sorted(known.keys() ^ statistics.layers.keys()):
        raise WaterfillError(
            f"these statistics are of another model's cache: layer {missing[0]} is in one of the "
            f"two alone; {again}"
        )
    for index, layer in statistics.layers.items():
        one = known[index]
        have = (layer.keys.mean.shape, layer.values.mean.shape)
        want = ((one.heads, one.key_width), (one.heads, one.value_width))
        if have != want:
            raise WaterfillError(
                f"these statistics are of another model's cache: layer {index} has {one.heads} heads of "
                f"width {one.key_width}, not {have[0][0]} of {have[0][1]}; {again}"
            )
