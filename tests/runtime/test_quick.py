"""Attention of single tokens and norms by the kernels, inside transformers models."""

from __future__ import annotations

import contextlib
import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.tiny import tiny_model
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


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_computes_the_same(
    side: str, tmp_path: Path, counted: dict[str, int]
) -> None:
    model = tiny_model("llama", tmp_path)
    mask = torch.ones(3, TOKENS + 8, dtype=torch.int64)
    padded = slice(0, 20) if side == "left" else slice(30, 50)
    mask[1, padded] = 0
    before = _steps(model, mask, 3)
    after = _steps(quick.quicken(model), mask, 3)
    assert counted["attend"] == 2 * 5  # layers, steps of few tokens
    seen = mask.bool()
    torch.testing.assert_close(after[seen], before[seen], rtol=1e-4, atol=1e-5)


def test_generation_is_the_same_with_every_cache(tmp_path: Path, counted: dict[str, int]) -> None:
    model = tiny_model("llama", tmp_path)
    prompt = torch.arange(40)[None]
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    caches: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}, {"num_beams": 3}]
    before = [model.generate(prompt, **options, **cache) for cache in caches]
    quick.quicken(model)
    for cache, wanted in zip(caches, before, strict=True):
        counted["attend"] = 0
        assert torch.equal(model.generate(prompt, **options, **cache), wanted)
        assert counted["attend"] >= 2 * 18


class _Module(nn.Module):
    """What attention asks its module for."""

    def __init__(self, share: int) -> None:
        super().__init__()
        self.num_key_value_groups = share


def _qkv(
    dtype: torch.dtype = torch.float32, queries: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return tuple(  # type: ignore[return-value]
        torch.randn(shape, generator=random).to(dtype)
        for shape in ((2, 6, queries, 16), (2, 2, 30, 16), (2, 2, 30, 16))
    )


@pytest.mark.parametrize(
    ("why", "options", "fast"),
    [
        ("plain", {}, True),
        ("mask", {"attention_mask": torch.rand(2, 1, 1, 30) < 0.5}, True),
        ("mask added to each head", {"attention_mask": torch.randn(1, 6, 1, 30)}, True),
        ("no scale", {"scaling": None}, True),
        ("a window the mask knows of", {"sliding_window": 16, "is_causal": True}, True),
        ("bias of positions", {"position_bias": torch.randn(1, 6, 1, 30)}, False),
    ],
)
def test_what_the_kernel_does_not_know_is_left_to_transformers(
    why: str, options: dict[str, Any], fast: bool, counted: dict[str, int]
) -> None:
    q, k, v = _qkv()
    given = {"attention_mask": None, "scaling": 0.3, **options}
    wanted, _ = sdpa_attention_forward(_Module(3), q, k, v, **given)
    found, weights = quick.attention_forward(_Module(3), q, k, v, **given)
    assert (counted["attend"], weights) == (int(fast), None), why
    assert found.is_contiguous()
    torch.testing.assert_close(found, wanted)


def test_attention_that_is_none_of_the_kernels(counted: dict[str, int]) -> None:
    q, k, v = _qkv()
    many = _qkv(queries=30)
    double = _qkv(torch.float64)
    quick.attention_forward(_Module(3), *many, None, is_causal=True)
    quick.attention_forward(_Module(3), *_qkv(queries=4), None, is_causal=False)
    quick.attention_forward(_Module(3), *double, None)
    quick.attention_forward(_Module(3), q, k, v, None, dropout=0.5)
    quick.attention_forward(_Module(3), q[..., ::2], k[..., ::2], v, None)
    assert counted["attend"] == 0
    found, _ = quick.attention_forward(_Module(3), q.requires_grad_(), k, v, None)
    found.sum().backward()
    assert q.grad is not None
    with contextlib.suppress(ValueError):  # of transformers that refuse it
        quick.attention_forward(_Module(3), q, k, v, None, softcap=30.0)
    assert counted["attend"] == 0


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_only_sdpa_is_swapped(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, tmp_path)
    model.set_attn_implementation("eager")
    assert quick.quicken(model).config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert quick.quicken(model).config._attn_implementation == quick.ATTENTION
    assert quick.ATTENTION not in (model.config.to_json_string())


class PlainRMSNorm(nn.Module):
    """The formula of most models."""

    def __init__(self, n: int, dtype: torch.dtype, kind: str) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(n, generator=random).to(dtype), requires_grad=False)
        self.eps, self.kind = 1e-5, kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of x."""
        values = x.float()
        normal = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.kind == "llama":
            return self.weight * normal.to(x.dtype)
        if self.kind == "late":
            return (self.weight * normal).to(x.dtype)
        if self.kind == "gemma":
            return (normal * (1 + self.weight.float())).to(x.dtype)
        if self.kind == "centred":
            return self.weight * (normal - normal.mean(-1, keepdim=True)).to(x.dtype)
        return self.weight * values.div(values.pow(2).mean(-1, keepdim=True).sqrt() + self.eps).to(
            x.dtype
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "offset", "first"),
    [
        ("llama", 0.0, True),
        ("late", 0.0, False),
        ("gemma", 1.0, False),
        ("centred", None, None),
        ("epsilon outside", None, None),
    ],
)
def test_a_norm_shows_its_formula(
    kind: str, offset: float | None, first: bool | None, dtype: torch.dtype
) -> None:
    module = PlainRMSNorm(48, dtype, kind)
    found = formula_of(module)
    if offset is None:
        assert found is None
        return
    assert found is not None
    assert found[:2] == (1e-5, offset)
    if dtype != torch.float32:  # where rounding to it would change nothing
        assert found.rounds_first == first
    x = torch.randn(3, 5, 48).to(dtype)
    wanted = module(x)
    quicken_norm(module)
    assert type(module) is not PlainRMSNorm
    assert isinstance(module, PlainRMSNorm)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(module(x), wanted, rtol=4 * eps, atol=0)


def test_norms_that_stay_as_they_are(counted: dict[str, int]) -> None:
    class GatedRMSNorm(PlainRMSNorm):
        def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x) * gate

    class BiasedRMSNorm(PlainRMSNorm):
        def __init__(self) -> None:
            super().__init__(8, torch.float32, "llama")
            self.bias = nn.Parameter(torch.zeros(8))

    gated = GatedRMSNorm(8, torch.float32, "llama")
    double = PlainRMSNorm(8, torch.float64, "llama")
    assert [formula_of(m) for m in (gated, BiasedRMSNorm(), double, nn.LayerNorm(8))] == [None] * 4

    module = PlainRMSNorm(8, torch.float32, "llama")
    quicken_norm(module)
    counted["rms_norm"] = 0
    module(torch.randn(2, 8, dtype=torch.float64))
    module(torch.randn(2, 8, requires_grad=True)).sum().backward()
    module(torch.randn(0, 8))
    assert counted["rms_norm"] == 0
    module(torch.randn(8, 2).T)
    assert counted["rms_norm"] == 1


def test_a_quick_model_is_copied_and_pickled(tmp_path: Path) -> None:
    model = quick.quicken(tiny_model("llama", tmp_path))
    wanted = _steps(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.config._attn_implementation == quick.ATTENTION
        assert isinstance(twin.model.norm.formula, Formula)
        assert torch.equal(_steps(twin), wanted)
