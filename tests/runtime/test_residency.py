"""What a model takes in memory, foretold and chosen."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import transformers  # noqa: E402

import waterfill  # noqa: E402
from tests.pipeline import small  # noqa: E402
from tests.runtime import artifacts  # noqa: E402
from tests.runtime.artifacts import artifact, distance, logits  # noqa: E402
from waterfill.runtime.residency import Estimate, Row, choose, estimate, forms_for  # noqa: E402
from waterfill.types import BudgetError, WaterfillError  # noqa: E402

RESIDENCIES = ("dense", "packed", "coded")


def taken(folder: Path, residency: str) -> tuple[int, int]:
    """Bytes of weights as foretold, and as a model has them."""
    foretold = estimate(folder)
    chosen = forms_for(foretold.rows, residency)
    weights = sum(row.nbytes(chosen.get(row.name, "dense")) or 0 for row in foretold.rows)
    assert weights <= foretold.nbytes(residency)
    model = waterfill.load_model(folder, residency=residency)
    buffers = sum(b.nbytes for n, b in model.named_buffers() if ".weight_" not in n)
    return weights, model.get_memory_footprint() - buffers


@pytest.mark.parametrize("residency", ["dense", "packed"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mixtral"])
def test_the_estimate_of_small_models(name: str, residency: str) -> None:
    foretold, found = taken(artifact(name, pick=artifacts.integers), residency)
    assert found == pytest.approx(foretold, rel=0.05, abs=4096)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices are large enough for their tables not to matter."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 128}
    config = transformers.LlamaConfig(**sizes, **heads, vocab_size=1000, dtype="bfloat16")
    with small.quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "model")
    return artifacts.make(folder / "model", folder / "out", artifacts.paths)


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_the_estimate_is_what_a_model_takes(wide: Path, residency: str) -> None:
    foretold, found = taken(wide, residency)
    assert found == pytest.approx(foretold, rel=0.05)


def test_a_dtype_and_words() -> None:
    foretold = estimate(artifact("llama", "bfloat16"))
    wide = estimate(artifact("llama", "bfloat16"), "F32")
    assert wide.nbytes("dense") == 2 * foretold.nbytes("dense")
    assert wide.nbytes("packed") < wide.nbytes("dense")
    assert foretold.least_nbytes <= min(foretold.nbytes(r) for r in RESIDENCIES)
    with pytest.raises(WaterfillError, match="not 'thin'"):
        foretold.nbytes("thin")
    tied = artifact("qwen3")  # its embedding is multiplied with too
    assert estimate(tied / "model.safetensors").rows == estimate(tied).rows


def rows(seed: int, count: int = 5) -> list[Row]:
    """Tensors of all kinds."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        shape = (int(rng.integers(1, 20)) * 100, 1000)
        size = shape[0] * shape[1]
        packed = int(size * rng.uniform(0.3, 1.1)) if rng.random() < 0.8 else None
        coded = int(size * rng.uniform(0.2, 1.9)) if rng.random() < 0.8 else None
        streamed = bool(rng.random() < 0.4)
        products = int(rng.integers(0, 3))
        made.append(Row(f"t{number}", shape, 2 * size, packed, coded, streamed, products, 2))
    return made


def every_choice(made: list[Row]) -> list[tuple[int, float]]:
    """(bytes, seconds) of every choice there is."""
    found = []
    for forms in itertools.product(RESIDENCIES, repeat=len(made)):
        if all(r.nbytes(f) is not None for r, f in zip(made, forms, strict=True)):
            chosen = {r.name: f for r, f in zip(made, forms, strict=True)}
            seconds = sum(r.seconds(f) for r, f in zip(made, forms, strict=True))
            found.append((Estimate(tuple(made)).nbytes(chosen), seconds))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_fits_and_is_nearly_the_best(seed: int) -> None:
    made = rows(seed)
    choices = every_choice(made)
    least = Estimate(tuple(made)).least_nbytes
    assert least <= min(nbytes for nbytes, _ in choices) + 1
    largest = Estimate(tuple(made)).nbytes("dense") + 10**7
    for memory in np.linspace(least, largest, 9).astype(int):
        forms = choose(made, int(memory))
        nbytes = Estimate(tuple(made)).nbytes(forms)
        seconds = sum(row.seconds(forms[row.name]) for row in made)
        assert nbytes <= memory
        best = min(s for n, s in choices if n <= memory)
        assert seconds <= 1.5 * best + 1e-12
    assert seconds == pytest.approx(min(s for _, s in choices))
    with pytest.raises(BudgetError, match=f"at least {least:,} bytes"):
        choose(made, least - 1)


def test_nothing_to_choose() -> None:
    assert choose([], "1KB") == {}
    assert Estimate(()).nbytes("coded") == 0


def test_a_model_within_a_memory() -> None:
    folder = artifact("llama", "bfloat16")
    foretold = estimate(folder)
    want = logits(waterfill.load_model(folder, residency="dense"))
    low, high = foretold.least_nbytes, foretold.nbytes("dense")
    for memory in (low, (low + high) // 2, high + 10**6):
        model = waterfill.load_model(folder, memory=memory)
        assert model.get_memory_footprint() <= memory + 4096
        assert distance(logits(model), want) <= 0.2
        assert model.config.quantization_config.memory == memory
    with pytest.raises(BudgetError, match=f"at least {low:,} bytes of memory"):
        waterfill.load_model(folder, memory=f"{low - 1}B")
    with pytest.raises(BudgetError, match="not a size"):
        waterfill.load_model(folder, memory="much")
