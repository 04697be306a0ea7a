"""KL at equal bytes against transformers' own quantised cache, and near-lossless at a quarter of the bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch

from bench.cache import folder_of, held_out, learned, model_of, statistics_of, windows_of
from bench.harness import Row
from waterfill.evaluate.caching import CacheFidelity, cache_fidelity
from waterfill.evaluate.stock import backends, cache_nbytes, stock_cache
from waterfill.runtime.cache.cache import KVCache
from waterfill.runtime.cache.fitting.statistics import CacheStatistics

OURS = ("transform", "entropy")
MODELS = ("english-7m", "demo", "stories260K")
DEFAULT, SHORT = 128, 32  # tokens the stock cache leaves as they are: its default, and few
LONGER = 4  # times the context, by YaRN


def rows(quick: bool) -> Iterator[Row]:
    """All claims of quality."""
    count = 1 if quick else 4
    for name in MODELS[:1] if quick else MODELS:
        model = model_of(name, torch.bfloat16)
        windows = held_out(name, count)
        floor = _fidelity(model, windows, None, {"method": "exact"})
        note = "exact blocks read piece by piece: bfloat16's own noise"
        yield Row(f"{name}: KL of exact blocks", floor.kl_nats, "nats", note=note)
        known = statistics_of(name)
        yield from _against_stock(name, model, windows, known)
        yield _near_lossless(name, model, windows, known)
    if not quick:
        yield _longer("english-7m", 2)


def _against_stock(
    name: str, model: Any, windows: torch.Tensor, known: CacheStatistics
) -> Iterator[Row]:
    if not backends():
        yield Row(
            f"{name}: stock quantised cache",
            0.0,
            "",
            note="not run: pip install optimum-quanto or hqq",
        )
        return
    for bits in (4, 2):
        for residual in (DEFAULT, SHORT):
            found = {
                backend: cache_fidelity(
                    model,
                    windows,
                    partial(stock_cache, model, backend, bits, residual),
                    cache_nbytes,
                )
                for backend in backends()
            }
            best = min(found, key=lambda backend: found[backend].kl_nats)
            stock = found[best]
            own = _fidelity(model, windows, known, {"bytes_per_token": stock.bytes_per_token})
            yield Row(
                f"{name}: KL over stock's, {bits} bits, {residual} tokens exact",
                own.kl_nats / stock.kl_nats,
                "ratio",
                0.5,
                note=f"{own.kl_nats:.3g} nats in {own.bytes_per_token:,.0f} bytes a token, {best} "
                f"{stock.kl_nats:.3g} in {stock.bytes_per_token:,.0f}",
            )


def _near_lossless(label: str, model: Any, windows: torch.Tensor, known: CacheStatistics) -> Row:
    size = {"bytes_per_token": _exact_nbytes(model) / 4}
    found = {m: _fidelity(model, windows, known, {**size, "method": m}) for m in OURS}
    best = min(found, key=lambda m: found[m].kl_nats)
    others = ", ".join(f"{m} {one.kl_nats:.3g}" for m, one in found.items() if m != best)
    note = f"{best}, {found[best].bytes_per_token:,.0f} of {_exact_nbytes(model):,} bytes a token; {others}"
    title = f"{label}: KL at a quarter of bfloat16's bytes"
    return Row(title, found[best].kl_nats, "nats", 1e-3, note=note)


def _longer(name: str, count: int) -> Row:
    """The same model at several times its context, its rotary positions stretched."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder_of(name))
    context = config.max_position_embeddings
    config.rope_parameters = {
        **config.rope_parameters, "rope_type": "yarn", "factor": float(LONGER),
        "original_max_position_embeddings": context,
    }  # fmt: skip
    config.max_position_embeddings = LONGER * context
    model = AutoModelForCausalLM.from_pretrained(
        folder_of(name), config=config, dtype=torch.bfloat16
    ).eval()
    windows = windows_of(name, "english_heldout.txt", 0, count, LONGER * context)
    # Longer texts are read otherwise, and stretched keys are larger: another cache than the short model's.
    known = learned(f"{name}-{LONGER * context}", name, model, LONGER * context)
    return _near_lossless(f"{name} at {LONGER * context} tokens (YaRN)", model, windows, known)


def _fidelity(
    model: Any, windows: torch.Tensor, known: CacheStatistics | None, options: dict[str, Any]
) -> CacheFidelity:
    make = partial(KVCache, model, statistics=known, tokens=windows.shape[1], **options)
    return cache_fidelity(model, windows, make, lambda c: c.nbytes)


@cache
def _exact_nbytes(model: Any) -> int:
    return sum(one.token_nbytes for one in KVCache(model, method="exact").facts if one is not None)
