"""Attention of few queries over a store by the kernel, against torch's over the same pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.cache.models import decoder, tokens
from waterfill.coding import native
from waterfill.runtime.cache.cache import KVCache
from waterfill.runtime.cache.facts import LayerFacts, facts_of
from waterfill.runtime.cache.fitting.statistics import LayerStatistics, StreamStatistics
from waterfill.runtime.cache.held import attending
from waterfill.runtime.cache.held.attending import attend
from waterfill.runtime.cache.held.native import attend_natively
from waterfill.runtime.cache.held.states import View
from waterfill.runtime.cache.held.store import Store
from waterfill.runtime.cache.held.track import Track
from waterfill.runtime.cache.method import Coder, parse_method
from waterfill.runtime.cache.rotary import Rotary

needs_kernel = pytest.mark.skipif(native.core() is None, reason="the native core is not built")
# The kernel holds rows of a basis as 16-bit integers.
NEAR = {torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def learned(heads: int, key_width: int, value_width: int, seed: int) -> LayerStatistics:
    """Statistics of random streams whose variances fall."""
    rng = np.random.default_rng(seed)

    def stream(width: int) -> StreamStatistics:
        mix = rng.normal(size=(heads, width, width)) / width**0.5
        covariance = (mix * np.exp(-5 * np.arange(width) / width)) @ mix.swapaxes(1, 2)
        mean = rng.normal(size=(heads, width))
        factor = np.linalg.cholesky(covariance + 1e-9 * np.eye(width))
        samples = rng.normal(size=(heads, 64, width)) @ factor.swapaxes(1, 2)
        harm = np.broadcast_to(np.eye(width) * 1e-2, covariance.shape)
        return StreamStatistics(*(x.astype(np.float32) for x in (mean, covariance, harm, samples)))

    return LayerStatistics(stream(key_width), stream(value_width))


def rotary(width: int, turning: int) -> Rotary | None:
    if not turning:
        return None
    pairs = torch.arange(max(1, width * turning // 4))
    return Rotary(pairs, pairs + len(pairs), 100.0 ** -(pairs.double() / len(pairs)))


def by_torch(view: View, q: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attending, "attend_natively", lambda *_: None)
        return attend(view, q, mask, scale)


METHODS = [
    *(f"transform:level={level}" for level in (1e-1, 1e-3, 1e-4, 1e-6)),
    "exact", "channel:bits=3,value_bits=5", "channel:bits=8", "token:bits=5", "entropy:step=0.05", "entropy:step=0.002",
]  # fmt: skip

calls = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(list(NEAR)),
        "batch": st.integers(1, 2),
        "heads": st.integers(1, 3),
        "share": st.integers(1, 4),
        "m": st.integers(1, 8),
        "past": st.integers(1, 900),
        "widths": st.tuples(st.integers(4, 40), st.integers(1, 40)),
        "turning": st.sampled_from([0, 1, 2]),
        "methods": st.lists(st.sampled_from(METHODS), min_size=1, max_size=2),
        "padded": st.booleans(),
        "first": st.integers(0, 500),
        "mask": st.sampled_from(["none", "bool", "added"]),
        "seed": st.integers(0, 2**31),
    }
)


@needs_kernel
@settings(max_examples=25, deadline=None)
@given(c=calls)
def test_the_kernel_is_torch(c: dict[str, Any]) -> None:
    torch.manual_seed(c["seed"])
    (d, e), batch, heads, m = c["widths"], c["batch"], c["heads"], c["m"]
    facts = LayerFacts(0, heads, d, e, c["dtype"], None, rotary(d, c["turning"]))
    known = learned(heads, d, e, c["seed"])
    opened = [parse_method(method).open(facts, known) for method in c["methods"]]
    most = [3] * (len(opened) - 1) + [None]
    store = Store(facts, list(zip(opened, most, strict=True)), Track(), sinks=4, recent=16)
    positions = None
    if c["padded"]:
        positions = torch.arange(c["past"]) - torch.randint(0, 99, (batch, 1))
    make = lambda n, w: torch.randn(batch, heads, n, w).to(c["dtype"])  # noqa: E731
    store.append(make(c["past"], d), make(c["past"], e), positions)
    store.settle()
    first = min(c["first"], c["past"] - 1)
    view = View(store, make(m, d), make(m, e), first)
    q = torch.randn(batch, m, heads * c["share"], d).to(c["dtype"]).transpose(1, 2)
    mask = None
    if c["mask"] == "bool":
        mask = torch.rand(batch, 1, m, view.tokens) < 0.6
        mask[..., -1] = True
    elif c["mask"] == "added":
        mask = torch.randn(1, heads * c["share"], 1, view.tokens).to(c["dtype"])
    found = attend_natively(view, q, mask, d**-0.5)
    assert found is not None and found.dtype == q.dtype
    wanted = by_torch(view, q, mask, d**-0.5)
    # Values of one side have the dtype's rounding before they are summed, those of the other after.
    near = NEAR[c["dtype"]] * max(1.0, float(wanted.float().abs().max()))
    if any("token" in method for method in c["methods"]):
        near *= 2  # keys are rounded once more
    torch.testing.assert_close(found.float(), wanted.float(), atol=near, rtol=0)


class Closed(Coder):
    """A coder that no kernel can read."""

    def __init__(self, inner: Coder) -> None:
        self.encode, self.decode = inner.encode, inner.decode  # type: ignore[method-assign]


@needs_kernel
def test_what_the_kernel_cannot_do_torch_does() -> None:
    torch.manual_seed(0)
    facts = LayerFacts(0, 2, 16, 16, torch.float32, None, rotary(16, 2))
    coder = parse_method("transform:level=1e-4").open(facts, learned(2, 16, 16, 0))

    def view(made: Coder, before: int = 100, jump: int = 0) -> View:
        store = Store(facts, [(made, None)], Track(), 4, 16)
        store.append(torch.randn(1, 2, before, 16), torch.randn(1, 2, before, 16))
        after = torch.arange(before, before + 100)[None] + jump
        store.append(torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 16), after)
        store.settle()
        return View(store, torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16))

    q = torch.randn(1, 4, 1, 16)
    assert attend_natively(view(coder), q, None, 0.25) is not None
    between = view(coder, 100, 777)  # 4 sinks and 3 blocks
    found = attend_natively(between, q, None, 0.25)
    assert found is not None
    torch.testing.assert_close(found, by_torch(between, q, None, 0.25))
    assert attend_natively(view(Closed(coder)), q, None, 0.25) is None
    jumping = view(coder, 110, 777)  # within a block
    assert attend_natively(jumping, q, None, 0.25) is None
    torch.testing.assert_close(attend(jumping, q, None, 0.25), by_torch(jumping, q, None, 0.25))
    assert attend_natively(view(coder), q.double(), None, 0.25) is None
    assert attend_natively(view(coder), q.requires_grad_(), None, 0.25) is None


def test_read_gives_every_token_once() -> None:
    facts = LayerFacts(0, 1, 8, 8, torch.float32, None, None)
    coder = parse_method("channel:bits=8").open(facts, None)
    store = Store(facts, [(coder, None)], Track(), 4, 16)
    keys = torch.arange(1200.0)[None, None, :, None].expand(1, 1, 1200, 8).contiguous()
    store.append(keys, keys)
    for first in (0, 3, 50, 1100, 1190):
        pieces = store.pieces(first)
        read = [piece.read() for piece in pieces]
        assert pieces[0].start == first and pieces[-1].stop == 1200
        for one, other, (k, _) in zip(pieces, pieces[1:], read, strict=False):
            assert one.stop == other.start == one.start + k.shape[2]
        for which in (0, 1):
            whole = torch.cat([pair[which] for pair in read], 2)
            torch.testing.assert_close(whole, keys[:, :, first:], atol=0.3, rtol=0)


@needs_kernel
@pytest.mark.parametrize("family", ["LlamaConfig", "MistralConfig", "GPTNeoXConfig", "GPT2Config"])
def test_a_model_decodes_by_the_kernel_as_by_torch(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = decoder(family), tokens(2, 150)
    known = {
        i: learned(one.heads, one.key_width, one.value_width, i)
        for i, one in enumerate(facts_of(model))
        if one is not None
    }

    def run(kernel: bool) -> torch.Tensor:
        calls = []

        def spy(*arguments: Any) -> torch.Tensor | None:
            calls.append(attend_natively(*arguments) if kernel else None)
            return calls[-1]

        monkeypatch.setattr(attending, "attend_natively", spy)
        cache = KVCache(model, method="exact")
        for layer in cache.coded_layers:
            facts = layer.store.facts
            coder = parse_method("transform:level=1e-5").open(facts, known[facts.index])
            layer.store = Store(facts, [(coder, None)], cache.track, 4, 16)
        with torch.no_grad():
            model(input_ids=ids[:, :120], past_key_values=cache)
            out = [model(input_ids=ids[:, i : i + 3], past_key_values=cache).logits for i in range(120, 150, 3)]  # fmt: skip
        assert calls and all((x is not None) == kernel for x in calls)
        return torch.cat(out, 1)

    torch.testing.assert_close(run(True), run(False), atol=2e-4, rtol=1e-3)
