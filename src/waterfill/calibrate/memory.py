"""Tells a machine that has run out of memory from a model that does not work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from waterfill.types import WaterfillError

__all__ = ["out_of_memory", "remedy_for_memory"]

# torch has a class of its own for accelerators only; the CPU's allocator raises RuntimeError.
_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


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
