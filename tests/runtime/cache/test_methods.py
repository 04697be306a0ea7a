"""What every method that codes blocks must do, whoever wrote it: found by its file, tried on its own ladder."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from waterfill.runtime.cache.arena import Arena
from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.method import (
    BLOCK,
    Coded,
    Coder,
    Method,
    find_method,
    make_method,
    method_ids,
    parse_method,
)
from waterfill.runtime.cache.planning import block_nbytes
from waterfill.runtime.cache.rotary import Rotary
from waterfill.runtime.cache.statistics import LayerStatistics, StreamStatistics

RUNGS = 3  # of each ladder: the cheapest, one amid, the dearest
Pair = tuple[torch.Tensor, torch.Tensor]


def facts(
    dtype: torch.dtype = torch.float32, heads: int = 3, key_width: int = 16, value_width: int = 10
) -> LayerFacts:
    """A layer with an odd number of heads, and values of another width than keys."""
    i = torch.arange(key_width // 2)
    frequencies = 0.1 ** (i.double() / 4)
    rotary = Rotary(i, i + key_width // 2, frequencies)
    return LayerFacts(0, heads, key_width, value_width, dtype, None, rotary)


def states(one: LayerFacts, batch: int, blocks: int, seed: int = 0) -> Pair:
    """Keys and values, their channels of different size and middle."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.Generator().manual_seed(1)
    found = []
    for width in (one.key_width, one.value_width):
        x = torch.randn(batch, one.heads, blocks * BLOCK, width, generator=generator)
        size = torch.randn(one.heads, 1, width, generator=spread).exp()
        middle = torch.randn(one.heads, 1, width, generator=spread)
        found.append((x * size + middle).to(one.dtype))
    positions = torch.arange(blocks * BLOCK)[None]
    assert one.rotary is not None
    found[0] = one.rotary.turn(found[0].float(), positions).to(one.dtype)
    return found[0], found[1]


@functools.cache
def statistics(one: LayerFacts) -> LayerStatistics:
    """What calibration would say of such states."""
    keys, values = states(one, 1, 8, seed=5)
    assert one.rotary is not None
    keys = one.rotary.turn(keys.float(), torch.arange(8 * BLOCK)[None], backwards=True)
    streams = []
    for x in (keys[0].numpy(), values[0].float().numpy()):
        covariance = np.stack([np.cov(head.T) for head in x]).astype(np.float32)
        harm = np.stack([np.diag(np.linspace(1, 3, x.shape[2]))] * len(x)).astype(np.float32)
        streams.append(StreamStatistics(x.mean(1), covariance, harm * 1e-3, x))
    return LayerStatistics(*streams)


LAYERS = {dtype: facts(dtype) for dtype in (torch.float32, torch.bfloat16)}


def rungs(id: str, one: LayerFacts) -> list[Method]:
    """Some of a method's ladder; skips where it codes no blocks."""
    cls = find_method(id)
    if cls.open is Method.open:
        pytest.skip(f"{id} codes no blocks: it has a store of its own")
    ladder = list(cls.ladder(one, statistics(one)))
    return [
        ladder[i] for i in np.unique(np.linspace(0, len(ladder) - 1, RUNGS).round().astype(int))
    ]


def coders(id: str, one: LayerFacts) -> list[Coder]:
    """A rung's coders, those that its blocks age through too."""
    found = []
    for rung in rungs(id, one):
        found += [tier.method.open(one, statistics(one)) for tier in rung.tiers()]
    return found


def code(coder: Coder, pair: Pair, first: int = 0) -> Coded:
    saliency = pair[0].float().norm(dim=-1) if coder.wants_saliency else None
    positions = torch.arange(first, first + pair[0].shape[2])[None]
    return coder.encode(*pair, positions, saliency)


def decode(coder: Coder, coded: Coded, first: int = 0) -> Pair:
    blocks = next(iter(coded.values())).shape[1]
    return coder.decode(coded, torch.arange(first, first + blocks * BLOCK)[None])


def errors(found: Pair, true: Pair) -> list[float]:
    """Relative to the mean square of what is coded."""
    return [
        float((a.float() - b.float()).square().mean() / b.float().square().mean())
        for a, b in zip(found, true, strict=True)
    ]


@pytest.mark.parametrize("dtype", LAYERS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("id", method_ids())
def test_shapes_and_bytes_are_as_told(id: str, batch: int, dtype: torch.dtype) -> None:
    one = LAYERS[dtype]
    pair = states(one, batch, 2)
    for coder in coders(id, one):
        coded = code(coder, pair)
        assert all(part.shape[:2] == (batch, 2) for part in coded.values())
        nbytes = sum(part.numel() * part.element_size() for part in coded.values())
        assert nbytes == block_nbytes(coder, one) * batch * 2
        for found, true in zip(decode(coder, coded), pair, strict=True):
            assert found.shape == true.shape and found.dtype == dtype
            assert torch.isfinite(found).all()


@pytest.mark.parametrize("id", method_ids())
def test_more_bytes_err_less(id: str) -> None:
    one = LAYERS[torch.float32]
    pair = states(one, 2, 4)
    points = []
    for rung in rungs(id, one):
        coder = rung.open(one, statistics(one))
        points.append((block_nbytes(coder, one), *errors(decode(coder, code(coder, pair)), pair)))
    for (small, *worse), (large, *better) in itertools.pairwise(points):
        assert small <= large
        assert all(b <= w for b, w in zip(better, worse, strict=True))
    assert max(points[-1][1:]) < 1e-3


@pytest.mark.parametrize("id", method_ids())
def test_blocks_and_rows_know_nothing_of_each_other(id: str) -> None:
    one = LAYERS[torch.float32]
    pair = states(one, 3, 3)
    for coder in coders(id, one):
        whole, again = code(coder, pair), code(coder, pair)
        assert all(torch.equal(whole[name], again[name]) for name in whole)
        keys, values = decode(coder, whole)
        arena = Arena()
        for at in range(0, 3 * BLOCK, BLOCK):
            some = slice(at, at + BLOCK)
            arena.append(code(coder, (pair[0][:, :, some], pair[1][:, :, some]), at))
        apart = decode(coder, arena.blocks(0, 3))
        order = torch.tensor([2, 0, 0])
        turned = decode(coder, arena.rows(order).blocks(0, 3))
        for one_by_one, rows, at_once in zip(apart, turned, (keys, values), strict=True):
            torch.testing.assert_close(one_by_one, at_once, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(rows, one_by_one[order], rtol=1e-5, atol=1e-5)


def planted(kind: str, one: LayerFacts) -> Pair:
    keys, values = (x.clone() for x in states(one, 1, 2))
    if kind == "zero":
        return torch.zeros_like(keys), torch.zeros_like(values)
    if kind == "constant":
        # Before their rotation, as methods see them.
        assert one.rotary is not None
        same = torch.full_like(keys, 3.0).float()
        keys = one.rotary.turn(same, torch.arange(keys.shape[2])[None]).to(keys.dtype)
        return keys, torch.full_like(values, -0.5)
    if kind == "huge":
        return keys * 1e4, values * 1e4
    if kind == "channel":
        keys[..., 1], values[..., 1] = 500.0, 500.0
    if kind == "token":
        keys[:, :, 7], values[:, :, 7] = 500.0, 500.0
    return keys, values


@pytest.mark.parametrize("kind", ["zero", "constant", "huge", "channel", "token"])
@pytest.mark.parametrize("id", method_ids())
def test_no_input_breaks_it(id: str, kind: str) -> None:
    one = LAYERS[torch.bfloat16]
    pair = planted(kind, one)
    for rung in rungs(id, one):
        coder = rung.open(one, statistics(one))
        found = decode(coder, code(coder, pair))
        assert all(torch.isfinite(x).all() for x in found)
        if kind in ("zero", "constant") and not type(rung).calibrated:
            for x, true in zip(found, pair, strict=True):
                error = (x - true).float().abs().max()
                assert float(error) <= 0.1 * float(true.float().abs().max()) + 1e-3


@pytest.mark.parametrize("id", method_ids())
def test_text_and_data_say_all_of_it(id: str) -> None:
    one = LAYERS[torch.float32]
    cls = find_method(id)
    for rung in list(cls.ladder(one, statistics(one)))[:RUNGS]:
        assert parse_method(str(rung)) == rung
        assert make_method(rung.spec) == rung


WRONG: dict[str, list[dict[str, Any]]] = {
    "channel": [{"bits": 0}, {"bits": 9}, {"value_bits": 9}],
    "gear": [{"bits": 9}, {"rank": 9}, {"outliers": 0.5}],
    "kvquant": [{"bits": 7}, {"outliers": -0.1}],
    "staircase": [{"eight": 33}, {"of": "exact"}, {"of": "transform", "level": 0.0}],
    "zipcache": [{"high": 2, "low": 3}, {"salient": 12}],
}


@pytest.mark.parametrize(("id", "options"), [(id, o) for id, all in WRONG.items() for o in all])
def test_options_are_looked_at(id: str, options: dict[str, Any]) -> None:
    from waterfill.types import SpecError

    with pytest.raises(SpecError, match=id if options.get("level") != 0.0 else "level"):
        find_method(id)(**options)
