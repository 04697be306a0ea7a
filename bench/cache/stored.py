"""Stored caches: bytes against 8-bit packing and CacheGen's deltas at equal KL, and how fast they go both ways.

KL: a prefix of three quarters of each window is stored and loaded, and the rest read 16 tokens at a time;
against the same prefix loaded bit for bit.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from bench.cache import context_of, held_out, model_of, statistics_of
from bench.harness import Row, alone
from waterfill.runtime.cache.cache import KVCache

NAME = "english-7m"
CHUNK = 16  # tokens that are scored at once
NEAR = 1e-3  # nats
GROUP = 10  # tokens that share an anchor, in CacheGen
LAYER_STEPS = (0.5, 1.0, 1.5)  # CacheGen's steps in the first, second and last third of the layers
SPEED_TOKENS = 1 << 15
LIKE = 1e-6  # level whose speed is measured

Change = Callable[[int, torch.Tensor], tuple[torch.Tensor, float]]
Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def rows(quick: bool) -> Iterator[Row]:
    """All claims of stored caches."""
    study = _Study(2 if quick else 8)
    plain = study.eight_bits()
    for calibrated in (True, False):
        level, nats, nbytes = study.coarsest(calibrated)
        how = "with calibration" if calibrated else "of the cache's own moments"
        yield Row(
            f"{NAME}: 8 bits packed over stored, {how}",
            plain[1] / nbytes,
            "x",
            2.0 if calibrated else None,
            ">=",
            f"level {level:.2g}: {8 * nbytes / study.numbers:.3f} bits a number, all counted, at {nats:.2g} nats; "
            f"8 bits: {8 * plain[1] / study.numbers:.2f} at {plain[0]:.2g}",
        )
        if calibrated:
            yield Row(f"{NAME}: KL of that file", nats, "nats", NEAR)
            yield study.cachegen(nats, nbytes)
    exact = study.stored("exact", True)[1]
    yield Row(f"{NAME}: bit for bit", 8 * exact / study.numbers, "bits/number", note="of 16")
    yield from _on_one_core(1 << 13 if quick else SPEED_TOKENS)


class _Study:
    """Prefixes of some windows, and what follows them."""

    def __init__(self, count: int) -> None:
        self.model = model_of(NAME, torch.bfloat16)
        self.windows = held_out(NAME, count)
        self.kept = context_of(NAME) * 3 // 4
        self.prefixes = [self._prefix(window) for window in self.windows]
        layers = self.prefixes[0][0]
        self.numbers = sum(k.numel() + v.numel() for k, v in layers)
        with tempfile.TemporaryDirectory() as folder:
            self.truth = [
                self._rest(self._through(Path(folder) / "a.kv", i, "exact", True)[0], i)
                for i in range(count)
            ]

    @torch.no_grad()
    def _prefix(self, window: torch.Tensor) -> tuple[Pairs, torch.Tensor]:
        cache = DynamicCache(config=self.model.config)
        ids = window[None, : self.kept]
        self.model(input_ids=ids, past_key_values=cache)
        return [(layer.keys, layer.values) for layer in cache.layers], ids

    def _cache(self, pairs: Pairs, calibrated: bool) -> KVCache:
        own = statistics_of(NAME) if calibrated else None
        return filled(self.model, pairs, own)

    def _through(self, path: Path, i: int, level: Any, calibrated: bool) -> tuple[KVCache, int]:
        pairs, ids = self.prefixes[i]
        nbytes = self._cache(pairs, calibrated).save(path, ids, level)
        return KVCache.load(path, self.model, token_ids=ids), nbytes

    @torch.no_grad()
    def _rest(self, cache: KVCache, i: int) -> torch.Tensor:
        ids = self.windows[i][None]
        found = [
            self.model(input_ids=ids[:, at : at + CHUNK], past_key_values=cache).logits
            for at in range(self.kept, ids.shape[1], CHUNK)
        ]
        return torch.cat(found, 1).float().log_softmax(-1)

    def _kl(self, cache: KVCache, i: int) -> float:
        truth, found = self.truth[i], self._rest(cache, i)
        return float((truth.exp() * (truth - found)).sum(-1).mean())

    def stored(self, level: Any, calibrated: bool) -> tuple[float, float]:
        """Nats, and bytes of a file, on average."""
        nats = nbytes = 0.0
        with tempfile.TemporaryDirectory() as folder:
            for i in range(len(self.windows)):
                cache, size = self._through(Path(folder) / "a.kv", i, level, calibrated)
                nats, nbytes = nats + self._kl(cache, i), nbytes + size
        return nats / len(self.windows), nbytes / len(self.windows)

    def coarsest(self, calibrated: bool) -> tuple[float, float, float]:
        """The coarsest level found that stays near: level, nats, bytes."""
        low, high, found = 1e-8, 1e-5, (1e-8, math.inf, math.inf)
        for _ in range(6):
            level = math.sqrt(low * high)
            nats, nbytes = self.stored(level, calibrated)
            low, high = (level, high) if nats < NEAR else (low, level)
            found = (level, nats, nbytes) if nats < NEAR else found
        return found

    def changed(self, change: Change) -> tuple[float, float]:
        """Nats and bytes where each layer's keys, and values, become something else."""
        nats = bits = 0.0
        for i, (pairs, _) in enumerate(self.prefixes):
            made = []
            for layer, pair in enumerate(pairs):
                both = [change(layer, x.float()) for x in pair]
                bits += sum(cost for _, cost in both)
                made.append((both[0][0].to(pair[0].dtype), both[1][0].to(pair[1].dtype)))
            nats += self._kl(self._cache(made, False), i)
        return nats / len(self.prefixes), bits / 8 / len(self.prefixes)

    def eight_bits(self) -> tuple[float, float]:
        """As 8-bit integers with a float16 scale for each token and head."""

        def change(layer: int, x: torch.Tensor) -> tuple[torch.Tensor, float]:
            step = (x.abs().amax(-1, True) / 127).clamp_min(6e-8).half().float()
            return (x / step).round() * step, 8.0 * x.numel() + 16 * step.numel()

        return self.changed(change)

    def cachegen(self, nats: float, nbytes: float) -> Row:
        """Ours over CacheGen's deltas, coded at their entropy with tables for nothing, at the same KL."""
        layers = len(self.prefixes[0][0])
        low, high, near = 0.01, 1.0, (math.inf, math.inf)
        for _ in range(7):
            scale = math.sqrt(low * high)

            def change(
                layer: int, x: torch.Tensor, scale: float = scale
            ) -> tuple[torch.Tensor, float]:
                return deltas(x, scale * LAYER_STEPS[layer * 3 // layers])

            found = self.changed(change)
            low, high = (scale, high) if found[0] < nats else (low, scale)
            near = min(near, found, key=lambda f: abs(math.log(f[0] / nats)))
        return Row(
            f"{NAME}: stored over CacheGen's deltas at equal KL",
            nbytes / near[1],
            "x",
            1.0,
            note=f"deltas: {8 * near[1] / self.numbers:.3f} bits a number at {near[0]:.2g} nats, ideally coded",
        )


def deltas(x: torch.Tensor, step: float) -> tuple[torch.Tensor, float]:
    """CacheGen's coding of (1, heads, tokens, width): what is decoded, and bits.

    Each tenth token at 8 bits, the others as what they differ from it, in steps of each channel's own
    standard deviation (Liu et al. 2023, arXiv 2310.07240, section 5.1).
    """
    flat = x[0].transpose(0, 1).flatten(1)  # (tokens, channels)
    unit = (flat[::GROUP].abs().amax(1, True) / 127).clamp_min(1e-8)
    anchors = (flat[::GROUP] / unit).round() * unit
    base = anchors.repeat_interleave(GROUP, 0)[: len(flat)]
    delta = flat - base
    others = torch.arange(len(flat)) % GROUP != 0
    size = step * delta[others].std(0, keepdim=True).clamp_min(1e-8)
    k = (delta / size).round()
    out = torch.where(others[:, None], base + k * size, base)
    bits = sum(_entropy(column) for column in k[others].T)
    bits += 8.0 * anchors.numel() + 16 * unit.numel()
    return out.reshape(x.shape[2], x.shape[1], -1).transpose(0, 1)[None], bits


def _entropy(symbols: torch.Tensor) -> float:
    """Bits of all symbols under their own frequencies."""
    counts = np.unique(symbols.numpy(), return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def filled(model: Any, pairs: Pairs, statistics: Any, tokens: int | None = None) -> KVCache:
    """A cache that holds these keys and values."""
    cache = KVCache(model, method="exact", statistics=statistics, tokens=tokens)
    for layer, (keys, values) in zip(cache.coded_layers, pairs, strict=True):
        layer.resume(keys.dtype, keys.device, 0)
        layer.restore(keys, values)
    return cache


def _on_one_core(tokens: int) -> Iterator[Row]:
    """`speed` in a process whose numpy has one thread too: others that wait for it would be counted."""
    found = alone(
        f"[asdict(row) for row in speed({tokens})]",
        "from dataclasses import asdict; from bench.cache.stored import speed",
        OPENBLAS_NUM_THREADS="1",
        OMP_NUM_THREADS="1",
    )
    yield from (Row(**row) for row in found)


@torch.no_grad()
def speed(tokens: int) -> Iterator[Row]:
    """Saving and loading a large cache of real keys and values, repeated with a little noise, on one core."""
    model = model_of(NAME, torch.bfloat16)
    stock = DynamicCache(config=model.config)
    model(input_ids=held_out(NAME, 4), past_key_values=stock)
    empty = KVCache(model, method="exact")
    pairs = []
    generator = torch.Generator().manual_seed(0)
    for facts, layer in zip(empty.facts, stock.layers, strict=True):
        assert facts is not None and facts.rotary is not None
        every = torch.arange(layer.keys.shape[2])[None]
        plain = facts.rotary.turn(layer.keys.float(), every, backwards=True)
        keys, values = (_repeated(x, tokens) for x in (plain, layer.values.float()))
        keys = keys + 0.02 * keys.std() * torch.randn(keys.shape, generator=generator)
        keys = facts.rotary.turn(keys, torch.arange(tokens)[None])
        pairs.append((keys.to(torch.bfloat16), values.to(torch.bfloat16)))
    cache = filled(model, pairs, statistics_of(NAME), tokens)
    nbytes = sum(k.nbytes + v.nbytes for k, v in pairs)
    ids = torch.zeros((1, tokens), dtype=torch.long)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    ) as folder:
        for level in (LIKE, "exact"):
            path = Path(folder) / "big.kv"
            took = _seconds(lambda level=level, path=path: cache.save(path, ids, level))  # type: ignore[misc]
            note = f"{nbytes / 1e6:.0f} MB, one thread, CPU time, a file in memory; median of 5"
            bar = 0.5 if level == LIKE else None
            yield Row(f"save at {level}", nbytes / took / 1e9, "GB/s", bar, ">=", note)
            took = _seconds(lambda path=path: KVCache.load(path, model, tokens=tokens))  # type: ignore[misc]
            yield Row(f"load at {level}", nbytes / took / 1e9, "GB/s", bar, ">=", note)
    torch.set_num_threads(before)


def _repeated(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """Rows but for their first tokens, one after another, over and over: (1, heads, tokens, width)."""
    once = x[:, :, 4:].transpose(0, 1).flatten(1, 2)
    return once.repeat(1, -(-tokens // once.shape[1]), 1)[None, :, :tokens]


def _seconds(call: Callable[[], object]) -> float:
    """Median CPU seconds of one call: what a core is busy, whoever else wants it."""
    call()
    times = []
    for _ in range(5):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return float(np.median(times))
