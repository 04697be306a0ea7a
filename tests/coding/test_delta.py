"""The delta coder: every implementation writes the same bytes, and every bit comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.coding.test_rans import bits_of
from waterfill.coding import delta, delta_numpy, gaps, native
from waterfill.types import DTYPES, FormatError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "delta"
PATHS = [*(native._core.simd_available() if native._core else []), "numpy"]
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
COMMON = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def weights(n: int, dtype: str, start: int = 0) -> Any:
    """Words whose exponents differ as weights' do, the same in every version of numpy."""
    width = DTYPES[dtype].itemsize
    bits = bits_of(n, start)
    if dtype in FLOATS:
        words = delta_numpy.Words.of(dtype)
        down = (bits >> np.uint64(40)) & (bits >> np.uint64(44)) & np.uint64(7)
        middle = np.uint64(words.mask >> 1) - down
        mantissa = bits & np.uint64((1 << words.shift) - 1)
        sign = (bits >> np.uint64(63)) << np.uint64(8 * width - 1)
        bits = middle << np.uint64(words.shift) | mantissa | sign
    return bits.astype(f"<u{width}")


def step(old: Any, every: int, reach: int, start: int = 0) -> Any:
    """The same words, about one in `every` moved by up to `reach` steps."""
    chance = bits_of(old.size, start + 11)
    moves = (chance >> np.uint64(20)) % np.uint64(2 * reach + 1)
    hit = chance % np.uint64(every) == 0
    back = np.uint64(reach).astype(old.dtype)
    return np.where(hit, old + moves.astype(old.dtype) - back, old)


def samples() -> Iterator[tuple[str, str, Any, Any]]:
    for dtype in DTYPES:
        old = weights(3000, dtype)
        yield f"{dtype}-sparse", dtype, old, step(old, 20, 2)
    for dtype in ("BF16", "F32", "I64"):
        old = weights(700, dtype)
        yield f"{dtype}-dense", dtype, old, bits_of(700, 5).astype(old.dtype)
        yield f"{dtype}-all", dtype, old, old + old.dtype.type(1)
        yield f"{dtype}-one", dtype, old, np.where(np.arange(700) == 699, ~old, old)
    old = weights(300, "BF16")
    yield "BF16-same", "BF16", old, old.copy()
    yield "BF16-empty", "BF16", old[:0], old[:0]


CASES = list(samples())


def held(words: Any, dtype: str) -> Any:
    return words.view(DTYPES[dtype])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
@pytest.mark.parametrize("path", PATHS)
def test_golden_bytes(simd: Any, path: str, case: Any) -> None:
    name, dtype, old, new = case
    want = (GOLDEN / f"{name}.bin").read_bytes()
    simd(path)
    assert delta.encode(held(old, dtype), held(new, dtype), dtype) == want
    got = delta.decode(want, held(old, dtype), dtype)
    assert got.dtype == DTYPES[dtype] and got.tobytes() == new.tobytes()


@COMMON
@given(
    dtype=st.sampled_from(list(DTYPES)),
    n=st.integers(0, 400),
    every=st.sampled_from([1, 2, 9, 80]),
    reach=st.sampled_from([0, 1, 3, 1000]),
    start=st.integers(0, 1 << 20),
    wild=st.booleans(),
    in_place=st.booleans(),
)
def test_every_path_gives_the_same(
    simd: Any, dtype: str, n: int, every: int, reach: int, start: int, wild: bool, in_place: bool
) -> None:
    old = weights(n, dtype, start)
    if wild:  # every bit pattern: NaN with payloads, infinities, subnormals, both zeros
        old = bits_of(n, start).astype(old.dtype)
    new = step(old, every, reach, start)
    streams = set()
    for path in PATHS:
        simd(path)
        streams.add(delta.encode(held(old, dtype), held(new, dtype), dtype, threads=2))
    (stream,) = streams
    for path in PATHS:
        simd(path)
        base = held(old.copy(), dtype)
        got = delta.decode(stream, base, dtype, out=base if in_place else None, threads=2)
        assert got.tobytes() == new.tobytes(), path


SPECIAL = {
    "F64": [0, 1 << 63, 1, (1 << 63) + 1, 0x7FF << 52, 0xFFF << 52, (0x7FF << 52) + 1, (1 << 64) - 1],
    "F32": [0, 1 << 31, 1, 0x80000001, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFFFFFFF],
    "F16": [0, 0x8000, 1, 0x8001, 0x7C00, 0xFC00, 0x7E01, 0xFFFF],
    "BF16": [0, 0x8000, 1, 0x8001, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF],
    "F8_E4M3": [0, 0x80, 1, 0x81, 0x7E, 0xFE, 0x7F, 0xFF],
    "F8_E5M2": [0, 0x80, 1, 0x81, 0x7C, 0xFC, 0x7D, 0xFF],
}  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("path", PATHS)
def test_from_every_special_value_to_every_other(simd: Any, path: str, dtype: str) -> None:
    values = np.array(SPECIAL[dtype], np.uint64).astype(f"<u{DTYPES[dtype].itemsize}")
    old, new = np.repeat(values, values.size), np.tile(values, values.size)
    simd(path)
    stream = delta.encode(held(old, dtype), held(new, dtype), dtype)
    assert delta.decode(stream, held(old, dtype), dtype).tobytes() == new.tobytes()


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "BOOL"])
def test_every_pair_of_bytes(dtype: str) -> None:
    old, new = (np.repeat(np.arange(256, dtype=np.uint8), 256), np.tile(np.arange(256, dtype=np.uint8), 256))  # fmt: skip
    stream = delta.encode(held(old, dtype), held(new, dtype), dtype)
    assert delta.decode(stream, held(old, dtype), dtype).tobytes() == new.tobytes()


@pytest.mark.parametrize("path", PATHS)
def test_several_blocks(simd: Any, path: str) -> None:
    old = weights(2 * delta_numpy.BLOCK + 77, "BF16")
    new = step(old, 40, 1)
    new[-1] = ~old[-1]
    simd(PATHS[0])
    stream = delta.encode(old, new, "BF16", threads=1)
    simd(path)
    assert delta.encode(old, new, "BF16", threads=3) == stream
    for threads in (1, 4):
        assert np.array_equal(delta.decode(stream, old, "BF16", threads=threads), new)


def test_shapes_and_memory_that_is_not_in_one_piece() -> None:
    whole = weights(2 * 60, "F32").reshape(60, 2)
    old, new = held(whole, "F32")[:, 0], held(step(whole.ravel(), 5, 1), "F32").reshape(60, 2)[:, 1]
    stream = delta.encode(old.reshape(5, 12), new.reshape(5, 12), "F32")
    got = delta.decode(stream, old.reshape(5, 12), "F32")
    assert got.shape == (5, 12) and got.tobytes() == new.tobytes()
    scalar = np.float32(1.5).reshape(())
    stream = delta.encode(scalar, -scalar, "F32")
    assert delta.decode(stream, scalar, "F32") == -scalar
    odd = np.frombuffer(b"x" + whole.tobytes(), np.uint8)[1:].view("<f4")  # not aligned
    assert (
        delta.decode(delta.encode(odd, odd + 1, "F32"), odd, "F32").tobytes() == (odd + 1).tobytes()
    )
    with pytest.raises(ValueError, match="contiguous"):
        delta.decode(stream, scalar, "F32", out=np.zeros(2, np.float32)[::2][:0])
    with pytest.raises(ValueError, match="old values"):
        delta.encode(odd, odd[1:], "F32")


def test_size_is_near_the_entropy() -> None:
    """One step of a fixed size: mask by exponent and size of change, at most 3 % over."""
    rng = np.random.default_rng(0)
    master = rng.standard_normal(1 << 20, np.float32) * np.float32(0.02)
    moved = master + np.float32(1e-6) * np.sign(rng.standard_normal(1 << 20)).astype(np.float32)
    old, new = ((x.view(np.uint32) + 0x8000 >> 16).astype(np.uint16) for x in (master, moved))
    words = delta_numpy.Words.of("BF16")
    ideal = 0.0
    exponent = words.exponents(old)
    for e in np.unique(exponent):
        x, y = old[exponent == e], new[exponent == e]
        changed = x != y
        kinds = np.where(changed, words.differences(x, y), 0)
        counts = np.unique(kinds, return_counts=True)[1]
        ideal -= float((counts * np.log2(counts / x.size)).sum())
    stream = delta.encode(old, new, "BF16")
    assert 8 * len(stream) < 1.03 * ideal
    assert 6 * np.count_nonzero(old != new) > 9 * len(stream)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["BF16-sparse", "F32-dense", "I64-all", "F64-sparse"])
def test_damage_is_refused_or_gives_an_array_of_the_same_size(
    simd: Any, path: str, name: str
) -> None:
    _, dtype, old, _ = next(case for case in CASES if case[0] == name)
    whole = (GOLDEN / f"{name}.bin").read_bytes()
    rng = np.random.default_rng(3)
    simd(path)
    refused, trials = 0, 400 if path != "numpy" else 120
    for trial in range(trials):
        broken = bytearray(whole)
        for _ in range(1 + trial % 3):
            reach = 60 if trial % 2 else len(broken)
            broken[int(rng.integers(min(reach, len(broken))))] ^= 1 << int(rng.integers(8))
        if trial % 7 == 0:
            broken = broken[: int(rng.integers(len(broken)))]
        if trial % 11 == 0:
            broken += bytes(1 + trial % 3)
        try:
            got = delta.decode(bytes(broken), held(old, dtype), dtype)
        except FormatError:
            refused += 1
        else:
            assert got.shape == old.shape
    assert refused > 0.5 * trials


@pytest.mark.parametrize("path", PATHS)
def test_what_no_encoder_writes(simd: Any, path: str) -> None:
    simd(path)
    old = weights(100, "BF16")
    stream = delta.encode(old, step(old, 9, 1), "BF16")
    for broken, why in (
        (b"", "cut short"),
        (b"\x00\x00", "left over"),
        (b"\x65" + stream[1:], "101 changes of 100"),
        (stream[:1] + b"\x20" + stream[2:], "too many"),
        (b"\x01\x02\x05\x05\x00", "out of order"),
        (b"\x01\x00", "counts are cut short"),
        (stream + b"\x00", "left over"),
    ):
        with pytest.raises(FormatError, match=why):
            delta.decode(broken, old, "BF16")
    with pytest.raises(FormatError):  # gaps of a longer array
        delta.decode(stream, old[:30], "BF16")
    assert delta.decode(b"\x00", old, "BF16").tobytes() == old.tobytes()


def test_geometric_models_are_what_they_say() -> None:
    rates = np.arange(255)
    for size in (1, 5, 17, 48):
        table = gaps.geometric(rates, size)
        assert (table.sum(axis=1) == 4096).all() and (table >= 1).all()
    rate = np.array([64])  # a chance of 2**-g/32: half of all gaps are below 32
    table = gaps.geometric(rate, 48)[0].astype(int)
    assert abs(table[:18].sum() - 2048) < 20 and abs(table[:20].sum() - 3072) < 20


if __name__ == "__main__":  # only ever to add a case: the bytes of a case once written never change
    for name, dtype, old, new in CASES:
        path = GOLDEN / f"{name}.bin"
        if not path.exists():
            path.write_bytes(delta.encode(held(old, dtype), held(new, dtype), dtype))
