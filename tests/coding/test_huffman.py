"""The Huffman coder: every implementation writes the same bytes and reads the same symbols."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.coding.test_rans import bits_of
from waterfill.coding import huffman, native
from waterfill.coding.huffman_numpy import BLOCK, DIVIDED, LONGEST, SEGMENTS
from waterfill.types import FormatError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "huffman"
PATHS = [*(native._core.simd_available() if native._core else []), "numpy"]
COMMON = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def sample(n: int, weights: list[int], first: int = 0, gap: int = 1) -> Any:
    """Symbols first, first + gap, ..., about as often as their weights say; at least two occur."""
    edges = np.cumsum(weights, dtype=np.uint64)
    drawn = np.searchsorted(edges, (bits_of(n, 7) >> np.uint64(8)) % edges[-1], side="right")
    symbols = (first + gap * drawn).astype(np.uint8)
    symbols[:2] = first, first + gap
    return symbols


def counts_of(symbols: Any) -> Any:
    return np.bincount(symbols, minlength=256)


BELL = [1, 3, 9, 25, 70, 150, 260, 330, 290, 150, 40, 4, 1]
STEEP = [1 << (20 - i) for i in range(20)]


@COMMON
@given(
    n=st.one_of(st.integers(2, 300), st.integers(DIVIDED - 40, DIVIDED + 40), st.just(9999)),
    weights=st.one_of(
        st.lists(st.integers(0, 1000), min_size=2, max_size=60),
        st.sampled_from([BELL, STEEP, [1] * 256, [1000, 1], [1, 0, 0, 5]]),
    ),
    seed=st.integers(0, 255),
)
def test_all_paths_agree(simd: Any, n: int, weights: list[int], seed: int) -> None:
    symbols = sample(n, [w + (i < 2) for i, w in enumerate(weights)], seed % (257 - len(weights)))
    streams = set()
    for path in PATHS:
        simd(path)
        streams.add(huffman.encode(symbols))
    assert len(streams) == 1
    stream = streams.pop()
    for path in PATHS:
        simd(path)
        got = huffman.decode(stream, n)
        assert got.dtype == np.uint8 and got.shape == (n,)
        assert np.array_equal(got, symbols), path
    bits = huffman.size_bits(counts_of(symbols))
    assert bits <= 8 * len(stream) < bits + 8 * (1 if n < DIVIDED else SEGMENTS)


@pytest.mark.parametrize("n", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + DIVIDED])
@pytest.mark.parametrize("path", PATHS)
def test_several_blocks(simd: Any, n: int, path: str) -> None:
    symbols = sample(n, BELL, 120)
    simd(PATHS[0])
    stream = huffman.encode(symbols, threads=1)
    simd(path)
    assert huffman.encode(symbols, counts_of(symbols), threads=3) == stream
    for threads in (1, 2, 5):
        assert np.array_equal(huffman.decode(stream, n, threads), symbols)
        if path == "numpy":
            break


@pytest.mark.parametrize("path", PATHS)
def test_segments_of_uneven_density(simd: Any, path: str) -> None:
    # One segment of the longest codes beside four of the shortest: they end far from together.
    symbols = np.zeros(BLOCK, np.uint8)
    symbols[: BLOCK // 5] = sample(BLOCK // 5, [1] * 255, 1)
    for turned in (symbols, symbols[::-1]):
        simd(path)
        assert np.array_equal(huffman.decode(huffman.encode(turned), BLOCK), turned)


def test_nothing_and_one_value(simd: Any) -> None:
    for path in PATHS:
        simd(path)
        empty = np.zeros(0, np.uint8)
        assert huffman.encode(empty) == b""
        assert huffman.decode(b"", 0).shape == (0,)
        with pytest.raises(FormatError):
            huffman.decode(b"\0", 0)
        for n in (1, 5, 5000):
            with pytest.raises(ValueError, match="two values"):
                huffman.encode(np.full(n, 7, np.uint8))
            with pytest.raises(FormatError):
                huffman.decode(b"", n)


@pytest.mark.parametrize("path", PATHS)
def test_counts_must_know_every_symbol(simd: Any, path: str) -> None:
    simd(path)
    symbols = sample(5000, BELL)
    counts = counts_of(symbols)
    assert huffman.encode(symbols, 3 * counts) == huffman.encode(symbols)
    counts[int(symbols[-1])] = 0
    with pytest.raises(ValueError, match="without a code"):
        huffman.encode(symbols, counts)


def test_few_symbols_cost_few_bytes() -> None:
    symbols = sample(256, BELL, 120)
    counts = counts_of(symbols)
    share = counts[counts > 0] / symbols.size
    ideal = float(-(symbols.size * share * np.log2(share)).sum()) / 8
    assert len(huffman.encode(symbols)) <= 1.03 * ideal + 8
    assert len(huffman.encode(symbols[:4])) <= 8


def test_size_is_near_the_entropy() -> None:
    symbols = sample(200_000, BELL, 120)
    share = counts_of(symbols)[120 : 120 + len(BELL)] / symbols.size
    ideal = float(-(symbols.size * share * np.log2(share)).sum()) / 8
    assert len(huffman.encode(symbols)) < 1.02 * ideal + 60


def unlimited_bits(counts: Any) -> int:
    """Bits under Huffman's own code, whose codes may be of any length."""
    heap = [int(c) for c in counts if c]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        pair = heapq.heappop(heap) + heapq.heappop(heap)
        total += pair
        heapq.heappush(heap, pair)
    return total


@given(st.lists(st.integers(0, 1 << 40), min_size=2, max_size=256), st.booleans())
@COMMON
def test_codes_are_complete_and_short(values: list[int], even: bool) -> None:
    counts = np.zeros(256, np.int64)
    counts[: len(values)] = [v % 7 if even else v for v in values]
    counts[:2] += 1
    lengths = huffman.code_lengths(counts).astype(int)
    assert np.array_equal(lengths > 0, counts > 0)
    assert lengths.max() <= LONGEST
    assert (2.0 ** -lengths[lengths > 0]).sum() == 1
    bits, best = int((counts * lengths).sum()), unlimited_bits(counts)
    assert bits >= best
    if lengths.max() < LONGEST:
        assert bits == best


@lru_cache
def complete_codes(leaves: int, slots: int, depth: int) -> list[tuple[int, ...]]:
    """Ascending lengths of all complete codes, from a level where `slots` nodes are open."""
    if depth == LONGEST or leaves <= slots:
        return [(depth,) * leaves] if leaves == slots else []
    return [
        (depth,) * here + rest
        for here in range(min(slots, leaves))
        for rest in complete_codes(leaves - here, 2 * (slots - here), depth + 1)
    ]


def test_no_code_within_eleven_bits_is_shorter() -> None:
    for ratio in (1.4, 1.62, 2.0, 3.0):
        counts = np.zeros(256, np.int64)
        counts[:14] = ratio ** np.arange(14) * 3
        every = np.array(complete_codes(14, 1, 0))
        assert (every * counts[:14][::-1]).sum(axis=1).min() == int(
            (counts * huffman.code_lengths(counts)).sum()
        )
        assert ratio < 1.5 or unlimited_bits(counts) < (counts * huffman.code_lengths(counts)).sum()


def broken_streams(stream: bytes) -> Iterator[bytes]:
    rng = np.random.default_rng(5)
    for bit in range(0, 8 * min(len(stream), 60), 3):
        broken = bytearray(stream)
        broken[bit // 8] ^= 1 << bit % 8
        yield bytes(broken)
    for trial in range(120):
        broken = bytearray(stream)
        for _ in range(1 + trial % 4):
            broken[int(rng.integers(0, len(broken)))] = int(rng.integers(0, 256))
        if trial % 3 == 0:
            broken = broken[: int(rng.integers(0, len(broken) + 1))]
        yield bytes(broken) + bytes(trial % 5 == 0)


def test_damage_is_refused_or_read_alike(simd: Any) -> None:
    for n in (50, 6000):
        stream = huffman.encode(sample(n, BELL, 120))
        refused = 0
        for trial, broken in enumerate(broken_streams(stream)):
            seen = set()
            # numpy takes its time over the longer streams
            for path in PATHS if n < DIVIDED or trial % 8 == 0 else PATHS[:-1] or PATHS:
                simd(path)
                try:
                    got = huffman.decode(broken, n)
                    assert got.shape == (n,)
                    seen.add(got.tobytes())
                except FormatError:
                    seen.add(b"")
            assert len(seen) == 1
            refused += seen == {b""}
        assert refused > 60


def unary(numbers: list[int]) -> bytes:
    return np.packbits([b for n in numbers for b in [0] * n + [1]]).tobytes()


# Lengths 8 - 7 = 1 are written 14 (13, raised by one), and 1 once more as 0.
HALVES = bytes([5, 6]) + unary([14, 0])
THREE = bytes([5, 7]) + unary([14, 2, 0])
LIES = {
    "range": bytes([6, 6]) + unary([14]) + b"\x01",
    "reversed range": bytes([6, 5]) + unary([14, 0]) + b"\x01",
    "lengths cut short": HALVES[:-1],
    "incomplete": bytes([5, 6]) + unary([14, 2]) + b"\x01",
    "oversubscribed": bytes([5, 7]) + unary([14, 0, 0]) + b"\x01",
    "one code": bytes([5, 6]) + unary([14, 3]) + b"\x01",
    "no codes": bytes([5, 6]) + unary([3, 3]) + b"\x01",
    "a code of no bits": bytes([5, 7]) + unary([16, 2, 0]) + b"\x01",
    "a code of twelve bits": bytes([5, 6]) + unary([9, 0]) + b"\x01",
    "a step out of range": bytes([5, 6]) + unary([22, 0]) + b"\x01",
    "padding of the lengths": THREE[:-1] + bytes([THREE[-1] | 1]) + b"\0",
    "no symbols": HALVES,
    "padding of the symbols": HALVES + b"\x21",
    "bytes left over": HALVES + b"\x01\x00",
}


@pytest.mark.parametrize("path", PATHS)
def test_the_streams_that_lies_are_made_from(simd: Any, path: str) -> None:
    simd(path)
    assert huffman.decode(HALVES + b"\x11", 5).tolist() == [6, 5, 5, 5, 6]
    assert huffman.decode(THREE + b"\0", 5).tolist() == [5, 5, 5, 5, 5]


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("path", PATHS)
def test_bytes_that_lie(simd: Any, path: str, lie: str) -> None:
    simd(path)
    with pytest.raises(FormatError):
        huffman.decode(LIES[lie], 5)


@pytest.mark.parametrize("path", PATHS)
def test_lengths_of_segments_that_lie(simd: Any, path: str) -> None:
    simd(path)
    n = DIVIDED
    symbols = bits_of(n).astype(np.uint8) & np.uint8(1)
    stream = huffman.encode(symbols)
    at = 2 + len(unary([14, 0]))
    for segment in range(SEGMENTS - 1):
        for value in (0, 1, 0xFFFF):
            broken = bytearray(stream)
            broken[at + 2 * segment : at + 2 * segment + 2] = value.to_bytes(2, "little")
            with pytest.raises(FormatError):
                huffman.decode(bytes(broken), n)
    with pytest.raises(FormatError):
        huffman.decode(stream, n - 1)
    with pytest.raises(FormatError):
        huffman.decode(stream, n + 8)


@pytest.mark.parametrize("path", PATHS)
def test_a_promise_of_many_symbols_makes_no_room_for_them(simd: Any, path: str) -> None:
    simd(path)
    for n in (1 << 50, 1 << 36, 8 * len(HALVES) + 9):
        with pytest.raises(FormatError, match="more symbols than bits"):
            huffman.decode(HALVES + b"\x01", n)
    stream = HALVES + bytes(20_000)
    with pytest.raises(FormatError):
        huffman.decode(stream, 8 * len(stream))


def golden_cases() -> Iterator[tuple[str, Any]]:
    yield "tiny", sample(6, BELL, 120)
    yield "bell", sample(3000, BELL, 120)
    yield "segments", sample(6007, BELL, 3, 19)
    yield "wide", sample(5000, [20 + i % 64 for i in range(256)])
    yield "steep", sample(4500, STEEP)
    yield "blocks", sample(BLOCK + 300, [3, 1], 254)


@pytest.mark.parametrize("case", list(golden_cases()), ids=lambda case: case[0])
@pytest.mark.parametrize("path", PATHS)
def test_golden_bytes(simd: Any, path: str, case: Any) -> None:
    name, symbols = case
    want = (GOLDEN / f"{name}.bin").read_bytes()
    simd(path)
    assert huffman.encode(symbols) == want
    assert np.array_equal(huffman.decode(want, symbols.size), symbols)


if __name__ == "__main__":  # only ever to add a case: the bytes of a case once written never change
    for name, symbols in golden_cases():
        path = GOLDEN / f"{name}.bin"
        if not path.exists():
            path.write_bytes(huffman.encode(symbols))
