"""How much may be in memory beside a model, and what to say when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from waterfill.types import WaterfillError

__all__ = ["out_of_memory", "remedy_for_memory", "share_of", "tokens_that_fit"]

SHARE = 0.05  # of a large model

# torch has a class of its own for accelerators only; the CPU's allocator raises RuntimeError.
_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


def share_of(model: Any, least: int) -> int:
    """Bytes that may be kept beside a model's weights: so many, or a share of them if that is more."""
    return max(least, int(SHARE * 4 * sum(p.numel() for p in model.parameters())))


def tokens_that_fit(model: Any, least: int, states: int) -> int:
    """Tokens of which so many hidden states each may be kept."""
    hidden = getattr(model.config.get_text_config(), "hidden_size", 0) or 1024
    return share_of(model, least) // (4 * hidden * states)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _WORDS)


@contextmanager
def remedy_for_memory() -> Iterator[None]:
    """Turn running out of memory into a WaterfillError that says what needs less of it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise WaterfillError(
            "out of memory in calibration. Give fewer --tokens (512 are one window), or make the "
            "statistics with `waterfill calibrate --method none`, which runs nothing backward; "
            "in Python, calibrate(window=...) takes shorter windows"
        ) from error
