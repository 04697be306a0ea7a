"""Attention of single tokens and norms by the kernels, inside transformers models."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.tiny import ARCHITECTURES, tiny_model
from waterfill.coding import native
from waterfill.runtime import quick
from waterfill.runtime.norms import Formula, formula_of, quicken_norm

pytestmark = pytest.mark.skipif(native.core() is None, reason="the kernels were not built")

TOKENS = 60  # beyond the window of 48 of the sliding models


def _steps(model: Any, mask: torch.Tensor | None = None, batch: int = 1) -> torch.Tensor:
    """Logits of a prompt, some single tokens and a few at once, with a cache."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (batch, TOKENS + 8), generator=random)
    cache, logits, first = None, [], 0
    for last in (TOKENS, TOKENS + 1, TOKENS + 2, TOKENS + 3, TOKENS + 7, TOKENS + 8):
        options = {} if mask is None else {"attention_mask": mask[:, :last]}
        with torch.no_grad():
            out = model(ids[:, first:last], past_key_values=cache, use_cache=True, **options)
        cache, first = out.past_key_values, last
        logits.append(out.logits)
    return torch.cat(logits, 1)


class _Counted:
    """The kernel module, counting calls."""

    def __init__(self) -> None:
        self.core, self.calls = native.core(), {"attend": 0, "rms_norm": 0}

    def __getattr__(self, name: str) -> Any:
        if name in self.calls:
            self.calls[name] += 1
        return getattr(self.core, name)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Calls of each kernel from here on."""
    core = _Counted()
    monkeypatch.setattr(native, "core", lambda: core)
    return core.calls


# model -> whether its attention and its norms are swapped
MODELS = {
    "llama": (True, True),
    "qwen3": (True, True),
    "mistral": (True, True),
    "gemma2": (False, True),  # its scores are capped, which sdpa cannot
    "gemma3": (True, True),
    "mixtral": (True, True),
    "gpt2": (True, False),
    "gpt_oss": (False, True),
    "gpt_neox": (True, False),
}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_computes_the_same(
    name: str, dtype: str, tmp_path: Path, counted: dict[str, int]
) -> None:
    model = tiny_model(name, tmp_path, dtype=dtype)
    before = _steps(model)
    quick.quicken(model)
    counted.update(attend=0, rms_norm=0)
    after = _steps(model)
    assert (counted["attend"] > 0, counted["rms_norm"] > 0) == MODELS[name]
    error = (after - before).float().norm() / before.float().norm()
    assert error < (2e-6 if dtype == "float32" else 0.03)
