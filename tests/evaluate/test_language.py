"""The figures against their definitions, computed the plain way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from waterfill.evaluate import (
    compare,
    language,
    max_positions,
    perplexity,
    plain_windows,
    strided_windows,
    text_windows,
)
from waterfill.sources.text import load_tokenizer
from waterfill.types import WaterfillError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture
def ids() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 61, 100)


def test_figures_equal_their_definitions(
    llama: Any, disturbed: Callable[..., Any], ids: Any
) -> None:
    other = disturbed(llama, 0.1)
    with torch.no_grad():
        row = torch.from_numpy(ids[:40])[None]
        p = llama(row).logits[0, :-1].double().log_softmax(-1)
        q = other(row).logits[0, :-1].double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    got = compare(llama, other, ids[None, :40])
    assert got["kl_nats"] == pytest.approx(kl.mean().item(), rel=1e-6)
    assert got["kl_nats_p99"] == pytest.approx(np.quantile(kl.numpy(), 0.99), rel=1e-6)
    assert got["top1_agreement"] == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert got["tokens"] == 39
    nll = -q.gather(1, row[0, 1:, None]).mean().item()
    assert got["perplexity"] == pytest.approx(math.exp(nll), rel=1e-6)
    assert got["perplexity"] == pytest.approx(perplexity(other, ids[None, :40]), rel=1e-9)
    assert got["protocol"]["dtype"] == "float32"
    assert got["protocol"]["torch"] == torch.__version__


def test_a_model_against_itself_is_exactly_zero(llama: Any, ids: Any) -> None:
    got = compare(llama, llama, strided_windows(ids, 32, 8))
    assert got["kl_nats"] == got["kl_nats_stderr"] == 0.0
    assert got["top1_agreement"] == 1.0
    assert got["perplexity"] == got["perplexity_original"]


def test_small_chunks_change_nothing(
    llama: Any, disturbed: Callable[..., Any], ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = disturbed(llama, 0.1)
    rows = strided_windows(ids, 32, 8, bos_id=1)
    whole = compare(llama, other, rows)
    monkeypatch.setattr(language, "CHUNK_VALUES", 200)
    assert compare(llama, other, rows) == whole


def test_the_standard_error_covers_the_mean(llama: Any, disturbed: Callable[..., Any]) -> None:
    """Independent texts of one source scatter as the standard error of one of them says."""
    other = disturbed(llama, 0.1)
    draws = [
        compare(
            llama, other, strided_windows(np.random.default_rng(s).integers(0, 61, 300), 16, 15)
        )
        for s in range(12)
    ]
    spread = np.std([d["kl_nats"] for d in draws], ddof=1)
    claimed = np.mean([d["kl_nats_stderr"] for d in draws])
    assert 0.4 < spread / claimed < 2.5


def test_models_come_back_in_their_own_mode(llama: Any, ids: Any) -> None:
    llama.train()
    seen: list[str] = []
    compare(llama, llama, ids[None, :8], progress=lambda it, label: seen.append(label) or it)
    assert llama.training
    assert seen == ["comparing"]


def test_masked_models_have_agreement_and_no_perplexity(
    disturbed: Callable[..., Any], ids: Any
) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=40,
    )
    model = transformers.BertForMaskedLM(config)
    got = compare(model, disturbed(model, 0.1), plain_windows(ids, 20, [1], [2]))
    assert got["tokens"] == 100
    assert got["kl_nats"] > 0
    assert "perplexity" not in got
    assert "no perplexity" in got["protocol"]["kind"]
    with pytest.raises(WaterfillError, match="masked"):
        perplexity(model, ids[None, :20])


def test_what_cannot_be_compared_is_refused(llama: Any, ids: Any) -> None:
    config = transformers.LlamaConfig(**{**llama.config.to_dict(), "vocab_size": 62})
    with pytest.raises(WaterfillError, match="vocabularies"):
        compare(llama, transformers.LlamaForCausalLM(config), ids[None, :8])
    with pytest.raises(WaterfillError, match="head"):
        compare(llama.model, llama.model, ids[None, :8])
    with pytest.raises(WaterfillError, match="no token"):
        perplexity(llama, ids[None, :1])
    torch.nn.init.constant_(llama.model.norm.weight, float("nan"))
    with pytest.raises(WaterfillError, match="not-a-number"):
        compare(llama, llama, ids[None, :8])


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(WaterfillError, match="tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "window", "part", "low", "high"),
    [
        # The tinystories text has mojibake further on, which this model has never seen.
        ("stories260K", "tinystories", None, slice(10), 4.0, 4.5),
        # Trained on windows of 256 tokens; beyond those it does not hold.
        ("english-7m", "english_heldout", 256, slice(0, None, 16), 40.0, 60.0),
    ],
)
def test_real_models(
    shared: Any,
    disturbed: Callable[..., Any],
    name: str,
    text: str,
    window: int,
    part: slice,
    low: float,
    high: float,
) -> None:
    folder = shared / "models" / name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = text_windows(
        [shared / "text" / f"{text}.txt"],
        load_tokenizer(folder),
        window=window,
        max_positions=max_positions(model),
    )
    got = compare(model, disturbed(model, 0.05, "layers"), rows[part])
    assert low < got["perplexity_original"] < high
    assert got["perplexity_original"] < got["perplexity"] < 1.2 * got["perplexity_original"]
    assert 0.001 < got["kl_nats"] < 0.2
    assert got["kl_nats_stderr"] < 0.3 * got["kl_nats"]
    assert 0.7 < got["top1_agreement"] < 1.0
