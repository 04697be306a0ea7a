"""Streams of words: every bit comes back, every implementation writes the same bytes, lies are refused."""

from __future__ import annotations

import os
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.coding import arrays
from tests.coding.test_rans import PATHS
from waterfill.coding import gamma, huffman, lossless, rans, split
from waterfill.coding.entropy import encode_bytes
from waterfill.coding.layout import Layout
from waterfill.coding.lossless import decode, encode, words_of
from waterfill.coding.models import fit
from waterfill.coding.split import EXPONENT_BITS
from waterfill.types import DTYPES, FormatError

# More with WATERFILL_EXAMPLES=10000 in the environment: some twenty minutes.
EXAMPLES = int(os.environ.get("WATERFILL_EXAMPLES", "200"))
COMMON = settings(
    deadline=None,
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SIZES = st.one_of(
    st.integers(0, 80),
    st.integers(0, 80),
    st.integers(250, 700),
    st.integers(4080, 4110),
    st.integers(8180, 8200),
    st.integers(16380, 16400),
)
SHAPES = st.one_of(
    SIZES.map(lambda n: (n,)),
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
    st.tuples(st.integers(1, 130), st.integers(1, 130)),
)
DTYPE = st.sampled_from(sorted(DTYPES))
CODER = st.sampled_from(lossless.CODERS)
KIND = st.sampled_from(sorted(arrays.KINDS))


def check(simd: Any, source: Any, dtype: str, coder: str, threads: int = 1) -> bytes:
    """Encode and decode in every way there is; what all of them wrote."""
    before, streams = source.tobytes(), set()
    for path in PATHS:
        simd(path)
        streams.add(encode(source, dtype, coder, threads))
    assert source.tobytes() == before, "encoding must not change its input"
    assert len(streams) == 1
    stream = streams.pop()
    assert len(stream) <= source.nbytes + (source.size > 0)
    for path in PATHS:
        simd(path)
        out = np.full(source.shape, 0x5A, source.dtype)
        decode(stream, out, dtype, threads)
        assert out.tobytes() == before, path
    return stream


@COMMON
@given(
    dtype=DTYPE, shape=SHAPES, kind=KIND, seed=st.integers(0, 2**32 - 1), coder=CODER,
    threads=st.integers(1, 3),
)  # fmt: skip
def test_every_bit_comes_back(
    simd: Any, dtype: str, shape: tuple[int, ...], kind: str, seed: int, coder: str, threads: int
) -> None:
    source = arrays.make(kind, dtype, int(np.prod(shape, dtype=np.int64)), seed).reshape(shape)
    check(simd, words_of(source), dtype, coder, threads)


@COMMON
@given(dtype=DTYPE, payload=st.binary(max_size=200), times=st.integers(1, 40), coder=CODER)
def test_every_bit_of_any_payload(
    simd: Any, dtype: str, payload: bytes, times: int, coder: str
) -> None:
    width = DTYPES[dtype].itemsize
    payload = payload[: len(payload) // width * width] * times
    check(simd, np.frombuffer(payload, f"<u{width}"), dtype, coder)


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_as_they_lie(simd: Any, dtype: str) -> None:
    kind = arrays.unsigned(dtype)
    source = arrays.make("weights", dtype, 3001, 1)
    whole = encode(source, dtype)
    room = bytearray(1 + source.nbytes)
    shifted = np.frombuffer(room, kind, offset=1)
    shifted[:] = source
    apart = np.repeat(source, 2)
    for path in PATHS:
        simd(path)
        assert encode(words_of(shifted), dtype) == whole
        assert encode(words_of(apart[::2]), dtype) == whole
        assert encode(words_of(source.view(DTYPES[dtype])), dtype) == whole
        shifted[:] = 0
        decode(memoryview(bytearray(whole)), shifted, dtype)
        assert np.array_equal(shifted, source)
    matrix = source[:3000].reshape(50, 60)
    assert encode(words_of(matrix.T), dtype) == encode(matrix.T.reshape(-1), dtype)


def kinds_in(stream: bytes, dtype: str) -> set[str]:
    """Which kinds of stream, plane and field there are in a stream."""
    if not stream:
        return {"empty"}
    seen, source = {f"stream {stream[0]}"}, np.frombuffer(stream, np.uint8)
    if stream[0] == lossless.SPARSE:
        length, at = gamma.read_varint(source, 1 + DTYPES[dtype].itemsize)
        inner = kinds_in(stream[at + length :], dtype)
        return seen | inner | {f"sparse {kind}" for kind in inner if kind.startswith("stream")}
    if stream[0] != lossless.SPLIT:
        return seen
    layout = Layout(DTYPES[dtype].itemsize, stream[1])
    seen.add(f"{dtype} {stream[1]}")
    kinds, at = stream[2 : 2 + layout.planes], 2 + layout.planes
    for kind in kinds:
        length, at = gamma.read_varint(source, at) if kind == 2 else (int(kind == 1), at)
        at += length
    seen |= {f"plane {kind}" for kind in kinds} | {f"first plane {kinds[0]}"}
    return seen | {f"field {stream[at]}"} if layout.field_bits else seen


WANTED = {"empty", *(f"stream {k}" for k in range(5)), "sparse stream 0", "sparse stream 2"}
WANTED |= {f"{plane} {k}" for k in range(3) for plane in ("plane", "first plane")}
WANTED |= {f"field {k}" for k in range(4)}
WANTED |= {f"{dtype} {EXPONENT_BITS.get(dtype, 0)}" for dtype in DTYPES}
WANTED |= {"BF16 9", "F32 9"}


def test_every_kind_is_written(simd: Any) -> None:
    seen = set()
    for dtype in DTYPES:
        for number, kind in enumerate(arrays.KINDS):
            for n in (0, 40, 5000, 20000) if kind == "weights" else (3000,):
                coder = lossless.CODERS[number % 3]
                source = arrays.make(kind, dtype, n, number)
                stream = encode(source, dtype, coder)
                out = np.empty_like(source)
                decode(stream, out, dtype)
                assert out.tobytes() == source.tobytes()
                seen |= kinds_in(stream, dtype)
    assert not WANTED - seen


def test_fields_of_more_words_than_are_counted(simd: Any) -> None:
    # Of every other run only: values there may be that no count knows of.
    source = np.tile(arrays.make("weights", "BF16", 1 << 19, 1), 17)[: 2 * split.SAMPLE + 5]
    source[4096 * 3 + 5] = 0xFFFF
    streams = set()
    for path in PATHS[:-1] or PATHS:
        simd(path)
        streams.add(encode(source, "BF16", "rans", threads=1 + len(streams)))
        stream = max(streams)
        assert "field 1" in kinds_in(stream, "BF16")
        out = np.empty_like(source)
        decode(stream, out, "BF16")
        assert np.array_equal(out, source)
    assert len(streams) == 1


def test_sizes_of_what_is_simple() -> None:
    n = 20000
    sizes = {
        kind: len(encode(arrays.make(kind, dtype, n, 3), dtype)) / (n * DTYPES[dtype].itemsize)
        for kind, dtype in (
            ("constant", "F64"), ("repeats", "I64"), ("counters", "I64"), ("upper_half", "F32"),
            ("weights", "BF16"), ("weights", "F32"), ("nibbles", "U32"), ("zeros", "F32"),
        )
    }  # fmt: skip
    assert sizes["constant"] < 0.001 and sizes["repeats"] < 0.02 and sizes["counters"] < 0.4
    assert sizes["upper_half"] < 0.4 and sizes["nibbles"] < 0.75 and sizes["zeros"] < 0.07


def outcome(data: bytes, n: int, dtype: str, threads: int = 1) -> bytes | None:
    out = np.zeros(n, arrays.unsigned(dtype))
    try:
        decode(data, out, dtype, threads)
    except FormatError:
        return None
    return out.tobytes()


def alike(simd: Any, data: bytes, n: int, dtype: str) -> bytes | None:
    """What every implementation makes of the bytes: one and the same, or FormatError."""
    outcomes = set()
    for path in PATHS:
        simd(path)
        outcomes.add(outcome(data, n, dtype))
    assert len(outcomes) == 1
    return outcomes.pop()


@COMMON
@given(
    dtype=DTYPE, n=st.one_of(st.integers(1, 60), st.integers(250, 600), st.just(4100)), kind=KIND,
    coder=CODER, seed=st.integers(0, 2**32 - 1), data=st.data(),
)  # fmt: skip
def test_damage_is_refused_or_read_alike(
    simd: Any, dtype: str, n: int, kind: str, coder: str, seed: int, data: Any
) -> None:
    stream = bytearray(encode(arrays.make(kind, dtype, n, seed), dtype, coder))
    places = st.one_of(st.integers(0, min(40, len(stream) - 1)), st.integers(0, len(stream) - 1))
    how = data.draw(st.sampled_from(["flip", "write", "cut", "extend", "insert"]))
    at = data.draw(places)
    if how == "flip":
        stream[at] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "write":
        stream[at : at + 3] = data.draw(st.binary(min_size=1, max_size=3))
    elif how == "cut":
        del stream[at:]
    elif how == "extend":
        stream += data.draw(st.binary(min_size=1, max_size=9))
    else:
        stream.insert(at, data.draw(st.integers(0, 255)))
    alike(simd, bytes(stream), n, dtype)


@COMMON
@given(
    dtype=DTYPE, n=st.integers(0, 40), kind=st.integers(0, 5), body=st.binary(max_size=60)
)  # fmt: skip
def test_any_bytes_at_all(simd: Any, dtype: str, n: int, kind: int, body: bytes) -> None:
    field = bytes([EXPONENT_BITS.get(dtype, 0)]) if kind == lossless.SPLIT else b""
    alike(simd, bytes([kind]) + field + body, n, dtype)


WORDS = "c028 3f93 3f81 c029 bfe6 c028 3ffb 402a bff6 bfb0 400b c001 3f93 3fd9 3f87 c021"
EXAMPLE = np.array([int(word, 16) for word in WORDS.split()], "<u2")
HEAD = bytes.fromhex("02 08 00")
FIELD = bytes.fromhex("02 01 7f")
PLANE = bytes.fromhex("a8 13 01 a9 e6 a8 7b 2a f6 b0 0b 81 13 59 07 a1")
SYMBOLS = bytes.fromhex("00 01 00 03 a9 8c")
MASK = encode_bytes(np.array([0x0F, 0x0F], np.uint8))


def sparse(inner: bytes, mask: bytes = MASK) -> bytes:
    return bytes([3, 0, 0]) + gamma.varint(len(mask)) + mask + inner


def escaped(count: int, values: bytes, symbols: Any, size: int = 3) -> bytes:
    """A field of 7f, 80 and an escape."""
    counts = np.bincount(symbols, minlength=size)[:size]
    model = fit(np.maximum(counts, 1)[None])
    head = bytes([1, size - 1, 0x7F]) + model.data + gamma.varint(count) + values
    return HEAD + head + PLANE + rans.encode(symbols[None], None, model.freqs, 1)


EIGHT = EXAMPLE[:8]
WITH_ESCAPES = np.array([1, 0, 2, 1, 0, 1, 0, 1, 0, 2, 1, 1, 0, 0, 0, 1], np.uint8)
TRUE = {
    "the example of the format's page": HEAD + FIELD + PLANE + SYMBOLS,
    "escapes": escaped(2, b"\x05\xff", WITH_ESCAPES),
    "an escape and nothing else": HEAD
    + bytes([1, 0, 0x80, 2, 255, 0, 16])
    + bytes(range(16))
    + PLANE
    + b"\0"
    + (1 << 16).to_bytes(4, "little"),
    "sparse": sparse(b"\0" + EIGHT.tobytes()),
    "sparse, then constant": sparse(b"\1\7\7"),
    "sparse, then deflated": sparse(b"\4" + zlib.compress(EIGHT.tobytes())),
    "sparse, and nothing else": sparse(b"", encode_bytes(np.zeros(2, np.uint8))),
    "deflated": b"\4" + zlib.compress(EXAMPLE.tobytes(), 0),
    "a field to its end": HEAD + bytes([2, 1, 0xFE, 1]) + PLANE + SYMBOLS,
    "planes that are constant": bytes([2, 8, 1, 0xFF]) + FIELD + SYMBOLS,
    "a plane that is coded": bytes([2, 8, 2, 2, 1, 9]) + FIELD + SYMBOLS,
}
LIES = {
    "nothing": b"",
    "an unknown kind": b"\5" + EXAMPLE.tobytes(),
    "stored, too short": b"\0" + EXAMPLE.tobytes()[:-1],
    "stored, too long": b"\0" + EXAMPLE.tobytes() + b"\0",
    "a constant cut short": b"\1\0",
    "a constant too long": b"\1\0\0\0",
    "split and no more": b"\2",
    "no kinds of planes": b"\2\x08",
    "an unknown kind of plane": bytes([2, 8, 3]) + FIELD + PLANE + SYMBOLS,
    "a constant plane cut short": bytes([2, 8, 1]),
    "a coded plane cut short": bytes([2, 8, 2, 3, 1, 9]),
    "a coded plane longer than all": bytes([2, 8, 2, 255, 255, 255, 255, 255, 127, 1, 9]),
    "a length of too many digits": bytes([2, 8, 2, *[128] * 6, 1, 1, 9]),
    "a coded plane of other words": bytes([2, 8, 2, 4, 0, 1, 2, 3]) + FIELD + SYMBOLS,
    "a constant plane beyond its bits": bytes([2, 11, 1, 0x20]) + FIELD + SYMBOLS,
    "a coded plane beyond its bits": bytes([2, 11, 2, 2, 1, 0x20]) + FIELD + SYMBOLS,
    "a stored plane cut short": HEAD + FIELD + PLANE[:-1],
    "no field": HEAD,
    "a field cut short": HEAD + FIELD[:2],
    "an unknown kind of field": HEAD + bytes([6]) + FIELD[1:] + PLANE + SYMBOLS,
    "a field beyond its bits": HEAD + bytes([2, 1, 0xFF, 1]) + PLANE + SYMBOLS,
    "a field from far away": HEAD + bytes([2, 1, 255, 255, 255, 255, 255, 127]) + PLANE + SYMBOLS,
    "a field from too far away": HEAD + bytes([2, 1, *[128] * 6, 1]) + PLANE + SYMBOLS,
    "a code for a symbol too many": HEAD + bytes([2, 0, 0x7F]) + PLANE + SYMBOLS,
    "no code": HEAD + FIELD + PLANE,
    "no symbols": HEAD + FIELD + PLANE + SYMBOLS[:-2],
    "symbols cut short": HEAD + FIELD + PLANE + SYMBOLS[:-1],
    "bytes left over": HEAD + FIELD + PLANE + SYMBOLS + b"\0",
    "more escapes than words": escaped(17, bytes(17), WITH_ESCAPES),
    "more escapes than bytes": escaped(1 << 30, b"", WITH_ESCAPES),
    "escapes beyond all bounds": escaped((1 << 42) - 1, b"", WITH_ESCAPES),
    "too few escapes": escaped(1, b"\5", WITH_ESCAPES),
    "too many escapes": escaped(3, b"\5\6\7", WITH_ESCAPES),
    "a model that is parametric": HEAD + bytes([0, 1, 0x7F, 4, 60]) + PLANE + bytes(5),
    "a model cut short": HEAD + bytes([0, 1, 0x7F]),
    "sparse within sparse": sparse(sparse(b"\1\7\7", encode_bytes(np.array([255], np.uint8)))),
    "sparse and no mask": bytes([3, 0, 0]),
    "sparse and no word": bytes([3, 0]),
    "a mask longer than all": bytes([3, 0, 0, 255, 255, 255, 255, 255, 127]) + MASK,
    "a mask of fewer words": sparse(b"\0" + EIGHT.tobytes(), b"\0\x0f"),
    "no others": sparse(b""),
    "others that are none": sparse(b"\1\7\7", encode_bytes(np.zeros(2, np.uint8))),
    "others of another number": sparse(b"\0" + EIGHT[1:].tobytes()),
    "deflated, of fewer words": b"\4" + zlib.compress(EIGHT.tobytes()),
    "deflated, of more words": b"\4" + zlib.compress(EXAMPLE.tobytes() + b"\0"),
    "deflated, cut short": b"\4" + zlib.compress(EXAMPLE.tobytes())[:-1],
    "deflated, with a wrong sum": b"\4" + zlib.compress(EXAMPLE.tobytes())[:-4] + b"\0\0\0\0",
    "deflated, and more": b"\4" + zlib.compress(EXAMPLE.tobytes()) + b"\0",
    "deflated with a dictionary": b"\4\x78\xbb" + bytes(40),
    "deflated and no more": b"\4",
}  # fmt: skip


@pytest.mark.parametrize("name", TRUE)
def test_the_streams_that_lies_are_made_from(simd: Any, name: str) -> None:
    decoded = alike(simd, TRUE[name], EXAMPLE.size, "BF16")
    assert decoded is not None
    if name.startswith("the example"):
        assert decoded == EXAMPLE.tobytes()
        assert encode(EXAMPLE, "BF16") == TRUE[name]
        assert encode(EXAMPLE[:4], "BF16") == b"\0" + EXAMPLE[:4].tobytes()
    if name == "escapes":
        field = np.frombuffer(decoded, "<u2") >> 7 & 255
        assert field[WITH_ESCAPES == 2].tolist() == [5, 255]
        assert np.array_equal(field[WITH_ESCAPES < 2], 0x7F + WITH_ESCAPES[WITH_ESCAPES < 2])


@pytest.mark.parametrize("lie", LIES)
def test_bytes_that_lie(simd: Any, lie: str) -> None:
    assert alike(simd, LIES[lie], EXAMPLE.size, "BF16") is None


def test_bytes_for_no_words(simd: Any) -> None:
    for data in (b"\0", b"\1\0\0", TRUE["deflated"]):
        assert alike(simd, data, 0, "BF16") is None
    assert alike(simd, b"", 0, "BF16") == b""


def test_padding(simd: Any) -> None:
    # Seven words of three bits, and a bit string of three bytes with three spare bits.
    n, field = 7, bytes([2, 1, 0])
    code = huffman.encode(np.array([0, 1, 0, 0, 1, 1, 0], np.uint8))
    for spare in range(8):
        plane = bytes([0b10101010, 0b01010101, 0b10101 | spare << 5])
        whole = alike(simd, bytes([2, 5, 0]) + field + plane + code, n, "F8_E5M2")
        assert (whole is None) == (spare > 0)
    for spare in range(2):
        mask = encode_bytes(np.array([0b1010_1010 | spare], np.uint8))
        data = bytes([3, 9]) + gamma.varint(len(mask)) + mask + b"\1\7"
        whole = alike(simd, data, n, "U8")
        assert whole == (None if spare else bytes([7, 9] * 3 + [7]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fields_that_the_dtype_has_not(simd: Any, dtype: str) -> None:
    width, exponent = DTYPES[dtype].itemsize, EXPONENT_BITS.get(dtype, 0)
    code = huffman.encode(np.array([0, 1, 0], np.uint8))
    right = set()
    for bits in range(256):
        planes = (8 * width - bits + 7) // 8
        field = bytes([2, 1, 0]) if bits else b""
        data = bytes([2, bits, *[1] * planes, *[0] * planes]) + field + (code if bits else b"")
        if alike(simd, data, 3, dtype) is not None:
            right.add(bits)
    most = min(exponent + 3, 8 * width - 1)
    assert right == (set(range(exponent, most + 1)) if exponent else {0})


def test_a_bomb_of_deflate_goes_no_further_than_the_words(simd: Any) -> None:
    bomb = b"\4" + zlib.compress(bytes(1 << 26), 9)
    tracemalloc.start()
    for data in (bomb, sparse(bomb)):
        assert outcome(data, EXAMPLE.size, "BF16") is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
