"""Tiny models run fastest on one thread, above all where several tests share the machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two busy threads on two shared cores spend their time waiting for each other."""
    torch = sys.modules.get("torch")  # tests that do without it must not load it for this
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
