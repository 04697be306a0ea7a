"""Tokens that are written where they are kept, and read where they lie: as if appended and decoded."""

from __future__ import annotations

import pytest
import torch

from tests.runtime.cache.models import decoder
from waterfill.runtime.cache.cache import KVCache
from waterfill.runtime.cache.held.lying import Pair, fill, runs_of, within
from waterfill.runtime.cache.held.store import Store
from waterfill.runtime.cache.layer import CodedLayer


def layer_of(method: str) -> CodedLayer:
    layer = KVCache(decoder(), method=method).coded_layers[0]
    layer.resume(torch.float32, torch.device("cpu"), 0)
    assert isinstance(layer, CodedLayer)
    return layer


def states(layer: CodedLayer, batch: int, tokens: int) -> Pair:
    facts = layer.store.facts
    generator = torch.Generator().manual_seed(tokens)
    keys, values = (
        torch.randn((batch, facts.heads, tokens, width), generator=generator)
        for width in (facts.key_width, facts.value_width)
    )
    return keys, values


def everything(store: Store) -> Pair:
    parts = []
    for piece in store.pieces():
        start, runs = runs_of(piece)
        parts += list(within(runs, piece.start - start, piece.stop - start))
    keys, values = zip(*parts, strict=True)
    return torch.cat([k.flatten(2, 3) for k in keys], 2), torch.cat(
        [v.flatten(2, 3) for v in values], 2
    )


@pytest.mark.parametrize("method", ["exact", "channel"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sizes", [(4, 1020, 300), (1, 7, 40, 33, 700)])
def test_receiving_is_appending(method: str, batch: int, sizes: tuple[int, ...]) -> None:
    one, other = layer_of(method), layer_of(method)
    for tokens in sizes:
        pair = states(one, batch, tokens)
        one.restore(*pair)
        other.store.track.extend(other.store.tokens, tokens, None)
        other.receive(batch, tokens, lambda runs, pair=pair: fill(pair, runs))  # type: ignore[misc]
        assert (one.store.tokens, one.store.held) == (other.store.tokens, other.store.held)
        assert one.store.nbytes == other.store.nbytes
        for x, y in zip(everything(one.store), everything(other.store), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_what_could_not_be_written_is_not_remembered() -> None:
    layer = layer_of("exact")
    first, more = states(layer, 1, 50), states(layer, 1, 500)
    layer.restore(*first)

    def fails(runs: list[Pair]) -> None:
        fill(more, runs)
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        layer.receive(1, 500, fails)
    layer.restore(*more)
    for x, y, z in zip(everything(layer.store), first, more, strict=True):
        torch.testing.assert_close(x, torch.cat([y, z], 2), rtol=0, atol=0)
