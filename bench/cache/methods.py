"""Published cache methods at their papers' operating points, against the stock quantised cache at equal bytes."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.cache import held_out, model_of, statistics_of
from bench.harness import Row
from waterfill.evaluate.caching import CacheFidelity, cache_fidelity
from waterfill.evaluate.stock import backends, cache_nbytes, stock_cache
from waterfill.runtime.cache.cache import KVCache
from waterfill.runtime.cache.method import Coded, Coder

MODEL = "english-7m"
RESIDUAL = 32  # tokens that the stock cache leaves as they are, as few as a block here
# What each paper shows first. Blocks of 32 tokens give ranks and outliers less to share than prompts there do.
POINTS = {
    "kvquant, 4 bits and 1 % (Hooper et al. 2024)": "kvquant:bits=4,outliers=0.01",
    "kvquant, 3 bits and 1 % (Hooper et al. 2024)": "kvquant:bits=3,outliers=0.01",
    "kvquant, 2 bits and 1 %, Q-norm (Hooper et al. 2024)": "kvquant:bits=2,outliers=0.01",
    "gear, 4 bits, rank 2 and 2 % (Kang et al. 2024)": "gear:bits=4,rank=2,outliers=0.02",
    "gear, 2 bits, rank 2 and 2 % (Kang et al. 2024)": "gear:bits=2,rank=2,outliers=0.02",
    "zipcache, 4 and 2 bits, half salient (He et al. 2024)": "zipcache:high=4,low=2,salient=16",
    "staircase, 8 to 2 bits": "staircase:eight=64,four=256,three=256",
}
OURS = {f"channel, {bits} bits": f"channel:bits={bits}" for bits in (2, 3, 4)}


def rows(quick: bool) -> Iterator[Row]:
    """Each method's KL over the stock cache's at the same bytes."""
    if not backends():
        yield Row(
            "stock quantised cache", 0.0, "", note="not run: pip install optimum-quanto or hqq"
        )
        return
    count = 1 if quick else 4
    points = [_stock_point(bits, count) for bits in (2, 4)]
    for point, bits in zip(points, (2, 4), strict=True):
        note = f"{point.bytes_per_token:,.0f} bytes a token, {RESIDUAL} tokens exact"
        yield Row(f"{MODEL}: stock cache, {bits} bits", point.kl_nats, "nats", note=note)
    for claim, method in {**POINTS, **OURS}.items():
        yield _against(claim, _own(method, count), points)
    yield from _salient(count)


def _against(claim: str, own: CacheFidelity, points: list[CacheFidelity]) -> Row:
    """KL over what the stock cache has at these bytes: between its points, and beyond, straight in the logarithm."""
    sizes = [point.bytes_per_token for point in points]
    logs = [math.log(point.kl_nats) for point in points]
    slope = (logs[1] - logs[0]) / (sizes[1] - sizes[0])
    stock = math.exp(logs[0] + slope * (own.bytes_per_token - sizes[0]))
    ratio = own.kl_nats / stock
    outside = "" if sizes[0] <= own.bytes_per_token <= sizes[1] else " (extrapolated)"
    note = (
        f"{'reproduced' if ratio <= 1 else 'contradicted'}; {own.kl_nats:.3g} nats in "
        f"{own.bytes_per_token:,.0f} bytes a token, the stock cache there {stock:.3g}{outside}"
    )
    return Row(f"{MODEL}: {claim} over the stock cache", ratio, "ratio", note=note)


def _salient(count: int) -> Iterator[Row]:
    """Whether tokens that late queries look at are the ones to keep well."""
    method = "zipcache:high=4,low=2,salient=8"
    own, blind = _own(method, count), _own(method, count, blind=True)
    ratio = own.kl_nats / blind.kl_nats
    verdict = "reproduced" if ratio <= 1 else "contradicted"
    note = f"{verdict}; {own.kl_nats:.3g} nats, any eight tokens of a block {blind.kl_nats:.3g}"
    yield Row(f"{MODEL}: zipcache, salient tokens over any others", ratio, "ratio", note=note)


@dataclass(frozen=True, eq=False)
class _Blind(Coder):
    """A coder that is not told what is looked at."""

    coder: Coder

    def encode(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        saliency: torch.Tensor | None = None,
    ) -> Coded:
        return self.coder.encode(keys, values, positions)

    def decode(self, coded: Coded, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.coder.decode(coded, positions)


def _stock_point(bits: int, count: int) -> CacheFidelity:
    """Of the backend with the least KL."""
    model, windows = _subject(count)
    found = [
        cache_fidelity(
            model, windows, partial(stock_cache, model, backend, bits, RESIDUAL), cache_nbytes
        )
        for backend in backends()
    ]
    return min(found, key=lambda one: one.kl_nats)


@functools.cache
def _own(method: str, count: int, blind: bool = False) -> CacheFidelity:
    model, windows = _subject(count)

    def make() -> KVCache:
        cache = KVCache(
            model, method=method, statistics=statistics_of(MODEL), tokens=windows.shape[1]
        )
        if blind:
            for layer in cache.coded_layers:
                store = layer.store
                store.open([(_Blind(coder), most) for coder, most in store.coders])
        return cache

    return cache_fidelity(model, windows, make, lambda cache: cache.nbytes)


def _subject(count: int) -> tuple[Any, torch.Tensor]:
    return model_of(MODEL, torch.bfloat16), held_out(MODEL, count)
