"""The torch twin finds the core's paths; the Triton kernel finds the twin's."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import waterfill
from waterfill.coding import trellis, trellis_torch
from waterfill.types import WaterfillError

torch = pytest.importorskip("torch")

STATES = [1, *trellis.CODES]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed (it comes with CUDA builds of torch)",
)


def layer(m: int, n: int, diagonal: bool, seed: int = 0) -> tuple[Any, Any, Any]:
    """Weights, the factor of a second moment, and steps of about two bits."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((m, n)).astype(np.float32)
    if diagonal:
        lower = rng.uniform(0.5, 2, n).astype(np.float32)
        return weight, lower, (0.5 / lower).astype(np.float32)
    inputs = rng.standard_normal((n, 2 * n))
    lower = np.linalg.cholesky(inputs @ inputs.T / n + 0.1 * np.eye(n)).astype(np.float32)
    return weight, lower, (0.5 / lower.diagonal()).astype(np.float32)


def harm(weight: Any, index: Any, lower: Any, step: Any, states: int) -> float:
    error = (weight - trellis.walk(index, step, states)).astype(np.float64)
    return float(np.sum(np.square(error @ lower if lower.ndim == 2 else error * lower)))


def check_same(shape: tuple[int, int], diagonal: bool, states: int, device: str) -> None:
    weight, lower, step = layer(*shape, diagonal)
    want = trellis.quantise(weight, lower, step, states)
    got = trellis_torch.quantise(weight, lower, step, states, device)
    assert got.dtype == np.int32 and got.shape == shape and got.flags.c_contiguous
    assert np.mean(got == want) >= 0.999
    assert harm(weight, got, lower, step, states) == pytest.approx(
        harm(weight, want, lower, step, states), rel=1e-5
    )


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("states", STATES)
def test_same_paths_as_the_core(states: int, diagonal: bool) -> None:
    check_same((65, 37), diagonal, states, "cpu")


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (31, 131), (1030, 2), (2048, 1), (0, 3), (3, 0)])
@pytest.mark.parametrize("diagonal", [True, False])
def test_odd_shapes(shape: tuple[int, int], diagonal: bool) -> None:
    if 0 in shape:
        lower = np.ones(shape[1]) if diagonal else np.eye(shape[1])
        weight, step = np.zeros(shape, np.float32), np.ones(shape[1], np.float32)
        assert trellis_torch.quantise(weight, lower.astype("f4"), step, 4, "cpu").shape == shape
    else:
        check_same(shape, diagonal, 4, "cpu")


@pytest.mark.parametrize("states", STATES)
def test_a_single_column_is_the_same_even_where_costs_tie(states: int) -> None:
    rng = np.random.default_rng(states)
    halves = rng.integers(-8, 9, (1100, 1)).astype(np.float32) / 2
    extremes = np.float32([[0, -0.0, 1e-30, 1e9, -1e9, 3e38, -3e38]]).T
    weight = np.concatenate([halves, extremes])
    one = np.ones(1, np.float32)
    want = trellis.quantise(weight, one, one, states)
    np.testing.assert_array_equal(trellis_torch.quantise(weight, one, one, states, "cpu"), want)


def test_independent_columns_in_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trellis_torch, "TOGETHER", 100)
    check_same((40, 9), True, 8, "cpu")


def test_the_device_is_the_users_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, lower, step = layer(trellis.SEGMENT + 1, 2, True)
    seen: list[str] = []

    def spy(w: Any, lo: Any, st: Any, states: int, device: str) -> Any:
        seen.append(device)
        return quantise(w, lo, st, states, "cpu")

    quantise = trellis_torch.quantise
    monkeypatch.setattr(trellis_torch, "quantise", spy)
    want = trellis.quantise(weight, lower, step, 4)
    assert not seen
    monkeypatch.setenv("WATERFILL_DEVICE", "cuda:1")
    np.testing.assert_array_equal(trellis.quantise(weight, lower, step, 4), want)
    trellis.quantise(weight[:-1], lower, step, 4)  # one segment: nothing to do side by side
    assert seen == ["cuda:1"]


@pytest.mark.parametrize("name", ["cuda:99", "meta", "a hammer"])
def test_a_device_that_is_not_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATERFILL_DEVICE", name)
    with pytest.raises(WaterfillError, match=f"'{name}' is not to be had: .*WATERFILL_DEVICE"):
        trellis.quantise(*layer(trellis.SEGMENT + 1, 1, True), 4)
    pytest.importorskip("transformers")
    with pytest.raises(WaterfillError, match="not to be had"):  # before any calibration
        waterfill.compress("demo", tmp_path / "out", bits=3)
    assert not list(tmp_path.iterdir())


@needs_gpu
@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("states", STATES)
def test_same_paths_on_a_gpu(states: int, diagonal: bool) -> None:
    check_same((2100, 140), diagonal, states, "cuda")


KERNEL = """
import sys, torch
from waterfill.coding.trellis_torch import viterbi as twin
from waterfill.coding.trellis_triton import viterbi
torch.manual_seed(0)
for states, columns, rows in ((4, 3, 70), (8, 1, 33), (64, 2, 1), (64, 1, 96), (256, 1, 64), (4, 1, 1030)):
    for price in (torch.rand(4, columns, rows), torch.randint(0, 3, (4, columns, rows)).float()):
        price = price.to(sys.argv[1])
        assert torch.equal(viterbi(price, states), twin(price, states)), (states, columns, rows)
        if rows > 1000: break
"""
COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from waterfill.coding.trellis import CODES, SEGMENT
from waterfill.coding.trellis_triton import _kernel
types = {"price": "*fp32", "decisions": "*i32", "path": "*u8", "rows": "i32"}
for states in (4, 64, 256):
    known = dict(zip(("SEGMENT", "STATES", "FEEDBACK", "INPUT"), (SEGMENT, states, *CODES[states])))
    source = ASTSource(_kernel, {**types, **dict.fromkeys(known, "constexpr")}, constexprs=known)
    made = compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 1, "enable_fp_fusion": False})
    assert made.asm["cubin"] and made.metadata.shared == 0  # states travel by shuffles alone
"""


def run(code: str, *words: str, **environment: str) -> None:
    """In an interpreter of its own: triton reads its settings when it is imported."""
    subprocess.run(
        [sys.executable, "-c", code, *words], check=True, timeout=300,
        env={**os.environ, **environment},
    )  # fmt: skip


@needs_triton
def test_the_kernel_interpreted() -> None:
    run(KERNEL, "cpu", TRITON_INTERPRET="1")


@needs_triton
def test_the_kernel_compiles_without_a_gpu(tmp_path: Path) -> None:
    run(COMPILE, TRITON_CACHE_DIR=str(tmp_path))


@needs_gpu
@needs_triton
def test_the_kernel_on_a_gpu() -> None:
    run(KERNEL, "cuda")
