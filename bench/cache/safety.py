"""A cache is never silently wrong: a model that collapses is caught, and no order of operations confuses it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from bench.cache import held_out, model_of, statistics_of
from bench.harness import Row
from tests.runtime.cache.models import decoder, plant_outliers
from tests.runtime.cache.operations import LOSSLESS, play
from waterfill.runtime.cache.cache import KVCache
from waterfill.runtime.cache.guard import Guard

LIMIT = 0.1
COLLAPSE = 1.0  # nats: the model has lost its context
EVERY = 64
PROMPT, STEP = 64, 16
SEQUENCES = (("LlamaConfig", 0.7), ("MistralConfig", 0.2), ("GPTNeoXConfig", 0.1))


def rows(quick: bool) -> Iterator[Row]:
    """Planted outliers, then sequences of operations."""
    yield from _planted(quick)
    yield from _operations(500 if quick else 10_000)


def _planted(quick: bool) -> Iterator[Row]:
    name = "english-7m"
    ids = held_out(name, 1, 512 if quick else None)
    plain = model_of(name)
    probe = tuple(statistics_of(name).protocol.get("probe") or held_out(name, 2)[1].tolist())
    model = plant_outliers(copy.deepcopy(plain))
    exact = _read(model, ids, KVCache(model, method="exact", guard=None))
    unplanted = _read(plain, ids, KVCache(plain, method="exact", guard=None))
    note = "scaled pairs of key channels, queries by the inverse"
    yield Row("planting itself: KL", _kl(unplanted, exact), "nats", 1e-4, note=note)
    two = KVCache(plain, method="token:bits=2", guard=None)
    yield Row("token:bits=2 on the plain model", _kl(unplanted, _read(plain, ids, two)), "nats")
    two = KVCache(model, method="token:bits=2", guard=None)
    harm = _kl(exact, _read(model, ids, two))
    yield Row("token:bits=2, outliers planted, no guard", harm, "nats", COLLAPSE, ">=")
    alone = two.nbytes
    channel = KVCache(model, method="channel:bits=2", guard=None)
    yield Row(
        "channel:bits=2, outliers planted, no guard", _kl(exact, _read(model, ids, channel)), "nats"
    )
    for what, guard in (
        ("a guard when it is made", Guard(LIMIT, every=1 << 30, probe=probe)),
        ("a guard in use", Guard(LIMIT, every=EVERY, probe=probe[:1])),
        ("a guard, both", Guard(LIMIT, every=EVERY, probe=probe)),
    ):
        cache = KVCache(model, method="token:bits=2", guard=guard)
        assert cache.guard is not None
        harm = _kl(exact, _read(model, ids, cache))
        note = f"{cache.nbytes / alone:.2f}x its bytes; {_short(cache.guard.report)}"
        yield Row(f"token:bits=2, outliers planted, {what}", harm, "nats", LIMIT, note=note)


def _short(report: Any) -> str:
    steps = sum(len(names) - 1 for names in report.fallbacks.values())
    return f"{len(report.probes)} probes, {steps} fallbacks, {report.refused} refused"


@torch.no_grad()
def _read(model: Any, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Log chances of the next token over a text, read in steps, the guard asked after each."""
    found, at = [], 0
    while at < ids.shape[1]:
        n = STEP if at else PROMPT
        found.append(model(input_ids=ids[:, at : at + n], past_key_values=cache).logits)
        at += n
        if cache.guard is not None:
            cache.check(ids)
    return torch.cat(found, 1).float().log_softmax(-1)


def _kl(exact: torch.Tensor, coded: torch.Tensor) -> float:
    """Mean nats after the prompt."""
    return float((exact.exp() * (exact - coded)).sum(-1)[:, PROMPT:].mean())


def _operations(count: int) -> Iterator[Row]:
    wrong = 0
    tokens = refused = 0
    for family, share in SEQUENCES:
        model = decoder(family, layers=1)
        caches = {m: KVCache(model, method=m, guard=None) for m in ("exact", "channel", "token")}
        for seed in range(int(count * share)):
            # Values of the lossless rung, and lengths and positions of the others.
            method = "exact" if seed % 2 else ("channel", "token")[seed // 2 % 2]
            try:
                run = play(caches[method], seed, within=LOSSLESS if method == "exact" else None)
                tokens, refused = tokens + run.tokens, refused + run.refused
            except AssertionError:
                wrong += 1
                caches[method] = KVCache(model, method=method, guard=None)
    note = f"of {count:,}; {tokens / count:.0f} tokens at the end of one, {refused} operations refused with a word"
    yield Row(
        "sequences of operations that disagree with the reference", wrong, "sequences", 0, note=note
    )
