"""Parts of a batch, wherever it is in the arguments of a module or in what comes out of it."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["joined", "rows_of", "spread"]


def rows_of(value: Any, count: int, rows: Any) -> Any:
    """Some rows of every tensor that has `count` of them, all else as it is."""
    if isinstance(value, torch.Tensor):
        return value[list(rows)] if value.ndim > 1 and value.shape[0] == count else value
    if isinstance(value, (tuple, list)):
        return type(value)(rows_of(v, count, rows) for v in value)
    if isinstance(value, dict):
        return {key: rows_of(v, count, rows) for key, v in value.items()}
    return value


def spread(value: Any, count: int) -> Any:
    """What is the same for all rows (as positions are), once for each."""
    if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] == 1:
        return value.expand(count, *value.shape[1:])
    return value


def joined(parts: list[Any]) -> Any:
    """Outputs of parts of a batch as one."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(parts)
    if isinstance(first, (tuple, list)):
        return type(first)(joined(list(each)) for each in zip(*parts, strict=True))
    return first
