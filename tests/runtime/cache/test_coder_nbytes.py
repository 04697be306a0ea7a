"""What a coder keeps is its tables, which are counted, and next to nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.runtime.cache.models import decoder, statistics
from waterfill.coding import native
from waterfill.runtime.cache.facts import LayerFacts, facts_of
from waterfill.runtime.cache.method import BLOCK, Coder, parse_method


def used(facts: LayerFacts, method: str) -> Coder:
    """A coder after all that it is asked in a cache."""
    coder = parse_method(method).open(facts, statistics().layers[0])
    keys, values = torch.randn(2, 1, facts.heads, BLOCK, facts.key_width)
    positions = torch.arange(BLOCK)[None]
    coder.decode(coder.encode(keys, values, positions), positions)
    assert coder.blocks is not None
    if native.core() is not None:
        assert 0 < coder.blocks.handle.held_nbytes < 800
    return coder


def arrays_of(part: object) -> Iterator[NDArray[Any]]:
    """Arrays that a frozen value has, and those that it has; a layer's facts are not the coder's."""
    for one in part if isinstance(part, tuple) else vars(part).values():
        if isinstance(one, np.ndarray):
            yield one
        elif isinstance(one, tuple) or (is_dataclass(one) and not isinstance(one, LayerFacts)):
            yield from arrays_of(one)


@pytest.mark.parametrize("method", ["transform:level=1e-5", "entropy", "channel", "token", "exact"])
def test_a_coder_keeps_its_tables_and_what_all_layers_share(method: str) -> None:
    facts = facts_of(decoder("LlamaConfig"))[0]
    assert facts is not None
    coder, other = used(facts, method), used(facts, method)
    parts = [t.untyped_storage() for t in coder.tables.values()]
    counted = {part.data_ptr(): part.nbytes() for part in parts}
    assert coder.nbytes == sum(counted.values())
    shared = {one.ctypes.data for one in arrays_of(other)}
    for array in arrays_of(coder):
        at = array.ctypes.data
        own = any(first <= at < first + nbytes for first, nbytes in counted.items())
        assert own or at in shared or not array.size
