"""Tiny models that need no download, and the real ones where they are at hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(autouse=True)
def no_bars() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def disturbed() -> Callable[..., Any]:
    """A copy of a model with noise on the weights whose name contains `where`."""

    def make(model: Any, amount: float, where: str = "") -> Any:
        torch.manual_seed(1)
        other = copy.deepcopy(model)
        for name, parameter in other.named_parameters():
            if where in name:
                parameter.data += amount * parameter.data.std() * torch.randn_like(parameter)
        return other

    return make


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return SHARED
