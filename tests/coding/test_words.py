"""Words cut into a field and planes, and joined again: every implementation does it alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.coding.test_rans import PATHS, bits_of
from waterfill.coding import rans, words, words_numpy
from waterfill.coding.layout import Field, Layout
from waterfill.coding.models import quantise
from waterfill.coding.words import Encoded
from waterfill.types import FormatError

TILE = 8192
COMMON = settings(
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LAYOUTS = st.sampled_from([1, 2, 4, 8]).flatmap(
    lambda width: st.builds(Layout, st.just(width), st.integers(0, min(16, 8 * width - 1)))
)
COUNTS = st.one_of(
    st.integers(1, 80), st.integers(TILE - 70, TILE + 70), st.sampled_from([4097, 2 * TILE + 3])
)


def sample(n: int, layout: Layout, spread: int = 256, seed: int = 0) -> Any:
    """Words whose rest looks random, and whose fields are near each other but for a few."""
    kind = np.dtype(f"<u{layout.width}")
    out = bits_of(n, seed).astype(kind)
    if not layout.field_bits:
        return out
    below = 8 * layout.width - 1 - layout.field_bits
    chance = bits_of(n, seed + 1_000_000)
    most = 1 << layout.field_bits
    near = (seed + (chance >> np.uint64(40)) % np.uint64(spread)) % np.uint64(most)
    far = (chance >> np.uint64(20)) % np.uint64(most)
    field = np.where(chance % np.uint64(97) == 0, far, near).astype(kind)
    return out & ~kind.type((most - 1) << below) | field << kind.type(below)


def window(source: Any, layout: Layout, size: int, spare: bool) -> tuple[int, int, bool]:
    """Of a field of at most `size` symbols: low, size, escape."""
    values = words_numpy.values(source, layout.field_bits).astype(np.int64)
    low, span = int(values.min()), int(values.max() - values.min()) + 1
    if span <= size:
        return (low, span + 1, True) if spare and span < size else (low, span, False)
    low = min(int(np.median(values)) - size // 2, (1 << layout.field_bits) - size + 1)
    return max(0, low), size, True


def field_of(
    source: Any, layout: Layout, low: int, size: int, escape: bool, coder: str = "rans"
) -> Field:
    field = Field(low, size, escape, None)
    if coder == "huffman":
        return field
    symbols = words_numpy.symbols(source, layout, field)
    return Field(low, size, escape, quantise(np.bincount(symbols, minlength=size)[:size] + 1))


def counts_of(source: Any, layout: Layout, field: Field) -> Any:
    symbols = words_numpy.symbols(source, layout, field)
    return np.bincount(symbols, minlength=256) + (np.arange(256) < 2)


def planes_of(source: Any, layout: Layout, packed: bool) -> list[Any]:
    planes = [words.plane(source, layout, which) for which in range(layout.planes)]
    if packed:
        planes[0] = np.frombuffer(words.assemble(b"", source, layout, [0], None), np.uint8)
    return planes


@COMMON
@given(layout=LAYOUTS, n=COUNTS, seed=st.integers(0, 255), threads=st.integers(1, 3))
def test_planes(simd: Any, layout: Layout, n: int, seed: int, threads: int) -> None:
    source = sample(n, layout, seed=seed)
    before = source.tobytes()
    stored, seen = [p for p in range(layout.planes) if p == 0 or seed >> p & 1], set()
    for path in PATHS:
        simd(path)
        planes = [words.plane(source, layout, p, threads) for p in range(layout.planes)]
        coded = words.assemble(b"head", source, layout, stored, None, threads)
        assert len(coded) == 4 + sum(layout.plane_nbytes(p, n) for p in stored)
        seen.add((coded, b"".join(p.tobytes() for p in planes)))
    assert len(seen) == 1 and source.tobytes() == before
    assert int(planes[0].max()) < 1 << layout.first_bits


@COMMON
@given(width=st.sampled_from([1, 2, 4, 8]), n=COUNTS, seed=st.integers(0, 255))
def test_words_without_a_field(simd: Any, width: int, n: int, seed: int) -> None:
    layout = Layout(width, 0)
    source = sample(n, layout)
    planes: list[Any] = planes_of(source, layout, packed=False)
    for which in range(layout.planes):
        if seed >> which & 1:
            shift = source.dtype.type(8 * (layout.planes - 1 - which))
            source &= ~(source.dtype.type(255) << shift)
            source |= source.dtype.type(seed) << shift
            planes[which] = seed
    for path in PATHS:
        simd(path)
        out = np.zeros_like(source)
        words.join(planes, layout, out, packed=seed % 3 == 0, threads=1 + seed % 2)
        assert np.array_equal(out, source), path


@COMMON
@given(
    layout=LAYOUTS.filter(lambda layout: layout.field_bits > 0),
    n=COUNTS,
    spread=st.sampled_from([1, 2, 20, 32, 33, 200, 1000]),
    size=st.sampled_from([1, 2, 3, 31, 32, 33, 255, 256]),
    seed=st.integers(0, 1 << 16),
    packed=st.booleans(),
    coder=st.sampled_from(["rans", "huffman"]),
)
def test_words_with_a_field(
    simd: Any, layout: Layout, n: int, spread: int, size: int, seed: int, packed: bool, coder: str
) -> None:
    source = sample(n, layout, spread, seed)
    field = field_of(source, layout, *window(source, layout, size, spare=seed % 2 > 0), coder)
    counts, seen = counts_of(source, layout, field), set()
    for path in PATHS:
        simd(path)
        encoded = Encoded(source, layout, field, counts, threads=1 + seed % 2)
        escaped, nbytes = encoded.escaped, encoded.nbytes
        stream = words.assemble(b"", source, layout, [], encoded)
        assert nbytes == len(stream)
        seen.add((stream, escaped.tobytes()))
    assert len(seen) == 1
    planes: list[Any] = planes_of(source, layout, packed)
    rest = source.copy()
    for which in range(layout.planes):
        if seed >> which & 5 == 5:
            planes[which] = int(words.plane(source, layout, which)[0])
            every = [words.plane(rest, layout, p) for p in range(layout.planes)]
            every[which] = np.full(n, planes[which], np.uint8)
            rest = with_planes(rest, every, layout)
    for path in PATHS:
        simd(path)
        out = np.zeros_like(source)
        coded = np.frombuffer(stream, np.uint8)
        words.join_coded(coded, field, escaped, planes, layout, out, packed, 1 + seed % 3)
        assert np.array_equal(out, rest), path


def with_planes(source: Any, planes: list[Any], layout: Layout) -> Any:
    """The words with another rest, put together bit by bit."""
    rest = [int.from_bytes(bytes(column), "big") for column in zip(*planes, strict=True)]
    below = layout.rest_bits - 1
    top, mask = 8 * layout.width - 1, (1 << below) - 1
    field = [int(v) for v in words_numpy.values(source, layout.field_bits)]
    joined = [r >> below << top | f << below | r & mask for r, f in zip(rest, field, strict=True)]
    return np.array(joined, source.dtype)


def test_the_layout_bit_by_bit(simd: Any) -> None:
    # 1 [10110111] 0110011, of which 1 0110011 is the rest; then one bit and two more in the field.
    word = np.array([0b1_10110111_0110011], "<u2")
    for path in PATHS:
        simd(path)
        assert words.plane(word, Layout(2, 8), 0).tolist() == [0b1_0110011]
        assert words.plane(word, Layout(2, 9), 0).tolist() == [0b1_110011]
        assert words.plane(word, Layout(2, 5), 0).tolist() == [0b111]
        assert words.plane(word, Layout(2, 5), 1).tolist() == [0b10110011]
        assert words.plane(word, Layout(2, 0), 1).tolist() == [0b10110011]
        packed = words.assemble(b"", np.repeat(word, 3), Layout(2, 11), [0], None)
        assert packed == (0b10011_10011_10011).to_bytes(2, "little")


def foreign(symbols: Any, freqs: Any, lanes: int, panels: int) -> Any:
    """A rANS stream as another encoder may cut it: blocks of so many panels."""
    reach = lanes * panels
    parts = [symbols[None, at : at + reach] for at in range(0, symbols.size, reach)]
    coded = [rans.encode(part, None, freqs, lanes)[1:] for part in parts]
    lengths = [
        (len(c) - 4 * min(lanes, part.size)) // 2 for c, part in zip(coded, parts, strict=True)
    ]
    head = bytes([0x10 | lanes.bit_length() - 1])
    numbers = np.array([1, panels, *lengths], "<u4").tobytes()
    return np.frombuffer(head + numbers + b"".join(coded), np.uint8)


@pytest.mark.parametrize("layout", [Layout(2, 11), Layout(4, 9)])
@pytest.mark.parametrize(("lanes", "panels"), [(1, 333), (1, 8193), (2, 4099), (4, 77), (32, 259)])
@pytest.mark.parametrize("path", PATHS)
def test_blocks_that_another_encoder_cut(
    simd: Any, path: str, lanes: int, panels: int, layout: Layout
) -> None:
    n, reach = 2 * TILE + 1001, lanes * panels
    source = sample(n, layout, 12, seed=5)
    # Escapes where blocks and tiles meet.
    ends = [at + i for at in range(0, n, reach) for i in (-1, 0)] + [TILE - 1, TILE, n - 1]
    field = Field(5, 6, True, quantise(np.array([5, 9, 9, 9, 9, 3])))
    kind = source.dtype.type
    source[[e for e in ends if 0 <= e < n]] &= ~kind(
        ((1 << layout.field_bits) - 1) << layout.rest_bits - 1
    )
    symbols = words_numpy.symbols(source, layout, field)
    escaped = words_numpy.values(source[symbols == 5], layout.field_bits).astype(np.uint32)
    assert set(symbols[ends[1:3]]) == {5}
    simd(PATHS[0])
    stream = foreign(symbols, field.freqs[None], lanes, panels)
    planes = planes_of(source, layout, packed=True)
    simd(path)
    for threads in (1, 3):
        out = np.zeros_like(source)
        words.join_coded(stream, field, escaped, planes, layout, out, True, threads)
        assert np.array_equal(out, source)
    for wrong in (escaped[:-1], np.append(escaped, escaped[:1])):
        with pytest.raises(FormatError, match="escapes"):
            words.join_coded(stream, field, wrong, planes, layout, out, True)


@pytest.mark.parametrize("coder", ["rans", "huffman"])
def test_several_blocks(simd: Any, coder: str) -> None:
    layout, n = Layout(2, 9), (1 << 22) + 3333
    source = np.tile(sample(1 << 18, layout, 15, 9), 17)[:n]
    field = field_of(source, layout, 7, 32, True, coder)
    counts, first = counts_of(source, layout, field), None
    for path in PATHS:
        simd(path)
        for threads in (1, 3) if path != "numpy" else (1,):
            encoded = Encoded(source, layout, field, counts, threads)
            escaped = encoded.escaped
            stream = words.assemble(b"", source, layout, [], encoded, threads)
            first = first or stream
            assert stream == first and (coder == "huffman" or stream[0] & 0x10)
            planes = planes_of(source, layout, packed=True)
            out = np.zeros_like(source)
            coded = np.frombuffer(stream, np.uint8)
            words.join_coded(coded, field, escaped, planes, layout, out, True, threads)
            assert np.array_equal(out, source), path


@pytest.mark.parametrize("layout", [Layout(1, 4), Layout(1, 7), Layout(2, 8), Layout(4, 8), Layout(8, 14)])  # fmt: skip
@pytest.mark.parametrize("direct", [0, 1, 2])
@pytest.mark.parametrize("coder", ["rans", "huffman"])
def test_the_escape_may_stand_beyond_the_field(
    simd: Any, layout: Layout, direct: int, coder: str
) -> None:
    # The highest values are the direct ones: the escape's own number has a bit too many.
    source = sample(500, layout)
    kind, below = source.dtype.type, layout.rest_bits - 1
    most = (1 << layout.field_bits) - 1
    source |= kind(most << below)
    source[::50] &= ~kind(most << below)
    source[1::50] ^= kind(1 << below)
    field = field_of(source, layout, most + 1 - direct, direct + 1, True, coder)
    counts, planes = counts_of(source, layout, field), planes_of(source, layout, packed=True)
    for path in PATHS:
        simd(path)
        encoded = Encoded(source, layout, field, counts)
        escaped = encoded.escaped
        stream = np.frombuffer(words.assemble(b"", source, layout, [], encoded), np.uint8)
        out = np.zeros_like(source)
        words.join_coded(stream, field, escaped, planes, layout, out)
        assert np.array_equal(out, source), path


@pytest.mark.parametrize("path", PATHS)
def test_planes_and_streams_of_a_wrong_size(simd: Any, path: str) -> None:
    simd(path)
    layout, n = Layout(2, 9), 77
    source = sample(n, layout, 5)
    field = field_of(source, layout, 0, 6, True)
    encoded = Encoded(source, layout, field, counts_of(source, layout, field))
    escaped = encoded.escaped
    stream = np.frombuffer(words.assemble(b"", source, layout, [], encoded), np.uint8)
    (plane,) = planes_of(source, layout, packed=True)
    out = np.zeros_like(source)

    def refused(stream: Any, plane: Any, out: Any, packed: bool = True) -> None:
        with pytest.raises(FormatError):
            words.join_coded(stream, field, escaped, [plane], layout, out, packed)

    for wrong in (plane[:-1], np.append(plane, plane[:1]), plane[:0]):
        refused(stream, wrong, out)
    padded = plane.copy()
    padded[-1] |= 0x80
    refused(stream, padded, out)
    refused(stream, plane, out, packed=False)
    refused(stream[:-1], plane, out)
    refused(stream[:0], plane, out)
    refused(stream, plane, np.zeros(n + 1, "<u2"))
    whole = words.plane(source, Layout(2, 0), 0)
    for other in (whole[:-1], whole[:0]):
        with pytest.raises(FormatError):
            words.join([whole, other], Layout(2, 0), out)


@pytest.mark.parametrize("path", PATHS)
def test_a_value_without_a_symbol_is_no_silent_loss(simd: Any, path: str) -> None:
    simd(path)
    layout = Layout(2, 8)
    source = sample(500, layout, 5)
    model = Field(0, 5, False, quantise(np.ones(5, np.int64)))
    with pytest.raises(ValueError, match="model does not know"):
        Encoded(source, layout, model, counts_of(source, layout, model))


@COMMON
@given(
    width=st.sampled_from([1, 2, 4, 8]),
    bits=st.integers(1, 15),
    n=st.integers(0, 20000),
    step=st.integers(1, 3),
)
def test_counts(simd: Any, width: int, bits: int, n: int, step: int) -> None:
    bits = min(bits, 8 * width - 1)
    source = bits_of(n).astype(f"<u{width}")
    parts = [source[at : at + 4096] for at in range(0, n, step * 4096)]
    field = np.concatenate([*parts, source[:0]]) >> source.dtype.type(8 * width - 1 - bits)
    want = np.bincount(field.astype(np.int64) & (1 << bits) - 1, minlength=1 << bits)
    for path in PATHS:
        simd(path)
        assert np.array_equal(words.count(source, bits, step), want), path


def test_every_symbol_of_256_may_be_direct(simd: Any) -> None:
    layout = Layout(2, 8)
    source = np.arange(1 << 16, dtype="<u2")
    field = Field(0, 256, False, quantise(np.ones(256, np.int64)))
    planes = planes_of(source, layout, packed=True)
    counts, seen = np.full(256, 256), set()
    for path in PATHS:
        simd(path)
        for chosen in (field, Field(0, 256, False, None)):
            encoded = Encoded(source, layout, chosen, counts)
            stream = words.assemble(b"", source, layout, [], encoded)
            out = np.zeros_like(source)
            coded = np.frombuffer(stream, np.uint8)
            words.join_coded(coded, chosen, encoded.escaped, planes, layout, out)
            assert np.array_equal(out, source)
            seen.add(stream)
    assert len(seen) == 2
