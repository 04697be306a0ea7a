"""waterfill.lossless: numpy arrays and torch tensors to bytes and back, and what is refused."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.coding import arrays
from tests.test_import import loaded
from waterfill import lossless
from waterfill.coding.gamma import varint
from waterfill.types import DTYPES, FormatError, WaterfillError

torch = pytest.importorskip("torch", reason="half of what goes in and out is a torch tensor")

OF_TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
SHAPES = ((), (0,), (3, 0, 2), (1,), (7, 30), (2, 3, 4, 5))
DATA = lossless.encode(np.arange(30, dtype=np.float32).reshape(5, 6))


def bits(dtype: str, shape: tuple[int, ...]) -> Any:
    n = int(np.prod(shape, dtype=np.int64))
    if dtype == "BOOL":
        return (np.arange(n) % 3 == 0).reshape(shape)
    return arrays.make("outliers", dtype, n, n).view(DTYPES[dtype]).reshape(shape)


def tensor(array: Any, dtype: str) -> Any:
    raw = torch.from_numpy(np.frombuffer(bytearray(array.tobytes()) or bytearray(8), np.uint8))
    return raw[: array.nbytes].view(getattr(torch, OF_TORCH[dtype])).reshape(array.shape)


def octets(x: Any) -> bytes:
    if isinstance(x, np.ndarray):
        return x.tobytes()
    return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_and_tensors(dtype: str, shape: tuple[int, ...]) -> None:
    array = bits(dtype, shape)
    turned = tensor(array, dtype)
    data = lossless.encode(turned)
    assert octets(turned) == array.tobytes()
    assert len(data) <= array.nbytes + 40 + 3 * len(shape)
    info = lossless.describe_stream(data)
    assert (info.dtype, info.shape) == (dtype, shape)
    if dtype not in ("BF16", "F8_E4M3", "F8_E5M2"):
        assert lossless.encode(array) == data
    out = lossless.decode(data)
    assert isinstance(out, np.ndarray)
    assert (out.dtype, out.shape, out.tobytes()) == (DTYPES[dtype], shape, array.tobytes())
    for target in (np.zeros(shape, DTYPES[dtype]), torch.zeros_like(turned)):
        assert lossless.decode(bytearray(data), target, threads=2) is target
        assert octets(target) == array.tobytes()


def test_dtypes_that_numpy_has_from_elsewhere() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="numpy has no bfloat16 of its own")
    for dtype in ("BF16", "F8_E4M3", "F8_E5M2"):
        array = bits(dtype, (5, 60))
        named = array.view(getattr(ml_dtypes, OF_TORCH[dtype]))
        data = lossless.encode(named)
        assert data == lossless.encode(tensor(array, dtype))
        out = lossless.decode(data, np.zeros_like(named))
        assert out.dtype == named.dtype and out.tobytes() == array.tobytes()


@given(
    dtype=st.sampled_from(sorted(set(DTYPES) - {"BF16", "F8_E4M3", "F8_E5M2"})),
    shape=st.lists(st.integers(0, 12), max_size=4).map(tuple),
    kind=st.sampled_from(sorted(arrays.KINDS)),
    coder=st.sampled_from(["auto", "rans", "huffman"]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_every_bit_comes_back(
    dtype: str, shape: tuple[int, ...], kind: str, coder: str, seed: int
) -> None:
    words = arrays.make(kind, dtype, int(np.prod(shape, dtype=np.int64)), seed)
    array = (words & words.dtype.type(1) if dtype == "BOOL" else words).view(DTYPES[dtype])
    array = array.reshape(shape)
    data = lossless.encode(array, coder=coder, threads=1)
    assert data == lossless.encode(array, coder=coder, threads=3)
    out = lossless.decode(data)
    assert (out.dtype, out.shape, out.tobytes()) == (array.dtype, shape, array.tobytes())


def test_views_of_other_memory() -> None:
    array = np.random.default_rng(1).normal(size=(40, 50)).astype(np.float32)
    want = lossless.encode(np.ascontiguousarray(array.T))
    parameter = torch.nn.Parameter(torch.from_numpy(array))
    room = np.frombuffer(bytearray(array.nbytes + 1), np.float32, offset=1).reshape(array.shape)
    room[:] = array
    for view in (array.T, array.T.astype(">f4"), parameter.T, room.T, np.asfortranarray(array).T):
        before = view.tobytes() if isinstance(view, np.ndarray) else octets(view)
        assert lossless.encode(view) == want
        assert before == (view.tobytes() if isinstance(view, np.ndarray) else octets(view))
    room[:] = 0
    assert np.array_equal(lossless.decode(lossless.encode(array), room), array)
    part = torch.zeros(3, 40, 50)
    lossless.decode(lossless.encode(array), part[1])
    assert np.array_equal(part[1].numpy(), array) and not part[::2].any()


def read_only() -> Any:
    array = np.zeros((5, 6), np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        (np.zeros((5, 6)), "out is float64"),
        (np.zeros((6, 5), np.float32), r"out is float32\[6, 5\]"),
        (np.zeros(30, np.float32), r"out is float32\[30\]"),
        (np.zeros((5, 6), np.uint32), "out is uint32"),
        (np.zeros((6, 5), np.float32).T, "C-contiguous"),
        (np.zeros((5, 12), np.float32)[:, ::2], "C-contiguous"),
        (read_only(), "writeable"),
        (np.zeros((5, 6), ">f4"), "little-endian"),
        (torch.zeros(5, 6, dtype=torch.bfloat16), "out is bfloat16"),
        (torch.zeros(6, 5), r"out is float32\[6, 5\]"),
        (torch.zeros(6, 5).T, "contiguous tensor"),
        (torch.zeros(5, 6, device="meta"), "on the meta device"),
        (bytearray(120), "not bytearray"),
        ([[0.0] * 6] * 5, "not list"),
    ],
)
def test_buffers_that_do_not_fit(out: Any, reason: str) -> None:
    with pytest.raises(WaterfillError, match=reason):
        lossless.decode(DATA, out)


@pytest.mark.parametrize(
    "x",
    [
        np.zeros(3, complex), np.array(["a"]), np.array([{}]), np.zeros(3, "i4,f4"),
        np.zeros(3, "M8[s]"), torch.zeros(3, dtype=torch.complex64), [1.0, 2.0], 3.0, b"bytes", None,
        torch.zeros(3, device="meta"), torch.eye(3).to_sparse(),
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_array_of_known_numbers(x: Any) -> None:
    with pytest.raises(WaterfillError, match="the array"):
        lossless.encode(x)


def test_arguments() -> None:
    with pytest.raises(ValueError, match="auto, rans, huffman"):
        lossless.encode(np.zeros(3), coder="zip")
    most = np.zeros((1,) * 32, np.float32)
    assert lossless.decode(lossless.encode(most)).shape == most.shape
    with pytest.raises(WaterfillError, match="33 axes"):
        lossless.encode(torch.zeros((1,) * 33))
    with pytest.raises(WaterfillError, match="no shape"):
        lossless.encode(np.zeros((0, 1 << 60), np.uint8))
    with pytest.raises(WaterfillError, match="no shape"):
        lossless.encode(np.zeros((0, 1 << 42), np.uint8))
    long = np.zeros((0, (1 << 42) - 1), np.uint8)
    assert lossless.decode(lossless.encode(long)).shape == long.shape


def test_any_flipped_bit_is_refused() -> None:
    for data in (DATA, lossless.encode(np.zeros((), np.uint8)), lossless.encode(np.zeros(0))):
        for bit in range(8 * len(data)):
            broken = bytearray(data)
            broken[bit // 8] ^= 1 << bit % 8
            with pytest.raises(FormatError):
                lossless.decode(broken)


def test_any_other_length_is_refused() -> None:
    for n in range(len(DATA)):
        with pytest.raises(FormatError):
            lossless.decode(DATA[:n])
    for more in (b"\0", DATA):
        with pytest.raises(FormatError):
            lossless.decode(DATA + more)
    assert lossless.describe_stream(DATA[:-3]).shape == (5, 6)


def sealed(head: bytes, stream: bytes = b"\1\0\0\0\0", magic: bytes = b"wfl\1") -> bytes:
    """What a liar would write: the checksum is right."""
    head = magic + head
    return head + zlib.crc32(stream, zlib.crc32(head)).to_bytes(4, "little") + stream


F32 = b"\3F32"


def test_what_lies_are_made_from() -> None:
    assert lossless.decode(sealed(F32 + b"\2\3\4")).tolist() == [[0.0] * 4] * 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (sealed(F32 + b"\1\3", magic=b"wfl\2"), "newer"),
        (sealed(F32 + b"\1\3", magic=b"wflx"), "not an array"),
        (sealed(b"\4F128\1\3"), "unknown dtype"),
        (sealed(b"\0\1\3"), "unknown dtype"),
        (sealed(b"\3\xff\xfe\0\1\3"), "unknown dtype"),
        (sealed(b"\xffF32\1\3"), "not an array"),
        (sealed(F32 + bytes([33] + [1] * 33)), "33 axes"),
        (sealed(F32 + bytes([255])), "cut short"),
        (sealed(F32 + b"\2" + 2 * varint(1 << 30)), "no shape"),
        (sealed(F32 + b"\3\0" + 2 * varint(1 << 40)), "no shape"),
        (sealed(F32 + b"\x20" + 32 * varint((1 << 42) - 1)), "no shape"),
        (sealed(F32 + b"\2" + varint(1 << 30) + varint(1 << 29)), "memory"),
        (sealed(F32 + b"\1" + b"\x80" * 6 + b"\1"), "digits"),
        (sealed(F32 + b"\1\3", b"\1\0\0\0"), "bytes"),
        (sealed(F32 + b"\1\3", b"\0" * 12), "bytes"),
        (sealed(F32 + b"\1\0"), "no words"),
        (sealed(F32 + b"\1\3", b""), "empty"),
        (sealed(F32 + b"\1\3", b"\3\0\0\0\0\2\1\xff\1"), "."),
        (sealed(F32 + b"\1"), "."),
        (sealed(F32), "."),
        (sealed(b""), "."),
        (b"", "not an array"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_lies_with_a_right_checksum(data: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        lossless.decode(data)


def test_reached_from_the_package_without_torch() -> None:
    code = (
        "import numpy, waterfill\n"
        "data = waterfill.lossless.encode(numpy.arange(99.0))\n"
        "assert waterfill.lossless.decode(data, numpy.empty(99))[98] == 98"
    )
    assert loaded(code) == {"numpy"}
    assert "numpy" not in loaded("import waterfill")
