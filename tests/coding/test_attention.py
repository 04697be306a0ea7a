"""Attention of few queries and norms: against float64, and every instruction set against the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waterfill.coding import native
from waterfill.coding.attention import MAX_WIDTH, attend, rms_norm
from waterfill.types import Array

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
# of the result, at a size of one: what rounding to the dtype may do, and float32 sums
NEAR = {"F32": 4e-6, "F16": 2e-3, "BF16": 1.2e-2}
SIMD = [*(native._core.simd_available() if native._core is not None else []), "numpy"]


def stored(x: Array, dtype: str) -> Array:
    """As numbers of the dtype."""
    if dtype != "BF16":
        return x.astype(DTYPES[dtype])
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def read(x: Array) -> Array:
    """In float64."""
    if x.dtype == np.uint16:
        x = (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float64)


def exact(q: Array, k: Array, v: Array, scale: float, mask: Array | None) -> Array:
    """Attention in float64, head by head."""
    share = q.shape[1] // k.shape[1]
    q, k, v = read(q), read(k), read(v)
    k, v = np.repeat(k, share, 1), np.repeat(v, share, 1)
    scores = q @ k.swapaxes(2, 3) * scale
    if mask is not None:
        mask = np.broadcast_to(mask, scores.shape)
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + read(mask)
    greatest = scores.max(3, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(greatest), greatest, 0))
    total = weights.sum(3, keepdims=True)
    return ((weights / np.where(total == 0, 1, total)) @ v).swapaxes(1, 2)


def every(monkeypatch: pytest.MonkeyPatch, call: Any) -> list[Array]:
    """What each instruction set gives, then the numpy twin."""
    results = []
    for simd in SIMD:
        monkeypatch.setenv("WATERFILL_SIMD", simd)
        results.append(call())
    for result in results[:-1]:
        np.testing.assert_array_equal(result, results[0])
    return results


calls = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(list(DTYPES)),
        "batch": st.integers(1, 3),
        "shared": st.integers(1, 3),
        "share": st.integers(1, 8),
        "queries": st.integers(1, 4),
        "keys": st.one_of(st.integers(1, 40), st.integers(250, 530), st.just(2000)),
        "d": st.integers(1, 97),
        "e": st.integers(1, 97),
        "mask": st.sampled_from(["none", "bool", "added", "hidden"]),
        "seed": st.integers(0, 2**32 - 1),
    }
)


@settings(max_examples=40, deadline=None)
@given(c=calls)
def test_attention_is_that_of_float64(c: dict[str, Any]) -> None:
    rng = np.random.default_rng(c["seed"])
    heads, dtype = c["shared"] * c["share"], c["dtype"]

    def numbers(*shape: int) -> Array:
        return stored(rng.normal(size=shape), dtype)

    # as a cache gives them: room for more keys, and heads beside each other
    q = numbers(c["batch"], c["queries"], heads, c["d"]).swapaxes(1, 2)
    k = numbers(c["batch"], c["shared"], c["keys"] + 3, c["d"])[:, :, : c["keys"]]
    v = numbers(c["batch"], c["keys"], c["shared"], c["e"]).swapaxes(1, 2)
    mask = None
    if c["mask"] == "bool":
        mask = rng.random((c["batch"], 1, c["queries"], c["keys"])) < 0.7
    elif c["mask"] == "added":
        mask = numbers(1, heads, 1, c["keys"])
    elif c["mask"] == "hidden":  # whole chunks, and every key of one query
        mask = np.zeros((1, 1, c["queries"], c["keys"]), bool)
        mask[:, :, 1:, c["keys"] // 2 :: 7] = True
    scale = float(rng.uniform(0.05, 0.5))
    with pytest.MonkeyPatch.context() as patch:
        results = every(patch, lambda: attend(q, k, v, scale, mask))
    wanted = exact(q, k, v, scale, mask)
    for result in (results[0], results[-1]):
        assert result.dtype == q.dtype
        np.testing.assert_allclose(read(result), wanted, atol=NEAR[dtype], rtol=NEAR[dtype])


def test_the_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=s).astype(np.float32) for s in ((2, 8, 1, 64), (2, 2, 5000, 64), (2, 2, 5000, 64)))  # fmt: skip
    results = []
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("WATERFILL_THREADS", threads)
        results.append(attend(q, k, v, 0.125))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_scores_at_the_ends_of_the_numbers(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q = stored(np.full((1, 1, 1, 16), 100.0), dtype)
    k = stored(np.linspace(-100, 100, 300)[None, None, :, None].repeat(16, 3), dtype)
    v = stored(np.arange(300.0)[None, None, :, None].repeat(3, 3), dtype)
    for result in every(monkeypatch, lambda: attend(q, k, v, 1.0)):
        np.testing.assert_allclose(read(result), read(v[0, 0, -1]) + np.zeros((1, 1, 1, 3)))
    q[...] = stored(np.array(np.nan), dtype)
    for result in every(monkeypatch, lambda: attend(q, k, v, 1.0)):
        assert np.isnan(read(result)).all()


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = np.zeros((1, 4, 1, 8), np.float32), np.zeros((1, 2, 5, 8), np.float32), np.zeros((1, 2, 5, 8), np.float32)  # fmt: skip
    wide = np.zeros((1, 2, 5, MAX_WIDTH + 1), np.float32)
    attend(q, k, v, 1.0)
    wrong: list[tuple[Any, ...]] = [
        (q, k[:, :, :4], v),
        (q, k, v.astype(np.float16)),
        (q.astype(np.float64), k.astype(np.float64), v.astype(np.float64)),
        (q[:, :3], k, v),
        (q, k[:, :, :0], v[:, :, :0]),
        (np.zeros((1, 4, 1, MAX_WIDTH + 1), np.float32), wide, v),
        (q, k, wide),
    ]
    for tensors in wrong:
        with pytest.raises(ValueError, match=r"fit|attention"):
            attend(*tensors, 1.0)
    with pytest.raises(ValueError, match="mask"):
        attend(q, k, v, 1.0, np.zeros((1, 1, 1, 5), np.int32))
    with pytest.raises(ValueError, match="broadcast"):
        attend(q, k, v, 1.0, np.zeros((1, 1, 1, 6), bool))
    with pytest.raises(ValueError, match="norm"):
        rms_norm(np.zeros((2, 4), np.float32), np.zeros(5, np.float32), 1e-5)
    with pytest.raises(ValueError, match="norm"):
        rms_norm(np.zeros((2, 4), np.float32), np.zeros(4, np.float16), 1e-5)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(list(DTYPES)),
    shape=st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 200)),
    offset=st.sampled_from([0.0, 1.0]),
    first=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_norms_are_those_of_float64(
    dtype: str, shape: tuple[int, int, int], offset: float, first: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = stored(rng.normal(size=shape) * 10.0 ** rng.integers(-3, 3), dtype)
    weight = stored(rng.normal(size=shape[2]), dtype)
    with pytest.MonkeyPatch.context() as patch:
        results = every(patch, lambda: rms_norm(x, weight, 1e-5, offset, first))
    values = read(x)
    wanted = values / np.sqrt((values**2).mean(2, keepdims=True) + 1e-5) * (offset + read(weight))
    for result in (results[0], results[-1]):
        assert result.dtype == x.dtype
        near = {"F32": 1e-5, "F16": 2e-3, "BF16": 1.2e-2}[dtype]
        np.testing.assert_allclose(read(result), wanted, rtol=near, atol=1e-6)
