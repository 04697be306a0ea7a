"""What codecs call: integers and bytes, there and back, at nearly the entropy, safely."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.coding.test_rans import PATHS, bits_of
from waterfill.coding import entropy
from waterfill.coding.classes import MAX_CLASSES, choose_classes, pack_classes, read_classes
from waterfill.coding.models import Alphabet
from waterfill.types import FormatError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "rans"
COMMON = settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def bell(rows: int, cols: int, scale: Any = 1.0) -> np.ndarray:
    """Integers about zero, the same in every version of numpy: sums of bits, scaled."""
    h = bits_of(rows * cols, 99).reshape(rows, cols)
    total = sum(((h >> np.uint64(i)) & np.uint64(1)).astype(np.int64) for i in range(1, 49))
    return np.round((total - 24) * scale / 3.0).astype(np.int64)


def entropy_bytes(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / values.size)).sum() / 8)


@COMMON
@given(
    rows=st.integers(0, 50),
    cols=st.integers(0, 70),
    scale=st.sampled_from([0.0, 0.2, 1.0, 9.0, 100.0, 1e4, 1e7]),
    offset=st.sampled_from([0, 3, -40, 1 << 20, -(1 << 30)]),
    spread=st.booleans(),
    classes=st.sampled_from(["auto", None, 1, 3]),
)
def test_integers_come_back(
    rows: int, cols: int, scale: float, offset: int, spread: bool, classes: Any
) -> None:
    by_column = 2.0 ** (np.arange(cols) % 5) if spread else 1.0
    values = bell(rows, cols, scale * by_column) + offset
    if isinstance(classes, int):
        classes = (np.arange(cols) % classes * 7).astype(np.uint8)
    data = entropy.encode_ints(values, classes)
    got = entropy.decode_ints(data, rows, cols)
    assert got.dtype == np.int32 and got.shape == (rows, cols)
    assert np.array_equal(got, values)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.int64])
def test_any_integer_type(dtype: Any) -> None:
    values = np.clip(bell(40, 50, 2.0), 0, 100).astype(dtype)
    assert np.array_equal(entropy.decode_ints(entropy.encode_ints(values), 40, 50), values)


def test_extremes() -> None:
    values = np.array([[0, 1, -1, 2**31 - 1, -(2**31)]] * 3)
    assert np.array_equal(entropy.decode_ints(entropy.encode_ints(values), 3, 5), values)
    with pytest.raises(ValueError, match="32 bits"):
        entropy.encode_ints(values + 1)
    with pytest.raises(ValueError, match="matrix"):
        entropy.encode_ints(values[0])
    with pytest.raises(ValueError, match="columns"):
        entropy.encode_ints(np.arange(6).reshape(2, 3), np.zeros(2, np.uint8))


def test_size_is_entropy_and_a_little() -> None:
    values = bell(256, 256, 0.5)
    assert len(entropy.encode_ints(values)) < entropy_bytes(values) + 32 * 4 + 20
    assert len(entropy.encode_ints(np.full((100, 100), -7))) <= 2
    assert len(entropy.encode_ints(np.array([[1, 2, -3, 0]]))) <= 14
    wild = bell(256, 256, 0.5)
    wild[3, 5] = 1 << 30
    assert len(entropy.encode_ints(wild)) < entropy_bytes(wild) + 32 * 4 + 40


def test_classes_pay_where_columns_differ() -> None:
    values = bell(256, 192, 2.0 ** np.linspace(-2, 3, 192))
    auto, alike = entropy.encode_ints(values), entropy.encode_ints(values, None)
    assert len(auto) < 0.95 * len(alike)
    flat = bell(256, 192, 0.5)
    assert entropy.encode_ints(flat) == entropy.encode_ints(flat, None)


def test_classes_are_few_and_ordered() -> None:
    values = bell(400, 300, 2.0 ** np.linspace(-3, 20, 300))
    symbols = np.clip(values + 15, 0, 31).astype(np.uint8)
    ids = choose_classes(values, symbols, Alphabet(-15, 32, True))
    assert ids is not None
    assert 1 < ids.max() + 1 <= MAX_CLASSES
    assert (np.diff(ids.astype(int)) >= 0).mean() > 0.95


@pytest.mark.parametrize("n_classes", [2, 3, 17, 64])
def test_class_ids_come_back(n_classes: int) -> None:
    for skew in (1, 4):
        uniform = (bits_of(900) % np.uint64(1000)).astype(np.float64) / 1000
        ids = (uniform**skew * n_classes).astype(np.uint8)
        ids[:n_classes] = np.arange(n_classes)
        data = np.frombuffer(pack_classes(ids, n_classes), np.uint8)
        got, count, end = read_classes(data, 0, 900)
        assert np.array_equal(got, ids) and count == n_classes and end == data.size
        assert data.size <= 900 * (n_classes - 1).bit_length() / 8 + 3


@COMMON
@given(st.integers(0, 3000), st.sampled_from([1, 2, 20, 33, 60, 200, 256]), st.booleans())
def test_bytes_come_back(n: int, present: int, skewed: bool) -> None:
    h = bits_of(n)
    plane = (h % np.uint64(present)).astype(np.uint8) * np.uint8(255 // present)
    if skewed:
        plane = np.where(h >> np.uint64(40) & np.uint64(15), np.uint8(90), plane)
    data = entropy.encode_bytes(plane)
    got = entropy.decode_bytes(data, n)
    assert got.dtype == np.uint8 and np.array_equal(got, plane)
    assert len(data) <= n + 1


def exponents(n: int) -> np.ndarray:
    """Geometric, with a tail that only an escape can hold among 32 symbols."""
    h = bits_of(n) | np.uint64(1 << 60)
    low = h & (~h + np.uint64(1))
    return (125 - np.log2(low.astype(np.float64))).astype(np.uint8)


def test_bytes_near_entropy_with_a_small_alphabet() -> None:
    plane = exponents(1 << 20)
    assert np.unique(plane).size > 16
    data = entropy.encode_bytes(plane)
    assert data[1] < 32
    assert len(data) < 1.004 * entropy_bytes(plane)


def test_every_path_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = bell(64, 100, 2.0 ** np.linspace(-2, 5, 100))
    plane = exponents(20_000)
    ints, coded = entropy.encode_ints(values), entropy.encode_bytes(plane)
    for path in PATHS:
        monkeypatch.setenv("WATERFILL_SIMD", path)
        assert entropy.encode_ints(values) == ints
        assert entropy.encode_bytes(plane) == coded
        assert np.array_equal(entropy.decode_ints(ints, 64, 100), values)
        assert np.array_equal(entropy.decode_bytes(coded, 20_000), plane)


def golden_cases() -> Iterator[tuple[str, Any]]:
    yield "ints_one_class", bell(90, 80, 0.4)
    yield "ints_classes", bell(64, 120, 2.0 ** np.linspace(-2, 5, 120))
    yield "ints_wide", bell(60, 50, 30.0)
    yield "ints_escapes", bell(60, 70, 0.4) ** 5
    yield "ints_constant", np.full((5, 7), -300)
    yield "ints_tiny", np.array([[3, -1, 0, 0, 1]])
    yield "bytes_exponents", exponents(5000)
    yield "bytes_stored", (bits_of(100) & np.uint64(255)).astype(np.uint8)
    yield "bytes_constant", np.full(50, 9, np.uint8)
    yield "bytes_wide", np.clip(bell(1, 4000, 12.0)[0] + 128, 0, 255).astype(np.uint8)


def encode(values: np.ndarray) -> bytes:
    return entropy.encode_ints(values) if values.ndim == 2 else entropy.encode_bytes(values)


def decode(data: bytes, like: np.ndarray) -> np.ndarray:
    if like.ndim == 2:
        return entropy.decode_ints(data, *like.shape)
    return entropy.decode_bytes(data, like.size)


@pytest.mark.parametrize("case", list(golden_cases()), ids=lambda case: case[0])
@pytest.mark.parametrize("path", PATHS)
def test_golden_bytes(monkeypatch: pytest.MonkeyPatch, path: str, case: tuple[str, Any]) -> None:
    name, values = case
    want = (GOLDEN / f"{name}.bin").read_bytes()
    monkeypatch.setenv("WATERFILL_SIMD", path)
    assert np.array_equal(decode(want, values), values)
    assert encode(values) == want


@pytest.mark.parametrize("case", list(golden_cases()), ids=lambda case: case[0])
def test_damage_is_refused_or_something_else(case: tuple[str, Any]) -> None:
    name, values = case
    data = (GOLDEN / f"{name}.bin").read_bytes()
    rng = np.random.default_rng(11)
    for cut in {*range(min(len(data), 40)), *rng.integers(0, len(data), 20).tolist()}:
        with pytest.raises(FormatError):
            decode(data[:cut], values)
    with pytest.raises(FormatError):
        decode(data + b"\0", values)
    for trial in range(150):
        broken = bytearray(data)
        reach = len(broken) if trial % 2 else min(len(broken), 40)
        for _ in range(1 + trial % 3):
            broken[int(rng.integers(0, reach))] ^= int(rng.integers(1, 256))
        try:
            got = decode(bytes(broken), values)
        except FormatError:
            continue
        assert got.shape == values.shape


def test_random_bytes_are_refused_or_something() -> None:
    rng = np.random.default_rng(12)
    for trial in range(400):
        data = rng.integers(0, 256, int(rng.integers(0, 80)), dtype=np.uint8)
        if data.size:
            data[0] = (2, 6, 10, 14, 0, 1)[trial % 6]
        for like in (np.zeros((9, 11)), np.zeros(99)):
            try:
                decode(data.tobytes(), like)
            except FormatError:
                continue


if __name__ == "__main__":  # only ever to add a case: the bytes of a case once written never change
    for name, values in golden_cases():
        path = GOLDEN / f"{name}.bin"
        if not path.exists():
            path.write_bytes(encode(values))
