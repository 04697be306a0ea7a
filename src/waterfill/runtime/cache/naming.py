"""What models call the argument that takes a cache: transformers 5.24 has given it another name."""

from __future__ import annotations

import functools
import inspect
from typing import Any

__all__ = ["as_argument"]


def as_argument(model: Any, cache: Any) -> dict[str, Any]:
    """A cache as the argument of a model's forward pass, or of its `generate`."""
    cls: type = type(model)
    return {_name(cls): cache}


@functools.cache
def _name(cls: type[Any]) -> str:
    return "cache" if "cache" in inspect.signature(cls.forward).parameters else "past_key_values"
