"""Caches that keep some tokens of each head: which ones, what attention sees of them, what they hold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from tests.runtime.cache.models import decoder, tokens
from tests.runtime.cache.test_cache import STEPS, logits
from waterfill.runtime.cache.cache import KVCache
from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.fitting.planning import Budget
from waterfill.runtime.cache.guard import Guard
from waterfill.runtime.cache.held.attending import attend
from waterfill.runtime.cache.held.kept import KeptStore, batch_of
from waterfill.runtime.cache.held.states import View
from waterfill.runtime.cache.held.track import Track
from waterfill.runtime.cache.method import find_method, parse_method
from waterfill.types import BudgetError, SpecError, WaterfillError

BATCH, HEADS, GROUP, WIDTH = 2, 2, 2, 8
SINKS, RECENT = 3, 6
EVICTORS = ("ems", "elastic")


def store_of(method: str, window: int | None = None) -> KeptStore:
    facts = LayerFacts(0, HEADS, WIDTH, WIDTH, torch.float32, window, None)
    chosen = parse_method(method)
    made = chosen.store(facts, [], Track(), Budget(None, 512, BATCH, SINKS, RECENT))
    assert isinstance(made, KeptStore)
    return made


def states(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and queries; few directions, so that some keys are alike."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, WIDTH, generator=generator) * 2
    which = torch.randint(0, 6, (BATCH, HEADS, count), generator=generator)
    keys = centres[which] + 0.5 * torch.randn(BATCH, HEADS, count, WIDTH, generator=generator)
    values = torch.randn(BATCH, HEADS, count, WIDTH, generator=generator)
    queries = torch.randn(BATCH, HEADS * GROUP, count, WIDTH, generator=generator)
    return keys, values, queries


@dataclass
class Slot:
    index: int
    key: np.ndarray
    value: np.ndarray
    weight: float = 1.0
    mass: float = 0.0
    late: float = 0.0


class Plain:
    """One row, a token at a time, in loops: what the store is to do."""

    def __init__(self, method: Any, capacity: int, padding: int) -> None:
        self.method, self.capacity, self.padding = method, capacity, padding
        self.slots: list[list[Slot]] = [[] for _ in range(HEADS)]
        self.count = 0

    def append(self, keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> None:
        m = keys.shape[1]
        for head in range(HEADS):
            for i in range(m):
                self.slots[head].append(Slot(self.count + i, keys[head, i], values[head, i]))
            self._observe(self.slots[head], queries[head * GROUP : (head + 1) * GROUP])
        self.count += m
        if len(self.slots[0]) > self.capacity:
            self._evict(m > 1)

    def _observe(self, slots: list[Slot], queries: np.ndarray) -> None:
        m, late = queries.shape[1], self.method.late
        last = [0.0] * len(slots)
        for i in range(m):
            at = self.count + i
            seen = [k for k, s in enumerate(slots) if self.padding <= s.index <= at]
            for query in queries[:, i]:
                scores = [slots[k].key @ query / WIDTH**0.5 + np.log(slots[k].weight) for k in seen]
                shares = np.exp(np.array(scores) - max(scores, default=0.0))
                for k, share in zip(seen, shares / shares.sum(), strict=True):
                    slots[k].mass += share / GROUP
                    if i >= m - late:
                        last[k] += share / GROUP
        for slot, got in zip(slots, last, strict=True):
            slot.late = slot.late * (1 - min(m, late) / late) + got / late

    def _evict(self, prompt: bool) -> None:
        keep = self.capacity - batch_of(self.capacity)
        if self.method.id == "ems":
            self.slots = [self._ems(slots, keep) for slots in self.slots]
            return
        mass = [
            np.mean([self.slots[h][k].mass for h in range(HEADS)])
            for k in range(len(self.slots[0]))
        ]
        if self.method.attention == "mean":
            ages = [self.count - slot.index for slot in self.slots[0]]
            mass = [m / age for m, age in zip(mass, ages, strict=True)]
        self.slots = [self._elastic(slots, mass, keep, prompt) for slots in self.slots]

    def _stays(self, slot: Slot) -> bool:
        place = slot.index - self.padding
        return 0 <= place < SINKS or (place >= 0 and self.count - slot.index <= RECENT)

    def _best(
        self, slots: list[Slot], importance: list[float], keep: int
    ) -> tuple[list[int], list[int]]:
        def rank(k: int) -> float:
            if slots[k].index < self.padding:
                return -1.0 - (self.count - slots[k].index)
            return np.inf if self._stays(slots[k]) else importance[k]

        order = sorted(range(len(slots)), key=rank, reverse=True)
        return sorted(order[:keep]), order[keep:]

    def _ems(self, slots: list[Slot], keep: int) -> list[Slot]:
        real = [s.index >= self.padding for s in slots]
        mean = np.array(
            [r * s.mass / (self.count - s.index) for s, r in zip(slots, real, strict=True)]
        )
        late = np.array([r * s.late for s, r in zip(slots, real, strict=True)])
        importance = mean * late.sum() / mean.sum() + late
        kept, evicted = self._best(slots, list(importance), keep)
        candidates = evicted[: int(self.method.candidates * keep)]
        open_ones = [k for k in kept if real[k] and not self._stays(slots[k])]
        taken: dict[int, list[int]] = {k: [] for k in kept}
        for k in candidates:
            x = slots[k].key / np.linalg.norm(slots[k].key)
            like = [x @ slots[o].key / np.linalg.norm(slots[o].key) for o in open_ones]
            if real[k] and max(like) > self.method.threshold:
                taken[open_ones[int(np.argmax(like))]].append(k)
        return [self._merged(slots, k, taken[k], importance) for k in kept]

    @staticmethod
    def _merged(slots: list[Slot], k: int, more: list[int], shares: np.ndarray) -> Slot:
        members = [k, *more]
        total = sum(shares[i] for i in members)
        grown = total / shares[k] if more else 1.0
        own = slots[k]
        return Slot(
            own.index,
            sum(shares[i] * slots[i].key for i in members) / total if more else own.key,
            sum(shares[i] * slots[i].value for i in members) / total if more else own.value,
            sum(slots[i].weight for i in members), own.mass * grown, own.late * grown,
        )  # fmt: skip

    def _elastic(self, slots: list[Slot], mass: list[float], keep: int, prompt: bool) -> list[Slot]:
        if not prompt:
            point = max(0, keep - self.method.distance)
            ages = [np.inf if k < point else float(k) for k in range(len(slots))]
            return [slots[k] for k in self._best(slots, ages, keep)[0]]
        kept, evicted = self._best(slots, mass, keep)
        anchors = [k for k in kept if slots[k].index >= self.padding and not self._stays(slots[k])]
        for k in evicted:
            if self.method.merged and slots[k].index >= self.padding:
                near = min(anchors, key=lambda a: abs(slots[a].index - slots[k].index))
                a, b = slots[near], slots[k]
                a.key = (a.weight * a.key + b.weight * b.key) / (a.weight + b.weight)
                a.value = (a.weight * a.value + b.weight * b.value) / (a.weight + b.weight)
                a.weight += b.weight
        return [slots[k] for k in kept]


@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize(
    "method",
    [
        "ems:count=40", "ems:count=40,candidates=0.5,threshold=0.8", "elastic:count=40,distance=11",
        "elastic:count=40,merged=0,attention=mean",
    ],
)  # fmt: skip
def test_what_stays_is_what_loops_say(method: str, padding: int) -> None:
    store, (keys, values, queries) = store_of(method), states(110)
    chosen = parse_method(method)
    rows = [Plain(chosen, 40, 0), Plain(chosen, 40, padding)]
    at = 0
    for m in (70, 1, 1, 1, 1, 1, 9, 1, 1, 1, 1, 22):
        some = slice(at, at + m)
        offsets = torch.tensor([[0], [-padding]])
        positions = (torch.arange(at, at + m)[None] + offsets).clamp_min(0)
        store.append(keys[:, :, some], values[:, :, some], positions, queries[:, :, some])
        for row, plain in enumerate(rows):
            parts = (keys[row, :, some], values[row, :, some], queries[row, :, some])
            plain.append(*(x.double().numpy() for x in parts))
        at += m
        kept = store.kept
        assert kept is not None and store.tokens == at
        for row, plain in enumerate(rows):
            for head, slots in enumerate(plain.slots):
                assert kept.index[row, head].tolist() == [s.index for s in slots]
                for name, wanted in (
                    ("keys", [s.key for s in slots]),
                    ("values", [s.value for s in slots]),
                    ("weight", [s.weight for s in slots]),
                    ("mass", [s.mass for s in slots]),
                ):
                    found = getattr(kept, name)[row, head].numpy()
                    np.testing.assert_allclose(found, np.array(wanted), rtol=2e-3, atol=2e-4)
    found = store.kept
    assert found is not None
    assert (float(found.weight.max()) > 1) == bool(getattr(chosen, "merged", 1))


@pytest.mark.parametrize("method", ["ems:count=40,candidates=0", "elastic:count=40"])
def test_attention_sees_just_what_is_kept(method: str) -> None:
    store, (keys, values, queries) = store_of(method), states(100)
    store.append(keys[:, :, :90], values[:, :, :90], None, queries[:, :, :90])
    kept = store.kept
    assert kept is not None
    view = View(store, keys[:, :, 90:], values[:, :, 90:])
    mask = torch.rand(BATCH, 1, 10, 100, generator=torch.Generator().manual_seed(1)) < 0.8
    mask &= torch.arange(100) <= torch.arange(90, 100)[:, None]
    mask[..., -10:] |= torch.eye(10, dtype=torch.bool)
    found = attend(view, queries[:, :, 90:], mask, 0.3)
    # All tokens, those that were evicted hidden, and kept ones as they are now.
    full_k, full_v = keys.clone(), values.clone()
    at = kept.index.long()
    full_k.scatter_(2, at[..., None].expand_as(kept.keys), kept.keys)
    full_v.scatter_(2, at[..., None].expand_as(kept.values), kept.values)
    bias = torch.full((BATCH, HEADS, 100), -torch.inf).scatter_(2, at, kept.weight.log())
    bias[..., 90:] = 0
    bias = bias[:, :, None].masked_fill(~mask, -torch.inf).repeat_interleave(GROUP, 1)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        queries[:, :, 90:], full_k, full_v, bias, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(found, wanted.transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_tokens_that_say_the_same_are_merged_without_loss() -> None:
    store = store_of("ems:count=30,threshold=0.99,candidates=9")
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(0, 4, (BATCH, HEADS, 200), generator=generator)
    which[..., :SINKS], which[..., -RECENT:] = 0, 1
    keys = 0.5 * torch.randn(4, WIDTH, generator=generator)[which]
    values = torch.randn(4, WIDTH, generator=generator)[which]
    queries = torch.randn(BATCH, HEADS * GROUP, 201, WIDTH, generator=generator)
    store.append(keys, values, None, queries[:, :, :200])
    found = attend(View(store, keys[:, :, :1], values[:, :, :1]), queries[:, :, 200:], None, 0.3)
    everything = (torch.cat([x, x[:, :, :1]], 2) for x in (keys, values))
    wanted = torch.nn.functional.scaled_dot_product_attention(
        queries[:, :, 200:], *everything, scale=0.3, enable_gqa=True
    )
    kept = store.kept
    assert kept is not None and kept.slots < 30 and float(kept.weight.sum()) == 200 * BATCH * HEADS
    torch.testing.assert_close(found, wanted.transpose(1, 2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "family", ["LlamaConfig", "MistralConfig", "Gemma3TextConfig", "GPT2Config"]
)
@pytest.mark.parametrize("method", EVICTORS)
def test_all_tokens_are_the_stock_cache(method: str, family: str) -> None:
    model, ids = decoder(family), tokens(2, sum(STEPS))
    mine = logits(model, ids, KVCache(model, method=method), STEPS)
    stock = logits(model, ids, DynamicCache(config=model.config), STEPS)
    torch.testing.assert_close(mine, stock, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("method", EVICTORS)
@pytest.mark.parametrize("family", ["LlamaConfig", "MistralConfig"])
def test_the_size_is_kept_at_every_length(method: str, family: str) -> None:
    model = decoder(family, dtype=torch.bfloat16)
    cache = KVCache(model, bits=4, tokens=400, batch=2, method=method)
    assert cache.budget.nbytes is not None
    most, at = 0, 0
    ids = tokens(2, 400)
    for step in (100, *[1] * 40, 100, *[7] * 20, 20):
        logits(model, ids[:, at : at + step], cache, (step,))
        at, most = at + step, max(most, cache.nbytes)
        assert cache.get_seq_length() == at
    assert most <= cache.budget.nbytes
    # Windows need no more than they see.
    assert most > 0.97 * cache.budget.nbytes or family == "MistralConfig"
    assert sum(choice.nbytes for choice in cache.choices.values()) <= cache.budget.nbytes


@pytest.mark.parametrize("method", EVICTORS)
def test_more_tokens_harm_less(method: str) -> None:
    model, ids = decoder(), tokens(1, 300)
    steps = (100, *[20] * 10)
    exact = logits(model, ids, DynamicCache(), steps).log_softmax(-1)
    harms = []
    for share in (0.12, 0.3, 1.0):
        kept = logits(
            model, ids, KVCache(model, method=f"{method}:share={share}", tokens=300), steps
        )
        harms.append(float((exact.exp() * (exact - kept.log_softmax(-1))).sum(-1).mean()))
    assert harms[0] > harms[1] > abs(harms[2])


@pytest.mark.parametrize("method", [f"{one}:count=40" for one in EVICTORS])
def test_a_padded_row_writes_what_it_does_alone(method: str) -> None:
    model, ids = decoder(), tokens(2, 90)
    mask = torch.ones_like(ids)
    mask[1, :13], ids[1, :13] = 0, 0
    options = {"max_new_tokens": 30, "do_sample": False}
    both = model.generate(
        ids, attention_mask=mask, past_key_values=KVCache(model, method=method), **options
    )
    alone = model.generate(ids[1:, 13:], past_key_values=KVCache(model, method=method), **options)
    assert torch.equal(both[1, 13:], alone[0])


@pytest.mark.parametrize("method", EVICTORS)
def test_beams_of_all_tokens_are_the_stock_ones(method: str) -> None:
    model, ids = decoder(), tokens(2, 60)
    options = {"max_new_tokens": 40, "do_sample": False, "num_beams": 3}
    mine = model.generate(ids, past_key_values=KVCache(model, method=method), **options)
    assert torch.equal(mine, model.generate(ids, **options))
    few = KVCache(model, method=f"{method}:count=40")
    assert model.generate(ids, past_key_values=few, **options).shape == mine.shape


@pytest.mark.parametrize("method", [f"{one}:count=40" for one in EVICTORS])
def test_rows_are_taken_with_what_they_kept(method: str) -> None:
    model, ids = decoder(), tokens(2, 140)
    cache, other = KVCache(model, method=method), KVCache(model, method=method)
    for one in (cache, other):
        logits(model, ids[:, :120], one, (100, *[1] * 20))
    cache.reorder_cache(torch.tensor([1, 0]))
    mine = logits(model, ids[:, 120:].flip(0), cache, (20,))
    wanted = logits(model, ids[:, 120:], other, (20,)).flip(0)
    torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-4)
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(3)
    assert cache.coded_layers[0].store.batch == 3


@pytest.mark.parametrize("method", [f"{one}:count=40" for one in EVICTORS])
def test_cropped_and_reset(method: str) -> None:
    model, ids = decoder(), tokens(1, 200)
    cache, other = KVCache(model, method=method), KVCache(model, method=method)
    logits(model, ids, cache, (150,))
    logits(model, ids, other, (150,))
    logits(model, ids[:, 150:], cache, (1,))  # what no eviction followed comes undone
    cache.crop(150)
    torch.testing.assert_close(
        logits(model, ids[:, 150:], cache, (1,)),
        logits(model, ids[:, 150:], other, (1,)), atol=1e-5, rtol=1e-4,
    )  # fmt: skip
    cache.crop(60)
    assert cache.get_seq_length() == 60
    kept = cache.coded_layers[0].store
    assert isinstance(kept, KeptStore) and kept.kept is not None
    assert int(kept.kept.index.max()) < 60 and 0 < kept.kept.slots < 40
    found = logits(model, ids[:, 60:], cache, (1, 1, 50))
    assert bool(torch.isfinite(found).all()) and cache.get_seq_length() == 112
    cache.reset()
    assert cache.get_seq_length() == 0
    again = logits(model, ids, cache, (150,))
    fresh = logits(model, ids, KVCache(model, method=method), (150,))
    torch.testing.assert_close(again, fresh, atol=1e-5, rtol=1e-4)


def test_attention_of_others_is_refused() -> None:
    with pytest.raises(WaterfillError, match="attn_implementation"):
        KVCache(decoder("Gemma2Config"), method="ems:count=40")
    model, ids = decoder("Qwen2Config"), tokens(1, 150)
    cache = KVCache(model, method="elastic:count=40")
    logits(model, ids, cache, (100,))
    with pytest.raises(WaterfillError, match="keeps other tokens for each head"):
        model(input_ids=ids[:, 100:], past_key_values=cache, output_attentions=True)


def test_what_needs_every_token_is_refused(tmp_path: Path) -> None:
    model, ids = decoder(), tokens(1, 100)
    cache = KVCache(model, method="ems:count=40")
    logits(model, ids, cache, (100,))
    with pytest.raises(WaterfillError, match="cannot be edited"):
        cache.splice(10, 20, [])
    with pytest.raises(WaterfillError, match="could be stored"):
        cache.save(tmp_path / "cache", ids)
    with pytest.raises(WaterfillError, match="keeps every token"):
        KVCache.stream(model, method="ems:count=40")
    with pytest.raises(WaterfillError, match="cannot bring back"):
        KVCache(model, method="ems:count=40", guard=Guard())


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"method": "ems", "size": 2000}, BudgetError, "is too small"),
        ({"method": "elastic:share=0.5", "size": 20000}, BudgetError, "elastic:share=0.5 take"),
        ({"method": "ems:share=0"}, SpecError, "share must be"),
        ({"method": "ems:threshold=2"}, SpecError, "threshold must be"),
        ({"method": "elastic:distance=-1"}, SpecError, "distance must"),
        ({"method": "elastic:merged=2"}, SpecError, "merged must"),
        ({"method": "elastic:attention=some"}, SpecError, "attention must"),
        ({"method": "elastic:count=-1"}, SpecError, "count must"),
    ],
)
def test_misuse_is_told(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        KVCache(decoder(), **arguments)


@pytest.mark.parametrize("id", EVICTORS)
def test_ladders_rise(id: str) -> None:
    facts = LayerFacts(0, HEADS, WIDTH, WIDTH, torch.float16, None, None)
    budget = Budget(None, 4096, BATCH, SINKS, RECENT)
    rungs: list[Any] = list(find_method(id).ladder(facts, None))
    sizes = [rung.nbytes(facts, budget) for rung in rungs]
    assert sizes == sorted(set(sizes))
    exact = replace(budget, tokens=4096).tokens * BATCH * facts.token_nbytes
    assert sizes[0] < exact / 16 and sizes[-1] >= exact
    between = rungs[0].between(rungs[1], 0.5)
    assert sizes[0] < between.nbytes(facts, budget) < sizes[1]
