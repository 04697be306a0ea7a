"""The packaged demo model and texts: complete, small, loadable and readable."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import waterfill

DATA = Path(waterfill.__file__).parent / "data"
DEMO = DATA / "demo"
FILES = [
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]
WINDOW = 512

# Measured: 77.0. An untrained model would score about 2048, the vocabulary size.
PERPLEXITY_BOUND = 90.0


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The demo tokenizer, loaded the way a user would."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def model() -> Any:
    """The demo model in float32, so that the scores do not depend on bfloat16 kernels."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


def read_text(name: str) -> str:
    return (DATA / "text" / f"{name}.txt").read_text(encoding="utf-8")


def read_documents(name: str) -> list[str]:
    return [part.strip("\n") for part in read_text(name).split("\n\n\n")]


@pytest.mark.parametrize("name", FILES)
def test_file_is_present(name: str) -> None:
    assert (DEMO / name).stat().st_size > 0


def test_model_stays_small() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 9_000_000


def test_texts_are_long_enough() -> None:
    assert len(read_text("calibration").encode()) >= 40_000
    assert len(read_text("evaluation").encode()) >= 12_000


def test_texts_share_no_document() -> None:
    calibration, evaluation = read_documents("calibration"), read_documents("evaluation")
    assert len(set(calibration)) == len(calibration)
    assert len(set(evaluation)) == len(evaluation)
    assert not set(calibration) & set(evaluation)


def test_texts_share_no_paragraph() -> None:
    calibration, evaluation = (
        {part for part in read_text(name).split("\n\n") if len(part) > 40}
        for name in ("calibration", "evaluation")
    )
    assert not calibration & evaluation


def test_parameters_match_the_card(model: Any) -> None:
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 2_000_000 <= count <= 4_000_000
    assert f"{count:,}" in (DEMO / "README.md").read_text(encoding="utf-8")


def test_embeddings_are_tied(model: Any) -> None:
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tokenizer_starts_texts_and_knows_their_end(tokenizer: Any, model: Any) -> None:
    ids = tokenizer("A sentence.").input_ids
    assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert ids[-1] != tokenizer.eos_token_id
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert len(tokenizer) == model.config.vocab_size


@pytest.mark.parametrize(
    "text",
    [read_text("calibration"), "Zoë naïvely paid €2.40 — 中文, ελληνικά, ½ and 🦔.\n\n\ttab  end "],
    ids=["calibration", "beyond English"],
)
def test_tokenizer_round_trips(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_calibration_text_goes_beyond_ascii() -> None:
    assert not read_text("calibration").isascii()


def test_perplexity_on_the_evaluation_text(tokenizer: Any, model: Any) -> None:
    torch = pytest.importorskip("torch")
    ids = tokenizer(read_text("evaluation")).input_ids[: 2 * WINDOW]
    windows = torch.tensor(ids).view(2, WINDOW)
    with torch.no_grad():
        loss = float(model(windows, labels=windows).loss)
    assert math.exp(loss) < PERPLEXITY_BOUND


def test_continues_a_story(tokenizer: Any, model: Any) -> None:
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    output = model.generate(
        **prompt, max_new_tokens=24, do_sample=False, temperature=1.0, top_p=1.0
    )
    added = output[0, prompt.input_ids.shape[1] :]
    text = tokenizer.decode(added, skip_special_tokens=True)
    words = text.split()
    assert len(words) >= 6
    assert text.isascii()
