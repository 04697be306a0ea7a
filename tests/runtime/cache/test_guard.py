"""The guard: measures, falls back, reports; with a model whose keys have outliers planted."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import waterfill.runtime.cache.guard as guard_module
from tests.runtime.cache.editing.test_splicing import read
from tests.runtime.cache.models import decoder, plant_outliers, statistics, tokens
from waterfill.runtime.cache.cache import KVCache
from waterfill.runtime.cache.guard import Guard, safer
from waterfill.runtime.cache.method import parse_method
from waterfill.types import WaterfillError

DATA = Path(guard_module.__file__).parents[2] / "data"
LIMIT = 0.2
NO_PROBE = (1, 2, 3)  # too short for anything to be coded


@cache
def text(name: str, count: int) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(DATA / "demo")
    ids = tokenizer((DATA / "text" / f"{name}.txt").read_text()[:8000])["input_ids"][:count]
    return torch.tensor(ids)[None]


@cache
def planted() -> Any:
    model = AutoModelForCausalLM.from_pretrained(DATA / "demo", dtype=torch.float32)
    return plant_outliers(model.eval())


def harm(cache: KVCache, ids: torch.Tensor) -> float:
    """Nats per token of the second half of a text, read 16 tokens at a time."""
    model, half = planted(), ids.shape[1] // 2
    found = []
    for held in (DynamicCache(config=model.config), cache):
        read(model, ids[:, :half], held)
        steps = [read(model, ids[:, at : at + 16], held) for at in range(half, ids.shape[1], 16)]
        found.append(torch.cat(steps, 1).log_softmax(-1))
    exact, coded = found
    return float((exact.exp() * (exact - coded)).sum(-1).mean())


def test_planting_changes_nothing() -> None:
    plain = AutoModelForCausalLM.from_pretrained(DATA / "demo", dtype=torch.float32).eval()
    ids = text("evaluation", 100)
    with torch.no_grad():
        torch.testing.assert_close(planted()(ids).logits, plain(ids).logits, atol=1e-3, rtol=1e-3)


def test_outliers_collapse_without_a_guard_and_not_with_one() -> None:
    ids = text("evaluation", 256)
    alone = KVCache(planted(), method="token:bits=2", guard=None)
    assert alone.guard is None and harm(alone, ids) > 1
    probe = tuple(text("calibration", 192)[0].tolist())
    guarded = KVCache(planted(), method="token:bits=2", guard=Guard(LIMIT, probe=probe))
    assert guarded.guard is not None and guarded.get_seq_length() == 0
    report = guarded.guard.report
    assert len(report.probes) == 1 and report.probes[0][0] == 192 and report.probes[0][1] > 1
    assert report.left_nats is not None and report.left_nats <= LIMIT and report.fallbacks
    assert "fallbacks" in str(report) and "token:bits=2 > token:bits=3" in str(report)
    for index, names in report.fallbacks.items():
        assert names[-1] == str(guarded.choices[index].method)
    assert harm(guarded, ids) < 2 * LIMIT


def test_in_use_the_past_is_coded_anew() -> None:
    model, ids = planted(), text("evaluation", 150)
    cache = KVCache(model, method="token:bits=2", guard=Guard(LIMIT, every=100, probe=NO_PROBE))
    assert cache.guard is not None and not cache.guard.report.probes
    written = model.generate(
        ids,
        past_key_values=cache,
        logits_processor=[cache.guard],
        max_new_tokens=20,
        do_sample=False,
    )
    report = cache.guard.report
    assert [at for at, _ in report.probes] == [150] and report.probes[0][1] > 1
    assert report.left_nats is not None and report.left_nats <= LIMIT and not report.refused
    assert written.shape[1] == 170 and cache.get_seq_length() == 169
    # What it then holds reads as it says.
    again = cache.guard.check(written)
    assert again is not None and again <= LIMIT


def test_a_forward_loop_asks_when_it_likes() -> None:
    model, ids = planted(), text("evaluation", 120)
    cache = KVCache(model, method="channel:bits=4", guard=Guard(LIMIT, every=60, probe=NO_PROBE))
    read(model, ids[:, :50], cache)
    assert cache.check(ids) is None
    read(model, ids[:, 50:80], cache)
    nats = cache.check(ids)
    assert nats is not None and nats < LIMIT and cache.check(ids) is None
    assert cache.guard is not None and cache.guard.report.probes == [(80, nats)]
    cache.reset()
    assert cache.guard.next == 60


def test_padded_rows_are_probed_as_they_are() -> None:
    model = planted()
    ids = text("evaluation", 240).reshape(2, 120).clone()
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    cache = KVCache(model, method="channel:bits=8", guard=Guard(every=100, probe=NO_PROBE))
    model.generate(
        ids, attention_mask=mask, past_key_values=cache, logits_processor=[cache.guard],
        max_new_tokens=3, do_sample=False,
    )  # fmt: skip
    assert cache.guard is not None
    ((at, nats),) = cache.guard.report.probes
    assert at == 120 and nats < 0.01


@pytest.mark.parametrize("room", [20.0, 7.5])
def test_the_size_is_kept_all_the_same(room: float) -> None:
    probe = tuple(text("calibration", 192)[0].tolist())
    options: dict[str, Any] = {"bits": room, "tokens": 400, "method": "token"}
    if room < 10:
        with pytest.warns(UserWarning, match="above the limit"):
            cache = KVCache(planted(), guard=Guard(1e-4, probe=probe), **options)
        assert cache.guard is not None and cache.guard.report.refused == 1
    else:
        cache = KVCache(planted(), guard=Guard(LIMIT, probe=probe), **options)
        assert cache.guard is not None and cache.guard.report.refused == 0
    assert cache.budget.nbytes is not None
    assert sum(choice.nbytes for choice in cache.choices.values()) <= cache.budget.nbytes
    read(planted(), text("evaluation", 400), cache)
    assert cache.nbytes <= cache.budget.nbytes


def test_a_rung_is_the_next_larger_one_and_exact_the_last() -> None:
    cache = KVCache(decoder(), method="token:bits=6")
    facts = cache.facts[0]
    assert facts is not None
    names, method = [], parse_method("token:bits=6")
    while (choice := safer(method, facts, None, cache.budget)) is not None:
        method = choice.method
        names.append(str(method))
    assert names == ["token:bits=7", "token:bits=8", "exact"]
    own = statistics().layers[0]
    finer = safer(parse_method("transform:level=0.01"), facts, own, cache.budget)
    assert finer is not None and 0 < finer.method.level < 0.01  # type: ignore[attr-defined]


def test_statistics_bring_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    assert statistics().protocol["probe"] == tokens(8, 128)[-1].tolist()

    def refuse(*_: Any) -> torch.Tensor:
        raise AssertionError("no text was wanted")

    monkeypatch.setattr(guard_module, "draw_text", refuse)
    cache = KVCache(decoder(), bits=14, tokens=300, statistics=statistics())
    assert cache.guard is not None
    assert [at for at, _ in cache.guard.report.probes] == [128]
    assert KVCache(decoder(), method="channel").guard is None


def test_without_a_text_the_model_writes_one() -> None:
    cache = KVCache(decoder(), method="exact", guard=Guard())
    assert cache.guard is not None
    ((at, nats),) = cache.guard.report.probes
    assert at == 192 and nats < 1e-5 and not cache.guard.report.fallbacks


def test_what_cannot_be_probed_is_skipped_or_said() -> None:
    model = decoder()
    cache = KVCache(model, method="exact", guard=Guard(every=10, probe=NO_PROBE))
    cache.compose([[5, 6, 7, 8, 9, 10], [7, 8, 9, 10, 11, 12]], {})
    assert cache.check(tokens(1, 12)) is None
    assert cache.guard is not None and cache.guard.report.skipped == 1
    with pytest.raises(WaterfillError, match="no guard"):
        KVCache(model, method="exact", guard=None).check(tokens(1, 3))
    with pytest.raises(WaterfillError, match="limit above zero"):
        Guard(limit_nats=0)
