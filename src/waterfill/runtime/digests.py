"""BLAKE3 of tensors and of whole models: which checkpoint this is, to the bit."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np

from waterfill.coding import native
from waterfill.types import Array

__all__ = ["digest", "model_digest"]

WORTH_THREADS = 8 << 20  # bytes: below, starting threads takes longer than one does


def digest(bits: Array) -> str:
    """BLAKE3 of a tensor's bytes as stored, rows first, in hexadecimal."""
    from blake3 import blake3

    flat = np.ascontiguousarray(bits).reshape(-1).view(np.uint8)
    threads = native.threads() if flat.size >= WORTH_THREADS else 1
    return str(blake3(flat.data, max_threads=threads).hexdigest())


def model_digest(tensors: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """BLAKE3 of a list of (name, dtype, shape, digest), in hexadecimal.

    The list is sorted by name and written as JSON without spaces, all but ASCII escaped: models
    with equal digests have equal tensors, in whatever order and files they are stored.
    """
    from blake3 import blake3

    rows = sorted(
        [name, dtype, list(shape), hexadecimal] for name, dtype, shape, hexadecimal in tensors
    )
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=True)
    return str(blake3(text.encode()).hexdigest())
