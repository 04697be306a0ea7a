"""The rANS coder: every implementation writes the same bytes and reads the same symbols."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from waterfill.coding import native, rans, rans_numpy
from waterfill.coding.models import quantise
from waterfill.types import FormatError, SpecError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "rans"
PATHS = [*(native._core.simd_available() if native._core else []), "numpy"]
COMMON = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def bits_of(n: int, start: int = 0) -> np.ndarray:
    """Numbers that look random and are the same in every version of numpy."""
    i = np.arange(start, start + n, dtype=np.uint64)
    h = (i * np.uint64(0x9E3779B97F4A7C15)) ^ (i >> np.uint64(3))
    h = (h ^ (h >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    return h ^ (h >> np.uint64(29))


def sample(rows: int, cols: int, alphabet: int, n_classes: int) -> tuple[Any, Any, Any]:
    """Symbols, classes and tables: classes differ in how steeply frequencies fall."""
    ids = (bits_of(cols) % np.uint64(n_classes)).astype(np.uint8)
    if cols % 2:
        ids.sort()
    steep = np.array(
        [[max(1, 4000 >> (s * (k + 1) // 8)) for s in range(alphabet)] for k in range(n_classes)]
    )
    table = quantise(steep)
    slots = np.stack([np.repeat(np.arange(alphabet), f) for f in table]).astype(np.uint8)
    symbols = slots[ids, (bits_of(rows * cols, 7) >> np.uint64(20)).reshape(rows, cols) % 4096]
    return symbols, ids, table


@COMMON
@given(
    rows=st.integers(0, 40),
    cols=st.integers(0, 300),
    alphabet=st.sampled_from([1, 2, 5, 31, 32, 33, 200, 256]),
    n_classes=st.integers(1, 5),
    lanes=st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128]),
    use_lut=st.booleans(),
)
def test_all_paths_agree(
    simd: Any, rows: int, cols: int, alphabet: int, n_classes: int, lanes: int, use_lut: bool
) -> None:
    symbols, ids, table = sample(rows, cols, alphabet, n_classes)
    lut = (255 - np.arange(alphabet)).astype(np.uint8) if use_lut else None
    want = symbols if lut is None else lut[symbols]
    streams = set()
    for path in PATHS:
        simd(path)
        streams.add(rans.encode(symbols, ids, list(table), lanes))
    assert len(streams) == 1
    stream = streams.pop()
    for path in PATHS:
        simd(path)
        got = rans.decode(stream, rows, cols, ids, list(table), lut=lut)
        assert got.dtype == np.uint8 and got.shape == (rows, cols)
        assert np.array_equal(got, want), path


@pytest.mark.parametrize(
    ("rows", "cols", "lanes"),
    [(40000, 3, 4), (1, 70001, 2), (1, 140_001, 4), (5, 20000, 1), (33000, 33, 32)],
)
@pytest.mark.parametrize("path", PATHS)
def test_several_blocks(simd: Any, rows: int, cols: int, lanes: int, path: str) -> None:
    symbols, ids, table = sample(rows, cols, 12, 1)
    simd(PATHS[0])
    stream = rans.encode(symbols, None, table, lanes, threads=1)
    assert stream[0] & 0x10
    simd(path)
    if path != "numpy" or cols < 1000:
        assert rans.encode(symbols, ids, table, lanes, threads=3) == stream
    for threads in (1, 2, 5):
        got = rans.decode(stream, rows, cols, None, table, threads=threads)
        assert np.array_equal(got, symbols)
        if path == "numpy":
            break


def test_overhead_is_states_and_little_else() -> None:
    symbols, _, table = sample(256, 256, 20, 1)
    counts = np.bincount(symbols.ravel(), minlength=20)
    ideal = float((counts * (12 - np.log2(table[0]))).sum()) / 8
    assert len(rans.encode(symbols, None, table, 32)) <= ideal + 32 * 4 + 20
    few = symbols[:1, :6]
    assert len(rans.encode(few, None, table, rans.choose_lanes(6))) <= 10


def test_a_model_of_one_symbol_costs_nothing(simd: Any) -> None:
    table = np.zeros((2, 9), np.uint16)
    table[0, 4] = 4096
    table[1] = quantise(np.arange(1, 10))
    ids = (np.arange(50) % 2).astype(np.uint8)
    symbols = np.where(ids, bits_of(50 * 80).reshape(80, 50) % np.uint64(9), 4).astype(np.uint8)
    counts = np.bincount(symbols[:, ids == 1].ravel(), minlength=9)
    ideal = float((counts * (12 - np.log2(table[1]))).sum()) / 8
    for path in PATHS:
        simd(path)
        stream = rans.encode(symbols, ids, table, 32)
        assert len(stream) < ideal + 32 * 4 + 8
        assert np.array_equal(rans.decode(stream, 80, 50, ids, table), symbols)


@pytest.mark.parametrize("path", PATHS)
def test_a_flipped_bit_is_refused_or_seen(simd: Any, path: str) -> None:
    # The coder is a bijection: what is not refused must come out as something else. It is no
    # checksum, though; the container has those.
    symbols, ids, table = sample(30, 45, 19, 3)
    simd(path)
    stream = rans.encode(symbols, ids, table, 32)
    bits = range(0, 8 * len(stream), 1 if path != "numpy" else 7)
    refused = 0
    for bit in bits:
        broken = bytearray(stream)
        broken[bit // 8] ^= 1 << bit % 8
        try:
            assert not np.array_equal(rans.decode(bytes(broken), 30, 45, ids, table), symbols)
        except FormatError:
            refused += 1
    assert refused > 0.9 * len(bits)


@pytest.mark.parametrize("path", PATHS)
def test_damage_never_does_worse_than_format_error(simd: Any, path: str) -> None:
    rng = np.random.default_rng(5)
    symbols, ids, table = sample(33000, 2, 7, 1)
    simd(path)
    big = rans.encode(symbols, ids, table, 2)
    trials, refused = 300 if path != "numpy" else 60, 0
    for trial in range(trials):
        broken = bytearray(big[: int(rng.integers(0, 60))] if trial % 3 else big)
        for _ in range(1 + trial % 4):
            if broken:
                broken[int(rng.integers(0, min(len(broken), 40)))] = int(rng.integers(0, 256))
        if trial % 5 == 0:
            broken += bytes(trial % 7 + 1)
        if bytes(broken) == big:
            continue
        try:
            assert not np.array_equal(rans.decode(bytes(broken), 33000, 2, ids, table), symbols)
        except FormatError:
            refused += 1
    assert refused > 0.9 * trials


@pytest.mark.parametrize("path", PATHS)
def test_wrong_tables_and_arguments(simd: Any, path: str) -> None:
    symbols, ids, table = sample(8, 40, 10, 2)
    simd(path)
    stream = rans.encode(symbols, ids, table, 32)
    wrong = table.copy()
    wrong[1, 0] += 1
    with pytest.raises(FormatError):
        rans.decode(stream, 8, 40, ids, wrong)
    with pytest.raises(FormatError):
        rans.decode(stream, 8, 40, ids + np.uint8(1), table)
    with pytest.raises(FormatError):
        rans.decode(stream, 0, 40, ids, table)
    with pytest.raises(ValueError, match="model"):
        rans.encode(np.full((8, 40), 10, np.uint8), ids, table, 32)
    with pytest.raises(ValueError, match="columns"):
        rans.encode(symbols, ids[1:], table, 32)
    with pytest.raises(ValueError, match="power of two"):
        rans.encode(symbols, ids, table, 33)


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    symbols, ids, table = sample(8, 40, 10, 2)
    stream = rans.encode(symbols, ids, table, 32)
    monkeypatch.setenv("WATERFILL_THREADS", "2")
    assert np.array_equal(rans.decode(stream, 8, 40, ids, table), symbols)
    monkeypatch.setenv("WATERFILL_SIMD", "sse")
    if native._core is not None:
        with pytest.raises((ValueError, SpecError), match="sse"):
            rans.decode(stream, 8, 40, ids, table)


@pytest.mark.parametrize("path", PATHS)
def test_histogram_and_find(simd: Any, path: str) -> None:
    symbols, ids, _ = sample(50, 33, 40, 3)
    simd(path)
    counts = rans.histogram(symbols, ids, 3)
    for k in range(3):
        assert np.array_equal(counts[k], np.bincount(symbols[:, ids == k].ravel(), minlength=256))
    assert np.array_equal(rans.histogram(symbols)[0], counts.sum(axis=0))
    assert np.array_equal(rans.find(symbols, 3), np.flatnonzero(symbols == 3))
    assert rans.find(symbols, 255).size == 0


def test_alias_layout_is_a_bijection() -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        size = int(rng.integers(1, 33))
        counts = rng.integers(0, 1 << int(rng.integers(1, 12)), size)
        counts[seed % size] += 1
        freqs = quantise(counts)
        symbol, offset = rans_numpy.slot_layout(freqs[None])
        pairs = np.unique(symbol[0] * 4096 + offset[0])
        assert pairs.size == 4096
        assert (offset[0] < freqs[symbol[0]]).all()


def golden_cases() -> Iterator[tuple[str, Any, Any, Any, int]]:
    yield "alias", *sample(60, 70, 20, 1), 32
    yield "alias_classes", *sample(40, 150, 32, 4), 128
    yield "contiguous", *sample(50, 40, 100, 2), 32
    yield "tiny", *sample(1, 6, 3, 1), 4
    yield "blocks", *sample(33000, 3, 2, 1), 2


@pytest.mark.parametrize("case", list(golden_cases()), ids=lambda case: case[0])
@pytest.mark.parametrize("path", PATHS)
def test_golden_bytes(simd: Any, path: str, case: Any) -> None:
    name, symbols, ids, table, lanes = case
    want = (GOLDEN / f"{name}.bin").read_bytes()
    simd(path)
    assert rans.encode(symbols, ids, table, lanes) == want
    assert np.array_equal(rans.decode(want, *symbols.shape, ids, table), symbols)


if __name__ == "__main__":  # only ever to add a case: the bytes of a case once written never change
    for name, symbols, ids, table, lanes in golden_cases():
        path = GOLDEN / f"{name}.bin"
        if not path.exists():
            path.write_bytes(rans.encode(symbols, ids, table, lanes))
