"""Trellis paths: what goes in comes out, every reader agrees, and bytes that lie are refused."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.coding.test_rans import COMMON, PATHS
from waterfill.coding import gaussian, paths
from waterfill.coding.sections import join, split
from waterfill.coding.trellis import CODES, SEGMENT
from waterfill.types import FormatError

STATES = (1, *CODES)
SHAPES = [(1, 1), (1, 300), (300, 1), (40, 70), (SEGMENT + 1, 3), (2 * SEGMENT + 5, 9), (7, 500)]


def octaves(m: int, n: int) -> tuple[Any, Any]:
    return (np.arange(n) % 7 - 3) / 4, (np.arange(m) % 5 - 2) / 2


def scales(m: int, n: int) -> tuple[Any, Any]:
    random = np.random.default_rng(m * 1000 + n)
    return (
        random.lognormal(0, 2, n).astype(np.float32),
        random.lognormal(0, 2, m).astype(np.float32),
    )


def sample(m: int, n: int, scale: Any, seed: int = 0) -> np.ndarray:
    """Indices of any kind: no path needs to be one that a quantiser would take."""
    values = np.random.default_rng(seed).normal(size=(m, n)) * scale
    return np.rint(values).clip(-(2**31), 2**31 - 1).astype(np.int32)


def values_of(index: np.ndarray, states: int, step: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """As the format says, one row after another."""
    feedback, source = CODES.get(states, (0, 0))
    unit = step * np.float32(0.5) if states == 1 else step
    out = np.empty(index.shape, np.float32)
    state = np.zeros(index.shape[1], np.int64)
    for row, k in enumerate(index.astype(np.int64)):
        state = state * (row % SEGMENT > 0)
        grid = state & 1
        out[row] = (2 * k - grid * np.sign(k)).astype(np.float32) * unit * scale[row]
        state = state >> 1 ^ feedback * grid ^ source * (k & 1)
    return out


def half(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def check(index: np.ndarray, states: int) -> bytes:
    m, n = index.shape
    (step, scale), hints = scales(m, n), octaves(m, n)
    data = paths.encode(index, states, hints)
    want = values_of(index, states, step, scale)
    assert same(paths.decode(data, states, step, scale, hints), want)
    assert same(paths.decode(data, states, step, scale, hints, bf16=True), half(want))
    return data


@COMMON
@given(
    states=st.sampled_from(STATES),
    m=st.integers(0, 60),
    n=st.integers(0, 60),
    scale=st.sampled_from([0.0, 0.05, 0.3, 2.0, 9.0, 60.0, 1e4, 1e9]),
    spread=st.sampled_from([0, 1, 3]),
    seed=st.integers(0, 99),
)
def test_paths_come_back(states: int, m: int, n: int, scale: float, spread: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    factors = 2.0 ** (spread * random.normal(size=n)) * 2.0 ** (spread * random.normal(size=(m, 1)))
    check(sample(m, n, scale * factors, seed), states)


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes(states: int, shape: tuple[int, int]) -> None:
    check(sample(*shape, 2.0), states)


@pytest.mark.parametrize("states", STATES)
def test_extremes(states: int) -> None:
    index = sample(30, 40, 1.5)
    index[::7, ::3] = [[2**31 - 1, -(2**31), 2**24 + 1, 127, -126, 15, -15] * 2]
    check(index, states)
    check(np.full((50, 60), -(2**31), np.int32), states)
    check(np.full((50, 60), 3, np.int32), states)
    assert len(check(np.zeros((900, 900), np.int32), states)) < 400


def test_nothing_takes_no_bytes() -> None:
    nothing = np.zeros((0, 5), np.int32)
    assert paths.encode(nothing, 4, octaves(0, 5)) == b""
    with pytest.raises(FormatError):
        paths.decode(b"\0", 4, *scales(0, 5), octaves(0, 5))


# The last has eight lanes and more, whole vectors and a narrow panel.
CASES = [(s, (SEGMENT + 30, 2), 0.4) for s in STATES] + [(s, (9, 133), 5.0) for s in STATES]
CASES += [(s, (150, 1201), scale) for s, scale in ((1, 20.0), (4, 1.0), (256, 0.3))]


@pytest.mark.parametrize(("states", "shape", "scale"), CASES)
def test_every_reader_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, states: int, shape: tuple[int, int], scale: float
) -> None:
    m, n = shape
    index = sample(m, n, scale * 2.0 ** (np.arange(n) % 5))
    index[3, ::5] = 10**6 * (np.arange(-(-n // 5)) - 2)
    (step, scale_), hints = scales(m, n), octaves(m, n)
    data = paths.encode(index, states, hints)
    want = values_of(index, states, step, scale_)
    for path in PATHS:
        monkeypatch.setenv("WATERFILL_SIMD", path)
        assert same(paths.decode(data, states, step, scale_, hints), want)
        assert same(paths.decode(data, states, step, scale_, hints, bf16=True), half(want))
        if path != "numpy":
            assert paths.encode(index, states, hints) == data


def test_products_beyond_float32_are_infinite_in_every_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index = sample(20, 20, 5.0)
    index[4, 4], index[5, 5] = 2**30, -(2**30)
    step, scale = np.full(20, 2.0**126, np.float32), np.full(20, 2.0**120, np.float32)
    scale[::2] = 2.0**-126
    data = paths.encode(index, 8, octaves(20, 20))
    with np.errstate(over="ignore"):
        want = values_of(index, 8, step, scale)
    assert np.isinf(want).any() and not np.isnan(want).any()
    for path in PATHS:
        monkeypatch.setenv("WATERFILL_SIMD", path)
        assert same(paths.decode(data, 8, step, scale, octaves(20, 20)), want)
        assert same(paths.decode(data, 8, step, scale, octaves(20, 20), bf16=True), half(want))


def test_threads_change_nothing() -> None:
    index = sample(40_000, 5, 1.0)
    hints, (step, scale) = octaves(40_000, 5), scales(40_000, 5)
    data = paths.encode(index, 16, hints, threads=1)
    assert paths.encode(index, 16, hints, threads=3) == data
    assert same(
        paths.decode(data, 16, step, scale, hints, threads=1),
        paths.decode(data, 16, step, scale, hints, threads=3),
    )


def test_size_is_near_the_entropy() -> None:
    index = sample(2048, 512, 3.0)
    counts = np.unique(index, return_counts=True)[1]
    entropy = -(counts * np.log2(counts / index.size)).sum() / index.size
    data = paths.encode(index, 1, (np.zeros(512), np.zeros(2048)))
    assert 8 * len(data) / index.size < entropy + 0.01


def attempt(data: bytes, states: int, m: int, n: int) -> Any:
    try:
        out = paths.decode(data, states, *scales(m, n), octaves(m, n))
    except FormatError:
        return None
    assert out.shape == (m, n)
    return out


@pytest.mark.parametrize("path", PATHS)
def test_damage_is_refused_or_something(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    index = sample(30, 20, 2.0 * 2.0 ** (np.arange(20) % 3))
    index[::9, 4] = 5000
    data = paths.encode(index, 8, octaves(30, 20))
    monkeypatch.setenv("WATERFILL_SIMD", path)
    for cut in range(len(data)):
        assert attempt(data[:cut], 8, 30, 20) is None
    assert attempt(data + b"\0", 8, 30, 20) is None
    random = np.random.default_rng(7)
    for trial in range(60 if path == "numpy" else 200):
        broken = bytearray(data)
        reach = len(broken) if trial % 2 else 60
        for _ in range(1 + trial % 3):
            broken[int(random.integers(reach))] ^= 1 << int(random.integers(8))
        attempt(bytes(broken), (1, 8, 256)[trial % 3], *((30, 20), (20, 30), (3, 1))[trial % 3])


@settings(deadline=None, max_examples=150)
@given(
    st.binary(max_size=6),
    st.binary(max_size=6),
    st.integers(0, 255),
    st.integers(0, 255),
    st.binary(max_size=40),
)
def test_random_bytes_are_refused_or_something(
    columns: bytes, rows: bytes, kind: int, first: int, rest: bytes
) -> None:
    data = join([columns, rows, bytes([kind, first]) + rest])
    for m, n in ((5, 7), (1, 1), (1100, 2)):
        attempt(data, 16, m, n)
        attempt(rest, 16, m, n)


def test_every_reader_agrees_on_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = paths.encode(sample(24, 10, 1.0), 4, octaves(24, 10))
    random = np.random.default_rng(3)
    for _ in range(60):
        at = int(random.integers(len(data)))
        broken = data[:at] + bytes([data[at] ^ 1 << int(random.integers(8))]) + data[at + 1 :]
        results = []
        for path in PATHS:
            monkeypatch.setenv("WATERFILL_SIMD", path)
            out = attempt(broken, 4, 24, 10)
            results.append(None if out is None else out.tobytes())
        assert len(set(results)) == 1


def replaced(data: bytes, at: int, value: int) -> bytes:
    columns, rows, rest = split(data, 3)
    return join([columns, rows, rest[:at] + bytes([value]) + rest[at + 1 :]])


def test_rules_of_the_head() -> None:
    data = paths.encode(sample(30, 30, 2.0), 4, octaves(30, 30))
    kind = split(data, 3)[2][0]
    for border in range(len(gaussian.BORDERS), 16):
        assert attempt(replaced(data, 0, kind & 0xC3 | border << 2), 4, 30, 30) is None
    assert attempt(replaced(data, 1, 255), 4, 30, 30) is None


def test_a_block_inside_a_segment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = paths.encode(np.zeros((3000, 2), np.int32), 4, (np.zeros(2), np.zeros(3000)))
    columns, rows, rest = split(data, 3)
    assert rest[2:4] == b"\0\0"  # no escapes; one lane, one block
    state = (1 << 16).to_bytes(4, "little")
    sizes = b"".join(v.to_bytes(4, "little") for v in (1000, 2, 0, 0, 0))
    broken = join([columns, rows, rest[:3] + b"\x10" + sizes + 3 * state])
    for path in PATHS:
        monkeypatch.setenv("WATERFILL_SIMD", path)
        with pytest.raises(FormatError, match=r"inside a segment|words run out|do not end"):
            paths.decode(broken, 4, *scales(3000, 2), (np.zeros(2), np.zeros(3000)))


def test_a_few_bytes_do_not_stand_for_many_weights() -> None:
    data = paths.encode(np.zeros((10, 10), np.int32), 4, octaves(10, 10))
    n = 1 << 22
    step, scale = np.ones(n, np.float32), np.ones(n, np.float32)
    hints = np.zeros(n), np.zeros(n)
    tracemalloc.start()
    with pytest.raises(FormatError, match="promised"):
        paths.decode(data, 4, step, scale, hints)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_zeros_stay_within_what_a_reader_believes() -> None:
    """The rule that refuses a large shape in few bytes never refuses what an encoder wrote."""
    assert gaussian.frequencies(8, 0, 0, 127).max() <= 4094
    data = paths.encode(np.zeros((3000, 3000), np.int32), 64, (np.zeros(3000), np.zeros(3000)))
    assert 9_000_000 < len(data) * paths.MOST_PER_BYTE / 4
