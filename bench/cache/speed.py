"""Time of a decode step and of an append, and memory of a cache, as the text grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bench.harness import Row, alone
from waterfill.coding import native
from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.fitting.statistics import LayerStatistics, StreamStatistics
from waterfill.runtime.cache.held.attending import attend
from waterfill.runtime.cache.held.states import View
from waterfill.runtime.cache.held.store import Store
from waterfill.runtime.cache.held.track import Track
from waterfill.runtime.cache.methods.transform import Transform
from waterfill.runtime.cache.rotary import Rotary

SINKS, RECENT = 4, 16
SHORT, MIDDLE, LONG = 1 << 10, 1 << 13, 1 << 15
APPENDED = 256  # tokens over which an append's cost is spread: blocks are coded now and then


@dataclass(frozen=True)
class Shape:
    """A layer's heads."""

    heads: int
    shared: int
    width: int


SHAPES = {"32 heads over 8 of 128": Shape(32, 8, 128), "8 heads over 4 of 32": Shape(8, 4, 32)}


def learned(shape: Shape) -> LayerStatistics:
    """Of random streams whose variances fall by e^6."""
    rng = np.random.default_rng(0)
    heads, width = shape.shared, shape.width

    def stream() -> StreamStatistics:
        mix = rng.normal(size=(heads, width, width)) / width**0.5
        covariance = (mix * np.exp(-6 * np.arange(width) / width)) @ mix.swapaxes(1, 2)
        mean, samples = np.zeros((heads, width)), np.zeros((heads, 0, width))
        harm = np.broadcast_to(1e-2 * np.eye(width), covariance.shape)
        return StreamStatistics(*(x.astype(np.float32) for x in (mean, covariance, harm, samples)))

    return LayerStatistics(stream(), stream())


def opener(shape: Shape, bits: float, dtype: torch.dtype = torch.float32) -> Callable[[], Store]:
    """Makes stores of a layer whose codes take about so many bits a number."""
    pairs = torch.arange(shape.width // 2)
    rotary = Rotary(pairs, pairs + len(pairs), 1e4 ** -(pairs.double() / len(pairs)))
    facts = LayerFacts(0, shape.shared, shape.width, shape.width, dtype, None, rotary)
    known = learned(shape)
    low, high = -30.0, 0.0  # of the level's logarithm

    def used(level: float) -> float:
        blocks = Transform(level).open(facts, known).blocks
        assert blocks is not None
        return sum(blocks.nbytes) / (8 * shape.shared * shape.width)

    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if used(float(np.exp(middle))) < bits else (middle, high)
    coder = Transform(float(np.exp(low))).open(facts, known)
    return lambda: Store(facts, [(coder, None)], Track(), SINKS, RECENT)


def states(shape: Shape, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Random keys or values."""
    return (0.3 * torch.randn(1, shape.shared, tokens, shape.width)).to(dtype)


def filled(store: Store, shape: Shape, tokens: int) -> Store:
    """The store with random tokens, given a thousand at a time."""
    for low in range(0, tokens, 1024):
        n = min(1024, tokens - low)
        store.append(*(states(shape, n, store.facts.dtype) for _ in range(2)))
    store.settle()
    return store


def exact_step(shape: Shape, tokens: int, q: torch.Tensor, new: torch.Tensor) -> Callable[[], Any]:
    """One token over transformers' own cache, which forgets it again."""
    cache = DynamicCache()
    cache.update(states(shape, tokens, q.dtype), states(shape, tokens, q.dtype), 0)
    layer: Any = cache.layers[0]
    kept = layer.keys, layer.values

    class Module(torch.nn.Module):
        num_key_value_groups = shape.heads // shape.shared
        is_causal = True

    module = Module()

    def step() -> Any:
        layer.keys, layer.values = kept
        return sdpa_attention_forward(module, q, *cache.update(new, new, 0), None)

    return step


def coded_step(store: Store, q: torch.Tensor, new: torch.Tensor) -> Callable[[], Any]:
    """One token over ours, which does not remember it."""
    return lambda: attend(View(store, new, new), q, None, q.shape[3] ** -0.5)


def seconds(calls: Mapping[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Least of each, in turns so that a slow spell of the machine hits all."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeat + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            took[name].append(time.perf_counter() - start)
    return {name: min(times[1:]) for name, times in took.items()}


def attention(quick: bool) -> Iterator[Row]:
    """A decode step's attention against the exact cache's."""
    lengths = (SHORT, MIDDLE) if quick else (SHORT, MIDDLE, LONG)
    for name, shape in SHAPES.items():
        for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
            new = states(shape, 1, dtype)
            q = torch.randn(1, shape.heads, 1, shape.width).to(dtype)
            opened = {bits: opener(shape, bits, dtype) for bits in (2, 4)}
            for tokens in lengths:
                calls = {"exact": exact_step(shape, tokens, q, new)}
                for bits, make in opened.items():
                    calls[str(bits)] = coded_step(filled(make(), shape, tokens), q, new)
                took = seconds(calls, 5 if quick else 15)
                for bits in opened:
                    ours = took[str(bits)]
                    yield Row(
                        f"attention of a step, {name}, {str(dtype)[6:]}, {tokens} tokens, {bits} bits",
                        ours / took["exact"], "of exact's", None if tokens == SHORT else 1.0,
                        note=f"{1e3 * ours:.2f} ms; exact cache {1e3 * took['exact']:.2f} ms",
                    )  # fmt: skip


def appends(stores: Mapping[int, Store], shape: Shape, rounds: int) -> dict[int, float]:
    """Seconds of a token's append, by tokens held: what `update` and `commit` do, blocks coded in turn."""
    new = states(shape, 1, torch.float32)
    took: dict[int, list[float]] = {tokens: [] for tokens in stores}
    for _ in range(rounds):
        for tokens, store in stores.items():
            start = time.perf_counter()
            for _ in range(APPENDED):
                store.settle()
                View(store, new, new).commit()
            took[tokens].append((time.perf_counter() - start) / APPENDED)
    return {tokens: min(times) for tokens, times in took.items()}


def growth(quick: bool) -> Iterator[Row]:
    """What a token costs late in a text over what it costs early."""
    shape = SHAPES["32 heads over 8 of 128"]
    long = MIDDLE if quick else LONG
    make = opener(shape, 2)
    stores = {tokens: filled(make(), shape, tokens) for tokens in (SHORT, long)}
    q, new = torch.randn(1, shape.heads, 1, shape.width), states(shape, 1, torch.float32)
    calls = {str(t): coded_step(s, q, new) for t, s in stores.items()}
    took = seconds(calls, 5 if quick else 15)
    reads = took[str(long)] / took[str(SHORT)]
    cost = appends(stores, shape, 8)
    note = f"{1e6 * cost[SHORT]:.0f} us at {SHORT}, {1e6 * cost[long]:.0f} us at {long}"
    ratio = cost[long] / cost[SHORT]
    yield Row(f"append alone, {long} tokens over {SHORT}", ratio, "times", 1.2, note=note)
    whole = [took[str(t)] + cost[t] for t in (SHORT, long)]
    note = f"{long // SHORT} times as many tokens; attention alone {reads:.1f} times"
    ratio = whole[1] / whole[0]
    yield Row(f"whole step of a layer, {long} tokens over {SHORT}", ratio, "times", note=note)


def resident() -> int:
    """Bytes of this process in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def grown(tokens: int, layers: int) -> dict[str, int]:
    """Grow the stores of a model by blocks; the most that memory grew, and the bytes they say they hold."""
    shape = SHAPES["32 heads over 8 of 128"]
    make = opener(shape, 2)
    filled(make(), shape, 1 << 11)  # what torch allocates once
    stores = [make() for _ in range(layers)]
    # Else the stores would grow into what was freed, and seem to take nothing.
    native.trim_memory()
    before, most = resident(), 0
    for at in range(0, tokens, 32):
        for store in stores:
            store.settle()
            store.append(*(states(shape, 32, torch.float32) for _ in range(2)))
        if at % 1024 == 0:
            most = max(most, resident())
    for store in stores:
        store.settle()
    tables = stores[0].tiers[0].coder.nbytes
    # The stores share one coder here, whose tables were there before.
    held = sum(store.nbytes - tables for store in stores)
    return {"grown": max(most, resident()) - before, "held": held}


def memory(quick: bool) -> Iterator[Row]:
    """Memory of a process that does nothing else, over the bytes held."""
    tokens, layers = (MIDDLE, 8) if quick else (LONG, 8)
    found = alone(f"grown({tokens}, {layers})", "from bench.cache.speed import grown")
    note = f"{found['grown']:,} bytes more in memory at most, {found['held']:,} held"
    ratio = found["grown"] / found["held"]
    name = f"memory of {layers} layers grown to {tokens} tokens"
    yield Row(name, ratio, "of nbytes", 1.05, note=note)


def rows(quick: bool) -> Iterator[Row]:
    """Attention's time, growth of the cost of a token, memory."""
    torch.manual_seed(0)
    with torch.no_grad():
        yield from attention(quick)
        yield from growth(quick)
    yield from memory(quick)
