"""What every method that codes blocks must do, whoever wrote it: found by its file, tried on its own ladder."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from tests.runtime.cache.models import decoder, tokens
from tests.runtime.cache.models import statistics as statistics_of
from waterfill.runtime.cache.cache import KVCache
from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.fitting.planning import block_nbytes, harm, harms
from waterfill.runtime.cache.fitting.statistics import LayerStatistics, StreamStatistics
from waterfill.runtime.cache.held.arena import Arena
from waterfill.runtime.cache.held.store import Store
from waterfill.runtime.cache.held.track import Track
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
from waterfill.runtime.cache.rotary import Rotary
from waterfill.runtime.cache.saliency import Probes

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
    if cls.evicts:
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
        if kind in ("zero", "constant") and coder.position_free and not type(rung).calibrated:
            for x, true in zip(found, pair, strict=True):
                error = (x - true).float().abs().max()
                assert float(error) <= 0.1 * float(true.float().abs().max()) + 1e-3


@pytest.mark.parametrize("id", ["entropy", "transform"])
def test_large_tokens_are_not_cut_off(id: str) -> None:
    """Six times as far from the middle as calibration saw: still near, by their size."""
    one = facts()
    keys, values = states(one, 1, 2)
    assert one.rotary is not None
    positions = torch.arange(keys.shape[2])[None]
    plain = one.rotary.turn(keys, positions, backwards=True)
    known, large = statistics(one), [5, 40, 41, 42]
    for x, stream in ((plain, known.keys), (values, known.values)):
        mean = torch.from_numpy(stream.mean)[:, None]
        x[:, :, large] = mean + 6 * (x[:, :, large] - mean)
    keys = one.rotary.turn(plain, positions)
    coder = list(find_method(id).ladder(one, known))[-8].open(one, known)
    found = decode(coder, code(coder, (keys, values)))
    for x, y in zip((keys, values), found, strict=True):
        sizes = (x - x.mean(2, keepdim=True)).square().sum((0, 1, 3))
        share = (y - x).square().sum((0, 1, 3)) / sizes
        assert share[large].max() < 10 * share.median()


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


def store_of(text: str, one: LayerFacts) -> Store:
    tiers = [
        (tier.method.open(one, None), None if tier.tokens is None else tier.tokens // BLOCK)
        for tier in parse_method(text).tiers()
    ]
    return Store(one, tiers, Track(), 4, 16)


@pytest.mark.parametrize("steps", [(1000,), (300, *[1] * 100, 250, *[7] * 40), (5, *[33] * 25)])
def test_a_staircase_keeps_its_bounds_and_its_order(steps: tuple[int, ...]) -> None:
    one = LAYERS[torch.float32]
    keys, values = states(one, 2, 32)
    store, at = store_of("staircase:eight=64,four=96,three=128", one), 0
    for step in steps:
        some = slice(at, at + step)
        store.settle(step)
        store.append(keys[:, :, some], values[:, :, some])
        at += step
        for tier in store.tiers:
            assert tier.most is None or tier.arena.count <= tier.most
    counts = [tier.arena.count for tier in store.tiers]
    blocks = (at - 4 - 16) // BLOCK
    assert blocks - 1 <= sum(counts) <= blocks and counts[:2] == [2, 3]
    found = torch.cat([piece.read()[1] for piece in store.pieces()], 2)
    assert found.shape[2] == at
    # Every token is where it was, and the older the coarser.
    error = (found - values[:, :, :at]).square().mean((0, 1, 3))
    error /= values[:, :, :at].square().mean()
    edges = np.cumsum([4, *(n * BLOCK for n in reversed(counts))])
    means = [float(error[a:b].mean()) for a, b in itertools.pairwise(edges.tolist())]
    assert means[0] < 0.3
    assert all(a > b for a, b in itertools.pairwise(means))
    assert float(error[: edges[0]].max()) == float(error[edges[-1] :].max()) == 0


def test_a_prompt_is_coded_once_by_a_staircase() -> None:
    one = LAYERS[torch.float32]
    keys, values = states(one, 1, 32)
    store = store_of("staircase:eight=64,four=96,three=128", one)
    store.settle(1000)
    store.append(keys[:, :, :1000], values[:, :, :1000])
    coarse = parse_method("channel:bits=2").open(one, None)
    n = store.tiers[-1].arena.count
    direct = code(coarse, (keys[:, :, 4 : 4 + n * BLOCK], values[:, :, 4 : 4 + n * BLOCK]), 4)
    held = store.tiers[-1].arena.blocks(0, n)
    assert all(torch.equal(held[name], direct[name]) for name in direct)


def test_the_chain_of_codings_is_priced() -> None:
    one = LAYERS[torch.float32]
    own = statistics(one)
    fine, coarse = (parse_method(f"channel:bits={b}").open(one, own) for b in (3, 2))
    first, second = harms([fine, coarse], one, own)
    assert first == harm(fine, one, own)
    assert second > harm(coarse, one, own) > first


@pytest.mark.parametrize("window", [None, 40])
def test_saliency_is_attention_over_those_who_see(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 3, 96, 8, generator=generator)
    queries = torch.randn(2, 6, 32, 8, generator=generator)
    probes = Probes(queries, 96, window)
    probes.look([(0, keys[:, :, :50]), (50, keys[:, :, 50:])])
    found = torch.cat(
        [probes.saliency(0, keys[:, :, :70]), probes.saliency(70, keys[:, :, 70:])], 2
    )
    at, of = torch.arange(64, 96)[:, None], torch.arange(96)
    seen = (of <= at) & (of > at - (window or 96))
    scores = (queries.reshape(2, 3, 2, 32, 8) @ keys[:, :, None].transpose(3, 4)) / 8**0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).mean(2)
    expected = weights.sum(2) / seen.sum(0).clamp_min(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_salient_tokens_keep_more() -> None:
    one = LAYERS[torch.float32]
    keys, values = states(one, 1, 1)
    coder = parse_method("zipcache:high=6,low=2,salient=8").open(one, None)
    saliency = torch.zeros(1, one.heads, BLOCK)
    saliency[:, :, 5:13] = 1.0
    coded = coder.encode(keys, values, torch.arange(BLOCK)[None], saliency)
    for found, true in zip(decode(coder, coded), (keys, values), strict=True):
        error = (found - true).square().mean((0, 1, 3))
        assert float(error[5:13].max()) < 0.1 * float(error[13:].mean())


def test_late_queries_are_remembered_over_passes() -> None:
    one = LAYERS[torch.float32]
    keys, values = states(one, 1, 4)
    queries = torch.randn(1, 6, 128, one.key_width, generator=torch.Generator().manual_seed(0))
    store, at = store_of("zipcache", one), 0
    for step in (60, *[1] * 20):
        some = slice(at, at + step)
        store.settle(step)
        store.append(keys[:, :, some], values[:, :, some], None, queries[:, :, some])
        at += step
    assert store.queries is not None and store.asked == 80
    assert torch.equal(store.queries, queries[:, :, 48:80])
    store.keep(70)
    assert store.queries is not None and torch.equal(store.queries, queries[:, :, 48:70])


@pytest.mark.parametrize("id", ["gear", "kvquant", "staircase", "zipcache"])
def test_the_size_is_kept_under_transformers(id: str) -> None:
    model, ids = decoder(dtype=torch.bfloat16), tokens(2, 400)
    cache = KVCache(
        model, bits=9, tokens=400, batch=2, method=id, statistics=statistics_of(), guard=None
    )
    at, most = 0, 0
    for step in (200, *[1] * 20, 120, *[6] * 10):
        with torch.no_grad():
            logits = model(input_ids=ids[:, at : at + step], past_key_values=cache).logits
        assert torch.isfinite(logits).all()
        at, most = at + step, max(most, cache.nbytes)
    assert cache.budget.nbytes is not None
    assert at == 400 and 0.7 * cache.budget.nbytes < most <= cache.budget.nbytes
